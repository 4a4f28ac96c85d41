//! Refusals that are remembered, so that a packet that was refused a moment ago costs no look-up in
//! any table when it comes again.
//!
//! Whoever is refused tries again, with the same addresses and ports: the next SYN, the next
//! datagram of an application that hears nothing. [`crate::verdict::decide`] finds that out anew
//! each time, by a dozen look-ups; here its answer stays, for one question at one place of a small
//! table that each CPU has for itself. It is an answer for as long as nothing changed that it was
//! made of:
//!
//! - *policy*: the whole active word must be the same. It also counts what is added in place
//!   ([`crate::abi::Active::revision`]), so that no word ever comes twice;
//! - *flows*: a flow may begin from the other side, and this packet then belongs to it. Every flow
//!   that is written changes its [`generation`], which must be the same; it is read *before* the
//!   flow is looked for (or, among flows that last, that is done once more before it is kept);
//! - *time*: an answer lasts a window ([`crate::event::window`]), about a second. So nothing can be
//!   wrong for longer, whatever two CPUs see of each other's writes, and the one packet of a kind
//!   that is told of in a window is the one that was decided.
//!
//! The first refusal in a window leaves a tag, the second one the answer. So a scan, whose packets
//! are all different, costs hardly more than without this table.
//!
//! Only "policy refuses it" is remembered, which depends on nothing else. What passes never is: a
//! known flow is found by one look-up anyway.

use crate::abi::{Active, Addr, Direction, FlowKey};
use crate::packet::{Packet, Part, What, protocol};

/// Refusals that lie side by side; how the kernel allots memory makes larger values cheaper.
pub const ROW: u32 = 16;
/// Rows of one CPU: 4,096 refusals, a quarter of a megabyte.
pub const ROWS: u32 = 256;
/// Refusals of one CPU.
pub const PLACES: u32 = ROW * ROWS;
/// Numbers that flows are spread over.
pub const GENERATIONS: u32 = 4_096;

/// A packet that policy refused, and when and under what. Zeros are none: no epoch is 0.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialEq, Eq))]
#[repr(C)]
pub struct Refused {
    src: Addr,
    dst: Addr,
    src_port: u16,
    dst_port: u16,
    protocol: u8,
    what: u8,
    tcp_flags: u8,
    direction: u8,
    at: Moment,
}

/// Refusals side by side.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Row {
    /// The refusals.
    pub places: [Refused; ROW as usize],
}

/// What may be at each place, by a hash: so small that it stays in the processor's cache. A packet
/// that begins something touches nothing else here.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Tags {
    /// By place.
    pub tags: [u16; PLACES as usize],
}

/// What an answer was made of beside the packet.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialEq, Eq))]
#[repr(C)]
pub struct Moment {
    /// [`Active::word`], read before the packet was decided.
    pub active: u64,
    /// The number of the flow's [`generation`], likewise.
    pub generation: u64,
    /// [`crate::event::window`].
    pub window: u32,
    /// Always 0.
    pub zero: u32,
}

/// The packet that is being decided: when that began, and where its refusal would go.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Pending {
    /// When.
    pub at: Moment,
    /// Where; [`NOWHERE`] for packets that are not remembered.
    pub place: u32,
    /// What [`Tags`] then say.
    pub tag: u32,
}

/// No place.
pub const NOWHERE: u32 = PLACES;

const _: () = assert!(size_of::<Refused>() == 64);

impl Refused {
    /// No refusal.
    pub const NONE: Self = Self {
        src: Addr { words: [0; 4] },
        dst: Addr { words: [0; 4] },
        src_port: 0,
        dst_port: 0,
        protocol: 0,
        what: 0,
        tcp_flags: 0,
        direction: 0,
        at: Moment {
            active: 0,
            generation: 0,
            window: 0,
            zero: 0,
        },
    };
}

/// Whether refusals of such packets are remembered: whole ones of protocols whose flows have the
/// packet's own ports.
#[inline(always)]
#[must_use]
pub fn is_for(packet: &Packet) -> bool {
    let icmp = matches!(packet.tuple.protocol, protocol::ICMP | protocol::ICMPV6);
    let what = matches!(
        packet.tuple.what,
        What::Segment | What::Datagram | What::SctpInit | What::SctpOther
    );
    packet.part == Part::Whole && what && !icmp
}

