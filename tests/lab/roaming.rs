//! Ends that move under traffic: a host gets another address, a router another mapping.
//!
//! What the kernel's own tests of WireGuard do by hand (tools/testing/selftests/wireguard/netns.sh,
//! "roaming" and "NAT"), here with the agents at work, and with the traffic from the side that must
//! find out.

use std::time::Duration;

use anyhow::ensure;
use tests::lab::Lab;
use tests::mesh::{Coordinator, Join, Mesh};
use tests::nat::{MAPPED_PORT, Nat};
use tests::stream::Numbered;
use tests::topology::Topology;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
/// Longest outage: three seconds, and this in an emulator.
const FOLLOWED: Duration = Duration::from_millis(4_500);

fn mesh(lab: &Lab, hosts: [&'static str; 2]) -> anyhow::Result<Mesh> {
    let mut mesh = Mesh::new(Coordinator::start(&lab.host("hub"))?);
    mesh.coordinator.admin("network create home")?;
    let user = "user create ana@example.com --network home";
    mesh.coordinator.admin(user)?;
    mesh.coordinator.set_policy(POLICY)?;
    let join = |host| Join {
        host,
        owner: "--user ana@example.com",
        routes: "",
    };
    mesh.join(lab, &hosts.map(join))?;
    Ok(mesh)
}

/// a talks to b, and b is suddenly elsewhere; then a is.
#[test]
fn a_node_whose_address_changes_is_followed_in_seconds() -> anyhow::Result<()> {
    let lab = Lab::new("roaming", &Topology::star(&["a", "b"]))?;
    let mesh = mesh(&lab, ["a", "b"])?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    for (node, old, new) in [(&b, 12, 77), (&a, 11, 78)] {
        let numbered = Numbered::start(&a.host, &b.host, b.v4()?, 80)?;
        numbered.flows(200)?;
        node.host.ip(&format!(
            "addr del 192.0.2.{old}/24 dev eth0\naddr del 2001:db8::{old}/64 dev eth0\n\
             addr add 192.0.2.{new}/24 dev eth0\n"
        ))?;
        numbered.flows(400)?;
        let losses = numbered.end()?;
        let gone = losses.outage();
        println!("{} is elsewhere: an outage of {gone:?}", node.host.name);
        ensure!(gone <= FOLLOWED, "{}: {losses:?}", node.host.name);
    }
    lab.passed();
    Ok(())
}

/// b talks to a, whose router suddenly maps it to another port and lets nothing in by the old one.
///
/// ```text
///  hub   b            a 10.1.0.2
///   │    │             └ lan ─ router
///  ─┴────┴─────────────────────┴── internet
/// ```
#[test]
fn a_router_that_maps_anew_is_noticed_in_seconds() -> anyhow::Result<()> {
    let topology = Topology::star(&["b"]).behind_a_router("a");
    let lab = Lab::new("rebinding", &topology)?;
    let router = lab.host("router");
    Nat::PortRestricted.install(&router, lab.host("a").v4())?;
    let mesh = mesh(&lab, ["a", "b"])?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let numbered = Numbered::start(&b.host, &a.host, a.v4()?, 80)?;
    // At once: the agents have hardly seen that there is a session.
    numbered.flows(20)?;
    let (old, new) = (MAPPED_PORT.to_string(), (MAPPED_PORT + 1).to_string());
    let rules = router.run("nft list ruleset")?.stdout;
    ensure!(rules.contains(&old), "{rules}");
    let rules = format!("flush ruleset\n{}", rules.replace(&old, &new));
    router.run_with("nft -f -", &rules)?;
    router.run("conntrack -F")?;
    numbered.flows(400)?;
    let losses = numbered.end()?;
    let gone = losses.outage();
    println!("the router maps anew: an outage of {gone:?}");
    ensure!(gone <= FOLLOWED, "{losses:?}");
    let endpoint = b.host.run("wg show weir0 endpoints")?.stdout;
    ensure!(endpoint.trim_end().ends_with(&new), "{endpoint}");
    lab.passed();
    Ok(())
}
