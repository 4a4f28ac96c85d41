//! Traces of engines, told again.
//!
//! A trace that somebody recorded (`weir debug record`) is one line:
//! `WEIR_TRACE=/path/of/it cargo xtask test --tier sim a_trace_of_a_node`. It prints what the engine
//! wants at each time, and fails where that is not what was recorded; with the version of weir that
//! recorded, that is nowhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::trace::{Line, Replay, Start, Wrong};
use engine::{Output, trace};
use tests::world::World;
use tests::world::nat::Kind;

use super::{MS, SECOND};

/// Most that an engine may want at one time.
const MAX_OUTPUTS: usize = 10_000;

fn parse(line: &str) -> Line<'static> {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// The engine's start, and all other lines.
fn read<'a>(mut lines: impl Iterator<Item = &'a str>) -> (Start, Vec<Line<'static>>) {
    let Some(Line::Start(start)) = lines.next().map(parse) else {
        panic!("a trace begins with the engine's start");
    };
    assert_eq!(start.version, trace::VERSION, "of another kind");
    (start.into_owned(), lines.map(parse).collect())
}

#[allow(clippy::disallowed_methods, reason = "a point to count from")]
fn base() -> Instant {
    Instant::now()
}

/// Tells an engine all of it. Where it decides otherwise than was recorded, it says so.
fn replay(start: &Start, lines: &[Line<'static>]) -> (Replay, Result<(), Wrong>) {
    let mut replay = Replay::new(start, base());
    for line in lines {
        if let Err(wrong) = replay.take(line.clone()) {
            return (replay, Err(wrong));
        }
    }
    (replay, Ok(()))
}

/// Two nodes that find each other, lose their direct path, and find it again.
fn story() -> (World, [usize; 2]) {
    let mut world = World::new(11, &[10 * MS]).unwrap();
    world.recorded = true;
    let realms = [
        world.router(Kind::PORT_RESTRICTED, 0),
        world.router(Kind::FULL_CONE, 0),
    ];
    let nodes = realms.map(|realm| world.node(realm, 5 * MS).unwrap());
    world.run(5 * SECOND);
    let _talk = world.talk(nodes[0], nodes[1], 50 * MS, 200 * SECOND);
    let direct = |world: &World| world.is_direct(nodes[0], nodes[1]);
    assert!(world.run_until(10 * SECOND, direct));
    world.set_kind(realms[0], Kind::BLOCKED);
    assert!(world.run_until(10 * SECOND, |world| !direct(world)));
    world.set_kind(realms[0], Kind::PORT_RESTRICTED);
    assert!(world.run_until(60 * SECOND, direct));
    (world, nodes)
}

#[test]
fn what_an_engine_was_told_makes_another_decide_the_same() {
    let (world, nodes) = story();
    for node in nodes {
        let (start, lines) = read(world.trace(node).iter().map(String::as_str));
        assert!(lines.len() > 100);
        let (_, outcome) = replay(&start, &lines);
        assert_eq!(outcome, Ok(()));
        // A trace that lacks something is noticed: the engine decides otherwise then. Much of what it
        // is told changes nothing, as it should be.
        let told = |line: &Line<'_>| matches!(line, Line::In { .. });
        let places = (0..lines.len()).filter(|place| told(&lines[*place]));
        let noticed = places.step_by(7).filter(|place| {
            let mut holed = lines.clone();
            holed.remove(*place);
            replay(&start, &holed).1.is_err()
        });
        assert!(noticed.count() >= 3);
    }
}

/// Traces of real nodes, in `tests/sim/traces`.
fn kept() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("sim/traces");
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

#[test]
fn a_trace_of_a_node_is_decided_again() {
    if let Some(path) = std::env::var_os("WEIR_TRACE") {
        let text = fs::read_to_string(path).unwrap();
        let (start, lines) = read(text.lines());
        let mut replay = Replay::new(&start, base());
        for line in lines {
            println!("{}", serde_json::to_string(&line).unwrap());
            for output in replay.take(line).unwrap_or_else(|wrong| panic!("{wrong}")) {
                println!("    {output:?}");
            }
        }
        return;
    }
    let kept = kept();
    assert!(!kept.is_empty());
    for path in kept {
        let text = fs::read_to_string(&path).unwrap();
        let (start, lines) = read(text.lines());
        let outputs = [(); 2].map(|()| decide(&start, &lines));
        assert_eq!(outputs[0], outputs[1], "{}", path.display());
        let reports = outputs[0].iter().filter(|it| it.starts_with("Report"));
        assert!(reports.count() > 0, "nothing was decided");
    }
}

/// All that an engine of today wants while it is told what another one was told, of whatever version:
/// what was recorded of that one's answers is left aside.
fn decide(start: &Start, lines: &[Line<'static>]) -> Vec<String> {
    let mut replay = Replay::new(start, base());
    let mut wanted = Vec::new();
    for line in lines {
        let all = match line.clone() {
            Line::Out { at, sum, .. } => Line::Out {
                at,
                outputs: MAX_OUTPUTS,
                sum,
            },
            told => told,
        };
        let outputs = match replay.take(all) {
            Ok(outputs) | Err(Wrong::Differs { outputs, .. }) => outputs,
            Err(wrong) => panic!("{wrong}"),
        };
        assert!(outputs.len() < MAX_OUTPUTS, "it does not come to rest");
        for output in outputs {
            wanted.push(match output {
                Output::Timeout(until) => {
                    let until: Duration = until - replay.at(0);
                    format!("until {until:?}")
                }
                other => format!("{other:?}"),
            });
        }
    }
    wanted
}
