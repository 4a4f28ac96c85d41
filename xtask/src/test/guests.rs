//! Tiers that run in kernels of their own: tests by name, spread over guests.
//!
//! Each guest runs one libtest process, one test after the other, with a helping of the names. A
//! guest that dies fails what it did not finish and nothing else. One whose kernel hangs (seen once,
//! in an emulated kernel, before any test) fails the test that ran, if one did; another guest then does
//! what is left, and the end of the run tells of it.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::libtest::{self, Report};
use super::{Progress, Run};
use crate::build::TestBinary;
use crate::house;
use crate::vm::{self, Machine};

/// How many guests run lab tests side by side at most; each takes a processor and 2 GB.
const LAB_GUESTS: usize = 4;
/// How many helpings each guest's share of the lab is cut into, so that none ends long last.
const HELPINGS: usize = 4;
/// How many tests a guest with a stock kernel gets, which emulation makes slow.
const STOCK_HELPING: usize = 8;
/// With so many hung guests, what is left of a helping counts as failed.
const HANGS: usize = 2;

/// Tests by name, and the kernel that they run in.
struct Place {
    name: String,
    machine: Machine,
    tests: Vec<String>,
    /// Whether `--full` means the long forms here: once is enough, where packets are quickest.
    long: bool,
    /// How many tests one guest gets; fewer make the shares of several guests more even.
    helping: usize,
}

/// One guest's work: the place's index, the number of the helping, its tests.
type Helping<'a> = (usize, usize, &'a [String]);

impl Run {
    pub fn bpf(&mut self) -> anyhow::Result<()> {
        let Some(binary) = self.tier_binary("bpf") else {
            return Ok(());
        };
        let names = self.names(&binary)?;
        let full = self.args.full;
        let named = |start: &str| {
            let fits = |name: &&String| name.split("::").any(|part| part.starts_with(start));
            names.iter().filter(fits).cloned().collect::<Vec<_>>()
        };
        // What the oldest one does, newer ones do: unless it is about what kernels have and how
        // they are built. UML is a newer one too.
        let stock = |oldest: bool| match oldest || full {
            true => [named("kernel_"), named("kernels_")].concat(),
            false => named("kernels_"),
        };
        // The slow ones first: the quick ones then fill the time that one of them has left.
        let mut wanted: Vec<(String, Result<Machine, String>, Vec<String>)> = Vec::new();
        for (number, line) in vm::STOCK_KERNELS.iter().rev().enumerate() {
            wanted.push((
                format!("bpf@tcg-{line}"),
                vm::stock(line),
                stock(number == 0),
            ));
        }
        let uml = vm::uml_if_ready(&self.args.wish);
        wanted.push(("bpf@uml".into(), uml, names.clone()));
        let host = ("bpf@host".to_owned(), vm::host_for_bpf(), names);
        // Its long forms measure time, and so run alone.
        let turns = match full {
            true => vec![(vec![host], 1), (wanted, house::processors().min(2))],
            false => {
                wanted.push(host);
                vec![(wanted, house::processors().min(2))]
            }
        };
        for (wanted, guests) in turns {
            let mut places = Vec::new();
            for (name, machine, tests) in wanted {
                match machine {
                    Ok(_) if tests.is_empty() => {}
                    Ok(machine) => {
                        let helping = match machine {
                            Machine::Qemu { .. } => STOCK_HELPING,
                            Machine::Uml { .. } | Machine::Host => tests.len(),
                        };
                        places.push(Place {
                            long: matches!(machine, Machine::Host),
                            name,
                            machine,
                            tests,
                            helping,
                        });
                    }
                    Err(reason) => self.skips.add(&name, &reason),
                }
            }
            self.in_guests(&binary, &places, guests)?;
        }
        Ok(())
    }

    pub fn lab(&mut self) -> anyhow::Result<()> {
        let Some(binary) = self.tier_binary("lab") else {
            return Ok(());
        };
        let tests = self.names(&binary)?;
        if tests.is_empty() {
            return Ok(());
        }
        let machine = match vm::pick(&self.args.wish) {
            Ok(machine) => machine,
            Err(error) => {
                self.skips.add("lab", &format!("{error:#}"));
                return Ok(());
            }
        };
        // Only UML guests are quick to start and take one processor each.
        let guests = match machine {
            Machine::Uml { .. } => house::processors().clamp(1, LAB_GUESTS),
            Machine::Host | Machine::Qemu { .. } => 1,
        };
        let helping = match guests {
            1 => tests.len(),
            several => tests.len().div_ceil(several * HELPINGS),
        };
        let lab = Place {
            name: "lab".into(),
            machine,
            tests,
            long: true,
            helping,
        };
        self.in_guests(&binary, &[lab], guests)
    }

    /// The names of a binary's tests that are asked for.
    fn names(&self, binary: &TestBinary) -> anyhow::Result<Vec<String>> {
        let out = Command::new(&binary.path)
            .args(["--list", "--format", "terse"])
            .args(&self.args.filter)
            .output()?;
        anyhow::ensure!(
            out.status.success(),
            "{} cannot list its tests",
            binary.name()
        );
        let text = String::from_utf8_lossy(&out.stdout);
        let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
        Ok(names.map(str::to_owned).collect())
    }

