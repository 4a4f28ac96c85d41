//! The guard before WireGuard's UDP port, on the interfaces of the underlay (`ebpf/src/guard.rs`
//! says what it does).
//!
//! ```text
//! /sys/fs/bpf/weir/weir0:guard/maps-N/MAP   the maps of one version
//!                             /driver-I     XDP in the driver of interface I, a link
//!                             /stack-I      tcx at its ingress, a link
//!                             /filter-I     a filter of its clsact qdisc, the program (below 6.6)
//!                             /qdisc-I      the same once more: the qdisc is ours, too
//! ```
//!
//! [`Guard::set`] makes that what is wanted, whatever was there: an earlier agent's programs are
//! replaced in place, interfaces that are no part of the underlay any more are left. It is no step
//! of the plan, because nothing depends on it: a guard that cannot be attached is a remark in
//! `weir status`, and the device comes up all the same.
//!
//! **XDP only in a card's driver**, never the kernel's generic one, which comes after the costs that
//! XDP is to save; and not on veth, whose other end loses its segmentation offload to it. Where the
//! driver refuses (too large an MTU, too few queues, another program is there) it is tc.

use super::{
    ANY, AclError, How, Options, PASSED, RawMap, Run, attach, detach_link, link_ifindex, place,
    test_run,
};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use ebpf::abi::Addr;
use ebpf::guard::{self, Config, OWN_ADDRS, PEER_PREFIXES, maps, prefix_of, programs};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

pub use ebpf::guard::Outcome;

/// The committed object, aligned as the loader wants it.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../ebpf/steer.bpf.o"));

/// Place of our filter among those of an interface that is not ours: one that nobody takes by
/// chance, and behind those of whoever cares about their place.
const CLSACT_PRIORITY: u16 = 0x7765;
/// `XDP_PASS` (include/uapi/linux/bpf.h).
const XDP_PASSED: u32 = 2;

/// An interface of the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Whether its packets have Ethernet headers.
    pub ethernet: bool,
    /// Whether a driver of hardware is behind it (or a hypervisor's).
    pub card: bool,
}

/// What is to be guarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orders {
    /// WireGuard's UDP port.
    pub port: u16,
    /// Whether XDP may be used.
    pub xdp: bool,
    /// Where.
    pub underlays: Vec<Underlay>,
    /// The host's addresses there.
    pub own: BTreeSet<IpAddr>,
    /// Whether the host forwards packets of others.
    pub forwards: bool,
}

/// How the guard is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// In the driver.
    Xdp,
    /// At ingress, by a link.
    Tcx,
    /// At ingress, by a filter.
    Clsact,
}

impl Hook {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// What became of orders.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Where the guard is, and how.
    pub on: BTreeMap<String, Hook>,
    /// Where it could not be attached, and why.
    pub failed: BTreeMap<String, String>,
    /// Interfaces that have a clsact qdisc of ours and no filter of ours any more.
    pub left: Vec<u32>,
}

/// The programs of the object, for test runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// For a driver.
    Driver,
    /// For ingress of Ethernet.
    Ethernet,
    /// For ingress without a link header.
    Bare,
}

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Self::Driver => programs::DRIVER,
            Self::Ethernet => programs::ETHERNET,
            Self::Bare => programs::BARE,
        }
    }
}

/// The guard.
pub struct Guard {
    folder: PathBuf,
    how: How,
    loaded: Option<Loaded>,
}

/// Its programs and maps.
struct Loaded {
    object: Ebpf,
    config: RawMap,
    own: RawMap,
    peers: RawMap,
    counters: RawMap,
    /// Where this process attached it.
    on: BTreeMap<u32, Hook>,
    /// Interfaces whose driver refused it.
    refused: BTreeSet<u32>,
    exempt: BTreeSet<Addr>,
}

impl Guard {
    /// The guard beside the device whose folder this is.
    #[must_use]
    pub fn beside(bpf_dir: &Path) -> Self {
        // No device can have a name with a colon.
        let name = bpf_dir.file_name().unwrap_or_default().to_string_lossy();
        Self::at(
            bpf_dir.with_file_name(format!("{name}:guard")),
            Options::default().how,
        )
    }

    /// The guard with its pins in this folder, attached in this way where it is not XDP.
    #[must_use]
    pub fn at(folder: PathBuf, how: How) -> Self {
        let loaded = None;
        Self {
            folder,
            how,
            loaded,
        }
    }

