//! The table of addresses: who has one, and what this node and it may initiate to each other, in one
//! line of the processor's cache.
//!
//! One end of nearly every packet is this node itself. So the line of an address ([`Owned`]) holds,
//! beside its identity, what the node's own first address of that family ([`Home`]) is granted with
//! it, in both directions: where that says it all ([`near`]), no other table is asked.
//!
//! A packet to anybody finds nothing of this in a cache, and then each line costs more than all
//! else that the programs do. So an address names one line and not two: the agent, who writes the
//! table, chooses a number of eight bits, a *pilot*, for each [`BUCKET`] addresses or so, with which
//! they all hash to lines that are free (Fox, Heath, Chen, Daoud 1992; Pibiri, Trani 2021), and
//! pilots are so small that a cache has them. Whoever joins before the table is laid out again has
//! a second line to go to, among those of the newcomers.
//!
//! Lines are in *slabs*: arrays so small that the kernel takes them from memory that it has mapped
//! with large pages (`bpf_map_area_alloc`), and of one size, so that a look-up is no call
//! (`array_map_gen_lookup`). A slot's slabs are, in this order, those of its pilots, of its lines
//! and of its newcomers.
//!
//! Zeros are no entry: what an entry of zeros says is that nobody is there, and nothing is allowed.

use crate::abi::{Addr, Direction, GRANT_RANGES, Grant, Identity, NO_PROTOCOL, NO_RANGE};
use crate::lines::hash_of_addr;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a line.
pub const LINE_BYTES: usize = 64;
/// Words of a slab: with the head of an array, less than 32 KiB.
pub const SLAB_WORDS: usize = 4_032;
/// Bytes of a slab.
pub const SLAB_BYTES: usize = 8 * SLAB_WORDS;
/// Lines of a slab. The bytes of one more are what the first of them is moved by, to begin where a
/// line of the cache does.
pub const SLAB_LINES: u32 = (SLAB_BYTES / LINE_BYTES) as u32 - 1;
/// Pilots of a slab: a power of two, which the verifier sees too.
pub const SLAB_PILOTS: u32 = 1 << 14;
/// Most slabs of a slot.
pub const SLABS: u32 = 1_024;
/// Addresses that share a pilot, on average.
pub const BUCKET: usize = 3;
/// Pilots that there are to choose from.
pub const PILOTS: u32 = 256;

/// The value of one small array.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Slab {
    /// Lines or pilots.
    pub words: [u64; SLAB_WORDS],
}

/// How the table of one slot is looked into.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Book {
    /// What the hash depends on beside the address. Odd.
    pub seed: u64,
    /// Pilots in use.
    pub buckets: u32,
    /// Slabs of pilots.
    pub pilot_slabs: u32,
    /// Slabs of lines, after them.
    pub line_slabs: u32,
    /// Slabs of newcomers' lines, at the end.
    pub newcomer_slabs: u32,
    /// Where the first line of a slab begins: a multiple of eight, less than a line.
    pub shift: u32,
    /// Lines of a slab: [`SLAB_LINES`]. Told, because what the compiler knew it would not compare, and
    /// then the verifier knows it not.
    pub lines: u32,
}

/// A place in a slab of this slot.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord))]
pub struct Place {
    /// Which slab.
    pub slab: u32,
    /// Where in it, in bytes. 64 bits: of 32, Linux 6.1 loses the bounds.
    pub at: u64,
}

/// How a [`Near`] is to be read.
pub mod near {
    /// Nothing is allowed.
    pub const NOTHING: u8 = 0;
    /// The table of pairs says.
    pub const ASK: u8 = 1;
    /// Every protocol and port is allowed.
    pub const EVERYTHING: u8 = 2;
    /// The ranges of this protocol are allowed, and nothing else.
    pub const RANGES: u8 = 3;
    /// The same, but of other protocols the table of pairs says.
    pub const RANGES_AND_MORE: u8 = 4;
}

/// What may be initiated between this node and an address, in one direction.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
pub struct Near {
    /// One of [`near`].
    pub kind: u8,
    /// IP protocol number that the ranges are of.
    pub protocol: u8,
    /// Its ports; unused ones are [`NO_RANGE`].
    pub ranges: [[u16; 2]; GRANT_RANGES],
}

