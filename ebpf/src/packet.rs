//! From bytes to a [`Packet`]: what policy and flow state need to know, and nothing else.
//!
//! The bytes begin with an IP header (a WireGuard device has no link layer). They are read through
//! [`Bytes`]: a slice on the host, an skb in the kernel. Everything is checked before it is read,
//! against what is there *and* against the lengths that the headers claim, and a packet that
//! cannot be read is a [`Reason`], never a guess:
//!
//! - IPv4 options and IPv6 extension headers are walked (at most [`MAX_EXTENSIONS`]), by the reader
//!   that knows no fixed offsets ([`general`]);
//! - an IPv6 address that stands for an IPv4 one never comes from the network, because inside, IPv4
//!   addresses are written so ([`crate::abi::Addr`]);
//! - a first fragment must carry the whole header that decides; a later one must not reach into it
//!   (RFC 1858, RFC 5722);
//! - AH and ESP are protocols of their own, in both families; what is inside is not looked at;
//! - a routing header that still has segments to visit is refused: the destination that it shows is
//!   not the final one (RFC 8200 4.4).
//!
//! An ICMP error keeps the packet that it embeds as [`Packet::inner`], so that it can be matched
//! with the flow that it is about.

use crate::abi::Addr;
use crate::reason::{Accepted, Reason};
use crate::verdict::Verdict;

/// IPv6 extension headers that are walked before a packet is refused.
pub const MAX_EXTENSIONS: usize = 6;

/// Protocol numbers that matter here (IANA "Assigned Internet Protocol Numbers").
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Internet Control Message Protocol.
    pub const ICMP: u8 = 1;
    /// Transmission Control Protocol.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6: nothing follows.
    pub const NO_NEXT: u8 = 59;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
    /// Stream Control Transmission Protocol.
    pub const SCTP: u8 = 132;
    /// IPv6 mobility header.
    pub const MOBILITY: u8 = 135;
    /// Host Identity Protocol.
    pub const HIP: u8 = 139;
    /// Shim6.
    pub const SHIM6: u8 = 140;
}

/// TCP flags (RFC 9293 3.1).
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// Acknowledgement.
    pub const ACK: u8 = 0x10;
    /// Urgent.
    pub const URG: u8 = 0x20;
}

/// Bytes of a packet, from the IP header on.
pub trait Bytes {
    /// Length of the whole packet.
    fn len(&self) -> u32;
    /// The `4 * N` bytes at `offset`, four at a time, in memory order.
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;
    /// [`general`] on the same bytes, with a reader that takes any offset.
    fn general(&self, packet: &mut Packet) -> Verdict;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Bytes for &[u8] {
    fn len(&self) -> u32 {
        u32::try_from(<[u8]>::len(self)).unwrap_or(u32::MAX)
    }

    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let start = usize::try_from(offset).ok()?;
        let bytes = self.get(start..start.checked_add(4 * N)?)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes(bytes.try_into().ok()?);
        }
        Some(words)
    }

    fn general(&self, packet: &mut Packet) -> Verdict {
        general(self, packet)
    }
}

/// What a packet is to its flow.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(u8)]
pub enum What {
    /// A datagram: any packet of a protocol without handshake.
    Datagram,
    /// A TCP segment; its flags say more.
    Segment,
    /// SCTP with an INIT chunk first.
    SctpInit,
    /// Any other SCTP packet.
    SctpOther,
    /// An ICMP question that names itself by an identifier.
    Request,
    /// Its answer.
    Reply,
    /// An ICMP error.
    Error,
    /// An ICMP message of another type.
    OtherIcmp,
    /// A fragment after the first: no header that says more.
    LaterFragment,
}

/// How a packet relates to fragmentation.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(u8)]
pub enum Part {
    /// Not fragmented.
    Whole,
    /// The first of several.
    First,
    /// Not the first.
    Later,
}

