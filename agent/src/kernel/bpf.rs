//! Programs and maps: loading, attaching, adopting, filling, reading.
//!
//! What a device's folder on the bpffs holds:
//!
//! ```text
//! /sys/fs/bpf/weir/weir0/ingress, egress        the links (tcx), or the programs (clsact)
//!                       /layout-XXXXXXXX/MAP    the maps of one layout
//!                       /layout-XXXXXXXX/MAP-0  the inner map in slot 0 of a policy table
//!                       /layout-XXXXXXXX/IDENTITIES-0-0  its first slab of addresses
//! ```
//!
//! Pins outlive the agent: whether it stops, crashes or is upgraded, the programs go on deciding
//! with the same maps. The next agent adopts them ([`attach`]): with the same layout it replaces
//! the program behind each link, which is atomic, on the same maps. With another layout the new
//! maps come beside the old ones, the first policy fills them, flows are copied, and only then the
//! programs are replaced; until then the old ones decide.
//!
//! A policy is written into the idle slot and made to count by one store ([`policy`]). `explain` and
//! dumps read the same maps ([`view`]), and [`events`] what the programs tell of drops. [`place`]
//! refuses a folder whose pins would die with the agent's own mount namespace. [`guard`] is the
//! other object, on the underlay's interfaces.
//!
//! Everything unsafe of the agent's BPF is in this file: map access by `bpf(2)` ([`RawMap`]), and
//! the mapped active word ([`ActiveWord`]).
#![allow(
    unsafe_code,
    reason = "bpf(2) and the mapping of the active word take raw pointers; see each SAFETY"
)]

mod acl;
mod addresses;
mod attach;
mod error;
mod events;
mod flows;
pub mod guard;
mod place;
mod policy;
mod recount;
mod refuse;
mod tracks;
mod view;

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use self::acl::{Acl, First};
pub use addresses::shift as line_shift;
pub use attach::{How, Options};
pub use error::AclError;
pub use flows::FlowTable;
pub use view::View;

/// The committed object, aligned as the loader wants it.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../ebpf/acl.bpf.o"));

/// What a test run shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Whether the packet would have passed.
    pub passes: bool,
    /// Mean time of one run in nanoseconds.
    pub mean_ns: u32,
}

/// Whether something of ours is pinned in this folder.
#[must_use]
pub fn is_pinned(bpf_dir: &Path) -> bool {
    attach::is_pinned(bpf_dir)
}

/// Whether programs that an earlier agent pinned in this folder are on the device of this index:
/// they decide, whoever is alive.
#[must_use]
pub fn holds(index: u32, bpf_dir: &Path) -> bool {
    attach::is_attached(Options::default().how, bpf_dir, index)
}

/// Takes the programs off the device, if it still exists, and forgets links and maps.
///
/// # Errors
/// [`AclError::Pin`].
pub fn detach_and_unpin(interface: &str, bpf_dir: &Path) -> Result<(), AclError> {
    attach::remove(interface, bpf_dir)
}

/// The clock of the programs.
fn now_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a valid timespec, which the call fills.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    if failed != 0 {
        return 0;
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// `enum bpf_cmd` (include/uapi/linux/bpf.h).
mod command {
    pub(super) const MAP_CREATE: i64 = 0;
    pub(super) const MAP_LOOKUP_ELEM: i64 = 1;
    pub(super) const MAP_UPDATE_ELEM: i64 = 2;
    pub(super) const MAP_DELETE_ELEM: i64 = 3;
    pub(super) const MAP_GET_NEXT_KEY: i64 = 4;
    pub(super) const OBJ_PIN: i64 = 6;
    pub(super) const OBJ_GET: i64 = 7;
    pub(super) const PROG_TEST_RUN: i64 = 10;
    pub(super) const OBJ_GET_INFO_BY_FD: i64 = 15;
    pub(super) const MAP_UPDATE_BATCH: i64 = 26;
    pub(super) const LINK_DETACH: i64 = 34;
}

/// Map types that we create ourselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapKind {
    /// `BPF_MAP_TYPE_HASH`.
    Hash,
    /// `BPF_MAP_TYPE_ARRAY`, of lines.
    Lines,
    /// The same, of one slab.
    Slab,
    /// `BPF_MAP_TYPE_LPM_TRIE`.
    LpmTrie,
    /// `BPF_MAP_TYPE_ARRAY_OF_MAPS`.
    ArrayOfMaps,
}

