//! `cargo xtask test`: all tests of the house, and the same in CI.
//!
//! Tiers, each of which can be asked for alone:
//! - `host`: unit, property and integration tests of every package, as whoever calls;
//! - `sim`: whole networks in one process, where the target exists;
//! - `bpf`: the real programs by the real verifiers: on the host's kernel, in UML, those named
//!   `kernel_…` on the oldest stock kernel that is supported, and those named `kernels_…` on each;
//! - `lab`: whole networks of real binaries, in a kernel with WireGuard, spread over guests;
//! - `check`: formatting, lints, house rules, dependencies, the committed eBPF object.
//!
//! What could not run is listed with its reason; a skip that `tests/skips.txt` does not announce
//! is a failure. The last line is `N passed, N failed, N skipped`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::build::{self, TestBinary};
use crate::vm;
use crate::{deps, ebpf, house, setup, tidy};

mod guests;
mod libtest;
mod skips;

use libtest::Report;
use skips::Skips;

/// No test process of ours takes so long unless it hangs. `--full` runs long ones.
const PROCESS: Duration = Duration::from_secs(20 * 60);
const FULL_PROCESS: Duration = Duration::from_secs(120 * 60);
/// How many of the slowest tests in guests are named at the end.
const SLOWEST: usize = 8;

#[derive(clap::Args)]
pub struct Args {
    /// Also the long runs: deep fuzzing, the million packets, the rebuild of the eBPF object
    #[arg(long)]
    full: bool,
    /// Only this tier (may be repeated)
    #[arg(long, value_enum, value_name = "TIER")]
    tier: Vec<Tier>,
    #[command(flatten)]
    wish: vm::Wish,
    /// Only tests whose names contain this
    filter: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Tier {
    Host,
    Sim,
    Bpf,
    Lab,
    Check,
}

pub fn run_verb(args: Args) -> anyhow::Result<u8> {
    let mut run = Run::new(args)?;
    run.all()?;
    run.conclude()
}

/// One run of the tests: what is asked for, and what came of it so far.
struct Run {
    args: Args,
    /// `results/test`: logs and notes of this run, emptied at its start.
    folder: PathBuf,
    programs: PathBuf,
    binaries: Vec<TestBinary>,
    passed: usize,
    failed: Vec<String>,
    skips: Skips,
    phases: Vec<(&'static str, Duration)>,
    /// How long each test in a guest took.
    times: Vec<(String, Duration)>,
    /// Guests whose kernel hung: two guests at once may tell.
    hangs: Mutex<Vec<String>>,
}

impl Run {
    fn new(args: Args) -> anyhow::Result<Run> {
        let folder = house::results()?.join("test");
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        Ok(Run {
            args,
            folder,
            programs: PathBuf::new(),
            binaries: Vec::new(),
            passed: 0,
            failed: Vec::new(),
            skips: Skips::default(),
            phases: Vec::new(),
            times: Vec::new(),
            hangs: Mutex::new(Vec::new()),
        })
    }

    fn all(&mut self) -> anyhow::Result<()> {
        self.phase("set up", |_| setup::for_tests())?;
        self.phase("build", |run| {
            (run.programs, run.binaries) = build::everything()?;
            Ok(())
        })?;
        for (name, tier, action) in TIERS {
            if self.wants(tier) {
                self.phase(name, action)?;
            }
        }
        Ok(())
    }

    /// Checks are no tests with names to filter: a filter leaves them out unless asked for.
    fn wants(&self, tier: Tier) -> bool {
        match self.args.tier.as_slice() {
            [] => tier != Tier::Check || self.args.filter.is_none(),
            some => some.contains(&tier),
        }
    }

    fn phase(
        &mut self,
        name: &'static str,
        action: impl FnOnce(&mut Run) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        println!("{name}:");
        let outcome = action(self);
        self.phases.push((name, start.elapsed()));
        outcome
    }

