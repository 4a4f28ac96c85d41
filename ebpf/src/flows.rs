//! The table of flows: sets of a few lines of memory, which programs and agent write at any time.
//!
//! The kernel's hash tables find an entry through a bucket, a list and a header, each of them
//! somewhere else; here a flow that is known costs one line of 64 bytes. A *set* is a line of
//! *marks* and fifteen *places* of one line each. The hash of a key names a set, a mark, and the
//! place in which the flow is unless another one had it first. So a look-up reads that place, and
//! only if it finds another flow there it reads the marks, and the places whose mark is the key's.
//! The hash depends on numbers that the agent drew ([`Seeds`]): nobody outside can tell which flows
//! share a set.
//!
//! [`Store`]s are kept apart by where they are: lasting flows in sets of their own, the other two
//! in places of the remaining sets. A new flow takes a place that is free, or else the one of its
//! own store in its own set that was unused longest. But a lasting flow gives way to no other
//! before it was unused for [`SPARED_NS`]: into a set that is full of them none is let in, and it
//! stays where it is. Sets are so many that this happens to hardly any before there are all the
//! lasting flows that there may be: of [`ESTABLISHED_FLOWS`], to two in a thousand.
//!
//! *Who writes a place* first claims it: the mark becomes [`BUSY`] in one atomic step, and whoever
//! fails in that leaves the place alone. Who brings another flow there makes [`Place::version`]
//! even, writes key and flow, and makes it odd, with full barriers between; then the place gets its
//! mark. Who writes the state of the flow that is there claims the place, too, and first looks
//! whether it still is: otherwise one flow's state might be written over another's. If the place
//! cannot be claimed in a few attempts, that state is not written. Mostly the next packet says the
//! same; a FIN that is missed so leaves the flow until it times out. When a flow was last seen is one
//! word, and is written without a claim.
//!
//! *Who reads* believes a place of an odd version that is the same before and after. BPF has no
//! ordered loads, and processors like arm64's may make loads in any order; but none of them loads
//! from an address before it has what that address was computed from. So the address of each next
//! load is made of the values of those before it, which changes nothing about it: version, then
//! key, then version, then state, then version. A reader that meets a place while another flow is
//! written there therefore takes it for no flow's; the worst that comes of it is that its packet is
//! decided as one without flow. Of a flow whose state is being written it may see one word old and
//! one new, and each is right for itself.
//!
//! Where two begin the same flow at once, it may get two places: each looks for the other's
//! afterwards, and the latter place goes.

use crate::abi::{ESTABLISHED_FLOWS, Flow, FlowKey, OPENING_FLOWS};
use crate::verdict::Store;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, transmute};

/// Places of a set.
pub const PLACES: usize = 15;
/// Sets of lasting flows, which come first: nearly twice as many places as flows are promised.
pub const LASTING_SETS: u32 = ESTABLISHED_FLOWS / 8;
/// Sets of the other flows.
pub const OTHER_SETS: u32 = OPENING_FLOWS / OPENING_PLACES;
/// All sets: 10 MiB.
pub const SETS: u32 = LASTING_SETS + OTHER_SETS;
/// Places of an opening flow; surplus ones have the others.
const OPENING_PLACES: u32 = 8;

/// A lasting flow that was used so lately is not evicted for another (RFC 5382 5 asks that a silent
/// TCP connection be kept for two hours and four minutes).
pub const SPARED_NS: u64 = 124 * 60 * 1_000_000_000;

/// The mark of a free place. All memory is zero at first.
pub const FREE: u32 = 0;
/// The mark of a place that somebody is writing.
pub const BUSY: u32 = 1;
/// What every other mark has, and these two do not.
const TAKEN: u32 = 2;

/// What the hash depends on beside the key: odd numbers, drawn once for the table.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Seeds {
    /// One for each word of a key, and one for their sum.
    pub factors: [u64; KEY_WORDS + 1],
}

