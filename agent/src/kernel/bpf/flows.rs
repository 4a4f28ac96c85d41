//! The table of flows ([`ebpf::flows`]), as the agent reads it and writes it beside the programs.
//!
//! It is mapped only while it is used: it is large, and that is seldom.

use super::{ANY, AclError, Mapped, RawMap, failed};
use ebpf::abi::{Flow, FlowKey};
use ebpf::flows::{
    BUSY, FREE, Home, KEY_WORDS, PLACES, Place, SETS, Seeds, Set, hash, home, is_settled, store_of,
    unsettled, words,
};
use ebpf::verdict::Store;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use zerocopy::{FromBytes as _, IntoBytes as _};

/// Words of a place, and of a set.
const LINE: usize = size_of::<Place>() / 8;
const SET: usize = size_of::<Set>() / 8;
/// In which word of a place the version is.
const VERSION: usize = LINE - 1;

/// The map, and what its hash depends on.
pub(super) struct Flows {
    map: RawMap,
    seeds: Seeds,
}

/// The map, mapped.
pub struct FlowTable {
    mapped: Mapped,
    seeds: Seeds,
}

impl Flows {
    /// Both maps; seeds are drawn if nobody did before.
    pub(super) fn open(map: RawMap, seeds: &RawMap) -> Result<Self, AclError> {
        let mut drawn: Seeds = seeds.get(&0_u32)?.unwrap_or_default();
        if drawn == Seeds::default() {
            let error = |error: getrandom::Error| {
                failed(
                    "draw",
                    seeds.name(),
                    std::io::Error::other(error.to_string()),
                )
            };
            getrandom::fill(drawn.as_mut_bytes()).map_err(error)?;
            drawn.factors = drawn.factors.map(|factor| factor | 1);
            seeds.put(&0_u32, &drawn, ANY)?;
        }
        Ok(Self { map, seeds: drawn })
    }

    /// Maps it.
    pub(super) fn table(&self) -> Result<FlowTable, AclError> {
        self.map.check_value("map", size_of::<Set>())?;
        Ok(FlowTable {
            mapped: Mapped::map(&self.map)?,
            seeds: self.seeds,
        })
    }
}

impl FlowTable {
    /// The flows of a table of another layout whose sets are like ours, wherever they are there.
    pub(super) fn of_any_layout(map: &RawMap) -> Result<Self, AclError> {
        map.check_value("map", size_of::<Set>())?;
        Ok(Self {
            mapped: Mapped::map(map)?,
            seeds: Seeds::default(),
        })
    }

    fn home(&self, store: Store, key: &FlowKey) -> Home {
        home(store, hash(&words(key), &self.seeds))
    }

    fn mark(&self, set: u32, place: u32) -> Option<&AtomicU32> {
        let words_of_set = 2 * SET;
        let at = set as usize * words_of_set + place as usize;
        self.mapped.halves().get(at)
    }

    fn line(&self, set: u32, place: u32) -> Option<&[AtomicU64]> {
        let at = set as usize * SET + (place as usize + 1) * LINE;
        self.mapped.words().get(at..at + LINE)
    }

    /// What is there, if somebody's flow is.
    fn read(&self, set: u32, place: u32) -> Option<(FlowKey, Flow)> {
        let line = self.line(set, place)?;
        let before = line[VERSION].load(Ordering::SeqCst);
        if !is_settled(before) {
            return None;
        }
        let mut words = [0_u64; LINE];
        for (to, word) in words.iter_mut().zip(line) {
            *to = word.load(Ordering::SeqCst);
        }
        let Place { key, flow, .. } = Place::read_from_bytes(words.as_bytes()).ok()?;
        (line[VERSION].load(Ordering::SeqCst) == before).then_some((key, flow))
    }

    fn search(&self, home: &Home, key: &FlowKey) -> Option<(u32, Flow)> {
        (home.first..home.end).find_map(|place| {
            let (found, flow) = self.read(home.set, place)?;
            (found == *key).then_some((place, flow))
        })
    }

    /// Looks a flow up.
    #[must_use]
    pub fn find(&self, store: Store, key: &FlowKey) -> Option<Flow> {
        let (_, flow) = self.search(&self.home(store, key), key)?;
        Some(flow)
    }

    /// All flows: none is missing that is there all the time.
    pub fn iter(&self) -> impl Iterator<Item = (Store, FlowKey, Flow)> {
        let places = |set| (0..PLACES as u32).map(move |place| (set, place));
        let all = (0..SETS).flat_map(places);
        all.filter_map(|(set, place)| {
            let (key, flow) = self.read(set, place)?;
            Some((store_of(set, place), key, flow))
        })
    }

    /// Claims a place that has this mark; whether that worked.
    fn claim(&self, set: u32, place: u32, mark: u32) -> bool {
        self.mark(set, place).is_some_and(|word| {
            word.compare_exchange(mark, BUSY, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        })
    }

    fn give(&self, set: u32, place: u32, mark: u32) {
        if let Some(word) = self.mark(set, place) {
            word.store(mark, Ordering::SeqCst);
        }
    }

    /// Adds a flow, if it is not there and there is a free place.
    pub(super) fn add(&self, store: Store, key: &FlowKey, flow: &Flow) {
        let home = self.home(store, key);
        if self.search(&home, key).is_some() {
            return;
        }
        let others = home.first..home.end;
        let mut places = std::iter::once(home.place).chain(others);
        let Some(place) = places.find(|place| self.claim(home.set, *place, FREE)) else {
            return;
        };
        if let Some(line) = self.line(home.set, place) {
            let version = unsettled(line[VERSION].load(Ordering::SeqCst));
            let (key, flow) = (*key, *flow);
            let place = Place { key, flow, version };
            for (word, bytes) in line.iter().zip(place.as_bytes().chunks_exact(8)) {
                let value = bytes.try_into().map_or(0, u64::from_ne_bytes);
                word.store(value, Ordering::SeqCst);
            }
            line[VERSION].store(version + 1, Ordering::SeqCst);
        }
        self.give(home.set, place, home.mark);
    }

    /// Forgets a flow; whether it was there.
    pub fn remove(&self, store: Store, key: &FlowKey) -> bool {
        let home = self.home(store, key);
        let Some((place, _)) = self.search(&home, key) else {
            return false;
        };
        if !self.claim(home.set, place, home.mark) {
            return false;
        }
        let ours = self.read(home.set, place).filter(|(found, _)| found == key);
        let (Some(_), Some(line)) = (ours, self.line(home.set, place)) else {
            self.give(home.set, place, home.mark);
            return false;
        };
        let version = unsettled(line[VERSION].load(Ordering::SeqCst));
        line[VERSION].store(version, Ordering::SeqCst);
        self.give(home.set, place, FREE);
        true
    }
}

const _: () = assert!(KEY_WORDS + 2 == VERSION);