impl MapKind {
    /// The kernel's number and the flags that we ask for.
    const fn as_made(self) -> (u32, u32) {
        match self {
            Self::Hash => (1, 0),
            Self::Lines => (2, LINES),
            Self::Slab => (2, 0),
            Self::LpmTrie => (11, NO_PREALLOC),
            Self::ArrayOfMaps => (12, 0),
        }
    }
}

/// `BPF_F_NO_PREALLOC`, which tries ask for.
const NO_PREALLOC: u32 = 1;
/// `BPF_F_MMAPABLE`, so that values begin where a page does, and `BPF_F_INNER_MAP`, so that arrays
/// of different sizes may stand in one place.
const LINES: u32 = 1 << 10 | 1 << 12;
/// `BPF_ANY`: make or replace.
pub const ANY: u64 = 0;
/// `BPF_NOEXIST`: only make.
pub const NEW: u64 = 1;

// Each attribute is as long as the kernel reads of it for its command; unknown tails are zero.
#[repr(C)]
#[derive(Default)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct ElemAttr {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct PinAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct RunAttr {
    program: u32,
    result: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration_ns: u32,
    contexts: [u64; 3],
    flags: u32,
    cpu: u32,
    batch_size: u32,
    zero: u32,
}

#[repr(C)]
#[derive(Default)]
struct DetachAttr {
    link: u32,
}

/// `TC_ACT_UNSPEC` (include/uapi/linux/pkt_cls.h): what the programs return for a packet that may go
/// on. Any other packet is dropped, or replaced by the answer to it.
const PASSED: u32 = u32::MAX;

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// The head of `struct bpf_link_info`, with the union's `tcx`; `xdp` has the index there too.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    zero: u32,
    ifindex: u32,
    attach_type: u32,
}

/// `bpf(2)`. The attribute must point only to memory that lives through the call and is as large as
/// the command reads and writes.
unsafe fn bpf<A>(command: i64, attr: &mut A) -> io::Result<i64> {
    // SAFETY: the attribute is valid for its whole size; what it points to is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<A>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn fd_number(fd: &OwnedFd) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX)
}

fn object_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = PinAttr {
        path: path.as_ptr() as u64,
        ..PinAttr::default()
    };
    // SAFETY: the path is a C string that lives through the call.
    let fd = unsafe { bpf(command::OBJ_GET, &mut attr) }?;
    let fd = i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt as _;
    Ok(std::ffi::CString::new(path.as_os_str().as_bytes())?)
}

/// Runs `program`, which returns `passed` for what may go on, on `packet`.
fn test_run(program: &OwnedFd, passed: u32, packet: &[u8], repeat: u32) -> io::Result<Run> {
    let mut attr = RunAttr {
        program: fd_number(program),
        data_size_in: u32::try_from(packet.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        data_in: packet.as_ptr() as u64,
        repeat,
        ..RunAttr::default()
    };
    // SAFETY: the packet lives through the call; no output is asked for.
    unsafe { bpf(command::PROG_TEST_RUN, &mut attr) }?;
    Ok(Run {
        passes: attr.result == passed,
        mean_ns: attr.duration_ns,
    })
}

/// The interface that a pinned tcx or XDP link is attached to; 0 after that is gone.
fn link_ifindex(path: &Path) -> io::Result<u32> {
    let link = object_get(path)?;
    let mut info = LinkInfo::default();
    let mut attr = InfoAttr {
        fd: fd_number(&link),
        len: u32::try_from(size_of::<LinkInfo>()).unwrap_or(0),
        info: (&raw mut info) as u64,
    };
    // SAFETY: `info` is writable for `len` bytes; the kernel writes no more than that.
    unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info.ifindex)
}

/// Takes the program of a pinned link off its interface at once: with the last descriptor it would go
/// some time later, and meanwhile be in the way of the next one.
fn detach_link(path: &Path) -> io::Result<()> {
    let link = object_get(path)?;
    let mut attr = DetachAttr {
        link: fd_number(&link),
    };
    // SAFETY: the attribute holds no pointers.
    unsafe { bpf(command::LINK_DETACH, &mut attr) }.map(drop)
}