/// A hash of the packet's flow; the same for both directions.
#[inline(always)]
#[must_use]
pub fn hash_of_packet(packet: &Packet, direction: Direction) -> u64 {
    let tuple = &packet.tuple;
    match direction {
        Direction::Ingress => hash(
            &tuple.dst,
            &tuple.src,
            tuple.dst_port,
            tuple.src_port,
            tuple.protocol,
        ),
        Direction::Egress => hash(
            &tuple.src,
            &tuple.dst,
            tuple.src_port,
            tuple.dst_port,
            tuple.protocol,
        ),
    }
}

/// The same of its key.
#[inline(always)]
#[must_use]
pub fn hash_of_key(key: &FlowKey) -> u64 {
    hash(
        &key.local,
        &key.remote,
        key.local_port,
        key.remote_port,
        key.protocol,
    )
}

/// Which of the [`GENERATIONS`] changes with a flow.
#[inline(always)]
#[must_use]
pub const fn generation(hash: u64) -> u32 {
    (hash >> 32) as u32 % GENERATIONS
}

/// The place of a refusal.
#[inline(always)]
#[must_use]
pub const fn place(hash: u64) -> u32 {
    (hash >> 32) as u32 % PLACES
}

/// What [`Tags`] say of a refusal in this window.
#[inline(always)]
#[must_use]
pub const fn tag(hash: u64, window: u32) -> u16 {
    (hash >> 44) as u16 ^ window as u16
}

/// A sum of products, whose upper half depends on every bit: the products do not wait for each
/// other. Who finds flows that collide makes them slower, and nothing else.
#[inline(always)]
const fn hash(local: &Addr, remote: &Addr, local_port: u16, remote_port: u16, proto: u8) -> u64 {
    let (l, r) = (&local.words, &remote.words);
    let ports = (local_port as u64) << 32 | (remote_port as u64) << 8 | proto as u64;
    let sum = word(l[0], l[1])
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(word(l[2], l[3]).wrapping_mul(0xbf58_476d_1ce4_e5b9))
        .wrapping_add(word(r[0], r[1]).wrapping_mul(0x94d0_49bb_1331_11eb))
        .wrapping_add(word(r[2], r[3]).wrapping_mul(0xd6e8_feb8_6659_fd93))
        .wrapping_add(ports.wrapping_mul(0xa076_1d64_78bd_642f));
    (sum ^ sum >> 32).wrapping_mul(0xe703_7ed1_a0b4_28db)
}

#[inline(always)]
const fn word(one: u32, two: u32) -> u64 {
    (one as u64) << 32 | two as u64
}

/// Whether this is the refusal of just this packet, and still an answer.
#[inline(always)]
#[must_use]
pub fn answers(refused: &Refused, packet: &Packet, direction: Direction, now: &Moment) -> bool {
    let tuple = &packet.tuple;
    refused.at.active == now.active
        && refused.at.generation == now.generation
        && refused.at.window == now.window
        && refused.src_port == tuple.src_port
        && refused.dst_port == tuple.dst_port
        && refused.protocol == tuple.protocol
        && refused.what == tuple.what as u8
        && refused.tcp_flags == packet.tcp_flags
        && refused.direction == direction as u8
        && refused.dst == tuple.dst
        && refused.src == tuple.src
        && Active::from_word(now.active).epoch != 0
}

/// Remembers that policy refused this packet, which began to be decided `then`.
#[inline(always)]
pub fn keep(refused: &mut Refused, packet: &Packet, direction: Direction, then: &Moment) {
    let tuple = &packet.tuple;
    refused.src = tuple.src;
    refused.dst = tuple.dst;
    refused.src_port = tuple.src_port;
    refused.dst_port = tuple.dst_port;
    refused.protocol = tuple.protocol;
    refused.what = tuple.what as u8;
    refused.tcp_flags = packet.tcp_flags;
    refused.direction = direction as u8;
    refused.at.active = then.active;
    refused.at.generation = then.generation;
    refused.at.window = then.window;
}
