//! `cargo xtask vm -- CMD`: runs CMD as root in a throw-away kernel that has WireGuard.
//!
//! The guest sees the host's root file system with every change thrown away, the checkout at its
//! own path, and a results folder (`WEIR_RESULTS`) that is written through. Output is streamed
//! byte for byte, the exit code is passed on; 123 means that the guest's kernel hung, 124 timed
//! out, 125 that the guest died.
//!
//! Four ways to such a kernel, the first possible one is taken: the `host`'s own (namespaces),
//! a stock kernel under real `kvm`, User Mode Linux (`uml`), and emulation (`tcg`).
//! How it hangs together: this process resolves a [`Job`] (all that takes time or may fail is
//! done here, with words) and hands it to a *guard*, a process of its own session that starts
//! the guest, watches it, and removes every trace. The guard lives on a pipe whose other end
//! only we hold: whatever way we die, SIGKILL included, it sees the end of that pipe.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::house;

pub mod guard;
mod guest;
mod host;
mod kernels;
mod qemu;
mod uml;

/// Exit code of a guest whose kernel hung.
pub const SILENT: u8 = 123;
/// Exit code of a guest that was stopped because its time was over.
pub const TIMED_OUT: u8 = 124;
/// Exit code of a guest that died without saying how its command ended.
pub const DIED: u8 = 125;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    wish: Wish,
    /// Stop the guest after this many seconds (exit code 124)
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// Processors of a kvm or tcg guest (uml has one)
    #[arg(long, default_value_t = 2, value_name = "N")]
    cpus: u32,
    /// Memory of the guest
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    mem: u32,
    /// Write changes under this folder through to the host (may be repeated)
    #[arg(long, value_name = "DIR")]
    rw: Vec<PathBuf>,
    /// Set a variable for the command (may be repeated)
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Give the command this terminal
    #[arg(long)]
    tty: bool,
    /// Show the guest kernel's log on stderr
    #[arg(long, short)]
    verbose: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Which kernel somebody would like to have.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Wish {
    /// Where to run; without it the first possible of host, kvm, uml, tcg
    #[arg(long, value_enum)]
    pub backend: Option<Backend>,
    /// A stock Debian kernel, 6.12 or 6.1 (kvm and tcg)
    #[arg(long, value_name = "VERSION")]
    pub kernel: Option<String>,
    /// Let the guest's clock count its instructions: 1 ns is one (tcg)
    #[arg(long)]
    pub icount: bool,
}

/// The four ways to a kernel with WireGuard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Backend {
    /// The host's own kernel, in namespaces
    Host,
    /// A stock kernel in QEMU on real KVM
    Kvm,
    /// User Mode Linux
    Uml,
    /// A stock kernel in QEMU, emulated
    Tcg,
}

/// A kernel that is ready to be started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Machine {
    /// The host's own kernel, in namespaces.
    Host,
    /// A stock kernel in QEMU; with `icount`, its clock counts instructions.
    Qemu {
        qemu: PathBuf,
        accel: Accel,
        release: String,
        image: PathBuf,
        initramfs: PathBuf,
        icount: bool,
    },
    /// User Mode Linux: a kernel that is a program.
    Uml { kernel: PathBuf },
}

impl Machine {
    /// A word for it, also the guest's variable `WEIR_VM`.
    pub fn name(&self) -> &'static str {
        match self {
            Machine::Host => "host",
            Machine::Qemu {
                accel: Accel::Kvm, ..
            } => "kvm",
            Machine::Qemu {
                accel: Accel::Tcg, ..
            } => "tcg",
            Machine::Uml { .. } => "uml",
        }
    }
}

/// What runs a QEMU guest's instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Accel {
    Kvm,
    Tcg,
}

/// All that a guard needs to know to run one command in one guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    pub machine: Machine,
    pub command: Vec<String>,
    pub cwd: PathBuf,
    pub env: BTreeMap<String, String>,
    /// Folders that are written through to the host.
    pub rw: Vec<PathBuf>,
    pub timeout: Duration,
    pub cpus: u32,
    pub mem_mib: u32,
    /// The terminal to give to the command, by a path that the guard can open.
    pub tty: Option<PathBuf>,
    pub verbose: bool,
}

