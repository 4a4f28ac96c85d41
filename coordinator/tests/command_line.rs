//! The command line, by its binary: exit codes, what stands on which stream, and what a person is
//! told.

use crate::client::{At, Machine, names};
use crate::place::{BINARY, Process};
use crate::postgres::skip;
use proto::control::JoinToken;
use proto::key::PermitKey;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn run(dir: &Path, args: &[&str]) -> Output {
    Command::new(BINARY)
        .arg("--state-dir")
        .arg(dir)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn check(dir: &Path, args: &[&str], code: i32) -> (String, String) {
    let output = run(dir, args);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(code), "{args:?}\n{out}\n{err}");
    assert!(
        !out.contains('\x1b') && !err.contains('\x1b'),
        "no colour off a terminal"
    );
    if code != 0 {
        assert!(out.is_empty() && !err.is_empty(), "{args:?}\n{out}");
    }
    (out, err)
}

#[test]
fn wrong_use_explains_itself_with_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    for (args, word) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["network"], "Usage"),
        (&["network", "create"], "<NAME>"),
        (
            &["network", "create", "home", "--v4", "10.0.0.1/8"],
            "10.0.0.0/8",
        ),
        (&["token", "create"], "--user"),
        (
            &["token", "create", "--user", "a@b", "--tag", "tag:x"],
            "cannot be used with",
        ),
        (
            &["token", "create", "--tag", "tag:x", "--expires", "soon"],
            "soon",
        ),
        (&["route", "approve", "a", "10.0.0.0/99"], "/99"),
        (&["serve", "--advertise", "0.0.0.0:1"], "wildcard"),
    ] {
        let (_, err) = check(dir.path(), args, 2);
        assert!(err.contains(word), "{args:?}: {err}");
    }
}

#[test]
fn without_a_running_coordinator_every_verb_says_how_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["network", "list"][..],
        &["policy", "get"],
        &["audit", "list", "--json"],
    ] {
        let (_, err) = check(dir.path(), args, 1);
        assert!(err.contains("weir-coordinator serve --state-dir"), "{err}");
    }
}

