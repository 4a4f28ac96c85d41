//! What is told of dropped packets, and how often.
//!
//! Every packet is counted; of those that are dropped, some are told of in a ring buffer, for
//! `weir monitor`. Packets are of one *kind* if they have the same outcome, direction, addresses,
//! protocol and destination port. Of each kind the first one in a window is told ([`Told`]), and of
//! each outcome no more than [`EVENTS_PER_WINDOW`] ([`Allowance`]); both are kept by every CPU on
//! its own. To find that out costs a hash and a look-up; so of one outcome no more than
//! [`LOOKS_PER_TICK`] packets are looked at in a tick of the clock, and a flood costs hardly anything.
//! Whoever floods under one reason leaves the others their say.
//!
//! Nobody may be reading. Then the buffer is full after a while and events are lost, without harm:
//! the counters are exact, and the reader tells from them what it was not shown. How many events
//! found no room is counted too.

use crate::abi::{Addr, Allowance, Direction, Dropped, Identity, Told, known, side};
use crate::packet::{Bytes, Packet, What, protocol};
use crate::verdict::{Tables, Verdict};

/// A window is 2^30 ns, about a second: found by a shift.
pub const WINDOW_SHIFT: u32 = 30;
/// Most events of one outcome and direction in a window, on one CPU: more than a person reads,
/// little enough to cost nothing.
pub const EVENTS_PER_WINDOW: u32 = 32;
/// Most packets of one outcome that are looked at between two ticks of the coarse clock, on one CPU:
/// twice what can be told.
pub const LOOKS_PER_TICK: u64 = 64;
/// Kinds that one CPU remembers. Kinds that share a place are told more often, never less.
pub const KINDS: u32 = 512;

/// The window of a time.
#[inline(always)]
#[must_use]
pub const fn window(now_ns: u64) -> u32 {
    (now_ns >> WINDOW_SHIFT) as u32
}

/// What kind of packet it is: equal for packets that are told of once a window. `None` for `packet`
/// if it could not be read.
#[inline(always)]
#[must_use]
pub fn kind(counter: u32, packet: Option<&Packet>) -> u32 {
    let mut hash = u64::from(counter) + 1;
    if let Some(packet) = packet {
        let tuple = &packet.tuple;
        hash = mix(hash, tuple.src.words[0], tuple.src.words[1]);
        hash = mix(hash, tuple.src.words[2], tuple.src.words[3]);
        hash = mix(hash, tuple.dst.words[0], tuple.dst.words[1]);
        hash = mix(hash, tuple.dst.words[2], tuple.dst.words[3]);
        let rest = u32::from(tuple.dst_port) << 16 | u32::from(tuple.protocol);
        hash = mix(hash, rest, u32::from(packet.tcp_flags));
    }
    // A product's upper half depends on all bits below it.
    ((hash ^ hash >> 32).wrapping_mul(MULTIPLIER) >> 32) as u32
}

/// 2^64 divided by the golden ratio (Knuth, TAOCP 3, 6.4).
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline(always)]
const fn mix(hash: u64, one: u32, two: u32) -> u64 {
    let word = (one as u64) << 32 | two as u64;
    (hash ^ word).wrapping_mul(MULTIPLIER).rotate_left(29)
}

/// Whether this kind is new in its window; if so, it is not any more.
#[inline(always)]
pub fn is_news(told: &mut Told, kind: u32, window: u32) -> bool {
    if told.kind == kind && told.window == window {
        return false;
    }
    *told = Told { kind, window };
    true
}

/// Whether one more packet of this outcome is looked at in this tick.
#[inline(always)]
pub fn look(allowance: &mut Allowance, now_ns: u64) -> bool {
    if allowance.tick_ns != now_ns {
        allowance.tick_ns = now_ns;
        allowance.looked = 0;
    }
    allowance.looked += 1;
    allowance.looked <= LOOKS_PER_TICK
}

/// Whether one more event of this outcome fits the window; if so, it is taken.
#[inline(always)]
pub fn take(allowance: &mut Allowance, window: u32) -> bool {
    if allowance.window != window {
        allowance.window = window;
        allowance.told = 0;
    }
    if allowance.told >= EVENTS_PER_WINDOW {
        return false;
    }
    allowance.told += 1;
    true
}

/// All that is told of a packet; `packet` is `None` if it could not be read to the end of what
/// decides.
#[inline(always)]
pub fn describe<T: Tables, B: Bytes>(
    tables: &T,
    bytes: &B,
    packet: Option<&Packet>,
    verdict: Verdict,
    direction: Direction,
    now_ns: u64,
) -> Dropped {
    let mut event = Dropped {
        time_ns: now_ns,
        src: Addr { words: [0; 4] },
        dst: Addr { words: [0; 4] },
        src_class: 0,
        dst_class: 0,
        len: bytes.len(),
        src_port: 0,
        dst_port: 0,
        verdict: verdict.code() as u8,
        direction: direction as u8,
        known: known::NOTHING,
        protocol: 0,
        tcp_flags: 0,
        icmp_type: 0,
        src_side: side::NOBODY as u8,
        dst_side: side::NOBODY as u8,
    };
    let header = addresses(bytes, &mut event);
    if let Some(packet) = packet {
        let later = packet.tuple.what == What::LaterFragment;
        event.known = if later {
            known::LATER_FRAGMENT
        } else {
            known::ALL
        };
        event.protocol = packet.tuple.protocol;
        event.src_port = packet.tuple.src_port;
        event.dst_port = packet.tuple.dst_port;
        event.tcp_flags = packet.tcp_flags;
        let icmp = matches!(event.protocol, protocol::ICMP | protocol::ICMPV6);
        if icmp && !later {
            event.icmp_type = match bytes.words::<1>(header) {
                Some([word]) => word.to_ne_bytes()[0],
                None => 0,
            };
        }
    }
    let active = tables.active();
    if event.known != known::NOTHING && active.epoch != 0 {
        if let Some(source) = owner(tables, active.slot, &event.src) {
            event.src_class = source.as_source;
            event.src_side = source.side as u8;
        }
        if let Some(destination) = owner(tables, active.slot, &event.dst) {
            event.dst_class = destination.as_destination;
            event.dst_side = destination.side as u8;
        }
    }
    event
}

#[inline(always)]
fn owner<T: Tables>(tables: &T, slot: u32, addr: &Addr) -> Option<Identity> {
    match tables.identity(slot, addr) {
        Some(identity) => Some(identity),
        None => tables.route(slot, addr),
    }
}

/// Reads the first header's addresses and protocol, and returns where the next header begins.
#[inline(always)]
fn addresses<B: Bytes>(bytes: &B, event: &mut Dropped) -> u32 {
    let Some([first, _, third, src, dst]) = bytes.words::<5>(0) else {
        return 0;
    };
    let first = first.to_ne_bytes()[0];
    match first >> 4 {
        4 => {
            event.src = Addr::from_v4_word(src);
            event.dst = Addr::from_v4_word(dst);
            event.protocol = third.to_ne_bytes()[1];
            event.known = known::ADDRESSES;
            u32::from(first & 0x0f) * 4
        }
        6 => {
            let Some([_, second, s0, s1, s2, s3, d0, d1, d2, d3]) = bytes.words::<10>(0) else {
                return 0;
            };
            event.src.words = [s0, s1, s2, s3];
            event.dst.words = [d0, d1, d2, d3];
            event.protocol = second.to_ne_bytes()[2];
            event.known = known::ADDRESSES;
            40
        }
        _ => 0,
    }
}