    fn conclude(&mut self) -> anyhow::Result<u8> {
        for name in self.skips.unannounced()? {
            self.failed.push(format!(
                "{name} (skipped without an entry in tests/skips.txt)"
            ));
        }
        println!("\ntimes:");
        for (name, time) in &self.phases {
            println!("  {name:8} {:5.0} s", time.as_secs_f64());
        }
        self.times.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
        let line =
            |(name, time): &(String, Duration)| format!("{:6.1} {name}\n", time.as_secs_f64());
        let lines: String = self.times.iter().map(line).collect();
        std::fs::write(self.folder.join("times.txt"), lines)?;
        for (name, time) in self.times.iter().take(SLOWEST) {
            println!("  slow     {:5.0} s  {name}", time.as_secs_f64());
        }
        if self.skips.len() > 0 {
            println!("\nskipped:");
            for (name, reason) in self.skips.iter() {
                println!("  {name}: {reason}");
            }
        }
        let hangs = self.hangs.lock().map(|hangs| hangs.clone());
        for hang in hangs.unwrap_or_default() {
            println!("\n{hang}");
        }
        if !self.failed.is_empty() {
            println!("\nfailed (logs are in {}):", self.folder.display());
            for name in &self.failed {
                println!("  {name}");
            }
        }
        if self.passed == 0 && self.failed.is_empty() && self.skips.len() == 0 {
            println!("\nno test is named so");
        }
        let (passed, failed, skipped) = (self.passed, self.failed.len(), self.skips.len());
        println!("\n{passed} passed, {failed} failed, {skipped} skipped");
        Ok(if failed == 0 && (passed > 0 || skipped > 0) {
            0
        } else {
            1
        })
    }

    /// Takes in what a process did: counts, skips, and on failure its own words.
    fn settle(&mut self, place: &str, mut report: Report, given: &[String], time: Duration) {
        report.complete_with(given, place);
        if report.ignored > 0 {
            self.failed
                .push(format!("{place}: a test is #[ignore]d; the house has none"));
        }
        let skipped = self.skips.read(&self.note(place), place);
        let passed = report.passed.saturating_sub(skipped);
        self.passed += passed;
        if report.passed == 0 && report.failed.is_empty() && skipped == 0 {
            return;
        }
        let verdict = if report.failed.is_empty() {
            "ok  "
        } else {
            "FAIL"
        };
        let seconds = time.as_secs_f64();
        let skipped = if skipped > 0 {
            format!(", {skipped} skipped")
        } else {
            String::new()
        };
        println!(
            "  {verdict} {place:24} {passed:4} passed, {} failed{skipped}  {seconds:.1} s",
            report.failed.len()
        );
        if report.ignored > 0 {
            self.failed
                .push(format!("{place}: a test is #[ignore]d; the house has none"));
        }
        if !report.failed.is_empty() {
            // What libtest captured, then what was written past it.
            for log in [self.log(place), self.errors(place)] {
                let text = std::fs::read(&log).unwrap_or_default();
                let text = libtest::explanation(&String::from_utf8_lossy(&text));
                if !text.is_empty() {
                    println!("{text}");
                }
            }
        }
        self.failed
            .extend(report.failed.iter().map(|name| format!("{place}::{name}")));
    }

    /// Notes that a guest's kernel hung after the named test, or at its start.
    fn hung(&self, place: &str, after: Option<&str>) {
        let when = after.map_or("before its first test ended".to_owned(), |test| {
            format!("after {test}")
        });
        let log = self.errors(place);
        let hang = format!(
            "{place}: the guest's kernel hung {when} (its log: {})",
            log.display()
        );
        println!("  {hang}");
        if let Ok(mut hangs) = self.hangs.lock() {
            hangs.push(hang);
        }
    }

    fn log(&self, place: &str) -> PathBuf {
        self.folder.join(format!("{}.log", file_name(place)))
    }

