//! The table of flows, as the programs read and write it: [`ebpf::flows`] says what holds.
//!
//! What every packet of a known flow needs is inlined: its hash, and the place that this names. The
//! rest are global functions, which the verifier looks at once.

use super::MMAPABLE;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::macros::btf_map;
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xchg};
use ebpf::abi::{Flow, FlowKey};
use ebpf::flows::{
    BUSY, FREE, Home, KEY_WORDS, KeyWords, PLACES, SETS, Seeds, Set, hash, home, is_settled,
    may_evict, unsettled, words,
};
use ebpf::verdict::Store;
use zerocopy::transmute;

#[btf_map]
static FLOWS: Array<Set, { SETS as usize }, MMAPABLE> = Array::new();
/// What the hash of flows depends on.
#[btf_map]
static SEEDS: Array<Seeds, 1> = Array::new();

/// How often somebody else may take the place that a new flow was about to have.
const ATTEMPTS: u32 = 3;
/// Words of a place: a line.
const LINE: usize = 8;
/// In which of them the state is, and the version.
const STATE: usize = KEY_WORDS;
const VERSION: usize = 7;

/// Where a flow was found: set and place, and above them the version. 0 is nowhere.
#[derive(Clone, Copy)]
pub struct Found(u64);

impl Found {
    #[inline(always)]
    fn new(set: u32, place: u32, version: u64) -> Self {
        Self(version << 32 | u64::from(set) << 5 | u64::from(place) << 1 | 1)
    }

    #[inline(always)]
    fn from_code(code: u64) -> Option<Self> {
        (code != 0).then_some(Self(code))
    }

    #[inline(always)]
    fn set(self) -> Option<*mut Set> {
        FLOWS.get_ptr_mut(self.0 as u32 >> 5)
    }

    #[inline(always)]
    fn place(self) -> u32 {
        self.0 as u32 >> 1 & 15
    }

    #[inline(always)]
    fn is_version(self, version: u64) -> bool {
        version as u32 == (self.0 >> 32) as u32
    }

    /// The state there. If the place was given away meanwhile, that of a flow that is none: it is
    /// older than every timeout, and of no epoch.
    #[inline(always)]
    pub fn load(self) -> Flow {
        const NONE: Flow = Flow {
            last_seen_ns: 0,
            epoch: 0,
            initiator: 0,
            flags: 0,
            share: 0,
        };
        let Some(set) = self.set() else {
            return NONE;
        };
        // After the version that was found, because that is in the number of the set.
        let line = line_of(set, self.place());
        // Word by word, so that nothing goes over the stack.
        let words = [read(line, STATE), read(line, STATE + 1)];
        let line = after(line, words[0] | words[1]);
        let flow = transmute!(words);
        if self.is_version(read(line, VERSION)) {
            flow
        } else {
            NONE
        }
    }

    /// Writes when the flow there was last seen. Nothing is claimed, which would cost another line
    /// of memory: if the place is another flow's by now, that one is a little younger than it was.
    #[inline(always)]
    pub fn freshen(self, last_seen_ns: u64) {
        if let Some(set) = self.set() {
            // SAFETY: a line of a set has so many words.
            unsafe {
                line_of(set, self.place())
                    .add(STATE)
                    .write_volatile(last_seen_ns)
            };
        }
    }

    /// Writes the state there, if the flow still is and nobody else is writing.
    #[inline(always)]
    pub fn save(self, flow: Flow) {
        let [one, two] = transmute!(flow);
        acl_save(self.0, one, two);
    }
}

/// A word of a line; volatile, because others write it.
#[inline(always)]
fn read(line: *mut u64, index: usize) -> u64 {
    // SAFETY: a line of a set has so many words.
    unsafe { line.add(index).read_volatile() }
}

