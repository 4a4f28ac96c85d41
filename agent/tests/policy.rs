//! `weir policy …` as users meet it: files in, sentences or JSON out, and exit codes.

use serde_json::Value;
use std::fs;
use std::process::{Command, Output};
use tempfile::TempDir;

const POLICY: &str = r#"{
  // Ana may reach the web servers.
  "acls": [
    {"action": "accept", "src": ["ana@example.com"], "dst": ["tag:web:443"]},
  ],
  "tagOwners": {"tag:web": ["ana@example.com"]},
  "tests": [{"src": "ana@example.com", "accept": ["tag:web:443"], "deny": ["tag:web:22"]}],
}"#;

const NETWORK: &str = r#"{
  "users": [{"id": 1, "name": "ana", "email": "ana@example.com"}],
  "nodes": {
    "laptop": {"user": "ana", "ipv4": "100.64.0.1", "ipv6": "fd7a:115c:a1e0::1"},
    "web": {"tags": ["tag:web"], "ipv4": "100.64.0.2", "ipv6": "fd7a:115c:a1e0::2"}
  }
}"#;

/// A folder with a policy and a network, and `weir` run in it.
struct Files(TempDir);

impl Files {
    fn with(policy: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("policy.hujson"), policy).expect("a file");
        fs::write(folder.path().join("network.json"), NETWORK).expect("a file");
        Self(folder)
    }

    fn weir(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(line.split(' '))
            .current_dir(self.0.path())
            .output()
            .expect("weir runs")
    }
}

const BOTH: &str = "--policy policy.hujson --network network.json";

#[track_caller]
fn check(files: &Files, line: &str, code: i32, says: &str) -> String {
    let output = files.weir(line);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let all = format!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{line}: {all}");
    assert!(all.contains(says), "{line}: {all}");
    said
}

#[track_caller]
fn document(text: &str) -> Value {
    serde_json::from_str(text).expect("a document")
}

#[test]
fn a_good_policy_passes() {
    let files = Files::with(POLICY);
    check(&files, "policy check policy.hujson", 0, "nothing is wrong");
    check(
        &files,
        "policy check policy.hujson --network network.json",
        0,
        "nothing is wrong",
    );
    check(
        &files,
        &format!("policy test {BOTH}"),
        0,
        "1 of 1 tests hold",
    );
}

#[test]
fn compiling_prints_every_node() {
    let files = Files::with(POLICY);
    let said = check(&files, &format!("policy compile {BOTH} --json"), 0, "");
    let nodes = &document(&said)["nodes"];
    assert_eq!(nodes["laptop"]["peers"], serde_json::json!(["web"]));
    assert_eq!(
        nodes["web"]["filter"][0]["DstPorts"][0]["Ports"]["First"],
        443
    );
}

#[test]
fn a_bad_policy_is_refused_at_its_place() {
    let files = Files::with(&POLICY.replace("tag:web:443", "tag:wbe:443"));
    for line in [
        "policy check policy.hujson --network network.json".to_owned(),
        format!("policy compile {BOTH}"),
    ] {
        let output = check(&files, &line, 1, "tag:wbe");
        assert!(output.is_empty(), "{output}");
        let error = &document(&check(&files, &format!("{line} --json"), 1, "tag:wbe"))["error"];
        assert_eq!(error["line"], 4, "{error}");
        assert!(error["column"].as_u64() > Some(1), "{error}");
        assert!(error["code"].is_string() && error["message"].is_string());
    }
}

#[test]
fn a_policy_that_says_nothing_is_refused() {
    let files = Files::with("{}");
    check(
        &files,
        "policy check policy.hujson",
        1,
        "says nothing about access",
    );
}