    /// Runs the places' tests in at most `guests` guests at once, a helping at a time.
    fn in_guests(
        &mut self,
        binary: &TestBinary,
        places: &[Place],
        guests: usize,
    ) -> anyhow::Result<()> {
        let helpings = places.iter().enumerate().flat_map(|(index, place)| {
            let chunks = place.tests.chunks(place.helping.max(1)).enumerate();
            chunks.map(move |(number, tests)| (index, number, tests))
        });
        let queue: Mutex<Vec<Helping>> = Mutex::new(helpings.collect::<Vec<_>>());
        if let Ok(mut queue) = queue.lock() {
            queue.reverse();
        }
        let done = Mutex::new(Vec::new());
        let names: Vec<&str> = places.iter().map(|place| place.name.as_str()).collect();
        let progress = Progress::new(&names.join(" "), places.iter().map(|p| p.tests.len()).sum());
        let run = &*self;
        std::thread::scope(|scope| {
            for _ in 0..guests {
                scope.spawn(|| {
                    // The lock guards the queue only while a helping is taken.
                    let next = || queue.lock().ok().and_then(|mut queue| queue.pop());
                    while let Some((index, number, tests)) = next() {
                        let start = Instant::now();
                        let place = &places[index];
                        let outcome = run.helping(place, number, binary, tests, &progress);
                        if let Ok(mut done) = done.lock() {
                            done.push((index, tests, outcome, start.elapsed()));
                        }
                    }
                });
            }
        });
        progress.clear();
        let done = done.into_inner().unwrap_or_default();
        let mut totals: Vec<(Report, Duration)> = places
            .iter()
            .map(|_| (Report::begun(), Duration::ZERO))
            .collect();
        for (index, tests, outcome, time) in done {
            let mut report = outcome?;
            report.complete_with(tests, &places[index].name);
            totals[index].0.absorb(report);
            totals[index].1 += time;
        }
        for (place, (report, time)) in places.iter().zip(totals) {
            let times = report.times.iter();
            self.times
                .extend(times.map(|(test, time)| (format!("{}::{test}", place.name), *time)));
            self.join_logs(&place.name)?;
            self.settle(&place.name, report, &place.tests, time);
        }
        Ok(())
    }

    /// A helping's tests, in one guest unless its kernel hangs.
    fn helping(
        &self,
        place: &Place,
        number: usize,
        binary: &TestBinary,
        tests: &[String],
        progress: &Progress,
    ) -> anyhow::Result<Report> {
        let part = format!("{}.{number}", place.name);
        for path in [self.log(&part), self.errors(&part)] {
            File::create(path)?;
        }
        let mut whole = Report::begun();
        for _ in 0..HANGS {
            let left: Vec<String> = tests
                .iter()
                .filter(|test| !whole.times.iter().any(|(ended, _)| ended == *test))
                .cloned()
                .collect();
            // Whatever a test process prints, it prints before its first test.
            let size = || std::fs::metadata(self.log(&part)).map_or(0, |log| log.len());
            let before = size();
            let (mut report, code) = self.guest(place, &part, binary, &left, progress)?;
            if code != vm::SILENT {
                whole.absorb(report);
                return Ok(whole);
            }
            let running = left.get(report.times.len());
            if let Some(running) = running.filter(|_| size() > before) {
                report.failed.insert(running.clone());
                report.times.push((running.clone(), Duration::ZERO));
            }
            report.passed = report.times.len() - report.failed.len();
            report.complete = true;
            whole.absorb(report);
            self.hung(
                &place.name,
                whole.times.last().map(|(name, _)| name.as_str()),
            );
        }
        whole.complete = false;
        Ok(whole)
    }

    /// One guest with one libtest process, and the guest's exit code.
    fn guest(
        &self,
        place: &Place,
        part: &str,
        binary: &TestBinary,
        tests: &[String],
        progress: &Progress,
    ) -> anyhow::Result<(Report, u8)> {
        let mut command = vec![binary.path.display().to_string()];
        command.extend(["--exact", "--test-threads=1"].map(String::from));
        command.extend_from_slice(tests);
        let mut job = vm::Job::new(place.machine.clone(), command)?;
        job.env.extend(self.env(&place.name)?);
        if !place.long {
            job.env.remove("WEIR_FULL");
        }
        job.env.insert(
            "CARGO_MANIFEST_DIR".into(),
            binary.folder.display().to_string(),
        );
        job.cwd.clone_from(&binary.folder);
        job.timeout = self.limit();
        let append = |path| File::options().append(true).open(path);
        let errors = append(self.errors(part))?;
        let mut guest = job.start(Stdio::piped(), errors.into())?;
        let stdout = guest
            .guard
            .stdout
            .take()
            .context("the guest has no stdout")?;
        let log = append(self.log(part))?;
        let report = libtest::read(stdout, log, |name, _| progress.ended(name))?;
        let code = guest.wait()?;
        let complete = report.complete && (code == 0 || !report.failed.is_empty());
        Ok((Report { complete, ..report }, code))
    }

    /// One log for all guests of a place.
    fn join_logs(&self, place: &str) -> anyhow::Result<()> {
        for of in [Run::log, Run::errors] {
            let mut whole = File::create(of(self, place))?;
            for number in 0.. {
                let part = of(self, &format!("{place}.{number}"));
                let Ok(bytes) = std::fs::read(&part) else {
                    break;
                };
                whole.write_all(&bytes)?;
                std::fs::remove_file(&part)?;
            }
        }
        Ok(())
    }
}