/// The same line, to be read after this value was: no processor makes a load before it has the
/// address, and no compiler sees that this one does not depend on the value.
#[inline(always)]
fn after(mut line: *mut u64, value: u64) -> *mut u64 {
    // SAFETY: adds nothing to the address.
    unsafe {
        core::arch::asm!(
            "{value} &= 0",
            "{line} += {value}",
            value = inout(reg) value => _,
            line = inout(reg) line,
            options(pure, nomem, nostack),
        );
    }
    line
}

/// A place of a set. The mask is for the verifier: line 0 is that of the marks.
#[inline(always)]
fn line_of(set: *mut Set, place: u32) -> *mut u64 {
    // SAFETY: within the set, which has 16 lines.
    unsafe { set.cast::<u64>().add((place as usize + 1 & 15) * LINE) }
}

/// Writes a state in whole words, so that a reader sees old or new ones.
#[inline(always)]
fn write_state(line: *mut u64, flow: Flow) {
    let words: [u64; 2] = transmute!(flow);
    // SAFETY: a line of a set.
    unsafe {
        line.add(STATE).write_volatile(words[0]);
        line.add(STATE + 1).write_volatile(words[1]);
    }
}

#[inline(always)]
fn mark_of(set: *mut Set, place: u32) -> *mut u32 {
    // SAFETY: within the set's first line.
    unsafe { set.cast::<u32>().add(place as usize & 15) }
}

#[inline(always)]
fn read_mark(set: *mut Set, place: u32) -> u32 {
    // SAFETY: within the set; volatile, because others write it.
    unsafe { mark_of(set, place).read_volatile() }
}

/// Whether the place has this key, and then in which version.
#[inline(always)]
fn holds(set: *mut Set, place: u32, key: &KeyWords) -> Option<u64> {
    let line = line_of(set, place);
    let before = read(line, VERSION);
    let line = after(line, before);
    let differs = read(line, 0) ^ key[0]
        | read(line, 1) ^ key[1]
        | read(line, 2) ^ key[2]
        | read(line, 3) ^ key[3]
        | read(line, 4) ^ key[4];
    let version = read(after(line, differs), VERSION);
    (differs == 0 && is_settled(version) && version == before).then_some(version)
}

#[inline(always)]
fn hash_of(key: &KeyWords) -> Option<u64> {
    let seeds = SEEDS.get_ptr(0)?;
    // SAFETY: an array element, which is written before the programs run.
    Some(hash(key, unsafe { &*seeds }))
}

/// Looks a flow up.
#[inline(always)]
pub fn find(store: Store, key: &FlowKey) -> Option<Found> {
    Found::from_code(match store {
        Store::Established => acl_find_lasting(key),
        Store::Opening | Store::Surplus => acl_find(store as u32, key),
    })
}

/// Adds a flow, or writes the state of the one that is there; whether that worked.
#[inline(always)]
pub fn insert(store: Store, key: &FlowKey, flow: &Flow) -> bool {
    let [one, two] = transmute!(*flow);
    acl_keep(store as u32, key, one, two) != 0
}

/// Forgets a flow.
#[inline(always)]
pub fn remove(store: Store, key: &FlowKey) {
    acl_forget(store as u32, key);
}

#[inline(always)]
fn store_from(number: u32) -> Store {
    if number == Store::Established as u32 {
        Store::Established
    } else if number == Store::Opening as u32 {
        Store::Opening
    } else {
        Store::Surplus
    }
}

/// Where a flow may be in the store of this number.
#[inline(always)]
fn home_of(store: u32, key: &KeyWords) -> Option<(Home, *mut Set)> {
    let home = home(store_from(store), hash_of(key)?);
    Some((home, FLOWS.get_ptr_mut(home.set)?))
}

/// Whether a flow of the second mark may be where the first one is.
#[inline(always)]
fn may_have(there: u32, mark: u32) -> bool {
    // Perhaps its state is being written.
    there == mark || there == BUSY
}