/// A map by its descriptor. Keys and values are plain data whose sizes are checked against the
/// map's on every call, so no call reads or writes past them.
pub struct RawMap {
    fd: OwnedFd,
    name: String,
    info: MapInfo,
}

impl RawMap {
    /// The map behind a descriptor.
    pub(crate) fn from_fd(fd: BorrowedFd<'_>, name: &str) -> Result<Self, AclError> {
        let own = fd.try_clone_to_owned();
        own.and_then(|fd| Self::with_info(fd, name))
            .map_err(|source| failed("read", name, source))
    }

    /// The map pinned at `path`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn from_pin(path: &Path) -> io::Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Self::with_info(object_get(path)?, &name)
    }

    fn with_info(fd: OwnedFd, name: &str) -> io::Result<Self> {
        let mut info = MapInfo::default();
        let mut attr = InfoAttr {
            fd: fd_number(&fd),
            len: u32::try_from(size_of::<MapInfo>()).unwrap_or(0),
            info: (&raw mut info) as u64,
        };
        // SAFETY: `info` is writable for `len` bytes; the kernel writes no more than that.
        unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attr) }?;
        Ok(Self {
            fd,
            name: name.to_owned(),
            info,
        })
    }

    /// A new map; one of maps is told what its inner ones are like.
    pub(crate) fn create(
        kind: MapKind,
        name: &str,
        key_size: usize,
        value_size: usize,
        max_entries: usize,
        inner: Option<&Self>,
    ) -> Result<Self, AclError> {
        let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let (map_type, map_flags) = kind.as_made();
        let mut attr = CreateAttr {
            map_type,
            key_size: size(key_size),
            value_size: size(value_size),
            max_entries: size(max_entries),
            map_flags,
            inner_map_fd: inner.map_or(0, Self::number),
            ..CreateAttr::default()
        };
        for (to, from) in attr.name.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        // SAFETY: the attribute holds no pointers.
        let created = unsafe { bpf(command::MAP_CREATE, &mut attr) };
        let made = created.and_then(|fd| {
            let fd = i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
            // SAFETY: the kernel just made this descriptor for us.
            Self::with_info(unsafe { OwnedFd::from_raw_fd(fd) }, name)
        });
        made.map_err(|source| failed("create", name, source))
    }

    /// Pins the map.
    pub(crate) fn pin(&self, path: &Path) -> Result<(), AclError> {
        let pinned = c_path(path).and_then(|path| {
            let mut attr = PinAttr {
                path: path.as_ptr() as u64,
                fd: fd_number(&self.fd),
                flags: 0,
            };
            // SAFETY: the path is a C string that lives through the call.
            unsafe { bpf(command::OBJ_PIN, &mut attr) }
        });
        pinned.map(|_| ()).map_err(|source| AclError::Pin {
            path: path.to_owned(),
            source,
        })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Another handle on it.
    pub(crate) fn duplicate(&self) -> Result<Self, AclError> {
        Self::from_fd(self.fd.as_fd(), &self.name)
    }

    /// Most entries.
    pub(crate) fn capacity(&self) -> usize {
        self.info.max_entries as usize
    }

    /// Size of a value in bytes.
    pub(crate) fn value_size(&self) -> usize {
        self.info.value_size as usize
    }

    /// The kernel's number of the map, which no other has.
    pub(crate) fn id(&self) -> u32 {
        self.info.id
    }

    /// The descriptor's number, as outer maps take it for a value.
    #[must_use]
    pub fn number(&self) -> u32 {
        fd_number(&self.fd)
    }

    fn elem(
        &self,
        command: i64,
        what: &'static str,
        key: &[u8],
        value: *mut u8,
        flags: u64,
    ) -> Result<bool, AclError> {
        let error = |source| failed(what, &self.name, source);
        if key.len() != self.info.key_size as usize {
            return Err(error(io::ErrorKind::InvalidInput.into()));
        }
        let mut attr = ElemAttr {
            map_fd: fd_number(&self.fd),
            zero: 0,
            key: key.as_ptr() as u64,
            value: value as u64,
            flags,
        };
        // SAFETY: the key is as long as the map says (checked above); callers pass a value that is
        // as long as the map's, or null for commands without.
        match unsafe { bpf(command, &mut attr) } {
            Ok(_) => Ok(true),
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(source) => Err(error(source)),
        }
    }

    fn check_value(&self, what: &'static str, bytes: usize) -> Result<(), AclError> {
        if bytes == self.value_size() {
            return Ok(());
        }
        Err(failed(what, &self.name, io::ErrorKind::InvalidInput.into()))
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn get<K: IntoBytes + Immutable, V: FromBytes + IntoBytes>(
        &self,
        key: &K,
    ) -> Result<Option<V>, AclError> {
        self.check_value("read", size_of::<V>())?;
        let mut value = V::new_zeroed();
        let to = value.as_mut_bytes().as_mut_ptr();
        let found = self.elem(command::MAP_LOOKUP_ELEM, "read", key.as_bytes(), to, 0)?;
        Ok(found.then_some(value))
    }

    /// The values of `key` on all CPUs.
    fn get_per_cpu<K: IntoBytes + Immutable, V: FromBytes + IntoBytes + Copy>(
        &self,
        key: &K,
    ) -> Result<Vec<V>, AclError> {
        // The kernel gives each CPU a multiple of eight bytes.
        const { assert!(size_of::<V>().is_multiple_of(8)) };
        self.check_value("read", size_of::<V>())?;
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| failed("count", "CPUs", source))?;
        let mut values = vec![V::new_zeroed(); cpus];
        let to = values.as_mut_slice().as_mut_ptr().cast();
        let found = self.elem(command::MAP_LOOKUP_ELEM, "read", key.as_bytes(), to, 0)?;
        Ok(if found { values } else { Vec::new() })
    }

    /// Writes one entry; whether it was written (with [`NEW`], `false` if it was there).
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn put<K: IntoBytes + Immutable, V: IntoBytes + Immutable>(
        &self,
        key: &K,
        value: &V,
        flags: u64,
    ) -> Result<bool, AclError> {
        let bytes = value.as_bytes();
        self.check_value("write", bytes.len())?;
        let value = bytes.as_ptr().cast_mut();
        match self.elem(
            command::MAP_UPDATE_ELEM,
            "write",
            key.as_bytes(),
            value,
            flags,
        ) {
            Err(AclError::Map { source, .. }) if source.raw_os_error() == Some(libc::EEXIST) => {
                Ok(false)
            }
            other => other,
        }
    }

    /// Removes one entry; whether it was there.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn remove<K: IntoBytes + Immutable>(&self, key: &K) -> Result<bool, AclError> {
        let null = std::ptr::null_mut();
        self.elem(
            command::MAP_DELETE_ELEM,
            "remove from",
            key.as_bytes(),
            null,
            0,
        )
    }

    /// Writes many entries: in one call where the kernel has batches for this kind of map.
    pub(crate) fn put_all<K: IntoBytes + Immutable, V: IntoBytes + Immutable>(
        &self,
        keys: &[K],
        values: &[V],
    ) -> Result<(), AclError> {
        let error = |source| failed("fill", &self.name, source);
        self.check_value("fill", size_of::<V>())?;
        if size_of::<K>() != self.info.key_size as usize || keys.len() != values.len() {
            return Err(error(io::ErrorKind::InvalidInput.into()));
        }
        if keys.is_empty() {
            return Ok(());
        }
        let mut attr = BatchAttr {
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: u32::try_from(keys.len())
                .map_err(|_| error(io::ErrorKind::InvalidInput.into()))?,
            map_fd: fd_number(&self.fd),
            ..BatchAttr::default()
        };
        // SAFETY: `count` keys and values of the map's sizes (checked above) live through the call.
        match unsafe { bpf(command::MAP_UPDATE_BATCH, &mut attr) } {
            Ok(_) => Ok(()),
            // ENOTSUPP, which libc does not name: no batches for this kind of map.
            Err(source) if matches!(source.raw_os_error(), Some(524 | libc::EINVAL)) => {
                for (key, value) in keys.iter().zip(values) {
                    self.put(key, value, ANY)?;
                }
                Ok(())
            }
            Err(source) => Err(error(source)),
        }
    }

    /// Removes all entries, if they are at most so many; whether it is empty now.
    pub(crate) fn clear<K>(&self, most: usize) -> Result<bool, AclError>
    where
        K: FromBytes + IntoBytes + Immutable + Copy,
    {
        let mut key = K::new_zeroed();
        for _ in 0..=most {
            if !self.first_key(key.as_mut_bytes().as_mut_ptr())? {
                return Ok(true);
            }
            self.remove(&key)?;
        }
        Ok(false)
    }

    /// At most `limit` entries, in no order. Entries that come or go meanwhile may be missed.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn entries<K, V>(&self, limit: usize) -> Result<Vec<(K, V)>, AclError>
    where
        K: FromBytes + IntoBytes + Immutable + Copy,
        V: FromBytes + IntoBytes,
    {
        self.check_value("list", size_of::<V>())?;
        let entries = self.raw_entries(limit)?;
        let typed = entries
            .into_iter()
            .filter_map(|(key, bytes)| Some((key, V::read_from_bytes(&bytes).ok()?)));
        Ok(typed.collect())
    }

    /// The same with values as bytes, for maps of another layout.
    pub(crate) fn raw_entries<K>(&self, limit: usize) -> Result<Vec<(K, Vec<u8>)>, AclError>
    where
        K: FromBytes + IntoBytes + Immutable + Copy,
    {
        if size_of::<K>() != self.info.key_size as usize {
            return Err(failed(
                "list",
                &self.name,
                io::ErrorKind::InvalidInput.into(),
            ));
        }
        let mut entries = Vec::new();
        let mut at: Option<K> = None;
        while entries.len() < limit {
            let mut next = K::new_zeroed();
            let to = next.as_mut_bytes().as_mut_ptr();
            let found = match &at {
                Some(key) => {
                    let key = key.as_bytes();
                    self.elem(command::MAP_GET_NEXT_KEY, "list", key, to, 0)?
                }
                None => self.first_key(to)?,
            };
            if !found {
                break;
            }
            let mut value = vec![0; self.value_size()];
            let to = value.as_mut_ptr();
            if self.elem(command::MAP_LOOKUP_ELEM, "list", next.as_bytes(), to, 0)? {
                entries.push((next, value));
            }
            at = Some(next);
        }
        Ok(entries)
    }

    /// The first key, to `to`, which has the size of one.
    fn first_key(&self, to: *mut u8) -> Result<bool, AclError> {
        let mut attr = ElemAttr {
            map_fd: fd_number(&self.fd),
            value: to as u64,
            ..ElemAttr::default()
        };
        // SAFETY: a null key asks for the first; callers pass room for one key.
        match unsafe { bpf(command::MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(_) => Ok(true),
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(source) => Err(failed("list", &self.name, source)),
        }
    }
}

