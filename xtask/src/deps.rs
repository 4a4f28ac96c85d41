//! `cargo xtask deps`: who may depend on whom, and on what from outside.
//!
//! Directions between our own packages and the purity of some are checked here, from
//! `cargo metadata`; licences, sources, doubles and advisories by cargo-deny with `deny.toml`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};

use anyhow::Context;
use serde_json::Value;

use crate::{build, house};

/// Ours, and those of ours that each may use (development dependencies apart).
const MAY_USE: [(&str, &[&str]); 8] = [
    ("proto", &[]),
    ("ebpf", &[]),
    ("engine", &["proto", "ebpf"]),
    ("agent", &["engine", "proto", "ebpf"]),
    ("coordinator", &["proto"]),
    ("relay", &["proto"]),
    (
        "tests",
        &["agent", "coordinator", "ebpf", "engine", "proto", "relay"],
    ),
    ("xtask", &[]),
];

/// Packages that decide and do not act: nothing below them may do I/O or know the clock.
const PURE: [&str; 3] = ["proto", "engine", "ebpf"];
const IMPURE: [&str; 9] = [
    "tokio",
    "mio",
    "socket2",
    "async-std",
    "smol",
    "hyper",
    "reqwest",
    "netlink-sys",
    "aya",
];

/// The release of cargo-deny that `deps` installs.
const DENY: &str = "0.20.2";

pub fn run_verb() -> anyhow::Result<u8> {
    directions()?;
    println!("directions hold");
    if house::program("cargo-deny").is_none() {
        eprintln!("xtask deps: installing cargo-deny {DENY} with cargo (some minutes, once)");
        let install = ["install", "cargo-deny", "--version", DENY, "--locked"];
        let status = build::cargo()
            .args(install)
            .status()
            .context("cannot run cargo")?;
        anyhow::ensure!(status.success(), "cargo could not install cargo-deny");
    }
    if let Some(reason) = deny()? {
        println!("not checked: {reason}");
    }
    println!("licences, sources and bans hold");
    advisories()
}

/// Known holes in what we use. The database comes from the network; without it nothing is said.
fn advisories() -> anyhow::Result<u8> {
    let deny = |arguments: &[&str]| {
        let mut command = Command::new("cargo-deny");
        command
            .current_dir(house::root())
            .args(arguments)
            .stdin(Stdio::null());
        command
    };
    let fetched = deny(&["fetch", "db"])
        .output()
        .context("cannot run cargo-deny")?;
    if !fetched.status.success() {
        println!("advisories: not checked, their database cannot be reached");
        return Ok(0);
    }
    let checked = deny(&["check", "--disable-fetch", "advisories"]).status()?;
    Ok(if checked.success() { 0 } else { 1 })
}

