//! `weir up` and `weir down`.

use super::arguments::Up as Arguments;
use super::{Agent, Console, Failure, astray, show};
use crate::local::report::{Phase, Problem, Status};
use crate::local::{Request, Response, TokenText, Up};
use proto::control::JoinToken;
use serde::Serialize;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// How long `up` waits for an agent that is just starting.
const APPEAR: Duration = Duration::from_secs(3);
/// How long `down` may take: it may have to tell the coordinator.
const DOWN: Duration = Duration::from_secs(45);
/// How often to look again while waiting.
const AGAIN: Duration = Duration::from_millis(200);
/// Longest token that is read, in bytes.
const MAX_TOKEN_BYTES: u64 = 4096;

/// Joins or comes up again, and waits until that is done or clearly is not.
pub(super) fn up(agent: &Agent, console: &Console, arguments: Arguments) -> Result<(), Failure> {
    let token = token(&arguments)?;
    let patience = Duration::from_secs(arguments.timeout.into());
    let deadline = Instant::now() + patience;
    wait_for_agent(agent);
    let request = Request::Up(Up {
        token: token.as_ref().map(TokenText::new),
        hostname: arguments.hostname.clone(),
        routes: arguments.advertise_routes.map(|routes| routes.0),
    });
    drop(token);
    let mut answer = agent.ask(request, deadline.saturating_duration_since(Instant::now()));
    loop {
        match answer {
            Ok(Response::Status(status)) if status.is_ready() => break,
            Ok(Response::Status(status)) if Instant::now() >= deadline => {
                return Err(not_up(&status, patience));
            }
            // The agent took the order and is on its way; or it did not answer in all that time.
            Ok(Response::Status(_)) => std::thread::sleep(AGAIN),
            Err(Failure::Failed(complaint)) if complaint.code == "late" => {}
            Ok(_) => return Err(astray()),
            Err(failure) => return Err(failure),
        }
        answer = agent.ask(Request::Status, super::PATIENCE);
    }
    let Response::Status(status) = agent.ask(Request::Status, super::PATIENCE)? else {
        return Err(astray());
    };
    if console.json {
        return console.document(&*status);
    }
    let mut text = show::up_line(&status);
    if let (Some(wanted), Some(node)) = (arguments.hostname, &status.node)
        && wanted != node.name
    {
        let name = &node.name;
        text.push_str(&format!(
            "It is called {name}, not {wanted}: another node may have that name, and a node keeps \
             the one that it joined with.\n"
        ));
    }
    console.say(&text)
}

/// An agent started a moment ago may not listen yet. If it never does, the next question tells.
fn wait_for_agent(agent: &Agent) {
    let deadline = Instant::now() + APPEAR;
    let absent = |failure: &Failure| match failure {
        Failure::Failed(complaint) | Failure::Trouble(complaint) => complaint.code == "no_agent",
        Failure::Use(_) | Failure::Told | Failure::Unheard => false,
    };
    while Instant::now() < deadline {
        match agent.ask(Request::Status, super::PATIENCE) {
            Err(failure) if absent(&failure) => std::thread::sleep(AGAIN),
            Ok(_) | Err(_) => return,
        }
    }
}

/// The token, from wherever the command line says it is.
fn token(arguments: &Arguments) -> Result<Option<JoinToken>, Failure> {
    let text = match (&arguments.token, &arguments.token_file) {
        (None, None) => return Ok(None),
        (Some(dash), _) if dash == "-" => {
            if io::stdin().is_terminal() {
                // Only a terminal sees this; the token follows from it.
                let _ = io::stderr().write_all(b"Paste the join token and press Enter: ");
                let mut line = Zeroizing::new(String::new());
                io::stdin().read_line(&mut line).map(|_| line)
            } else {
                read_token(io::stdin())
            }
            .map_err(|error| unreadable("stdin", &error))?
        }
        (Some(token), _) => Zeroizing::new(token.clone()),
        (None, Some(path)) => File::open(path)
            .and_then(read_token)
            .map_err(|error| unreadable(&path.display().to_string(), &error))?,
    };
    // `weir-coordinator token create > FILE` leaves the token in the last line.
    let text = text.trim().lines().next_back().unwrap_or_default();
    if text.is_empty() {
        return Err(Failure::Use(
            "the token is empty: `weir-coordinator token create` prints one".to_owned(),
        ));
    }
    // The error must not quote the text, which may be most of a token.
    let token = text.parse::<JoinToken>();
    token
        .map(Some)
        .map_err(|error| Failure::Use(error.to_string()))
}