/// Words of a key.
pub const KEY_WORDS: usize = size_of::<FlowKey>() / 8;

/// A key in words, as memory has them.
pub type KeyWords = [u64; KEY_WORDS];

/// One flow.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Place {
    /// Which one.
    pub key: FlowKey,
    /// Its state.
    pub flow: Flow,
    /// Odd while key and state are right; another number each time that they are another flow's.
    pub version: u64,
}

/// Marks, and the places that they are of.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Set {
    /// [`FREE`], [`BUSY`], or a part of the key's hash.
    pub marks: [u32; PLACES],
    /// Always 0.
    pub zero: u32,
    /// The flows.
    pub places: [Place; PLACES],
}

const _: () = {
    assert!(size_of::<Place>() == 64);
    assert!(size_of::<Set>() == 1024);
    assert!(OPENING_FLOWS.is_multiple_of(OPENING_PLACES));
};

/// Where a flow may be.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
pub struct Home {
    /// The set.
    pub set: u32,
    /// The first place of its store there.
    pub first: u32,
    /// The one after the last.
    pub end: u32,
    /// Where it is if nobody was there before it.
    pub place: u32,
    /// Its mark.
    pub mark: u32,
}

/// The words of a key.
#[inline(always)]
#[must_use]
pub const fn words(key: &FlowKey) -> KeyWords {
    transmute!(*key)
}

/// The hash of a key: products that do not wait for each other, and one of their sum.
#[inline(always)]
#[must_use]
pub const fn hash(key: &KeyWords, seeds: &Seeds) -> u64 {
    let factors = &seeds.factors;
    let sum = key[0]
        .wrapping_mul(factors[0])
        .wrapping_add(key[1].wrapping_mul(factors[1]))
        .wrapping_add(key[2].wrapping_mul(factors[2]))
        .wrapping_add(key[3].wrapping_mul(factors[3]))
        .wrapping_add(key[4].wrapping_mul(factors[4]));
    let product = (sum ^ sum >> 32).wrapping_mul(factors[5]);
    product ^ product >> 32
}

/// Where a flow of this hash may be.
#[inline(always)]
#[must_use]
pub const fn home(store: Store, hash: u64) -> Home {
    let (from, sets) = match store {
        Store::Established => (0, LASTING_SETS),
        Store::Opening | Store::Surplus => (LASTING_SETS, OTHER_SETS),
    };
    let (first, end) = places_of(store);
    let low = (hash & 0xffff) as u32;
    Home {
        set: from + (((hash >> 32) * sets as u64) >> 32) as u32,
        first,
        end,
        place: first + ((low * (end - first)) >> 16),
        mark: hash as u32 | TAKEN,
    }
}

/// The places that a store has in its sets.
#[inline(always)]
const fn places_of(store: Store) -> (u32, u32) {
    match store {
        Store::Established => (0, PLACES as u32),
        Store::Opening => (0, OPENING_PLACES),
        Store::Surplus => (OPENING_PLACES, PLACES as u32),
    }
}

/// The store that a place belongs to.
#[must_use]
pub const fn store_of(set: u32, place: u32) -> Store {
    if set < LASTING_SETS {
        Store::Established
    } else if place < OPENING_PLACES {
        Store::Opening
    } else {
        Store::Surplus
    }
}

/// Whether a flow that was not used for so long may be evicted for another of its store.
#[inline(always)]
#[must_use]
pub const fn may_evict(set: u32, idle_ns: u64) -> bool {
    set >= LASTING_SETS || idle_ns > SPARED_NS
}

/// The version of a place while it is written, if it had this one before. One more is the next.
#[inline(always)]
#[must_use]
pub const fn unsettled(version: u64) -> u64 {
    version.wrapping_add(1) & !1
}

/// Whether key and state of this version are right.
#[inline(always)]
#[must_use]
pub const fn is_settled(version: u64) -> bool {
    version & 1 == 1
}
