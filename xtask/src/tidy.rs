//! `cargo xtask tidy`: the house rules that a program can check.
//!
//! Rules that fail are listed with file and line. File and function lengths are reported only:
//! a long one must argue for itself, and the argument is the reader's to judge. `--fix` renews
//! the hashes that tie `proto/docs/` to the source, for after a person has compared the two.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::{build, house};

mod source;

use source::{Source, has_word};

/// A file beyond this must argue for itself.
const FILE_LINES: usize = 800;
/// A function too.
const FUNCTION_LINES: usize = 70;

/// The only places where `unsafe` may stand.
const UNSAFE: [&str; 4] = [
    "agent/src/kernel/bpf.rs",
    "agent/src/port.rs",
    "ebpf/src/packet.rs",
    "ebpf/src/bin/",
];

/// The agent's modules meet only in these (a star).
const AGENT_CENTRE: [&str; 4] = ["daemon", "cli", "main", "lib"];

/// Test code that may sleep: a bounded poll's pause, and the pace of made traffic.
const SLEEPERS: [&str; 3] = [
    "tests/src/bin/bench/relay/load.rs",
    "tests/src/lib.rs",
    "tests/src/stream.rs",
];

/// Secrets that must travel: a join token's is sent once, in the message that joins.
const SENT_SECRETS: [&str; 1] = ["TokenSecret"];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 5] = ["utils", "util", "common", "helpers", "misc"];

#[derive(clap::Args)]
pub struct Args {
    /// Renew the hashes in proto/docs, after you compared text and source
    #[arg(long)]
    fix: bool,
}

pub fn run_verb(args: &Args) -> anyhow::Result<u8> {
    if args.fix {
        renew_hashes()?;
    }
    let tree = Tree::read()?;
    tree.report_lengths();
    let violations = tree.violations()?;
    for violation in &violations {
        println!("{violation}");
    }
    println!(
        "{} files, {} violations",
        tree.sources.len(),
        violations.len()
    );
    Ok(if violations.is_empty() { 0 } else { 1 })
}

/// The rules alone, for `cargo xtask test`.
pub fn check() -> anyhow::Result<()> {
    let violations = Tree::read()?.violations()?;
    anyhow::ensure!(violations.is_empty(), "{}", violations.join("\n"));
    Ok(())
}

/// All files of the checkout that git knows or would know, by path from its root.
struct Tree {
    sources: BTreeMap<String, Source>,
    pages: BTreeMap<String, String>,
    names: BTreeSet<String>,
}

impl Tree {
    fn read() -> anyhow::Result<Tree> {
        let out = std::process::Command::new("git")
            .current_dir(house::root())
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .output()
            .context("cannot run git")?;
        anyhow::ensure!(out.status.success(), "git cannot list the checkout's files");
        let mut tree = Tree {
            sources: BTreeMap::new(),
            pages: BTreeMap::new(),
            names: BTreeSet::new(),
        };
        for name in String::from_utf8_lossy(&out.stdout).lines() {
            let path = house::root().join(name);
            if !path.is_file() {
                continue;
            }
            tree.names.insert(name.to_owned());
            if name.ends_with(".rs") {
                let text = std::fs::read_to_string(&path).with_context(|| name.to_owned())?;
                tree.sources.insert(name.to_owned(), Source::new(text));
            } else if name.ends_with(".md") {
                tree.pages
                    .insert(name.to_owned(), std::fs::read_to_string(&path)?);
            }
        }
        Ok(tree)
    }

    fn violations(&self) -> anyhow::Result<Vec<String>> {
        let mut found = Vec::new();
        for (name, source) in &self.sources {
            file_name(name, &mut found);
            star(name, source, &mut found);
            kernel_only(name, source, &mut found);
            unsafe_only_where_listed(name, source, &mut found);
            secrets(name, source, &mut found);
            waiting(name, source, &mut found);
            unfinished(name, source, &mut found);
        }
        self.dead_files(&mut found)?;
        self.home_paths(&mut found);
        self.pages_linked(&mut found);
        found.extend(page_hashes(&self.pages)?);
        Ok(found)
    }

    /// Long files and functions, the longest first.
    fn report_lengths(&self) {
        let mut files: Vec<_> = self
            .sources
            .iter()
            .map(|(name, source)| (source.length(), name))
            .collect();
        files.retain(|(length, name)| *length > FILE_LINES && !is_test(name));
        files.sort_by(|a, b| b.cmp(a));
        for (length, name) in files {
            println!("long file: {name}: {length} lines without tests");
        }
        let mut functions = Vec::new();
        for (name, source) in &self.sources {
            for function in source.functions() {
                if function.lines > FUNCTION_LINES {
                    functions.push((function.lines, name, function.line, function.name));
                }
            }
        }
        functions.sort_by(|a, b| b.cmp(a));
        for (lines, file, line, name) in functions {
            println!("long function: {file}:{line}: {name}: {lines} lines");
        }
    }

