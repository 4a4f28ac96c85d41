//! User Mode Linux: a kernel that runs as an ordinary process, without any privilege.
//!
//! Distributions' UML kernels have no WireGuard, so ours is built once from Debian's package
//! `linux-source-6.12` with the options of `xtask/vm/uml.config` (about 18 minutes of one
//! processor) and kept in the cache until source, options or compiler change.

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::guest::Folder;
use super::{Job, Machine};
use crate::{house, setup};

const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";
const OPTIONS: &str = include_str!("../../vm/uml.config");
/// Without one of these the kernel is useless to us, whatever else it has.
const INDISPENSABLE: [&str; 12] = [
    "WIREGUARD",
    "BPF_SYSCALL",
    "NET_XGRESS",
    "NET_CLS_BPF",
    "NF_TABLES",
    "VETH",
    "TUN",
    "DUMMY",
    "NET_SCH_NETEM",
    "DEBUG_INFO_BTF",
    "HOSTFS",
    "OVERLAY_FS",
];

/// A UML kernel: the one that `WEIR_UML` names, else the cached one, else a newly built one.
pub fn machine() -> anyhow::Result<Machine> {
    anyhow::ensure!(
        cfg!(target_arch = "x86_64"),
        "User Mode Linux is for x86-64 hosts only"
    );
    if let Some(given) = std::env::var_os("WEIR_UML").filter(|given| !given.is_empty()) {
        let kernel = PathBuf::from(given);
        anyhow::ensure!(
            kernel.is_file(),
            "WEIR_UML={}: no such file",
            kernel.display()
        );
        return Ok(Machine::Uml { kernel });
    }
    let store = house::cache()?.join("uml");
    fs::create_dir_all(&store)?;
    if !Path::new(SOURCE).exists()
        && let Some(kernel) = any_cached(&store)
    {
        return Ok(Machine::Uml { kernel });
    }
    if setup::Family::here()? != setup::Family::Debian {
        anyhow::bail!(
            "building it needs Debian's package linux-source-6.12, which this distribution lacks; \
             set WEIR_UML to a kernel built on Debian, or load the module wireguard for `host`"
        );
    }
    setup::ensure(&[setup::Purpose::Uml])?;
    let kernel = store.join(format!("linux-{}", stamp()?));
    if !kernel.is_file() {
        // Two xtasks must not build the same kernel at the same time.
        let lock = fs::File::create(store.join("lock"))?;
        let at_once = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        if rustix::fs::flock(&lock, at_once).is_err() {
            eprintln!("xtask vm: waiting for another xtask that builds the UML kernel");
            rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
        }
        if !kernel.is_file() {
            build(&store, &kernel)?;
        }
    }
    Ok(Machine::Uml { kernel })
}

/// Whether a kernel could be had at once, without building one.
pub fn is_ready() -> bool {
    std::env::var_os("WEIR_UML").is_some_and(|kernel| Path::new(&kernel).is_file())
        || house::cache().is_ok_and(|cache| any_cached(&cache.join("uml")).is_some())
}

fn any_cached(store: &Path) -> Option<PathBuf> {
    let mut kernels: Vec<PathBuf> = fs::read_dir(store)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("linux-"))
        })
        .collect();
    kernels.sort();
    kernels.pop()
}