    /// Attaches it where it is wanted and nowhere else.
    ///
    /// # Errors
    /// [`AclError`] if it cannot be loaded; what is wrong with single interfaces is in the report.
    pub fn set(&mut self, orders: &Orders) -> Result<Report, AclError> {
        if !maps_of(&self.folder).exists() {
            self.loaded = None;
        }
        if self.loaded.is_none() {
            place::prepare(&self.folder)?;
            self.loaded = Some(Loaded::load(&self.folder)?);
        }
        let Some(loaded) = self.loaded.as_mut() else {
            return Err(AclError::Object("guard"));
        };
        loaded.tell(orders)?;
        let mut report = Report::default();
        for underlay in &orders.underlays {
            match loaded.attach(underlay, orders.xdp, &self.folder, self.how) {
                Ok(hook) => drop(report.on.insert(underlay.name.clone(), hook)),
                Err(error) => {
                    let text = attach::chain(&error);
                    report.failed.insert(underlay.name.clone(), text);
                }
            }
        }
        let wanted: BTreeSet<u32> = orders.underlays.iter().map(|one| one.index).collect();
        for index in pinned(&self.folder).difference(&wanted) {
            loaded.on.remove(index);
            if release(&self.folder, *index) {
                report.left.push(*index);
            }
        }
        forget_versions(&self.folder);
        Ok(report)
    }

    /// Whether it still is where it was attached: somebody may have removed its pins.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.loaded.as_ref().is_none_or(|loaded| {
            let mut on = loaded.on.iter();
            on.all(|(index, hook)| is_there(&self.folder, *hook, *index))
        })
    }

    /// Takes it away from everywhere.
    ///
    /// # Errors
    /// [`AclError::Pin`].
    pub fn remove(&mut self) -> Result<Report, AclError> {
        self.loaded = None;
        let mut report = Report::default();
        if !self.folder.exists() {
            return Ok(report);
        }
        for index in pinned(&self.folder) {
            if release(&self.folder, index) {
                report.left.push(index);
            }
        }
        fs::remove_dir_all(&self.folder).map_err(attach::pin_error(&self.folder))?;
        // Only if nothing else is there.
        let parent = self.folder.parent();
        if let Some(parent) = parent.filter(|parent| parent.ends_with("weir")) {
            let _ = fs::remove_dir(parent);
        }
        Ok(report)
    }

    /// Tells which addresses peers are at: the limit of all prefixes is not for theirs.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn exempt(&mut self, peers: impl Iterator<Item = IpAddr>) -> Result<(), AclError> {
        let Some(loaded) = &mut self.loaded else {
            return Ok(());
        };
        let prefixes = peers.map(|addr| prefix_of(&Addr::from(addr.to_canonical())));
        let now: BTreeSet<Addr> = prefixes.take(PEER_PREFIXES as usize).collect();
        if now != loaded.exempt {
            write_set(&loaded.peers, &now, PEER_PREFIXES)?;
            loaded.exempt = now;
        }
        Ok(())
    }

    /// What became of datagrams to the port, in a fixed order; nothing while it is not loaded.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn counters(&self) -> Result<Vec<(Outcome, u64)>, AclError> {
        let Some(loaded) = &self.loaded else {
            return Ok(Vec::new());
        };
        let count = |outcome: Outcome| {
            let shares = loaded.counters.get_per_cpu::<_, u64>(&(outcome as u32))?;
            Ok((outcome, shares.iter().sum()))
        };
        Outcome::ALL.into_iter().map(count).collect()
    }

    /// Loads all programs, needed or not, to run them.
    ///
    /// # Errors
    /// [`AclError::Load`].
    pub fn load_all(&mut self) -> Result<(), AclError> {
        let loaded = self.loaded.as_mut().ok_or(AclError::Object("guard"))?;
        classifier(&mut loaded.object, programs::ETHERNET)?;
        classifier(&mut loaded.object, programs::BARE)?;
        driver(&mut loaded.object).map(drop)
    }

    /// Runs a loaded program on a frame, so many times.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn run(&self, program: Program, frame: &[u8], repeat: u32) -> io::Result<Run> {
        let loaded = self.loaded.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let found = loaded.object.program(program.name());
        let fd = found.ok_or(io::ErrorKind::NotFound)?.fd();
        let fd = fd.map_err(io::Error::other)?.as_fd().try_clone_to_owned()?;
        let passed = match program {
            Program::Driver => XDP_PASSED,
            Program::Ethernet | Program::Bare => PASSED,
        };
        test_run(&fd, passed, frame, repeat)
    }
}

