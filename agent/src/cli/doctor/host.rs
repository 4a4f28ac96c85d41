//! The machine's side: kernel, folders, clock.

use super::Check;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The oldest kernel that will do.
const OLDEST: (u32, u32) = (6, 1);
/// The first kernel with tcx.
const TCX: (u32, u32) = (6, 6);
/// 2026-01-01, before the first release: no clock is right that says earlier.
const EARLIEST: Duration = Duration::from_secs(1_767_225_600);
/// How far in the future a file may have been written.
const SKEW: Duration = Duration::from_secs(300);

pub(super) fn kernel() -> Check {
    match fs::read_to_string("/proc/sys/kernel/osrelease") {
        Ok(release) => kernel_check(release.trim()),
        Err(error) => Check::warn("kernel", format!("its version cannot be read: {error}"), ""),
    }
}

fn kernel_check(release: &str) -> Check {
    let name = "kernel";
    let Some(version) = version(release) else {
        return Check::warn(
            name,
            format!("`{release}` is no version that is understood"),
            "",
        );
    };
    if version < OLDEST {
        return Check::fail(
            name,
            format!("Linux {release} is too old"),
            format!("weir needs Linux {}.{} or later.", OLDEST.0, OLDEST.1),
        );
    }
    let hook = if version < TCX { "clsact" } else { "tcx" };
    Check::ok(name, format!("Linux {release}, programs attach by {hook}"))
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) fn wireguard() -> Check {
    let name = "wireguard";
    if Path::new("/sys/module/wireguard").exists() {
        return Check::ok(name, "in the kernel");
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let folder = Path::new("/lib/modules").join(release.trim());
    let listed = |list: &str| {
        fs::read_to_string(folder.join(list)).is_ok_and(|text| text.contains("/wireguard.ko"))
    };
    if listed("modules.dep") || listed("modules.builtin") {
        return Check::ok(name, "a module that the kernel loads when it is needed");
    }
    Check::fail(
        name,
        "this kernel has no WireGuard",
        "Install the package with your kernel's further modules (linux-modules-extra on some \
         clouds), or boot a distribution kernel.",
    )
}

pub(super) fn btf() -> Check {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        Check::ok("btf", "the kernel describes its types")
    } else {
        Check::warn(
            "btf",
            "the kernel does not describe its types (no /sys/kernel/btf/vmlinux)",
            "weir works, but tools that look into its maps show less.",
        )
    }
}

/// Pins in a bpffs that PID 1 does not see would vanish with the agent's mount namespace.
pub(super) fn bpffs(attached: bool) -> Check {
    if attached {
        return Check::ok(
            "bpffs",
            "the agent has pinned its programs where PID 1 sees them",
        );
    }
    let ours = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    bpffs_check(&ours, fs::read_to_string("/proc/1/mountinfo"))
}

fn bpffs_check(ours: &str, first: io::Result<String>) -> Check {
    let name = "bpffs";
    let ours = bpf_mounts(ours).filter(|(_, place)| *place == "/sys/fs/bpf");
    let Some((device, _)) = ours.last() else {
        return Check::fail(
            name,
            "no bpffs is mounted at /sys/fs/bpf",
            "Run `mount -t bpf bpf /sys/fs/bpf`; systemd does so by itself.",
        );
    };
    match first {
        Err(error) => Check::warn(
            name,
            format!("what PID 1 has mounted cannot be read: {error}"),
            "Run `weir doctor` with sudo.",
        ),
        Ok(first) if bpf_mounts(&first).any(|(other, _)| other == device) => {
            Check::ok(name, "mounted at /sys/fs/bpf, and PID 1 sees it")
        }
        Ok(_) => Check::fail(
            name,
            "PID 1 does not see the bpffs at /sys/fs/bpf: pins in it would vanish with this \
             mount namespace, and the ACL with them",
            "Mount it where PID 1 sees it, and bind that mount here.",
        ),
    }
}

/// `major:minor` and place of every bpffs, in the order of mounting (proc_pid_mountinfo(5)).
fn bpf_mounts(mountinfo: &str) -> impl Iterator<Item = (&str, &str)> {
    mountinfo.lines().filter_map(|line| {
        let (before, after) = str::split_once(line, " - ")?;
        let mut words = before.split(' ');
        let (device, place) = (words.nth(2)?, words.nth(1)?);
        after.starts_with("bpf ").then_some((device, place))
    })
}

pub(super) fn clock(state_dir: &Path) -> Check {
    let written = fs::metadata(state_dir.join("netmap")).and_then(|file| file.modified());
    clock_check(SystemTime::now(), written.ok())
}

fn clock_check(now: SystemTime, written: Option<SystemTime>) -> Check {
    let next = "Set the clock (`timedatectl set-ntp true`): WireGuard refuses handshakes from a \
                clock that went back, and tokens expire by it.";
    if now < UNIX_EPOCH + EARLIEST {
        return Check::fail("clock", "the clock stands before 2026", next);
    }
    match written {
        Some(written) if written > now + SKEW => Check::fail(
            "clock",
            "the clock went back since the last netmap was kept",
            next,
        ),
        _ => Check::ok("clock", "plausible"),
    }
}

