//! Enforcement as a whole host sees it: no device without programs, related errors, fragments.

use std::io::ErrorKind;

use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Mesh, Node};
use tests::packet;
use tests::probe::{EchoUdp, PASS_BOUND, Talk};
use tests::topology::Topology;

use crate::{POLICY, TRIO, assert_answers, expect};

/// ```text
///  hub   a
///   │    │
///  ─┴────┴── internet
/// ```
///
/// The agent's pin folder is no bpffs: pins would not outlive it.
#[test]
fn without_its_programs_the_device_does_not_come_up_and_status_says_why() -> anyhow::Result<()> {
    let lab = Lab::new("no_programs", &Topology::star(&["a"]))?;
    let mesh = Mesh::start(&lab, POLICY, &[])?;
    mesh.coordinator
        .admin("user create ana@example.com --network home")?;
    let token = mesh
        .coordinator
        .token("--network home --user ana@example.com")?;
    let host = lab.host("a");
    let elsewhere = host.folder.join("no-bpffs");
    std::fs::create_dir(&elsewhere)?;
    let node = Node::start_with(&host, &format!("--bpf-dir {}/weir0", elsewhere.display()))?;
    let refused = up(&host, &token)?;
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("bpf"), "{}", refused.stderr);
    let status = node.status()?;
    assert_eq!(status["acl"]["attached"], false, "{status:#}");
    assert_eq!(status["interface"]["up"], false, "{status:#}");
    let why = status["acl"]["why"].as_str().unwrap_or_default();
    assert!(why.contains("bpffs"), "{status:#}");
    let links = host.run("ip -br link")?.stdout;
    let up = links
        .lines()
        .any(|line| line.starts_with("weir0") && line.contains(",UP"));
    assert!(!up, "{links}");
    lab.passed();
    Ok(())
}

fn up(host: &Host, token: &str) -> anyhow::Result<tests::process::Output> {
    let line = format!(
        "weir --socket {}/run/weir.sock up - --timeout 8",
        host.folder.display()
    );
    host.output_with(
        &line,
        &format!("{token}\n"),
        std::time::Duration::from_secs(60),
    )
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
///
/// Nobody listens on the permitted port: the host's ICMP error embeds a live flow and passes.
#[test]
fn an_icmp_error_about_a_live_flow_comes_back() -> anyhow::Result<()> {
    let lab = Lab::new("related", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for dst in [b.v4()?, b.v6()?] {
        let socket = a.host.udp(packet::unspecified(dst), 0)?;
        socket.connect((dst, 81))?;
        socket.set_read_timeout(Some(PASS_BOUND))?;
        socket.send(b"anybody?")?;
        let error = socket.recv(&mut [0; 8]).expect_err("nobody listens there");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{dst}");
    }
    let counters = a.counters()?;
    assert_eq!(
        counters.get("ingress/accept/related"),
        Some(&2),
        "{counters:#?}"
    );
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn datagrams_larger_than_the_tunnel_pass_in_fragments_where_permitted() -> anyhow::Result<()> {
    const LENGTH: usize = 9000;
    let lab = Lab::new("fragments", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for dst in [b.v4()?, b.v6()?] {
        let _service = EchoUdp::start(b.host.udp(dst, 80)?)?;
        let socket = a.host.udp(packet::unspecified(dst), 0)?;
        socket.set_read_timeout(Some(PASS_BOUND))?;
        let sent: Vec<u8> = (0..LENGTH).map(|at| (at % 251) as u8).collect();
        socket.send_to(&sent, (dst, 80))?;
        let mut back = vec![0; LENGTH + 1];
        let (length, _) = socket.recv_from(&mut back)?;
        assert_eq!(back[..length], sent, "{dst}");
        // The same to a port that is not permitted: no fragment of it arrives.
        let ears = b.host.udp(dst, 82)?;
        ears.set_read_timeout(Some(tests::probe::DENY_BOUND))?;
        // The first fragment may already be refused here.
        let _sent = socket.send_to(&sent, (dst, 82));
        assert!(ears.recv_from(&mut back).is_err(), "{dst}");
    }
    assert_answers(&expect(&mesh, "a", "b", &[(Talk::Tcp(80), true)])?);
    lab.passed();
    Ok(())
}
