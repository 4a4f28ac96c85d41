//! The systemd unit that is shipped: what it may do, and what it must not say.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Highest exposure that systemd-analyze may give the unit, in tenths.
const MAX_EXPOSURE: &str = "25";

fn unit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd/weir.service")
}

/// All values of a setting, in order.
fn values(key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(unit()).expect("the unit");
    let start = format!("{key}=");
    let lines = text.lines().filter_map(|line| line.strip_prefix(&start));
    lines.map(str::to_owned).collect()
}

#[test]
fn it_has_exactly_four_capabilities() {
    let values = values("CapabilityBoundingSet");
    let capabilities: BTreeSet<&str> = values.iter().flat_map(|value| value.split(' ')).collect();
    let four = BTreeSet::from(["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON", "CAP_NET_RAW"]);
    assert_eq!(capabilities, four);
    assert_eq!(values.len(), 1);
    assert!(self::values("AmbientCapabilities").is_empty());
    assert_eq!(self::values("NoNewPrivileges"), ["yes"]);
}

#[test]
fn stopping_it_does_nothing_more() {
    for key in ["ExecStop", "ExecStopPost", "ExecReload"] {
        assert!(values(key).is_empty(), "{key}");
    }
    assert_eq!(values("Type"), ["notify"]);
    assert_eq!(values("WatchdogSec").len(), 1);
}

#[test]
fn its_command_is_understood_and_names_the_default_places() {
    let command = values("ExecStart");
    let [command] = command.as_slice() else {
        panic!("one command");
    };
    let arguments = agent::cli::parse(command.split(' ').map(Into::into));
    let Ok(arguments) = arguments else {
        panic!("{command} is wrong use");
    };
    let config = agent::cli::daemon_config(&arguments).expect("it starts the agent");
    assert_eq!(
        config.state_dir,
        Path::new(agent::config::DEFAULT_STATE_DIR)
    );
    assert_eq!(config.socket, Path::new(agent::config::DEFAULT_SOCKET));
    assert_eq!(values("StateDirectory"), ["weir"]);
    assert_eq!(values("StateDirectoryMode"), ["0700"]);
    assert_eq!(values("RuntimeDirectory"), ["weir"]);
}

#[test]
fn its_exposure_is_low() {
    let judged = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--no-pager", "--threshold"])
        .arg(MAX_EXPOSURE)
        .arg(unit())
        .output();
    match judged {
        Ok(judged) => {
            let said = String::from_utf8_lossy(&judged.stdout);
            assert!(judged.status.success(), "{said}");
            assert!(
                said.contains("Overall exposure level for weir.service"),
                "{said}"
            );
        }
        Err(error) => skip(
            "its_exposure_is_low",
            &format!("no systemd-analyze: {error}"),
        ),
    }
}

/// Tells the test runner what did not run here, and why.
fn skip(name: &str, reason: &str) {
    println!("skipped: {name}: {reason}");
    if let Some(path) = std::env::var_os("WEIR_SKIPS") {
        let list = OpenOptions::new().append(true).create(true).open(path);
        let _ = list.and_then(|mut list| writeln!(list, "{name}\t{reason}"));
    }
}