    fn errors(&self, place: &str) -> PathBuf {
        self.folder.join(format!("{}.stderr.log", file_name(place)))
    }

    /// Where the tests of a process note what they skip.
    fn note(&self, place: &str) -> PathBuf {
        self.folder.join(format!("{}.skips", file_name(place)))
    }

    /// What every test process is told.
    fn env(&self, place: &str) -> anyhow::Result<BTreeMap<String, String>> {
        let text = |path: &Path| path.display().to_string();
        let mut env = BTreeMap::from([
            ("WEIR_BIN_DIR".to_owned(), text(&self.programs)),
            ("WEIR_RESULTS".to_owned(), text(&house::results()?)),
            ("WEIR_SKIPS".to_owned(), text(&self.note(place))),
            // A failed test says what it wanted; frames of its runner would bury that.
            ("RUST_BACKTRACE".to_owned(), "0".to_owned()),
        ]);
        if let Some(captures) = captures() {
            env.insert("WEIR_CAPTURES".to_owned(), text(&captures));
        }
        if self.args.full {
            env.insert("WEIR_FULL".to_owned(), "1".to_owned());
        }
        Ok(env)
    }

    fn limit(&self) -> Duration {
        if self.args.full {
            FULL_PROCESS
        } else {
            PROCESS
        }
    }
}

type Action = fn(&mut Run) -> anyhow::Result<()>;

/// The cheap ones first: who broke a unit test should not wait for a lab.
const TIERS: [(&str, Tier, Action); 5] = [
    ("host", Tier::Host, Run::host),
    ("sim", Tier::Sim, Run::sim),
    ("bpf", Tier::Bpf, Run::bpf),
    ("lab", Tier::Lab, Run::lab),
    ("check", Tier::Check, Run::check),
];

// Tiers on the host itself.
impl Run {
    fn host(&mut self) -> anyhow::Result<()> {
        let elsewhere = ["bpf", "lab", "sim"].map(|target| self.tier_binary(target));
        for binary in self.binaries.clone() {
            if !elsewhere.contains(&Some(binary.clone())) {
                self.here(&binary)?;
            }
        }
        let mut command = build::cargo();
        command.args(["test", "--quiet", "--workspace", "--doc", "--no-fail-fast"]);
        if let Some(filter) = &self.args.filter {
            command.args(["--", filter]);
        }
        self.process("doc", command)
    }

    fn sim(&mut self) -> anyhow::Result<()> {
        match self.tier_binary("sim") {
            Some(binary) => self.here(&binary),
            None => Ok(()),
        }
    }

    fn here(&mut self, binary: &TestBinary) -> anyhow::Result<()> {
        let mut command = Command::new(&binary.path);
        command.current_dir(&binary.folder).args(&self.args.filter);
        // As under `cargo test`: where a package's own fixtures are.
        command.env("CARGO_MANIFEST_DIR", &binary.folder);
        self.process(&binary.name(), command)
    }

