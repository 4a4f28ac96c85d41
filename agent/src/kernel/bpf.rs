//! The programs on the WireGuard device and their maps: load, pin, attach, adopt, fill.
//!
//! [`Acl::attach_or_adopt`] comes before the device has a peer or an address. What it finds pinned
//! it goes on with (an earlier agent's flows, counters and policy keep counting), and programs are
//! replaced atomically, so that neither a crash nor an upgrade changes a verdict. The folder of
//! pins must be on a bpffs that process 1 sees too ([`pins`]): a private one dies with its process,
//! and the programs with it.
//!
//! [`Acl::set`] puts a policy into force: whole, by filling the slot that is idle and then storing
//! one word; or, where the change only adds entries, one by one in the slot that is active. Entries
//! of an active slot are never changed or removed, because a packet may be reading them.
//!
//! The only `unsafe` of the agent's kernel hands is here: the promise that ABI types are plain data,
//! and the mapping of the active word.
#![allow(
    unsafe_code,
    reason = "aya asks for a promise about plain data; the active word is reached through mmap"
)]

mod hook;
mod pins;
mod slot;

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray};
use aya::{EbpfError, EbpfLoader, Pod};
use ebpf::abi::{
    Active, Addr, Counter, Direction, Flow, FlowKey, Fragment, FragmentKey, Identity, Page,
    PageKey, PairKey, Ports, PortsKey, SLOTS, SetId, maps,
};
use ebpf::reason::Reason;
use ebpf::verdict::{self, Question, Store, Verdict};
use engine::acl::{Change, Tables};
use engine::status::FailureKind;
use slot::{Outer, Slot};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use hook::Hook;
pub use pins::is_pinned;

/// The programs, as `cargo xtask ebpf` built them.
const OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../ebpf/acl.bpf.o"));

