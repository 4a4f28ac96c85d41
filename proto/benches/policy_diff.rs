//! How long it takes to tell what a change of policy opens and closes, in a network of 10,000
//! nodes: what `policy set` makes an administrator wait. `cargo bench -p proto`.
//!
//! Half of the nodes are users', half have tags; a thousand rules lead from groups, tags and single
//! users to tags and hosts, and everybody reaches his own nodes. Each change is told from texts to
//! sentences; no wire and no kernel has a part in it.

#![allow(clippy::unwrap_used, reason = "a bench may panic")]

use proto::policy::{Compiled, Directory, diff, parse, read_topology};
use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};

const NODES: usize = 10_000;
const RULES: usize = 1_000;
/// Users own five nodes each.
const USERS: usize = NODES / 10;
const TAGS: usize = 200;
const GROUPS: usize = 100;
/// The cases alternate.
const ROUNDS: usize = 7;
/// What the slowest of them may take.
const BOUND: Duration = Duration::from_secs(2);

fn main() {
    let directory = network();
    let rules: Vec<String> = (0..RULES).map(rule).collect();
    let old = policy(&rules);
    let all = r#"{"action": "accept", "src": ["*"], "dst": ["*:*"]}"#.to_owned();
    let tenth = |(number, rule): (usize, &String)| match number % 10 {
        0 => rule.replace(":443", ":8443"),
        _ => rule.clone(),
    };
    let tenth: Vec<String> = rules.iter().enumerate().map(tenth).collect();
    let more: Vec<String> = rules.iter().cloned().chain([all]).collect();
    let cases = [
        ("one rule less", policy(&rules[1..])),
        ("a tenth of the rules on another port", policy(&tenth)),
        ("every node to every node, in addition", policy(&more)),
        ("no rule left", policy(&[])),
    ];
    let mut times = vec![Vec::new(); cases.len()];
    let mut changes = vec![0; cases.len()];
    for _ in 0..ROUNDS {
        for (case, (_, new)) in cases.iter().enumerate() {
            let start = Instant::now();
            changes[case] = tell(&old, new, &directory);
            times[case].push(start.elapsed());
        }
    }
    println!("{NODES} nodes, {RULES} rules; milliseconds from texts to sentences");
    println!(
        "{:<40} {:>8} {:>7} {:>7}",
        "change", "changes", "least", "median"
    );
    for (case, (name, _)) in cases.iter().enumerate() {
        times[case].sort();
        let (least, median) = (times[case][0], times[case][ROUNDS / 2]);
        println!(
            "{name:<40} {:>8} {:>7} {:>7}",
            changes[case],
            least.as_millis(),
            median.as_millis()
        );
        assert!(least < BOUND, "{name} takes longer than {BOUND:?}");
    }
}

/// From texts to sentences; returns how many changes there are.
fn tell(old: &str, new: &str, directory: &Directory) -> usize {
    let compiled = |text: &str| {
        let policy = parse(text).unwrap_or_else(|faults| panic!("{faults}"));
        Compiled::new(&policy, directory).unwrap()
    };
    let diff = diff(&compiled(old), &compiled(new), directory).unwrap();
    assert!(!diff.to_string().is_empty());
    diff.changes.len()
}

fn network() -> Directory {
    let user = |number: usize| json!({"id": number, "name": format!("u{number}"), "email": format!("u{number}@example.com")});
    let mut all = Map::new();
    for number in 0..NODES {
        let addrs = (
            format!(
                "100.{}.{}.{}",
                64 + (number >> 16),
                number >> 8 & 255,
                number & 255
            ),
            format!("fd7a:115c:a1e0::{:x}:{:x}", number >> 16, number & 0xffff),
        );
        let mut node = json!({"ipv4": addrs.0, "ipv6": addrs.1});
        if number % 2 == 0 {
            node["user"] = format!("u{}", number / 2 % USERS).into();
        } else {
            let tags = [number / 2 % TAGS, number / 3 % TAGS];
            node["tags"] = tags.map(|tag| format!("tag:t{tag}")).to_vec().into();
        }
        all.insert(format!("n{number}"), node);
    }
    let users: Vec<Value> = (0..USERS).map(user).collect();
    read_topology(&json!({"users": users, "nodes": all}).to_string()).unwrap()
}

/// A rule from one of the usual sources to one of the usual destinations.
fn rule(number: usize) -> String {
    let src = match number % 4 {
        0 | 1 => format!("group:g{}", number / 4 % GROUPS),
        2 => format!("tag:t{}", number / 3 % TAGS),
        _ => format!("u{}@example.com", number * 7 % USERS),
    };
    let dst = match number % 5 {
        0..=3 => format!("tag:t{}", number * 13 % TAGS),
        _ => format!(
            "100.64.{}.{}",
            ((number * 31) >> 8) & 31,
            (number * 31) & 255
        ),
    };
    format!(
        r#"{{"action": "accept", "proto": "tcp", "src": ["{src}"], "dst": ["{dst}:443,{}"]}}"#,
        1_000 + number
    )
}

fn policy(rules: &[String]) -> String {
    let tags: Vec<String> = (0..TAGS).map(|tag| format!("\"tag:t{tag}\": []")).collect();
    let member =
        |group: usize, at: usize| format!("\"u{}@example.com\"", (group * 37 + at * 11) % USERS);
    let group = |group: usize| {
        let members: Vec<String> = (0..USERS / 20).map(|at| member(group, at)).collect();
        format!("\"group:g{group}\": [{}]", members.join(", "))
    };
    let groups: Vec<String> = (0..GROUPS).map(group).collect();
    let own = r#"{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]}"#;
    let rules: Vec<&str> = rules.iter().map(String::as_str).chain([own]).collect();
    format!(
        "{{\"tagOwners\": {{{}}}, \"groups\": {{{}}}, \"acls\": [\n{}\n]}}",
        tags.join(", "),
        groups.join(", "),
        rules.join(",\n")
    )
}