impl Loaded {
    fn load(folder: &Path) -> Result<Self, AclError> {
        let place = maps_of(folder);
        fs::create_dir_all(&place).map_err(attach::pin_error(&place))?;
        let mut loader = EbpfLoader::new();
        for name in maps::ALL {
            loader.map_pin_path(name, place.join(name));
        }
        let object = loader
            .load(OBJECT)
            .map_err(|error| AclError::Load(attach::chain(&error)))?;
        let map = |name: &'static str| {
            let found = RawMap::from_pin(&place.join(name));
            found.map_err(|source| super::failed("open", name, source))
        };
        let (config, own, peers) = (map(maps::CONFIG)?, map(maps::OWN)?, map(maps::PEERS)?);
        let counters = map(maps::COUNTERS)?;
        Ok(Self {
            object,
            config,
            own,
            peers,
            counters,
            on: BTreeMap::new(),
            refused: BTreeSet::new(),
            exempt: BTreeSet::new(),
        })
    }

    fn tell(&self, orders: &Orders) -> Result<(), AclError> {
        let config = Config {
            port: u32::from(orders.port),
            forwards: u32::from(orders.forwards),
        };
        self.config.put(&0_u32, &config, ANY)?;
        let own = orders.own.iter().map(|addr| Addr::from(*addr));
        write_set(
            &self.own,
            &own.take(OWN_ADDRS as usize).collect(),
            OWN_ADDRS,
        )
    }

    /// Attaches it to an interface, unless it is there as wanted.
    fn attach(
        &mut self,
        underlay: &Underlay,
        xdp: bool,
        folder: &Path,
        how: How,
    ) -> Result<Hook, AclError> {
        let Underlay { name, index, .. } = underlay;
        let xdp = xdp && underlay.card && underlay.ethernet && !self.refused.contains(index);
        if let Some(hook) = self.on.get(index)
            && (*hook == Hook::Xdp) == xdp
            && is_there(folder, *hook, *index)
        {
            return Ok(*hook);
        }
        self.on.remove(index);
        let hook = match xdp.then(|| by_driver(driver(&mut self.object)?, name, *index, folder)) {
            Some(Ok(())) => Hook::Xdp,
            other => {
                if let Some(Err(error)) = other {
                    tracing::info!(error = attach::chain(&error), "the driver takes no XDP");
                    self.refused.insert(*index);
                    if !self.on.values().any(|hook| *hook == Hook::Xdp) {
                        // It would be held for nothing; it may not even have been loaded.
                        let _ = driver(&mut self.object).map(Xdp::unload);
                    }
                }
                let program = if underlay.ethernet {
                    programs::ETHERNET
                } else {
                    programs::BARE
                };
                by_stack(
                    classifier(&mut self.object, program)?,
                    underlay,
                    folder,
                    how,
                )?
            }
        };
        // Whatever is there in another way goes once the new one stands.
        for other in [Hook::Xdp, Hook::Tcx, Hook::Clsact] {
            if other != hook {
                take_off(folder, other, *index);
            }
        }
        self.on.insert(*index, hook);
        Ok(hook)
    }
}

/// The folder of our version's maps.
fn maps_of(folder: &Path) -> PathBuf {
    folder.join(format!("maps-{}", guard::VERSION))
}

fn pin_of(folder: &Path, hook: Hook, index: u32) -> PathBuf {
    folder.join(match hook {
        Hook::Xdp => format!("driver-{index}"),
        Hook::Tcx => format!("stack-{index}"),
        Hook::Clsact => format!("filter-{index}"),
    })
}

/// Marks a qdisc as ours.
fn qdisc_pin(folder: &Path, index: u32) -> PathBuf {
    folder.join(format!("qdisc-{index}"))
}

fn is_there(folder: &Path, hook: Hook, index: u32) -> bool {
    let pin = pin_of(folder, hook, index);
    match hook {
        Hook::Xdp | Hook::Tcx => link_ifindex(&pin).is_ok_and(|found| found == index),
        Hook::Clsact => pin.exists(),
    }
}

/// The interfaces that pins are about.
fn pinned(folder: &Path) -> BTreeSet<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let index = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let (kind, index) = name.split_once('-')?;
        let ours = ["driver", "stack", "filter", "qdisc"].contains(&kind);
        index.parse().ok().filter(|_| ours)
    };
    entries.filter_map(index).collect()
}

/// Leaves an interface. Returns whether it has a qdisc of ours.
fn release(folder: &Path, index: u32) -> bool {
    for hook in [Hook::Xdp, Hook::Tcx, Hook::Clsact] {
        take_off(folder, hook, index);
    }
    fs::remove_file(qdisc_pin(folder, index)).is_ok()
}