/// What a [`Near`] says without its ranges.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Head {
    /// [`Near::kind`].
    pub kind: u8,
    /// [`Near::protocol`].
    pub protocol: u8,
}

/// An address, who has it, and what that means with this node: a line.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Owned {
    /// The address.
    pub addr: Addr,
    /// [`Identity::as_source`].
    pub as_source: u32,
    /// [`Identity::as_destination`].
    pub as_destination: u32,
    /// [`Near::ranges`] by direction.
    pub ranges: [[[u16; 2]; GRANT_RANGES]; 2],
    /// The rest of each [`Near`], by direction. [`near::ASK`], unless the address is a peer's and
    /// may be one's at all ([`crate::verdict::is_routable`]).
    pub heads: [Head; 2],
    /// [`Identity::share`].
    pub share: u16,
    /// [`Identity::side`].
    pub side: u8,
    /// Always 0.
    pub zero: u8,
}

/// An address of this node that may be one's at all ([`crate::verdict::is_routable`]).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Home {
    /// The address.
    pub addr: Addr,
    /// Who has it.
    pub identity: Identity,
}

const _: () = {
    assert!(size_of::<Slab>() == SLAB_BYTES);
    assert!(SLAB_PILOTS as usize <= SLAB_BYTES);
    assert!(size_of::<Book>() == 32);
    assert!(size_of::<Owned>() == LINE_BYTES);
    assert!(size_of::<Home>() == 32);
    assert!(crate::abi::SHARES <= u16::MAX as u32);
};

#[cfg(not(target_arch = "bpf"))]
impl Slab {
    /// No line and no pilot.
    pub const EMPTY: Self = Self {
        words: [0; SLAB_WORDS],
    };

    /// The line at a place, if there is such a place.
    #[must_use]
    pub fn line(&self, at: u64) -> Option<Owned> {
        let (from, to) = (at as usize, at as usize + LINE_BYTES);
        let bytes = self.words.as_bytes().get(from..to)?;
        Owned::read_from_bytes(bytes).ok()
    }

    /// Writes a line; whether there is such a place.
    pub fn put_line(&mut self, at: u64, line: &Owned) -> bool {
        let (from, to) = (at as usize, at as usize + LINE_BYTES);
        match self.words.as_mut_bytes().get_mut(from..to) {
            Some(bytes) => {
                bytes.copy_from_slice(line.as_bytes());
                true
            }
            None => false,
        }
    }

    /// The pilot at a place, if there is such a place.
    #[must_use]
    pub fn pilot(&self, at: u64) -> Option<u8> {
        self.words.as_bytes().get(at as usize).copied()
    }

    /// Writes a pilot; whether there is such a place.
    pub fn put_pilot(&mut self, at: u64, pilot: u8) -> bool {
        let byte = self.words.as_mut_bytes().get_mut(at as usize);
        byte.map(|byte| *byte = pilot).is_some()
    }
}

impl Near {
    /// Nothing is known of it here.
    pub const ASK: Self = Self {
        kind: near::ASK,
        protocol: 0,
        ranges: [NO_RANGE; GRANT_RANGES],
    };

    /// What a pair of classes is granted, in short.
    #[must_use]
    pub fn of(grant: Option<&Grant>) -> Self {
        let plain = |kind| Self { kind, ..Self::ASK };
        match grant {
            None => plain(near::NOTHING),
            Some(grant) if *grant == Grant::EVERYTHING => plain(near::EVERYTHING),
            Some(grant) if grant.protocol == NO_PROTOCOL => Self::ASK,
            Some(grant) => Self {
                kind: if grant.more == 0 {
                    near::RANGES
                } else {
                    near::RANGES_AND_MORE
                },
                protocol: grant.protocol as u8,
                ranges: grant.ranges,
            },
        }
    }
}

impl Owned {
    /// No entry.
    pub const NONE: Self = Self {
        addr: Addr { words: [0; 4] },
        as_source: 0,
        as_destination: 0,
        ranges: [[[0; 2]; GRANT_RANGES]; 2],
        heads: [Head {
            kind: near::NOTHING,
            protocol: 0,
        }; 2],
        share: 0,
        side: 0,
        zero: 0,
    };