#[tokio::test]
async fn a_network_is_made_joined_and_shown() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut process = Process::start(&state, &["--listen", "127.0.0.1:0"]);
    let ok = |args: &[&str]| check(&state, args, 0).0;
    let refused = |args: &[&str]| check(&state, args, 1).1;

    assert!(refused(&["node", "list"]).contains("network create"));
    ok(&["network", "create", "home"]);
    assert!(refused(&["network", "create", "home"]).contains("exists already"));
    assert!(refused(&["node", "list", "--network", "hoem"]).contains("did you mean `home`"));
    ok(&["user", "create", "ana@example.com", "--network", "home"]);
    assert!(refused(&["policy", "set", "/nonexistent"]).contains("/nonexistent"));

    let file = dir.path().join("policy.hujson");
    let text = "{ // everybody\n  \"acls\": [{\"action\": \"accept\", \"src\": [\"*\"], \
                \"dst\": [\"*:*\"]}],\n}\n";
    fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    ok(&["policy", "set", path]);
    assert_eq!(ok(&["policy", "get"]), text, "kept as written");
    let set = ok(&["policy", "set", path, "--json"]);
    let set: Value = serde_json::from_str(&set).unwrap();
    assert_eq!(set["diff"]["same"], true, "it was set before: {set}");
    fs::write(&file, text.replace("*:*", "*:nonsense")).unwrap();
    let err = refused(&["policy", "set", path]);
    assert!(err.contains(&format!("{path}:2:")), "{err}");
    assert_eq!(ok(&["policy", "get"]), text, "nothing was applied");

    // Flags stand before or after the verb; the token alone is the last line.
    let printed = ok(&[
        "--network",
        "home",
        "token",
        "create",
        "--user",
        "ana@example.com",
    ]);
    let token: JoinToken = printed.lines().last().unwrap().parse().unwrap();
    assert_eq!(token.at().0, process.addr);
    Machine::new().join(&token, "laptop").await;
    let tagged = ok(&[
        "token",
        "create",
        "--tag",
        "tag:web",
        "--reusable",
        "--ephemeral",
    ]);
    let tagged: JoinToken = tagged.lines().last().unwrap().parse().unwrap();
    Machine::new().join(&tagged, "web").await;

    for args in [&["--json", "node", "list"][..], &["node", "list", "--json"]] {
        let document: Value = serde_json::from_str(&ok(args)).unwrap();
        assert_eq!(document["version"], 1);
        let nodes = document["nodes"].as_array().unwrap();
        let names: Vec<_> = nodes
            .iter()
            .map(|node| node["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["laptop", "web"]);
        assert_eq!(nodes[0]["owner"], "ana@example.com");
    }
    assert!(ok(&["node", "list"]).contains("laptop"));
    what_a_policy_would_change_is_told(&state, &file, text);
    assert!(refused(&["node", "remove", "latpop"]).contains("did you mean `laptop`"));
    ok(&["node", "remove", "laptop"]);
    let audit: Value = serde_json::from_str(&ok(&["audit", "list", "--json"])).unwrap();
    assert_eq!(
        (&audit["version"], &audit["whole"]),
        (&1.into(), &true.into())
    );
    let entries = audit["entries"].as_array().unwrap();
    let actions: Vec<_> = entries
        .iter()
        .map(|entry| entry["action"].as_str().unwrap())
        .collect();
    assert_eq!(
        actions,
        [
            "network.create",
            "user.create",
            "policy.set",
            "token.create",
            "node.join",
            "token.create",
            "node.join",
            "node.remove"
        ]
    );
    assert!(ok(&["audit", "list"]).contains("the log is whole"));
    process.child.kill().unwrap();
}

/// `policy diff` in a network with a laptop and a web server, in which `text` allows all.
fn what_a_policy_would_change_is_told(state: &Path, file: &Path, text: &str) {
    let path = file.to_str().unwrap();
    let told = |text: &str, flag: &str, code: i32| {
        fs::write(file, text).unwrap();
        let args = ["policy", "diff", path, flag];
        let output = run(state, if flag.is_empty() { &args[..3] } else { &args });
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        text.concat()
    };
    assert_eq!(told(text, "", 0), "nothing changes for anybody\n");
    let narrower = text.replace("\"src\": [\"*\"]", "\"src\": [\"ana@example.com\"]");
    assert_eq!(
        told(&narrower, "", 1),
        "web\n  - may no longer reach laptop on tcp+udp on all ports; icmp+ipv6-icmp\n"
    );
    let document: Value = serde_json::from_str(&told(&narrower, "--json", 1)).unwrap();
    assert_eq!(document["version"], 1);
    assert_eq!(document["changes"][0]["effect"], "closes");
    assert!(told(&text.replace("*:*", "*:nonsense"), "", 2).contains(&format!("{path}:2:")));
    assert_eq!(check(state, &["policy", "get"], 0).0, text, "only asked");
}

#[tokio::test]
async fn what_json_prints_is_documented() {
    let page = include_str!("../docs/command-line.md");
    let dir = tempfile::tempdir().unwrap();
    let _process = Process::start(dir.path(), &["--listen", "127.0.0.1:0"]);
    let document = |args: &[&str]| -> Value {
        let (out, _) = check(dir.path(), &[args, &["--json"]].concat(), 0);
        assert_eq!(out.lines().count(), 1, "{out}");
        serde_json::from_str(&out).unwrap()
    };
    document(&["network", "create", "home"]);
    let made = document(&["token", "create", "--tag", "tag:web"]);
    let token: JoinToken = made["token"].as_str().unwrap().parse().unwrap();
    Machine::new().join(&token, "web").await;
    for (args, list) in [
        (&["network", "list"][..], "networks"),
        (&["node", "list"], "nodes"),
        (&["audit", "list"], "entries"),
        (&["policy", "get"], ""),
    ] {
        let document = document(args);
        let row = page
            .lines()
            .find(|line| line.starts_with(&format!("| `{}`", args.join(" "))))
            .unwrap();
        let mut keys: Vec<&String> = document.as_object().unwrap().keys().collect();
        if !list.is_empty() {
            keys.extend(document[list][0].as_object().unwrap().keys());
        }
        for key in keys.into_iter().filter(|key| *key != "version") {
            assert!(row.contains(&format!("`{key}`")), "{args:?}: {key}");
        }
    }
}

#[tokio::test]
async fn it_stops_promptly_with_streams_open_and_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(dir.path(), &["--listen", "127.0.0.1:0"]);
    check(dir.path(), &["network", "create", "home"], 0);
    let (out, _) = check(
        dir.path(),
        &["token", "create", "--tag", "tag:web", "--reusable"],
        0,
    );
    let token: JoinToken = out.lines().last().unwrap().parse().unwrap();
    let machine = Machine::new();
    machine.join(&token, "web").await;
    let mut stream = machine.connect(token.at()).await.poll(None).await.unwrap();
    let netmap = stream.full().await;

    let second = run(dir.path(), &["serve", "--listen", "127.0.0.1:0"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&second.stderr).contains("runs on"),
        "one state folder each"
    );

    let pid = rustix::process::Pid::from_child(&process.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    while stream.next().await.is_some() {}
    assert_eq!(process.child.wait().unwrap().code(), Some(0));
    assert!(!dir.path().join("admin.sock").exists());

    let listen = token.address.clone();
    let _process = Process::start(dir.path(), &["--listen", &listen]);
    let mut stream = machine.connect(token.at()).await.poll(None).await.unwrap();
    let again = stream.full().await;
    assert_eq!((&again.me, names(&again).len()), (&netmap.me, 0));
}

#[test]
fn a_token_is_not_made_when_nodes_could_not_find_the_coordinator() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path(), &["--listen", "0.0.0.0:0"]);
    check(dir.path(), &["network", "create", "home"], 0);
    let make = ["token", "create", "--tag", "tag:web"];
    let (_, err) = check(dir.path(), &make, 1);
    assert!(err.contains("--advertise HOST:PORT"), "{err}");
    drop(process);
    let advertise = [
        "--listen",
        "0.0.0.0:0",
        "--advertise",
        "weir.example.com:8443",
    ];
    let _process = Process::start(dir.path(), &advertise);
    let (out, _) = check(dir.path(), &make, 0);
    assert!(
        out.lines()
            .last()
            .unwrap()
            .starts_with("weir1.weir.example.com:8443.")
    );
}

