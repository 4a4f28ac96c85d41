//! What a node answers to a packet that it refuses to send: a reset, or an ICMP error.
//!
//! The receiver drops in silence, because an answer would tell a scanner something. The sender's
//! own side has no reason to be silent: whoever sent the packet, on this node or in a subnet that
//! it serves, learns at once that policy does not permit it, and does not wait for a time-out.
//!
//! ```text
//! refused on egress ── is_due? ── is there room (take)? ── write ──► back in by the same device
//!        TCP            a RST that RFC 9293 3.10.7 asks for where there is no connection
//!        anything else  ICMP "administratively prohibited" (RFC 1812 5.2.7.1, RFC 4443 3.1)
//! ```
//!
//! Answered are packets that policy denies, and those of a flow that it took back: not what cannot
//! be read, carries a forged address or belongs to no flow. *Never* answered are (RFC 1122 3.2.2,
//! RFC 4443 2.4 e) ICMP messages other than questions, resets, fragments, and packets to or from an
//! address that is not one host's. The answer comes from the address that the packet was sent to.
//!
//! *A segment in the middle of a connection* is no proof that the connection is not permitted: its
//! flow may have been forgotten, and come back with the other side's next segment. It is reset only
//! if policy allows the connection in neither direction.
//!
//! This module reads and writes bytes, and knows no skb; `src/bin/acl/answer.rs` sends.

use crate::abi::{Addr, Direction, FlowKey, Quota};
use crate::packet::{
    Bytes, MAX_EXTENSIONS, Packet, Part, Tuple, What, is_extension, protocol, tcp,
};
use crate::reason::Reason;
use crate::verdict::{Tables, Verdict, flow_key};

/// Answers are counted in windows of this length.
pub const WINDOW_NS: u64 = 100_000_000;
/// Most answers of one CPU in a window to packets from one address to another. (A hundred
/// connection attempts that fail at once are more than an application makes, less than a scan.)
pub const ANSWERS_PER_PAIR: u64 = 100;
/// Most answers of one CPU in a window: a flood of refused packets costs little more than drops.
pub const ANSWERS_PER_CPU: u64 = 1_000;
/// Counts of one CPU, over which the pairs of addresses are spread.
pub const BUCKETS: u32 = 256;

/// Most bytes of the refused packet that an ICMP error embeds: more than any socket looks at. A
/// whole number of words.
pub const MAX_EMBEDDED: u32 = 128;
const EMBEDDED_WORDS: usize = MAX_EMBEDDED as usize / 4;
const V4_WORDS: usize = 5;
const V6_WORDS: usize = 10;
const TCP_WORDS: usize = 5;
const ICMP_WORDS: usize = 2;
/// Most words of an answer.
pub const REFUSAL_WORDS: usize = V6_WORDS + ICMP_WORDS + EMBEDDED_WORDS;

/// Hops that an answer may travel.
const HOPS: u32 = 64;
/// Destination unreachable, communication administratively prohibited (RFC 1812 5.2.7.1).
const PROHIBITED_V4: [u8; 4] = [3, 13, 0, 0];
/// Destination unreachable, communication administratively prohibited (RFC 4443 3.1).
const PROHIBITED_V6: [u8; 4] = [1, 1, 0, 0];

/// A packet that answers another.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialEq, Eq))]
#[repr(C)]
pub struct Refusal {
    /// Its length in bytes, IP header included.
    pub len: u32,
    /// Where the upper-layer header of the *refused* packet begins.
    pub transport: u32,
    /// Its bytes, four at a time, in memory order.
    pub words: [u32; REFUSAL_WORDS],
}

impl Refusal {
    /// None yet.
    pub const NONE: Self = Self {
        len: 0,
        transport: 0,
        words: [0; REFUSAL_WORDS],
    };
}

/// What became of an answer that was due; index of its counter.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord))]
#[repr(u32)]
pub enum Outcome {
    /// It was sent.
    Sent = 0,
    /// There were too many lately.
    Limited = 1,
    /// The kernel could not turn the packet into its answer.
    Failed = 2,
}

impl Outcome {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 3] = [Self::Sent, Self::Limited, Self::Failed];

    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Limited => "limited",
            Self::Failed => "failed",
        }
    }
}

/// Whether a packet that was refused on egress with this verdict gets an answer. The place for the
/// key is the caller's, for the sake of the kernel's stack.
#[inline(always)]
pub fn is_due<T: Tables>(tables: &T, packet: &Packet, verdict: Verdict, key: &mut FlowKey) -> bool {
    let revoked = verdict == Verdict::deny(Reason::Revoked);
    if !revoked && verdict != Verdict::deny(Reason::Policy) {
        return false;
    }
    let tuple = &packet.tuple;
    if packet.part != Part::Whole || !is_host(&tuple.src) || !is_host(&tuple.dst) {
        return false;
    }
    match tuple.what {
        What::Segment if packet.tcp_flags & tcp::RST != 0 => false,
        What::Segment => revoked || is_syn(packet) || !may_come_back(tables, tuple, key),
        What::Datagram => !matches!(tuple.protocol, protocol::ICMP | protocol::ICMPV6),
        What::Request | What::SctpInit | What::SctpOther => true,
        What::Reply | What::Error | What::OtherIcmp | What::LaterFragment => false,
    }
}

