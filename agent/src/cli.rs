//! The command line: what may be asked, and what is printed.
//!
//! Every verb but `agent` is a client of the running agent's socket (`doctor` also looks around by
//! itself, and works without an agent; `policy` needs only files). A verb ends in one of three ways, told by the exit code:
//!
//! | code | means |
//! |---|---|
//! | 0 | done |
//! | 1 | refused, or failed; a sentence on stderr says why, a second one what to do |
//! | 2 | wrong use; stderr says how it is meant |
//!
//! `policy diff` ends as diff(1) does: 0 the same, 1 different, 2 trouble of any kind.
//!
//! Without `--json` a verb prints for people, and may change how from version to version. With it,
//! stdout carries one document of [`local::report`] and nothing else; a failure is
//! `{"version":1,"error":{"code":…,"message":…,"next":…}}`. Nothing here asks questions: what a
//! verb needs stands on its command line or comes by stdin.

mod arguments;
mod debug;
mod doctor;
mod monitor;
mod netcheck;
mod path;
mod ping;
mod policy;
mod set;
mod show;
mod target;
mod up;

use arguments::Debug;
pub use arguments::{Arguments, Verb, parse};

use crate::config::{Config, DEFAULT_STATE_DIR, socket_of};
use crate::local::{self, AskError, Refused, RefusedCode, Request, Response, ask};
use serde::Serialize;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// How long the agent may take over an ordinary answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// How a verb failed.
#[derive(Debug)]
pub enum Failure {
    /// It was not used as it is meant to be.
    Use(String),
    /// It was refused, or did not work.
    Failed(Complaint),
    /// The same, of a verb whose exit code 1 is an answer.
    Trouble(Complaint),
    /// It did not work, and stdout has told so already.
    Told,
    /// Nobody reads stdout any more: not worth a word.
    Unheard,
}

/// A failure for people and for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Complaint {
    /// Stable, snake_case.
    pub code: String,
    /// What is wrong.
    pub message: String,
    /// What to do next; empty where there is nothing.
    pub next: String,
    /// Line of a policy file, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// Column in it, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub column: Option<u32>,
}

impl Failure {
    fn new(code: &str, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self::Failed(Complaint {
            code: code.to_owned(),
            message: message.into(),
            next: next.into(),
            line: None,
            column: None,
        })
    }
}

/// A document with its version.
#[derive(Serialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    document: T,
}

/// Where a verb's answer goes.
struct Console {
    json: bool,
}

impl Console {
    /// Prints for people.
    fn say(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(printable(text).as_bytes())
            .and_then(|()| out.flush())
            .map_err(|_| Failure::Unheard)
    }

    /// Prints the one document of a `--json` run.
    fn document<T: Serialize>(&self, document: T) -> Result<(), Failure> {
        let versioned = Versioned {
            version: local::VERSION,
            document,
        };
        let text = serde_json::to_string_pretty(&versioned)
            .map_err(|error| Failure::new("failed", error.to_string(), ""))?;
        self.say(&format!("{text}\n"))
    }

    /// Prints one of many documents of a `--json` run, on one line.
    fn line<T: Serialize>(&self, document: T) -> Result<(), Failure> {
        let versioned = Versioned {
            version: local::VERSION,
            document,
        };
        let text = serde_json::to_string(&versioned)
            .map_err(|error| Failure::new("failed", error.to_string(), ""))?;
        self.say(&format!("{text}\n"))
    }
}

/// What a verb needs to ask the agent.
struct Agent {
    socket: PathBuf,
}

impl Agent {
    /// The agent's answer, if it is no refusal.
    fn ask(&self, request: Request, patience: Duration) -> Result<Response, Failure> {
        match ask(&self.socket, request, patience) {
            Ok(Response::Refused(refused)) => Err(refused.into()),
            Ok(response) => Ok(response),
            Err(error) => Err(unanswered(&error, &self.socket)),
        }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let code = match refused.code {
            RefusedCode::BadRequest => "bad_request",
            RefusedCode::NotPermitted => "not_permitted",
            RefusedCode::NotJoined => "not_joined",
            RefusedCode::Coordinator => "coordinator",
            RefusedCode::UnknownPeer => "unknown_peer",
            RefusedCode::Failed => "failed",
            RefusedCode::Unavailable => "unavailable",
        };
        Self::new(code, refused.message, refused.next)
    }
}