/// Who sends what to whom.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
pub struct Tuple {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port; identifier of an ICMP question or answer; 0 where there is neither.
    pub src_port: u16,
    /// Destination port, or 0.
    pub dst_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// What it is to its flow.
    pub what: What,
}

impl Tuple {
    /// What belongs to no flow.
    pub const NONE: Self = Self {
        src: Addr { words: [0; 4] },
        dst: Addr { words: [0; 4] },
        src_port: 0,
        dst_port: 0,
        protocol: 0,
        what: What::Error,
    };
}

impl Packet {
    /// One that says nothing, to be read into.
    pub const NONE: Self = Self {
        tuple: Tuple::NONE,
        tcp_flags: 0,
        part: Part::Whole,
        fragment_id: 0,
        fragment_protocol: 0,
        fragment_offset: 0,
        inner: Tuple::NONE,
    };
}

/// What one packet says.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
pub struct Packet {
    /// Who sends what to whom.
    pub tuple: Tuple,
    /// TCP flags, or 0.
    pub tcp_flags: u8,
    /// How it relates to fragmentation.
    pub part: Part,
    /// Identification of a fragment.
    pub fragment_id: u32,
    /// Protocol as every fragment of the datagram names it.
    pub fragment_protocol: u8,
    /// Where a later fragment begins in its datagram, in bytes.
    pub fragment_offset: u16,
    /// What an ICMP error embeds; [`Tuple::NONE`] if that could not be read. Means nothing for any
    /// other packet.
    pub inner: Tuple,
}

/// Reads a packet into `packet`.
///
/// Nearly all packets have their transport header at one of two offsets; they are read in place.
/// Options, extension headers, ICMP errors and whatever is not in the linear part go through the
/// general reader, which is out of line.
///
/// The place is the caller's: in the kernel it is a map value, whose contents the verifier does not
/// follow, so that what comes after is verified once and not once for every kind of packet.
///
/// A verdict that passes means no more than that the packet could be read to the end of what decides.
#[inline(always)]
pub fn parse<B: Bytes>(bytes: &B, packet: &mut Packet) -> Verdict {
    match simple(bytes, packet) {
        Some(()) => Verdict::accept(Accepted::New),
        None => bytes.general(packet),
    }
}

/// Reads a packet without options, extension headers or embedded packet; `None` for any other.
#[inline(always)]
fn simple<B: Bytes>(bytes: &B, packet: &mut Packet) -> Option<()> {
    // Twenty bytes at once, because the verifier learns nothing from a check of the first alone.
    let words = bytes.words::<5>(0)?;
    match words[0].to_ne_bytes()[0] {
        0x45 => {
            let total = v4_header(bytes.len(), words, packet).ok()?;
            if packet.part == Part::Later {
                return None;
            }
            transport(bytes, 20, total, false, packet).ok()?;
        }
        0x60..=0x6f => {
            let total = v6_header(bytes, packet).ok()?;
            if is_extension(packet.tuple.protocol) {
                return None;
            }
            transport(bytes, 40, total, true, packet).ok()?;
        }
        _ => return None,
    }
    (packet.tuple.what != What::Error).then_some(())
}

/// Reads any packet; the result is that of [`parse`].
#[inline(always)]
pub fn general<B: Bytes>(bytes: &B, packet: &mut Packet) -> Verdict {
    let Some(words) = bytes.words::<5>(0) else {
        return Verdict::deny(Reason::Truncated);
    };
    let first = words[0].to_ne_bytes()[0];
    let v6 = match first >> 4 {
        4 => false,
        6 => true,
        _ => return Verdict::deny(Reason::IpVersion),
    };
    let read = if v6 {
        v6_header(bytes, packet)
    } else {
        v4_header(bytes.len(), words, packet)
    };
    let total = match read {
        Ok(total) => total,
        Err(reason) => return Verdict::deny(reason),
    };
    let mut header = u32::from(first & 0x0f) * 4;
    if v6 {
        header = 40;
        let walked = extensions(bytes, total, packet, &mut header);
        if !walked.passes() {
            return walked;
        }
    }
    if packet.part == Part::Later {
        packet.tuple.what = What::LaterFragment;
        return Verdict::accept(Accepted::New);
    }
    if let Err(reason) = transport(bytes, header, total, v6, packet) {
        return Verdict::deny(reason);
    }
    if packet.tuple.what == What::Error {
        let whole = packet.part == Part::Whole;
        if !whole || embedded(bytes, header + 8, total, v6, &mut packet.inner).is_none() {
            packet.inner.what = What::Error;
        }
    }
    Verdict::accept(Accepted::New)
}