/// The place of the flow's store that has its mark and its key, other than `but`.
#[inline(always)]
fn search(set: *mut Set, home: &Home, key: &KeyWords, but: u32) -> Option<(u32, u64)> {
    for place in 0..PLACES as u32 {
        if place >= home.first
            && place < home.end
            && place != but
            && may_have(read_mark(set, place), home.mark)
            && let Some(version) = holds(set, place, key)
        {
            return Some((place, version));
        }
    }
    None
}

/// No place.
const NONE: u32 = u32::MAX;

/// [`acl_find`] for a lasting flow. Mostly it is where its hash says; then no mark is read, and no
/// more is computed than that needs, because nearly every packet comes here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_find_lasting(key: *const FlowKey) -> u64 {
    if key.is_null() {
        return 0;
    }
    // SAFETY: as for `acl_find`.
    let words = words(unsafe { &*key });
    let Some(hash) = hash_of(&words) else {
        return 0;
    };
    let home = home(Store::Established, hash);
    let Some(set) = FLOWS.get_ptr_mut(home.set) else {
        return 0;
    };
    match holds(set, home.place, &words) {
        Some(version) => Found::new(home.set, home.place, version).0,
        None => acl_find(Store::Established as u32, key),
    }
}

/// Looks for a flow wherever it may be.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_find(store: u32, key: *const FlowKey) -> u64 {
    if key.is_null() {
        return 0;
    }
    // SAFETY: callers pass a whole key; the verifier checks that it is readable.
    let key = words(unsafe { &*key });
    let Some((home, set)) = home_of(store, &key) else {
        return 0;
    };
    if let Some(version) = holds(set, home.place, &key) {
        return Found::new(home.set, home.place, version).0;
    }
    match search(set, &home, &key, home.place) {
        Some((place, version)) => Found::new(home.set, place, version).0,
        None => 0,
    }
}

/// Claims a place that has this mark; whether that worked.
#[inline(always)]
fn claim(set: *mut Set, place: u32, mark: u32) -> bool {
    const ORDER: AtomicOrdering = AtomicOrdering::SeqCst;
    // SAFETY: a valid, aligned word of the set.
    let (_, claimed) =
        unsafe { atomic_cxchg::<u32, ORDER, ORDER>(mark_of(set, place), mark, BUSY) };
    claimed
}

/// Claims a place that has this mark; whoever is writing the state of its flow is done soon.
#[inline(always)]
fn claim_soon(set: *mut Set, place: u32, mark: u32) -> bool {
    for _ in 0..ATTEMPTS {
        if claim(set, place, mark) {
            return true;
        }
    }
    false
}

/// Gives a claimed place this mark, after an atomic step that ends what was written there.
#[inline(always)]
fn give(set: *mut Set, place: u32, mark: u32) {
    // SAFETY: a valid, aligned word of the set, which nobody else writes while it is claimed.
    unsafe { mark_of(set, place).write_volatile(mark) }
}

/// Writes the version of a claimed place, after all that was written before and before all that is
/// written after.
#[inline(always)]
fn set_version(line: *mut u64, version: u64) {
    // SAFETY: a valid, aligned word of the set.
    unsafe { atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(line.add(VERSION), version) };
}

/// Where a new flow goes that is used now, and the mark that is there.
#[inline(always)]
fn choose(set: *mut Set, home: &Home, now_ns: u64) -> Option<(u32, u32)> {
    if read_mark(set, home.place) == FREE {
        return Some((home.place, FREE));
    }
    for place in 0..PLACES as u32 {
        if place >= home.first && place < home.end && read_mark(set, place) == FREE {
            return Some((place, FREE));
        }
    }
    let mut oldest = (NONE, u64::MAX);
    for place in 0..PLACES as u32 {
        if place >= home.first && place < home.end && read_mark(set, place) != BUSY {
            // The first word of a state is when the flow was last seen.
            let seen_ns = read(line_of(set, place), STATE);
            if seen_ns < oldest.1 {
                oldest = (place, seen_ns);
            }
        }
    }
    let (place, seen_ns) = oldest;
    let mark = read_mark(set, place);
    let gives_way = place != NONE && may_evict(home.set, now_ns.saturating_sub(seen_ns));
    (gives_way && mark != BUSY).then_some((place, mark))
}

