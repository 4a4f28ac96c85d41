//! The guard: starts a guest, watches it, and leaves nothing behind.
//!
//! ```text
//!   xtask vm ──pipe (job, then the lifeline)──► __guard ──► __launch = (exec) the guest
//!      ▲                                          │  ▲           │
//!      └────────── stdout, stderr, exit code ─────┘  └── stdout, stderr by pipes
//! ```
//! The guard sits in its own session, so the terminal's signals do not reach it. It ends the
//! guest when the command has ended, when time is over, or when the lifeline reads end of file:
//! then nobody waits for the guest any more. Should the guard itself be killed, the kernel kills
//! the guest (the parent-death signal that `__launch` asks for) and the next guest's start
//! removes the folder.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, Read, Seek, SeekFrom, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal};

use super::guest::Folder;
use super::{DIED, Job, Machine, SILENT, TIMED_OUT, host, qemu, uml};
use crate::house;

/// How much of the kernel's log is shown when a guest went wrong.
const LOG_TAIL_BYTES: u64 = 6000;
/// A QEMU guest beats every 5 s (`xtask/vm/run.sh`), and boots within 40 s on a busy machine. One
/// that is silent for so long has a kernel or an emulator that hangs.
const SILENCE: Duration = Duration::from_secs(120);
/// How often the guard looks for beats.
const LOOK: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct LaunchArgs {
    /// Where the guest's own stdout and stderr go
    #[arg(long)]
    log: PathBuf,
    /// The guard's process id
    #[arg(long)]
    guard: i32,
    /// Run on this processor only
    #[arg(long)]
    cpu: Option<usize>,
    /// The guest is a plain process: it gets our stdin, stdout and stderr as they are
    #[arg(long)]
    direct: bool,
    /// The guest's command line; `{in}`, `{out}`, `{err}` stand for our descriptors
    #[arg(last = true, required = true)]
    argv: Vec<String>,
}

/// The whole life of one guest; returns its command's exit code.
pub fn guard() -> anyhow::Result<u8> {
    // Already being a leader of its own session is as good.
    let _ = rustix::process::setsid();
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let job: Job = serde_json::from_str(&line).context("the guard got no job")?;

    let folder = Folder::make(&job)?;
    let terminal = match &job.tty {
        Some(path) => Some(Terminal::open(path)?),
        None => None,
    };
    let processor = Processor::take(&job.machine)?;
    let mut guest = launch_command(&job, &folder, terminal.as_ref(), processor.number)?
        .spawn()
        .context("cannot start the guest")?;
    let group = Pid::from_child(&guest);
    let (ends, first) = mpsc::channel();
    let copies = [
        guest
            .stdout
            .take()
            .map(|from| copy(from, std::io::stdout(), ends.clone())),
        guest
            .stderr
            .take()
            .map(|from| copy(from, std::io::stderr(), ends.clone())),
    ];
    let end = watch(guest, &job, &folder, ends, &first);
    // A UML kernel is a family of processes; however it ended, all of them go.
    let _ = rustix::process::kill_process_group(group, Signal::KILL);
    if !matches!(end, End::Abandoned) {
        for thread in copies.into_iter().flatten() {
            let _ = thread.join();
        }
    }
    drop(terminal);
    Ok(conclude(&end, &job, &folder))
}

enum End {
    Ended,
    TimedOut,
    Silent,
    Abandoned,
}

/// Waits for the first of: the guest ends, its time is over, its kernel is silent, nobody waits
/// for it.
fn watch(
    mut guest: Child,
    job: &Job,
    folder: &Folder,
    ends: Sender<End>,
    first: &Receiver<End>,
) -> End {
    let group = Pid::from_child(&guest);
    let abandoned = ends.clone();
    std::thread::spawn(move || {
        let mut byte = [0];
        while matches!(std::io::stdin().lock().read(&mut byte), Ok(1..)) {}
        let _ = abandoned.send(End::Abandoned);
    });
    let reaper = std::thread::spawn(move || {
        let _ = guest.wait();
        let _ = ends.send(End::Ended);
    });
    let end = first_end(job, folder, first);
    if !matches!(end, End::Ended) {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
    let _ = reaper.join();
    end
}

fn first_end(job: &Job, folder: &Folder, first: &Receiver<End>) -> End {
    let start = Instant::now();
    let mut pulse = Pulse {
        beats: 0,
        since: start,
    };
    loop {
        match first.recv_timeout(LOOK) {
            Ok(end) => return end,
            Err(RecvTimeoutError::Disconnected) => return End::TimedOut,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let now = Instant::now();
        if now - start >= job.timeout {
            return End::TimedOut;
        }
        if job.beats() && pulse.is_lost(now, folder.beats()) {
            return End::Silent;
        }
    }
}

/// Whether a guest that should beat still does.
struct Pulse {
    beats: u64,
    since: Instant,
}

impl Pulse {
    fn is_lost(&mut self, now: Instant, beats: u64) -> bool {
        if beats != self.beats {
            (self.beats, self.since) = (beats, now);
        }
        now - self.since >= SILENCE
    }
}

fn conclude(end: &End, job: &Job, folder: &Folder) -> u8 {
    let log = folder.kernel_log();
    match (end, folder.exit_code()) {
        (End::Abandoned, _) => DIED,
        (End::TimedOut, _) => {
            show_tail(&log);
            eprintln!("xtask vm: timed out after {} s", job.timeout.as_secs());
            TIMED_OUT
        }
        (End::Silent, _) => {
            show_tail(&log);
            eprintln!(
                "xtask vm: the guest's kernel hung: it was silent for {} s; above is the end of \
                 its log",
                SILENCE.as_secs()
            );
            SILENT
        }
        (End::Ended, None) => {
            show_tail(&log);
            eprintln!("xtask vm: the guest died; above is the end of its kernel's log");
            DIED
        }
        (End::Ended, Some(code)) => {
            if job.verbose {
                show_tail(&log);
            }
            code
        }
    }
}

fn show_tail(log: &Path) {
    let mut bytes = Vec::new();
    let read = File::open(log).and_then(|mut log| {
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        log.read_to_end(&mut bytes)
    });
    if read.is_ok() {
        // A closed stderr must not keep the guard from its work.
        let _ = std::io::stderr().write_all(&bytes);
    }
}

/// Copies a stream until it ends, at once and unchanged. A reader that went away abandons the
/// guest, as it would end any program that writes to it.
fn copy(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    ends: Sender<End>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if to
                .write_all(&buffer[..length])
                .and_then(|()| to.flush())
                .is_err()
            {
                let _ = ends.send(End::Abandoned);
                break;
            }
        }
    })
}