    /// The line of an address; `near` by direction.
    #[must_use]
    pub const fn new(addr: Addr, identity: Identity, near: [Near; 2]) -> Self {
        let [ingress, egress] = near;
        Self {
            addr,
            as_source: identity.as_source,
            as_destination: identity.as_destination,
            ranges: [ingress.ranges, egress.ranges],
            heads: [
                Head {
                    kind: ingress.kind,
                    protocol: ingress.protocol,
                },
                Head {
                    kind: egress.kind,
                    protocol: egress.protocol,
                },
            ],
            share: identity.share as u16,
            side: identity.side as u8,
            zero: 0,
        }
    }

    /// Who has the address.
    #[inline(always)]
    #[must_use]
    pub const fn identity(&self) -> Identity {
        Identity {
            as_source: self.as_source,
            as_destination: self.as_destination,
            side: self.side as u32,
            share: self.share as u32,
        }
    }

    /// What may be initiated between this node and the address, where it stands.
    #[inline(always)]
    #[must_use]
    pub const fn head_and_ranges(&self, direction: Direction) -> (Head, &[[u16; 2]; GRANT_RANGES]) {
        let [ingress, egress] = &self.ranges;
        let [head_in, head_out] = self.heads;
        match direction {
            Direction::Ingress => (head_in, ingress),
            Direction::Egress => (head_out, egress),
        }
    }

    /// The same in one.
    #[must_use]
    pub const fn near(&self, direction: Direction) -> Near {
        let (head, ranges) = self.head_and_ranges(direction);
        Near {
            kind: head.kind,
            protocol: head.protocol,
            ranges: *ranges,
        }
    }
}

impl Home {
    /// No address.
    pub const NONE: Self = Self {
        addr: Owned::NONE.addr,
        identity: Owned::NONE.identity(),
    };
}

impl Book {
    /// Of a table that is not there.
    pub const NONE: Self = Self {
        seed: 0,
        buckets: 0,
        pilot_slabs: 0,
        line_slabs: 0,
        newcomer_slabs: 0,
        shift: 0,
        lines: 0,
    };

    /// Slabs of all kinds.
    #[must_use]
    pub const fn slabs(&self) -> u32 {
        self.pilot_slabs + self.line_slabs + self.newcomer_slabs
    }

    /// The hash of an address.
    #[inline(always)]
    #[must_use]
    pub const fn hash(&self, addr: &Addr) -> u64 {
        hash_of_addr(addr, self.seed)
    }

    /// Which pilot an address of this hash has.
    #[inline(always)]
    #[must_use]
    pub const fn bucket(&self, hash: u64) -> u32 {
        (((hash >> 32) * self.buckets as u64) >> 32) as u32
    }

    /// Where a bucket's pilot is.
    #[inline(always)]
    #[must_use]
    pub const fn pilot(bucket: u32) -> Place {
        Place {
            slab: bucket / SLAB_PILOTS,
            at: (bucket % SLAB_PILOTS) as u64,
        }
    }

    /// The line of a hash under its pilot.
    #[inline(always)]
    #[must_use]
    pub const fn line(&self, hash: u64, pilot: u8) -> Place {
        self.place(hash, pilot as u64, self.pilot_slabs, self.line_slabs)
    }

    /// The line of a hash among those of newcomers.
    #[inline(always)]
    #[must_use]
    pub const fn newcomer(&self, hash: u64) -> Place {
        let first = self.pilot_slabs + self.line_slabs;
        self.place(hash, PILOTS as u64, first, self.newcomer_slabs)
    }

    /// A line in one of `slabs` slabs from `first` on.
    #[inline(always)]
    const fn place(&self, hash: u64, pilot: u64, first: u32, slabs: u32) -> Place {
        let mixed = (hash ^ pilot.wrapping_mul(PILOT_FACTOR)).wrapping_mul(LAST_FACTOR);
        let slab = first + (((mixed >> 48) as u32 * slabs) >> 16);
        let line = ((mixed >> 32 & 0xffff) * self.lines as u64) >> 16;
        let shift = self.shift as u64 & (LINE_BYTES as u64 - 8);
        Place {
            slab,
            at: line * LINE_BYTES as u64 + shift,
        }
    }
}

/// Two primes (Steele, Lea, Flood 2014; Knuth, TAOCP 3, 6.4).
const LAST_FACTOR: u64 = 0x94d0_49bb_1331_11eb;
const PILOT_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