/// Adds a flow, or writes the state of the one that is there; 0 if there is no place to be had. The
/// state comes in registers: callers have little stack to spare.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_keep(store: u32, key: *const FlowKey, one: u64, two: u64) -> u32 {
    if key.is_null() {
        return 0;
    }
    // SAFETY: as for `acl_find`.
    let key = words(unsafe { &*key });
    let flow: Flow = transmute!([one, two]);
    let Some((home, set)) = home_of(store, &key) else {
        return 0;
    };
    if let Some((place, version)) = search(set, &home, &key, NONE) {
        Found::new(home.set, place, version).save(flow);
        return 1;
    }
    let mut ours = NONE;
    for _ in 0..ATTEMPTS {
        let Some((place, mark)) = choose(set, &home, one) else {
            return 0;
        };
        if claim(set, place, mark) {
            ours = place;
            break;
        }
    }
    if ours == NONE {
        return 0;
    }
    write(set, ours, &key, flow);
    give(set, ours, home.mark);
    // Whoever began the same flow at the same time finds ours, or we find theirs.
    if let Some((other, _)) = search(set, &home, &key, ours) {
        free(set, ours.max(other), home.mark, &key);
    }
    1
}

/// Fills a claimed place.
#[inline(always)]
fn write(set: *mut Set, place: u32, key: &KeyWords, flow: Flow) {
    let line = line_of(set, place);
    // SAFETY: within the set, and nobody else writes it while it is claimed.
    unsafe {
        let version = read(line, VERSION);
        let between = unsettled(version);
        if between != version {
            set_version(line, between);
        }
        let mut index = 0;
        while index < KEY_WORDS {
            line.add(index).write_volatile(key[index]);
            index += 1;
        }
        write_state(line, flow);
        set_version(line, between + 1);
    }
}

/// Frees a place, if this flow is there.
#[inline(always)]
fn free(set: *mut Set, place: u32, mark: u32, key: &KeyWords) {
    if !claim_soon(set, place, mark) {
        return;
    }
    let after = match holds(set, place, key) {
        Some(version) => {
            set_version(line_of(set, place), unsettled(version));
            FREE
        }
        None => mark,
    };
    give(set, place, after);
}

/// Writes the state of a flow that was found, if it still is there and nobody else writes it. A
/// global function, because its callers have little stack to spare.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_save(found: u64, one: u64, two: u64) -> u32 {
    let found = Found(found);
    let Some(set) = found.set() else {
        return 0;
    };
    let place = found.place();
    let mut mark = BUSY;
    for _ in 0..ATTEMPTS {
        if mark == BUSY {
            mark = read_mark(set, place);
        }
    }
    if mark == BUSY || !claim_soon(set, place, mark) {
        return 0;
    }
    let line = line_of(set, place);
    let version = read(line, VERSION);
    let current = found.is_version(version);
    if current {
        write_state(line, transmute!([one, two]));
    }
    // The same version again, but after the state: it is a barrier.
    set_version(line, version);
    give(set, place, mark);
    u32::from(current)
}

/// Forgets a flow, if it is there.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_forget(store: u32, key: *const FlowKey) -> u32 {
    if key.is_null() {
        return 0;
    }
    // SAFETY: as for `acl_find`.
    let key = words(unsafe { &*key });
    let Some((home, set)) = home_of(store, &key) else {
        return 0;
    };
    match search(set, &home, &key, NONE) {
        Some((place, _)) => {
            free(set, place, home.mark, &key);
            1
        }
        None => 0,
    }
}