/// The packet as far as its IPv4 header tells, and its total length.
#[inline(always)]
fn v4_header(len: u32, words: [u32; 5], packet: &mut Packet) -> Result<u32, Reason> {
    let [first, second, third, src, dst] = words;
    let header = u32::from(first.to_ne_bytes()[0] & 0x0f) * 4;
    let total = u32::from_be(first) & 0xffff;
    if header < 20 || total < header {
        return Err(Reason::IpHeader);
    }
    if total > len {
        return Err(Reason::Truncated);
    }
    let protocol = third.to_ne_bytes()[1];
    let second = u32::from_be(second);
    let offset = (second & 0x1fff) * 8;
    let more = second & 0x2000 != 0;
    let (src, dst) = (Addr::from_v4_word(src), Addr::from_v4_word(dst));
    bare(&mut packet.tuple, src, dst, protocol);
    packet.tcp_flags = 0;
    packet.fragment_protocol = protocol;
    packet.part = part(offset, more);
    packet.fragment_id = second >> 16;
    packet.fragment_offset = offset as u16;
    Ok(total)
}

/// The packet as far as its IPv6 header tells, and its total length.
#[inline(always)]
fn v6_header<B: Bytes>(bytes: &B, packet: &mut Packet) -> Result<u32, Reason> {
    let Some([_, second, s0, s1, s2, s3, d0, d1, d2, d3]) = bytes.words::<10>(0) else {
        return Err(Reason::Truncated);
    };
    let (src, dst) = (
        Addr {
            words: [s0, s1, s2, s3],
        },
        Addr {
            words: [d0, d1, d2, d3],
        },
    );
    // `::`, `::1`, and every form in which an IPv4 address is embedded at the end.
    if src.words[0] | src.words[1] == 0 || dst.words[0] | dst.words[1] == 0 {
        return Err(Reason::Martian);
    }
    let total = (u32::from_be(second) >> 16) + 40;
    if total > bytes.len() {
        return Err(Reason::Truncated);
    }
    let next = second.to_ne_bytes()[2];
    bare(&mut packet.tuple, src, dst, next);
    packet.tcp_flags = 0;
    packet.part = Part::Whole;
    packet.fragment_protocol = next;
    packet.fragment_id = 0;
    packet.fragment_offset = 0;
    Ok(total)
}

/// Field by field into its place: built apart, it would not fit the stack.
#[inline(always)]
fn bare(tuple: &mut Tuple, src: Addr, dst: Addr, protocol: u8) {
    tuple.src = src;
    tuple.dst = dst;
    tuple.src_port = 0;
    tuple.dst_port = 0;
    tuple.protocol = protocol;
    tuple.what = What::Datagram;
}

#[inline(always)]
fn part(offset: u32, more: bool) -> Part {
    if offset != 0 {
        Part::Later
    } else if more {
        Part::First
    } else {
        Part::Whole
    }
}

/// Next-header values that are no upper-layer protocol.
#[inline(always)]
pub(crate) fn is_extension(next: u8) -> bool {
    matches!(
        next,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::NO_NEXT
            | protocol::DESTINATION
            | protocol::MOBILITY
            | protocol::HIP
            | protocol::SHIM6
    )
}