#[test]
fn a_failing_test_names_itself() {
    let files =
        Files::with(&POLICY.replace(r#""deny": ["tag:web:22"]"#, r#""deny": ["tag:web:443"]"#));
    let said = check(&files, &format!("policy test {BOTH} --json"), 1, "");
    assert_eq!(document(&said)["error"]["code"], "test_failed");
    assert_eq!(document(&said)["error"]["line"], 7);
}

#[test]
fn a_connection_is_explained_from_files() {
    let files = Files::with(POLICY);
    for verb in ["explain", "policy explain"] {
        check(
            &files,
            &format!("{verb} laptop web:443 {BOTH}"),
            0,
            "allowed by acls[0] at line 4",
        );
        check(
            &files,
            &format!("{verb} web laptop:443 {BOTH}"),
            0,
            "denied",
        );
        check(
            &files,
            &format!("{verb} laptop 100.64.0.2:22 {BOTH}"),
            0,
            "denied",
        );
        check(
            &files,
            &format!("{verb} laptop nobody:22 {BOTH}"),
            1,
            "no node of that network",
        );
        check(
            &files,
            &format!("{verb} 100.64.0.1 fd00::1 {BOTH}"),
            2,
            "same family",
        );
    }
    let said = check(
        &files,
        &format!("explain laptop [fd7a:115c:a1e0::2]:443 {BOTH} --json"),
        0,
        "",
    );
    let document = document(&said);
    assert_eq!(document["version"], 1);
    assert_eq!(document["src"], "fd7a:115c:a1e0::1");
    assert_eq!(document["allowed"], true);
    assert_eq!(document["rule"]["line"], 4);
}

#[test]
fn files_that_are_not_there_are_named() {
    let files = Files::with(POLICY);
    check(
        &files,
        "policy check none.hujson",
        1,
        "`none.hujson` cannot be read",
    );
    check(
        &files,
        "policy explain a b",
        2,
        "--policy FILE and --network FILE",
    );
    check(
        &files,
        "policy check network.json --network policy.hujson",
        1,
        "",
    );
}

#[test]
fn a_change_of_reach_is_told_and_ends_as_diff_does() {
    let files = Files::with(POLICY);
    let write = |name: &str, text: &str| {
        fs::write(files.0.path().join(name), text).expect("a file");
    };
    write(
        "wider.hujson",
        &POLICY.replace("tag:web:443", "tag:web:443,8443"),
    );
    write(
        "same.hujson",
        &POLICY.replace("web:443\"]},", "web:443\"], \"proto\": \"\"},"),
    );
    write("bad.hujson", &POLICY.replace("tag:web:443", "tag:wbe:443"));
    write("silent.hujson", "{}");
    write("settings.json", "{}");
    let diff = |new: &str, code, says: &str| {
        let line = format!("policy diff policy.hujson {new} --network network.json");
        check(&files, &line, code, says)
    };
    assert_eq!(
        diff("wider.hujson", 1, ""),
        "laptop\n  + may reach web on tcp+udp 8443\n"
    );
    diff("same.hujson", 0, "nothing changes for anybody");
    diff("wider.hujson --settings settings.json", 1, "8443");
    diff("wider.hujson --settings policy.hujson", 2, "no JSON");
    diff("bad.hujson", 2, "bad.hujson:4:");
    diff("silent.hujson", 2, "says nothing about access");
    diff("none.hujson", 2, "`none.hujson` cannot be read");
    check(
        &files,
        "policy diff policy.hujson wider.hujson",
        2,
        "--network",
    );

    let told = document(&diff("wider.hujson --json", 1, ""));
    assert_eq!(told["version"], 1);
    assert_eq!(told["same"], false);
    assert_eq!(told["changes"][0]["effect"], "opens");
    assert_eq!(told["changes"][0]["srcs"], serde_json::json!(["laptop"]));
    let error = document(&diff("bad.hujson --json", 2, ""));
    assert_eq!(error["error"]["line"], 4, "{error}");
}

#[test]
fn a_policy_is_formatted_in_place_with_its_comments() {
    let untidy = POLICY
        .replace("  \"acls\": [", "\"acls\":[\t")
        .replace("\n  // Ana", "\n\n\t// Ana\tB");
    let files = Files::with(&untidy);
    let file = files.0.path().join("policy.hujson");
    let printed = check(&files, "policy fmt policy.hujson", 0, "");
    assert_eq!(printed.trim_end(), POLICY.replace("// Ana", "// Ana\tB"));
    check(
        &files,
        "policy fmt --check policy.hujson",
        1,
        "line 2 is the first",
    );
    assert_eq!(
        fs::read_to_string(&file).expect("a file"),
        untidy,
        "only asked"
    );
    check(
        &files,
        "policy fmt --write policy.hujson",
        0,
        "policy.hujson: formatted.",
    );
    assert_eq!(fs::read_to_string(&file).expect("a file"), printed);
    check(&files, "policy fmt --write policy.hujson", 0, "already");
    check(
        &files,
        "policy fmt --check policy.hujson",
        0,
        "well formatted",
    );
    let left = fs::read_dir(files.0.path()).expect("a folder").count();
    assert_eq!(left, 2, "nothing else is left behind");

    check(
        &files,
        "policy fmt --check --write policy.hujson",
        2,
        "cannot be used with",
    );
    fs::write(&file, "{\"acls\": [}").expect("a file");
    check(
        &files,
        "policy fmt --write policy.hujson",
        1,
        "policy.hujson:1:",
    );
    assert_eq!(fs::read_to_string(&file).expect("a file"), "{\"acls\": [}");
}
