//! The layout of every map, as kernel and user space both see it.
//!
//! Plain `#[repr(C)]` data with asserted sizes; this module knows neither aya nor aya-ebpf.
//! Addresses are sixteen bytes in network order, IPv4 as IPv4-mapped IPv6 (RFC 4291 2.5.5.2), so
//! that one key serves both families. Numbers (ports, classes, epochs) are in host order: nothing
//! here leaves the machine.
//!
//! | map | kind | key | value | written by |
//! |---|---|---|---|---|
//! | `ACTIVE` | array, mmapable | 0 | [`Active`] as one u64 | agent, one atomic store |
//! | `SHAPES` | array | slot | [`crate::lines::Shape`] | agent |
//! | `IDENTITIES` | 2 × 1,024 × array | 0 | [`crate::addresses::Slab`] | agent |
//! | `PREFIXES` | 2 × LPM trie | prefix, [`Addr`] | [`Identity`] | agent |
//! | `PAIRS` | 2 × array | line | [`crate::lines::GrantedLine`] | agent |
//! | `PORTS` | 2 × hash | [`PortsKey`] | [`Ports`] | agent |
//! | `PAGES` | 2 × hash | [`PageKey`] | [`Page`] | agent |
//! | `FLOWS` | array, mmapable | set | [`crate::flows::Set`] | programs, agent |
//! | `SEEDS` | array | 0 | [`crate::flows::Seeds`] | agent, once |
//! | `TRACKS` | array, mmapable | word | see [`crate::tracks`] | programs, agent |
//! | `SHARES` | array | [`Identity::share`] | [`Share`] | programs, agent (recount) |
//! | `FRAGMENTS` | LRU hash | [`FragmentKey`] | [`Fragment`] | programs |
//! | `QUOTA` | array | 0 | [`Quota`] | programs |
//! | `COUNTERS` | per-CPU array | [`crate::verdict::Verdict::counter`] | [`Counter`] | programs |
//! | `EVENTS` | ring buffer | - | [`Dropped`] | programs |
//! | `LOST` | per-CPU array | 0 | how many [`Dropped`] found no room in `EVENTS`, as u64 | programs |
//! | `MARK` | array | 0 | mark of answers to refused packets, or 0 | agent |
//! | `ANSWERS` | per-CPU array | [`crate::refuse::Outcome`] | [`Counter`] | programs |
//!
//! *Changing a layout, or a hash by which something is found in one.* Raise [`ABI_VERSION`]. Fields
//! of [`Flow`] are only ever appended (a shorter old value is copied and the rest is zero), so that
//! an upgrade carries flows over.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, transmute};

/// Version of all layouts below. Maps of another version are never adopted, only copied from.
pub const ABI_VERSION: u32 = 6;

/// Slots of every policy table. One is active, the other is filled for the next change.
pub const SLOTS: u32 = 2;

/// Flows that proved to last, of those that the table of flows promises to hold.
pub const ESTABLISHED_FLOWS: u32 = 65_536;
/// Flows that have not proved it yet. Apart, so that a flood of short flows cannot evict those
/// that last.
pub const OPENING_FLOWS: u32 = 16_384;
/// Shares that peers' flows are counted by. Beyond so many peers, two may have one share.
pub const SHARES: u32 = 4_096;
/// Fragmented datagrams whose first fragment passed.
pub const FRAGMENTED_DATAGRAMS: u32 = 4_096;
/// Bytes of dropped packets' events that wait for a reader: about 1,820 of them. A power of two, and
/// a whole page on every supported machine.
pub const EVENT_BYTES: u32 = 131_072;

/// A number that differs between layouts whose maps cannot be shared: their version, the sizes of
/// what they hold, and how many entries the fixed ones have.
#[must_use]
pub const fn layout() -> u32 {
    let parts = [
        ABI_VERSION as usize,
        size_of::<Identity>(),
        size_of::<Ports>(),
        crate::addresses::SLAB_BYTES,
        crate::addresses::SLABS as usize,
        size_of::<crate::lines::GrantedLine>(),
        crate::tracks::ALL_WORDS as usize,
        size_of::<FlowKey>(),
        size_of::<Flow>(),
        size_of::<FragmentKey>(),
        size_of::<Fragment>(),
        size_of::<Quota>(),
        size_of::<Share>(),
        size_of::<Counter>(),
        size_of::<Dropped>(),
        EVENT_BYTES as usize,
        ESTABLISHED_FLOWS as usize,
        OPENING_FLOWS as usize,
        size_of::<crate::flows::Set>(),
        crate::flows::SETS as usize,
        SHARES as usize,
        FRAGMENTED_DATAGRAMS as usize,
        crate::reason::OUTCOMES as usize,
    ];
    // FNV-1a, over numbers.
    let mut hash = 0x811c_9dc5_u32;
    let mut at = 0;
    while at < parts.len() {
        hash = (hash ^ parts[at] as u32).wrapping_mul(0x0100_0193);
        at += 1;
    }
    hash
}

