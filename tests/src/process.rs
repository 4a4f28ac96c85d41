//! Processes of a lab: short ones with a bound on their time, long ones with a log.
//!
//! A long one is ended by its own process id when its handle goes, never by name.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

/// What a finished command left.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command as a person would type it.
    pub command: String,
    /// Its exit code; 128 + the signal that ended it.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Output {
    /// Itself, if the command ended well.
    ///
    /// # Errors
    /// If its exit code is not 0: with the command, the code and all that it said.
    pub fn success(self) -> anyhow::Result<Self> {
        if self.code != 0 {
            bail!(
                "`{}` ended with {}:\n{}{}",
                self.command,
                self.code,
                self.stdout,
                self.stderr
            );
        }
        Ok(self)
    }

    /// stdout as JSON.
    ///
    /// # Errors
    /// If it is none.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_str(&self.stdout).with_context(|| {
            format!(
                "`{}` printed no JSON: {}{}",
                self.command, self.stdout, self.stderr
            )
        })
    }
}

/// Runs a command to its end, with `input` on its stdin; kills it when it takes longer than `bound`.
///
/// # Errors
/// If it cannot be started or does not end in time.
pub fn run(command: &mut Command, input: &str, bound: Duration) -> anyhow::Result<Output> {
    let shown = shown(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not read its stdin may be gone already: that is no failure of it.
        let _gone = stdin.write_all(input.as_bytes());
    }
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let deadline = Instant::now() + bound;
    let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
    let ended = stdout.recv_timeout(left(deadline));
    let ended = ended.and_then(|out| stderr.recv_timeout(left(deadline)).map(|err| (out, err)));
    let Ok((stdout, stderr)) = ended else {
        child.kill()?;
        child.wait()?;
        bail!("`{shown}` did not end within {bound:?}");
    };
    Ok(Output {
        code: code(child.wait()?),
        command: shown,
        stdout,
        stderr,
    })
}

/// Reads a pipe to its end on a thread of its own.
fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What came before an error is still worth showing.
            let _read = pipe.read_to_end(&mut bytes);
        }
        // Nobody waits any more when the time was over.
        let _sent = done.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    result
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The command as a person would type it: programs by their name, without their folder.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut words = vec![name.to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

/// A process that runs until it is told to end; everything it says goes to a log.
#[derive(Debug)]
pub struct Process {
    /// What it is called in messages.
    pub name: String,
    /// Where its stdout and stderr go.
    pub log: PathBuf,
    /// The child; the mutex lets a test end it while the lab holds it for its own end.
    child: Mutex<Child>,
}

impl Process {
    /// Starts a command; its output is appended to `log`.
    ///
    /// # Errors
    /// If it cannot be started or the log cannot be written.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start `{}`", shown(command)))?;
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            child: Mutex::new(child),
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Whether it still runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    /// Ends it with SIGKILL, as a crash would.
    pub fn kill(&self) {
        let mut child = self.child();
        // Both fail only if it has ended already.
        let _killed = child.kill();
        let _waited = child.wait();
    }

    /// Does something while it stands still.
    ///
    /// # Errors
    /// If it has ended; what `work` says.
    pub fn frozen<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.signal(Signal::STOP)?;
        let done = work();
        self.signal(Signal::CONT)?;
        done
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.pid())?;
        let pid = Pid::from_raw(pid).context("no process id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Asks it to end with SIGTERM, as a service manager does, and waits for that.
    ///
    /// # Errors
    /// If it does not end within ten seconds.
    pub fn stop(&self) -> anyhow::Result<i32> {
        if self.runs() {
            self.signal(Signal::TERM)?;
        }
        crate::wait_until(
            &format!("{} ends", self.name),
            Duration::from_secs(10),
            || !self.runs(),
        )?;
        Ok(code(self.child().wait()?))
    }

    /// All that it has said so far.
    #[must_use]
    pub fn said(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
