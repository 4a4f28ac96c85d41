//! The main job: servers join, tunnels come up, and what policy says passes, and nothing else.

use tests::lab::Lab;
use tests::mesh::Mesh;
use tests::probe::Talk::{Ping, Protocol, Sctp, Tcp, Udp};
use tests::topology::Topology;

use crate::{POLICY, TRIO, assert_answers, expect};

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn what_policy_says_passes_and_nothing_else_in_any_direction() -> anyhow::Result<()> {
    let lab = Lab::new("main_job", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    for node in mesh.nodes().values() {
        let status = node.status()?;
        assert_eq!(status["acl"]["attached"], true, "{status:#}");
        assert_eq!(status["problems"], serde_json::json!([]), "{status:#}");
    }
    let mut all = Vec::new();
    for (from, to, talks) in [
        (
            "a",
            "b",
            &[
                (Tcp(80), true),
                (Udp(81), true),
                (Ping, true),
                (Tcp(82), false),
            ][..],
        ),
        (
            "b",
            "a",
            &[(Tcp(80), false), (Udp(80), false), (Ping, false)],
        ),
        (
            "b",
            "c",
            &[(Udp(53), true), (Tcp(53), false), (Ping, false)],
        ),
        (
            "c",
            "b",
            &[(Udp(53), false), (Tcp(83), false), (Ping, false)],
        ),
        (
            "c",
            "a",
            &[(Tcp(22), true), (Udp(22), false), (Ping, false)],
        ),
        (
            "a",
            "c",
            &[
                (Tcp(22), false),
                (Udp(54), false),
                (Ping, false),
                (Udp(83), false),
            ],
        ),
    ] {
        all.extend(expect(&mesh, from, to, talks)?);
    }
    assert_answers(&all);
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn protocols_are_permitted_by_their_number() -> anyhow::Result<()> {
    const NUMBERED: &str = r#"{
      "tagOwners": {"tag:server": ["ana@example.com"], "tag:other": ["ana@example.com"]},
      "acls": [
        {"action": "accept", "proto": "132", "src": ["ana@example.com"], "dst": ["tag:server:9"]},
        {"action": "accept", "proto": "253", "src": ["ana@example.com"], "dst": ["tag:server:*"]},
        {"action": "accept", "proto": "tcp", "src": ["ana@example.com"], "dst": ["tag:other:9"]},
      ],
    }"#;
    let lab = Lab::new("protocols", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, NUMBERED, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 1), ("c", 1)])?;
    // First, for a flow without ports is all that its two addresses say: once a has begun, b may
    // answer with anything of that protocol.
    assert_answers(&expect(&mesh, "b", "a", &[(Protocol(253), false)])?);
    let mut all = Vec::new();
    all.extend(expect(
        &mesh,
        "a",
        "b",
        &[(Protocol(253), true), (Protocol(254), false)],
    )?);
    all.extend(expect(
        &mesh,
        "a",
        "b",
        &[(Tcp(9), false), (Udp(9), false), (Ping, false)],
    )?);
    all.extend(expect(
        &mesh,
        "a",
        "c",
        &[(Protocol(253), false), (Tcp(9), true)],
    )?);
    if tests::probe::kernel_has_sctp() {
        all.extend(expect(
            &mesh,
            "a",
            "b",
            &[(Sctp(9), true), (Sctp(10), false)],
        )?);
        all.extend(expect(&mesh, "b", "a", &[(Sctp(9), false)])?);
    } else {
        tests::skip("sctp", "the kernel has no SCTP");
    }
    assert_answers(&all);
    lab.passed();
    Ok(())
}