fn take_off(folder: &Path, hook: Hook, index: u32) {
    let pin = pin_of(folder, hook, index);
    match hook {
        // One that was never there, or whose interface is gone, is off.
        Hook::Xdp | Hook::Tcx => drop(detach_link(&pin)),
        Hook::Clsact if pin.exists() => {
            if let Ok(name) = name_of(index) {
                attach::remove_filter(&name, TcAttachType::Ingress, CLSACT_PRIORITY);
            }
        }
        Hook::Clsact => {}
    }
    // What was never there cannot be removed.
    let _ = fs::remove_file(pin);
}

fn name_of(index: u32) -> io::Result<String> {
    use rustix::net::{AddressFamily, SocketType, netdevice, socket};
    let any = socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    Ok(netdevice::index_to_name(any, index)?)
}

/// Removes the maps of versions that no program uses any more.
fn forget_versions(folder: &Path) {
    let ours = format!("maps-{}", guard::VERSION);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("maps-") && name != ours {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Makes a map hold exactly these keys.
fn write_set(map: &RawMap, keys: &BTreeSet<Addr>, most: u32) -> Result<(), AclError> {
    let there: Vec<(Addr, u32)> = map.entries(most as usize)?;
    for (gone, _) in there.iter().filter(|(key, _)| !keys.contains(key)) {
        map.remove(gone)?;
    }
    for key in keys {
        map.put(key, &1_u32, ANY)?;
    }
    Ok(())
}

/// The program, loaded when it is first needed: what the agent holds for nothing would go with it.
fn classifier<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, AclError> {
    let program = object.program_mut(name).ok_or(AclError::Object(name))?;
    let program: &mut SchedClassifier = program.try_into().map_err(|_| AclError::Object(name))?;
    if program.fd().is_err() {
        let loaded = program.load();
        loaded.map_err(|error| AclError::Load(attach::verifier(&error)))?;
    }
    Ok(program)
}

/// Likewise.
fn driver(object: &mut Ebpf) -> Result<&mut Xdp, AclError> {
    let name = programs::DRIVER;
    let program = object.program_mut(name).ok_or(AclError::Object(name))?;
    let program: &mut Xdp = program.try_into().map_err(|_| AclError::Object(name))?;
    if program.fd().is_err() {
        let loaded = program.load();
        loaded.map_err(|error| AclError::Load(attach::verifier(&error)))?;
    }
    Ok(program)
}

fn by_stack(
    program: &mut SchedClassifier,
    underlay: &Underlay,
    folder: &Path,
    how: How,
) -> Result<Hook, AclError> {
    let Underlay { name, index, .. } = underlay;
    match how {
        How::Tcx => {
            let pin = pin_of(folder, Hook::Tcx, *index);
            attach::by_link(program, name, *index, &pin, TcAttachType::Ingress)?;
            Ok(Hook::Tcx)
        }
        How::Clsact => {
            let pin = pin_of(folder, Hook::Clsact, *index);
            let ingress = TcAttachType::Ingress;
            if attach::by_filter(program, name, &pin, ingress, CLSACT_PRIORITY)? {
                let mark = program.pin(qdisc_pin(folder, *index));
                mark.map_err(|error| attach::attach_error(name, &error))?;
            }
            Ok(Hook::Clsact)
        }
    }
}

fn by_driver(
    program: &mut Xdp,
    interface: &str,
    index: u32,
    folder: &Path,
) -> Result<(), AclError> {
    let error = |error: &dyn std::error::Error| attach::attach_error(interface, error);
    let pin = pin_of(folder, Hook::Xdp, index);
    if link_ifindex(&pin).is_ok_and(|found| found == index) {
        let former = PinnedLink::from_pin(&pin).map_err(|e| error(&e))?;
        let link = FdLink::from(former).try_into().map_err(|e| error(&e))?;
        let id = program.attach_to_link(link).map_err(|e| error(&e))?;
        // Pinned already: what is dropped here is only our handle.
        drop(program.take_link(id).map_err(|e| error(&e))?);
        return Ok(());
    }
    // A link whose device is gone.
    let _ = fs::remove_file(&pin);
    let attached = program.attach_to_if_index(index, XdpMode::Driver);
    let id = attached.map_err(|e| error(&e))?;
    let link = program.take_link(id).map_err(|e| error(&e))?;
    let link: FdLink = link.try_into().map_err(|e| error(&e))?;
    link.pin(&pin).map_err(|e| error(&e))?;
    Ok(())
}