fn failed(what: &'static str, map: &str, source: io::Error) -> AclError {
    AclError::Map {
        what,
        map: map.to_owned(),
        source,
    }
}

/// The words of an array, mapped: they are read and written as the programs do it.
struct Mapped {
    words: std::ptr::NonNull<AtomicU64>,
    count: usize,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone and is only touched by atomic operations.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps them all.
    fn map(map: &RawMap) -> Result<Self, AclError> {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).unwrap_or(4096);
        let size = map.value_size().next_multiple_of(size_of::<u64>());
        let count = map.capacity() * size / size_of::<u64>();
        let bytes = (count * size_of::<u64>()).next_multiple_of(page);
        // SAFETY: a fresh shared mapping of whole pages of the map; it is unmapped on drop.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(failed("map", &map.name, io::Error::last_os_error()));
        }
        let words = std::ptr::NonNull::new(address.cast())
            .ok_or_else(|| failed("map", &map.name, io::ErrorKind::InvalidData.into()))?;
        Ok(Self {
            words,
            count,
            bytes,
        })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped for as long as this value lives, aligned to a page, so many words, and only
        // ever accessed atomically from here.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }

    /// The same memory in halves of words. Whoever uses both uses each for other parts of it.
    fn halves(&self) -> &[AtomicU32] {
        // SAFETY: as for `words`.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), 2 * self.count) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping, never used again.
        unsafe {
            libc::munmap(self.words.as_ptr().cast(), self.bytes);
        }
    }
}
