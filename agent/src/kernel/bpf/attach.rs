//! Loading the programs and putting them on a device, or taking over those that are there.
//!
//! From Linux 6.6 a program is attached by a tcx link, first in its chain, and the link is pinned:
//! it lives until it is unpinned or its device goes. Before, it is a filter of the device's clsact
//! qdisc, which lives with the device; the program is pinned under the device's index, to know that
//! it is there. Ingress comes first: what a peer sends is what must never get through.
//!
//! *Taking over.* With maps of our own layout, the new program replaces the old one at once: the
//! same maps, one atomic step each. With maps of another layout, nothing of the new ones counts yet,
//! so the old programs stay until the first policy is written ([`take_over`]). Flows are copied
//! before the programs change and once more after it, for those that began in between.

use super::acl::ActiveWord;
use super::addresses::Addresses;
use super::flows::{FlowTable, Flows};
use super::policy::Slot;
use super::tracks::Tracks;
use super::{Acl, AclError, Mapped, OBJECT, RawMap, link_ifindex};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader};
use ebpf::abi::{self, Direction, maps, programs};
use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

/// Place of our filter among those of a clsact qdisc: before all others, under a number that
/// nobody takes by chance.
const CLSACT_PRIORITY: u16 = 1;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 0x7765);
/// The first kernel with tcx.
const TCX: KernelVersion = KernelVersion::new(6, 6, 0);
/// Lines of the verifier's log that an error shows.
const LOG_LINES: usize = 4;

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// By tcx links (Linux 6.6 and later).
    Tcx,
    /// By filters of the clsact qdisc.
    Clsact,
}

/// What tests vary.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How to attach.
    pub how: How,
    /// The layout of the maps.
    pub layout: u32,
}

impl Default for Options {
    /// What fits this kernel and this agent.
    fn default() -> Self {
        let tcx = KernelVersion::current().is_ok_and(|version| version >= TCX);
        Self {
            how: if tcx { How::Tcx } else { How::Clsact },
            layout: abi::layout(),
        }
    }
}

/// Loaded programs that have not taken over yet.
pub(super) struct Waiting {
    loaded: Ebpf,
    interface: String,
    /// Folders of the layouts to take over from.
    former: Vec<PathBuf>,
}

/// Loads, and attaches or takes over.
pub(super) fn open(
    interface: &str,
    index: u32,
    folder: &Path,
    options: Options,
) -> Result<Acl, AclError> {
    super::place::prepare(folder)?;
    let layout = folder.join(format!("layout-{:08x}", options.layout));
    fs::create_dir_all(&layout).map_err(pin_error(&layout))?;
    let former = other_layouts(folder, &layout)?;
    let mut loaded = load(&layout)?;
    let mut acl = assemble(&loaded, index, folder, &layout, options.how)?;
    acl.programs = [
        program_fd(&loaded, programs::INGRESS)?,
        program_fd(&loaded, programs::EGRESS)?,
    ];
    if is_attached(options.how, folder, index) && !former.is_empty() {
        acl.waiting = Some(Waiting {
            loaded,
            interface: interface.to_owned(),
            former,
        });
        return Ok(acl);
    }
    if let Err(error) = attach_both(&mut loaded, interface, index, folder, options.how) {
        // Half is nothing: a device with one program would look protected.
        if !is_attached(options.how, folder, index) {
            let _ = remove(interface, folder);
        }
        return Err(error);
    }
    forget(&former);
    Ok(acl)
}

/// Makes the new programs decide, with the flows of the old ones.
pub(super) fn take_over(acl: &Acl, waiting: &mut Waiting) -> Result<(), AclError> {
    copy_flows(acl, &waiting.former);
    let (folder, how) = (acl.folder.clone(), acl.how);
    attach_both(
        &mut waiting.loaded,
        &waiting.interface,
        acl.index,
        &folder,
        how,
    )?;
    copy_flows(acl, &waiting.former);
    forget(&waiting.former);
    Ok(())
}

/// Whether both programs are attached to the device of this index.
pub(super) fn is_attached(how: How, folder: &Path, index: u32) -> bool {
    Direction::ALL.into_iter().all(|direction| match how {
        How::Tcx => link_ifindex(&link_pin(folder, direction)).is_ok_and(|found| found == index),
        How::Clsact => filter_pin(folder, direction, index).exists(),
    })
}

