//! `weir debug record`: a trace of the agent's decisions, in a file.

use super::arguments::Record as Arguments;
use super::{Agent, Console, Failure, PATIENCE, astray, chain, unanswered};
use crate::local::{AskError, Request, Response, follow};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until, timeout};

/// Largest file, in bytes: hours of a network with a thousand peers.
const MAX_FILE_BYTES: usize = 64 << 20;

/// What was recorded, for programs.
#[derive(Serialize)]
struct Recorded {
    /// The file.
    file: PathBuf,
    /// Its size.
    bytes: usize,
    /// Lines in it.
    lines: usize,
    /// For how long was recorded from now on.
    seconds: u64,
    /// Whether that ended early, because the file may not become larger.
    full: bool,
}

pub(super) fn record(
    agent: &Agent,
    console: &Console,
    arguments: Arguments,
) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| Failure::new("failed", error.to_string(), ""))?;
    let recorded = runtime.block_on(write(agent, arguments))?;
    if console.json {
        return console.document(recorded);
    }
    console.say(&told(&recorded))
}

fn told(recorded: &Recorded) -> String {
    let Recorded {
        file,
        bytes,
        lines,
        seconds,
        full,
    } = recorded;
    let full = if *full {
        format!("It may not become larger than {MAX_FILE_BYTES} bytes, so this ended early.\n")
    } else {
        String::new()
    };
    let name = file.display();
    format!(
        "Recorded what the agent decides, from its start until now ({lines} lines, {bytes} bytes, \
         {seconds} s of them new), in\n  {name}\n{full}\
         No secret key and no token is in it; addresses and names of this machine, its peers and \
         its network are.\n\
         To replay it, in a checkout of weir {}:\n  \
         WEIR_TRACE={name} cargo xtask test --tier sim a_trace_of_a_node\n",
        env!("CARGO_PKG_VERSION"),
    )
}

async fn write(agent: &Agent, arguments: Arguments) -> Result<Recorded, Failure> {
    let stop = |_| Failure::new("failed", "the system gives no signals", "");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(stop)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(stop)?;
    let unanswered = |error: AskError| unanswered(&error, &agent.socket);
    let anew = arguments.anew;
    let mut stream = follow(&agent.socket, Request::Record { anew })
        .await
        .map_err(unanswered)?;
    let first = timeout(PATIENCE, stream.next()).await;
    let first = first.unwrap_or(Err(AskError::Late(PATIENCE)));
    let first = lines(first.map_err(unanswered)?)?;
    // Nobody's file is touched before there is something to put into it.
    let mut trace = Trace::create(arguments.file.unwrap_or_else(name))?;
    trace.add(&first)?;
    let began = Instant::now();
    let until = began + Duration::from_secs(arguments.seconds.into());
    while !trace.full {
        let next = tokio::select! {
            next = stream.next() => next,
            () = sleep_until(until) => break,
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        };
        // What came before the agent ended is a trace by itself.
        let Ok(next) = next else { break };
        trace.add(&lines(next)?)?;
    }
    let flushed = trace.file.flush();
    flushed.map_err(|error| trace.failed(error))?;
    Ok(Recorded {
        file: std::path::absolute(&trace.path).unwrap_or(trace.path),
        bytes: trace.bytes,
        lines: trace.lines,
        seconds: began.elapsed().as_secs(),
        full: trace.full,
    })
}

fn lines(response: Response) -> Result<String, Failure> {
    match response {
        Response::Trace(lines) => Ok(lines),
        Response::Refused(refused) => Err(refused.into()),
        _ => Err(astray()),
    }
}

/// A name that says what it is, and of when.
fn name() -> PathBuf {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    PathBuf::from(format!(
        "weir-{}.trace",
        since.unwrap_or_default().as_secs()
    ))
}

/// The file.
struct Trace {
    path: PathBuf,
    file: BufWriter<File>,
    bytes: usize,
    lines: usize,
    full: bool,
}

impl Trace {
    /// A new file: none is overwritten.
    fn create(path: PathBuf) -> Result<Self, Failure> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|error| failed(&path, &error))?;
        Ok(Self {
            path,
            file: BufWriter::new(file),
            bytes: 0,
            lines: 0,
            full: false,
        })
    }

    /// Writes whole lines, as many as may be.
    fn add(&mut self, text: &str) -> Result<(), Failure> {
        for line in text.split_inclusive('\n') {
            if self.bytes + line.len() > MAX_FILE_BYTES {
                self.full = true;
                return Ok(());
            }
            let written = self.file.write_all(line.as_bytes());
            written.map_err(|error| self.failed(error))?;
            self.bytes += line.len();
            self.lines += 1;
        }
        Ok(())
    }

    fn failed(&self, error: io::Error) -> Failure {
        failed(&self.path, &error)
    }
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    let message = format!("`{}` cannot be written: {}", path.display(), chain(error));
    let next = "Name another file, that is not there yet.";
    Failure::new("failed", message, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_never_overwritten_and_never_grows_too_large() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.trace");
        let mut trace = Trace::create(path.clone()).unwrap();
        trace.add("one\ntwo\n").unwrap();
        trace.file.flush().unwrap();
        assert!(Trace::create(path.clone()).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        trace.bytes = MAX_FILE_BYTES - 2;
        trace.add("three\n").unwrap();
        assert!(trace.full);
        trace.file.flush().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }
}