/// Names of the maps in the object, and of their pins.
pub mod maps {
    /// The active word.
    pub const ACTIVE: &str = "ACTIVE";
    /// Where entries are in the tables of lines.
    pub const SHAPES: &str = "SHAPES";
    /// Overlay addresses of peers and of the node itself.
    pub const IDENTITIES: &str = "IDENTITIES";
    /// Subnet routes, and prefixes that rules tell apart inside them.
    pub const PREFIXES: &str = "PREFIXES";
    /// Who may initiate to whom.
    pub const PAIRS: &str = "PAIRS";
    /// Port sets by protocol.
    pub const PORTS: &str = "PORTS";
    /// Bitmaps of large port sets.
    pub const PAGES: &str = "PAGES";
    /// Flows.
    pub const FLOWS: &str = "FLOWS";
    /// What the hash of flows depends on.
    pub const SEEDS: &str = "SEEDS";
    /// Which flows cannot be there.
    pub const TRACKS: &str = "TRACKS";
    /// How many flows each peer has.
    pub const SHARES: &str = "SHARES";
    /// Fragmented datagrams.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Picked-up flows of the current window.
    pub const QUOTA: &str = "QUOTA";
    /// Packets and bytes by outcome.
    pub const COUNTERS: &str = "COUNTERS";
    /// What is told of dropped packets.
    pub const EVENTS: &str = "EVENTS";
    /// How much of that found no room.
    pub const LOST: &str = "LOST";
    /// The mark of answers to refused packets.
    pub const MARK: &str = "MARK";
    /// What became of answers to refused packets.
    pub const ANSWERS: &str = "ANSWERS";

    /// The outer maps of the policy tables that have one inner map a slot.
    pub const SLOTTED: [&str; 4] = [PREFIXES, PAIRS, PORTS, PAGES];
    /// Every other map.
    pub const PLAIN: [&str; 14] = [
        ACTIVE, SHAPES, IDENTITIES, TRACKS, FLOWS, SEEDS, SHARES, FRAGMENTS, QUOTA, COUNTERS,
        EVENTS, LOST, MARK, ANSWERS,
    ];
}

/// Names of the programs in the object.
pub mod programs {
    /// From peers to this node.
    pub const INGRESS: &str = "ingress";
    /// From this node to peers.
    pub const EGRESS: &str = "egress";
}

/// Which way a packet crosses the WireGuard device, as this node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Direction {
    /// From a peer.
    Ingress = 0,
    /// To a peer.
    Egress = 1,
}

impl Direction {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// The other one.
    #[inline(always)]
    #[must_use]
    pub const fn flip(self) -> Self {
        match self {
            Self::Ingress => Self::Egress,
            Self::Egress => Self::Ingress,
        }
    }

    /// Its stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// An address: sixteen bytes in network order, so aligned that eight are copied at once.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Addr {
    /// The bytes, four at a time, in memory order.
    pub words: [u32; 4],
}

impl Addr {
    /// The address with these bytes.
    #[inline(always)]
    #[must_use]
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self {
            words: [
                u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
                u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
                u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
                u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
            ],
        }
    }

    /// The IPv4 address whose four bytes, in memory order, are `word`.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_word(word: u32) -> Self {
        let (mapped, word) = (0xffff_u32.to_be() as u64, word as u64);
        let half = if cfg!(target_endian = "little") {
            word << 32 | mapped
        } else {
            mapped << 32 | word
        };
        // In halves, as they are read: a processor that was given two words has to wait before it
        // can read both at once.
        Self {
            words: transmute!([0, half]),
        }
    }

    /// Its bytes, eight at a time, in memory order.
    #[inline(always)]
    #[must_use]
    pub const fn halves(&self) -> [u64; 2] {
        transmute!(*self)
    }

    /// Its bytes in network order.
    #[must_use]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = [
            self.words[0].to_ne_bytes(),
            self.words[1].to_ne_bytes(),
            self.words[2].to_ne_bytes(),
            self.words[3].to_ne_bytes(),
        ];
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// Whether it stands for an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.halves()[0] == 0 && self.words[2] == 0xffff_u32.to_be()
    }
}