impl Job {
    /// A job with the defaults of the command line, in the current folder.
    pub fn new(machine: Machine, command: Vec<String>) -> anyhow::Result<Job> {
        let results = house::results()?;
        let mut env = inherited_env();
        env.insert("WEIR_VM".into(), machine.name().into());
        env.insert(
            "WEIR_RESULTS".into(),
            results.to_string_lossy().into_owned(),
        );
        Ok(Job {
            machine,
            command,
            cwd: std::env::current_dir().context("the current folder is gone")?,
            env,
            rw: vec![results],
            timeout: Duration::from_secs(600),
            cpus: 2,
            mem_mib: 2048,
            tty: None,
            verbose: false,
        })
    }

    /// Starts the guest. It dies with this process, and when the returned value is dropped.
    pub fn start(&self, stdout: Stdio, stderr: Stdio) -> anyhow::Result<Guest> {
        let mut guard = self
            .guard_command()?
            .arg("__guard")
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .context("cannot start the guard process")?;
        let mut lifeline = guard.stdin.take().context("the guard has no lifeline")?;
        let mut line = serde_json::to_string(self)?;
        line.push('\n');
        lifeline
            .write_all(line.as_bytes())
            .context("the guard died at once")?;
        Ok(Guest {
            guard,
            lifeline: Some(lifeline),
        })
    }

    /// Whether the guest says every few seconds that its kernel lives. Where the clock counts
    /// instructions, that would count too, and time runs at no pace one could wait for.
    pub fn beats(&self) -> bool {
        matches!(self.machine, Machine::Qemu { icount: false, .. })
    }