fn unanswered(error: &AskError, socket: &Path) -> Failure {
    let (code, next) = match error {
        AskError::NoAgent { .. } => (
            "no_agent",
            format!(
                "Is the agent running? Start it with `systemctl start weir`, or with \
                 `weir agent --state-dir DIR`. If it runs with another state folder or socket, \
                 name the same here with --state-dir or --socket (this was `{}`).",
                socket.display()
            ),
        ),
        AskError::NotPermitted { .. } => (
            "not_permitted",
            "Run the same command with sudo.".to_owned(),
        ),
        AskError::Late(_) => (
            "late",
            "The agent may be busy: try again, and look at its log with `journalctl -u weir`."
                .to_owned(),
        ),
        AskError::BrokenOff(_) => (
            "broken_off",
            "The agent stopped or crashed: `journalctl -u weir` may tell why.".to_owned(),
        ),
        AskError::Unreadable(_) | AskError::Version(_) => (
            "version",
            "Restart the agent, so that it is as new as this command.".to_owned(),
        ),
    };
    Failure::new(code, chain(error), next)
}

/// An error and all its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The answer is not one to this question: agent and command line are of different kinds.
fn astray() -> Failure {
    Failure::new(
        "version",
        "the agent answered another question than was asked",
        "Restart the agent, so that it is as new as this command.",
    )
}

/// What the daemon is to be started with, if that is what the command line says.
#[must_use]
pub fn daemon_config(arguments: &Arguments) -> Option<Config> {
    let Verb::Agent(agent) = &arguments.verb else {
        return None;
    };
    let state_dir = arguments.shared.state_dir.clone();
    Some(Config::new(
        state_dir.unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIR)),
        arguments.shared.socket.clone(),
        agent.interface.clone(),
        agent.listen_port,
        agent.bpf_dir.clone(),
    ))
}

/// Carries out any verb but `agent`, which is the daemon's, and prints.
#[must_use]
pub fn run(arguments: Arguments) -> ExitCode {
    let console = Console {
        json: arguments.shared.json,
    };
    let state_dir = arguments
        .shared
        .state_dir
        .unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIR));
    let socket = arguments.shared.socket;
    let agent = Agent {
        socket: socket.unwrap_or_else(|| socket_of(&state_dir)),
    };
    let outcome = match arguments.verb {
        Verb::Agent(_) => Ok(()),
        Verb::Up(up) => up::up(&agent, &console, up),
        Verb::Down { purge } => up::down(&agent, &console, purge),
        Verb::Set(set) => set::set(&agent, &console, &set),
        Verb::Status => show::status(&agent, &console),
        Verb::Peers => show::peers(&agent, &console),
        Verb::Ping {
            peer,
            count,
            until_direct,
        } => ping::ping(&agent, &console, &peer, count, until_direct),
        Verb::Path { peer } => path::path(&agent, &console, &peer),
        Verb::Explain(explain) if explain.policy.is_some() => policy::offline(&console, &explain),
        Verb::Explain(explain) => show::explain(&agent, &console, &explain),
        Verb::Counters => show::counters(&agent, &console),
        Verb::Netcheck => netcheck::netcheck(&agent, &console),
        Verb::Monitor(monitor) => monitor::monitor(&agent, &console, monitor),
        Verb::Debug(Debug::Record(record)) => debug::record(&agent, &console, record),
        Verb::Doctor => doctor::doctor(&agent, &console, &state_dir),
        Verb::Policy(verb) => policy::policy(&console, &verb),
    };
    conclude(outcome, console.json)
}

/// Says how it went.
fn conclude(outcome: Result<(), Failure>, json: bool) -> ExitCode {
    match outcome {
        Ok(()) | Err(Failure::Unheard) => ExitCode::SUCCESS,
        Err(Failure::Told) => ExitCode::FAILURE,
        Err(Failure::Use(message)) => {
            complain(&message, "");
            ExitCode::from(2)
        }
        Err(Failure::Failed(complaint)) => {
            report(&complaint, json);
            ExitCode::FAILURE
        }
        Err(Failure::Trouble(complaint)) => {
            report(&complaint, json);
            ExitCode::from(2)
        }
    }
}

fn report(complaint: &Complaint, json: bool) {
    if json {
        #[derive(Serialize)]
        struct Error<'a> {
            error: &'a Complaint,
        }
        // stderr still says it if stdout is gone.
        let _ = Console { json }.document(Error { error: complaint });
    }
    complain(&complaint.message, &complaint.next);
}

fn complain(message: &str, next: &str) {
    let mut text = format!("weir: {message}\n");
    if !next.is_empty() {
        text.push_str(next);
        text.push('\n');
    }
    // There is nobody left to tell if stderr is closed.
    let _ = io::stderr().write_all(printable(&text).as_bytes());
}

/// Names and sentences may come from other machines: nothing in them commands the terminal.
fn printable(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}")
}