// By hand: the derived comparison of arrays becomes a call of `bcmp`, which BPF does not have.
impl PartialEq for Addr {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let ([one, two], [three, four]) = (self.halves(), other.halves());
        one == three && two == four
    }
}

impl Eq for Addr {}

impl Ord for Addr {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.octets().cmp(&other.octets())
    }
}

impl PartialOrd for Addr {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(not(target_arch = "bpf"))]
impl From<core::net::IpAddr> for Addr {
    fn from(addr: core::net::IpAddr) -> Self {
        Self::from_octets(match addr {
            core::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            core::net::IpAddr::V6(v6) => v6.octets(),
        })
    }
}

#[cfg(not(target_arch = "bpf"))]
impl From<Addr> for core::net::IpAddr {
    fn from(addr: Addr) -> Self {
        Self::V6(addr.octets().into()).to_canonical()
    }
}

#[cfg(not(target_arch = "bpf"))]
impl core::fmt::Debug for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::net::IpAddr::from(*self).fmt(f)
    }
}

/// What the programs look at first: which tables count, and since which epoch flows are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// Flows of an older epoch are decided again. 0: no policy is active, and all is dropped.
    pub epoch: u32,
    /// Index into every outer map.
    pub slot: u32,
}

impl Active {
    /// From the word in the map.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self {
            epoch: (word >> 32) as u32,
            slot: word as u32 & (SLOTS - 1),
        }
    }

    /// The word in the map.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u64 {
        (self.epoch as u64) << 32 | self.slot as u64
    }
}

/// Whose an address is.
pub mod side {
    /// Nobody's that policy may speak of.
    pub const NOBODY: u32 = 0;
    /// A peer's, or behind a peer's approved route.
    pub const PEER: u32 = 1;
    /// The node's own, or behind a route that it serves.
    pub const OWN: u32 = 2;
}

/// What policy knows about an address. Addresses that no rule tells apart share a class.
/// Class 0 is named by no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Identity {
    /// Its class as the one who initiates.
    pub as_source: u32,
    /// Its class as the one initiated to.
    pub as_destination: u32,
    /// One of [`side`].
    pub side: u32,
    /// Which of [`SHARES`] its flows count against; 0 for what is not a peer's.
    pub share: u32,
}

/// The share of a peer, by the number of its node: always the same, and another for each peer as
/// long as the network has not had [`SHARES`] of them. Share 0 is all peers together.
#[must_use]
pub const fn share_of(node: u64) -> u32 {
    1 + (node % (SHARES as u64 - 1)) as u32
}

/// Who initiates to whom, in which direction.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PairKey {
    /// [`Identity::as_source`] of the initiator.
    pub source: u32,
    /// [`Identity::as_destination`] of the other.
    pub destination: u32,
    /// [`Direction`] of the first packet.
    pub direction: u32,
}

/// A port set; equal sets share one id.
pub type SetId = u32;
/// The set of every protocol and port; it has no entries of its own.
pub const EVERYTHING: SetId = u32::MAX;

/// What one class may initiate to another: a port set, and of that the ports of one protocol, so
/// that most packets need no other table.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Grant {
    /// The set; what it holds beside `ranges` is in `PORTS`.
    pub set: SetId,
    /// IP protocol number that `ranges` are of, or [`NO_PROTOCOL`].
    pub protocol: u16,
    /// 1 if the set has other protocols.
    pub more: u16,
    /// Its ports; unused ones are [`NO_RANGE`].
    pub ranges: [[u16; 2]; GRANT_RANGES],
}

/// Ranges that a [`Grant`] has room for.
pub const GRANT_RANGES: usize = 4;
/// [`Grant::protocol`] of one without ranges.
pub const NO_PROTOCOL: u16 = u16::MAX;

