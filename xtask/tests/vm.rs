//! What `cargo xtask vm` promises, seen from outside, in User Mode Linux guests.
//!
//! Where no UML kernel is at hand these tests are skipped: building one takes minutes, and that
//! is the business of who needs it for more.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// Whether a UML kernel is at hand; if not, notes that `name` was skipped.
fn uml_is_ready(name: &str) -> bool {
    let given = std::env::var_os("WEIR_UML").map(PathBuf::from);
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let built = cache
        .or(home)
        .and_then(|cache| std::fs::read_dir(cache.join("weir/uml")).ok());
    let built = built.into_iter().flatten().flatten();
    let ready = given.is_some_and(|kernel| kernel.is_file())
        || built
            .into_iter()
            .any(|file| file.file_name().to_string_lossy().starts_with("linux-"));
    if !ready {
        let reason = "no UML kernel at hand";
        eprintln!("skipped: {name}: {reason}");
        if let Some(list) = std::env::var_os("WEIR_SKIPS") {
            let file = std::fs::File::options()
                .create(true)
                .append(true)
                .open(list);
            let mut file = file.expect("the list of skips opens");
            writeln!(file, "{name}\t{reason}").expect("the list of skips is written");
        }
    }
    ready
}

fn vm(options: &[&str], script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command
        .args(["vm", "--backend", "uml"])
        .args(options)
        .args(["--", "sh", "-c", script]);
    command.stdin(Stdio::null());
    command
}

