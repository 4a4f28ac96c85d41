//! The two slots: filling the idle one and making it count, or changing single entries.
//!
//! *A swap.* The tables of the idle slot are filled again where they have room, and replaced where
//! not; then the active word is stored. A packet reads the word once, so it meets one policy. A packet
//! that read the word *before* the last swap might still be on its way through the slot that is now
//! idle; so nothing is written there before a grace period has passed. That begins when the word is
//! stored ([`Settling`]), and is long over when somebody changes policy again.
//!
//! *In place.* A change that only adds goes into the active slot, what is named before what names it.
//! Entries there are never changed or removed: a packet may be reading them. What goes into a line is
//! written first without its key, which nobody finds, and then with it. What a line says of the node
//! itself it says of the address that the node had first when the slot was filled ([`Shape`]).

use super::{ANY, Acl, AclError, MapKind, NEW, RawMap, failed};
use ebpf::abi::{
    Active, Addr, Grant, Identity, Page, PageKey, PairKey, Ports, PortsKey, SLOTS, maps,
};
use ebpf::addresses::{Book, Home};
use ebpf::lines::{Granted, GrantedLine, Plan, Shape, hash_of_pair, pair_word, places};
use engine::acl::lines::{Laid, granted, lay, lines_for};
use engine::acl::{Change, Patch, PrefixKey, Tables, addresses};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct bpf_lpm_trie_key`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct TrieKey {
    bits: u32,
    /// An [`Addr`], but aligned as this one has it.
    words: [u32; 4],
}

impl TrieKey {
    /// The key that finds the longest prefix around `addr`.
    pub(super) fn around(addr: Addr) -> Self {
        Self {
            bits: 128,
            words: addr.words,
        }
    }
}

impl From<PrefixKey> for TrieKey {
    fn from(key: PrefixKey) -> Self {
        Self {
            bits: key.bits,
            words: key.addr.words,
        }
    }
}

/// Room for what joins before the next swap: a quarter, and this many entries.
const SPARE_ENTRIES: usize = 256;
/// A table with more entries is replaced; one with fewer is emptied.
const MOST_REMOVED: usize = 4_096;
/// A table of lines that has more of them than this times what is needed is replaced.
const MOST_TOO_LARGE: usize = 4;

/// One slot: how it is looked into, and its inner maps beside the slabs of addresses.
pub(super) struct Slot {
    prefixes: RawMap,
    pairs: RawMap,
    ports: RawMap,
    pages: RawMap,
    shape: Shape,
}

/// Tables that are laid out.
struct Lines {
    addresses: addresses::Laid,
    pairs: Laid,
}

impl Lines {
    /// Lays them out: of pairs as many lines as `former` has room for, if that is enough and not far
    /// too much.
    fn of(tables: &Tables, former: Option<&Slot>, shift: u32) -> Result<Self, AclError> {
        let least = lines_for(tables.pairs.len());
        let room = former.map_or(0, |slot| slot.pairs.capacity());
        let count = if (least..=least * MOST_TOO_LARGE).contains(&room) {
            room
        } else {
            least
        };
        std::thread::scope(|scope| {
            let pairs = scope.spawn(move || lay(&tables.pairs, count));
            let addresses = addresses::lay(tables, shift);
            Ok(Self {
                pairs: joined(pairs).ok_or_else(|| full("lay out", maps::PAIRS))?,
                addresses: addresses.ok_or_else(|| full("lay out", maps::IDENTITIES))?,
            })
        })
    }
}

fn full(what: &'static str, name: &str) -> AclError {
    failed(what, name, std::io::ErrorKind::StorageFull.into())
}

impl Slot {
    /// Fills the maps of `former`, which nobody reads, or new ones.
    fn filled(former: Option<Self>, tables: &Tables, lines: &Lines) -> Result<Self, AclError> {
        let Tables {
            prefixes,
            ports,
            pages,
            ..
        } = tables;
        let former = former.map(|slot| {
            let Self {
                prefixes,
                pairs,
                ports,
                pages,
                ..
            } = slot;
            [prefixes, pairs, ports, pages].map(Some)
        });
        let [old_prefixes, old_pairs, old_ports, old_pages] = former.unwrap_or_default();
        let hash = MapKind::Hash;
        let trie = |(key, value): (&PrefixKey, &Identity)| (TrieKey::from(*key), *value);
        let prefixes = prefixes.iter().map(trie).unzip();
        Ok(Self {
            prefixes: filled(maps::PREFIXES, old_prefixes, MapKind::LpmTrie, prefixes)?,
            ports: filled(maps::PORTS, old_ports, hash, pairs_of(ports))?,
            pages: filled(maps::PAGES, old_pages, hash, pairs_of(pages))?,
            pairs: written(maps::PAIRS, old_pairs, &lines.pairs)?,
            shape: Shape {
                book: lines.addresses.book,
                pairs: lines.pairs.plan,
                own: addresses::homes(tables),
            },
        })
    }

    /// In the order of [`maps::SLOTTED`].
    fn maps(&self) -> [&RawMap; 4] {
        [&self.prefixes, &self.pairs, &self.ports, &self.pages]
    }

    /// The maps of slot `number` that a former agent pinned; `None` if one is missing.
    pub(super) fn from_pins(folder: &Path, number: u32, shapes: &RawMap) -> Option<Self> {
        let open = |name: &str| RawMap::from_pin(&pin_path(folder, name, number)).ok();
        Some(Self {
            prefixes: open(maps::PREFIXES)?,
            pairs: open(maps::PAIRS)?,
            ports: open(maps::PORTS)?,
            pages: open(maps::PAGES)?,
            shape: shapes.get(&number).ok().flatten()?,
        })
    }

    /// How the table of addresses is looked into.
    pub(super) fn book(&self) -> Book {
        self.shape.book
    }

    /// The addresses of this node that lines speak of.
    pub(super) fn homes(&self) -> &[Home; 2] {
        &self.shape.own
    }

    /// Who has the longest prefix around this address.
    pub(super) fn route(&self, addr: &Addr) -> Option<Identity> {
        self.prefixes.get(&TrieKey::around(*addr)).ok().flatten()
    }

    /// What one class may initiate to another.
    pub(super) fn grant(&self, key: &PairKey) -> Option<Grant> {
        let (pair, Plan { seed, lines, .. }) = (pair_word(key), self.shape.pairs);
        places(hash_of_pair(pair, seed), lines)
            .into_iter()
            .find_map(|place| {
                let line: GrantedLine = self.pairs.get(&place).ok().flatten()?;
                line.find(pair).copied()
            })
    }

    /// One protocol of a port set.
    pub(super) fn ports(&self, key: &PortsKey) -> Option<Ports> {
        self.ports.get(key).ok().flatten()
    }

    /// A page of ports.
    pub(super) fn page(&self, key: &PageKey) -> Option<Page> {
        self.pages.get(key).ok().flatten()
    }

    /// Writes what the maps hold to `text`, at most `limit` entries of each.
    pub(super) fn dump(&self, text: &mut String, limit: usize) -> Result<(), AclError> {
        for (key, value) in self.prefixes.entries::<TrieKey, Identity>(limit)? {
            let addr = Addr { words: key.words };
            let _ = writeln!(text, "prefix {addr:?}/{} {value:?}", key.bits);
        }
        for (_, line) in self.pairs.entries::<u32, GrantedLine>(limit)? {
            for (key, grant) in line.entries.iter().filter_map(granted) {
                let _ = writeln!(text, "pair {key:?} {grant:?}");
            }
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
    joined_any(thread.join())
}

fn joined_any<T>(ended: std::thread::Result<T>) -> T {
    match ended {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn pairs_of<K: Copy, V: Copy>(table: &BTreeMap<K, V>) -> (Vec<K>, Vec<V>) {
    table.iter().map(|(key, value)| (*key, *value)).unzip()
}

/// A map with these entries and no others: `former`, emptied, if it has the room.
fn filled<K, V>(
    name: &str,
    former: Option<RawMap>,
    kind: MapKind,
    (keys, values): (Vec<K>, Vec<V>),
) -> Result<RawMap, AclError>
where
    K: FromBytes + IntoBytes + Immutable + Copy,
    V: IntoBytes + Immutable,
{
    let former = former.filter(|map| map.capacity() >= keys.len());
    let emptied = match former {
        Some(map) => map.clear::<K>(MOST_REMOVED)?.then_some(map),
        None => None,
    };
    let map = match emptied {
        Some(map) => map,
        None => {
            let room = keys.len() + keys.len() / 4 + SPARE_ENTRIES;
            RawMap::create(kind, name, size_of::<K>(), size_of::<V>(), room, None)?
        }
    };
    map.put_all(&keys, &values)?;
    Ok(map)
}

/// A map of just these lines.
fn written(name: &str, former: Option<RawMap>, laid: &Laid) -> Result<RawMap, AclError> {
    let count = laid.lines.len();
    let map = match former.filter(|map| map.capacity() == count) {
        Some(map) => map,
        None => {
            let (key, value) = (size_of::<u32>(), size_of::<GrantedLine>());
            RawMap::create(MapKind::Lines, name, key, value, count, None)?
        }
    };
    let numbers: Vec<u32> = (0..laid.plan.lines).collect();
    map.put_all(&numbers, &laid.lines)?;
    Ok(map)
}

/// Makes and pins the outer maps that are not there yet. Not left to the loader: it would describe
/// the inner maps by BTF, and Linux 6.1 then takes none that has no BTF of its own.
pub(super) fn make_outer(layout: &Path) -> Result<(), AclError> {
    let shapes = [
        (
            MapKind::LpmTrie,
            size_of::<TrieKey>(),
            size_of::<Identity>(),
        ),
        (MapKind::Lines, size_of::<u32>(), size_of::<GrantedLine>()),
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
            match apply(acl, tables, patch) {
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
        slot: if active.epoch == 0 {
            active.slot
        } else {
            (active.slot + 1) % SLOTS
        },
        epoch: raised(active.epoch, narrows),
    };
    let idle = next.slot as usize;
    let shift = acl.addresses.shift();
    let lines = Lines::of(tables, acl.slots[idle].as_ref(), shift)?;
    settled(acl)?;
    // Whatever goes wrong from here on, nobody finds anything there.
    acl.shapes.put(&next.slot, &Shape::NONE, ANY)?;
    let former = acl.slots[idle].take();
    let there = former.as_ref().map(|slot| slot.maps().map(RawMap::id));
    let slot = std::thread::scope(|scope| {
        let (filled, lines) = (&mut acl.addresses, &lines);
        let addresses = scope.spawn(move || filled.write(next.slot, &lines.addresses));
        let slot = Slot::filled(former, tables, lines);
        joined(addresses).and(slot)
    })?;
    put_into(acl, &slot, next.slot, there)?;
    acl.shapes.put(&next.slot, &slot.shape, ANY)?;
    acl.word.store(next);
    acl.slots[idle] = Some(slot);
    acl.settling = Settling::begin(acl);
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

/// Puts the inner maps that are not there yet into the outer ones, and pins them. Each write waits
/// for a grace period, so they go at once. `there`: the ids of those that are there.
fn put_into(acl: &Acl, slot: &Slot, number: u32, there: Option<[u32; 4]>) -> Result<(), AclError> {
    let there = there.unwrap_or_default();
    let places = maps::SLOTTED.iter().zip(&acl.outer).zip(slot.maps());
    let new: Vec<_> = places
        .zip(there)
        .filter(|((_, inner), there)| inner.id() != *there)
        .map(|(((name, outer), inner), _)| (name, outer, inner))
        .collect();
    std::thread::scope(|scope| {
        let writes = new.iter().map(|&(_, outer, inner)| {
            scope.spawn(move || outer.put(&number, &inner.number(), ANY).map(|_| ()))
        });
        let writes: Vec<_> = writes.collect();
        writes.into_iter().try_for_each(joined)
    })?;
    for (name, _, inner) in new {
        let path = pin_path(&acl.layout, name, number);
        let _ = std::fs::remove_file(&path);
        inner.pin(&path)?;
    }
    Ok(())
}

/// A grace period: at its end no packet that was on its way at its beginning is on its way any more.
pub(super) struct Settling(std::thread::JoinHandle<Result<(), AclError>>);

impl Settling {
    /// Begins one; `None` if there is no thread for it, or nothing is active yet.
    fn begin(acl: &Acl) -> Option<Self> {
        let active = acl.active();
        let slot = acl.slots[active.slot as usize].as_ref();
        let slot = slot.filter(|_| active.epoch != 0)?;
        let [outer, ..] = &acl.outer;
        let (outer, inner) = (outer.duplicate().ok()?, slot.prefixes.duplicate().ok()?);
        let wait = move || grace(&outer, active.slot, &inner);
        let thread = std::thread::Builder::new().name("settling".to_owned());
        thread.spawn(wait).ok().map(Self)
    }
}

/// Returns when no packet reads the idle slot any more.
pub(super) fn settled(acl: &mut Acl) -> Result<(), AclError> {
    if let Some(Settling(thread)) = acl.settling.take() {
        return joined_any(thread.join());
    }
    grace_now(acl)
}

/// Returns when every packet that is on its way now is through.
pub(super) fn grace_now(acl: &Acl) -> Result<(), AclError> {
    let active = acl.active();
    match (&acl.outer, &acl.slots[active.slot as usize]) {
        ([prefixes, ..], Some(slot)) if active.epoch != 0 => {
            grace(prefixes, active.slot, &slot.prefixes)
        }
        _ => Ok(()),
    }
}

/// Putting an inner map where it already is changes nothing, and the kernel waits for exactly what
/// is wanted (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c).
fn grace(outer: &RawMap, number: u32, inner: &RawMap) -> Result<(), AclError> {
    outer.put(&number, &inner.number(), ANY).map(|_| ())
}

/// Adds entries to the active slot, so that it holds `tables`; `false` if nobody holds that slot.
fn apply(acl: &Acl, tables: &Tables, patch: &Patch) -> Result<bool, AclError> {
    let active = acl.active();
    let slot = acl.slots[active.slot as usize].as_ref();
    let Some(slot) = slot.filter(|_| active.epoch != 0) else {
        return Ok(false);
    };
    put_each(&slot.pages, &patch.pages)?;
    put_each(&slot.ports, &patch.ports)?;
    for entry in &patch.pairs {
        add(&slot.pairs, &slot.shape.pairs, Granted::from(*entry))?;
    }
    for (key, identity) in &patch.prefixes {
        slot.prefixes.put(&TrieKey::from(*key), identity, NEW)?;
    }
    for (addr, identity) in &patch.identities {
        let line = addresses::line(tables, &slot.shape.own, *addr, *identity);
        acl.addresses.add(active.slot, &slot.shape.book, &line)?;
    }
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

/// Adds an entry to one of its lines. Both may be full: then it is the next swap that makes room.
fn add(map: &RawMap, plan: &Plan, entry: Granted) -> Result<(), AclError> {
    for place in places(hash_of_pair(entry.pair, plan.seed), plan.lines) {
        let Some(mut line) = map.get::<u32, GrantedLine>(&place)? else {
            continue;
        };
        let free = line
            .entries
            .iter()
            .position(|entry| *entry == Granted::NONE);
        if let Some(free) = free {
            for entry in [entry.nameless(), entry] {
                line.entries[free] = entry;
                map.put(&place, &line, ANY)?;
            }
            return Ok(());
        }
    }
    Err(full("add to", map.name()))
}
