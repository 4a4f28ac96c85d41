//! The receiver alone: whatever a peer sends, its own side's programs gone or never there, the
//! receiver drops what policy does not permit, and counts it exactly.

use std::net::IpAddr;

use anyhow::Context;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Counters, Mesh, Node, SPREAD_BOUND};
use tests::packet::{self, flag};
use tests::probe::Talk;
use tests::topology::Topology;
use tests::wait_until;

use crate::{POLICY, TRIO, assert_answers, expect};

/// How many packets of each kind are sent: enough that a lost count shows.
const EACH: u64 = 20;

/// Denied packets by reason, between two counts.
fn denied(before: &Counters, after: &Counters) -> Counters {
    let mut rise = Counters::new();
    for (key, packets) in after {
        let more = packets - before.get(key).copied().unwrap_or(0);
        if key.starts_with("ingress/deny/") && more > 0 {
            rise.insert(key.clone(), more);
        }
    }
    rise
}

/// What no policy of these tests permits from `src` to `dst`, by name.
fn unwanted(src: IpAddr, dst: IpAddr) -> Vec<(&'static str, Vec<u8>)> {
    let tcp = |port, flags| packet::tcp((src, 40_000), (dst, port), flags);
    let echo = if dst.is_ipv4() {
        packet::ICMP
    } else {
        packet::ICMPV6
    };
    vec![
        ("a SYN to a port without a rule", tcp(22, flag::SYN)),
        ("a RST to a permitted port", tcp(80, flag::RST)),
        ("a FIN to a permitted port", tcp(80, flag::FIN)),
        (
            "SYN and FIN to a permitted port",
            tcp(80, flag::SYN | flag::FIN),
        ),
        ("no flag to a permitted port", tcp(80, 0)),
        (
            "a Christmas tree",
            tcp(80, flag::FIN | flag::PSH | flag::URG),
        ),
        ("an ACK to a port without a rule", tcp(22, flag::ACK)),
        (
            "UDP to a port without a rule",
            packet::udp((src, 40_000), (dst, 53), b"no"),
        ),
        (
            "a protocol without a rule",
            packet::ip(src, dst, 253, b"no"),
        ),
        (
            "an echo reply to nothing",
            packet::ip(src, dst, echo, &echo_reply(dst)),
        ),
    ]
}

/// An echo reply; its checksum is wrong for IPv6, which nobody gets to see.
fn echo_reply(dst: IpAddr) -> Vec<u8> {
    let mut message = packet::echo_request(dst, 77, 1, b"");
    message[0] = if dst.is_ipv4() { 0 } else { 129 };
    message
}