/// Whether anything of ours is pinned there.
pub(super) fn is_pinned(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// Detaches the programs and removes all pins.
pub(super) fn remove(interface: &str, folder: &Path) -> Result<(), AclError> {
    if !folder.exists() {
        return Ok(());
    }
    if clsact_pinned(folder) {
        for (_, kind) in BOTH {
            remove_filter(interface, kind, CLSACT_PRIORITY);
        }
    }
    fs::remove_dir_all(folder).map_err(pin_error(folder))?;
    // Only if no other device has a folder there.
    if let Some(parent) = folder.parent().filter(|parent| parent.ends_with("weir")) {
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

const BOTH: [(Direction, TcAttachType); 2] = [
    (Direction::Ingress, TcAttachType::Ingress),
    (Direction::Egress, TcAttachType::Egress),
];

fn name_of(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => programs::INGRESS,
        Direction::Egress => programs::EGRESS,
    }
}

fn link_pin(folder: &Path, direction: Direction) -> PathBuf {
    folder.join(name_of(direction))
}

fn filter_pin(folder: &Path, direction: Direction, index: u32) -> PathBuf {
    folder.join(format!("{}-on-{index}", name_of(direction)))
}

fn clsact_pinned(folder: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder) else {
        return false;
    };
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    names.any(|name| name.to_string_lossy().contains("-on-"))
}

fn other_layouts(folder: &Path, ours: &Path) -> Result<Vec<PathBuf>, AclError> {
    let entries = fs::read_dir(folder).map_err(pin_error(folder))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(paths
        .filter(|path| path != ours)
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("layout-")
        })
        .collect())
}

fn load(layout: &Path) -> Result<Ebpf, AclError> {
    super::policy::make_outer(layout)?;
    super::addresses::make_outer(layout)?;
    let mut loader = EbpfLoader::new();
    for name in maps::SLOTTED.into_iter().chain(maps::PLAIN) {
        loader.map_pin_path(name, layout.join(name));
    }
    let mut loaded = loader
        .load(OBJECT)
        .map_err(|error| AclError::Load(chain(&error)))?;
    for direction in Direction::ALL {
        let program = classifier(&mut loaded, direction)?;
        program
            .load()
            .map_err(|error| AclError::Load(verifier(&error)))?;
    }
    Ok(loaded)
}

fn assemble(
    loaded: &Ebpf,
    index: u32,
    folder: &Path,
    layout: &Path,
    how: How,
) -> Result<Acl, AclError> {
    let map = |name: &'static str| {
        let map = loaded.map(name).ok_or(AclError::Object(name))?;
        RawMap::from_fd(map_fd(map).ok_or(AclError::Object(name))?, name)
    };
    let shapes = map(maps::SHAPES)?;
    let word = ActiveWord(Mapped::map(&map(maps::ACTIVE)?)?);
    // The idle slot may be half filled: the next policy makes its tables anew.
    let active = word.load().slot;
    let adopt = |number| Slot::from_pins(layout, number, &shapes);
    let slots = [0, 1].map(|number| (number == active).then(|| adopt(number)).flatten());
    let books = slots.each_ref().map(|slot| slot.as_ref().map(Slot::book));
    let addresses = Addresses::open(map(maps::IDENTITIES)?, layout, books)?;
    Ok(Acl {
        index,
        how,
        folder: folder.to_owned(),
        layout: layout.to_owned(),
        word,
        shapes,
        tracks: Tracks::new(Mapped::map(&map(maps::TRACKS)?)?),
        flows: Flows::open(map(maps::FLOWS)?, &map(maps::SEEDS)?)?,
        shares: map(maps::SHARES)?,
        recounted_ns: None,
        fragments: map(maps::FRAGMENTS)?,
        counters: map(maps::COUNTERS)?,
        mark: map(maps::MARK)?,
        answers: map(maps::ANSWERS)?,
        lost: map(maps::LOST)?,
        events: None,
        addresses,
        outer: [
            map(maps::PREFIXES)?,
            map(maps::PAIRS)?,
            map(maps::PORTS)?,
            map(maps::PAGES)?,
        ],
        slots,
        settling: None,
        programs: [None, None],
        waiting: None,
    })
}

fn map_fd(map: &aya::maps::Map) -> Option<std::os::fd::BorrowedFd<'_>> {
    use aya::maps::Map;
    let data = match map {
        Map::Array(data)
        | Map::ArrayOfMaps(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data) => data,
        _ => return None,
    };
    Some(data.fd().as_fd())
}

fn classifier(loaded: &mut Ebpf, direction: Direction) -> Result<&mut SchedClassifier, AclError> {
    let name = name_of(direction);
    let program = loaded.program_mut(name).ok_or(AclError::Object(name))?;
    program.try_into().map_err(|_| AclError::Object(name))
}

fn program_fd(loaded: &Ebpf, name: &'static str) -> Result<Option<OwnedFd>, AclError> {
    let program = loaded.program(name).ok_or(AclError::Object(name))?;
    let fd = program.fd().map_err(|_| AclError::Object(name))?;
    let owned = fd.as_fd().try_clone_to_owned();
    owned
        .map(Some)
        .map_err(|source| super::failed("keep", name, source))
}

fn attach_both(
    loaded: &mut Ebpf,
    interface: &str,
    index: u32,
    folder: &Path,
    how: How,
) -> Result<(), AclError> {
    for (direction, kind) in BOTH {
        let program = classifier(loaded, direction)?;
        match how {
            How::Tcx => by_link(
                program,
                interface,
                index,
                &link_pin(folder, direction),
                kind,
            )?,
            How::Clsact => {
                let pin = filter_pin(folder, direction, index);
                by_filter(program, interface, &pin, kind, CLSACT_PRIORITY)?;
            }
        }
    }
    Ok(())
}

