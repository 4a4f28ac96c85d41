//! What real agents decide is recorded by them (`weir debug record`) and decided again here. With
//! `UPDATE=1` the traces are left in `results`: those in `tests/sim/traces` come from there.

use std::fs;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use engine::status::Now;
use engine::trace::{Line, Replay};
use tests::lab::results;
use tests::mesh::Node;

/// Records a node with these options, and lets an engine here decide all of it again, from the start
/// of the trace on. Returns which ways to its one peer it took.
pub(super) fn decided_again(
    node: &Node,
    name: &str,
    options: &str,
) -> anyhow::Result<Vec<&'static str>> {
    let file = node.host.folder.join(format!("{name}.trace"));
    let recorded = node.weir(&format!("debug record {options} {}", file.display()))?;
    ensure!(
        recorded.stdout.contains("WEIR_TRACE="),
        "{}",
        recorded.stdout
    );
    if std::env::var_os("UPDATE").is_some() {
        fs::create_dir_all(results())?;
        fs::copy(&file, results().join(format!("{name}.trace")))?;
    }
    let text = fs::read_to_string(&file)?;
    let mut lines = text.lines();
    let first = lines.next().context("an empty trace")?;
    let Line::Start(start) = serde_json::from_str(first)? else {
        bail!("a trace begins with the start: {first}");
    };
    #[allow(clippy::disallowed_methods, reason = "a point to count from")]
    let mut replay = Replay::new(&start, Instant::now());
    let mut ways = Vec::new();
    for (number, line) in lines.enumerate() {
        let line: Line<'_> = serde_json::from_str(line)?;
        let at = match &line {
            Line::Start(_) => 0,
            Line::In { at, .. } | Line::Out { at, .. } => *at,
        };
        replay
            .take(line)
            .with_context(|| format!("line {} of {}", number + 2, file.display()))?;
        let netmap = replay.engine().status().netmap;
        let peer = netmap.and_then(|netmap| netmap.peers.values().next());
        let path = peer.and_then(|peer| replay.engine().path_of(replay.at(at), &peer.key));
        let way = path.map(|path| match path.now {
            Now::Direct { .. } => "direct",
            Now::Relayed { .. } => "relayed",
            Now::None => "none",
        });
        if way != ways.last().copied() {
            ways.extend(way);
        }
    }
    Ok(ways)
}
