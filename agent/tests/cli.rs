//! The binary `weir` as users meet it: what it prints, how it ends, and what it never says.
//!
//! The agent behind it is played by a thread that serves the real local API with answers made up
//! here; the binary, the socket and the kernel's word on who is asking are real.

use agent::local::report::{
    Acl, Coordinator, Counters, Interface, Phase, Problem, Refuse, Seen, Status,
};
use agent::local::{Call, Refused, RefusedCode, Request, Response, Server};
use proto::control::{JoinToken, TOKEN_SECRET_BYTES, TokenSecret};
use proto::key::Fingerprint;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// An unprivileged user on any Linux: `nobody`.
const NOBODY: u32 = 65534;

/// A played agent: answers every request by a function.
struct Agent {
    folder: TempDir,
    socket: PathBuf,
}

impl Agent {
    fn answering(answer: impl Fn(Request) -> Response + Send + 'static) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        // Others must get as far as the socket.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("its mode");
        let socket = folder.path().join("weir.sock");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let guard = runtime.enter();
        let server = Server::bind(&socket).expect("a socket");
        drop(guard);
        let (calls, mut received) = mpsc::channel::<Call>(4);
        std::thread::spawn(move || {
            runtime.spawn(server.serve(calls));
            runtime.block_on(async {
                while let Some(call) = received.recv().await {
                    let _ = call.reply.send(answer(call.request));
                }
            });
        });
        Self { folder, socket }
    }

    /// Runs `weir` against it.
    fn weir(&self, arguments: &[&str], stdin: &str) -> Output {
        let socket = self.socket.to_str().expect("a plain path");
        let all: Vec<&str> = ["--socket", socket]
            .iter()
            .chain(arguments)
            .copied()
            .collect();
        run(Command::new(binary()).args(all), stdin)
    }
}

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_weir"))
}

fn run(command: &mut Command, stdin: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("weir starts");
    let mut pipe = child.stdin.take().expect("a pipe");
    // It may not want to read it.
    let _ = pipe.write_all(stdin.as_bytes());
    drop(pipe);
    child.wait_with_output().expect("weir ends")
}

