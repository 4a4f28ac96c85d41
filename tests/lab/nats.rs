//! Nodes behind NATs: STUN from WireGuard's own port, direct paths where NATs allow them, and relays
//! where they do not.

mod grid;
mod site;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::Value;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Coordinator, Join, Mesh, Node, SPREAD_BOUND};
use tests::nat::{MAPPED_PORT, Nat, Reflector, two_lans};
use tests::probe::{PASS_BOUND, Question, Talk, passes};
use tests::topology::Topology;
use tests::wait_until;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
const SERVERS: [&str; 3] = ["192.0.2.1:3478", "192.0.2.1:3479", "[2001:db8::1]:3478"];
/// How long two nodes behind NATs may take to find each other: two seconds on a machine of its own,
/// and this in an emulator.
const DIRECT_BOUND: Duration = Duration::from_secs(12);
/// How long a path may be gone when a router forgot all its mappings.
const HEAL_BOUND: Duration = Duration::from_secs(30);
/// How long one echo is waited for meanwhile, before the next is sent.
const ECHO_BOUND: Duration = Duration::from_millis(500);
/// A firewall that lets in WireGuard's port and answers, nothing else.
const FIREWALL: &str = "table inet host {
chain input {
 type filter hook input priority filter; policy drop;
 iifname lo accept
 iifname weir0 accept
 ct state established,related accept
 udp dport 51820 accept
 meta l4proto ipv6-icmp accept
}
}
";

/// See [`two_lans`]; `c` has no router.
fn topology() -> Topology {
    two_lans(&["c"])
        .host("a2", &[("lan-a", "10.1.0.3/24")])
        .route("default", "10.1.0.1")
}

struct World {
    lab: Lab,
    mesh: Mesh,
    _servers: Vec<Reflector>,
}

/// Routers of these kinds, servers, and a coordinator that names them.
fn world(name: &str, a: Nat, b: Nat) -> anyhow::Result<World> {
    let lab = Lab::new(name, &topology())?;
    a.install(&lab.host("router-a"), lab.host("a").v4())?;
    b.install(&lab.host("router-b"), lab.host("b").v4())?;
    let hub = lab.host("hub");
    let serve = |at: &&str| Reflector::start(&hub, at.parse::<SocketAddr>()?);
    let servers = SERVERS.iter().map(serve).collect::<Result<_, _>>()?;
    let config = format!("[relays]\nstun = {SERVERS:?}\n");
    let mesh = Mesh::new(Coordinator::start_with(&hub, &config)?);
    mesh.coordinator.admin("network create home")?;
    mesh.coordinator
        .admin("user create ana@example.com --network home")?;
    mesh.coordinator.set_policy(POLICY)?;
    Ok(World {
        lab,
        mesh,
        _servers: servers,
    })
}

impl World {
    fn join(&mut self, hosts: &[&'static str]) -> anyhow::Result<()> {
        let join = |host: &&'static str| Join {
            host,
            owner: "--user ana@example.com",
            routes: "",
        };
        let joins: Vec<Join<'_>> = hosts.iter().map(join).collect();
        self.mesh.join(&self.lab, &joins)?;
        Ok(())
    }
}

fn netcheck(node: &Node) -> anyhow::Result<Value> {
    node.weir("netcheck --json")?.json()
}

/// Waits until `node` knows what its NAT is like.
fn until_nat(node: &Node, family: &str, kind: &str) -> anyhow::Result<Value> {
    let mut last = Value::Null;
    let fits = || {
        last = netcheck(node).unwrap_or_default();
        last[family]["nat"] == kind
    };
    let waited = wait_until(&format!("the NAT is {kind}"), SPREAD_BOUND, fits);
    waited.map_err(|error| error.context(format!("{}: {last:#}", node.host.name)))?;
    Ok(last)
}

/// The peer's row of `weir peers`.
fn peer(node: &Node, name: &str) -> Value {
    let document = node.weir("peers --json").and_then(|out| out.json());
    let rows = document.unwrap_or_default()["peers"].clone();
    let named = |row: &&Value| row["name"] == name;
    let found = rows
        .as_array()
        .and_then(|rows| rows.iter().find(named).cloned());
    found.unwrap_or_default()
}

/// Waits for a handshake that nothing but the agents asked for. Returns how long it took.
fn until_direct(node: &Node, name: &str) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let shaken = || !peer(node, name)["handshake_seconds"].is_null();
    wait_until(&format!("{name} is reached"), DIRECT_BOUND, shaken)?;
    Ok(start.elapsed())
}

