//! What an eavesdropper sees: WireGuard messages, and nothing of what they carry.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;

use tests::lab::Lab;
use tests::mesh::{Mesh, Node, SPREAD_BOUND};
use tests::probe::PASS_BOUND;
use tests::topology::Topology;
use tests::wait_until;

use crate::{POLICY, TRIO};

/// What is written all over the file that crosses.
const MARKER: &[u8] = b"-the-eagle-has-landed-";
/// How often: about 1 MB.
const REPEATS: usize = 50_000;

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet, where somebody listens
/// ```
#[test]
fn a_marker_that_crosses_the_tunnel_is_never_seen_on_the_wire() -> anyhow::Result<()> {
    let lab = Lab::new("wire", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    // The first packets of a session may be in two pieces, until routes say what its path takes.
    let measured = |node: &Node, other: &str| {
        let said = node.weir(&format!("path {other} --json"));
        let peer = said.and_then(|said| said.json()).unwrap_or_default()["peer"].clone();
        let six = peer["endpoint"]
            .as_str()
            .is_some_and(|it| it.starts_with('['));
        six && peer["path_mtu"].is_u64()
    };
    wait_until("the path is IPv6 and measured", SPREAD_BOUND, || {
        measured(&a, "b") && measured(&b, "a")
    })?;
    let listen = |interface: &str| -> anyhow::Result<_> {
        let file = a.host.folder.join(format!("{interface}-whole.pcap"));
        let line = format!(
            "tcpdump -i {interface} -n -U -s 0 -B 32768 -Z root -w {}",
            file.display()
        );
        let ear = a.host.start(&format!("ear-{interface}"), &line)?;
        wait_until("tcpdump listens", PASS_BOUND, || {
            ear.said().contains("listening on")
        })?;
        Ok((ear, file))
    };
    let (outside, wire) = listen("eth0")?;
    let (inside, clear) = listen("weir0")?;

    let dst = b.v4()?;
    let listener = b.host.listen(dst, 80)?;
    let target = SocketAddr::new(dst, 80);
    let mut sender = a
        .host
        .enter(|| TcpStream::connect_timeout(&target, PASS_BOUND))?;
    let (mut receiver, _) = listener.accept()?;
    let writing = std::thread::spawn(move || -> std::io::Result<()> {
        for _ in 0..REPEATS {
            sender.write_all(MARKER)?;
        }
        Ok(())
    });
    let mut arrived = Vec::new();
    receiver.read_to_end(&mut arrived)?;
    writing.join().expect("the sender lives")?;
    assert_eq!(arrived.len(), REPEATS * MARKER.len());
    for ear in [outside, inside] {
        ear.stop()?;
    }

    assert!(
        seen(&clear)? > REPEATS / 2,
        "the method finds the marker where it is in the clear"
    );
    assert_eq!(seen(&wire)?, 0);
    // Everything between the two machines is a WireGuard message (type 1 to 4, three zero bytes) or
    // a sealed probe, which begins with a magic; and neighbours ask for each other's Ethernet
    // addresses. In IPv6 tcpdump knows no `udp[]`: the payload begins 48 bytes into the packet.
    let ends = |a: IpAddr, b: IpAddr| format!("(host {a} and host {b})");
    let between = format!(
        "({} or {})",
        ends(a.host.v4(), b.host.v4()),
        ends(a.host.v6(), b.host.v6())
    );
    let count = |more: &str| -> anyhow::Result<usize> {
        let line = format!("tcpdump -n -r {} {between} and {more}", wire.display());
        Ok(a.host.run(&line)?.stdout.lines().count())
    };
    let message = |at: &str| format!("({at}:4] & 0x00ffffff = 0 and {at}] >= 1 and {at}] <= 4)");
    let probe = |at: &str| format!("{at}:4] = 0x5453f09f");
    let either = |what: &dyn Fn(&str) -> String| {
        let (four, six) = (what("udp[8"), what("ip6[48"));
        format!("((ip and udp and {four}) or (ip6 and ip6[6] = 17 and {six}))")
    };
    let all = count("(ip or ip6)")?;
    let (wireguard, probes) = (count(&either(&message))?, count(&either(&probe))?);
    assert!(all > 500, "{all}");
    let neighbours = count("icmp6")?;
    assert_eq!(all - neighbours - probes, wireguard);
    lab.passed();
    Ok(())
}

/// How often the marker stands in a file.
fn seen(file: &Path) -> anyhow::Result<usize> {
    let bytes = std::fs::read(file)?;
    Ok(bytes
        .windows(MARKER.len())
        .filter(|window| *window == MARKER)
        .count())
}