pub(super) fn state_folder(folder: &Path) -> Check {
    let name = "state";
    let shown = folder.display();
    let metadata = match fs::metadata(folder) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Check::ok(
                name,
                format!("{shown} is not there yet; the agent makes it"),
            );
        }
        Err(error) => {
            let next = "Run `weir doctor` with sudo.";
            return Check::warn(name, format!("{shown} cannot be looked at: {error}"), next);
        }
    };
    let mode = metadata.mode() & 0o7777;
    if !metadata.is_dir() {
        Check::fail(
            name,
            format!("{shown} is no folder"),
            "Name another with --state-dir.",
        )
    } else if mode & 0o077 != 0 {
        let next = format!("Run `chmod 700 {shown}`.");
        Check::warn(
            name,
            format!("{shown} is open to others (mode {mode:04o})"),
            next,
        )
    } else {
        Check::ok(name, format!("{shown} is private"))
    }
}

/// `threaded` moves a device's NAPI polling, where WireGuard decrypts, to threads of its own.
pub(super) fn threaded(device: &str) -> Check {
    let value = fs::read_to_string(format!("/sys/class/net/{device}/threaded"));
    match value.as_deref().map(str::trim) {
        Ok("0") => Check::ok("threaded", "off: packets are decrypted in softirqs"),
        Ok(_) => Check::ok(
            "threaded",
            "on: packets are decrypted in threads of their own",
        ),
        Err(error) => Check::warn("threaded", format!("cannot be read: {error}"), ""),
    }
}

/// A subnet router's device must forward, in the families of its routes (`true` is IPv4).
pub(super) fn forwarding(device: &str, routes: impl Iterator<Item = bool>) -> Vec<Check> {
    let family = |family: &str| -> Option<Check> {
        let path = format!("/proc/sys/net/{family}/conf/{device}/forwarding");
        let value = fs::read_to_string(path).ok()?;
        Some(if value.trim() == "0" {
            Check::fail(
                "forwarding",
                format!("{device} does not forward {family}, and this node serves routes"),
                "The agent turns it on; something else may have turned it off: restart the agent.",
            )
        } else {
            Check::ok("forwarding", format!("{device} forwards {family}"))
        })
    };
    let families: BTreeSet<&str> = routes.map(|v4| if v4 { "ipv4" } else { "ipv6" }).collect();
    families.into_iter().filter_map(family).collect()
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn kernels_before_6_1_fail() {
        for (release, state) in [
            ("6.1.0-18-amd64", State::Ok),
            ("6.18.4", State::Ok),
            ("10.0", State::Ok),
            ("6.0.19", State::Fail),
            ("5.15.0-101-generic", State::Fail),
            ("strange", State::Warn),
        ] {
            assert_eq!(kernel_check(release).state, state, "{release}");
        }
        assert!(kernel_check("6.1.0").message.contains("clsact"));
        assert!(kernel_check("6.6.1").message.contains("tcx"));
    }

    #[test]
    fn the_bpffs_must_be_one_that_pid_1_sees() {
        let mount = |device: &str| {
            format!(
                "24 1 0:22 / /sys rw shared:7 - sysfs sysfs rw\n\
                 31 24 {device} / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700\n"
            )
        };
        let state = |ours: &str, first| bpffs_check(ours, first).state;
        assert_eq!(state(&mount("0:32"), Ok(mount("0:32"))), State::Ok);
        assert_eq!(state(&mount("0:99"), Ok(mount("0:32"))), State::Fail);
        assert_eq!(state("", Ok(mount("0:32"))), State::Fail);
        let elsewhere = mount("0:99") + &mount("0:32").replace("/sys/fs/bpf", "/run/bpf");
        assert_eq!(state(&mount("0:32"), Ok(elsewhere)), State::Ok);
        let denied = Err(io::ErrorKind::PermissionDenied.into());
        assert_eq!(state(&mount("0:32"), denied), State::Warn);
    }

    #[test]
    fn a_clock_that_went_back_fails() {
        let now = UNIX_EPOCH + EARLIEST + SKEW * 10;
        assert_eq!(clock_check(now, None).state, State::Ok);
        assert_eq!(clock_check(now, Some(now - SKEW)).state, State::Ok);
        assert_eq!(clock_check(now, Some(now + SKEW * 2)).state, State::Fail);
        assert_eq!(clock_check(UNIX_EPOCH, None).state, State::Fail);
    }

    #[test]
    fn an_open_state_folder_is_pointed_out() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        for (mode, state) in [
            (0o700, State::Ok),
            (0o750, State::Warn),
            (0o705, State::Warn),
        ] {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(state_folder(folder.path()).state, state, "{mode:o}");
        }
    }
}
