//! A rule that is taken back holds for what is already open.

use std::time::{Duration, Instant};

use tests::lab::Lab;
use tests::mesh::Mesh;
use tests::stream::{Conversation, Numbered};
use tests::topology::Topology;

use crate::TRIO;

/// After a revocation nothing of it arrives later than this.
const CUT_BOUND: Duration = Duration::from_secs(1);
/// The silent end of a revoked connection speaks after this long; longer in the long form.
const SILENCE: Duration = Duration::from_secs(3);
const SILENCE_FULL: Duration = Duration::from_secs(10);

const BEFORE: &str = r#"{
  "tagOwners": {"tag:server": ["ana@example.com"], "tag:other": ["ana@example.com"]},
  "acls": [
    {"action": "accept", "src": ["ana@example.com"], "dst": ["tag:server:80,90"]},
    {"action": "accept", "src": ["tag:server"], "dst": ["ana@example.com:22"]},
  ],
}"#;
const AFTER: &str = r#"{
  "tagOwners": {"tag:server": ["ana@example.com"], "tag:other": ["ana@example.com"]},
  "acls": [
    {"action": "accept", "src": ["ana@example.com"], "dst": ["tag:server:90"]},
  ],
}"#;

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
///
/// Twelve connections are cut: initiated by a and by b, v4 and v6, with both ends speaking and
/// with one end silent that speaks only seconds later. One beside them is not.
#[test]
fn a_revoked_connection_carries_no_byte_and_its_neighbour_loses_no_packet() -> anyhow::Result<()> {
    let lab = Lab::new("revocation", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, BEFORE, TRIO)?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let mut revoked = Vec::new();
    for (from, to, port) in [(&a, &b, 80), (&b, &a, 22)] {
        for dst in [to.v4()?, to.v6()?] {
            for silent in [None, Some(0), Some(1)] {
                let conversation = Conversation::start(&from.host, &to.host, dst, port)?;
                conversation.flows()?;
                if let Some(end) = silent {
                    conversation.speak(end, false);
                }
                revoked.push((
                    format!("{dst} port {port}, silent {silent:?}"),
                    conversation,
                ));
            }
        }
    }
    let busy = Conversation::start(&a.host, &b.host, b.v4()?, 90)?;
    let beside = Numbered::start(&a.host, &b.host, b.v4()?, 90)?;
    busy.flows()?;

    mesh.coordinator.set_policy(AFTER)?;
    let at = Instant::now();
    let full = std::env::var_os("WEIR_FULL").is_some();
    let silence = if full { SILENCE_FULL } else { SILENCE };
    passed(at, silence)?;
    for (_, conversation) in &revoked {
        conversation.speak(0, true);
        conversation.speak(1, true);
    }
    passed(at, silence + 3 * CUT_BOUND)?;
    for (which, conversation) in &revoked {
        let late = conversation.last_arrival().saturating_duration_since(at);
        assert!(
            late < CUT_BOUND,
            "{which}: a byte came {late:?} after the revocation"
        );
    }
    busy.flows()?;
    let losses = beside.end()?;
    assert!(losses.lost.is_empty() && losses.sent > 200, "{losses:?}");
    lab.passed();
    Ok(())
}

/// Lets real time pass: what is promised is a time.
fn passed(since: Instant, time: Duration) -> anyhow::Result<()> {
    tests::wait_until("the time has passed", time * 2, || since.elapsed() >= time)
}