    fn process(&mut self, place: &str, mut command: Command) -> anyhow::Result<()> {
        let start = Instant::now();
        command
            .envs(self.env(place)?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command.stderr(File::create(self.errors(place))?);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let stdout = child.stdout.take().context("no stdout")?;
        let (ended, waits) = std::sync::mpsc::channel::<()>();
        let (pid, limit) = (rustix::process::Pid::from_child(&child), self.limit());
        let watch = std::thread::spawn(move || {
            let over = std::sync::mpsc::RecvTimeoutError::Timeout;
            if waits.recv_timeout(limit) == Err(over) {
                // It hangs; what it did not finish will count as failed.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        });
        let progress = Progress::new(place, 0);
        let report = libtest::read(stdout, File::create(self.log(place))?, |name, _| {
            progress.ended(name);
        })?;
        progress.clear();
        drop(ended);
        let _ = watch.join();
        let status = child.wait()?;
        let mut report = report;
        report.complete &= status.success() || !report.failed.is_empty();
        self.settle(place, report, &[], start.elapsed());
        Ok(())
    }

    fn tier_binary(&self, target: &str) -> Option<TestBinary> {
        let found = |binary: &&TestBinary| {
            binary.integration && binary.package == "tests" && binary.target == target
        };
        self.binaries.iter().find(found).cloned()
    }
}

// What is no test but must hold.
impl Run {
    fn check(&mut self) -> anyhow::Result<()> {
        self.single("tidy", |_| tidy::check().map(|()| Held));
        self.single("format", |_| {
            quiet(build::cargo().args(["fmt", "--all", "--check"]))
        });
        self.single("directions", |_| deps::directions().map(|()| Held));
        self.single("licences", |_| match deps::deny()? {
            Some(reason) => Ok(NotHere(reason)),
            None => Ok(Held),
        });
        self.single("clippy", |_| {
            let clippy = ["clippy", "--quiet", "--workspace", "--all-targets"];
            quiet(build::cargo().args(clippy).args(["--", "-D", "warnings"]))
        });
        self.single("ebpf-object", |run| {
            if !run.args.full && !ebpf::needs_rebuild()? {
                return Ok(Held);
            }
            match ebpf::cannot_rebuild() {
                Some(reason) => Ok(NotHere(reason)),
                None => ebpf::run(true).map(|()| Held),
            }
        });
        Ok(())
    }

    fn single(&mut self, name: &str, check: impl FnOnce(&Run) -> anyhow::Result<Check>) {
        let start = Instant::now();
        let progress = Progress::new("check", 0);
        progress.ended(name);
        let outcome = check(self);
        progress.clear();
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(Held) => {
                self.passed += 1;
                println!("  ok   {name:24} {seconds:.1} s");
            }
            Ok(NotHere(reason)) => {
                println!("  skip {name:24} {reason}");
                self.skips.add(&format!("check::{name}"), &reason);
            }
            Err(error) => {
                println!("  FAIL {name:24} {seconds:.1} s\n{error:#}");
                self.failed.push(format!("check::{name}"));
            }
        }
    }
}

/// How a check went, when it did not fail.
enum Check {
    Held,
    NotHere(String),
}
use Check::{Held, NotHere};

/// Runs a checking command; its words are the error.
fn quiet(command: &mut Command) -> anyhow::Result<Check> {
    let out = command.stdin(Stdio::null()).output()?;
    let words = [out.stdout, out.stderr].concat();
    anyhow::ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&words).trim_end()
    );
    Ok(Held)
}

/// Recorded traffic of other implementations: given, or beside the checkout.
fn captures() -> Option<PathBuf> {
    let given = std::env::var_os("WEIR_CAPTURES").filter(|given| !given.is_empty());
    let folder = match given {
        Some(given) => PathBuf::from(given),
        None => house::root().parent()?.join("shared/captures"),
    };
    folder.canonicalize().ok().filter(|folder| folder.is_dir())
}

fn file_name(place: &str) -> String {
    place.replace('/', "-")
}

/// A line on the terminal that says where we are; nothing elsewhere.
struct Progress {
    place: String,
    all: usize,
    // How many tests ended: two guests report at once.
    ended: Mutex<usize>,
    shown: bool,
}

impl Progress {
    fn new(place: &str, all: usize) -> Progress {
        let shown = std::io::stderr().is_terminal();
        Progress {
            place: place.to_owned(),
            all,
            ended: Mutex::new(0),
            shown,
        }
    }

    fn ended(&self, name: &str) {
        let Ok(mut ended) = self.ended.lock() else {
            return;
        };
        *ended += 1;
        if self.shown {
            let of = if self.all > 0 {
                format!("/{}", self.all)
            } else {
                String::new()
            };
            eprint!("\r\x1b[K  {} {}{of} {name:.60}", self.place, *ended);
        }
    }

    fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
