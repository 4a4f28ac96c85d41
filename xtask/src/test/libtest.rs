//! Reads what a libtest process prints: which tests ran, how they ended, how long each took.
//!
//! Counts come from its own `test result:` line. A process that does not print one died, and
//! then each test that it was given and did not finish counts as failed: nothing gets lost.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::time::{Duration, Instant};

/// What came of one process.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub passed: usize,
    pub ignored: usize,
    pub failed: BTreeSet<String>,
    /// Tests in the order they ended, with the time since the one before.
    pub times: Vec<(String, Duration)>,
    /// Whether the process came to its end.
    pub complete: bool,
}

impl Report {
    /// Nothing yet, to absorb others into.
    pub fn begun() -> Report {
        Report {
            complete: true,
            ..Report::default()
        }
    }

    /// Adds another process's report.
    pub fn absorb(&mut self, other: Report) {
        self.passed += other.passed;
        self.ignored += other.ignored;
        self.failed.extend(other.failed);
        self.times.extend(other.times);
        self.complete &= other.complete;
    }

    /// Counts what a dead process left undone as failed.
    pub fn complete_with(&mut self, given: &[String], name: &str) {
        if self.complete {
            return;
        }
        let ended: BTreeSet<&str> = self.times.iter().map(|(name, _)| name.as_str()).collect();
        let undone = given.iter().filter(|test| !ended.contains(test.as_str()));
        let undone: Vec<String> = undone.cloned().collect();
        self.passed = self.times.len().saturating_sub(self.failed.len());
        self.failed.extend(undone);
        if given.is_empty() || self.failed.is_empty() {
            self.failed.insert(format!("{name} (the process died)"));
        }
        self.complete = true;
    }
}