fn weir(arguments: &[&str]) -> Output {
    run(Command::new(binary()).args(arguments), "")
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn token() -> String {
    let token = JoinToken {
        address: "192.0.2.1:8443".to_owned(),
        fingerprint: Fingerprint([7; 32]),
        secret: TokenSecret::from_bytes([9; TOKEN_SECRET_BYTES]),
    };
    token.expose()
}

fn status(phase: Phase) -> Status {
    let up = phase == Phase::Up;
    Status {
        phase,
        interface: Interface {
            name: "weir0".to_owned(),
            up,
            listen_port: Some(51820),
            mtu: Some(1420),
            addrs: if up {
                vec![[100, 64, 0, 3].into()]
            } else {
                Vec::new()
            },
            outside: Vec::new(),
        },
        node: None,
        coordinator: Coordinator {
            address: Some("192.0.2.1:8443".to_owned()),
            connected: up,
            why: (!up).then(|| "the coordinator fell silent".to_owned()),
            retry_in_seconds: None,
            proxy: None,
        },
        generation: None,
        epoch: None,
        acl: Acl {
            attached: up,
            hook: up.then(|| "tcx".to_owned()),
            why: None,
            shields_up: false,
            refuse: Refuse::Answer,
        },
        guard: Vec::new(),
        peers: 0,
        active: Vec::new(),
        problems: Vec::new(),
    }
}

fn refused(code: RefusedCode) -> Response {
    Response::Refused(Refused {
        code,
        message: "it cannot be".to_owned(),
        next: "Do something else.".to_owned(),
    })
}

#[test]
fn wrong_use_ends_with_2_and_says_how_it_is_meant() {
    for (arguments, says) in [
        (&["fly"][..], "unrecognized subcommand"),
        (&["explain", "a", "b", "--proto", "tcp"], "needs a port"),
        (&["explain", "a", "b:80", "--proto", "gre"], "has no ports"),
        (&["up", "weir1.nonsense"], "not a join token"),
        (&["agent", "--interface", "x/y"], "1 to 15 characters"),
        (&["debug"], "record"),
        (&["debug", "record", "--seconds", "0"], "0 is not in"),
    ] {
        let output = weir(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(err(&output).contains(says), "{}", err(&output));
        assert!(output.stdout.is_empty());
        // A pipe is no terminal: no colour.
        assert!(!err(&output).contains('\u{1b}'));
    }
    assert_eq!(weir(&["--help"]).status.code(), Some(0));
    assert_eq!(weir(&["--version"]).status.code(), Some(0));
}

#[test]
fn without_an_agent_every_verb_fails_with_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().to_str().expect("a plain path");
    for verb in [
        &["status"][..],
        &["peers"],
        &["counters"],
        &["down"],
        &["down", "--purge"],
        &["ping", "a"],
        &["explain", "a", "b"],
        &["up"],
    ] {
        let output = weir(&[verb, &["--state-dir", state]].concat());
        assert_eq!(output.status.code(), Some(1), "{verb:?}");
        let said = err(&output);
        assert!(said.contains(&format!("{state}/weir.sock")), "{said}");
        assert!(said.contains("systemctl start weir"), "{said}");
    }
    let output = weir(&["--json", "status", "--state-dir", state]);
    let document: serde_json::Value = serde_json::from_str(&out(&output)).expect("a document");
    assert_eq!(document["version"], 1);
    assert_eq!(document["error"]["code"], "no_agent");
}

#[test]
fn a_token_comes_by_stdin_by_file_or_by_hand_and_is_never_repeated() {
    let token = token();
    let secret = token.rsplit('.').next().expect("a secret").to_owned();
    let expected = token.clone();
    let agent = Agent::answering(move |request| match request {
        Request::Up(up) => {
            let given = up.token.and_then(|token| token.parse().ok());
            match given.map(|token| token.expose() == expected) {
                Some(true) => Response::Status(Box::new(status(Phase::Up))),
                Some(false) | None => refused(RefusedCode::BadRequest),
            }
        }
        _ => Response::Status(Box::new(status(Phase::Up))),
    });
    let file = agent.folder.path().join("token");
    fs::write(&file, format!("expires in 24 hours:\n{token}\n\n")).expect("a file");
    let file = file.to_str().expect("a plain path");
    let line = format!("{token}\n");
    for (arguments, stdin) in [
        (&["up", "-"][..], line.as_str()),
        (&["up", "--token-file", file], ""),
        (&["up", &token], ""),
    ] {
        let output = agent.weir(arguments, stdin);
        assert_eq!(output.status.code(), Some(0), "{}", err(&output));
        assert!(
            out(&output).contains("weir0 is up: 100.64.0.3"),
            "{}",
            out(&output)
        );
        assert!(!out(&output).contains(&secret) && !err(&output).contains(&secret));
    }
    let spoilt = format!("{token}.x");
    for (arguments, stdin, code) in [
        (&["up", &spoilt][..], "", 2),
        (&["up", "-"], spoilt.as_str(), 2),
        (&["up", "-"], "", 2),
        (&["up", "again", &token], "", 2),
        (&["up", "--token-file", "/none"], "", 1),
    ] {
        let output = agent.weir(arguments, stdin);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        let said = out(&output) + &err(&output);
        assert!(!said.contains(&secret) && !said.is_empty(), "{said}");
    }
}

#[test]
fn up_waits_until_the_agent_is_ready() {
    let asked = std::sync::atomic::AtomicU32::new(0);
    let agent = Agent::answering(move |_| {
        let count = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let phase = if count < 4 {
            Phase::Starting
        } else {
            Phase::Up
        };
        Response::Status(Box::new(status(phase)))
    });
    let output = agent.weir(&["up", "--json"], "");
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let document: serde_json::Value = serde_json::from_str(&out(&output)).expect("a document");
    assert_eq!(document["version"], 1);
    assert_eq!(document["phase"], "up");
    assert_eq!(document["interface"]["addrs"][0], "100.64.0.3");
}

#[test]
fn a_refusal_is_told_with_its_next_step() {
    let agent = Agent::answering(|_| refused(RefusedCode::Coordinator));
    for verb in [
        &["up"][..],
        &["down"],
        &["status"],
        &["peers"],
        &["ping", "a"],
        &["explain", "a", "b"],
        &["counters"],
    ] {
        let output = agent.weir(verb, "");
        assert_eq!(output.status.code(), Some(1), "{verb:?}");
        assert_eq!(err(&output), "weir: it cannot be\nDo something else.\n");
        assert!(output.stdout.is_empty(), "{verb:?}");

        let output = agent.weir(&[verb, &["--json"]].concat(), "");
        assert_eq!(output.status.code(), Some(1), "{verb:?}");
        let document: serde_json::Value = serde_json::from_str(&out(&output)).expect("a document");
        assert_eq!(document["error"]["code"], "coordinator");
        assert_eq!(document["error"]["next"], "Do something else.");
    }
}

#[test]
fn what_other_machines_say_does_not_command_the_terminal() {
    let agent = Agent::answering(|_| {
        let mut status = status(Phase::Up);
        status.problems.push(Problem {
            code: "x".to_owned(),
            message: "evil \u{1b}[2J\u{9b}31m\rname".to_owned(),
            next: String::new(),
        });
        Response::Status(Box::new(status))
    });
    for verb in [&["status"][..], &["up"]] {
        let said = out(&agent.weir(verb, ""));
        assert!(said.contains("evil"), "{said}");
        assert!(
            !said.contains(|c: char| c.is_control() && c != '\n'),
            "{said:?}"
        );
    }
}

#[test]
fn a_trace_is_written_into_a_file_that_was_not_there() {
    let agent = Agent::answering(|request| match request {
        Request::Record { anew: false } => Response::Trace("one\ntwo\n".to_owned()),
        _ => refused(RefusedCode::Unavailable),
    });
    let path = agent.folder.path().join("a.trace");
    let file = path.to_str().expect("a plain path");
    let record = ["debug", "record", "--seconds", "1", file];
    let said = agent.weir(&record, "");
    assert_eq!(said.status.code(), Some(0), "{}", err(&said));
    assert!(out(&said).contains("2 lines") && out(&said).contains(&format!("WEIR_TRACE={file}")));
    assert_eq!(fs::read_to_string(&path).expect("a file"), "one\ntwo\n");
    let mode = fs::metadata(&path).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "addresses are in it");

    let again = agent.weir(&record, "");
    assert_eq!(again.status.code(), Some(1));
    assert!(err(&again).contains("Name another file"), "{}", err(&again));
    let other = agent.folder.path().join("b.trace");
    let anew = ["debug", "record", "--anew", other.to_str().expect("plain")];
    assert_eq!(agent.weir(&anew, "").status.code(), Some(1));
    assert!(!other.exists(), "nothing came, so nothing is there");
}

