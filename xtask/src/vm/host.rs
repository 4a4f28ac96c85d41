//! The host's own kernel, where it has WireGuard: namespaces instead of a machine.

use std::process::{Command, Stdio};

use super::Machine;
use super::guest::{self, Folder};
use crate::house;

/// Whether the host's kernel serves, and if not, why.
pub fn probe() -> Result<Machine, String> {
    let root = rustix::process::geteuid().is_root();
    if !has_wireguard(root) {
        return Err("the host's kernel has no WireGuard".into());
    }
    if !root && !may_sudo() {
        return Err("not root, and sudo would ask for a password without a terminal".into());
    }
    Ok(Machine::Host)
}

/// Whether the host's kernel can run eBPF programs at tcx hooks for us.
pub fn probe_bpf() -> Result<Machine, String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let version = (numbers.next(), numbers.next());
    let (Some(Ok(major)), Some(Ok(minor))) = version else {
        return Err(format!("cannot read the kernel's version from {release:?}"));
    };
    if (major, minor) < (6, 6) {
        return Err(format!(
            "tcx came with Linux 6.6, and this is {major}.{minor}"
        ));
    }
    if !rustix::process::geteuid().is_root() && !may_sudo() {
        return Err("loading programs needs root, and sudo would ask for a password".into());
    }
    Ok(Machine::Host)
}

/// Root asks the kernel itself; others look whether a module could be loaded.
fn has_wireguard(root: bool) -> bool {
    if root {
        let add = [
            "--net",
            "ip",
            "link",
            "add",
            "weirprobe",
            "type",
            "wireguard",
        ];
        let status = Command::new("unshare")
            .args(add)
            .stderr(Stdio::null())
            .status();
        return status.is_ok_and(|status| status.success());
    }
    if std::path::Path::new("/sys/module/wireguard").exists() {
        return true;
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    ["modules.dep", "modules.builtin"].iter().any(|index| {
        std::fs::read_to_string(format!("/lib/modules/{}/{index}", release.trim()))
            .is_ok_and(|text| text.contains("/wireguard.ko"))
    })
}

/// Whether sudo lets us, asking at most a person at a terminal.
fn may_sudo() -> bool {
    use std::io::IsTerminal;
    if house::program("sudo").is_none() {
        return false;
    }
    let quiet = Command::new("sudo")
        .args(["-n", "true"])
        .stderr(Stdio::null())
        .status();
    quiet.is_ok_and(|status| status.success()) || std::io::stdin().is_terminal()
}

/// The command that makes the namespaces.
pub fn argv(folder: &Folder) -> anyhow::Result<Vec<String>> {
    let mut argv: Vec<String> = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc"]
        .map(String::from)
        .to_vec();
    argv.extend(["--cgroup", "--fork", "--kill-child"].map(String::from));
    argv.extend([
        guest::busybox()?.display().to_string(),
        "sh".into(),
        folder.path.join("host-init.sh").display().to_string(),
        folder.path.display().to_string(),
    ]);
    Ok(argv)
}
