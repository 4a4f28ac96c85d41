//! `weir policy …`: policy files without an agent, a coordinator or a network.
//!
//! All meaning is in `proto::policy`; here files are read and answers printed. A network is
//! described by a file: users, and nodes with their addresses, owners and routes.

use super::arguments::{Explain, Policy as Verb, PolicyDiff};
use super::target::{choose, first_packet};
use super::{Complaint, Console, Failure, chain};
use proto::net::Protocol;
use proto::policy::{
    Compiled, Diagnostics, Directory, Explanation, Flow, MAX_TEXT_BYTES, OfflineError, Policy,
    check_settings, check_write, compile_offline, diff as diff_policies, explain as explain_flow,
    format, parse, read_topology, run_tests,
};
use serde::Serialize;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::Path;

/// Longest description of a network, in bytes: a hundred thousand nodes fit.
const MAX_NETWORK_BYTES: u64 = 256 << 20;

pub(super) fn policy(console: &Console, verb: &Verb) -> Result<(), Failure> {
    match verb {
        Verb::Check { file, network } => check(console, file, network.as_deref()),
        Verb::Test { policy, network } => test(console, policy, network),
        Verb::Compile {
            policy,
            network,
            settings,
        } => compile(console, policy, network, settings.as_deref()),
        Verb::Explain(explain) => offline(console, explain),
        // Its exit code 1 is an answer.
        Verb::Diff(files) => diff(console, files).map_err(|failure| match failure {
            Failure::Failed(complaint) => Failure::Trouble(complaint),
            other => other,
        }),
        Verb::Fmt { file, check, write } => match (check, write) {
            (true, _) => formatted(console, file),
            (_, true) => rewrite(console, file),
            _ => print_formatted(console, file),
        },
    }
}

/// Whether the file may become a network's policy.
fn check(console: &Console, file: &Path, network: Option<&Path>) -> Result<(), Failure> {
    let policy = read_policy(file)?;
    check_write(&policy).map_err(|fault| faulty(file, &fault.into()))?;
    if let Some(network) = network {
        let directory = read_network(network)?;
        Compiled::new(&policy, &directory).map_err(|faults| faulty(file, &faults))?;
        run_tests(&policy, &directory).map_err(|faults| faulty(file, &faults))?;
    }
    passed(console, file, "nothing is wrong with it")
}

/// Whether the file's own tests hold in that network.
fn test(console: &Console, file: &Path, network: &Path) -> Result<(), Failure> {
    let policy = read_policy(file)?;
    let directory = read_network(network)?;
    run_tests(&policy, &directory).map_err(|faults| faulty(file, &faults))?;
    let count = policy.tests.len() + policy.ssh_tests.len();
    passed(console, file, &format!("{count} of {count} tests hold"))
}

fn passed(console: &Console, file: &Path, how: &str) -> Result<(), Failure> {
    if console.json {
        #[derive(Serialize)]
        struct Passed {
            passed: bool,
        }
        return console.document(Passed { passed: true });
    }
    console.say(&format!("{}: {how}.\n", file.display()))
}

/// What every node of that network gets. Always JSON: it is meant for programs.
fn compile(
    console: &Console,
    file: &Path,
    network: &Path,
    settings: Option<&Path>,
) -> Result<(), Failure> {
    let policy = read(file, MAX_TEXT_BYTES as u64)?;
    let network = read(network, MAX_NETWORK_BYTES)?;
    let settings = settings
        .map(|path| read(path, MAX_NETWORK_BYTES))
        .transpose()?;
    let compiled = compile_offline(&policy, &network, settings.as_deref()).map_err(unfit)?;
    let text = serde_json::to_string_pretty(&compiled)
        .map_err(|error| Failure::new("failed", error.to_string(), ""))?;
    console.say(&format!("{text}\n"))
}

/// Who may reach more or less by the new policy than by the old one, in that network.
fn diff(console: &Console, files: &PolicyDiff) -> Result<(), Failure> {
    if let Some(settings) = &files.settings {
        check_settings(&read(settings, MAX_NETWORK_BYTES)?).map_err(unfit)?;
    }
    let directory = read_network(&files.network)?;
    let compiled = |file: &Path| {
        let policy = read_policy(file)?;
        check_write(&policy).map_err(|fault| faulty(file, &fault.into()))?;
        Compiled::new(&policy, &directory).map_err(|faults| faulty(file, &faults))
    };
    let (old, new) = (compiled(&files.old)?, compiled(&files.new)?);
    let diff = diff_policies(&old, &new, &directory)
        .map_err(|error| Failure::new("too_large", error.to_string(), ""))?;
    if console.json {
        console.document(diff.document())?;
    } else {
        console.say(&diff.to_string())?;
    }
    if diff.is_empty() {
        Ok(())
    } else {
        Err(Failure::Told)
    }
}

#[derive(Serialize)]
struct Formatted {
    formatted: bool,
}

fn read_formatted(file: &Path) -> Result<(String, String), Failure> {
    let text = read(file, MAX_TEXT_BYTES as u64)?;
    let formatted = format(&text).map_err(|faults| faulty(file, &faults))?;
    Ok((text, formatted))
}

/// Whether the file is in the one form.
fn formatted(console: &Console, file: &Path) -> Result<(), Failure> {
    let (text, formatted) = read_formatted(file)?;
    let same = text == formatted;
    let name = file.display();
    if console.json {
        console.document(Formatted { formatted: same })?;
    } else if same {
        console.say(&format!("{name}: well formatted.\n"))?;
    } else {
        let same = text.lines().zip(formatted.lines());
        let line = same.take_while(|(is, wanted)| is == wanted).count() + 1;
        console.say(&format!(
            "{name}: line {line} is the first that `weir policy fmt --write {name}` would change.\n"
        ))?;
    }
    if same { Ok(()) } else { Err(Failure::Told) }
}