/// Walks extension headers from `offset`, which it leaves where the upper-layer header begins, and
/// notes the protocol and what a fragment header says.
#[inline(never)]
fn extensions<B: Bytes>(bytes: &B, total: u32, packet: &mut Packet, offset: &mut u32) -> Verdict {
    let mut next = packet.tuple.protocol;
    let mut at = *offset;
    let mut position = 0;
    let mut fragmented = false;
    while is_extension(next) {
        if position == MAX_EXTENSIONS {
            return Verdict::deny(Reason::ExtensionHeader);
        }
        if at + 8 > total {
            return Verdict::deny(Reason::Truncated);
        }
        let Some([word, id]) = bytes.words::<2>(at) else {
            return Verdict::deny(Reason::Truncated);
        };
        let [after, length, third, fourth] = word.to_ne_bytes();
        let allowed = match next {
            // RFC 8200 4.1: only directly after the IPv6 header.
            protocol::HOP_BY_HOP => position == 0,
            protocol::DESTINATION => true,
            // No segments left.
            protocol::ROUTING => fourth == 0,
            protocol::FRAGMENT => !fragmented,
            _ => false,
        };
        if !allowed {
            return Verdict::deny(Reason::ExtensionHeader);
        }
        if next == protocol::FRAGMENT {
            fragmented = true;
            let field = u16::from_be_bytes([third, fourth]);
            packet.fragment_id = id;
            packet.fragment_protocol = after;
            packet.fragment_offset = field & 0xfff8;
            packet.part = part(u32::from(field & 0xfff8), field & 1 != 0);
            at += 8;
        } else {
            at += (u32::from(length) + 1) * 8;
        }
        next = after;
        position += 1;
        if packet.part == Part::Later {
            // What follows is not a header.
            break;
        }
    }
    packet.tuple.protocol = next;
    *offset = at;
    Verdict::accept(Accepted::New)
}

/// Bytes of the transport header that decide, which a first fragment must carry and a later one
/// must not reach.
#[inline(always)]
#[must_use]
pub fn deciding_bytes(protocol: u8) -> u32 {
    match protocol {
        protocol::TCP => 20,
        protocol::SCTP => 16,
        protocol::UDP | protocol::ICMP | protocol::ICMPV6 => 8,
        _ => 0,
    }
}

/// Reads ports, flags and types at `offset`.
#[inline(always)]
fn transport<B: Bytes>(
    bytes: &B,
    offset: u32,
    total: u32,
    v6: bool,
    packet: &mut Packet,
) -> Result<(), Reason> {
    let protocol = packet.tuple.protocol;
    if offset + deciding_bytes(protocol) > total {
        return Err(if packet.part == Part::First {
            Reason::FragmentTiny
        } else {
            Reason::Truncated
        });
    }
    let (ports, what) = match protocol {
        protocol::TCP => {
            let [ports, _, _, word] = bytes.words::<4>(offset).ok_or(Reason::Truncated)?;
            packet.tcp_flags = word.to_ne_bytes()[1];
            (ports, What::Segment)
        }
        protocol::UDP => {
            let [ports] = bytes.words::<1>(offset).ok_or(Reason::Truncated)?;
            (ports, What::Datagram)
        }
        protocol::SCTP => {
            let [ports, _, _, word] = bytes.words::<4>(offset).ok_or(Reason::Truncated)?;
            let init = word.to_ne_bytes()[0] == 1;
            (
                ports,
                if init {
                    What::SctpInit
                } else {
                    What::SctpOther
                },
            )
        }
        protocol::ICMP | protocol::ICMPV6 if (protocol == protocol::ICMPV6) == v6 => {
            let [kind, id] = bytes.words::<2>(offset).ok_or(Reason::Truncated)?;
            packet.tuple.what = icmp_what(kind.to_ne_bytes()[0], v6);
            if matches!(packet.tuple.what, What::Request | What::Reply) {
                packet.tuple.src_port = (u32::from_be(id) >> 16) as u16;
            }
            return Ok(());
        }
        _ => return Ok(()),
    };
    let ports = u32::from_be(ports);
    packet.tuple.src_port = (ports >> 16) as u16;
    packet.tuple.dst_port = ports as u16;
    packet.tuple.what = what;
    Ok(())
}