/// Sends everything unwanted from a host, and asserts that the receiver counts exactly that.
fn assert_drops_exactly(from: &Host, src: [IpAddr; 2], to: &Node) -> anyhow::Result<()> {
    for (src, dst) in src.into_iter().zip([to.v4()?, to.v6()?]) {
        for (what, bytes) in unwanted(src, dst) {
            let before = to.counters()?;
            for _ in 0..EACH {
                assert!(
                    packet::send(from, dst, &bytes)?,
                    "{what}: the sender's side refused it"
                );
            }
            let mut rise = Counters::new();
            let complete = wait_until("the receiver has counted them", SPREAD_BOUND, || {
                rise = to
                    .counters()
                    .map(|after| denied(&before, &after))
                    .unwrap_or_default();
                rise.values().sum::<u64>() >= EACH
            });
            complete.with_context(|| format!("{what} to {dst}: {rise:?}"))?;
            assert_eq!(
                rise.values().copied().collect::<Vec<_>>(),
                [EACH],
                "{what}: {rise:?}"
            );
        }
    }
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn with_the_senders_programs_gone_the_receiver_drops_and_counts_exactly() -> anyhow::Result<()> {
    let lab = Lab::new("disarmed", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let sources = [a.v4()?, a.v6()?];
    assert_answers(&expect(&mesh, "a", "b", &[(Talk::Tcp(80), true)])?);
    a.disarm()?;
    assert_drops_exactly(&a.host, sources, &b)?;
    // What policy permits still passes: the receiver was not closed by the storm.
    assert_answers(&expect(
        &mesh,
        "a",
        "b",
        &[(Talk::Tcp(80), true), (Talk::Tcp(22), false)],
    )?);
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c   thief
///   │    │   │   │     │
///  ─┴────┴───┴───┴─────┴── internet
/// ```
///
/// The thief holds a's key and nothing of ours. a is unplugged, or they would take turns.
#[test]
fn a_bare_wireguard_peer_with_a_stolen_key_gets_what_the_node_had_and_no_more() -> anyhow::Result<()>
{
    let lab = Lab::new("thief", &Topology::star(&["a", "b", "c", "thief"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let (a, b, c) = (mesh.node("a"), mesh.node("b"), mesh.node("c"));
    let (sources, others) = ([a.v4()?, a.v6()?], [c.v4()?, c.v6()?]);
    let thief = lab.host("thief");
    let key = a.stolen_key()?;
    lab.plug("a", false)?;
    thief.run("ip link add wg0 type wireguard")?;
    thief.run_with("wg set wg0 listen-port 51820 private-key /dev/stdin", &key)?;
    let endpoint = b.host.v4();
    let peer = format!("peer {} endpoint {endpoint}:51820", b.public_key()?);
    thief.run(&format!("wg set wg0 {peer} allowed-ips 0.0.0.0/0,::/0"))?;
    let [v4, v6] = sources;
    let (b4, b6) = (b.v4()?, b.v6()?);
    thief.ip(&format!(
        "addr add {v4}/32 dev wg0\naddr add {v6}/128 dev wg0 nodad\nlink set wg0 up\n\
         route add {b4} dev wg0\nroute add {b6} dev wg0"
    ))?;
    assert_drops_exactly(&thief, sources, &b)?;

    // As c, as b itself, as a host that is nobody's: no counter of a rule moves, nothing arrives.
    for (forged, dst) in [
        (others[0], b4),
        (b4, b4),
        ("10.77.0.1".parse()?, b4),
        (others[1], b6),
        (b6, b6),
        ("2001:db8:77::1".parse()?, b6),
    ] {
        let ears = b.host.udp(dst, 80)?;
        ears.set_read_timeout(Some(tests::probe::PASS_BOUND))?;
        let honest = if dst.is_ipv4() { v4 } else { v6 };
        for (src, word) in [(forged, b"forged"), (honest, b"honest")] {
            packet::send(&thief, dst, &packet::udp((src, 4000), (dst, 80), word))?;
        }
        // In order: had the forged one passed, it would be here first.
        let mut bytes = [0; 16];
        let (length, from) = ears.recv_from(&mut bytes)?;
        assert_eq!(
            (&bytes[..length], from.ip()),
            (&b"honest"[..], honest),
            "as {forged}"
        );
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
/// A program on an honest host cannot speak for another node either.
#[test]
fn a_node_sends_only_as_itself() -> anyhow::Result<()> {
    let lab = Lab::new("honest_source", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let (a, b, c) = (mesh.node("a"), mesh.node("b"), mesh.node("c"));
    for (forged, dst) in [
        (c.v4()?, b.v4()?),
        ("10.77.0.1".parse()?, b.v4()?),
        (c.v6()?, b.v6()?),
        ("2001:db8:77::1".parse()?, b.v6()?),
    ] {
        let before = a.counters()?;
        for _ in 0..EACH {
            // A drop on the way out may be told to the sender as an error: the counter decides.
            packet::send(
                &a.host,
                dst,
                &packet::udp((forged, 4000), (dst, 80), b"forged"),
            )?;
        }
        let after = a.counters()?;
        let egress = |counters: &Counters| -> u64 {
            let denied = counters
                .iter()
                .filter(|(key, _)| key.starts_with("egress/deny/"));
            denied.map(|(_, packets)| packets).sum()
        };
        assert_eq!(
            egress(&after) - egress(&before),
            EACH,
            "as {forged}: {after:#?}"
        );
    }
    lab.passed();
    Ok(())
}