/// Why the ACL is not in force.
#[derive(Debug, thiserror::Error)]
pub enum AclError {
    /// The pins would not be on a bpffs.
    #[error(
        "{} is not on a bpffs: mount one with `mount -t bpf bpf /sys/fs/bpf` (systemd does at \
         boot), or name another folder with --bpf-dir", .0.display()
    )]
    NotBpffs(PathBuf),
    /// The pins would die with this process.
    #[error(
        "{} is on a bpffs that process 1 does not see: the programs would vanish with this \
         process. Start the agent in the mount namespace of process 1, or bind-mount the host's \
         bpffs into this one", .0.display()
    )]
    PrivateBpffs(PathBuf),
    /// A pin cannot be written, read or removed.
    #[error("cannot use the pins in {}", .path.display())]
    Pins {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refuses programs or maps.
    #[error("the kernel does not take weir's programs")]
    Load(#[from] EbpfError),
    /// The programs cannot be attached to the device.
    #[error("the programs cannot be attached to {interface}")]
    Attach {
        /// The device.
        interface: String,
        /// What the kernel said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A map cannot be read or written.
    #[error("a map cannot be used")]
    Map(#[from] MapError),
    /// The object lacks a map or program that it should have.
    #[error("weir's programs lack `{0}`: the build is broken, reinstall weir")]
    Incomplete(&'static str),
    /// The active word cannot be mapped.
    #[error("the active word cannot be mapped")]
    Word(#[source] io::Error),
}

impl AclError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        FailureKind::Programs
    }
}

/// A type of the ABI, as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Wire<T>(T);

// SAFETY: `IntoBytes` proves that T has no padding, `FromBytes` that any bytes are a T.
unsafe impl<T: IntoBytes + FromBytes + Immutable + Copy + 'static> Pod for Wire<T> {}

/// The programs, attached, and their maps.
pub struct Acl {
    index: u32,
    hook: Hook,
    word: Word,
    outer: Outer,
    /// The slot that this process filled and made active.
    live: Option<Slot>,
    opening: HashMap<MapData, Wire<FlowKey>, Wire<Flow>>,
    established: HashMap<MapData, Wire<FlowKey>, Wire<Flow>>,
    fragments: HashMap<MapData, Wire<FragmentKey>, Wire<Fragment>>,
    counters: PerCpuArray<MapData, Wire<Counter>>,
}

impl Acl {
    /// Attaches the programs to the device `interface` with number `index`, pinned under `dir`;
    /// goes on with what is pinned there. Uses tcx from Linux 6.6, clsact below.
    ///
    /// # Errors
    /// [`AclError`]; whatever was attached before stays.
    pub fn attach_or_adopt(interface: &str, index: u32, dir: &Path) -> Result<Self, AclError> {
        Self::attach_by(Hook::of_this_kernel(), interface, index, dir)
    }

    /// As [`Self::attach_or_adopt`], by a given hook.
    ///
    /// # Errors
    /// [`AclError`]; whatever was attached before stays.
    pub fn attach_by(
        hook: Hook,
        interface: &str,
        index: u32,
        dir: &Path,
    ) -> Result<Self, AclError> {
        pins::prepare(dir)?;
        let mut loader = EbpfLoader::new();
        for name in maps::PLAIN.iter().chain(&maps::SLOTTED) {
            loader.map_pin_path(name, dir.join(pins::map(name)));
        }
        let mut object = loader.load(OBJECT)?;
        let mut take = |name: &'static str| object.take_map(name).ok_or(AclError::Incomplete(name));
        let acl = Self {
            index,
            hook,
            word: Word::map(&take(maps::ACTIVE)?)?,
            outer: Outer::new(&mut take)?,
            live: None,
            opening: take(maps::OPENING)?.try_into()?,
            established: take(maps::ESTABLISHED)?.try_into()?,
            fragments: take(maps::FRAGMENTS)?.try_into()?,
            counters: take(maps::COUNTERS)?.try_into()?,
        };
        hook::attach(&mut object, hook, interface, dir)?;
        pins::remove_strangers(dir)?;
        Ok(acl)
    }

    /// Whether the programs are on the device with number `index`.
    #[must_use]
    pub fn is_attached(&self, index: u32) -> bool {
        self.index == index
    }

    /// The epoch in force, if a policy is.
    #[must_use]
    pub fn epoch(&self) -> Option<u32> {
        let epoch = self.word.load().epoch;
        (epoch != 0).then_some(epoch)
    }

    /// By which hook the programs are attached.
    #[must_use]
    pub fn hook(&self) -> &'static str {
        self.hook.name()
    }

    /// Puts `tables` into force. `change` is what leads to them from the tables that are in force,
    /// if these are known.
    ///
    /// # Errors
    /// [`AclError`]; the old policy is then in force.
    pub fn set(&mut self, tables: &Tables, change: Option<&Change>) -> Result<(), AclError> {
        let narrows = match (change, &mut self.live) {
            (Some(Change::None), Some(_)) => return Ok(()),
            (Some(Change::InPlace(patch)), Some(live)) if live.has_room_for(tables) => {
                return Ok(live.add(patch)?);
            }
            // Only adds, but not here.
            (Some(Change::InPlace(_)), Some(_)) => false,
            (Some(Change::Swap { narrows }), Some(_)) => *narrows,
            // Nobody knows what is in force.
            (Some(_) | None, _) => true,
        };
        self.swap(tables, narrows)
    }

    /// Fills the idle slot, then makes it count.
    fn swap(&mut self, tables: &Tables, narrows: bool) -> Result<(), AclError> {
        let now = self.word.load();
        let idle = (now.slot + 1) % SLOTS;
        let slot = Slot::fill(tables)?;
        self.outer.put(idle, &slot)?;
        let raised = now.epoch.checked_add(1).unwrap_or(1);
        let epoch = if narrows || now.epoch == 0 {
            raised
        } else {
            now.epoch
        };
        self.word.store(Active { epoch, slot: idle });
        self.live = Some(slot);
        Ok(())
    }

    /// Packets by direction and outcome, since the maps were made.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn counters(&self) -> Result<Vec<(Direction, Verdict, u64)>, AclError> {
        let mut counters = Vec::new();
        for direction in Direction::ALL {
            for verdict in Verdict::all() {
                let by_cpu = self.counters.get(&verdict.counter(direction), 0)?;
                let packets = by_cpu.iter().map(|counter| counter.0.packets).sum();
                counters.push((direction, verdict, packets));
            }
        }
        Ok(counters)
    }

    /// What policy says to a first packet, from the tables that are in force.
    #[must_use]
    pub fn explain(&self, question: &Question) -> Verdict {
        let active = self.word.load();
        if active.epoch == 0 {
            return Verdict::deny(Reason::NoPolicy);
        }
        verdict::allows(
            self,
            &Question {
                slot: active.slot,
                ..*question
            },
        )
    }
}

/// Reads the loaded maps; changes nothing.
impl verdict::Tables for Acl {
    type Entry = Flow;

    fn active(&self) -> Active {
        self.word.load()
    }

    fn complete(&self, _slot: u32) -> bool {
        self.live.is_some()
    }

    fn identity(&self, _slot: u32, addr: &Addr) -> Option<Identity> {
        self.live.as_ref()?.identity(addr)
    }

    fn route(&self, _slot: u32, addr: &Addr) -> Option<Identity> {
        self.live.as_ref()?.route(addr)
    }

    fn pair(&self, _slot: u32, key: &PairKey) -> Option<SetId> {
        self.live.as_ref()?.pair(key)
    }

    fn ports(&self, _slot: u32, key: &PortsKey) -> Option<Ports> {
        self.live.as_ref()?.ports(key)
    }

    fn page_word(&self, _slot: u32, key: &PageKey, word: u32) -> Option<u64> {
        let page: Page = self.live.as_ref()?.page(key)?;
        page.words.get(word as usize).copied()
    }

    fn find(&self, store: Store, key: &FlowKey) -> Option<Flow> {
        let flows = match store {
            Store::Opening => &self.opening,
            Store::Established => &self.established,
        };
        flows.get(&Wire(*key), 0).ok().map(|flow| flow.0)
    }

    fn load(&self, entry: Flow) -> Flow {
        entry
    }

    fn save(&self, _entry: Flow, _flow: Flow) {}

    fn insert(&self, _store: Store, _key: &FlowKey, _flow: &Flow) -> bool {
        true
    }

    fn remove(&self, _store: Store, _key: &FlowKey) {}

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.fragments
            .get(&Wire(*key), 0)
            .ok()
            .map(|fragment| fragment.0)
    }

    fn keep_fragment(&self, _key: &FragmentKey, _fragment: &Fragment) {}

    fn take_picked_up(&self, _now_ns: u64) -> bool {
        true
    }
}

