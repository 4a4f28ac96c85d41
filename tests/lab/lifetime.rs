//! The life and death of the agent: nobody on the network notices.

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::lab::Lab;
use tests::mesh::{Mesh, Node, SPREAD_BOUND};
use tests::probe::Talk;
use tests::snapshot::Snapshot;
use tests::stream::{Conversation, Numbered};
use tests::topology::Topology;
use tests::wait_until;

use crate::{POLICY, TRIO, assert_answers, expect};

/// An agent is killed at the end of each part of its start but the last.
const PARTS: u32 = 6;

/// When a node last agreed on keys with another, as its kernel tells; 0 for never.
pub(crate) fn handshake(node: &Node, with: &str) -> anyhow::Result<u64> {
    let shown = node.host.run("wg show weir0 latest-handshakes")?.stdout;
    let line = shown.lines().find_map(|line| line.strip_prefix(with));
    Ok(line.unwrap_or("0").trim().parse()?)
}

/// Takes a peer out of a kernel and puts it in again as it was: the next packet needs a new
/// handshake, as it would after two minutes.
pub(crate) fn forget_session(node: &Node, key: &str) -> anyhow::Result<()> {
    let dump = node.host.run("wg show weir0 dump")?.stdout;
    let row = dump.lines().find(|line| line.starts_with(key));
    let fields: Vec<&str> = row.unwrap_or_default().split('\t').collect();
    let [_, _, endpoint, allowed, ..] = fields[..] else {
        anyhow::bail!("{} has no peer {key}: {dump}", node.host.name);
    };
    // In one message: an agent that saw the moment without the peer would begin a session.
    node.host.run(&format!(
        "wg set weir0 peer {key} remove peer {key} endpoint {endpoint} allowed-ips {allowed}"
    ))?;
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn agents_die_and_return_and_no_packet_is_lost() -> anyhow::Result<()> {
    let lab = Lab::new("agent_death", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let there = Numbered::start(&a.host, &b.host, b.v4()?, 80)?;
    let six = Numbered::start(&a.host, &b.host, b.v6()?, 80)?;
    let streams = [there, six];
    let flow = || streams.iter().try_for_each(|stream| stream.flows(40));
    flow()?;
    // The addresses are asked of the agents: before they are gone.
    let denied = expect(
        &mesh,
        "a",
        "b",
        &[(Talk::Tcp(22), false), (Talk::Tcp(81), true)],
    )?;
    let reverse = expect(
        &mesh,
        "b",
        "a",
        &[(Talk::Tcp(80), false), (Talk::Ping, false)],
    )?;
    for node in [&a, &b] {
        node.kill();
        flow()?;
    }
    assert_answers(&denied);
    assert_answers(&reverse);
    let mut started = Duration::MAX;
    for node in [&a, &b] {
        let start = Instant::now();
        node.restart()?;
        node.until("it is up again", |status| status["phase"] == "up")?;
        started = started.min(start.elapsed());
        flow()?;
        node.until("it is connected again", |status| {
            status["coordinator"]["connected"] == true
        })?;
        flow()?;
    }
    // Again, this time in the midst of a start: whatever the agent was doing, it is repeated.
    b.kill();
    for part in 1..PARTS {
        b.cut_short(started * part / PARTS)?;
        flow()?;
    }
    b.restart()?;
    b.until("it is up again", |status| status["phase"] == "up")?;
    flow()?;
    assert_answers(&denied);
    for (inside, stream) in ["IPv4", "IPv6"].into_iter().zip(streams) {
        let losses = stream.end()?;
        println!("both agents are killed, a start took {started:.1?}, {inside} inside: {losses:?}");
        assert!(losses.lost.is_empty(), "{losses:?}");
    }
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
///
/// b's agent dies, and the one that comes next keeps its flows in another layout: it finds maps
/// that are not its own, which is what their folder's name says.
#[test]
fn an_upgrade_to_another_flow_layout_loses_no_packet() -> anyhow::Result<()> {
    let lab = Lab::new("upgrade", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let denied = expect(
        &mesh,
        "a",
        "b",
        &[(Talk::Tcp(22), false), (Talk::Tcp(81), true)],
    )?;
    let stream = Numbered::start(&a.host, &b.host, b.v4()?, 80)?;
    let conversation = Conversation::start(&a.host, &b.host, b.v6()?, 80)?;
    stream.flows(40)?;
    conversation.flows()?;
    b.kill();
    let pins = b.host.folder.join("bpf/weir/weir0");
    let layout = std::fs::read_dir(&pins)?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with("layout-"));
    let layout = layout
        .expect("maps are pinned in a folder of their layout")
        .path();
    let other = pins.join("layout-00000000");
    std::fs::rename(&layout, &other)?;
    b.restart()?;
    b.until("it is up again", |status| status["phase"] == "up")?;
    wait_until("the other layout's maps are gone", SPREAD_BOUND, || {
        !other.exists()
    })?;
    assert!(layout.exists(), "its own are there");
    stream.flows(40)?;
    conversation.flows()?;
    assert_answers(&denied);
    let losses = stream.end()?;
    assert!(losses.lost.is_empty(), "{losses:?}");
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
///
/// With both agents dead, and a's programs gone, a's kernel forgets its session and agrees on a new
/// one with b's.
#[test]
fn keys_are_renewed_with_no_agent_alive() -> anyhow::Result<()> {
    let lab = Lab::new("rekey", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let (key_a, key_b) = (a.public_key()?, b.public_key()?);
    let permitted = expect(
        &mesh,
        "a",
        "b",
        &[(Talk::Tcp(80), true), (Talk::Tcp(22), false)],
    )?;
    assert_answers(&permitted);
    let first = handshake(&b, &key_a)?;
    // What is denied is then b's programs' doing alone.
    a.disarm()?;
    b.kill();
    // Handshake times have a resolution of a second.
    wait_until("the clock has moved on", Duration::from_secs(5), || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.is_ok_and(|now| now.as_secs() > first)
    })?;
    forget_session(&a, &key_b)?;
    assert_answers(&permitted);
    assert!(handshake(&b, &key_a)? > first, "b agreed on new keys");

    if std::env::var_os("WEIR_FULL").is_some() {
        // Two minutes after a handshake the sender begins the next one by itself (REKEY_AFTER_TIME).
        let began = handshake(&b, &key_a)?;
        let dst = permitted[0].0.dst;
        let stream = Numbered::start(&a.host, &b.host, dst, 80)?;
        let renewed = || handshake(&b, &key_a).is_ok_and(|at| at > began);
        wait_until(
            "the kernels renew their keys",
            Duration::from_secs(150),
            renewed,
        )?;
        stream.flows(100)?;
        let losses = stream.end()?;
        assert!(losses.lost.is_empty(), "{losses:?}");
    }
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn stopping_the_service_changes_nothing_in_the_kernel() -> anyhow::Result<()> {
    let lab = Lab::new("service_stop", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let b = mesh.node("b");
    let stream = Numbered::start(&mesh.node("a").host, &b.host, b.v4()?, 80)?;
    // Until then the agent still has something to say on its routes.
    wait_until(
        "b knows what its paths take",
        Duration::from_secs(15),
        || {
            let said = b.weir("peers --json").and_then(|out| out.json());
            let peers = said.unwrap_or_default()["peers"].clone();
            let known = |peer: &Value| peer["path_mtu"].is_u64();
            peers
                .as_array()
                .is_some_and(|peers| peers.iter().all(known))
        },
    )?;
    let before = Snapshot::of(&b.host)?;
    assert_eq!(b.process().stop()?, 0, "{}", b.process().said());
    assert_eq!(
        before.changes(&Snapshot::of(&b.host)?),
        Vec::<String>::new()
    );
    stream.flows(40)?;
    let losses = stream.end()?;
    assert!(losses.lost.is_empty(), "{losses:?}");
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn down_leaves_the_host_as_before_and_up_returns_without_a_token() -> anyhow::Result<()> {
    let lab = Lab::new("leaving", &Topology::star(&["a", "b", "c"]))?;
    let host = lab.host("c");
    let mut mesh = Mesh::start(&lab, POLICY, &TRIO[..2])?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    let before = Snapshot::of(&host)?;
    mesh.join(&lab, &TRIO[2..])?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let c = mesh.node("c");
    let address = c.v4()?;
    let permitted = expect(
        &mesh,
        "b",
        "c",
        &[(Talk::Udp(53), true), (Talk::Tcp(53), false)],
    )?;
    assert_answers(&permitted);

    c.weir("down")?;
    assert_eq!(
        before.changes(&Snapshot::of(&host)?),
        Vec::<String>::new(),
        "after down"
    );
    let status = c.status()?;
    assert_eq!(status["phase"], "down", "{status:#}");
    // A restart does not bring back what was told to stay down.
    c.kill();
    c.restart()?;
    assert_eq!(c.status()?["phase"], "down");
    assert_eq!(
        before.changes(&Snapshot::of(&host)?),
        Vec::<String>::new(),
        "after a restart"
    );

    c.weir("up")?;
    assert_eq!(c.v4()?, address, "the same node, the same address");
    mesh.settled(&[("c", 2)])?;
    // b still held a session that c's new device knows nothing of: c greets its peers.
    assert_answers(&permitted);

    let identity = host.folder.join("state/agent/identity");
    let secrets = std::fs::read(&identity)?;
    c.weir("down --purge")?;
    // The kernel lists maps of all hosts together, and those of a and b change when c leaves.
    let mut changes = before.changes(&Snapshot::of(&host)?);
    changes.retain(|line| !line.contains("bpf map"));
    assert_eq!(changes, Vec::<String>::new(), "after purge");
    assert_eq!(c.status()?["phase"], "not_joined");
    mesh.settled(&[("a", 1), ("b", 1)])?;
    let nodes = mesh.coordinator.admin("node list --json")?.json()?;
    assert!(!nodes.to_string().contains("\"c\""), "{nodes:#}");
    let refused = c.weir_with("up")?;
    assert_eq!(
        refused.code, 1,
        "without a token there is no way back: {refused:?}"
    );
    // The old secrets are gone; there may be new ones, for the next network.
    assert_ne!(std::fs::read(&identity).ok(), Some(secrets));
    assert!(!host.folder.join("state/agent/netmap").exists());
    wait_until("c's device is gone", SPREAD_BOUND, || {
        host.output("ip link show weir0")
            .is_ok_and(|output| output.code != 0)
    })?;
    lab.passed();
    Ok(())
}
