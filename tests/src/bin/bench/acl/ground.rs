//! A network namespace for each contender: frames come in by one device and are forwarded to
//! another, on which (or before which) the contender decides.
//!
//! ```text
//! live frames ─► in0 ─► routing ─► FORWARD, POSTROUTING ─► weirbench0 ─► gone
//!                                  iptables, conntrack     netdev egress: nftables
//!                                                          tc egress: weir
//! ```
//!
//! The second device is a TUN that nobody reads: like WireGuard it has no link layer, and what it
//! is given is dropped at once. A namespace is gone with its last handle, so nothing is left.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use agent::kernel::bpf::{Acl, Options, detach_and_unpin};
use anyhow::Context;
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use tests::process::{self, Output};

use super::frames::{self, DEVICE_MAC};
use super::rules::OUT;

/// Where frames come in.
const IN: &str = "in0";
/// 100,000 rules, one after the other, are slow to load.
const COMMAND_BOUND: Duration = Duration::from_secs(300);

/// As tc's programs say it (include/uapi/linux/pkt_cls.h).
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;

/// Numbers the folders for pins.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A namespace with its two devices.
pub struct Ground {
    namespace: File,
    /// Index of the device that frames come in by.
    pub arrival: u32,
    /// Index of the device that they leave by.
    departure: u32,
}

impl Ground {
    /// Makes one.
    pub fn make() -> anyhow::Result<Self> {
        std::thread::scope(|scope| {
            let made = scope.spawn(Self::make_here).join();
            made.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The same, in this thread, which stays inside.
    #[allow(
        deprecated,
        reason = "only descriptor tables make it unsafe to unshare, and none is unshared here"
    )]
    fn make_here() -> anyhow::Result<Self> {
        rustix::thread::unshare(UnshareFlags::NEWNET)
            .context("cannot make a network namespace: run as root")?;
        let mac = DEVICE_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let lines = format!(
            "link set lo up\n\
             tuntap add {IN} mode tap\n\
             link set {IN} address {mac} up\n\
             tuntap add {OUT} mode tun\n\
             link set {OUT} up\n\
             route add 100.64.0.0/10 dev {OUT}\n"
        );
        for (name, value) in [
            ("ipv6/conf/all/disable_ipv6", "1"),
            ("ipv4/ip_forward", "1"),
            ("ipv4/ip_early_demux", "0"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ] {
            set(name, value)?;
        }
        let mut ip = Command::new("ip");
        process::run(ip.args(["-batch", "-"]), &lines, COMMAND_BOUND)?.success()?;
        Ok(Self {
            namespace: File::open("/proc/thread-self/ns/net")?,
            arrival: index(IN)?,
            departure: index(OUT)?,
        })
    }

    /// Moves this thread here.
    pub fn enter(&self) -> anyhow::Result<()> {
        Ok(move_into_link_name_space(
            self.namespace.as_fd(),
            Some(LinkNameSpaceType::Network),
        )?)
    }

    /// Sets a variable of `/proc/sys/net` here. This thread then is here too.
    pub fn set(&self, name: &str, value: &str) -> anyhow::Result<()> {
        self.enter()?;
        set(name, value)
    }

    /// Runs a command here to its good end.
    pub fn run(&self, words: &[&str], input: &str) -> anyhow::Result<Output> {
        let [program, arguments @ ..] = words else {
            anyhow::bail!("no command");
        };
        let mut command = Command::new(program);
        command.args(arguments);
        let inside = || {
            self.enter()?;
            process::run(&mut command, input, COMMAND_BOUND)?.success()
        };
        std::thread::scope(|scope| {
            let ended = scope.spawn(inside).join();
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A program on the device that lets everything pass, or nothing: what being asked costs.
    pub fn empty(&self, passes: bool) -> anyhow::Result<Ebpf> {
        self.enter()?;
        let action = if passes { TC_ACT_UNSPEC } else { TC_ACT_SHOT };
        let mut loaded = EbpfLoader::new().btf(None).load(&frames::empty(action))?;
        let program = loaded.program_mut(frames::EMPTY).context("no program")?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load()?;
        program.attach(OUT, TcAttachType::Egress)?;
        Ok(loaded)
    }

    /// weir's programs on the device, without a policy yet. This thread must be here.
    pub fn weir(&self) -> anyhow::Result<Weir> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = format!("/sys/fs/bpf/weir-bench-{}-{number}", std::process::id());
        let folder = PathBuf::from(folder);
        // Before it can fail, so that whatever it pins is removed.
        let mut weir = Weir { acl: None, folder };
        weir.acl = Some(Acl::open(
            OUT,
            self.departure,
            &weir.folder,
            Options::default(),
        )?);
        Ok(weir)
    }
}

/// Programs on a device; gone when dropped.
pub struct Weir {
    acl: Option<Acl>,
    folder: PathBuf,
}

impl Weir {
    /// The programs.
    pub fn acl(&mut self) -> anyhow::Result<&mut Acl> {
        self.acl.as_mut().context("already detached")
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        self.acl = None;
        if let Err(error) = detach_and_unpin(OUT, &self.folder) {
            eprintln!("bench: {} is left behind: {error}", self.folder.display());
        }
    }
}

fn set(name: &str, value: &str) -> anyhow::Result<()> {
    let file = PathBuf::from("/proc/sys/net").join(name);
    // A kernel without IPv6 has nothing to switch off.
    if file.exists() {
        std::fs::write(&file, value).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

fn index(device: &str) -> anyhow::Result<u32> {
    let mut ip = Command::new("ip");
    let shown = process::run(ip.args(["-o", "link", "show", device]), "", COMMAND_BOUND)?;
    let shown = shown.success()?.stdout;
    let number = shown.split(':').next().unwrap_or_default().trim();
    number.parse().with_context(|| format!("no index: {shown}"))
}