/// Takes the programs off `interface`, if it is still there, and every pin away. The device goes
/// first, where it goes at all: until then nothing passes unfiltered.
///
/// # Errors
/// [`AclError::Pins`].
pub fn detach_and_unpin(interface: &str, dir: &Path) -> Result<(), AclError> {
    hook::detach_clsact(interface);
    pins::remove_all(dir)
}

/// The active word, mapped: stored and loaded whole.
struct Word(NonNull<AtomicU64>);

/// Arrays are mapped by the page.
const MAPPED_BYTES: usize = 4096;

// SAFETY: the mapping belongs to the process, not to a thread, and is only used atomically.
unsafe impl Send for Word {}

impl Word {
    fn map(map: &Map) -> Result<Self, AclError> {
        let Map::Array(data) = map else {
            return Err(AclError::Incomplete(maps::ACTIVE));
        };
        let fd = data.fd().as_fd().as_raw_fd();
        // SAFETY: a new shared mapping of one page of an open map; nothing else is affected.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAPPED_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(AclError::Word(io::Error::last_os_error()));
        }
        let word = NonNull::new(page.cast()).ok_or(AclError::Incomplete(maps::ACTIVE))?;
        Ok(Self(word))
    }

    fn load(&self) -> Active {
        // SAFETY: the mapping lives as long as `self`, and is page-aligned.
        Active::from_word(unsafe { self.0.as_ref() }.load(Ordering::Acquire))
    }

    fn store(&self, active: Active) {
        // SAFETY: as above. Release: the tables were filled before.
        unsafe { self.0.as_ref() }.store(active.word(), Ordering::Release);
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and not used after.
        unsafe { libc::munmap(self.0.as_ptr().cast(), MAPPED_BYTES) };
    }
}
