//! User Mode Linux: a kernel that runs as an ordinary process, without any privilege.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::guest::Folder;
use super::{Job, Machine};

/// A UML kernel: the one that `WEIR_UML` names.
pub fn machine() -> anyhow::Result<Machine> {
    let given = std::env::var_os("WEIR_UML").context("WEIR_UML is not set")?;
    let kernel = PathBuf::from(given);
    anyhow::ensure!(
        kernel.is_file(),
        "WEIR_UML={}: no such file",
        kernel.display()
    );
    Ok(Machine::Uml { kernel })
}

/// The kernel's command line. `{in}`, `{out}` and `{err}` become descriptors at launch.
pub fn argv(job: &Job, kernel: &Path, folder: &Folder) -> Vec<String> {
    let work = folder.path.display();
    let keyboard = if job.tty.is_some() { "fd:{in}" } else { "null" };
    let mut argv = vec![
        kernel.display().to_string(),
        format!("mem={}M", job.mem_mib),
        "root=/dev/root".into(),
        "rootfstype=hostfs".into(),
        "rootflags=/".into(),
        "ro".into(),
        format!("init={work}/init"),
        "con=null".into(),
        "ssl=null".into(),
        // The kernel's own words go to descriptor 1, which is the log.
        "con0=null,fd:1".into(),
        format!("con1={keyboard},fd:{{out}}"),
        "con2=null,fd:{err}".into(),
        "stderr=0".into(),
        "umid=guest".into(),
        format!("uml_dir={work}/"),
        // A guest that restarts would run its command again: let it end.
        "panic=-1".into(),
        "noreboot".into(),
        "random.trust_cpu=1".into(),
    ];
    if !job.verbose {
        argv.push("quiet".into());
    }
    argv
}

/// A folder for the guest's memory file: UML maps it executable and sparse.
pub fn memory_folder(mem_mib: u32) -> PathBuf {
    let need = u64::from(mem_mib) << 20;
    let fits = |dir: &PathBuf| {
        rustix::fs::statvfs(dir).is_ok_and(|fs| {
            !fs.f_flag.contains(rustix::fs::StatVfsMountFlags::NOEXEC)
                && fs.f_bavail * fs.f_frsize >= need
        }) && rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok()
    };
    let temp = std::env::temp_dir();
    [PathBuf::from("/dev/shm"), temp.clone(), "/var/tmp".into()]
        .into_iter()
        .find(fits)
        .unwrap_or(temp)
}