/// By a link that is pinned, or by replacing the program behind the one that is.
pub(super) fn by_link(
    program: &mut SchedClassifier,
    interface: &str,
    index: u32,
    pin: &Path,
    kind: TcAttachType,
) -> Result<(), AclError> {
    let error = |error: &dyn std::error::Error| attach_error(interface, error);
    if link_ifindex(pin).is_ok_and(|found| found == index) {
        let former = PinnedLink::from_pin(pin).map_err(|e| error(&e))?;
        let link = FdLink::from(former).try_into().map_err(|e| error(&e))?;
        let id = program.attach_to_link(link).map_err(|e| error(&e))?;
        // Pinned already: what is dropped here is only our handle.
        drop(program.take_link(id).map_err(|e| error(&e))?);
        return Ok(());
    }
    // A link whose device is gone.
    let _ = fs::remove_file(pin);
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program
        .attach_with_options(interface, kind, first)
        .map_err(|e| error(&e))?;
    let link = program.take_link(id).map_err(|e| error(&e))?;
    let link: FdLink = link.try_into().map_err(|e| error(&e))?;
    link.pin(pin).map_err(|e| error(&e))?;
    Ok(())
}

/// By a filter of the clsact qdisc, or by changing the one that is there. Returns whether the qdisc
/// was made for it.
pub(super) fn by_filter(
    program: &mut SchedClassifier,
    interface: &str,
    pin: &Path,
    kind: TcAttachType,
    priority: u16,
) -> Result<bool, AclError> {
    let error = |error: &dyn std::error::Error| attach_error(interface, error);
    // It may be there already; if it is not, attaching says so.
    let made_qdisc = qdisc_add_clsact(interface).is_ok();
    let options = NlOptions {
        priority,
        handle: CLSACT_HANDLE,
        classid: None,
    };
    let made = program.attach_with_options(interface, kind, TcAttachOptions::Netlink(options));
    let id = match made {
        Ok(id) => id,
        // Ours is there: change it, which the kernel does in one step.
        Err(_) if pin.exists() => {
            let there =
                SchedClassifierLink::attached(interface, kind, priority, CLSACT_HANDLE, None);
            let there = there.map_err(|e| error(&e))?;
            program.attach_to_link(there).map_err(|e| error(&e))?
        }
        Err(other) => return Err(error(&other)),
    };
    // Dropping the handle would take the filter away.
    std::mem::forget(program.take_link(id).map_err(|e| error(&e))?);
    let _ = fs::remove_file(pin);
    program.pin(pin).map_err(|e| error(&e))?;
    Ok(made_qdisc)
}

/// Takes a filter of ours off again; one that is gone already is fine.
pub(super) fn remove_filter(interface: &str, kind: TcAttachType, priority: u16) {
    use aya::programs::links::Link as _;
    let filter = SchedClassifierLink::attached(interface, kind, priority, CLSACT_HANDLE, None);
    if let Ok(filter) = filter {
        let _ = filter.detach();
    }
}

/// Copies flows that the new maps do not have. A flow that cannot be read is picked up later by its
/// next ACK, or decided as a first packet; so nothing here fails the upgrade.
fn copy_flows(acl: &Acl, former: &[PathBuf]) {
    let Ok(to) = acl.flows.table() else {
        return;
    };
    for layout in former {
        let Ok(map) = RawMap::from_pin(&layout.join(maps::FLOWS)) else {
            continue;
        };
        let Ok(from) = FlowTable::of_any_layout(&map) else {
            continue;
        };
        // Every flow is decided again under the first policy of the new maps: their epochs have
        // nothing to do with the old ones.
        for (store, key, mut flow) in from.iter() {
            flow.epoch = 0;
            acl.tracks.leave(&key);
            to.add(store, &key, &flow);
        }
    }
}

/// Removes the maps of layouts that no program uses any more.
fn forget(former: &[PathBuf]) {
    for layout in former {
        if let Err(error) = fs::remove_dir_all(layout) {
            tracing::warn!(%error, "old maps stay pinned");
        }
    }
}

pub(super) fn pin_error(path: &Path) -> impl FnOnce(std::io::Error) -> AclError {
    let path = path.to_owned();
    move |source| AclError::Pin { path, source }
}

pub(super) fn attach_error(interface: &str, error: &dyn std::error::Error) -> AclError {
    AclError::Attach {
        interface: interface.to_owned(),
        text: chain(error),
    }
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let next = inner.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = inner.source();
    }
    text
}

pub(super) fn verifier(error: &ProgramError) -> String {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return chain(error);
    };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
    let end = lines.len().saturating_sub(LOG_LINES);
    format!("{io_error}: {}", lines[end..].join(" / "))
}