impl Grant {
    /// Every protocol and port.
    pub const EVERYTHING: Self = Self {
        set: EVERYTHING,
        protocol: NO_PROTOCOL,
        more: 0,
        ranges: [NO_RANGE; GRANT_RANGES],
    };
}

/// [`PortsKey::protocol`] of the entry for protocols that have no entry of their own.
pub const ANY_PROTOCOL: u32 = 256;

/// One protocol of one port set.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PortsKey {
    /// The set.
    pub set: SetId,
    /// IP protocol number, or [`ANY_PROTOCOL`].
    pub protocol: u32,
}

/// Ranges that fit a [`Ports`] value; larger sets are paged.
pub const INLINE_RANGES: usize = 7;

/// How [`Ports`] are held.
pub mod ports_kind {
    /// Every port, and protocols without ports.
    pub const ALL: u16 = 1;
    /// The first [`super::Ports::count`] ranges.
    pub const INLINE: u16 = 2;
    /// One bit a port, in `PAGES`.
    pub const PAGED: u16 = 3;
}

/// The ports of one protocol in one set.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Ports {
    /// One of [`ports_kind`].
    pub kind: u16,
    /// Ranges in use.
    pub count: u16,
    /// First and last port of each range; unused ones are `1, 0`, which no port is in.
    pub ranges: [[u16; 2]; INLINE_RANGES],
}

/// A range that holds no port.
pub const NO_RANGE: [u16; 2] = [1, 0];

/// Ports of one page.
pub const PAGE_PORTS: u16 = 512;

/// 512 ports of one protocol in one set.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PageKey {
    /// The set.
    pub set: SetId,
    /// As in [`PortsKey`].
    pub protocol: u16,
    /// Port divided by [`PAGE_PORTS`].
    pub page: u16,
}

/// One bit a port, lowest port in the lowest bit of the first word.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Page {
    /// The bits.
    pub words: [u64; 8],
}

/// A flow, seen from this node: one key for both directions.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord))]
#[repr(C, align(8))]
pub struct FlowKey {
    /// This node's address, or one behind a route that it serves.
    pub local: Addr,
    /// The peer's address, or one behind its route.
    pub remote: Addr,
    /// Port on this side. Echo: the identifier.
    pub local_port: u16,
    /// Port on the other side. Echo: [`ECHO_FROM_LOCAL`] or [`ECHO_FROM_REMOTE`].
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Always 0. Not one array: clearing that is a call in BPF.
    pub zero: u8,
    /// Always 0.
    pub zeros: u16,
}

impl FlowKey {
    /// The key of a flow between these.
    #[inline(always)]
    #[must_use]
    pub const fn new(
        (local, local_port): (&Addr, u16),
        (remote, remote_port): (&Addr, u16),
        protocol: u8,
    ) -> Self {
        let [a, b] = local_port.to_ne_bytes();
        let [c, d] = remote_port.to_ne_bytes();
        let ([one, two], [three, four]) = (local.halves(), remote.halves());
        // In words, as they are read: see [`Addr::from_v4_word`].
        let last = u64::from_ne_bytes([a, b, c, d, protocol, 0, 0, 0]);
        transmute!([one, two, three, four, last])
    }
}

/// [`FlowKey::remote_port`] of an echo flow that this side asked for. Who asks is part of the key,
/// so that two nodes may ping each other with one identifier and an answer never counts as a
/// question.
pub const ECHO_FROM_LOCAL: u16 = 1;
/// [`FlowKey::remote_port`] of an echo flow that the other side asked for.
pub const ECHO_FROM_REMOTE: u16 = 2;

/// Bits of [`Flow::flags`].
pub mod flow_flags {
    /// The initiator sent a FIN.
    pub const INITIATOR_CLOSED: u8 = 1;
    /// The other side sent a FIN.
    pub const RESPONDER_CLOSED: u8 = 2;
    /// A RST was seen.
    pub const RESET: u8 = 4;
    /// Its beginning was not seen (a pure ACK began it here).
    pub const PICKED_UP: u8 = 8;
    /// The other side answered.
    pub const ANSWERED: u8 = 16;
}

