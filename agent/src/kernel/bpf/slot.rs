//! One slot of the policy tables: fresh inner maps, sized for what goes into them.

use super::{AclError, Wire};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{ArrayOfMaps, HashMap, Map, MapData, MapError};
use ebpf::abi::{Addr, Identity, Page, PageKey, PairKey, Ports, PortsKey, SetId, maps};
use engine::acl::{Patch, PrefixKey, Tables};
use std::collections::BTreeMap;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// `BPF_F_NO_PREALLOC` (linux/bpf.h); a trie is never allocated ahead.
const NO_PREALLOC: u32 = 1;
/// Room for entries that are added in place, beside a quarter of what is there.
const SPARE: usize = 64;
/// Bits of an address.
const ADDR_BITS: u32 = 128;

type Hash<K, V> = HashMap<MapData, Wire<K>, Wire<V>>;
type Trie = LpmTrie<MapData, Wire<Addr>, Wire<Identity>>;
type Outermost<M> = ArrayOfMaps<MapData, M>;

/// The outer maps, which say where a slot's tables are.
pub(super) struct Outer {
    identities: Outermost<Hash<Addr, Identity>>,
    prefixes: Outermost<Trie>,
    pairs: Outermost<Hash<PairKey, SetId>>,
    ports: Outermost<Hash<PortsKey, Ports>>,
    pages: Outermost<Hash<PageKey, Page>>,
}

impl Outer {
    /// From the maps of the object.
    pub(super) fn new(
        take: &mut impl FnMut(&'static str) -> Result<Map, AclError>,
    ) -> Result<Self, AclError> {
        Ok(Self {
            identities: take(maps::IDENTITIES)?.try_into()?,
            prefixes: take(maps::PREFIXES)?.try_into()?,
            pairs: take(maps::PAIRS)?.try_into()?,
            ports: take(maps::PORTS)?.try_into()?,
            pages: take(maps::PAGES)?.try_into()?,
        })
    }

    /// Makes `slot` the tables of the slot `index`, which must not be active. Returns when no
    /// program uses the old ones any more.
    pub(super) fn put(&mut self, index: u32, slot: &Slot) -> Result<(), MapError> {
        self.identities.set(index, &slot.identities, 0)?;
        self.prefixes.set(index, &slot.prefixes, 0)?;
        self.pairs.set(index, &slot.pairs, 0)?;
        self.ports.set(index, &slot.ports, 0)?;
        self.pages.set(index, &slot.pages, 0)
    }
}

/// The tables of one slot.
pub(super) struct Slot {
    identities: Hash<Addr, Identity>,
    prefixes: Trie,
    pairs: Hash<PairKey, SetId>,
    ports: Hash<PortsKey, Ports>,
    pages: Hash<PageKey, Page>,
    /// Entries that each has room for, in the order of the fields.
    room: [usize; 5],
}

impl Slot {
    /// New maps with the contents of `tables`.
    pub(super) fn fill(tables: &Tables) -> Result<Self, MapError> {
        let room = sizes(tables).map(|entries| entries + entries / 4 + SPARE);
        let [identities, prefixes, pairs, ports, pages] = room;
        let mut trie = Trie::create(entries(prefixes), NO_PREALLOC)?;
        for (key, identity) in &tables.prefixes {
            trie.insert(&prefix(key), Wire(*identity), 0)?;
        }
        Ok(Self {
            identities: hash(&tables.identities, identities)?,
            prefixes: trie,
            pairs: hash(&tables.pairs, pairs)?,
            ports: hash(&tables.ports, ports)?,
            pages: hash(&tables.pages, pages)?,
            room,
        })
    }

    /// Whether all of `tables` fits.
    pub(super) fn has_room_for(&self, tables: &Tables) -> bool {
        sizes(tables)
            .iter()
            .zip(self.room)
            .all(|(entries, room)| *entries <= room)
    }

    /// Adds entries: what is named before what names it, longer prefixes before shorter ones.
    pub(super) fn add(&mut self, patch: &Patch) -> Result<(), MapError> {
        write(&mut self.pages, &patch.pages)?;
        write(&mut self.ports, &patch.ports)?;
        write(&mut self.pairs, &patch.pairs)?;
        for (key, identity) in &patch.prefixes {
            self.prefixes.insert(&prefix(key), Wire(*identity), 0)?;
        }
        write(&mut self.identities, &patch.identities)
    }

    /// Who has exactly this address.
    pub(super) fn identity(&self, addr: &Addr) -> Option<Identity> {
        read(&self.identities, addr)
    }

    /// Who has the longest prefix around this address.
    pub(super) fn route(&self, addr: &Addr) -> Option<Identity> {
        let found = self.prefixes.get(&Key::new(ADDR_BITS, Wire(*addr)), 0);
        found.ok().map(|identity| identity.0)
    }

    /// What one class may initiate to another.
    pub(super) fn pair(&self, key: &PairKey) -> Option<SetId> {
        read(&self.pairs, key)
    }

    /// One protocol of a port set.
    pub(super) fn ports(&self, key: &PortsKey) -> Option<Ports> {
        read(&self.ports, key)
    }

    /// One page of ports.
    pub(super) fn page(&self, key: &PageKey) -> Option<Page> {
        read(&self.pages, key)
    }
}

fn sizes(tables: &Tables) -> [usize; 5] {
    [
        tables.identities.len(),
        tables.prefixes.len(),
        tables.pairs.len(),
        tables.ports.len(),
        tables.pages.len(),
    ]
}

/// The engine's limits keep tables far below what a map can count.
fn entries(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn prefix(key: &PrefixKey) -> Key<Wire<Addr>> {
    Key::new(key.bits, Wire(key.addr))
}

trait Plain: IntoBytes + FromBytes + Immutable + Copy + 'static {}
impl<T: IntoBytes + FromBytes + Immutable + Copy + 'static> Plain for T {}

fn hash<K: Plain, V: Plain>(from: &BTreeMap<K, V>, room: usize) -> Result<Hash<K, V>, MapError> {
    let mut map = Hash::create(entries(room), 0)?;
    for (key, value) in from {
        map.insert(Wire(*key), Wire(*value), 0)?;
    }
    Ok(map)
}

fn write<K: Plain, V: Plain>(map: &mut Hash<K, V>, entries: &[(K, V)]) -> Result<(), MapError> {
    for (key, value) in entries {
        map.insert(Wire(*key), Wire(*value), 0)?;
    }
    Ok(())
}

fn read<K: Plain, V: Plain>(map: &Hash<K, V>, key: &K) -> Option<V> {
    map.get(&Wire(*key), 0).ok().map(|value| value.0)
}