    /// Runs a command that writes a file for the user. The guest writes it into the results
    /// folder, and what it wrote is copied: nothing else of the user's is open to the guest.
    pub fn written_for(
        mut self,
        file: &Path,
        name: &str,
        run: impl FnOnce(&mut Job, String) -> anyhow::Result<u8>,
    ) -> anyhow::Result<u8> {
        let folder = std::path::absolute(file)?;
        let folder = folder.parent().unwrap_or(Path::new("/"));
        anyhow::ensure!(folder.is_dir(), "there is no folder {}", folder.display());
        let written = house::results()?.join(name);
        // What an earlier run left must not pass for this one's.
        let _ = std::fs::remove_file(&written);
        let code = run(&mut self, written.display().to_string())?;
        if written.is_file() {
            std::fs::copy(&written, file)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(code)
    }

    /// Namespaces on the host need root; a guard with less could not clean up after them.
    fn guard_command(&self) -> anyhow::Result<Command> {
        let root = rustix::process::geteuid().is_root();
        if root || !matches!(self.machine, Machine::Host) {
            return Ok(Command::new("/proc/self/exe"));
        }
        let mut command = Command::new("sudo");
        command.arg("--").arg(std::env::current_exe()?);
        Ok(command)
    }
}

/// A running guest.
pub struct Guest {
    pub guard: Child,
    lifeline: Option<ChildStdin>,
}

impl Guest {
    /// Waits for the command to end and returns its exit code.
    pub fn wait(mut self) -> anyhow::Result<u8> {
        let status = self.guard.wait()?;
        Ok(status.code().map_or(DIED, |code| code as u8))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        // Nothing is left to be told if the guard cannot be waited for.
        let _ = self.guard.wait();
    }
}

pub fn run_verb(args: Args) -> anyhow::Result<u8> {
    let machine = pick(&args.wish)?;
    let mut job = Job::new(machine, args.command)?;
    job.env.extend(args.env);
    for folder in args.rw {
        let full = folder
            .canonicalize()
            .with_context(|| format!("--rw {}: no such folder", folder.display()))?;
        job.rw.push(full);
    }
    job.timeout = Duration::from_secs(args.timeout);
    job.cpus = args.cpus;
    job.mem_mib = args.mem;
    job.verbose = args.verbose;
    if args.tty {
        job.tty = Some(terminal()?);
    }
    job.start(Stdio::inherit(), Stdio::inherit())?.wait()
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or("expected NAME=VALUE, as in SEED=7")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Finds a kernel with WireGuard and says on stderr which one and why.
pub fn pick(wish: &Wish) -> anyhow::Result<Machine> {
    let say = |machine: &Machine, why: &str| eprintln!("xtask vm: {}: {why}", machine.name());
    let line = wish.kernel.as_deref();
    let stock = !matches!(wish.backend, Some(Backend::Host | Backend::Uml));
    anyhow::ensure!(
        stock || (line.is_none() && !wish.icount),
        "--kernel and --icount are for kvm and tcg: host and uml have one kernel each"
    );
    anyhow::ensure!(
        wish.backend != Some(Backend::Kvm) || !wish.icount,
        "--icount counts emulated instructions: use --backend tcg"
    );
    let machine = match wish.backend {
        Some(Backend::Host) => Machine::Host,
        Some(Backend::Kvm) => qemu::machine(Accel::Kvm, line, false)?,
        Some(Backend::Tcg) => qemu::machine(Accel::Tcg, line, wish.icount)?,
        Some(Backend::Uml) => uml::machine()?,
        None if line.is_some() || wish.icount => qemu::machine(Accel::Tcg, line, wish.icount)?,
        None => return first_possible(),
    };
    say(&machine, "as asked for");
    Ok(machine)
}

/// The first possible of host, kvm, uml, tcg.
fn first_possible() -> anyhow::Result<Machine> {
    let mut why = String::new();
    let candidates: [fn() -> Result<Machine, String>; 4] = [
        || host::probe().map_err(|reason| format!("host: {reason}")),
        || qemu::probe_kvm().map_err(|reason| format!("kvm: {reason}")),
        || uml::machine().map_err(|reason| format!("uml: {reason:#}")),
        || qemu::machine(Accel::Tcg, None, false).map_err(|reason| format!("tcg: {reason:#}")),
    ];
    for candidate in candidates {
        match candidate() {
            Ok(machine) => {
                let rest = if why.is_empty() {
                    String::new()
                } else {
                    format!(" (not {why})")
                };
                eprintln!("xtask vm: running in {}{rest}", machine.name());
                return Ok(machine);
            }
            Err(reason) => {
                if !why.is_empty() {
                    why.push_str("; ");
                }
                why.push_str(&reason);
            }
        }
    }
    anyhow::bail!("no kernel with WireGuard can be had here: {why}")
}

/// The lines of stock kernels that programs must load on.
pub const STOCK_KERNELS: [&str; 2] = kernels::VERSIONS;

/// An emulated machine with a stock kernel, or why there is none.
pub fn stock(line: &str) -> Result<Machine, String> {
    qemu::machine(Accel::Tcg, Some(line), false).map_err(|error| format!("{error:#}"))
}

/// The host's own kernel for eBPF programs alone, which need no WireGuard, or why not.
pub fn host_for_bpf() -> Result<Machine, String> {
    host::probe_bpf()
}

/// A UML machine, unless a kernel would have to be built that nobody else needs.
pub fn uml_if_ready(wish: &Wish) -> Result<Machine, String> {
    if wish.backend == Some(Backend::Uml) || uml::is_ready() {
        return uml::machine().map_err(|error| format!("{error:#}"));
    }
    Err("no UML kernel is at hand, and the lab needs none here".into())
}

/// The terminal on our stdin, by a path that another process can open.
pub fn terminal() -> anyhow::Result<PathBuf> {
    anyhow::ensure!(
        std::io::stdin().is_terminal(),
        "stdin is no terminal to give to the command"
    );
    Ok(PathBuf::from(format!("/proc/{}/fd/0", std::process::id())))
}

/// What the command sees of our environment: only what steers tests and programs of this house.
fn inherited_env() -> BTreeMap<String, String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut env: BTreeMap<String, String> = std::env::vars()
        .filter(|(name, _)| {
            name.starts_with("WEIR_")
                || matches!(
                    name.as_str(),
                    "RUST_LOG" | "RUST_BACKTRACE" | "SEED" | "TERM"
                )
        })
        .collect();
    env.insert(
        "PATH".into(),
        format!("/usr/local/sbin:/usr/sbin:/sbin:{path}"),
    );
    env.insert("HOME".into(), "/root".into());
    env.insert("USER".into(), "root".into());
    env
}
