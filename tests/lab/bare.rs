//! The ground that the other tests stand on: the lab itself, and WireGuard as the kernel has it,
//! with none of our programs.

use std::sync::Arc;

use tests::host::Host;
use tests::lab::Lab;
use tests::packet;
use tests::probe::{PASS_BOUND, Question, Talk, disagreements, passes};
use tests::stream::{Conversation, Numbered};
use tests::topology::Topology;

/// A WireGuard device `wg0` made by hand: 10.9.0.N and fd09::N, one peer.
fn bare_wireguard(hosts: [&Arc<Host>; 2]) -> anyhow::Result<()> {
    let key = |host: &Host| -> anyhow::Result<(String, String)> {
        let private = host.run("wg genkey")?.stdout;
        let public = host.run_with("wg pubkey", &private)?.stdout;
        Ok((private, public.trim().to_owned()))
    };
    let keys = [key(hosts[0])?, key(hosts[1])?];
    for (me, them) in [(0, 1), (1, 0)] {
        let host = hosts[me];
        host.run("ip link add wg0 type wireguard")?;
        host.run_with(
            "wg set wg0 listen-port 51820 private-key /dev/stdin",
            &keys[me].0,
        )?;
        let (peer, endpoint, number) = (&keys[them].1, hosts[them].v4(), them + 1);
        host.run(&format!(
            "wg set wg0 peer {peer} endpoint {endpoint}:51820 allowed-ips 10.9.0.{number},fd09::{number}"
        ))?;
        let number = me + 1;
        host.ip(&format!(
            "addr add 10.9.0.{number}/24 dev wg0\naddr add fd09::{number}/64 dev wg0\nlink set wg0 up"
        ))?;
    }
    Ok(())
}

/// ```text
///  a ── internet ── b        and a tunnel wg0 - wg0 between them
/// ```
#[test]
fn every_probe_passes_where_nothing_is_in_the_way_and_fails_where_something_is()
-> anyhow::Result<()> {
    let lab = Lab::new("bare_probes", &Topology::star(&["a", "b"]))?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    bare_wireguard([&a, &b])?;
    let mut talks = vec![
        Talk::Tcp(80),
        Talk::Udp(53),
        Talk::Ping,
        Talk::Protocol(253),
    ];
    if tests::probe::kernel_has_sctp() {
        talks.push(Talk::Sctp(9));
    } else {
        tests::skip("sctp", "the kernel has no SCTP");
    }
    let question = |talk, dst| Question {
        from: Arc::clone(&a),
        to: Arc::clone(&b),
        dst,
        talk,
    };
    let mut expectations = Vec::new();
    for &talk in &talks {
        for dst in [b.v4(), b.v6(), "10.9.0.2".parse()?, "fd09::2".parse()?] {
            expectations.push((question(talk, dst), true));
        }
    }
    assert_eq!(disagreements(&expectations)?, Vec::<String>::new());

    // The probes can say no: the same with the cable pulled.
    lab.plug("b", false)?;
    let denied: Vec<_> = talks
        .iter()
        .map(|&talk| (question(talk, b.v4()), false))
        .collect();
    assert_eq!(disagreements(&denied)?, Vec::<String>::new());
    lab.plug("b", true)?;
    assert!(passes(&question(Talk::Tcp(80), b.v4()), PASS_BOUND)?);
    lab.passed();
    Ok(())
}

/// ```text
///  a ── internet ── b        and a tunnel wg0 - wg0 between them
/// ```
#[test]
fn counted_streams_see_a_pulled_cable_and_nothing_else() -> anyhow::Result<()> {
    let lab = Lab::new("bare_streams", &Topology::star(&["a", "b"]))?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    bare_wireguard([&a, &b])?;
    let inner = "10.9.0.2".parse()?;

    let stream = Numbered::start(&a, &b, inner, 7)?;
    stream.flows(50)?;
    let losses = stream.end()?;
    assert!(losses.sent >= 50 && losses.lost.is_empty(), "{losses:?}");

    let stream = Numbered::start(&a, &b, inner, 8)?;
    let conversation = Conversation::start(&a, &b, inner, 9)?;
    conversation.flows()?;
    lab.plug("b", false)?;
    let silent = conversation.arrived();
    stream.sends(10)?;
    lab.plug("b", true)?;
    stream.flows(10)?;
    conversation.flows()?;
    assert!(
        conversation.arrived()[0] > silent[0],
        "TCP repairs what was lost"
    );
    let losses = stream.end()?;
    assert!(
        (1..losses.sent).contains(&(losses.lost.len() as u64)),
        "{losses:?}"
    );
    lab.passed();
    Ok(())
}

/// ```text
///  a ── internet ── b        and a tunnel wg0 - wg0 between them
/// ```
///
/// WireGuard's own rule, allowed IPs, drops a wrong inner source: forged packets do arrive at the
/// device, which is what the tests of the ACL build on.
#[test]
fn forged_packets_leave_and_cryptokey_routing_drops_a_wrong_source() -> anyhow::Result<()> {
    let lab = Lab::new("bare_forged", &Topology::star(&["a", "b"]))?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    bare_wireguard([&a, &b])?;
    for (own, foreign, dst) in [
        ("10.9.0.1", "10.9.0.77", "10.9.0.2"),
        ("fd09::1", "fd09::77", "fd09::2"),
    ] {
        let (own, foreign, dst) = (own.parse()?, foreign.parse()?, dst.parse()?);
        let ears = b.udp(dst, 4000)?;
        ears.set_read_timeout(Some(PASS_BOUND))?;
        for (src, word) in [(foreign, b"forged"), (own, b"honest")] {
            let datagram = packet::udp((src, 5000), (dst, 4000), word);
            assert!(packet::send(&a, dst, &datagram)?);
        }
        // In order: had the forged one passed, it would be here first.
        let mut bytes = [0; 64];
        let (length, from) = ears.recv_from(&mut bytes)?;
        assert_eq!((&bytes[..length], from.ip()), (&b"honest"[..], own));
    }
    lab.passed();
    Ok(())
}