fn run(options: &[&str], script: &str) -> Output {
    vm(options, script).output().expect("xtask starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn exit_code_and_both_streams_are_passed_on() {
    if !uml_is_ready("exit_code_and_both_streams_are_passed_on") {
        return;
    }
    let out = run(
        &["--env", "SAY=it's"],
        "printf \"$SAY\"; printf 'a problem' >&2; exit 7",
    );
    assert_eq!(out.status.code(), Some(7));
    assert_eq!(text(&out.stdout), "it's");
    assert!(
        text(&out.stderr).ends_with("a problem"),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn output_is_exact_to_the_byte_and_complete() {
    if !uml_is_ready("output_is_exact_to_the_byte_and_complete") {
        return;
    }
    // Any binary file; ours is at hand, and longer than every buffer on the way.
    let program = env!("CARGO_BIN_EXE_xtask");
    let out = run(&[], &format!("head -c 3000000 '{program}'"));
    let expected = std::fs::read(program).unwrap();
    assert!(
        out.stdout == expected[..3_000_000],
        "{} bytes came",
        out.stdout.len()
    );
}

#[test]
fn the_guest_is_root_with_wireguard_and_sees_no_terminal() {
    if !uml_is_ready("the_guest_is_root_with_wireguard_and_sees_no_terminal") {
        return;
    }
    let out = run(
        &[],
        "set -e; test $(id -u) = 0; ip link add wg0 type wireguard; ip netns add other; \
         test -c /dev/net/tun; test \"$(stat -f -c %T /sys/fs/bpf)\" = bpf_fs; \
         grep -q /sys/fs/bpf /proc/1/mounts; test -d /sys/fs/cgroup/; \
         ip -o link show lo | grep -q LOWER_UP; ! test -t 1; ! test -t 2; echo all",
    );
    assert_eq!(text(&out.stdout), "all\n", "{}", text(&out.stderr));
}

#[test]
fn changes_are_thrown_away_except_in_the_results() {
    if !uml_is_ready("changes_are_thrown_away_except_in_the_results") {
        return;
    }
    let mark = format!("vm-test-{}", std::process::id());
    let out = run(
        &[],
        &format!("touch {mark} /etc/{mark} && echo kept > $WEIR_RESULTS/{mark} && ls /etc/{mark}"),
    );
    assert_eq!(
        text(&out.stdout),
        format!("/etc/{mark}\n"),
        "{}",
        text(&out.stderr)
    );
    assert!(!Path::new(&mark).exists() && !Path::new("/etc").join(&mark).exists());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let results = std::env::var_os("WEIR_RESULTS").map_or(root.join("results"), PathBuf::from);
    let kept = results.join(&mark);
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), "kept\n");
    std::fs::remove_file(kept).unwrap();
}

#[test]
fn time_runs_out_with_124_and_death_is_125() {
    if !uml_is_ready("time_runs_out_with_124_and_death_is_125") {
        return;
    }
    let out = run(&["--timeout", "3"], "echo begun; exec sleep 1000");
    assert_eq!(
        (out.status.code(), text(&out.stdout)),
        (Some(124), "begun\n".into())
    );
    assert!(
        text(&out.stderr).contains("timed out"),
        "{}",
        text(&out.stderr)
    );

    let out = run(&[], "busybox reboot -f");
    assert_eq!(out.status.code(), Some(125));
    assert!(
        text(&out.stderr).contains("the guest died"),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn what_the_command_leaves_behind_does_not_hold_the_guest() {
    if !uml_is_ready("what_the_command_leaves_behind_does_not_hold_the_guest") {
        return;
    }
    let out = run(&["--timeout", "60"], "sleep 1000 & echo done");
    assert_eq!(
        (out.status.code(), text(&out.stdout)),
        (Some(0), "done\n".into())
    );
}

#[test]
fn no_signal_leaves_a_guest_or_a_folder() {
    if !uml_is_ready("no_signal_leaves_a_guest_or_a_folder") {
        return;
    }
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let (mut xtask, mut stdout, folder) = begun();
        assert!(folder.is_dir() && !alive(&folder).is_empty());
        rustix::process::kill_process(Pid::from_child(&xtask), signal).unwrap();
        assert_eq!(xtask.wait().unwrap().code(), None, "{signal:?}");
        // The guard holds the stream until it is through.
        stdout.read_to_end(&mut Vec::new()).unwrap();
        assert!(!folder.exists(), "{signal:?} left {}", folder.display());
        assert_all_gone(&folder);
    }
}

#[test]
fn a_killed_guard_takes_the_guest_along_and_the_next_start_sweeps() {
    if !uml_is_ready("a_killed_guard_takes_the_guest_along_and_the_next_start_sweeps") {
        return;
    }
    let (mut xtask, mut stdout, folder) = begun();
    let guard = folder.file_name().unwrap().to_string_lossy().into_owned();
    let guard: i32 = guard.rsplit('-').next().unwrap().parse().unwrap();
    rustix::process::kill_process(Pid::from_raw(guard).unwrap(), Signal::KILL).unwrap();
    assert_eq!(xtask.wait().unwrap().code(), Some(125));
    stdout.read_to_end(&mut Vec::new()).unwrap();
    assert_all_gone(&folder);
    assert_eq!(run(&[], "true").status.code(), Some(0));
    assert!(!folder.exists());
}

#[test]
fn wrong_use_explains_itself_with_2() {
    for wrong in [
        &["vm"][..],
        &["vm", "--env", "NOVALUE", "--", "true"],
        &["nosuchverb"],
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(wrong)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(2), "{wrong:?}");
        assert!(!out.stderr.is_empty());
    }
}

/// A guest that would go on for long: xtask, its stdout, and the guest's folder.
fn begun() -> (Child, BufReader<std::process::ChildStdout>, PathBuf) {
    let script = "cat /proc/cmdline; exec sleep 1000";
    let mut xtask = vm(&[], script)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("xtask starts");
    let mut stdout = BufReader::new(xtask.stdout.take().expect("stdout is piped"));
    let mut line = String::new();
    stdout
        .read_line(&mut line)
        .expect("the guest says its command line");
    let folder = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("init="))
        .expect("the guest has an init");
    let folder = Path::new(folder)
        .parent()
        .expect("init lies in a folder")
        .to_owned();
    (xtask, stdout, folder)
}

/// Living processes whose command line names the folder.
fn alive(folder: &Path) -> Vec<String> {
    let folder = folder.display().to_string();
    let processes = std::fs::read_dir("/proc")
        .expect("/proc is there")
        .flatten()
        .map(|entry| entry.path());
    let named = |path: &PathBuf| {
        std::fs::read(path.join("cmdline")).is_ok_and(|words| text(&words).contains(&folder))
    };
    let zombie = |path: &PathBuf| {
        std::fs::read_to_string(path.join("stat")).is_ok_and(|stat| stat.contains(") Z "))
    };
    processes
        .filter(named)
        .filter(|path| !zombie(path))
        .map(|p| p.display().to_string())
        .collect()
}

/// A killed process takes a moment to die.
fn assert_all_gone(folder: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !alive(folder).is_empty() {
        assert!(
            Instant::now() < deadline,
            "still there: {:?}",
            alive(folder)
        );
        std::thread::yield_now();
    }
}