/// Licences, sources and bans; without cargo-deny, the reason why they were not checked.
pub fn deny() -> anyhow::Result<Option<String>> {
    let Some(deny) = house::program("cargo-deny") else {
        return Ok(Some(
            "no cargo-deny here; `cargo xtask deps` installs it".into(),
        ));
    };
    let out = Command::new(deny)
        .current_dir(house::root())
        .args([
            "--color",
            "never",
            "check",
            "--hide-inclusion-graph",
            "licenses",
            "bans",
            "sources",
        ])
        .output()
        .context("cannot run cargo-deny")?;
    anyhow::ensure!(
        out.status.success(),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(None)
}

/// Fails when a package uses one of ours that it may not, or a pure one reaches I/O.
pub fn directions() -> anyhow::Result<()> {
    let violations = violations(&build::metadata(&[])?);
    anyhow::ensure!(violations.is_empty(), "{}", violations.join("\n"));
    Ok(())
}

fn violations(metadata: &Value) -> Vec<String> {
    let graph = Graph::read(metadata);
    let mut found = Vec::new();
    for (name, uses) in &graph.ours {
        let Some((_, may)) = MAY_USE.iter().find(|(package, _)| package == name) else {
            found.push(format!(
                "{name}: a package that xtask/src/deps.rs does not know"
            ));
            continue;
        };
        for used in uses.iter().filter(|used| graph.ours.contains_key(*used)) {
            if !may.contains(&used.as_str()) {
                found.push(format!("{name} may not depend on {used}"));
            }
        }
    }
    for pure in PURE {
        for (impure, through) in graph.reached(pure) {
            if IMPURE.contains(&impure.as_str()) {
                found.push(format!("{pure} reaches {impure} through {through}"));
            }
        }
    }
    found
}

/// Names of packages and what each uses, without development and build dependencies.
struct Graph {
    ours: BTreeMap<String, BTreeSet<String>>,
    all: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn read(metadata: &Value) -> Graph {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let names: BTreeMap<String, String> = list(&metadata["packages"])
            .iter()
            .map(|package| (text(&package["id"]), text(&package["name"])))
            .collect();
        let name = |id: &Value| names.get(&text(id)).cloned().unwrap_or_default();
        let members: BTreeSet<String> = list(&metadata["workspace_members"])
            .iter()
            .map(&name)
            .collect();
        let mut graph = Graph {
            ours: BTreeMap::new(),
            all: BTreeMap::new(),
        };
        for node in list(&metadata["resolve"]["nodes"]) {
            let uses: BTreeSet<String> = list(&node["deps"])
                .iter()
                .filter(|dep| {
                    list(&dep["dep_kinds"])
                        .iter()
                        .any(|kind| kind["kind"].is_null())
                })
                .map(|dep| name(&dep["pkg"]))
                .collect();
            let own = name(&node["id"]);
            if members.contains(&own) {
                graph.ours.insert(own.clone(), uses.clone());
            }
            graph.all.entry(own).or_default().extend(uses);
        }
        graph
    }

    /// Everything below a package, each with the one it was first reached through.
    fn reached(&self, from: &str) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let mut open = vec![from.to_owned()];
        while let Some(package) = open.pop() {
            for used in self.all.get(&package).into_iter().flatten() {
                if !found.contains_key(used) {
                    found.insert(used.clone(), package.clone());
                    open.push(used.clone());
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn metadata(edges: &[(&str, &[&str])], kind: Value) -> Value {
        let names: BTreeSet<&str> = edges
            .iter()
            .flat_map(|(from, to)| to.iter().copied().chain([*from]))
            .collect();
        let nodes: Vec<Value> = edges
            .iter()
            .map(|(from, to)| {
                let deps: Vec<Value> = to
                    .iter()
                    .map(|to| json!({"pkg": to, "dep_kinds": [{"kind": kind}]}))
                    .collect();
                json!({"id": from, "deps": deps})
            })
            .collect();
        let packages: Vec<Value> = names
            .iter()
            .map(|name| json!({"id": name, "name": name}))
            .collect();
        let known = |name: &&&str| MAY_USE.iter().any(|(package, _)| package == *name);
        let members: Vec<&&str> = names.iter().filter(known).collect();
        json!({"packages": packages, "workspace_members": members, "resolve": {"nodes": nodes}})
    }

    #[test]
    fn a_wrong_direction_is_found() {
        let wrong = metadata(
            &[("proto", &["engine"]), ("engine", &["proto"])],
            Value::Null,
        );
        assert_eq!(violations(&wrong), ["proto may not depend on engine"]);
        let test_only = metadata(&[("proto", &["engine"]), ("engine", &[])], json!("dev"));
        assert!(violations(&test_only).is_empty());
    }

    #[test]
    fn purity_is_checked_through_others() {
        let wrong = metadata(
            &[("engine", &["bytes"]), ("bytes", &["tokio"])],
            Value::Null,
        );
        assert_eq!(violations(&wrong), ["engine reaches tokio through bytes"]);
    }
}
