//! One machine of a lab: a network namespace and a folder.
//!
//! Everything else of the machine is shared with the real one, but a bpffs: each host has its own,
//! mounted in the lab's mount namespace, so that what an agent pins there outlives the agent (see
//! [`Host::whole`]).

use std::net::{IpAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::{self, Output, Process};
use crate::topology::HostPlan;

/// How long an ordinary command may take. Generous: a lab may run on one slow emulated processor.
const COMMAND_BOUND: Duration = Duration::from_secs(60);

/// A machine of a lab.
#[derive(Debug)]
pub struct Host {
    /// Its name in the topology.
    pub name: String,
    /// The name of its network namespace, as `ip netns` knows it.
    pub netns: String,
    /// Its own files: logs, state of what runs on it, its bpffs at `bpf`.
    pub folder: PathBuf,
    /// Its addresses on the topology's switches, in order.
    pub addrs: Vec<IpAddr>,
    namespace: OwnedFd,
    /// What runs in the background; ended by the lab, after it has looked at the damage.
    processes: Mutex<Vec<Arc<Process>>>,
}

impl Host {
    /// A host whose namespace exists, with a folder and a bpffs of its own.
    pub(crate) fn new(plan: &HostPlan, netns: &str, folder: PathBuf) -> anyhow::Result<Self> {
        for dir in ["bpf", "run", "state"] {
            std::fs::create_dir_all(folder.join(dir))?;
        }
        let bpf = folder.join("bpf");
        rustix::mount::mount("bpf", &bpf, "bpf", rustix::mount::MountFlags::empty(), None)
            .with_context(|| format!("cannot mount a bpffs on {}", bpf.display()))?;
        let namespace = std::fs::File::open(Path::new("/run/netns").join(netns))?;
        let links = plan.links.iter().flat_map(|(_, addrs)| addrs);
        let addr = |cidr: &String| cidr.split('/').next().unwrap_or_default().parse();
        Ok(Self {
            name: plan.name.clone(),
            netns: netns.to_owned(),
            folder,
            addrs: links.map(addr).collect::<Result<_, _>>()?,
            namespace: namespace.into(),
            processes: Mutex::default(),
        })
    }

    /// Its first IPv4 address on a switch.
    ///
    /// # Panics
    /// If the topology gives it none.
    #[must_use]
    pub fn v4(&self) -> IpAddr {
        let found = self.addrs.iter().copied().find(IpAddr::is_ipv4);
        found.expect("the topology gives this host an IPv4 address")
    }

    /// Its first IPv6 address on a switch.
    ///
    /// # Panics
    /// If the topology gives it none.
    #[must_use]
    pub fn v6(&self) -> IpAddr {
        let found = self.addrs.iter().copied().find(IpAddr::is_ipv6);
        found.expect("the topology gives this host an IPv6 address")
    }

    /// Does `work` in the host's network namespace, on a thread of its own. A socket made there
    /// stays there, wherever it is used; so does a process.
    ///
    /// # Panics
    /// If the namespace cannot be entered (only root may), or when `work` does.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        use std::os::fd::AsFd;
        let inside = || {
            move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("root can enter a network namespace that it made");
            work()
        };
        let ended = std::thread::scope(|scope| scope.spawn(inside).join());
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs a command line (split at blanks) to its end, whatever that is.
    ///
    /// # Errors
    /// If it cannot be started or does not end in time.
    pub fn output(&self, line: &str) -> anyhow::Result<Output> {
        self.output_with(line, "", COMMAND_BOUND)
    }

    /// The same with something on stdin and a bound of the caller's.
    ///
    /// # Errors
    /// If it cannot be started or does not end in time.
    pub fn output_with(&self, line: &str, input: &str, bound: Duration) -> anyhow::Result<Output> {
        let mut command = self.command(line)?;
        self.enter(|| process::run(&mut command, input, bound))
    }

    /// Runs a command line that has to succeed.
    ///
    /// # Errors
    /// If it does not.
    pub fn run(&self, line: &str) -> anyhow::Result<Output> {
        self.output(line)?
            .success()
            .with_context(|| format!("on {}", self.name))
    }

    /// The same with something on stdin.
    ///
    /// # Errors
    /// If it does not succeed.
    pub fn run_with(&self, line: &str, input: &str) -> anyhow::Result<Output> {
        let output = self.output_with(line, input, COMMAND_BOUND)?;
        output
            .success()
            .with_context(|| format!("on {}", self.name))
    }

    /// Starts a command line in the background; it ends with the lab at the latest. Its output
    /// goes to `NAME.log` in the host's folder.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&self, name: &str, line: &str) -> anyhow::Result<Arc<Process>> {
        let command = self.command(line)?;
        self.start_command(name, command)
    }

    /// The same, with all of the host: see [`Host::whole`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_whole(&self, name: &str, line: &str) -> anyhow::Result<Arc<Process>> {
        let command = self.whole(line)?;
        self.start_command(name, command)
    }

    /// The same with a command that was made ready before.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_command(&self, name: &str, mut command: Command) -> anyhow::Result<Arc<Process>> {
        let log = self.folder.join(format!("{name}.log"));
        let process = self.enter(|| Process::start(name, &mut command, &log))?;
        let process = Arc::new(process);
        let mut processes = self
            .processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        processes.push(Arc::clone(&process));
        Ok(process)
    }

    /// A command that sees the whole host: its network namespace, the `/sys` that belongs to it,
    /// its bpffs at `/sys/fs/bpf` and its own `/run/weir`.
    ///
    /// `ip netns exec` makes a mount namespace with a fresh `/sys`, where no bpffs is mounted. One
    /// mounted there would die with the process, and with it every pin. So the host's bpffs, which
    /// is mounted outside, is bound into place.
    ///
    /// # Errors
    /// If the line names one of our binaries that is not built.
    pub fn whole(&self, line: &str) -> anyhow::Result<Command> {
        let inner = self.command(line)?;
        let mut command = Command::new("ip");
        let place = "mkdir -p /run/weir && mount --bind \"$1/run\" /run/weir \
                     && mount --bind \"$1/bpf\" /sys/fs/bpf && shift && exec \"$@\"";
        command.args(["netns", "exec", &self.netns, "sh", "-c", place, "sh"]);
        command
            .arg(&self.folder)
            .arg(inner.get_program())
            .args(inner.get_args());
        Ok(command)
    }

    /// A shell script that runs its arguments in all of the host, or a shell.
    pub(crate) fn door(&self) -> anyhow::Result<String> {
        let whole = self.whole("env")?;
        let quoted =
            |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"));
        let words: Vec<String> = whole.get_args().map(quoted).collect();
        let prompt = format!("PS1='{}$ '", self.name);
        let command = format!("exec ip {} {prompt}", words.join(" "));
        Ok(format!(
            "#!/bin/sh\n[ $# -gt 0 ] || set -- sh -i\n{command} \"$@\"\n"
        ))
    }

    /// A command line, with our binaries found where they were built.
    fn command(&self, line: &str) -> anyhow::Result<Command> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        let program = match program {
            "weir" | "weir-coordinator" | "weir-relay" => crate::binary(program)?,
            other => PathBuf::from(other),
        };
        let mut command = Command::new(program);
        command
            .args(words)
            .current_dir(&self.folder)
            .env("LC_ALL", "C");
        Ok(command)
    }

    /// Runs several `ip` commands, one a line, in one process.
    ///
    /// # Errors
    /// If one of them fails.
    pub fn ip(&self, batch: &str) -> anyhow::Result<()> {
        self.run_with("ip -batch -", batch).map(drop)
    }

    /// A TCP listener on the host.
    ///
    /// # Errors
    /// If the address is taken or not the host's.
    pub fn listen(&self, addr: IpAddr, port: u16) -> anyhow::Result<TcpListener> {
        let made = self.enter(|| TcpListener::bind((addr, port)));
        made.with_context(|| format!("cannot listen on {addr} port {port} of {}", self.name))
    }

    /// A UDP socket on the host.
    ///
    /// # Errors
    /// If the address is taken or not the host's.
    pub fn udp(&self, addr: IpAddr, port: u16) -> anyhow::Result<UdpSocket> {
        let made = self.enter(|| UdpSocket::bind((addr, port)));
        made.with_context(|| format!("cannot bind UDP {addr} port {port} of {}", self.name))
    }

    /// What was started in the background, in order.
    #[must_use]
    pub fn processes(&self) -> Vec<Arc<Process>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Ends all that runs on the host, the youngest first, and takes the bpffs away.
    pub(crate) fn end(&self) {
        for process in self.processes().iter().rev() {
            process.kill();
        }
        // Fails only if it is not mounted any more.
        let _gone =
            rustix::mount::unmount(self.folder.join("bpf"), rustix::mount::UnmountFlags::DETACH);
    }
}