/// Changes when source, options or tools do. The package sets the tarball's time and size, so
/// reading all of it at every start is not needed.
fn stamp() -> anyhow::Result<String> {
    let source = fs::metadata(SOURCE)?;
    let mut hash = Sha256::new();
    hash.update(OPTIONS);
    hash.update(source.len().to_le_bytes());
    hash.update(format!("{:?}", source.modified()?));
    for tool in ["cc", "pahole"] {
        let version = Command::new(tool).arg("--version").output();
        hash.update(
            version
                .with_context(|| format!("cannot run {tool}"))?
                .stdout,
        );
    }
    Ok(hash
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn build(store: &Path, kernel: &Path) -> anyhow::Result<()> {
    let start = Instant::now();
    let work = store.join("build");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(work.join("out"))?;
    eprintln!(
        "xtask vm: building a User Mode Linux kernel with WireGuard from {SOURCE}; \
         once, about 18 minutes of processor time"
    );
    let log = store.join("build.log");
    let steps = Steps {
        log: fs::File::create(&log)?,
        jobs: house::processors(),
    };
    let built = steps
        .all(&work)
        .with_context(|| format!("the log is {}", log.display()))?;
    fs::copy(&built, work.join("linux.new"))?;
    fs::rename(work.join("linux.new"), kernel)?;
    fs::remove_dir_all(&work)?;
    eprintln!(
        "xtask vm: built in {} s, kept as {}",
        start.elapsed().as_secs(),
        kernel.display()
    );
    Ok(())
}

struct Steps {
    log: fs::File,
    jobs: usize,
}

impl Steps {
    fn all(&self, work: &Path) -> anyhow::Result<PathBuf> {
        self.run(
            "unpacking",
            Command::new("tar")
                .arg("-C")
                .arg(work)
                .arg("-xf")
                .arg(SOURCE),
        )?;
        let tree = fs::read_dir(work)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.join("Kconfig").is_file())
            .context("the source package holds no kernel")?;
        allow_unaligned_access(&tree)?;
        let out = work.join("out");
        let fragment = work.join("options");
        fs::write(&fragment, OPTIONS)?;
        self.run("configuring", make(&tree, &out).arg("allnoconfig"))?;
        let mut merge = Command::new("scripts/kconfig/merge_config.sh");
        merge.current_dir(&tree).arg("-m").arg("-O").arg(&out);
        self.run("configuring", merge.arg(out.join(".config")).arg(&fragment))?;
        self.run("configuring", make(&tree, &out).arg("olddefconfig"))?;
        let config = fs::read_to_string(out.join(".config"))?;
        for option in INDISPENSABLE {
            let line = format!("CONFIG_{option}=y");
            anyhow::ensure!(
                config.lines().any(|have| have == line),
                "{line} was not accepted"
            );
        }
        self.run(
            "compiling",
            make(&tree, &out)
                .arg(format!("-j{}", self.jobs))
                .arg("linux"),
        )?;
        let kernel = out.join("linux");
        self.run(
            "stripping",
            Command::new("strip").arg("--strip-debug").arg(&kernel),
        )?;
        Ok(kernel)
    }

    /// Runs one step, its words into the log, on a terminal with a count of what make did.
    fn run(&self, what: &str, command: &mut Command) -> anyhow::Result<()> {
        let start = Instant::now();
        let show = std::io::stderr().is_terminal();
        let mut log = self.log.try_clone()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?);
        let mut child = child
            .spawn()
            .with_context(|| format!("{what}: cannot start {command:?}"))?;
        let lines = child.stdout.take().map(BufReader::new).map(BufRead::lines);
        for (count, line) in lines.into_iter().flatten().enumerate() {
            writeln!(log, "{}", line?)?;
            if show && count % 10 == 0 {
                eprint!(
                    "\r  {what}: {count} files, {} s ",
                    start.elapsed().as_secs()
                );
            }
        }
        if show {
            eprint!("\r\x1b[K");
        }
        anyhow::ensure!(child.wait()?.success(), "{what} the kernel failed");
        Ok(())
    }
}

fn make(tree: &Path, out: &Path) -> Command {
    let mut make = Command::new("make");
    make.current_dir(tree)
        .arg("ARCH=um")
        .arg(format!("O={}", out.display()));
    // The same kernel from the same source, wherever and whenever.
    make.args([
        "KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970",
        "KBUILD_BUILD_USER=weir",
    ]);
    make.args(["KBUILD_BUILD_HOST=weir", "KBUILD_BUILD_VERSION=1"]);
    make
}

/// x86 can do unaligned loads. 6.12's UML does not say so, and then the BPF verifier insists on
/// aligned packet access and refuses every ordinary program on an L3 device; 7.x says so.
fn allow_unaligned_access(tree: &Path) -> anyhow::Result<()> {
    let file = tree.join("arch/x86/um/Kconfig");
    let text = fs::read_to_string(&file)?;
    if text.contains("HAVE_EFFICIENT_UNALIGNED_ACCESS") {
        return Ok(());
    }
    let anchor = "\tselect DCACHE_WORD_ACCESS\n";
    anyhow::ensure!(
        text.contains(anchor),
        "{} is not as expected",
        file.display()
    );
    let better = format!("{anchor}\tselect HAVE_EFFICIENT_UNALIGNED_ACCESS\n");
    fs::write(&file, text.replacen(anchor, &better, 1))?;
    Ok(())
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
