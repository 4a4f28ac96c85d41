//! Nodes that no direct path joins: by relay, back to a direct path when there is one, and on when
//! coordinator, relay or agent die.
//!
//! ```text
//!  hub   a   b   near   far
//!   │    │   │    │      │       near and far: weir-relay, a region each
//!  ─┴────┴───┴────┴──────┴── internet      a's host may drop UDP between a and b
//! ```
//!
//! Every host has strict `rp_filter`, as hardened servers do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::lab::Lab;
use tests::mesh::{Join, Mesh, Node, SPREAD_BOUND};
use tests::probe::{PASS_BOUND, Question, Talk, passes};
use tests::stream::Numbered;
use tests::topology::Topology;
use tests::wait_until;

use super::traces::decided_again;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
/// The first packet by a relay, of a node that is connected to one and knows no path: 300 ms on a
/// machine of its own, and this in an emulator.
const FIRST_PACKET: Duration = Duration::from_millis(600);
/// And of nodes that have just started: once both are connected it takes one repetition of the
/// handshake (150 ms) and the round trips; connecting takes the rest of this, in an emulator.
const JUST_STARTED: Duration = Duration::from_millis(1_500);
/// From the moment that a direct path is possible to its use: two probes apart at most.
const DIRECT_BOUND: Duration = Duration::from_secs(30);
/// Longest outage when a direct path breaks: six seconds, and this in an emulator.
const DEMOTED: Duration = Duration::from_secs(9);
/// Longest outage when a region is lost: five seconds, and this in an emulator.
const MOVED: Duration = Duration::from_secs(9);

/// Which UDP between a and b passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Udp {
    Nothing,
    V4,
    V6,
}

struct World {
    lab: Lab,
    mesh: Mesh,
}

/// The topology with two relays, a coordinator that names them, and a and b joined, between which
/// no UDP passes.
fn world(name: &str) -> anyhow::Result<World> {
    let lab = Lab::new(name, &Topology::star(&["a", "b", "near", "far"]))?;
    for host in lab.hosts().values() {
        host.run("sysctl -q -w net.ipv4.conf.all.rp_filter=1")?;
    }
    pass(&lab, Udp::Nothing)?;
    let join = |host| Join {
        host,
        owner: "--user ana@example.com",
        routes: "",
    };
    let mesh = Mesh::with_relays(&lab, POLICY, &["near", "far"], &["a", "b"].map(join))?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    Ok(World { lab, mesh })
}

/// Lets this UDP pass between a and b, and no other.
fn pass(lab: &Lab, udp: Udp) -> anyhow::Result<()> {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let rule = |family: &str, side: &str, addr: std::net::IpAddr, through: bool| match through {
        true => String::new(),
        false => format!("  {family} {side} {addr} meta l4proto udp drop\n"),
    };
    let chain = |hook: &str, side: &str| {
        let rules =
            rule("ip", side, b.v4(), udp == Udp::V4) + &rule("ip6", side, b.v6(), udp == Udp::V6);
        format!(" chain {hook} {{ type filter hook {hook} priority -200;\n{rules} }}\n")
    };
    let (into, out) = (chain("input", "saddr"), chain("output", "daddr"));
    let table =
        format!("table inet cut\ndelete table inet cut\ntable inet cut {{\n{into}{out}}}\n");
    a.run_with("nft -f -", &table).map(drop)
}

fn echo(from: &Node, to: &Node, dst: std::net::IpAddr) -> Question {
    Question {
        from: Arc::clone(&from.host),
        to: Arc::clone(&to.host),
        dst,
        talk: Talk::Ping,
    }
}

/// Where the kernel of `node` sends its one peer's packets.
fn endpoint(node: &Node) -> anyhow::Result<String> {
    let shown = node.host.run("wg show weir0 endpoints")?.stdout;
    let endpoint = shown.split_whitespace().nth(1);
    Ok(endpoint.unwrap_or_default().to_owned())
}

/// When it last agreed on keys with that peer.
fn handshake(node: &Node) -> anyhow::Result<String> {
    let shown = node.host.run("wg show weir0 latest-handshakes")?.stdout;
    Ok(shown.split_whitespace().nth(1).unwrap_or("0").to_owned())
}

/// Waits until both send to such endpoints; returns how long that took.
fn until(what: &str, nodes: [&Node; 2], fits: impl Fn(&str) -> bool) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let mut last = Vec::new();
    let all = || {
        let endpoints = nodes.map(endpoint).map(Result::unwrap_or_default);
        let fit = endpoints.iter().all(|endpoint| fits(endpoint));
        last = endpoints.to_vec();
        fit
    };
    let waited = wait_until(what, DIRECT_BOUND, all);
    let paths = || {
        let path = |node: &Node| node.weir("path --json").map(|out| out.stdout);
        nodes.map(|node| path(node).unwrap_or_default()).join("\n")
    };
    waited.with_context(|| format!("endpoints {last:?}\n{}", paths()))?;
    Ok(start.elapsed())
}

