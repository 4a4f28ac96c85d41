//! What a hosted control plane made of real policies, against what we make of them.
//!
//! `WEIR_CAPTURES` names a folder of recordings (one JSON file each, in a folder per kind); the
//! README beside them has the format. Without the variable the test says so in the file that
//! `WEIR_SKIPS` names and passes. It prints a table per kind, the first difference of every
//! recording that differs, and fails when a kind falls below its floor. Recordings that cannot
//! apply are listed with their reasons in `captures-not-applicable.txt`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(
    clippy::disallowed_methods,
    reason = "recordings are files that the environment names"
)]

use proto::policy::compile_offline;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The least share of identical recordings, in percent of those that apply.
const FLOORS: [(&str, usize); 7] = [
    ("acl", 98),
    ("grant", 98),
    ("nodeattrs", 95),
    ("policytest", 98),
    ("routes", 98),
    ("ssh", 95),
    ("sshtest", 95),
];

/// Attributes that come from the account, not from the policy.
const ACCOUNT_ATTRS: [&str; 13] = [
    "default-auto-update",
    "probe-udp-lifetime",
    "ssh-behavior-v1",
    "ssh-env-vars",
    "store-appc-routes",
    "tailnet-display-name",
    "https://tailscale.com/cap/is-owner",
    "https://tailscale.com/cap/is-admin",
    "https://tailscale.com/cap/ssh",
    "https://tailscale.com/cap/tailnet-lock",
    "https://tailscale.com/cap/file-sharing",
    "https://tailscale.com/cap/warn-funnel-no-https",
    "warn-funnel-no-https",
];

#[derive(Default)]
struct Row {
    identical: usize,
    different: usize,
    not_applicable: usize,
}

#[test]
fn every_capture_compiles_to_what_was_recorded() {
    let Some(folder) = std::env::var_os("WEIR_CAPTURES").map(PathBuf::from) else {
        say_skipped();
        return;
    };
    let excluded = not_applicable();
    let mut table: BTreeMap<String, Row> = BTreeMap::new();
    for path in captures(&folder) {
        let text = fs::read_to_string(&path).unwrap();
        let capture: Value = serde_json::from_str(&text).unwrap();
        let id = capture["id"].as_str().unwrap();
        let row = table
            .entry(capture["kind"].as_str().unwrap().to_owned())
            .or_default();
        if let Some(reason) = excluded.get(id) {
            println!("{id}: not applicable: {reason}");
            row.not_applicable += 1;
            continue;
        }
        match difference(&capture) {
            None => row.identical += 1,
            Some(what) => {
                println!("{id}: {what}");
                row.different += 1;
            }
        }
    }
    println!(
        "{:<12} {:>9} {:>9} {:>14}",
        "kind", "identical", "different", "not applicable"
    );
    for (kind, row) in &table {
        let Row {
            identical,
            different,
            not_applicable,
        } = row;
        println!("{kind:<12} {identical:>9} {different:>9} {not_applicable:>14}");
    }
    assert!(!table.is_empty(), "no recordings in {}", folder.display());
    for (kind, floor) in FLOORS {
        if let Some(row) = table.get(kind) {
            let applicable = row.identical + row.different;
            assert!(
                row.identical * 100 >= floor * applicable,
                "{kind} is below {floor} %"
            );
        }
    }
}

fn say_skipped() {
    println!("skipped: no WEIR_CAPTURES folder");
    if let Some(list) = std::env::var_os("WEIR_SKIPS") {
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(list)
            .unwrap();
        writeln!(file, "captures\tno WEIR_CAPTURES folder").unwrap();
    }
}

/// Recordings that cannot apply, and why: `ID<TAB>REASON` a line.
fn not_applicable() -> BTreeMap<&'static str, &'static str> {
    let lines = include_str!("captures-not-applicable.txt").lines();
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('\t')).collect()
}

fn captures(folder: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for kind in fs::read_dir(folder).unwrap() {
        let kind = kind.unwrap().path();
        if kind.is_dir() {
            let files = fs::read_dir(kind).unwrap().map(|file| file.unwrap().path());
            out.extend(files.filter(|file| file.extension().is_some_and(|ext| ext == "json")));
        }
    }
    out.sort();
    out
}

/// The first difference between a recording and what we make of its policy.
fn difference(capture: &Value) -> Option<String> {
    let topology = capture["topology"].to_string();
    let settings = capture["settings"].to_string();
    let policy = capture["policy"].as_str().unwrap();
    let compiled = compile_offline(policy, &topology, Some(&settings));
    let accepted = capture["accepted"].as_bool().unwrap();
    match (compiled, accepted) {
        (Ok(_), false) => Some(format!(
            "accepted, but should be refused: {}",
            capture["error"]
        )),
        (Err(_), false) => None,
        (Err(error), true) => Some(format!("refused, but should be accepted: {error}")),
        (Ok(compiled), true) => {
            let expected = capture["expect"].as_object().unwrap();
            expected.iter().find_map(|(name, expected)| {
                let made = &compiled["nodes"][name];
                node_difference(made, expected).map(|what| format!("{name}: {what}"))
            })
        }
    }
}

fn node_difference(made: &Value, expected: &Value) -> Option<String> {
    for (theirs, ours) in [
        ("filter", "filter"),
        ("peers", "peers"),
        ("ssh", "ssh"),
        ("attrs", "attrs"),
        ("peer_allowed_ips", "routes"),
    ] {
        let Some(expected) = expected.get(theirs) else {
            continue;
        };
        let (expected, made) = (without_account(expected), without_account(&made[ours]));
        let (expected, made) = (unordered(&expected), unordered(&made));
        if expected != made {
            return Some(format!("{ours}: expected {expected}, made {made}"));
        }
    }
    None
}

fn without_account(value: &Value) -> Value {
    let Value::Object(object) = value else {
        return value.clone();
    };
    let account: BTreeSet<&str> = ACCOUNT_ATTRS.into_iter().collect();
    let kept = object
        .iter()
        .filter(|(name, _)| !account.contains(name.as_str()));
    Value::Object(
        kept.map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
    )
}

/// Lists mean the same in any order, and nothing is the same as an empty list.
fn unordered(value: &Value) -> Value {
    match value {
        Value::Array(items) => {
            let mut items: Vec<Value> = items.iter().map(unordered).collect();
            items.sort_by_key(Value::to_string);
            Value::Array(items)
        }
        Value::Object(object) => {
            let fields = object
                .iter()
                .map(|(name, value)| (name.clone(), unordered(value)));
            Value::Object(fields.collect::<Map<String, Value>>())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}
