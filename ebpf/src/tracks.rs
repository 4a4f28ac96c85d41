//! Tracks: which flows cannot be there.
//!
//! A packet that begins something, or tries to, is looked for among the flows in vain, in three
//! tables. So every flow leaves a track when it is written: one bit, at a place that its hash names.
//! Where there is no track there is no flow, and policy is asked at once. A track without a flow
//! costs the look-ups and nothing else.
//!
//! Nobody erases single tracks, because two flows may share one. There are two halves, and programs
//! leave tracks in both; now and then the agent clears the half that nobody reads, waits until every
//! packet that was under way is through, leaves there the tracks of all flows that the tables hold,
//! and lets the programs read that half from then on. While no agent lives, tracks become more, and
//! a refusal in time costs what it would cost without them.

use crate::abi::{Addr, Direction, FlowKey};
use crate::packet::{Packet, Part, What, protocol};

/// Tracks of one half: 32 KiB, which a processor keeps in its cache.
pub const TRACKS: u32 = 1 << 18;
/// Words of one half.
pub const WORDS: u32 = TRACKS / 64;
/// Words of the map: both halves, and which of them is read.
pub const ALL_WORDS: u32 = 2 * WORDS + 1;
/// Where it stands which half is read: 0 or 1.
pub const HALF: u32 = 2 * WORDS;

/// Whether a packet's flow has the packet's own ports, so that its hash can be told from them.
#[inline(always)]
#[must_use]
pub fn is_for(packet: &Packet) -> bool {
    let icmp = matches!(packet.tuple.protocol, protocol::ICMP | protocol::ICMPV6);
    let what = matches!(
        packet.tuple.what,
        What::Segment | What::Datagram | What::SctpInit | What::SctpOther
    );
    !matches!(packet.part, Part::Later) && what && !icmp
}

/// The place of a packet's flow.
#[inline(always)]
#[must_use]
pub fn of_packet(packet: &Packet, direction: Direction) -> u32 {
    let tuple = &packet.tuple;
    let (src, dst) = (u64::from(tuple.src_port), u64::from(tuple.dst_port));
    let proto = u64::from(tuple.protocol);
    match direction {
        Direction::Ingress => place(&tuple.dst, &tuple.src, dst, src, proto),
        Direction::Egress => place(&tuple.src, &tuple.dst, src, dst, proto),
    }
}

/// The same, of its key.
#[inline(always)]
#[must_use]
pub fn of_key(key: &FlowKey) -> u32 {
    let (local, remote) = (u64::from(key.local_port), u64::from(key.remote_port));
    let proto = u64::from(key.protocol);
    place(&key.local, &key.remote, local, remote, proto)
}

/// A sum of products, whose upper half depends on every bit: the products do not wait for each
/// other. Who finds flows that collide makes them slower, and nothing else.
#[inline(always)]
const fn place(l: &Addr, r: &Addr, local_port: u64, remote_port: u64, proto: u64) -> u32 {
    let ports = local_port << 32 | remote_port << 8 | proto;
    let ([l0, l1], [r0, r1]) = (l.halves(), r.halves());
    let sum = l0
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(l1.wrapping_mul(0xbf58_476d_1ce4_e5b9))
        .wrapping_add(r0.wrapping_mul(0x94d0_49bb_1331_11eb))
        .wrapping_add(r1.wrapping_mul(0xd6e8_feb8_6659_fd93))
        .wrapping_add(ports.wrapping_mul(0xa076_1d64_78bd_642f));
    ((sum ^ sum >> 32).wrapping_mul(0xe703_7ed1_a0b4_28db) >> 46) as u32
}

/// The word of a half in which a place is.
#[inline(always)]
#[must_use]
pub const fn word_of(half: u32, place: u32) -> u32 {
    (half & 1) * WORDS + place / 64 % WORDS
}

/// Its bit there.
#[inline(always)]
#[must_use]
pub const fn bit(place: u32) -> u64 {
    1 << (place % 64)
}

const _: () = assert!(TRACKS == 1 << (64 - 46));