fn is_relayed(endpoint: &str) -> bool {
    endpoint.starts_with("127.")
}

fn stream(from: &Node, to: &Node) -> anyhow::Result<Numbered> {
    Numbered::start(&from.host, &to.host, to.v4()?, 80)
}

/// The first packet goes by relay at once, both families inside the tunnel; then a direct path
/// opens, in IPv6 or in IPv4, and is taken without a lost packet and without a new handshake.
fn there(name: &str, udp: Udp, direct: [&str; 2]) -> anyhow::Result<(World, [Arc<Node>; 2])> {
    let world = world(name)?;
    let (a, b) = (world.mesh.node("a"), world.mesh.node("b"));
    let start = Instant::now();
    ensure!(passes(&echo(&a, &b, b.v4()?), PASS_BOUND)?, "no relay");
    let first = start.elapsed();
    println!("{name}: first packet by relay, just started, {first:?}");
    ensure!(first <= JUST_STARTED, "the first packet took {first:?}");
    ensure!(
        passes(&echo(&b, &a, a.v6()?), PASS_BOUND)?,
        "no IPv6 inside"
    );
    until("both are relayed", [&a, &b], is_relayed)?;
    let first = first_packet(&a, &b)?;
    println!("{name}: first packet by relay, connected, {first:?}");
    ensure!(first <= FIRST_PACKET, "the first packet took {first:?}");

    let numbered = stream(&a, &b)?;
    numbered.flows(100)?;
    let before = [handshake(&a)?, handshake(&b)?];
    pass(&world.lab, udp)?;
    let is_direct = |endpoint: &str| direct.contains(&endpoint);
    let took = until("both are direct", [&a, &b], is_direct)?;
    numbered.flows(200)?;
    let losses = numbered.end()?;
    println!("{name}: direct after {took:?}, {losses:?}");
    ensure!(
        losses.lost.is_empty(),
        "going direct lost packets: {losses:?}"
    );
    let after = [handshake(&a)?, handshake(&b)?];
    ensure!(before == after, "a new handshake: {before:?} {after:?}");
    Ok((world, [a, b]))
}

/// How long the first answer takes that a gets from b, when a's kernel has no session and no path.
fn first_packet(a: &Node, b: &Node) -> anyhow::Result<Duration> {
    let key = b.public_key()?;
    a.host.run(&format!("wg set weir0 peer {key} remove"))?;
    let known = || a.kernel_peers().is_ok_and(|peers| peers.contains(&key));
    wait_until("the agent puts the peer back", SPREAD_BOUND, known)?;
    let start = Instant::now();
    ensure!(passes(&echo(a, b, b.v4()?), PASS_BOUND)?, "no relay");
    Ok(start.elapsed())
}

/// It closes again, and the relay is back.
fn and_back(name: &str, world: World, [a, b]: [Arc<Node>; 2]) -> anyhow::Result<()> {
    let numbered = stream(&a, &b)?;
    numbered.flows(100)?;
    pass(&world.lab, Udp::Nothing)?;
    until("both are relayed again", [&a, &b], is_relayed)?;
    numbered.flows(200)?;
    let gone = numbered.end()?.outage();
    println!("{name}: back by relay after an outage of {gone:?}");
    ensure!(gone <= DEMOTED, "an outage of {gone:?}");
    recorded(&a, &b)?;
    world.lab.passed();
    Ok(())
}

/// All of that can be decided again at a desk; and when the agent begins anew, to be recorded from
/// there on, packets go on.
fn recorded(a: &Node, b: &Node) -> anyhow::Result<()> {
    let ways = decided_again(a, "relayed-direct-relayed", "--seconds 1")?;
    let story = ["relayed", "direct", "relayed"];
    ensure!(ways.ends_with(&story), "other ways were recorded: {ways:?}");
    let numbered = stream(a, b)?;
    numbered.flows(100)?;
    let ways = decided_again(a, "begun-anew", "--seconds 2 --anew")?;
    numbered.flows(100)?;
    let losses = numbered.end()?;
    println!("decided anew: {ways:?}, {losses:?}");
    ensure!(ways.ends_with(&["relayed"]), "{ways:?}");
    ensure!(losses.outage() <= MOVED, "{losses:?}");
    Ok(())
}

#[test]
fn blocked_nodes_talk_by_relay_go_direct_over_ipv4_when_they_can_and_return() -> anyhow::Result<()>
{
    let direct = ["192.0.2.11:51820", "192.0.2.12:51820"];
    let (world, nodes) = there("relay_v4", Udp::V4, direct)?;
    and_back("relay_v4", world, nodes)
}

#[test]
fn blocked_nodes_talk_by_relay_and_go_direct_over_ipv6_when_they_can() -> anyhow::Result<()> {
    let direct = ["[2001:db8::11]:51820", "[2001:db8::12]:51820"];
    let (world, _) = there("relay_v6", Udp::V6, direct)?;
    world.lab.passed();
    Ok(())
}