/// State of a flow. Fields are only ever appended.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Flow {
    /// When a packet of it last passed, on the coarse monotonic clock; refreshed lazily.
    pub last_seen_ns: u64,
    /// Epoch under which policy last allowed it.
    pub epoch: u32,
    /// [`Direction`] of its first packet.
    pub initiator: u8,
    /// Bits of [`flow_flags`].
    pub flags: u8,
    /// [`Identity::share`] of the peer; 0 if that is not known.
    pub share: u16,
}

/// A datagram in fragments.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord))]
#[repr(C)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification, as read from the packet.
    pub id: u32,
    /// Protocol, as every fragment names it.
    pub protocol: u32,
}

/// Which flow the fragments of a datagram belong to.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Fragment {
    /// When the first fragment passed.
    pub seen_ns: u64,
    /// [`FlowKey::local_port`].
    pub local_port: u16,
    /// [`FlowKey::remote_port`].
    pub remote_port: u16,
    /// [`FlowKey::protocol`].
    pub protocol: u8,
    /// Always 0.
    pub zero: [u8; 3],
}

/// How many flows were picked up in the current window.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Quota {
    /// When the window began.
    pub since_ns: u64,
    /// Flows picked up in it.
    pub used: u64,
}

/// What a peer has of the flow tables. The numbers bound, they do not keep accounts: two CPUs may
/// lose a count to each other, evictions are not seen, and the agent counts anew now and then.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Share {
    /// When the window began.
    pub since_ns: u64,
    /// Flows opened in it.
    pub opened: u32,
    /// Flows that last.
    pub established: u32,
}

/// One outcome's share of the traffic, on one CPU.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Counter {
    /// Packets (a GSO packet is one).
    pub packets: u64,
    /// Bytes, IP header included.
    pub bytes: u64,
}

/// How much of a dropped packet could be read.
pub mod known {
    /// Nothing but its length.
    pub const NOTHING: u8 = 0;
    /// The addresses and the protocol of its first header.
    pub const ADDRESSES: u8 = 1;
    /// All that decides.
    pub const ALL: u8 = 2;
    /// Likewise, of a fragment after the first, which has no ports.
    pub const LATER_FRAGMENT: u8 = 3;
}

/// What is told of a dropped packet. Never what it carries.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Dropped {
    /// When, on the coarse monotonic clock.
    pub time_ns: u64,
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// [`Identity::as_source`] of the source address in the active tables; 0 if it has none.
    pub src_class: u32,
    /// [`Identity::as_destination`] of the destination address, likewise.
    pub dst_class: u32,
    /// Length in bytes, IP header included.
    pub len: u32,
    /// Source port; identifier of an ICMP question or answer.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// [`crate::verdict::Verdict::code`].
    pub verdict: u8,
    /// [`Direction`].
    pub direction: u8,
    /// One of [`known`]: what of the fields below and above means anything.
    pub known: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// TCP flags, or 0.
    pub tcp_flags: u8,
    /// ICMP type; 0 in packets of other protocols.
    pub icmp_type: u8,
    /// [`Identity::side`] of the source address.
    pub src_side: u8,
    /// [`Identity::side`] of the destination address.
    pub dst_side: u8,
}

/// The kind of packet that an event last told of, in one place of a small table by kind.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Told {
    /// A hash of what makes packets alike.
    pub kind: u32,
    /// The window in which it was told.
    pub window: u32,
}

/// What may still be told of one outcome.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(C)]
pub struct Allowance {
    /// The window that is counted.
    pub window: u32,
    /// Events in it.
    pub told: u32,
    /// The tick that is counted: what the coarse clock said.
    pub tick_ns: u64,
    /// Packets in it that were looked at.
    pub looked: u64,
}

const _: () = {
    assert!(size_of::<Dropped>() == 64);
    assert!(size_of::<Told>() == 8);
    assert!(size_of::<Allowance>() == 24);
    assert!(size_of::<Addr>() == 16);
    assert!(size_of::<Identity>() == 16);
    assert!(size_of::<PairKey>() == 12);
    assert!(size_of::<PortsKey>() == 8);
    assert!(size_of::<Ports>() == 32);
    assert!(size_of::<Grant>() == 24);
    assert!(size_of::<PageKey>() == 8);
    assert!(size_of::<Page>() == 64);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 16);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<Fragment>() == 16);
    assert!(size_of::<Quota>() == 16);
    assert!(size_of::<Share>() == 16);
    assert!(SHARES <= u16::MAX as u32);
    assert!(size_of::<Counter>() == 16);
};
