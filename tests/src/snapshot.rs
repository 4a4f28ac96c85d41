//! All that an agent could change on a host, as text: to compare before and after.

use std::collections::BTreeMap;
use std::path::Path;

use crate::host::Host;

/// What is asked of a host; the answers must not change by themselves.
const QUESTIONS: &[&str] = &[
    "ip -o link",
    "ip -o addr",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "ip -4 rule",
    "ip -6 rule",
    "nft list ruleset",
    "tc qdisc show",
    "sysctl -a -r ^net",
];

/// What is asked of the kernel as a whole: BPF objects belong to no network namespace.
const KERNEL_QUESTIONS: &[&str] = &["prog", "map", "link"];

/// Settings that move by themselves.
const RESTLESS: &[&str] = &["nf_conntrack_count", "nf_conntrack_buckets"];

/// A host's state, as lines by the question that they answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, Vec<String>>);

impl Snapshot {
    /// Takes one of a host.
    ///
    /// # Errors
    /// If a question cannot be asked.
    pub fn of(host: &Host) -> anyhow::Result<Self> {
        let mut answers = BTreeMap::new();
        for question in QUESTIONS {
            // sysctl complains of settings that cannot be read: they count as they are.
            let output = host.output(question)?;
            let still = |line: &&str| !RESTLESS.iter().any(|name| line.contains(name));
            let lines = output.stdout.lines().filter(still);
            answers.insert((*question).to_owned(), lines.map(without_ages).collect());
        }
        for object in KERNEL_QUESTIONS {
            let listed = host.run(&format!("bpftool --json {object} show"))?.json()?;
            let ids = listed.as_array().map_or(&[][..], Vec::as_slice).iter();
            let ids = ids.map(|object| format!("{} {}", object["id"], object["name"]));
            answers.insert(format!("bpf {object}"), ids.collect());
        }
        answers.insert("bpffs".to_owned(), tree(&host.folder.join("bpf")));
        Ok(Self(answers))
    }

    /// What came (`+`) and what went (`-`) between this and a later one; empty if nothing did.
    #[must_use]
    pub fn changes(&self, later: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        for (question, before) in &self.0 {
            let after = later.0.get(question).map_or(&[][..], Vec::as_slice);
            let gone = before.iter().filter(|line| !after.contains(line));
            changes.extend(gone.map(|line| format!("- {question}: {line}")));
            let new = after.iter().filter(|line| !before.contains(line));
            changes.extend(new.map(|line| format!("+ {question}: {line}")));
        }
        changes
    }
}

/// A line without the parts that only tell time: an address's or a route's remaining life.
fn without_ages(line: &str) -> String {
    let mut words = Vec::new();
    let mut rest = line.split_whitespace();
    while let Some(word) = rest.next() {
        if matches!(word, "expires" | "valid_lft" | "preferred_lft" | "age") {
            rest.next();
        } else {
            words.push(word);
        }
    }
    words.join(" ")
}

/// All paths below a folder.
fn tree(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        paths.push(path.display().to_string());
        if path.is_dir() {
            paths.extend(tree(&path));
        }
    }
    paths.sort();
    paths
}
