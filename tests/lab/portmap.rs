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

/// What miniupnpd takes requests by.
#[derive(Clone, Copy)]
enum Speaks {
    /// PCP and NAT-PMP.
    Pcp,
    /// UPnP alone.
    Upnp,
}

/// Starts miniupnpd on a router.
fn open_ports_on_request(
    router: &Host,
    folder: &std::path::Path,
    speaks: Speaks,
) -> anyhow::Result<()> {
    router.ip(&format!("addr add {OUTSIDE}/32 dev eth0\n"))?;
    router.run_with("nft -f -", TABLE)?;
    let config = folder.join("miniupnpd.conf");
    let (natpmp, upnp) = match speaks {
        Speaks::Pcp => ("yes", "no"),
        Speaks::Upnp => ("no", "yes"),
    };
    let text = format!(
        "ext_ifname=eth0\next_ip={OUTSIDE}\nlistening_ip=eth1\n\
         enable_natpmp={natpmp}\nenable_upnp={upnp}\n\
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

struct Site {
    lab: Lab,
    mesh: Mesh,
    _folder: tempfile::TempDir,
    _servers: Vec<Reflector>,
}

impl Site {
    /// See [`topology`]: two hard NATs, of which a's opens ports on request.
    fn start(name: &str, speaks: Speaks, joins: &[&'static str]) -> anyhow::Result<Self> {
        let lab = Lab::new(name, &topology())?;
        let [router, other, hub] = ["router-a", "router-b", "hub"].map(|name| lab.host(name));
        Nat::Symmetric.install(&router, lab.host("a").v4())?;
        Nat::Symmetric.install(&other, lab.host("b").v4())?;
        for host in [&other, &hub] {
            host.ip(&format!("route add {OUTSIDE}/32 via 192.0.2.21\n"))?;
        }
        let folder = tempfile::tempdir()?;
        open_ports_on_request(&router, folder.path(), speaks)?;
        let serve = |at: &&str| Reflector::start(&hub, at.parse()?);
        let servers = SERVERS.iter().map(serve).collect::<Result<_, _>>()?;
        let config = format!("[relays]\nstun = {SERVERS:?}\n");
        let mut mesh = Mesh::new(Coordinator::start_with(&hub, &config)?);
        mesh.coordinator.admin("network create home")?;
        let user = "user create ana@example.com --network home";
        mesh.coordinator.admin(user)?;
        mesh.coordinator.set_policy(POLICY)?;
        let join = |host: &&'static str| Join {
            host,
            owner: "--user ana@example.com",
            routes: "",
        };
        let joins: Vec<Join<'_>> = joins.iter().map(join).collect();
        mesh.join(&lab, &joins)?;
        Ok(Self {
            lab,
            mesh,
            _folder: folder,
            _servers: servers,
        })
    }

    /// Waits until a tells of a port of its router, asked for by this.
    fn until_opened(&self, protocol: &str) -> anyhow::Result<()> {
        let (a, opened) = (self.mesh.node("a"), format!("{OUTSIDE}:51820"));
        let mut last = Value::Null;
        let told = || {
            let check = a.weir("netcheck --json").and_then(|out| out.json());
            last = check.unwrap_or_default();
            let told = last["v4"]["endpoints"].as_array();
            let mapping = &last["port_mapping"];
            told.is_some_and(|all| all.iter().any(|it| *it == opened))
                && mapping["addr"] == opened
                && mapping["protocol"] == protocol
        };
        let waited = wait_until("the router opened a port", SPREAD_BOUND, told);
        waited.with_context(|| format!("{last:#}"))
    }

    fn rules(&self) -> anyhow::Result<String> {
        rules(&self.lab.host("router-a"))
    }
}

/// See [`topology`]. No hole can be punched here, but a's router opens a port when it is asked.
#[test]
fn a_port_that_the_router_opens_leads_through_two_hard_nats() -> anyhow::Result<()> {
    let site = Site::start("portmap", Speaks::Pcp, &["a", "b"])?;
    let [a, b] = ["a", "b"].map(|name| site.mesh.node(name));
    site.until_opened("PCP")?;
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

    ensure!(site.rules()?.contains("dnat"), "{}", site.rules()?);
    a.process().stop()?;
    ensure!(!site.rules()?.contains("dnat"), "not given back");
    site.lab.passed();
    Ok(())
}

/// See [`topology`]. What a router opened by UPnP is given back when the node goes down, and when
/// the operator wants no port of it.
#[test]
fn a_router_that_speaks_upnp_alone_opens_a_port_too() -> anyhow::Result<()> {
    let site = Site::start("portmap-upnp", Speaks::Upnp, &["a"])?;
    let a = site.mesh.node("a");
    site.until_opened("UPnP")?;
    ensure!(site.rules()?.contains("dnat"), "{}", site.rules()?);
    let check = a.weir("netcheck")?.stdout;
    ensure!(check.contains("asked by UPnP"), "{check}");

    a.weir("set --port-mapping=off")?;
    let closed = || site.rules().is_ok_and(|rules| !rules.contains("dnat"));
    wait_until("the port is given back", SPREAD_BOUND, closed)?;
    a.weir("set --port-mapping=on")?;
    site.until_opened("UPnP")?;
    a.weir("down")?;
    wait_until("the port is given back", SPREAD_BOUND, closed)?;
    site.lab.passed();
    Ok(())
}