/// The region that a node calls its home.
fn home(node: &Node) -> Value {
    let check = node.weir("netcheck --json").and_then(|out| out.json());
    check.unwrap_or_default()["home"].clone()
}

/// With the coordinator dead, the agent restarted and the home region lost, in this order, traffic
/// goes on by relay.
#[test]
fn relayed_traffic_survives_coordinator_agent_and_region() -> anyhow::Result<()> {
    let world = world("relay_faults")?;
    let (a, b) = (world.mesh.node("a"), world.mesh.node("b"));
    ensure!(passes(&echo(&a, &b, b.v4()?), PASS_BOUND)?, "no relay");
    let settled = || home(&a).is_string() && home(&b).is_string();
    wait_until("both have a home", SPREAD_BOUND, settled)?;
    world.mesh.coordinator.kill();

    let numbered = stream(&a, &b)?;
    numbered.flows(200)?;
    a.kill();
    a.restart()?;
    numbered.flows(200)?;
    let gone = numbered.end()?.outage();
    println!("agent killed and restarted: an outage of {gone:?}");
    ensure!(gone <= MOVED, "an outage of {gone:?}");

    let numbered = stream(&a, &b)?;
    numbered.flows(200)?;
    let at = home(&b);
    let relay = world.mesh.relays.iter().find(|relay| at == *relay.name);
    relay.with_context(|| format!("no relay {at}"))?.kill();
    numbered.flows(400)?;
    let gone = numbered.end()?.outage();
    println!("the home region is gone: an outage of {gone:?}");
    ensure!(gone <= MOVED, "an outage of {gone:?}");
    let moved = || {
        [home(&a), home(&b)]
            .iter()
            .all(|home| home.is_string() && *home != at)
    };
    wait_until("both have another home", SPREAD_BOUND, moved)?;
    world.lab.passed();
    Ok(())
}

/// How often the path changes, there and back: 20 switches; and datagrams between two changes, one
/// each 5 ms for a second.
const CHANGES: usize = 10;
const BETWEEN: u64 = 200;

/// The relay is 80 ms slower than the direct path, and unsteady. While the direct path is wanted,
/// the kernels are put on the relay again and again, on one side and on both: packets that come by
/// it late pull nobody off the direct path, so each is back there by itself, nothing is lost, and
/// nobody agrees on keys anew.
#[test]
fn late_relayed_packets_move_nobody_and_changes_lose_nothing() -> anyhow::Result<()> {
    let world = world("relay_changes")?;
    let (a, b) = (world.mesh.node("a"), world.mesh.node("b"));
    ensure!(passes(&echo(&a, &b, b.v4()?), PASS_BOUND)?, "no relay");
    until("both are relayed", [&a, &b], is_relayed)?;
    let by_relay = [endpoint(&a)?, endpoint(&b)?];
    pass(&world.lab, Udp::V4)?;
    let numbered = stream(&a, &b)?;
    until("both are direct", [&a, &b], |it| !is_relayed(it))?;
    let direct = [endpoint(&a)?, endpoint(&b)?];
    for relay in &world.mesh.relays {
        let slow = "tc qdisc add dev eth0 root netem delay 80ms 20ms reorder 25% 50%";
        relay.host.run(slow)?;
    }
    numbered.end()?;
    let carried = || -> anyhow::Result<u64> {
        let relays = world.mesh.relays.iter();
        relays.map(|it| it.counter("packets_total")).sum()
    };
    let keys = [b.public_key()?, a.public_key()?];
    let before = ([handshake(&a)?, handshake(&b)?], carried()?);
    let numbered = stream(&a, &b)?;
    let full = std::env::var_os("WEIR_FULL").is_some();
    for change in 0..if full { CHANGES } else { 3 } {
        for (side, node) in [&a, &b].into_iter().enumerate() {
            if change % 3 == 2 || change % 3 == side {
                let (key, endpoint) = (&keys[side], &by_relay[side]);
                let set = format!("wg set weir0 peer {key} endpoint {endpoint}");
                node.host.run(&set)?;
            }
        }
        numbered.sends(BETWEEN)?;
        let now = [endpoint(&a)?, endpoint(&b)?];
        ensure!(
            now == direct,
            "after change {change} {now:?} and not {direct:?}"
        );
    }
    let losses = numbered.end()?;
    let after = ([handshake(&a)?, handshake(&b)?], carried()?);
    println!("changes there and back: {losses:?}, {before:?} {after:?}");
    ensure!(after.1 > before.1, "nothing went by the relays");
    ensure!(losses.lost.is_empty(), "changes lost packets: {losses:?}");
    ensure!(after.0 == before.0, "new handshakes: {before:?} {after:?}");
    world.lab.passed();
    Ok(())
}