#[inline(always)]
fn is_syn(packet: &Packet) -> bool {
    packet.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN
}

/// Whether the other side may have begun this connection, and so may revive it.
#[inline(always)]
fn may_come_back<T: Tables>(tables: &T, tuple: &Tuple, key: &mut FlowKey) -> bool {
    *key = flow_key(Direction::Egress, tuple);
    let slot = tables.active().slot;
    let answer = tables.allows(key, Direction::Ingress as u32, slot);
    answer.verdict.passes()
}

/// Whether an address may be that of one host.
#[inline(always)]
fn is_host(addr: &Addr) -> bool {
    if addr.is_v4() {
        // 0/8, 127/8, and from 224/4 on.
        let first = addr.words[3].to_ne_bytes()[0];
        return first != 0 && first != 127 && first < 224;
    }
    let first = addr.words[0].to_ne_bytes()[0];
    let zeros = addr.words[0] | addr.words[1] == 0;
    first != 0xff && !zeros
}

/// The bucket that counts answers between two addresses.
#[inline(always)]
#[must_use]
pub fn bucket(tuple: &Tuple) -> u32 {
    let mut hash = 0_u32;
    for word in tuple.src.words {
        hash = mix(hash, word);
    }
    for word in tuple.dst.words {
        hash = mix(hash, word);
    }
    (hash >> 16) % BUCKETS
}

/// The multiplier is 2^32 divided by the golden ratio (Knuth, TAOCP 3, 6.4).
#[inline(always)]
const fn mix(hash: u32, word: u32) -> u32 {
    (hash ^ word).wrapping_mul(0x9e37_79b1).rotate_left(13)
}

/// Takes one of the `most` answers that a window has, if one is left.
#[inline(always)]
pub fn take(window: &mut Quota, most: u64, now_ns: u64) -> bool {
    if now_ns.wrapping_sub(window.since_ns) >= WINDOW_NS {
        window.since_ns = now_ns;
        window.used = 0;
    }
    if window.used >= most {
        return false;
    }
    window.used += 1;
    true
}

/// Writes the answer to a packet that was read as `packet`; `None` if it cannot be read again.
#[inline(always)]
pub fn write<B: Bytes>(bytes: &B, packet: &Packet, refusal: &mut Refusal) -> Option<()> {
    let [first, second] = bytes.words::<2>(0)?;
    let is_tcp = matches!(packet.tuple.what, What::Segment);
    if packet.tuple.src.is_v4() {
        let total = u32::from_be(first) & 0xffff;
        refusal.transport = u32::from(first.to_ne_bytes()[0] & 0x0f) * 4;
        if is_tcp {
            reset::<B, V4_WORDS>(bytes, packet, total, refusal)?;
        } else {
            prohibited::<B, V4_WORDS>(bytes, packet, total, refusal)?;
        }
    } else {
        let total = (u32::from_be(second) >> 16) + 40;
        refusal.transport = upper_layer(bytes, second.to_ne_bytes()[2])?;
        if is_tcp {
            reset::<B, V6_WORDS>(bytes, packet, total, refusal)?;
        } else {
            prohibited::<B, V6_WORDS>(bytes, packet, total, refusal)?;
        }
    }
    Some(())
}

/// Where the header behind all IPv6 extension headers begins. They were found good when the packet
/// was read.
#[inline(always)]
fn upper_layer<B: Bytes>(bytes: &B, first: u8) -> Option<u32> {
    let (mut next, mut at) = (first, 40);
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(next) {
            break;
        }
        let [word] = bytes.words::<1>(at)?;
        let [after, length, _, _] = word.to_ne_bytes();
        at += match next {
            protocol::FRAGMENT => 8,
            _ => (u32::from(length) + 1) * 8,
        };
        next = after;
    }
    (!is_extension(next)).then_some(at)
}