    /// A source file that no target reaches by `mod`.
    fn dead_files(&self, found: &mut Vec<String>) -> anyhow::Result<()> {
        let mut reached = BTreeSet::new();
        let mut open = targets()?;
        while let Some(file) = open.pop() {
            let Some(source) = self.sources.get(&file) else {
                continue;
            };
            if !reached.insert(file.clone()) {
                continue;
            }
            let path = Path::new(&file);
            let root = path.parent().unwrap_or(Path::new(""));
            let stem = path.file_stem().unwrap_or_default();
            for module in source.modules() {
                let beside = root.join(format!("{module}.rs"));
                let below = root.join(stem).join(format!("{module}.rs"));
                open.extend([beside, below].map(|path| path.to_string_lossy().into_owned()));
            }
        }
        for name in self.sources.keys().filter(|name| !reached.contains(*name)) {
            found.push(format!(
                "{name}: no target reaches this file: declare it or delete it"
            ));
        }
        Ok(())
    }

    fn home_paths(&self, found: &mut Vec<String>) {
        let texts = self
            .sources
            .iter()
            .map(|(name, source)| (name, source.text.as_str()));
        let pages = self.pages.iter().map(|(name, text)| (name, text.as_str()));
        // Written in two parts, so that this file obeys its own rule.
        let homes = [
            concat!("/ho", "me/"),
            concat!("/ro", "ot/"),
            concat!("/Us", "ers/"),
        ];
        for (name, text) in texts.chain(pages) {
            for (index, line) in text.lines().enumerate() {
                if homes.iter().any(|home| line.contains(home)) {
                    found.push(format!("{name}:{}: names somebody's home", index + 1));
                }
            }
        }
    }

    /// Every page can be found from another one, and every relative link leads somewhere.
    fn pages_linked(&self, found: &mut Vec<String>) {
        let mut linked = BTreeSet::new();
        for (name, text) in &self.pages {
            let folder = Path::new(name).parent().unwrap_or(Path::new(""));
            for target in links(text) {
                let path = normal(&folder.join(target));
                if !house::root().join(&path).exists() {
                    found.push(format!("{name}: the link to {target} leads nowhere"));
                }
                linked.insert(path.to_string_lossy().into_owned());
            }
        }
        for name in self.pages.keys() {
            if name != "README.md" && !linked.contains(name) && !name.starts_with(".") {
                found.push(format!("{name}: no page links to it"));
            }
        }
    }
}

/// The root files of all targets, from the checkout's root.
fn targets() -> anyhow::Result<Vec<String>> {
    let metadata = build::metadata(&["--no-deps"])?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let targets = packages.flat_map(|package| package["targets"].as_array().into_iter().flatten());
    Ok(targets
        .filter_map(|target| {
            let path = Path::new(target["src_path"].as_str()?);
            Some(
                path.strip_prefix(house::root())
                    .ok()?
                    .to_string_lossy()
                    .into_owned(),
            )
        })
        .collect())
}

fn is_test(name: &str) -> bool {
    name.contains("/tests/") || name.starts_with("tests/") || name.ends_with("/tests.rs")
}

fn file_name(name: &str, found: &mut Vec<String>) {
    let path = Path::new(name);
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    if stem == "mod" {
        found.push(format!(
            "{name}: a module's file is NAME.rs beside the folder NAME"
        ));
    }
    if EMPTY_NAMES.contains(&stem.as_ref()) {
        found.push(format!(
            "{name}: the name says nothing about what is inside"
        ));
    }
}

/// `agent/src`: a module does not know another; they meet in the daemon.
fn star(name: &str, source: &Source, found: &mut Vec<String>) {
    let Some(inside) = name.strip_prefix("agent/src/") else {
        return;
    };
    let own = inside.split(['/', '.']).next().unwrap_or_default();
    if AGENT_CENTRE.contains(&own) {
        return;
    }
    for (number, line) in source.without_tests().lines().enumerate() {
        for (at, _) in line.match_indices("crate::") {
            let other: String = line[at + "crate::".len()..]
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            if !other.is_empty() && other != own && !is_test(name) {
                found.push(format!(
                    "{name}:{}: module `{own}` knows `{other}`; the daemon should join them",
                    number + 1
                ));
            }
        }
    }
}