/// RFC 792, RFC 4443. Redirects, router and neighbour discovery have no place in a tunnel.
#[inline(always)]
fn icmp_what(kind: u8, v6: bool) -> What {
    match (v6, kind) {
        (false, 8 | 13) | (true, 128) => What::Request,
        (false, 0 | 14) | (true, 129) => What::Reply,
        (false, 3 | 11 | 12) | (true, 1..=4) => What::Error,
        _ => What::OtherIcmp,
    }
}

/// The packet that an ICMP error embeds, into `tuple`; `None` if it cannot be read. Only its first
/// eight transport bytes are promised (RFC 792).
#[inline(always)]
fn embedded<B: Bytes>(
    bytes: &B,
    offset: u32,
    total: u32,
    v6: bool,
    tuple: &mut Tuple,
) -> Option<()> {
    let mut header = 40;
    if v6 {
        let [first, second, s0, s1, s2, s3, d0, d1, d2, d3] = bytes.words::<10>(offset)?;
        if first.to_ne_bytes()[0] >> 4 != 6 {
            return None;
        }
        let src = [s0, s1, s2, s3];
        let dst = [d0, d1, d2, d3];
        let protocol = second.to_ne_bytes()[2];
        bare(tuple, Addr { words: src }, Addr { words: dst }, protocol);
        let walked = extensions_within(bytes, offset + 40, total, &mut tuple.protocol);
        if walked == UNREADABLE {
            return None;
        }
        header += walked;
    } else {
        let [first, second, third, src, dst] = bytes.words::<5>(offset)?;
        let first = first.to_ne_bytes()[0];
        let later = u32::from_be(second) & 0x1fff != 0;
        header = u32::from(first & 0x0f) * 4;
        if first >> 4 != 4 || header < 20 || later {
            return None;
        }
        let protocol = third.to_ne_bytes()[1];
        let (src, dst) = (Addr::from_v4_word(src), Addr::from_v4_word(dst));
        bare(tuple, src, dst, protocol);
    }
    if offset + header + 8 > total {
        return None;
    }
    let [start, next] = bytes.words::<2>(offset + header)?;
    let start = u32::from_be(start);
    match tuple.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            tuple.src_port = (start >> 16) as u16;
            tuple.dst_port = start as u16;
        }
        protocol::ICMP | protocol::ICMPV6 if (tuple.protocol == protocol::ICMPV6) == v6 => {
            tuple.what = icmp_what((start >> 24) as u8, v6);
            tuple.src_port = (u32::from_be(next) >> 16) as u16;
        }
        _ => {}
    }
    Some(())
}

/// No length of headers that can be read.
const UNREADABLE: u32 = u32::MAX;

/// Bytes of extension headers at `offset` of an embedded packet, whose first is `next`; leaves the
/// upper-layer protocol there. [`UNREADABLE`] for headers that are unknown, out of place or too many,
/// and for a later fragment: BPF functions return one register, and an option may need two.
#[inline(always)]
fn extensions_within<B: Bytes>(bytes: &B, offset: u32, total: u32, next: &mut u8) -> u32 {
    let mut length = 0;
    let mut position = 0;
    while is_extension(*next) {
        if position == MAX_EXTENSIONS || offset + length + 8 > total {
            return UNREADABLE;
        }
        let Some([word]) = bytes.words::<1>(offset + length) else {
            return UNREADABLE;
        };
        let [after, units, third, fourth] = word.to_ne_bytes();
        length += match *next {
            protocol::HOP_BY_HOP if position == 0 => (u32::from(units) + 1) * 8,
            protocol::DESTINATION => (u32::from(units) + 1) * 8,
            protocol::ROUTING if fourth == 0 => (u32::from(units) + 1) * 8,
            protocol::FRAGMENT if u16::from_be_bytes([third, fourth]) & 0xfff8 == 0 => 8,
            _ => return UNREADABLE,
        };
        *next = after;
        position += 1;
    }
    length
}
