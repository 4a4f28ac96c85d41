//! A router that opens a port on request, as homes and offices have: a real miniupnpd.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Coordinator, Join, Mesh, SPREAD_BOUND};
use tests::nat::{Nat, Reflector};
use tests::probe::{PASS_BOUND, Question, Talk, passes};
use tests::topology::Topology;
use tests::wait_until;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
const SERVERS: [&str; 2] = ["192.0.2.1:3478", "192.0.2.1:3479"];
/// The router's second address: miniupnpd opens no port of one that is reserved for documentation.
const OUTSIDE: &str = "11.1.1.21";
/// How long two nodes may take to meet, in an emulator.
const DIRECT_BOUND: Duration = Duration::from_secs(12);
/// Where miniupnpd puts its rules.
const TABLE: &str = "table inet router_ports {
 chain miniupnpd { }
 chain prerouting { type nat hook prerouting priority dstnat; jump prerouting_miniupnpd; }
 chain postrouting { type nat hook postrouting priority srcnat - 1; jump postrouting_miniupnpd; }
 chain prerouting_miniupnpd { }
 chain postrouting_miniupnpd { }
}
";

/// Two LANs, each behind a router that shows another port to each destination.
///
/// ```text
///  hub (coordinator, STUN)      a 10.1.0.2                      b 10.2.0.2
///   │ 192.0.2.1                  └ lan-a ─ router-a (miniupnpd)  └ lan-b ─ router-b
///  ─┴──────────────────────────────────────┴──────────────────────────────┴── internet
/// ```
fn topology() -> Topology {
    let lan = |topology: Topology, letter: &str, number: u8| {
        let (router, lan) = (format!("router-{letter}"), format!("lan-{letter}"));
        let outside = format!("192.0.2.2{number}/24");
        let inside = format!("10.{number}.0.1/24");
        topology
            .switch(&lan)
            .host(&router, &[("internet", &outside), (&lan, &inside)])
            .host(letter, &[(&lan, &format!("10.{number}.0.2/24"))])
            .route("default", &format!("10.{number}.0.1"))
    };
    lan(lan(Topology::star(&[]), "a", 1), "b", 2)
}

/// Starts miniupnpd on a router.
fn open_ports_on_request(router: &Host, folder: &std::path::Path) -> anyhow::Result<()> {
    router.ip(&format!("addr add {OUTSIDE}/32 dev eth0\n"))?;
    router.run_with("nft -f -", TABLE)?;
    let config = folder.join("miniupnpd.conf");
    let text = format!(
        "ext_ifname=eth0\next_ip={OUTSIDE}\nlistening_ip=eth1\nenable_natpmp=yes\nenable_upnp=no\n\
         secure_mode=yes\nupnp_table_name=router_ports\nupnp_nat_table_name=router_ports\n\
         allow 1024-65535 10.1.0.0/24 1024-65535\n"
    );
    std::fs::write(&config, text)?;
    let pid = folder.join("miniupnpd.pid");
    let line = format!("miniupnpd -d -f {} -P {}", config.display(), pid.display());
    router.start("miniupnpd", &line)?;
    Ok(())
}

fn rules(router: &Host) -> anyhow::Result<String> {
    let chain = "nft list chain inet router_ports prerouting_miniupnpd";
    Ok(router.run(chain)?.stdout)
}

/// See [`topology`]. No hole can be punched here, but a's router opens a port when it is asked.
#[test]
fn a_port_that_the_router_opens_leads_through_two_hard_nats() -> anyhow::Result<()> {
    let lab = Lab::new("portmap", &topology())?;
    let [router, other, hub] = ["router-a", "router-b", "hub"].map(|name| lab.host(name));
    Nat::Symmetric.install(&router, lab.host("a").v4())?;
    Nat::Symmetric.install(&other, lab.host("b").v4())?;
    for host in [&other, &hub] {
        host.ip(&format!("route add {OUTSIDE}/32 via 192.0.2.21\n"))?;
    }
    let folder = tempfile::tempdir()?;
    open_ports_on_request(&router, folder.path())?;
    let serve = |at: &&str| Reflector::start(&hub, at.parse()?);
    let _servers: Vec<Reflector> = SERVERS.iter().map(serve).collect::<Result<_, _>>()?;
    let config = format!("[relays]\nstun = {SERVERS:?}\n");
    let mut mesh = Mesh::new(Coordinator::start_with(&hub, &config)?);
    mesh.coordinator.admin("network create home")?;
    let user = "user create ana@example.com --network home";
    mesh.coordinator.admin(user)?;
    mesh.coordinator.set_policy(POLICY)?;
    let join = |host| Join {
        host,
        owner: "--user ana@example.com",
        routes: "",
    };
    mesh.join(&lab, &[join("a"), join("b")])?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));

    let opened = format!("{OUTSIDE}:51820");
    let mut last = Value::Null;
    let told = || {
        last = a
            .weir("netcheck --json")
            .and_then(|out| out.json())
            .unwrap_or_default();
        last["v4"]["endpoints"]
            .as_array()
            .is_some_and(|all| all.iter().any(|it| *it == opened))
    };
    let waited = wait_until("the router opened a port", SPREAD_BOUND, told);
    waited.with_context(|| format!("{last:#}"))?;
    let question = Question {
        from: std::sync::Arc::clone(&b.host),
        to: std::sync::Arc::clone(&a.host),
        dst: a.v4()?,
        talk: Talk::Ping,
    };
    let answered = || passes(&question, PASS_BOUND).unwrap_or_default();
    wait_until("b reaches a", DIRECT_BOUND, answered)?;
    let endpoint = b.host.run("wg show weir0 endpoints")?.stdout;
    // The port is open at both of the router's addresses; no other port of it leads to a.
    ensure!(
        endpoint.trim_end().ends_with(":51820"),
        "by what path? {endpoint}"
    );

    ensure!(rules(&router)?.contains("dnat"), "{}", rules(&router)?);
    a.process().stop()?;
    ensure!(!rules(&router)?.contains("dnat"), "not given back");
    lab.passed();
    Ok(())
}
