//! The two slots: filling the idle one and making it count, or changing single entries.
//!
//! *A swap.* Inner maps of the right size are made and filled, put into the idle slot of each outer
//! map, and then the active word is stored. A packet reads the word once, so it meets one policy.
//! A packet that read the word *before* the last swap might still be on its way through the slot
//! that is now idle; so nothing is put there before a grace period has passed ([`grace`]).
//!
//! *In place.* A change that only adds goes into the active slot, what is named before what names
//! it, and then the word gets its next revision: refusals that the programs remember end with it.
//! Entries there are never changed or removed: the kernel gives their memory to the next one
//! that is added, while a packet may still be reading it.

use super::{ANY, Acl, AclError, MapKind, NEW, RawMap};
use ebpf::abi::{
    Active, Addr, Identity, Page, PageKey, PairKey, Ports, PortsKey, SLOTS, SetId, maps,
};
use engine::acl::{Change, Patch, PrefixKey, Tables};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct bpf_lpm_trie_key`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct TrieKey {
    bits: u32,
    addr: Addr,
}

impl TrieKey {
    /// The key that finds the longest prefix around `addr`.
    pub(super) fn around(addr: Addr) -> Self {
        Self { bits: 128, addr }
    }
}

impl From<PrefixKey> for TrieKey {
    fn from(key: PrefixKey) -> Self {
        Self {
            bits: key.bits,
            addr: key.addr,
        }
    }
}

/// Room for what joins before the next swap: a quarter, and this many entries.
const SPARE_ENTRIES: usize = 256;

/// The inner maps of one slot, in the order of [`maps::SLOTTED`].
pub(super) struct Slot {
    pub(super) identities: RawMap,
    pub(super) prefixes: RawMap,
    pub(super) pairs: RawMap,
    pub(super) ports: RawMap,
    pub(super) pages: RawMap,
}

impl Slot {
    /// The maps are filled side by side: the large ones take the time.
    fn filled(tables: &Tables) -> Result<Self, AclError> {
        let Tables {
            identities,
            prefixes,
            pairs,
            ports,
            pages,
        } = tables;
        std::thread::scope(|scope| {
            let hash = MapKind::Hash;
            let pairs = scope.spawn(move || filled(maps::PAIRS, hash, pairs_of(pairs)));
            let ports = scope.spawn(move || filled(maps::PORTS, hash, pairs_of(ports)));
            let pages = scope.spawn(move || filled(maps::PAGES, hash, pairs_of(pages)));
            let trie = |(key, value): (&PrefixKey, &Identity)| (TrieKey::from(*key), *value);
            let prefixes = prefixes.iter().map(trie).unzip();
            Ok(Self {
                identities: filled(maps::IDENTITIES, hash, pairs_of(identities))?,
                prefixes: filled(maps::PREFIXES, MapKind::LpmTrie, prefixes)?,
                pairs: joined(pairs)?,
                ports: joined(ports)?,
                pages: joined(pages)?,
            })
        })
    }

    fn maps(&self) -> [&RawMap; 5] {
        [
            &self.identities,
            &self.prefixes,
            &self.pairs,
            &self.ports,
            &self.pages,
        ]
    }

    /// The maps of slot `number` that a former agent pinned; `None` if one is missing.
    pub(super) fn from_pins(folder: &Path, number: u32) -> Option<Self> {
        let open = |name: &str| RawMap::from_pin(&pin_path(folder, name, number)).ok();
        Some(Self {
            identities: open(maps::IDENTITIES)?,
            prefixes: open(maps::PREFIXES)?,
            pairs: open(maps::PAIRS)?,
            ports: open(maps::PORTS)?,
            pages: open(maps::PAGES)?,
        })
    }

    /// Writes what the maps hold to `text`, at most `limit` entries of each.
    pub(super) fn dump(&self, text: &mut String, limit: usize) -> Result<(), AclError> {
        for (key, value) in self.identities.entries::<Addr, Identity>(limit)? {
            let _ = writeln!(text, "identity {key:?} {value:?}");
        }
        for (key, value) in self.prefixes.entries::<TrieKey, Identity>(limit)? {
            let _ = writeln!(text, "prefix {:?}/{} {value:?}", key.addr, key.bits);
        }
        for (key, value) in self.pairs.entries::<PairKey, SetId>(limit)? {
            let _ = writeln!(text, "pair {key:?} set {value}");
        }
        for (key, value) in self.ports.entries::<PortsKey, Ports>(limit)? {
            let _ = writeln!(text, "ports {key:?} {value:?}");
        }
        for (key, value) in self.pages.entries::<PageKey, Page>(limit)? {
            let _ = writeln!(text, "page {key:?} {value:x?}");
        }
        Ok(())
    }
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn pairs_of<K: Copy, V: Copy>(table: &std::collections::BTreeMap<K, V>) -> (Vec<K>, Vec<V>) {
    table.iter().map(|(key, value)| (*key, *value)).unzip()
}

fn filled<K: IntoBytes + Immutable, V: IntoBytes + Immutable>(
    name: &str,
    kind: MapKind,
    (keys, values): (Vec<K>, Vec<V>),
) -> Result<RawMap, AclError> {
    let room = keys.len() + keys.len() / 4 + SPARE_ENTRIES;
    let map = RawMap::create(kind, name, size_of::<K>(), size_of::<V>(), room, None)?;
    map.put_all(&keys, &values)?;
    Ok(map)
}

/// Makes and pins the outer maps that are not there yet. Not left to the loader: it would describe
/// the inner maps by BTF, and Linux 6.1 then takes none that has no BTF of its own.
pub(super) fn make_outer(layout: &Path) -> Result<(), AclError> {
    let shapes = [
        (MapKind::Hash, size_of::<Addr>(), size_of::<Identity>()),
        (
            MapKind::LpmTrie,
            size_of::<TrieKey>(),
            size_of::<Identity>(),
        ),
        (MapKind::Hash, size_of::<PairKey>(), size_of::<SetId>()),
        (MapKind::Hash, size_of::<PortsKey>(), size_of::<Ports>()),
        (MapKind::Hash, size_of::<PageKey>(), size_of::<Page>()),
    ];
    for (name, (kind, key, value)) in maps::SLOTTED.into_iter().zip(shapes) {
        let path = layout.join(name);
        if !path.exists() {
            let inner = RawMap::create(kind, name, key, value, 1, None)?;
            let (index, slots) = (size_of::<u32>(), SLOTS as usize);
            let of_maps = MapKind::ArrayOfMaps;
            RawMap::create(of_maps, name, index, index, slots, Some(&inner))?.pin(&path)?;
        }
    }
    Ok(())
}

fn pin_path(folder: &Path, name: &str, slot: u32) -> PathBuf {
    folder.join(format!("{name}-{slot}"))
}

/// Writes a policy.
pub(super) fn set(acl: &mut Acl, tables: &Tables, change: Option<&Change>) -> Result<(), AclError> {
    // What only widens need not be decided again; what nobody knows must.
    let narrows = match change {
        Some(Change::None) if acl.active().epoch != 0 => return Ok(()),
        Some(Change::InPlace(patch)) => {
            match apply(acl, patch) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // A map may be full: the swap makes room.
                Err(error) => tracing::debug!(%error, "not in place"),
            }
            false
        }
        Some(Change::Swap { narrows }) => *narrows,
        Some(Change::None) | None => true,
    };
    swap(acl, tables, narrows)
}

fn swap(acl: &mut Acl, tables: &Tables, narrows: bool) -> Result<(), AclError> {
    let active = acl.active();
    let next = Active {
        revision: active.revised().revision,
        slot: if active.epoch == 0 {
            active.slot
        } else {
            (active.slot + 1) % SLOTS
        },
        epoch: raised(active.epoch, narrows),
    };
    let slot = std::thread::scope(|scope| {
        let waited = scope.spawn(|| grace(acl));
        let slot = Slot::filled(tables);
        joined(waited)?;
        slot
    })?;
    put_into(acl, &slot, next.slot)?;
    for (name, map) in maps::SLOTTED.iter().zip(slot.maps()) {
        let path = pin_path(&acl.layout, name, next.slot);
        let _ = std::fs::remove_file(&path);
        map.pin(&path)?;
    }
    acl.word.store(next);
    acl.slots[next.slot as usize] = Some(slot);
    Ok(())
}

/// Epoch 0 means that nothing is active; it is never stored again.
fn raised(epoch: u32, narrows: bool) -> u32 {
    if narrows || epoch == 0 {
        epoch.checked_add(1).unwrap_or(1)
    } else {
        epoch
    }
}

/// Puts inner maps into the outer ones. Each write waits for a grace period, so they go at once.
fn put_into(acl: &Acl, slot: &Slot, number: u32) -> Result<(), AclError> {
    std::thread::scope(|scope| {
        let writes = acl.outer.iter().zip(slot.maps()).map(|(outer, inner)| {
            scope.spawn(move || outer.put(&number, &inner.number(), ANY).map(|_| ()))
        });
        let writes: Vec<_> = writes.collect();
        writes.into_iter().try_for_each(joined)
    })
}

/// Returns when no packet that was on its way before is on its way any more: putting an inner map
/// where it already is changes nothing, and the kernel waits for exactly that
/// (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c).
fn grace(acl: &Acl) -> Result<(), AclError> {
    let active = acl.active();
    match (&acl.outer, &acl.slots[active.slot as usize]) {
        ([identities, ..], Some(slot)) if active.epoch != 0 => identities
            .put(&active.slot, &slot.identities.number(), ANY)
            .map(|_| ()),
        _ => Ok(()),
    }
}

/// Adds entries to the active slot; `false` if nobody holds that slot.
fn apply(acl: &Acl, patch: &Patch) -> Result<bool, AclError> {
    let active = acl.active();
    let slot = acl.slots[active.slot as usize].as_ref();
    let Some(slot) = slot.filter(|_| active.epoch != 0) else {
        return Ok(false);
    };
    put_each(&slot.pages, &patch.pages)?;
    put_each(&slot.ports, &patch.ports)?;
    put_each(&slot.pairs, &patch.pairs)?;
    for (key, identity) in &patch.prefixes {
        slot.prefixes.put(&TrieKey::from(*key), identity, NEW)?;
    }
    put_each(&slot.identities, &patch.identities)?;
    acl.word.store(active.revised());
    Ok(true)
}

fn put_each<K: IntoBytes + Immutable, V: IntoBytes + Immutable>(
    map: &RawMap,
    entries: &[(K, V)],
) -> Result<(), AclError> {
    entries
        .iter()
        .try_for_each(|(key, value)| map.put(key, value, NEW).map(|_| ()))
}