/// The reset that RFC 9293 3.10.7.1 (state CLOSED) asks for.
#[inline(always)]
fn reset<B: Bytes, const HEADER: usize>(
    bytes: &B,
    packet: &Packet,
    total: u32,
    refusal: &mut Refusal,
) -> Option<()> {
    let [ports, seq, ack, offset] = bytes.words::<4>(refusal.transport)?;
    let flags = packet.tcp_flags;
    let (seq, ack, flags) = if flags & tcp::ACK != 0 {
        (ack, 0, tcp::RST)
    } else {
        let header = (u32::from_be(offset) >> 28) * 4;
        let data = total.saturating_sub(refusal.transport + header);
        let syn = u32::from(flags & tcp::SYN != 0);
        let fin = u32::from(flags & tcp::FIN != 0);
        let ack = u32::from_be(seq).wrapping_add(data + syn + fin);
        (0, ack.to_be(), tcp::RST | tcp::ACK)
    };
    let ports = ports.rotate_left(16);
    let offset = ((TCP_WORDS as u32) << 28 | u32::from(flags) << 16).to_be();
    refusal.len = ((HEADER + TCP_WORDS) * 4) as u32;
    header::<HEADER>(refusal, &packet.tuple, protocol::TCP);
    let mut sum = pseudo::<HEADER>(refusal, &packet.tuple, protocol::TCP);
    sum += u64::from(ports) + u64::from(seq) + u64::from(ack) + u64::from(offset);
    let [one, two] = checksum(sum).to_ne_bytes();
    refusal.words[HEADER] = ports;
    refusal.words[HEADER + 1] = seq;
    refusal.words[HEADER + 2] = ack;
    refusal.words[HEADER + 3] = offset;
    refusal.words[HEADER + 4] = u32::from_ne_bytes([one, two, 0, 0]);
    Some(())
}

/// An ICMP error that embeds the beginning of the packet.
#[inline(always)]
fn prohibited<B: Bytes, const HEADER: usize>(
    bytes: &B,
    packet: &Packet,
    total: u32,
    refusal: &mut Refusal,
) -> Option<()> {
    let v6 = HEADER == V6_WORDS;
    let (kind, number) = if v6 {
        (PROHIBITED_V6, protocol::ICMPV6)
    } else {
        (PROHIBITED_V4, protocol::ICMP)
    };
    // Whole words: up to three bytes of a packet that short are left out.
    let embedded = if total < MAX_EMBEDDED {
        total & !3
    } else {
        MAX_EMBEDDED
    };
    let mut sum = u64::from(u32::from_ne_bytes(kind));
    for index in 0..EMBEDDED_WORDS {
        let at = index as u32 * 4;
        if at >= embedded {
            break;
        }
        let [word] = bytes.words::<1>(at)?;
        sum += u64::from(word);
        *refusal.words.get_mut(HEADER + ICMP_WORDS + index)? = word;
    }
    refusal.len = ((HEADER + ICMP_WORDS) * 4) as u32 + embedded;
    header::<HEADER>(refusal, &packet.tuple, number);
    if v6 {
        sum += pseudo::<HEADER>(refusal, &packet.tuple, number);
    }
    let [one, two] = checksum(sum).to_ne_bytes();
    refusal.words[HEADER] = u32::from_ne_bytes([kind[0], kind[1], one, two]);
    refusal.words[HEADER + 1] = 0;
    Some(())
}

/// The IP header: from where the refused packet was going, to where it came from.
#[inline(always)]
fn header<const HEADER: usize>(refusal: &mut Refusal, refused: &Tuple, number: u8) {
    let (from, to) = (&refused.dst.words, &refused.src.words);
    let (len, number) = (refusal.len, u32::from(number));
    let words = &mut refusal.words;
    if HEADER == V6_WORDS {
        words[0] = 0x6000_0000_u32.to_be();
        words[1] = ((len - 40) << 16 | number << 8 | HOPS).to_be();
        words[2] = from[0];
        words[3] = from[1];
        words[4] = from[2];
        words[5] = from[3];
        words[6] = to[0];
        words[7] = to[1];
        words[8] = to[2];
        words[9] = to[3];
        return;
    }
    let first = (0x4500_0000 | len).to_be();
    // Not to be fragmented, so that it needs no identification (RFC 6864 4.1).
    let second = 0x0000_4000_u32.to_be();
    let third = HOPS << 24 | number << 16;
    let parts = [first, second, third.to_be(), from[3], to[3]];
    let sum = parts.iter().fold(0, |sum, word| sum + u64::from(*word));
    let [one, two] = checksum(sum).to_ne_bytes();
    words[0] = first;
    words[1] = second;
    words[2] = u32::from_ne_bytes([HOPS as u8, number as u8, one, two]);
    words[3] = from[3];
    words[4] = to[3];
}

/// The sum of the pseudo header (RFC 9293 3.1, RFC 8200 8.1).
#[inline(always)]
fn pseudo<const HEADER: usize>(refusal: &Refusal, refused: &Tuple, number: u8) -> u64 {
    let (src, dst) = (&refused.src.words, &refused.dst.words);
    let mut sum = u64::from(src[3]) + u64::from(dst[3]);
    if HEADER == V6_WORDS {
        sum += u64::from(src[0]) + u64::from(src[1]) + u64::from(src[2]);
        sum += u64::from(dst[0]) + u64::from(dst[1]) + u64::from(dst[2]);
    }
    let len = refusal.len - HEADER as u32 * 4;
    sum + u64::from(len.to_be()) + u64::from(u32::from(number).to_be())
}

/// The Internet checksum (RFC 1071) of words that add up to `sum`, in memory order as they were.
#[inline(always)]
fn checksum(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    !(sum as u16)
}
