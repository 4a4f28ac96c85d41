//! `weir monitor`: what is dropped is seen at once, a flood costs a few lines, and nothing is lost
//! to the sums.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use ebpf::event::{EVENTS_PER_WINDOW, WINDOW_SHIFT};
use serde_json::Value;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Mesh, Node, SPREAD_BOUND};
use tests::packet::{self, flag};
use tests::process::Process;
use tests::topology::Topology;
use tests::wait_until;

use crate::{POLICY, TRIO};

/// How long a drop may take from the wire to whoever follows.
const SEEN_BOUND: Duration = Duration::from_secs(1);
/// Packets of the flood.
const FLOOD: u64 = 100_000;

/// `weir monitor --json` on a node, once it follows.
fn follow(node: &Node, name: &str, options: &str) -> anyhow::Result<Arc<Process>> {
    let socket = node.host.folder.join("run/weir.sock");
    let line = format!(
        "weir --socket {} monitor --json {options}",
        socket.display()
    );
    let process = node.host.start(name, &line)?;
    wait_until("it follows", SPREAD_BOUND, || !lines(&process).is_empty())?;
    assert_eq!(lines(&process)[0]["event"], "begun", "{}", process.said());
    Ok(process)
}

/// Its whole lines so far.
fn lines(process: &Process) -> Vec<Value> {
    let said = process.said();
    let whole = said
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    whole
        .map(|line| serde_json::from_str(line).expect("a line is a document"))
        .collect()
}

fn drops(process: &Process) -> Vec<Value> {
    let mut lines = lines(process);
    lines.retain(|line| line["event"] == "drop");
    lines
}

/// Packets that it said were left out.
fn left_out(process: &Process) -> u64 {
    let lines = lines(process);
    let sums = lines.iter().filter(|line| line["event"] == "left_out");
    sums.filter_map(|line| line["packets"].as_u64()).sum()
}

fn counted(node: &Node, key: &str) -> anyhow::Result<u64> {
    Ok(node.counters()?.get(key).copied().unwrap_or(0))
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn a_dropped_packet_is_seen_within_a_second_and_a_flood_is_summed_up() -> anyhow::Result<()> {
    let lab = Lab::new("monitor", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let (a, b, c) = (mesh.node("a"), mesh.node("b"), mesh.node("c"));
    let sources = [a.v4()?, a.v6()?];
    a.disarm()?;
    one_is_seen(&a.host, sources, &b)?;
    a_flood_is_summed_up(&c, &b)?;
    lab.passed();
    Ok(())
}

/// A SYN that `to` drops, because its sender did not.
fn one_is_seen(from: &Host, srcs: [IpAddr; 2], to: &Node) -> anyhow::Result<()> {
    let follower = follow(to, "monitor-all", "")?;
    let others = follow(to, "monitor-others", "--peer c --reason policy")?;
    for (src, dst, port) in [(srcs[0], to.v4()?, 22), (srcs[1], to.v6()?, 23)] {
        let shown = drops(&follower).len();
        packet::send(
            from,
            dst,
            &packet::tcp((src, 40_000), (dst, port), flag::SYN),
        )?;
        let seen = wait_until("the drop is seen", SPREAD_BOUND, || {
            drops(&follower).len() > shown
        });
        seen.with_context(|| format!("{src} to {dst}: {}", follower.said()))?;
        let drop = drops(&follower).pop().context("a drop")?;
        // From the drop on: what the packet waited for before, a handshake say, is not meant.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let at = Duration::from_millis(drop["time_ms"].as_u64().context("a time")?);
        assert!(now.saturating_sub(at) <= SEEN_BOUND, "{now:?}: {drop}");
        let fields = ["direction", "reason", "tcp_flags", "src", "dst"].map(|name| &drop[name]);
        let [direction, reason, flags, source, destination] = fields;
        assert_eq!(
            (direction, reason, flags),
            (&"ingress".into(), &"policy".into(), &"S".into())
        );
        assert_eq!(source["addr"], src.to_string(), "{drop}");
        assert_eq!(
            (&source["node"], &source["port"]),
            (&"a".into(), &40_000.into()),
            "{drop}"
        );
        assert_eq!(source["side"], "peer", "{drop}");
        assert_eq!(destination["addr"], dst.to_string(), "{drop}");
        assert_eq!(
            (&destination["node"], &destination["port"]),
            (&"b".into(), &port.into())
        );
        assert_eq!(destination["side"], "own", "{drop}");
        assert!(source["class"].as_u64() > Some(0) && destination["class"].as_u64() > Some(0));
        assert_eq!(
            (&drop["protocol"], &drop["later_fragment"]),
            (&6.into(), &false.into())
        );
        // The rule on the fourth line of the policy is for these two, and for other ports.
        assert_eq!(drop["near"]["line"], 4, "{drop}");
        let why = drop["near"]["why"].as_str().unwrap_or_default();
        assert!(
            why.contains("80, 81") && why.contains(&format!("not {port}")),
            "{why}"
        );
    }
    assert_eq!(drops(&others).len(), 0, "{}", others.said());
    // Ctrl-C.
    let pid = rustix::process::Pid::from_raw(i32::try_from(follower.pid())?).context("a pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    assert_eq!(follower.stop()?, 0, "{}", follower.said());
    assert_eq!(others.stop()?, 0, "{}", others.said());
    Ok(())
}

/// A host floods its own programs with packets of ever another kind.
fn a_flood_is_summed_up(from: &Node, to: &Node) -> anyhow::Result<()> {
    const KEY: &str = "egress/deny/policy";
    let follower = follow(from, "monitor-flood", "--reason policy")?;
    let (src, dst) = (from.v4()?, to.v4()?);
    let (before, begun) = (counted(from, KEY)?, Instant::now());
    let socket = from.host.enter(|| packet::raw_socket(dst, packet::WHOLE))?;
    for number in 0..FLOOD {
        let port = u16::try_from(number % 50_000)? + 10_000;
        let packet = packet::udp((src, 4_000), (dst, port), b"flood");
        // Told to the sender as an error or not: the counter decides.
        let _refused = socket.send_to(&packet, (dst, 0));
    }
    let rise = counted(from, KEY)? - before;
    assert_eq!(rise, FLOOD, "every packet is counted");
    let sums = || drops(&follower).len() as u64 + left_out(&follower) == FLOOD;
    let complete = wait_until("what is shown and left out add up", SPREAD_BOUND, sums);
    let shown = drops(&follower).len();
    complete.with_context(|| format!("{shown} shown, {} left out", left_out(&follower)))?;
    let seconds = begun.elapsed().as_nanos() >> WINDOW_SHIFT;
    let cpus = std::thread::available_parallelism()?.get();
    let most = (usize::try_from(seconds)? + 2) * cpus * EVENTS_PER_WINDOW as usize;
    println!(
        "a flood of {FLOOD}: {shown} shown, at most {most}, in {:?}",
        begun.elapsed()
    );
    assert!((1..=most).contains(&shown), "{shown} of at most {most}");
    assert_eq!(follower.stop()?, 0);
    Ok(())
}
