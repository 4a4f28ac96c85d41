//! Hash tables that the agent lays out and the programs only read: a look-up touches one line of
//! the processor's cache.
//!
//! The kernel's hash maps are made to be written by anybody at any time: a look-up is a call, a hash
//! against attackers, a bucket, and an entry somewhere else, or two of them. Pairs are written by the
//! agent alone, all at once, so their table is an array of *lines* of 64 bytes with two entries each.
//! A key names two lines ([`places`]), and its entry is in one of them; mostly in the first, because
//! there are more lines than entries. The agent finds a place for each by moving others to their
//! second line (cuckoo hashing: Pagh, Rodler, 2004), under another seed if need be.
//!
//! Zeros are no entry: no class that is asked for is zero. So an entry that is half written denies.
//! Addresses, which every refusal asks for, have a table of their own ([`crate::addresses`]).

use crate::abi::{Addr, Grant, PairKey};
use crate::addresses::{Book, Home};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Entries of a line.
pub const ENTRIES: usize = 2;

/// Where one table's entries are.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Plan {
    /// What the hash depends on beside the key. Odd.
    pub seed: u64,
    /// Lines in use, from the first.
    pub lines: u32,
    /// Always 0.
    pub zero: u32,
}

/// How the tables of one slot are looked into. Zeros: nothing may be looked for there.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Shape {
    /// Of `IDENTITIES`.
    pub book: Book,
    /// Of `PAIRS`.
    pub pairs: Plan,
    /// The node's first address of each family, IPv6 first: every packet has one of its addresses.
    pub own: [Home; 2],
}

/// A pair of classes and what one may initiate to the other.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Granted {
    /// [`pair_word`].
    pub pair: u64,
    /// What is allowed.
    pub grant: Grant,
}

impl From<(PairKey, Grant)> for Granted {
    fn from((key, grant): (PairKey, Grant)) -> Self {
        let pair = pair_word(&key);
        Self { pair, grant }
    }
}

/// Two pairs.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct GrantedLine {
    /// The entries.
    pub entries: [Granted; ENTRIES],
}

const _: () = {
    assert!(size_of::<GrantedLine>() == 64);
    assert!(size_of::<Shape>() == 112);
};

impl Shape {
    /// Of a slot that is not filled.
    pub const NONE: Self = Self {
        book: Book::NONE,
        pairs: Plan::NONE,
        own: [Home::NONE; 2],
    };
}

impl Granted {
    /// No entry.
    pub const NONE: Self = Self {
        pair: 0,
        grant: Grant {
            set: 0,
            protocol: 0,
            more: 0,
            ranges: [[0; 2]; 4],
        },
    };

    /// The same entry without its pair, which nobody can find.
    #[must_use]
    pub const fn nameless(self) -> Self {
        Self { pair: 0, ..self }
    }
}

impl Plan {
    /// Of a table that is not there.
    pub const NONE: Self = Self {
        seed: 0,
        lines: 0,
        zero: 0,
    };
}

impl GrantedLine {
    /// What is allowed to the pair of this [`pair_word`], if it is in this line.
    #[inline(always)]
    #[must_use]
    pub fn find(&self, pair: u64) -> Option<&Grant> {
        let [one, two] = &self.entries;
        if one.pair == pair {
            Some(&one.grant)
        } else if two.pair == pair {
            Some(&two.grant)
        } else {
            None
        }
    }
}

/// A pair in one word; never 0, because class 0 is in no pair. Classes have 31 bits.
#[inline(always)]
#[must_use]
pub const fn pair_word(key: &PairKey) -> u64 {
    (key.source as u64) << 32 | (key.direction as u64) << 31 | key.destination as u64
}

/// The pair of a word.
#[must_use]
pub const fn pair_of(word: u64) -> PairKey {
    PairKey {
        source: (word >> 32) as u32,
        destination: word as u32 & 0x7fff_ffff,
        direction: word as u32 >> 31,
    }
}

/// The hash of an address: products that do not wait for each other.
#[inline(always)]
#[must_use]
pub const fn hash_of_addr(addr: &Addr, seed: u64) -> u64 {
    let [one, two] = addr.halves();
    mixed(
        one.wrapping_mul(FACTOR)
            .wrapping_add(two.wrapping_mul(seed)),
    )
}

/// The hash of a pair.
#[inline(always)]
#[must_use]
pub const fn hash_of_pair(pair: u64, seed: u64) -> u64 {
    mixed(pair.wrapping_mul(seed))
}

/// Two primes of the golden ratio's kind (Steele, Lea, Flood 2014).
const FACTOR: u64 = 0xbf58_476d_1ce4_e5b9;
const LAST_FACTOR: u64 = 0x94d0_49bb_1331_11eb;

#[inline(always)]
const fn mixed(sum: u64) -> u64 {
    let product = (sum ^ sum >> 32).wrapping_mul(LAST_FACTOR);
    product ^ product >> 32
}

/// The two lines of a hash, of so many.
#[inline(always)]
#[must_use]
pub const fn places(hash: u64, lines: u32) -> [u32; 2] {
    [
        (((hash >> 32) * lines as u64) >> 32) as u32,
        (((hash & 0xffff_ffff) * lines as u64) >> 32) as u32,
    ]
}
