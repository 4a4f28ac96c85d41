//! The program itself: its words, its exit codes, its signals, and what it does not write down.

use crate::client::{join, key, parse};
use proto::derp::Frame;
use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

const MARKER: &[u8] = b"a payload that must not be written down";

fn command(state_dir: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir-relay"));
    let doors = ["--listen", "--stun-listen", "--status-listen"];
    command.arg("serve").arg("--state-dir").arg(state_dir);
    command.args(doors.iter().flat_map(|door| [*door, "127.0.0.1:0"]));
    command.args(flags).env("WEIR_LOG", "trace");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

async fn started(command: &mut Command) -> (Child, SocketAddr, String) {
    let mut child = command.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).await.unwrap();
    let addr = line.split("listens on ").nth(1).unwrap();
    let addr = addr.split(',').next().unwrap().parse().unwrap();
    (child, addr, line)
}

#[tokio::test]
async fn it_stops_when_told_to_and_wrote_down_nothing_of_what_it_carried() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--admit", "open", "--tls", "off"];
    let (mut child, addr, line) = started(&mut command(dir.path(), &flags)).await;
    assert!(line.contains("without TLS, key relaykey:"), "{line}");
    let (mut a, mut b) = (join(addr, 1).await, join(addr, 2).await);
    a.send_packet(key(2), MARKER).await;
    assert_eq!(b.packet().await.1, MARKER);

    let pid = i32::try_from(child.id().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let start = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let told = b.next().await.unwrap();
    assert!(matches!(parse(&told), Frame::Restarting { .. }));
    assert!(start.elapsed() < Duration::from_secs(1));
    let mut log = Vec::new();
    let mut stderr = child.stderr.take().unwrap();
    stderr.read_to_end(&mut log).await.unwrap();
    assert_eq!(child.wait().await.unwrap().code(), Some(0));

    let text = String::from_utf8_lossy(&log);
    assert!(text.contains("ANYBODY may use this relay"), "{text}");
    let written = |bytes: &[u8]| bytes.windows(MARKER.len()).any(|part| part == MARKER);
    assert!(!written(&log));
    for entry in fs::read_dir(dir.path()).unwrap() {
        assert!(!written(&fs::read(entry.unwrap().path()).unwrap()));
    }
}

#[tokio::test]
async fn its_key_stays_and_two_cannot_share_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--admit", "open", "--tls", "own"];
    let named = |line: &str| {
        line.split("certificate ")
            .nth(1)
            .map(|rest| rest.split(';').next().unwrap().to_owned())
    };
    let (mut child, _, line) = started(&mut command(dir.path(), &flags)).await;
    let second = command(dir.path(), &flags).output().await.unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("give this one another --state-dir"), "{said}");
    child.kill().await.unwrap();
    let (_child, _, again) = started(&mut command(dir.path(), &flags)).await;
    assert!(named(&line).is_some());
    assert_eq!(named(&line), named(&again));
}

#[tokio::test]
async fn with_an_authority_that_cannot_be_reached_it_starts_and_says_for_what_it_asks() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("relay.toml");
    let text = "admit = 'open'\n[acme]\ndomains = ['a.example.com', 'b.example.com']\n\
                directory = 'https://127.0.0.1:1/dir'\nterms-of-service-agreed = true\n";
    fs::write(&config, text).unwrap();
    let flags = ["--config", config.to_str().unwrap()];
    let (mut child, _, line) = started(&mut command(dir.path(), &flags)).await;
    assert!(
        line.contains("by ACME for a.example.com, b.example.com"),
        "{line}"
    );
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("no new certificate") {
        line.clear();
        assert_ne!(
            log.read_line(&mut line).await.unwrap(),
            0,
            "it says nothing of it"
        );
    }
    assert!(line.contains("127.0.0.1 cannot be reached"), "{line}");
    child.kill().await.unwrap();
}

#[tokio::test]
async fn an_address_that_cannot_be_had_comes_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (addr, advice) in [
        (taken.as_str(), "another program has this port"),
        ("192.0.2.1:0", "this machine has no such address"),
    ] {
        let flags = ["--admit", "open", "--status-listen", addr];
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir-relay"));
        command.arg("serve").arg("--state-dir").arg(dir.path());
        let doors = ["--listen", "--stun-listen"];
        command.args(doors.iter().flat_map(|door| [*door, "127.0.0.1:0"]));
        let output = command.args(flags).output().await.unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(addr) && said.contains(advice), "{said}");
    }
}

#[test]
fn wrong_use_is_said_and_exits_with_2() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("relay.toml");
    fs::write(&config, "admit = 'everybody'\n").unwrap();
    let config = config.to_str().unwrap().to_owned();
    let terms = dir.path().join("terms.toml");
    fs::write(
        &terms,
        "admit = 'open'\n[acme]\ndomains = ['a.example.com']\n",
    )
    .unwrap();
    let terms = terms.to_str().unwrap().to_owned();
    for (flags, why) in [
        (vec![], "no network to serve"),
        (
            vec!["--admit", "everybody"],
            "possible values: permit, open",
        ),
        (vec!["--tls", "given", "--admit", "open"], "[certificate]"),
        (vec!["--tls", "acme", "--admit", "open"], "[acme]"),
        (vec!["--config", &terms], "read them"),
        (vec!["--config", &config], "everybody"),
        (vec!["--config", "/no/such/file"], "cannot read"),
        (vec!["--listen", "443"], "an address and a port are needed"),
        (vec!["--stun-listen", "relay:x"], "as in 192.0.2.1:443"),
        (vec!["--frobnicate"], "unexpected argument"),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_weir-relay"));
        command.arg("serve").arg("--state-dir").arg(dir.path());
        let mut child = command.args(&flags).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(2), "{said}");
        assert!(said.contains(why), "{said}");
    }
}