fn kernel_only(name: &str, source: &Source, found: &mut Vec<String>) {
    let Some(inside) = name.strip_prefix("agent/src/") else {
        return;
    };
    if inside == "kernel.rs" || inside.starts_with("kernel/") {
        return;
    }
    for (number, line) in source.lines() {
        for library in ["rtnetlink", "aya"] {
            if line.contains(&format!("{library}::")) && has_word(line, library) {
                found.push(format!("{name}:{number}: only kernel/ knows {library}"));
            }
        }
    }
}

fn unsafe_only_where_listed(name: &str, source: &Source, found: &mut Vec<String>) {
    if UNSAFE.iter().any(|allowed| name.starts_with(allowed)) {
        return;
    }
    for (number, line) in source.lines() {
        if has_word(line, "unsafe") {
            found.push(format!(
                "{name}:{number}: `unsafe` is only for {}",
                UNSAFE.join(", ")
            ));
        }
    }
}

/// A type named …Secret may not be printed, copied or sent by a derive.
fn secrets(name: &str, source: &Source, found: &mut Vec<String>) {
    const UNSENT: [&str; 5] = ["Debug", "Clone", "Copy", "Serialize", "Deserialize"];
    const SENT: [&str; 1] = ["Debug"];
    let mut derives = String::new();
    for (number, line) in source.lines() {
        let trimmed = line.trim();
        if trimmed.starts_with("#[derive(") {
            derives.push_str(trimmed);
        }
        let declared = ["struct ", "enum "].iter().find_map(|kind| {
            let at = trimmed.find(kind)?;
            let rest = &trimmed[at + kind.len()..];
            Some(
                rest.chars()
                    .take_while(|c| c.is_alphanumeric())
                    .collect::<String>(),
            )
        });
        let Some(declared) = declared else { continue };
        if declared.ends_with("Secret") {
            let sent = SENT_SECRETS.contains(&declared.as_str());
            let forbidden: &[&str] = if sent { &SENT } else { &UNSENT };
            for trait_name in forbidden
                .iter()
                .filter(|&&derived| has_word(&derives, derived))
            {
                found.push(format!("{name}:{number}: {declared} derives {trait_name}"));
            }
        }
        derives.clear();
    }
}

/// Tests wait for conditions, not for the clock.
fn waiting(name: &str, source: &Source, found: &mut Vec<String>) {
    if SLEEPERS.contains(&name) {
        return;
    }
    let plain = source.without_tests();
    for ((number, line), plain) in source.lines().zip(plain.lines()) {
        let sleeps = line.contains("thread::sleep(") || line.contains("time::sleep(");
        if sleeps && (is_test(name) || !plain.contains("sleep(")) {
            found.push(format!(
                "{name}:{number}: a test sleeps; wait for a condition"
            ));
        }
        if line.contains("#[ignore") || line.contains("#[should_panic") {
            found.push(format!("{name}:{number}: no #[ignore], no #[should_panic]"));
        }
    }
}

fn unfinished(name: &str, source: &Source, found: &mut Vec<String>) {
    // Written in two parts, so that this file obeys its own rule.
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
    ];
    for (index, line) in source.text.lines().enumerate() {
        if let Some(mark) = marks.iter().find(|mark| has_word(line, mark)) {
            found.push(format!(
                "{name}:{}: {mark}: do it or open an issue",
                index + 1
            ));
        }
    }
}

/// Relative targets of Markdown links, without their anchors.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices("](")
        .filter_map(|(at, _)| text[at + 2..].split_once(')'))
        .map(|(target, _)| target.split(['#', ' ']).next().unwrap_or_default())
        .filter(|target| !target.is_empty() && !target.contains("://"))
        .filter(|target| !target.starts_with("mailto:"))
}

/// A path with its `.` and `..` resolved by their text.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            std::path::Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}

const MARK: &str = "<!-- source: ";

/// Pages of formats name their source with its hash: `<!-- source: ../src/x.rs sha256:… -->`.
fn page_hashes(pages: &BTreeMap<String, String>) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for (name, text) in pages
        .iter()
        .filter(|(name, _)| name.starts_with("proto/docs/"))
    {
        let marks: Vec<(&str, &str)> = source_marks(text).collect();
        if marks.is_empty() {
            found.push(format!(
                "{name}: names no source ({MARK}../src/… sha256:… -->)"
            ));
        }
        for (file, noted) in marks {
            match hash(name, file) {
                Ok(actual) if actual == noted => {}
                Ok(_) => found.push(format!(
                    "{name}: {file} changed; compare, correct, then `cargo xtask tidy --fix`"
                )),
                Err(error) => found.push(format!("{name}: {error:#}")),
            }
        }
    }
    Ok(found)
}