/// Puts the file into the one form. What was there stays until all of it is written.
fn rewrite(console: &Console, file: &Path) -> Result<(), Failure> {
    let (text, formatted) = read_formatted(file)?;
    let changed = text != formatted;
    if changed {
        replace(file, &formatted).map_err(|error| {
            let message = format!("`{}` cannot be written: {}", file.display(), chain(&error));
            Failure::new("unwritable", message, "Nothing was changed.")
        })?;
    }
    if console.json {
        return console.document(Formatted { formatted: true });
    }
    let how = if changed {
        "formatted"
    } else {
        "well formatted already"
    };
    console.say(&format!("{}: {how}.\n", file.display()))
}

/// Replaces a file as a whole, in place of links and with its permissions.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    let file = fs::canonicalize(file)?;
    let mut name = file.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.new", std::process::id()));
    let new = file.with_file_name(name);
    let written = File::create_new(&new).and_then(|mut out| {
        out.set_permissions(fs::metadata(&file)?.permissions())?;
        out.write_all(text.as_bytes())?;
        out.sync_all()
    });
    let replaced = written.and_then(|()| fs::rename(&new, &file));
    if replaced.is_err() {
        // The error that matters is told already.
        let _ = fs::remove_file(&new);
    }
    replaced
}

fn print_formatted(console: &Console, file: &Path) -> Result<(), Failure> {
    let (_, text) = read_formatted(file)?;
    if console.json {
        #[derive(Serialize)]
        struct Text {
            text: String,
        }
        return console.document(Text { text });
    }
    // As it is, tabs in comments and all: it may become the file.
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|_| Failure::Unheard)
}

/// Which rule of a file allows a connection, or which come closest.
pub(super) fn offline(console: &Console, explain: &Explain) -> Result<(), Failure> {
    let (Some(file), Some(network)) = (&explain.policy, &explain.network) else {
        return Err(Failure::Use(
            "without an agent, an explanation needs --policy FILE and --network FILE".to_owned(),
        ));
    };
    let protocol = choose(explain)?;
    let policy = read_policy(file)?;
    let directory = read_network(network)?;
    let (src, dst) = ends(&directory, &explain.src, &explain.dst.host)?;
    let protocol = first_packet(protocol, dst);
    let flow = Flow {
        src,
        dst,
        protocol,
        port: explain.dst.port.unwrap_or_default(),
    };
    let explanation = explain_flow(&policy, &directory, &flow);
    if console.json {
        #[derive(Serialize)]
        struct Document<'a> {
            src: IpAddr,
            dst: IpAddr,
            protocol: Protocol,
            port: Option<u16>,
            #[serde(flatten)]
            explanation: &'a Explanation,
        }
        return console.document(Document {
            src,
            dst,
            protocol,
            port: explain.dst.port,
            explanation: &explanation,
        });
    }
    console.say(&format!("{}\n", explanation.sentences()))
}

/// The addresses of both ends, of one family: names have one of each.
fn ends(directory: &Directory, src: &str, dst: &str) -> Result<(IpAddr, IpAddr), Failure> {
    let (srcs, dsts) = (addrs(directory, src)?, addrs(directory, dst)?);
    for src in &srcs {
        let fits = |dst: &&IpAddr| dst.is_ipv4() == src.is_ipv4();
        if let Some(dst) = dsts.iter().find(fits) {
            return Ok((*src, *dst));
        }
    }
    Err(Failure::Use(format!(
        "`{src}` and `{dst}` have no addresses of the same family"
    )))
}

fn addrs(directory: &Directory, text: &str) -> Result<Vec<IpAddr>, Failure> {
    if let Ok(addr) = text.parse() {
        return Ok(vec![addr]);
    }
    let node = directory.nodes.values().find(|node| node.name == text);
    node.map(|node| node.addrs.clone()).ok_or_else(|| {
        Failure::new(
            "unknown_peer",
            format!("`{text}` is no address, and no node of that network has this name"),
            "The names are the keys of `nodes` in the network's file.",
        )
    })
}

fn read_policy(file: &Path) -> Result<Policy, Failure> {
    let text = read(file, MAX_TEXT_BYTES as u64)?;
    parse(&text).map_err(|faults| faulty(file, &faults))
}

fn read_network(file: &Path) -> Result<Directory, Failure> {
    read_topology(&read(file, MAX_NETWORK_BYTES)?).map_err(unfit)
}

fn read(file: &Path, limit: u64) -> Result<String, Failure> {
    let unreadable = |why: String| {
        let message = format!("`{}` cannot be read: {why}", file.display());
        Failure::new("unreadable", message, "")
    };
    let mut text = String::new();
    File::open(file)
        .and_then(|file| file.take(limit + 1).read_to_string(&mut text))
        .map_err(|error| unreadable(chain(&error)))?;
    if text.len() as u64 > limit {
        return Err(unreadable(format!("it is longer than {limit} bytes")));
    }
    Ok(text)
}

fn faulty(file: &Path, faults: &Diagnostics) -> Failure {
    let first = faults.items.first();
    Failure::Failed(Complaint {
        code: first
            .map_or("syntax", |fault| fault.code.as_str())
            .to_owned(),
        message: faults
            .render(&file.display().to_string())
            .trim_end()
            .to_owned(),
        next: String::new(),
        line: first.map(|fault| fault.line),
        column: first.map(|fault| fault.column),
    })
}

fn unfit(error: OfflineError) -> Failure {
    Failure::Failed(Complaint {
        code: error.code.as_str().to_owned(),
        message: error.message.trim_end().to_owned(),
        next: String::new(),
        line: Some(error.line),
        column: Some(error.column),
    })
}