#[test]
fn only_root_and_the_coordinators_user_administrate() {
    if !rustix::process::geteuid().is_root() {
        skip(
            "command_line::only_root_and_the_coordinators_user_administrate",
            "needs root to be somebody else",
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _process = Process::start(&dir.path().join("state"), &["--listen", "127.0.0.1:0"]);
    let state = dir.path().join("state");
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    for file in [
        "admin.sock",
        "coordinator.db",
        "coordinator.db-wal",
        "certificate-key.pem",
    ] {
        assert_eq!(mode(&state.join(file)), 0o600, "{file}");
    }

    // Even with the files' modes out of the way, the kernel's word decides.
    let binary = dir.path().join("weir-coordinator");
    fs::copy(BINARY, &binary).unwrap();
    for path in [dir.path(), &state, &state.join("admin.sock")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&binary)
        .arg("--state-dir")
        .arg(&state)
        .args(["network", "create", "mine"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(err.contains("only root"), "{err}");
    assert!(
        check(&state, &["network", "list"], 0)
            .0
            .contains("no networks")
    );
}

#[tokio::test]
async fn nothing_that_admits_or_identifies_is_logged_or_stored() {
    let dir = tempfile::tempdir().unwrap();
    let log = fs::File::create(dir.path().join("log")).unwrap();
    let state = dir.path().join("state");
    let mut child = Command::new(BINARY)
        .args(["serve", "--listen", "127.0.0.1:0", "--state-dir"])
        .arg(&state)
        .env("WEIR_LOG", "trace")
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    check(&state, &["network", "create", "home"], 0);
    let (out, _) = check(&state, &["token", "create", "--tag", "tag:web"], 0);
    let token: JoinToken = out.lines().last().unwrap().parse().unwrap();
    let machine = Machine::new();
    let (mut client, _) = machine.join(&token, "web").await;
    client.logout().await.unwrap();
    child.kill().unwrap();
    child.wait().unwrap();

    let private = *machine.secret.expose();
    let text = data_encoding::HEXLOWER.encode(&private);
    let base64 = data_encoding::BASE64.encode(&private);
    let secret = token.secret.expose();
    let files = fs::read_dir(&state)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut read = 0;
    for path in files.chain([dir.path().join("log")]) {
        // A socket cannot be read, and holds nothing.
        let Ok(bytes) = fs::read(&path) else { continue };
        read += bytes.len();
        for needle in [
            &private[..],
            text.as_bytes(),
            base64.as_bytes(),
            secret.as_bytes(),
        ] {
            let found = bytes.windows(needle.len()).any(|window| window == needle);
            assert!(!found, "{}", path.display());
        }
    }
    assert!(read > 10_000, "the log and the database were looked at");
}

#[test]
fn what_relays_need_is_printed_as_their_configuration_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let _coordinator = Process::start(dir.path(), &["--listen", "127.0.0.1:0"]);
    check(dir.path(), &["relay", "key"], 1);
    check(dir.path(), &["network", "create", "home"], 0);
    let (text, _) = check(dir.path(), &["relay", "key"], 0);
    let printed: toml::Value = toml::from_str(&text).unwrap();
    let section = &printed["network"][0];
    let (json, _) = check(dir.path(), &["relay", "key", "--json"], 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(section["id"].as_integer(), json["network"].as_i64());
    assert_eq!(section["keys"][0].as_str(), json["key"].as_str());
    let key: PermitKey = json["key"].as_str().unwrap().parse().unwrap();
    assert!(!key.is_zero());
}
