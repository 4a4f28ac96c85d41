//! Where programs and maps are kept alive: the folder of pins.
//!
//! A map's pin carries the version and the sizes of its layout in its name
//! (`ESTABLISHED-v1-40-16`), so that an agent with another layout neither adopts nor destroys what
//! the old programs still use: it makes its own beside, attaches, and only then removes the rest
//! ([`remove_strangers`]).

use super::AclError;
use ebpf::abi::{self, ABI_VERSION, maps};
use rustix::fs::{major, minor, stat, statfs};
use std::collections::BTreeSet;
use std::path::Path;
use std::{fs, io};

/// `BPF_FS_MAGIC` (linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// The pin of a map.
pub(super) fn map(name: &str) -> String {
    let (key, value) = layout(name);
    format!("{name}-v{ABI_VERSION}-{key}-{value}")
}

/// The pin of a program's link.
pub(super) fn link(program: &str) -> String {
    format!("link-{program}")
}

/// Whether anything is pinned under `dir`.
#[must_use]
pub fn is_pinned(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// Makes the folder, on a bpffs that outlives this process.
pub(super) fn prepare(dir: &Path) -> Result<(), AclError> {
    let existing = dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let failed = |source: io::Error| AclError::Pins {
        path: dir.to_owned(),
        source,
    };
    let kind = statfs(existing)
        .map_err(|error| failed(error.into()))?
        .f_type;
    // The width of `f_type` differs between architectures.
    #[allow(clippy::unnecessary_cast, reason = "the field is not i64 everywhere")]
    if kind as i64 & 0xffff_ffff != BPF_FS_MAGIC {
        return Err(AclError::NotBpffs(dir.to_owned()));
    }
    let device = stat(existing).map_err(|error| failed(error.into()))?.st_dev;
    let mounts = fs::read_to_string("/proc/1/mountinfo").map_err(failed)?;
    if !shows(&mounts, major(device), minor(device)) {
        return Err(AclError::PrivateBpffs(dir.to_owned()));
    }
    fs::create_dir_all(dir).map_err(failed)
}

/// Removes the pins of maps that have another layout than ours.
pub(super) fn remove_strangers(dir: &Path) -> Result<(), AclError> {
    let ours: BTreeSet<String> = maps::PLAIN
        .iter()
        .chain(&maps::SLOTTED)
        .map(|m| map(m))
        .collect();
    let failed = |source: io::Error| AclError::Pins {
        path: dir.to_owned(),
        source,
    };
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !ours.contains(&name) && !name.starts_with("link-") {
            fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Removes every pin, the folder, and the folder around it if that is empty now.
pub(super) fn remove_all(dir: &Path) -> Result<(), AclError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(AclError::Pins {
                path: dir.to_owned(),
                source: error,
            });
        }
        Ok(()) | Err(_) => {}
    }
    if let Some(around) = dir.parent().filter(|path| path.ends_with("weir")) {
        // Another interface may have its pins there.
        let _ = fs::remove_dir(around);
    }
    Ok(())
}

/// Whether a mountinfo (proc_pid_mountinfo(5)) shows a bpffs with this device number.
fn shows(mountinfo: &str, major: u32, minor: u32) -> bool {
    let device = format!("{major}:{minor}");
    mountinfo.lines().any(|line| {
        let mut halves = line.splitn(2, " - ");
        let number = halves.next().and_then(|left| left.split(' ').nth(2));
        let kind = halves.next().and_then(|right| right.split(' ').next());
        number == Some(device.as_str()) && kind == Some("bpf")
    })
}

/// Sizes of a map's key and value, in bytes.
fn layout(name: &str) -> (usize, usize) {
    let number = size_of::<u32>();
    match name {
        maps::ACTIVE => (number, size_of::<u64>()),
        maps::OPENING | maps::ESTABLISHED => (size_of::<abi::FlowKey>(), size_of::<abi::Flow>()),
        maps::FRAGMENTS => (size_of::<abi::FragmentKey>(), size_of::<abi::Fragment>()),
        maps::QUOTA => (number, size_of::<abi::Quota>()),
        maps::COUNTERS => (number, size_of::<abi::Counter>()),
        // Outer maps hold numbers of inner ones.
        _ => (number, number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bpffs_with_the_same_device_number_counts() {
        let mounts = "36 30 0:32 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700\n\
                      37 30 0:33 / /tmp rw - tmpfs tmpfs rw\n";
        assert!(shows(mounts, 0, 32));
        assert!(!shows(mounts, 0, 33));
        assert!(!shows(mounts, 0, 3));
        assert!(!shows("", 0, 32));
    }

    #[test]
    fn a_folder_elsewhere_is_refused_with_what_to_do() {
        let error = prepare(Path::new("/proc/self/weir")).unwrap_err();
        assert!(matches!(error, AclError::NotBpffs(_)));
        assert!(error.to_string().contains("mount -t bpf"));
    }
}
