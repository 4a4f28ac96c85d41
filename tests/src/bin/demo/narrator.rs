//! How the demo speaks: scenes with a sentence each, the commands and what came back, checks, and
//! a table at the end. Colour only on a terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use serde::Serialize;
use tests::process::Output;

/// Longest output of one command that is shown, in lines: the point, not the scroll.
const SHOWN_LINES: usize = 24;

/// Tells the story and keeps the score.
pub struct Narrator {
    colour: bool,
    begun: Instant,
    scenes: Vec<Scene>,
}

/// One row of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Scene {
    /// Its number, from 1.
    number: usize,
    /// What it is about, in a few words.
    title: String,
    /// Whether every check of it held.
    passed: bool,
    /// What it showed: the last line of the table.
    result: String,
    /// How long it took.
    seconds: f64,
    /// What was checked.
    checks: Vec<Check>,
}

/// Something that had to be so.
#[derive(Clone, Debug, Serialize)]
struct Check {
    what: String,
    passed: bool,
}

impl Narrator {
    /// A narrator on stdout.
    pub fn new() -> Self {
        Self {
            colour: std::io::stdout().is_terminal(),
            begun: Instant::now(),
            scenes: Vec::new(),
        }
    }

    /// Says something between scenes.
    pub fn say(&self, text: &str) {
        for line in text.lines() {
            println!("{line}");
        }
    }

    /// Plays one scene. What it returns is its row in the table; an error is a scene that failed.
    /// Returns whether every check held.
    pub fn scene(
        &mut self,
        title: &str,
        sentence: &str,
        play: impl FnOnce(&mut Stage) -> anyhow::Result<String>,
    ) -> bool {
        let number = self.scenes.len() + 1;
        println!("\n{}", self.bold(&format!("{number:2}  {title}")));
        for line in wrapped(sentence, 84) {
            println!("    {line}");
        }
        println!();
        let begun = Instant::now();
        let mut stage = Stage {
            colour: self.colour,
            checks: Vec::new(),
        };
        let result = play(&mut stage).unwrap_or_else(|error| {
            stage.check(
                &format!("the scene was played to its end: {error:#}"),
                false,
            );
            "broke off".to_owned()
        });
        let passed = stage.checks.iter().all(|check| check.passed);
        self.scenes.push(Scene {
            number,
            title: title.to_owned(),
            passed,
            result,
            seconds: rounded(begun.elapsed()),
            checks: stage.checks,
        });
        passed
    }

    /// Prints the table. Returns whether everything held.
    pub fn finish(&self) -> bool {
        let wide = |text: fn(&Scene) -> &str| {
            let width = |scene| text(scene).chars().count();
            self.scenes.iter().map(width).max().unwrap_or(0)
        };
        let (titles, results) = (wide(|scene| &scene.title), wide(|scene| &scene.result));
        println!("\n{}\n", self.bold("What was shown"));
        for scene in &self.scenes {
            let Scene {
                number,
                title,
                result,
                seconds,
                ..
            } = scene;
            let verdict = verdict(self.colour, scene.passed);
            println!("{number:4}  {title:titles$}  {result:results$}  {seconds:5.1} s  {verdict}");
        }
        let passed = self.scenes.iter().filter(|scene| scene.passed).count();
        let failed = self.scenes.len() - passed;
        let seconds = self.begun.elapsed().as_secs();
        println!("\n{passed} scenes passed, {failed} failed, in {seconds} s");
        failed == 0
    }

    /// All rows, for `--json`.
    pub fn scenes(&self) -> &[Scene] {
        &self.scenes
    }

    fn bold(&self, text: &str) -> String {
        painted(self.colour, "1", text)
    }
}

/// Where one scene plays.
pub struct Stage {
    colour: bool,
    checks: Vec<Check>,
}

impl Stage {
    /// Shows a command as it was typed on a host, and what it printed.
    pub fn command(&self, host: &str, line: &str, output: &Output) {
        println!(
            "    {} {line}",
            painted(self.colour, "36", &format!("{host}$"))
        );
        let both = format!("{}{}", output.stdout, output.stderr);
        self.quote(&both);
    }

    /// Shows what something printed.
    pub fn quote(&self, text: &str) {
        let lines: Vec<&str> = text.trim_end().lines().collect();
        for line in lines.iter().take(SHOWN_LINES) {
            println!("      {}", painted(self.colour, "2", line));
        }
        if lines.len() > SHOWN_LINES {
            let more = format!("… {} more lines", lines.len() - SHOWN_LINES);
            println!("      {}", painted(self.colour, "2", &more));
        }
    }

    /// Says something within the scene.
    pub fn note(&self, text: &str) {
        println!("    {text}");
    }

    /// Shows that something was so, or was not.
    pub fn check(&mut self, what: &str, passed: bool) {
        println!("    {}  {what}", verdict(self.colour, passed));
        self.checks.push(Check {
            what: what.to_owned(),
            passed,
        });
    }
}

fn verdict(colour: bool, passed: bool) -> String {
    if passed {
        painted(colour, "32", "ok    ")
    } else {
        painted(colour, "31;1", "FAILED")
    }
}

fn painted(colour: bool, code: &str, text: &str) -> String {
    if colour {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

fn rounded(time: Duration) -> f64 {
    (time.as_secs_f64() * 100.0).round() / 100.0
}

/// Splits a text into lines of at most `width` characters, at blanks.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines
            .last_mut()
            .filter(|line| line.len() + 1 + word.len() <= width);
        match line {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) => {
                line.push(' ');
                line.push_str(word);
            }
            None => lines.push(word.to_owned()),
        }
    }
    lines
}
