//! Ends that move under traffic: a host gets another address, a router another mapping.
//!
//! What the kernel's own tests of WireGuard do by hand (tools/testing/selftests/wireguard/netns.sh,
//! "roaming" and "NAT"), here with the agents at work, and with the traffic from the side that must
//! find out.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Coordinator, Join, Mesh, Node};
use tests::nat::{MAPPED_PORT, Nat};
use tests::stream::Numbered;
use tests::topology::Topology;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
/// Longest outage: three seconds, and this in an emulator.
const FOLLOWED: Duration = Duration::from_millis(4_500);

/// What the nodes' packets travel over.
#[derive(Clone, Copy, Debug)]
enum Underlay {
    V4,
    V6,
}

impl Underlay {
    /// The host's address of this kind that ends in `number`, as `ip` wants it.
    fn addr(self, number: u8) -> String {
        match self {
            Self::V4 => format!("192.0.2.{number}/24"),
            Self::V6 => format!("2001:db8::{number}/64"),
        }
    }

    /// What nodes have to begin with: who moves from one IPv6 address to another has no way over
    /// IPv4, and who moves to an IPv4 address may lose IPv6 with the old one.
    fn had(self) -> &'static [Self] {
        match self {
            Self::V4 => &[Self::V4, Self::V6],
            Self::V6 => &[Self::V6],
        }
    }

    /// See [`both_move`].
    fn topology(self) -> Topology {
        let mut topology = Topology::new().switch("internet");
        for (number, name) in [(1, "hub"), (11, "a"), (12, "b")] {
            let addrs = self.had().iter().map(|it| it.addr(number));
            let addrs = addrs.collect::<Vec<_>>().join(" ");
            topology = topology.host(name, &[("internet", &addrs)]);
        }
        topology
    }

    /// Where the coordinator listens.
    fn hub(self, lab: &Lab) -> IpAddr {
        match self {
            Self::V4 => lab.host("hub").v4(),
            Self::V6 => lab.host("hub").v6(),
        }
    }
}

/// A network of a coordinator at `hub` and two nodes.
fn mesh(lab: &Lab, hub: IpAddr, hosts: [&'static str; 2]) -> anyhow::Result<Mesh> {
    let mut mesh = Mesh::new(Coordinator::start_at(&lab.host("hub"), hub)?);
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

/// Where the kernel of `node` sends its one peer's packets.
fn endpoint(node: &Node) -> anyhow::Result<SocketAddr> {
    let shown = node.host.run("wg show weir0 endpoints")?.stdout;
    let endpoint = shown.split_whitespace().nth(1);
    Ok(endpoint.context("a peer")?.parse()?)
}

/// a talks to b, and b is suddenly elsewhere; then a is. Whoever moves loses all that it had, and
/// gets one address of the kind that is asked for.
///
/// ```text
///  hub   a   b
///   │    │   │
///  ─┴────┴───┴── internet
/// ```
fn both_move(name: &str, underlay: Underlay) -> anyhow::Result<()> {
    let lab = Lab::new(name, &underlay.topology())?;
    let mesh = mesh(&lab, underlay.hub(&lab), ["a", "b"])?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    for node in [&a, &b] {
        // The kernel asks whether somebody has a new IPv6 address before it uses it, as everywhere.
        let asks = "sysctl -q -w net.ipv6.conf.eth0.accept_dad=1";
        node.host.run(asks)?;
    }
    for (node, other, old, new, what) in [
        (&b, &a, 12, 77, "the peer has another address"),
        (&a, &b, 11, 78, "we have another address"),
    ] {
        let numbered = Numbered::start(&a.host, &b.host, b.v4()?, 80)?;
        numbered.flows(100)?;
        let before = endpoint(other)?;
        let (lost, got) = (underlay.had().iter(), underlay.addr(new));
        let lost = lost.map(|it| format!("addr del {} dev eth0\n", it.addr(old)));
        let lost: String = lost.collect();
        node.host.ip(&format!("{lost}addr add {got} dev eth0\n"))?;
        numbered.flows(300)?;
        let losses = numbered.end()?;
        let (after, gone) = (endpoint(other)?, losses.outage());
        println!("{what} ({before}, then {after}): an outage of {gone:?}");
        ensure!(gone <= FOLLOWED, "{what}: {losses:?}");
        let there = got.split('/').next() == Some(&after.ip().to_string());
        ensure!(there, "{what}: {got} is not {after}");
    }
    lab.passed();
    Ok(())
}

#[test]
fn a_node_whose_address_changes_is_followed_in_seconds() -> anyhow::Result<()> {
    both_move("roaming", Underlay::V4)
}

/// The coordinator, too, is reached over IPv6 alone.
#[test]
fn a_node_whose_ipv6_address_changes_is_followed_in_seconds() -> anyhow::Result<()> {
    both_move("roaming6", Underlay::V6)
}

/// b talks to a, whose router maps it to another port and lets nothing in by the old one.
///
/// ```text
///  hub   b            a 10.1.0.2
///   │    │             └ lan ─ router
///  ─┴────┴─────────────────────┴── internet
/// ```
pub struct Rebinding {
    pub router: Arc<Host>,
    talk: Numbered,
    mesh: Mesh,
    lab: Lab,
}

impl Rebinding {
    /// The port to which a is mapped anew.
    pub const PORT: u16 = MAPPED_PORT + 1;

    /// b has answers. The agents have hardly seen that there is a session.
    pub fn start(name: &str) -> anyhow::Result<Self> {
        let lab = Lab::new(name, &Topology::star(&["b"]).behind_a_router("a"))?;
        let router = lab.host("router");
        Nat::PortRestricted.install(&router, lab.host("a").v4())?;
        let mesh = mesh(&lab, lab.host("hub").v4(), ["a", "b"])?;
        let [a, b] = ["a", "b"].map(|name| mesh.node(name));
        let talk = Numbered::start(&b.host, &a.host, a.v4()?, 80)?;
        talk.flows(20)?;
        Ok(Self {
            router,
            talk,
            mesh,
            lab,
        })
    }

    /// The router forgets what it knew.
    pub fn map_anew(&self) -> anyhow::Result<()> {
        let (old, new) = (MAPPED_PORT.to_string(), Self::PORT.to_string());
        let rules = self.router.run("nft list ruleset")?.stdout;
        ensure!(rules.contains(&old), "{rules}");
        let rules = format!("flush ruleset\n{}", rules.replace(&old, &new));
        self.router.run_with("nft -f -", &rules)?;
        self.router.run("conntrack -F")?;
        Ok(())
    }

    /// How long b had no answers, which is `allowed` at most, before it had them by the new port.
    pub fn end(self, allowed: Duration) -> anyhow::Result<Duration> {
        self.talk.flows(400)?;
        let losses = self.talk.end()?;
        let gone = losses.outage();
        ensure!(gone <= allowed, "{losses:?}");
        let at = endpoint(&self.mesh.node("b"))?;
        ensure!(at.port() == Self::PORT, "{at}");
        self.lab.passed();
        Ok(gone)
    }
}

#[test]
fn a_router_that_maps_anew_is_noticed_in_seconds() -> anyhow::Result<()> {
    let rebinding = Rebinding::start("rebinding")?;
    rebinding.map_anew()?;
    let gone = rebinding.end(FOLLOWED)?;
    println!("the router maps anew: an outage of {gone:?}");
    Ok(())
}
