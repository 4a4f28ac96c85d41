//! What a lab leaves behind when a test failed: a folder with all that one would ask for next.
//!
//! For each host every log and capture, what `ip`, `wg`, `nft` and `ss` say, what the agent says of
//! itself, and every pinned map. Keys stay out: state folders are not copied, and `wg show` hides
//! them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::host::Host;
use crate::lab::{Lab, results};

/// How long one question may take: an agent that hangs must not take the evidence with it.
const QUESTION_BOUND: Duration = Duration::from_secs(10);

/// What every host is asked.
const QUESTIONS: &[&str] = &[
    "ip -d link",
    "ip -s -s link",
    "ip addr",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "ip -4 rule",
    "ip -6 rule",
    "ip neigh",
    "wg show",
    "nft list ruleset",
    "ss -tuanpi",
    "bpftool net",
];

/// What a host with an agent is asked besides.
const AGENT_QUESTIONS: &[&str] = &["status --json", "peers --json", "counters --json", "doctor"];

/// Writes the evidence of a lab that did not end well; returns the folder.
///
/// # Errors
/// If the folder cannot be written. A question without an answer is no error: the answer says so.
pub fn collect(lab: &Lab) -> anyhow::Result<PathBuf> {
    let folder = results().join(&lab.name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    for host in lab.hosts().values() {
        let target = folder.join(&host.name);
        std::fs::create_dir_all(&target)?;
        copy_files(&host.folder, &target)?;
        for question in QUESTIONS {
            ask(host, question, &target)?;
        }
        let socket = host.folder.join("run/weir.sock");
        if socket.exists() {
            for question in AGENT_QUESTIONS {
                ask(
                    host,
                    &format!("weir --socket {} {question}", socket.display()),
                    &target,
                )?;
            }
        }
        for map in pinned(&host.folder.join("bpf")) {
            ask(
                host,
                &format!("bpftool map dump pinned {}", map.display()),
                &target,
            )?;
        }
    }
    Ok(folder)
}

/// Asks one question and files the answer under a name made of it.
fn ask(host: &Host, question: &str, target: &Path) -> anyhow::Result<()> {
    let answer = match host.output_with(question, "", QUESTION_BOUND) {
        Ok(output) => format!("{}{}", output.stdout, output.stderr),
        Err(error) => format!("no answer: {error:#}\n"),
    };
    let own_paths = host.folder.to_string_lossy().into_owned();
    let name = question.replace(&own_paths, "").replace([' ', '/'], "_");
    std::fs::write(target.join(format!("{name}.txt")), answer)?;
    Ok(())
}

/// Copies the logs and captures of a host.
fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        let wanted = path
            .extension()
            .is_some_and(|end| end == "log" || end == "pcap");
        if let (true, Some(name)) = (wanted, path.file_name()) {
            std::fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// All files below a folder of a bpffs.
fn pinned(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut files = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            files.extend(pinned(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}
