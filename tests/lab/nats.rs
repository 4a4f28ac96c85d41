//! Nodes behind NATs: STUN from WireGuard's own port, direct paths where NATs allow them, and relays
//! where they do not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::host::Host;
use tests::lab::{Lab, results};
use tests::mesh::{Coordinator, Join, Mesh, Node, SPREAD_BOUND};
use tests::nat::{MAPPED_PORT, Nat, Reflector, two_lans};
use tests::probe::{PASS_BOUND, Question, Talk, passes};
use tests::relay::{Relay, relays_section};
use tests::topology::Topology;
use tests::wait_until;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
const SERVERS: [&str; 3] = ["192.0.2.1:3478", "192.0.2.1:3479", "[2001:db8::1]:3478"];
/// How long two nodes behind NATs may take to find each other: two seconds on a machine of its own,
/// and this in an emulator.
const DIRECT_BOUND: Duration = Duration::from_secs(12);
/// How long a path may be gone when a router forgot all its mappings.
const HEAL_BOUND: Duration = Duration::from_secs(30);
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

/// See [`two_lans`]; `c` has no router, and `near` is there for a relay.
fn topology() -> Topology {
    two_lans(&["c", "near"])
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
    let heals = || passes(&question, PASS_BOUND).unwrap_or_default();
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

/// What is between a node and the world, for the grid.
type Place = Option<Nat>;

const PLACES: [Place; 6] = [
    None,
    Some(Nat::FullCone),
    Some(Nat::AddressRestricted),
    Some(Nat::PortRestricted),
    Some(Nat::Symmetric),
    Some(Nat::UdpBlocked),
];
/// The pairs that tell most, in the order of what they prove: a hole on both sides, a packet from
/// another port than was told, and no hole at all.
const TELLING: [(Place, Place); 3] = [
    (Some(Nat::PortRestricted), Some(Nat::PortRestricted)),
    (Some(Nat::AddressRestricted), Some(Nat::Symmetric)),
    (Some(Nat::PortRestricted), Some(Nat::Symmetric)),
];
/// After so long without one there is no direct path.
const GIVE_UP: Duration = Duration::from_secs(10);
/// How soon 95 of 100 pairs have one: two seconds on a machine of its own, and this in an emulator.
const SOON: Duration = Duration::from_secs(6);

/// Whether a direct path is possible at all, without guessing ports.
fn possible(one: Place, other: Place) -> bool {
    let hard = |place| place == Some(Nat::Symmetric);
    let strict = |place| hard(place) || place == Some(Nat::PortRestricted);
    let blocked = |place| place == Some(Nat::UdpBlocked);
    let guess = hard(one) && strict(other) || hard(other) && strict(one);
    !(blocked(one) || blocked(other) || guess)
}

fn named(place: Place) -> String {
    place.map_or("no NAT".to_owned(), |nat| format!("{nat:?}"))
}

/// How two nodes found each other.
struct Found {
    /// From the first packet to its answer.
    first: Duration,
    /// From there to a direct path on both sides; `None` if there is none.
    direct: Option<Duration>,
}

/// Where the kernel of `node` sends packets for `name`, if it has a session.
fn endpoint(node: &Node, name: &str) -> Option<String> {
    let peer = peer(node, name);
    let shaken = !peer["handshake_seconds"].is_null();
    peer["endpoint"]
        .as_str()
        .filter(|_| shaken)
        .map(str::to_owned)
}

impl World {
    /// Takes a node down, and puts another router before it. Nobody has a session with it any more.
    fn move_behind(&self, name: &str, place: Place) -> anyhow::Result<Arc<Node>> {
        let node = self.mesh.node(name);
        node.weir("down")?;
        node.process().stop()?;
        if let Some(nat) = place {
            let router = self.lab.host(&format!("router-{name}"));
            nat.install(&router, node.host.v4())?;
        }
        Ok(node)
    }

    fn find(&self, one: Place, other: Place) -> anyhow::Result<Found> {
        // Whoever has no router is c; two of them would be no test of routers.
        let names = match (one, other) {
            (None, _) => ["c", "a"],
            _ => ["a", "b"],
        };
        let nodes = [
            self.move_behind(names[0], one)?,
            self.move_behind(names[1], other)?,
        ];
        for node in &nodes {
            node.restart()?;
            node.weir("up")?;
        }
        for node in &nodes {
            let known = || netcheck(node).is_ok_and(|check| check["home"].is_string());
            wait_until("the node has a home", SPREAD_BOUND, known)?;
        }
        let [left, right] = nodes;
        let question = echo(&left, &right)?;
        let start = Instant::now();
        ensure!(
            passes(&question, PASS_BOUND)?,
            "neither direct nor by relay"
        );
        let first = start.elapsed();
        let is_direct = |endpoint: Option<String>| {
            endpoint.is_some_and(|endpoint| !endpoint.starts_with("127."))
        };
        while start.elapsed() < GIVE_UP {
            let ends = [endpoint(&left, names[1]), endpoint(&right, names[0])];
            if ends.into_iter().all(is_direct) {
                let direct = Some(start.elapsed());
                return Ok(Found { first, direct });
            }
            passes(&question, PASS_BOUND)?;
        }
        Ok(Found {
            first,
            direct: None,
        })
    }
}

/// See [`topology`]: every kind of NAT with every other, with a relay for those that no direct path
/// can join. `WEIR_FULL` runs all pairs.
#[test]
fn every_pair_of_nats_goes_direct_where_it_can_and_by_relay_where_not() -> anyhow::Result<()> {
    let open = Nat::PortRestricted;
    let mut world = world("nat-grid", open, open)?;
    let near = Relay::start(&world.lab.host("near"), "near", &world.mesh.coordinator)?;
    let stun = format!("[relays]\nstun = {SERVERS:?}\n");
    let config = stun + &relays_section(&[&near]);
    world.mesh.coordinator.configure(&config)?;
    world.join(&["a", "b", "c"])?;
    let full = std::env::var_os("WEIR_FULL").is_some();
    let later = |(number, one): (usize, &Place)| {
        let (one, others) = (*one, PLACES.into_iter().skip(number));
        others.map(move |other| (one, other))
    };
    let pairs: Vec<(Place, Place)> = match full {
        true => PLACES.iter().enumerate().flat_map(later).collect(),
        false => TELLING.to_vec(),
    };
    let mut table = "| NATs | path | first answer | direct after |\n|---|---|---|---|\n".to_owned();
    let (mut wrong, mut times) = (Vec::new(), Vec::new());
    for (one, other) in pairs {
        if (one, other) == (None, None) {
            continue;
        }
        let names = format!("{} and {}", named(one), named(other));
        let found = world.find(one, other);
        let Found { first, direct } = found.with_context(|| names.clone())?;
        let path = if direct.is_some() { "direct" } else { "relay" };
        let after = direct.map_or("-".to_owned(), |after| format!("{after:.2?}"));
        table += &format!("| {names} | {path} | {first:.2?} | {after} |\n");
        times.extend(direct);
        if direct.is_some() != possible(one, other) {
            wrong.push(names);
        }
    }
    println!("{table}");
    std::fs::create_dir_all(results())?;
    std::fs::write(results().join("nat-grid.md"), &table)?;
    ensure!(wrong.is_empty(), "not as it can be: {wrong:?}\n{table}");
    times.sort();
    let most = times.len() * 95 / 100;
    let p95 = times.get(most.min(times.len() - 1)).copied();
    ensure!(
        p95.is_some_and(|p95| p95 <= SOON),
        "too late: {p95:?}\n{table}"
    );
    world.lab.passed();
    Ok(())
}