fn launch_command(
    job: &Job,
    folder: &Folder,
    terminal: Option<&Terminal>,
    cpu: Option<usize>,
) -> anyhow::Result<Command> {
    let argv = match &job.machine {
        Machine::Host => host::argv(folder)?,
        Machine::Qemu { .. } => qemu::argv(job, folder),
        Machine::Uml { kernel } => uml::argv(job, kernel, folder),
    };
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("__launch")
        .arg("--log")
        .arg(folder.kernel_log());
    command.arg("--guard").arg(std::process::id().to_string());
    if let Some(cpu) = cpu {
        command.arg("--cpu").arg(cpu.to_string());
    }
    if matches!(job.machine, Machine::Host) {
        command.arg("--direct");
    }
    command.arg("--").args(argv);
    command.env("TMPDIR", uml::memory_folder(job.mem_mib));
    command
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.stdin(match terminal {
        Some(terminal) => Stdio::from(terminal.file.try_clone()?),
        None => Stdio::null(),
    });
    Ok(command)
}

/// Becomes the guest: dies with the guard, keeps to one processor, logs to the log.
pub fn launch(args: &LaunchArgs) -> anyhow::Result<u8> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    anyhow::ensure!(parent == Some(args.guard), "the guard is gone");
    if let Some(cpu) = args.cpu {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        rustix::thread::sched_setaffinity(None, &set)?;
    }
    if args.direct {
        let (program, rest) = args.argv.split_first().context("no command line")?;
        let failure = Command::new(program).args(rest).exec();
        return Err(failure).with_context(|| format!("cannot run {program}"));
    }
    // `dup` gives descriptors that stay open across exec, on purpose.
    let stdin = rustix::io::dup(std::io::stdin())?.into_raw_fd().to_string();
    let stdout = rustix::io::dup(std::io::stdout())?
        .into_raw_fd()
        .to_string();
    let stderr = rustix::io::dup(std::io::stderr())?
        .into_raw_fd()
        .to_string();
    let argv: Vec<String> = args
        .argv
        .iter()
        .map(|word| {
            word.replace("{in}", &stdin)
                .replace("{out}", &stdout)
                .replace("{err}", &stderr)
        })
        .collect();
    let log = OpenOptions::new().append(true).open(&args.log)?;
    let (program, rest) = argv.split_first().context("no command line")?;
    let failure = Command::new(program)
        .args(rest)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .exec();
    Err(failure).with_context(|| format!("cannot run {program}"))
}

/// A UML guest runs on one processor: its kernel and its user process hand over on every system
/// call, and across processors each hand-over is a wake-up (twice to eight times slower). The
/// lock makes parallel guests spread.
struct Processor {
    number: Option<usize>,
    _lock: Option<File>,
}

impl Processor {
    fn take(machine: &Machine) -> anyhow::Result<Processor> {
        if !matches!(machine, Machine::Uml { .. }) {
            return Ok(Processor {
                number: None,
                _lock: None,
            });
        }
        let allowed = rustix::thread::sched_getaffinity(None)?;
        let usable: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|&cpu| allowed.is_set(cpu))
            .collect();
        let cache = house::cache()?;
        for &cpu in &usable {
            let lock = File::create(cache.join(format!("cpu{cpu}.lock")))?;
            let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
            if rustix::fs::flock(&lock, exclusive).is_ok() {
                return Ok(Processor {
                    number: Some(cpu),
                    _lock: Some(lock),
                });
            }
        }
        let shared = usable
            .get(std::process::id() as usize % usable.len().max(1))
            .copied();
        Ok(Processor {
            number: shared,
            _lock: None,
        })
    }
}

/// The user's terminal; given back as it was found.
struct Terminal {
    file: File,
    was: rustix::termios::Termios,
}

impl Terminal {
    fn open(path: &Path) -> anyhow::Result<Terminal> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(path)
            .context("cannot open the terminal")?;
        let was = rustix::termios::tcgetattr(&file)?;
        let mut raw = was.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&file, rustix::termios::OptionalActions::Now, &raw)?;
        Ok(Terminal { file, was })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let now = rustix::termios::OptionalActions::Now;
        // The terminal may be gone; then it needs no mending.
        let _ = rustix::termios::tcsetattr(&self.file, now, &self.was);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_lost_when_it_is_silent_and_not_when_it_is_slow() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut pulse = Pulse {
            beats: 0,
            since: start,
        };
        assert!(!pulse.is_lost(at(119), 0), "it boots");
        for beat in 1..10 {
            assert!(!pulse.is_lost(at(119 * beat), beat));
        }
        assert!(!pulse.is_lost(at(119 * 9 + 119), 9));
        assert!(pulse.is_lost(at(119 * 9 + 120), 9));
    }
}