fn read_token(from: impl Read) -> io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(MAX_TOKEN_BYTES as usize));
    from.take(MAX_TOKEN_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

fn unreadable(what: &str, error: &io::Error) -> Failure {
    Failure::new(
        "token",
        format!("no token can be read from {what}: {error}"),
        "Give the token by stdin (`weir up - < FILE`) or by --token-file.",
    )
}

/// What is missing, from how the agent is.
fn not_up(status: &Status, patience: Duration) -> Failure {
    let mut message = match patience.as_secs() {
        1 => "this machine is not up after a second:".to_owned(),
        seconds => format!("this machine is not up after {seconds} seconds:"),
    };
    let mut next = Vec::new();
    let mut missing = |what: String| {
        message.push_str("\n  - ");
        message.push_str(&what);
    };
    let Status {
        phase,
        interface,
        coordinator,
        acl,
        problems,
        ..
    } = status;
    let joined = *phase != Phase::NotJoined;
    if !joined {
        missing("it is no node of any network yet".to_owned());
    }
    if let Some(why) = coordinator.why.as_ref().filter(|_| !coordinator.connected) {
        missing(format!("no connection to the coordinator: {why}"));
        let address = coordinator.address.as_deref().unwrap_or("its address");
        next.push(format!(
            "Check from here that {address} can be reached over TCP and that the coordinator runs."
        ));
    }
    for Problem {
        message: problem,
        next: step,
        ..
    } in problems
    {
        missing(problem.clone());
        next.push(step.clone());
    }
    // What is not done yet is worth a word only where nothing says why.
    let silent = problems.is_empty();
    let told = |why: &String| problems.iter().any(|problem| problem.message.contains(why));
    let untold = acl.why.as_ref().is_some_and(|why| !told(why));
    if joined && !acl.attached && (silent || untold) {
        let why = acl.why.as_deref().unwrap_or("not done yet");
        missing(format!("the ACL programs are not attached: {why}"));
    }
    if joined && silent && (!interface.up || interface.addrs.is_empty()) {
        let name = &interface.name;
        missing(format!(
            "the device {name} has no address yet, or is not up"
        ));
    }
    next.push(
        "It keeps trying. `weir status` shows how it goes, `weir doctor` checks the machine."
            .into(),
    );
    next.retain(|step| !step.is_empty());
    Failure::new("not_up", message, next.join("\n"))
}

/// Takes everything away again.
pub(super) fn down(agent: &Agent, console: &Console, purge: bool) -> Result<(), Failure> {
    let Response::Done(remarks) = agent.ask(Request::Down { purge }, DOWN)? else {
        return Err(astray());
    };
    if console.json {
        #[derive(Serialize)]
        struct Done {
            remarks: Vec<String>,
        }
        return console.document(Done { remarks });
    }
    let mut text = String::from(if purge {
        "This machine has left the network, and weir has forgotten it.\n"
    } else {
        "weir is down. `weir up` brings it back, without a token.\n"
    });
    for remark in remarks {
        text.push_str(&remark);
        text.push('\n');
    }
    console.say(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::report::{Acl, Coordinator, Interface, Refuse};

    fn starting() -> Status {
        Status {
            phase: Phase::Starting,
            interface: Interface {
                name: "weir0".to_owned(),
                up: false,
                listen_port: None,
                mtu: None,
                addrs: Vec::new(),
                outside: Vec::new(),
            },
            node: None,
            coordinator: Coordinator {
                address: Some("192.0.2.1:8443".to_owned()),
                connected: true,
                why: None,
                retry_in_seconds: None,
                proxy: None,
            },
            generation: None,
            epoch: None,
            acl: Acl {
                attached: false,
                hook: None,
                why: Some("there is no bpffs".to_owned()),
                shields_up: false,
                refuse: Refuse::Answer,
            },
            guard: Vec::new(),
            peers: 0,
            active: Vec::new(),
            problems: Vec::new(),
        }
    }

    fn complaint(status: &Status) -> String {
        let Failure::Failed(complaint) = not_up(status, Duration::from_secs(30)) else {
            panic!("not a complaint");
        };
        assert_eq!(complaint.code, "not_up");
        format!("{}\n{}", complaint.message, complaint.next)
    }

    #[test]
    fn what_keeps_it_down_is_named() {
        let text = complaint(&starting());
        assert!(text.contains("not attached: there is no bpffs"), "{text}");
        assert!(text.contains("weir0 has no address"), "{text}");
        assert!(!text.contains("coordinator"), "{text}");
    }

    #[test]
    fn before_joining_only_the_coordinator_is_to_blame() {
        let mut status = starting();
        status.phase = Phase::NotJoined;
        status.coordinator.connected = false;
        status.coordinator.why = Some("nobody answers".to_owned());
        let text = complaint(&status);
        assert!(
            text.contains("no connection to the coordinator: nobody answers"),
            "{text}"
        );
        assert!(
            text.contains("that 192.0.2.1:8443 can be reached"),
            "{text}"
        );
        assert!(!text.contains("bpffs"), "{text}");
    }
}