fn echo(from: &Node, to: &Node) -> anyhow::Result<Question> {
    Ok(Question {
        from: Arc::clone(&from.host),
        to: Arc::clone(&to.host),
        dst: to.v4()?,
        talk: Talk::Ping,
    })
}

fn firewall(host: &Host) -> anyhow::Result<()> {
    host.run_with("nft -f -", FIREWALL).map(drop)
}

/// See [`topology`]: both routers show one port to all, and let in only answers.
#[test]
fn two_nodes_behind_different_nats_find_a_direct_path_and_keep_it() -> anyhow::Result<()> {
    let mut world = world("nats", Nat::PortRestricted, Nat::PortRestricted)?;
    firewall(&world.lab.host("a"))?;
    firewall(&world.lab.host("c"))?;
    world.join(&["a", "c"])?;
    let (a, c) = (world.mesh.node("a"), world.mesh.node("c"));
    let public = until_nat(&c, "v4", "none")?;
    until_nat(&c, "v6", "none")?;
    ensure!(
        public["v4"]["reflexive"] == "192.0.2.11:51820",
        "{public:#}"
    );
    let seen = format!("192.0.2.21:{MAPPED_PORT}");
    let check = until_nat(&a, "v4", "easy")?;
    ensure!(check["v4"]["reflexive"] == seen, "{check:#}");
    let one = until_direct(&a, "c")?;

    world.join(&["b"])?;
    let b = world.mesh.node("b");
    let two = until_direct(&b, "a")?;
    println!("direct after joining: behind one NAT {one:?}, behind two {two:?}");
    until_direct(&a, "b")?;
    let ends = [
        (&b, "a", seen),
        (&a, "b", format!("192.0.2.22:{MAPPED_PORT}")),
    ];
    for (node, name, endpoint) in ends {
        let peer = peer(node, name);
        ensure!(peer["endpoint"] == endpoint, "not {endpoint}: {peer:#}");
    }
    for (from, to) in [(&a, &b), (&b, &a), (&c, &b), (&a, &c)] {
        ensure!(
            passes(&echo(from, to)?, PASS_BOUND)?,
            "{} to {}",
            from.host.name,
            to.host.name
        );
    }

    world.join(&["a2"])?;
    let a2 = world.mesh.node("a2");
    until_direct(&a2, "a")?;
    let near = peer(&a2, "a");
    ensure!(
        near["endpoint"] == "10.1.0.2:51820",
        "not by the LAN: {near:#}"
    );

    // Everything that the agents need now is known to them.
    world.mesh.coordinator.kill();
    for router in ["router-a", "router-b"] {
        world.lab.host(router).run("conntrack -F")?;
    }
    let start = Instant::now();
    let question = echo(&a, &b)?;
    let heals = || passes(&question, ECHO_BOUND).unwrap_or_default();
    wait_until("the path is back", HEAL_BOUND, heals)?;
    println!(
        "back {:?} after the routers forgot everything",
        start.elapsed()
    );
    world.lab.passed();
    Ok(())
}

/// See [`topology`]: one router shows another port to each destination, the other lets no UDP out.
#[test]
fn a_nat_that_allows_no_direct_path_is_told_in_a_sentence() -> anyhow::Result<()> {
    let mut world = world("hard-nats", Nat::Symmetric, Nat::UdpBlocked)?;
    world.join(&["a", "b", "c"])?;
    let [a, b, c] = ["a", "b", "c"].map(|name| world.mesh.node(name));
    let hard = until_nat(&a, "v4", "hard")?;
    ensure!(hard["v4"]["reflexive"].is_null(), "{hard:#}");
    until_nat(&b, "v4", "silent")?;
    until_direct(&c, "a")?;
    ensure!(
        passes(&echo(&a, &c)?, PASS_BOUND)?,
        "a hard NAT reaches whoever has none"
    );
    for (node, sentence) in [
        (&a, "shows each destination another port"),
        (&b, "UDP does not get out of here"),
    ] {
        let said = node.weir("netcheck")?.stdout;
        ensure!(
            said.contains(sentence) && said.contains("No packets from"),
            "{said}"
        );
    }
    ensure!(
        peer(&a, "b")["handshake_seconds"].is_null(),
        "by what path?"
    );
    world.lab.passed();
    Ok(())
}