/// Reads a process's output to its end, copying it to `log`; calls `each` for every ended test.
pub fn read(
    from: impl Read,
    mut log: impl Write,
    mut each: impl FnMut(&str, bool),
) -> std::io::Result<Report> {
    let mut report = Report::default();
    let mut lines = BufReader::new(from);
    let mut before = Instant::now();
    let mut line = Vec::new();
    let mut open: Option<String> = None;
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(report);
        }
        log.write_all(&line)?;
        log.flush()?;
        let text = String::from_utf8_lossy(&line);
        match meaning(text.trim_end(), &mut open) {
            Some(Line::Ended { name, outcome }) => {
                if outcome == Outcome::Failed {
                    report.failed.insert(name.clone());
                }
                each(&name, outcome != Outcome::Failed);
                report.times.push((name, before.elapsed()));
                before = Instant::now();
            }
            Some(Line::Result {
                passed,
                failed,
                ignored,
            }) => {
                report.passed += passed;
                report.ignored += ignored;
                report.complete = true;
                // A name may have been garbled by a child that wrote into the line.
                if report.failed.len() < failed {
                    report
                        .failed
                        .insert("(a test whose name was lost in the output)".into());
                }
            }
            None => {}
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Line {
    Ended {
        name: String,
        outcome: Outcome,
    },
    Result {
        passed: usize,
        failed: usize,
        ignored: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    Ignored,
}

/// `open` holds the name of a test whose line was broken by something else's output.
fn meaning(line: &str, open: &mut Option<String>) -> Option<Line> {
    if let Some(rest) = line.strip_prefix("test result: ") {
        return Some(Line::Result {
            passed: count(rest, "passed"),
            failed: count(rest, "failed"),
            ignored: count(rest, "ignored"),
        });
    }
    let outcome = |word: &str| match word {
        "ok" => Some(Outcome::Passed),
        "FAILED" => Some(Outcome::Failed),
        word if word.starts_with("ignored") => Some(Outcome::Ignored),
        _ => None,
    };
    if let Some((name, rest)) = line
        .strip_prefix("test ")
        .and_then(|rest| rest.rsplit_once(" ... "))
    {
        let name = name.trim_end_matches(" - should panic").to_owned();
        return match outcome(rest) {
            Some(outcome) => Some(Line::Ended { name, outcome }),
            None => {
                *open = Some(name);
                None
            }
        };
    }
    let outcome = outcome(line)?;
    let name = open.take()?;
    Some(Line::Ended { name, outcome })
}

/// The number before a word: 12 of "12 passed".
fn count(text: &str, what: &str) -> usize {
    text.split(';')
        .filter_map(|part| part.trim().rsplit_once(' '))
        .filter(|(_, word)| *word == what)
        .filter_map(|(number, _)| number.rsplit(' ').next()?.parse::<usize>().ok())
        .sum()
}

/// What failed tests printed, from a log of one or several processes: for each its block, and of
/// a long block the beginning and the end. Without any block, the end of the log.
pub fn explanation(log: &str) -> String {
    const ENDS: usize = 2500;
    let mut blocks = Vec::new();
    let mut rest = log;
    while let Some(at) = rest.find("\n---- ") {
        let block = &rest[at + 1..];
        let next = block[1..].find("\n---- ").map(|at| at + 2);
        let over = block.find("\n\nfailures:\n");
        let end = next.into_iter().chain(over).min().unwrap_or(block.len());
        blocks.push(shortened(block[..end].trim_end(), ENDS));
        rest = &block[end.saturating_sub(1)..];
    }
    match blocks.is_empty() {
        true => shortened(log.trim_end(), ENDS),
        false => blocks.join("\n\n"),
    }
}

fn shortened(text: &str, ends: usize) -> String {
    if text.len() <= 2 * ends {
        return text.to_owned();
    }
    let (from, to) = (
        text.floor_char_boundary(ends),
        text.ceil_char_boundary(text.len() - ends),
    );
    format!(
        "{}\n  […{} bytes…]\n{}",
        &text[..from],
        to - from,
        &text[to..]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Report {
        let mut report = read(text.as_bytes(), std::io::sink(), |_, _| {}).unwrap();
        for (_, time) in &mut report.times {
            *time = Duration::ZERO;
        }
        report
    }

    #[test]
    fn a_whole_run_is_counted() {
        let report = of("\nrunning 3 tests\ntest a::b ... ok\ntest c ... FAILED\n\
             test d ... ignored, no reason\n\nfailures:\n    c\n\n\
             test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 2 filtered out; \
             finished in 0.01s\n");
        assert_eq!(
            (report.passed, report.ignored, report.complete),
            (1, 1, true)
        );
        assert_eq!(report.failed, BTreeSet::from(["c".to_owned()]));
        assert_eq!(report.times.len(), 3);
    }

    #[test]
    fn a_line_broken_by_a_child_process_is_mended() {
        let report = of("test a ... hello from a child\nok\ntest b ... ok\n\
             test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n");
        let names: Vec<&str> = report.times.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn a_dead_process_fails_what_it_did_not_finish() {
        let given: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        let mut report = of("running 3 tests\ntest a ... ok\ntest b ... ");
        report.complete_with(&given, "lab");
        assert_eq!(report.passed, 1);
        assert_eq!(
            report.failed,
            BTreeSet::from(["b".to_owned(), "c".to_owned()])
        );

        let mut report = of("");
        report.complete_with(&[], "engine");
        assert_eq!(report.failed.len(), 1);
    }

    #[test]
    fn a_failure_without_a_name_is_still_a_failure() {
        let report = of("test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured\n");
        assert_eq!(report.failed.len(), 1);
    }

    #[test]
    fn every_failure_is_explained_shortly() {
        let log = format!(
            "running 2 tests\ntest a ... FAILED\n\nfailures:\n\n---- a stdout ----\nwhy a\n\n\
             ---- b stdout ----\nstart{}end\n\n\nfailures:\n    a\n    b\n\ntest result: FAILED\n\
             running 1 test\n\nfailures:\n\n---- c stdout ----\nwhy c\n\n\nfailures:\n    c\n",
            "x".repeat(20_000)
        );
        let text = explanation(&log);
        for part in ["why a", "start", "end", "why c", "[…"] {
            assert!(text.contains(part), "{part}");
        }
        assert!(
            text.len() < 6000 && !text.contains("test result"),
            "{}",
            text.len()
        );
        assert_eq!(explanation("died early\n"), "died early");
    }
}