fn source_marks(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let inside = line.trim().strip_prefix(MARK)?.strip_suffix("-->")?.trim();
        let (file, hash) = inside.split_once(' ').unwrap_or((inside, ""));
        Some((file, hash.trim().strip_prefix("sha256:").unwrap_or("")))
    })
}

fn hash(page: &str, file: &str) -> anyhow::Result<String> {
    let folder = Path::new(page).parent().unwrap_or(Path::new(""));
    let path = house::root().join(normal(&folder.join(file)));
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn renew_hashes() -> anyhow::Result<()> {
    for (name, text) in Tree::read()?
        .pages
        .iter()
        .filter(|(name, _)| name.starts_with("proto/docs/"))
    {
        let mut fixed = String::new();
        for line in text.lines() {
            match source_marks(line).next() {
                Some((file, _)) => {
                    fixed.push_str(&format!("{MARK}{file} sha256:{} -->", hash(name, file)?));
                }
                None => fixed.push_str(line),
            }
            fixed.push('\n');
        }
        if fixed != *text {
            println!("renewed {name}");
            std::fs::write(house::root().join(name), fixed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rule: fn(&str, &Source, &mut Vec<String>), name: &str, text: &str) -> usize {
        let mut found = Vec::new();
        rule(name, &Source::new(text.to_owned()), &mut found);
        found.len()
    }

    #[test]
    fn agent_modules_meet_in_the_daemon_only() {
        let text = "use crate::kernel::Kernel;\nuse crate::state::State;\n";
        assert_eq!(check(star, "agent/src/control.rs", text), 2);
        assert_eq!(check(star, "agent/src/state/disk.rs", text), 1);
        assert_eq!(check(star, "agent/src/daemon.rs", text), 0);
        assert_eq!(check(star, "engine/src/plan.rs", text), 0);
        let test = "#[cfg(test)]\nmod tests {\n    use crate::kernel::Kernel;\n}\n";
        assert_eq!(check(star, "agent/src/control.rs", test), 0);
    }

    #[test]
    fn libraries_of_the_kernel_stay_there() {
        assert_eq!(
            check(kernel_only, "agent/src/state.rs", "use aya::Ebpf;"),
            1
        );
        assert_eq!(
            check(kernel_only, "agent/src/kernel/bpf.rs", "use aya::Ebpf;"),
            0
        );
        assert_eq!(
            check(
                kernel_only,
                "agent/src/state.rs",
                "// aya::Ebpf\nlet maya = 1;"
            ),
            0
        );
    }

    #[test]
    fn unsafe_is_found_only_in_code() {
        assert_eq!(
            check(
                unsafe_only_where_listed,
                "agent/src/state.rs",
                "unsafe { x() }"
            ),
            1
        );
        assert_eq!(
            check(
                unsafe_only_where_listed,
                "agent/src/port.rs",
                "unsafe { x() }"
            ),
            0
        );
        assert_eq!(
            check(
                unsafe_only_where_listed,
                "a.rs",
                "#![forbid(unsafe_code)] // unsafe"
            ),
            0
        );
    }

    #[test]
    fn secrets_are_not_printed() {
        assert_eq!(
            check(
                secrets,
                "a.rs",
                "#[derive(Debug, Clone)]\npub struct NodeSecret([u8; 32]);"
            ),
            2
        );
        assert_eq!(
            check(
                secrets,
                "a.rs",
                "#[derive(Debug)]\nstruct A;\nstruct BSecret;"
            ),
            0
        );
    }

    #[test]
    fn tests_do_not_sleep() {
        let text = "fn a() { std::thread::sleep(x); }\n#[cfg(test)]\nmod tests {\n    \
             fn b() { thread::sleep(x); }\n}\n";
        assert_eq!(check(waiting, "agent/src/a.rs", text), 1);
        assert_eq!(check(waiting, "tests/lab/a.rs", text), 2);
        assert_eq!(check(waiting, SLEEPERS[0], text), 0);
    }

    #[test]
    fn links_are_read_from_pages() {
        let text = "[a](b.md#part) [c](https://x) ![d](../e.png \"title\") [f](#g)";
        assert_eq!(links(text).collect::<Vec<_>>(), ["b.md", "../e.png"]);
        assert_eq!(normal(Path::new("a/b/../c/./d")), Path::new("a/c/d"));
    }

    #[test]
    fn marks_name_source_and_hash() {
        let marks: Vec<_> =
            source_marks("x\n<!-- source: ../src/key.rs sha256:ab -->\n<!-- other -->").collect();
        assert_eq!(marks, [("../src/key.rs", "ab")]);
    }
}
