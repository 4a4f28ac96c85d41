//! Where pins may live: on a bpffs that PID 1 sees too.
//!
//! `ip netns exec` and private units give a process a mount namespace of its own, where a bpffs may
//! be missing. One that is mounted there dies with the process, and with it every pin, link and
//! program: the device would go on without protection. So a folder counts only if PID 1's mount
//! namespace shows the same file system (by device number: a bind mount elsewhere will do).

use super::AclError;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// Mounts of PID 1 (proc_pid_mountinfo(5)).
const FIRST_MOUNTS: &str = "/proc/1/mountinfo";

/// Makes the folder and those around it, where pins may live.
pub(super) fn prepare(folder: &Path) -> Result<(), AclError> {
    let existing = folder
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"));
    let pin_error = |source| AclError::Pin {
        path: folder.to_owned(),
        source,
    };
    let on = rustix::fs::statfs(existing).map_err(|error| pin_error(error.into()))?;
    if u64::try_from(on.f_type).unwrap_or(0) & 0xffff_ffff != BPF_FS_MAGIC {
        return Err(AclError::NoBpffs {
            path: folder.to_owned(),
        });
    }
    let device = fs::metadata(existing).map_err(pin_error)?.dev();
    let number = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    let mounts = fs::read_to_string(FIRST_MOUNTS).unwrap_or_default();
    if !shows(&mounts, &number) {
        return Err(AclError::PrivateBpffs {
            path: folder.to_owned(),
        });
    }
    fs::create_dir_all(folder).map_err(pin_error)
}

/// Whether these mounts hold the bpffs with this device number.
fn shows(mounts: &str, number: &str) -> bool {
    mounts.lines().any(|line| {
        let device = line.split(' ').nth(2);
        let kind = line
            .split_once(" - ")
            .and_then(|(_, after)| after.split(' ').next());
        device == Some(number) && kind == Some("bpf")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bpffs_counts_if_the_first_process_has_it_anywhere() {
        let mounts = "22 1 0:20 / /sys rw - sysfs sysfs rw\n\
                      31 22 0:31 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700\n\
                      32 22 0:44 / /run/lab/h1/bpf rw - bpf bpf rw\n";
        assert!(shows(mounts, "0:31"));
        assert!(shows(mounts, "0:44"));
        assert!(!shows(mounts, "0:20"), "another kind of file system");
        assert!(!shows(mounts, "0:45"), "a private one");
        assert!(!shows("", "0:31"), "nothing known is nothing seen");
    }

    #[test]
    fn an_ordinary_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = prepare(&folder.path().join("weir0")).unwrap_err();
        assert!(matches!(error, AclError::NoBpffs { .. }), "{error}");
    }
}