#[test]
fn another_user_may_read_but_neither_change_nor_watch() {
    let name = "another_user_may_read_but_neither_change_nor_watch";
    if !rustix::process::geteuid().is_root() {
        skip(name, "only root can run a child as another user");
        return;
    }
    let agent = Agent::answering(|request| match request {
        Request::Status | Request::Up(_) => Response::Status(Box::new(status(Phase::Up))),
        Request::Down { .. } | Request::Set(_) => Response::Done(Vec::new()),
        Request::Peers => Response::Peers(Vec::new()),
        Request::Counters => Response::Counters(Counters::default()),
        Request::Monitor(_) => Response::Seen(Seen::Begun),
        Request::Record { .. } => Response::Trace(String::new()),
        Request::Ping { .. } | Request::Path { .. } | Request::Explain(_) | Request::Netcheck => {
            refused(RefusedCode::UnknownPeer)
        }
    });
    // The checkout may be closed to others.
    let copy = agent.folder.path().join("weir");
    fs::copy(binary(), &copy).expect("a copy");
    let socket = agent.socket.to_str().expect("a plain path");
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new(&copy);
        command.args(["--socket", socket]).args(arguments);
        run(command.uid(NOBODY).gid(NOBODY).current_dir("/"), "")
    };
    for verb in [&["up"][..], &["down"], &["down", "--purge"]] {
        assert_eq!(agent.weir(verb, "").status.code(), Some(0), "{verb:?}");
    }
    for verb in [
        &["up"][..],
        &["down"],
        &["down", "--purge"],
        &["monitor"],
        &["debug", "record"],
    ] {
        let output = as_nobody(verb);
        assert_eq!(output.status.code(), Some(1), "{verb:?}");
        assert!(err(&output).contains("only root") && err(&output).contains("sudo"));
    }
    for verb in [&["status"][..], &["peers"], &["counters"]] {
        assert_eq!(as_nobody(verb).status.code(), Some(0), "{verb:?}");
    }
    for verb in [&["ping", "a"][..], &["explain", "a", "b"]] {
        assert!(err(&as_nobody(verb)).contains("it cannot be"), "{verb:?}");
    }
}

/// Tells the test runner what did not run here, and why.
fn skip(name: &str, reason: &str) {
    println!("skipped: {name}: {reason}");
    if let Some(path) = std::env::var_os("WEIR_SKIPS") {
        let list = OpenOptions::new().append(true).create(true).open(path);
        let _ = list.and_then(|mut list| writeln!(list, "{name}\t{reason}"));
    }
}
