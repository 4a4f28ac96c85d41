//! A device for the programs: a TUN in a network namespace of its own, and a folder for pins.

use agent::kernel::bpf::{Acl, Options, detach_and_unpin};
use ebpf::abi::Direction;
use ebpf::verdict::Verdict;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Name of the device; each bed has its own namespace.
pub const DEVICE: &str = "weirtest0";
const BPFFS: &str = "/sys/fs/bpf";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Removed with everything in it when dropped; after a failure the maps' contents are left behind.
pub struct Bed {
    pub folder: PathBuf,
    name: String,
}

impl Bed {
    /// Moves this thread into a new network namespace with the device in it. `None`, and a skip
    /// under the test's `name`, where that is not allowed.
    pub fn make(name: &str) -> Option<Self> {
        if let Err(reason) = prepare() {
            tests::skip(name, &reason);
            return None;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = format!("{BPFFS}/weir-test-{}-{number}", std::process::id());
        ip(&["tuntap", "add", DEVICE, "mode", "tun"]);
        Some(Self {
            folder: PathBuf::from(folder),
            name: name.to_owned(),
        })
    }

    /// Its index now.
    pub fn index(&self) -> u32 {
        index_of(DEVICE)
    }

    pub fn open(&self, options: Options) -> Acl {
        Acl::open(DEVICE, self.index(), &self.folder, options).unwrap()
    }

    /// Writes what the maps hold, as whoever looks into the failure would ask for next. By taking
    /// the maps over, as an agent does after a crash.
    fn leave_evidence(&self) -> Option<PathBuf> {
        let index = try_index_of(DEVICE)?;
        let acl = Acl::open(DEVICE, index, &self.folder, Options::default()).ok()?;
        let file = tests::lab::results().join(format!("{}.maps.txt", self.name));
        std::fs::create_dir_all(file.parent()?).ok()?;
        std::fs::write(&file, acl.dump().ok()?).ok()?;
        Some(file)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(file) = self.leave_evidence()
        {
            eprintln!("the maps, as they were: {}", file.display());
        }
        let _ = detach_and_unpin(DEVICE, &self.folder);
    }
}

/// The index of a device of this namespace.
pub fn index_of(device: &str) -> u32 {
    try_index_of(device).unwrap()
}

fn try_index_of(device: &str) -> Option<u32> {
    let mut ip = Command::new("ip");
    let output = ip.args(["-o", "link", "show", device]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split(':').next()?.trim().parse().ok()
}

pub fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {}", arguments.join(" "));
}

/// Gives this thread, and no other, a network namespace of its own.
#[allow(
    deprecated,
    reason = "only descriptor tables make it unsafe to unshare, and none is unshared here"
)]
fn enter_new_network() -> std::io::Result<()> {
    Ok(rustix::thread::unshare(
        rustix::thread::UnshareFlags::NEWNET,
    )?)
}

/// Why tests of the kernel cannot run here, if so.
fn prepare() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("needs root".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Err("needs TUN devices".to_owned());
    }
    let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !mounted
        .lines()
        .any(|line| line.contains(&format!(" {BPFFS} ")))
    {
        let status = Command::new("mount")
            .args(["-t", "bpf", "bpf", BPFFS])
            .status();
        if !status.is_ok_and(|status| status.success()) {
            return Err(format!("cannot mount a bpffs at {BPFFS}"));
        }
    }
    enter_new_network().map_err(|error| format!("needs network namespaces: {error}"))
}

/// What the programs did with a packet: the one counter that it raised.
pub fn send(acl: &Acl, direction: Direction, packet: &[u8]) -> Verdict {
    let before = counters(acl);
    let run = acl.run(direction, packet, 1).unwrap();
    let raised: Vec<Verdict> = counters(acl)
        .into_iter()
        .filter(|(key, count)| before[key] != *count)
        .map(|((_, verdict), _)| verdict)
        .collect();
    assert_eq!(raised.len(), 1, "one packet, one counter: {raised:?}");
    assert_eq!(run.passes, raised[0].passes(), "{:?}", raised[0]);
    raised[0]
}

pub fn counters(acl: &Acl) -> BTreeMap<(Direction, Verdict), u64> {
    let counters = acl.counters().unwrap().into_iter();
    counters
        .map(|(direction, verdict, packets)| ((direction, verdict), packets))
        .collect()
}
