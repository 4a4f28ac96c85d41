//! What a packet says, by another parser: the crate `etherparse`.
//!
//! It reads headers, and we ask it for every field that it has. What it does not decide, because
//! it is a choice of the packet filter's, stands here as a rule, in words and by its own code:
//!
//! - IPv6: an address with 64 zero bits at its start never comes from a network;
//! - at most six extension headers; hop-by-hop options only first; no routing header that has
//!   segments left; one fragment header; none, mobility, HIP and shim6 are refused;
//! - AH is a protocol, and not walked over; what follows a later fragment is not looked at;
//! - the header that decides must be there whole: 20 bytes of TCP, 16 of SCTP, 8 of UDP and ICMP;
//! - a TCP header's own length and an ICMP message's code decide nothing;
//! - of an embedded packet, the addresses, the protocol and eight bytes more must be there.
//!
//! SCTP is the one protocol that etherparse does not know: its ports and first chunk are read here.

use ebpf::packet::{Packet, Part, What};
use ebpf::reason::Reason;
use etherparse::{
    Icmpv4Slice, Icmpv4Type, Icmpv6Slice, Icmpv6Type, IpNumber, Ipv4HeaderSlice,
    Ipv6ExtensionsSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice, Ipv6RawExtHeaderSlice,
    TcpHeaderSlice, UdpHeader, err,
};
use std::net::IpAddr;

/// An embedded packet: addresses, protocol, kind and ports.
type Embedded = (IpAddr, IpAddr, u8, What, (u16, u16));

/// What both parsers can say of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub protocol: u8,
    pub what: What,
    pub ports: (u16, u16),
    pub tcp_flags: u8,
    pub part: Part,
    /// Of a fragment: identification, and where it begins, in bytes.
    pub fragment: (u32, u16),
    /// What an ICMP error embeds.
    pub inner: Option<Embedded>,
}

/// What our parser says, in the same words.
pub fn ours(packet: &Packet, v6: bool) -> Seen {
    let tuple = &packet.tuple;
    let fragment = match packet.part {
        Part::Whole => (0, 0),
        Part::First | Part::Later if v6 => {
            (u32::from_be(packet.fragment_id), packet.fragment_offset)
        }
        Part::First | Part::Later => (packet.fragment_id, packet.fragment_offset),
    };
    let inner = &packet.inner;
    let readable = tuple.what == What::Error && inner.what != What::Error;
    Seen {
        src: tuple.src.into(),
        dst: tuple.dst.into(),
        protocol: tuple.protocol,
        what: tuple.what,
        ports: (tuple.src_port, tuple.dst_port),
        tcp_flags: packet.tcp_flags,
        part: packet.part,
        fragment,
        inner: readable.then(|| {
            let ports = (inner.src_port, inner.dst_port);
            let (src, dst) = (inner.src.into(), inner.dst.into());
            (src, dst, inner.protocol, inner.what, ports)
        }),
    }
}

/// The packet, or why it is refused.
pub fn read(bytes: &[u8]) -> Result<Seen, Reason> {
    if bytes.len() < 20 {
        return Err(Reason::Truncated);
    }
    match bytes[0] >> 4 {
        4 => read_v4(bytes),
        6 => read_v6(bytes),
        _ => Err(Reason::IpVersion),
    }
}

fn read_v4(bytes: &[u8]) -> Result<Seen, Reason> {
    let total = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
    let header = match Ipv4HeaderSlice::from_slice(bytes) {
        Ok(header) => header,
        Err(err::ipv4::HeaderSliceError::Content(_)) => return Err(Reason::IpHeader),
        // The header alone is longer than the bytes: which of the lengths lies is a matter of order.
        Err(err::ipv4::HeaderSliceError::Len(_)) => {
            let length = usize::from(bytes[0] & 0x0f) * 4;
            return Err(if total < length {
                Reason::IpHeader
            } else {
                Reason::Truncated
            });
        }
    };
    if header.payload_len().is_err() {
        return Err(Reason::IpHeader);
    }
    if total > bytes.len() {
        return Err(Reason::Truncated);
    }
    let offset = header.fragments_offset().byte_offset();
    let mut seen = Seen {
        src: header.source_addr().into(),
        dst: header.destination_addr().into(),
        protocol: header.protocol().0,
        what: What::LaterFragment,
        ports: (0, 0),
        tcp_flags: 0,
        part: part(offset, header.more_fragments()),
        fragment: (0, 0),
        inner: None,
    };
    assert_eq!(seen.part != Part::Whole, header.is_fragmenting_payload());
    if seen.part != Part::Whole {
        seen.fragment = (u32::from(header.identification()), offset);
    }
    transport(&bytes[header.slice().len()..total], seen)
}

fn read_v6(bytes: &[u8]) -> Result<Seen, Reason> {
    let Ok(header) = Ipv6HeaderSlice::from_slice(bytes) else {
        return Err(Reason::Truncated);
    };
    if header.source()[..8] == [0; 8] || header.destination()[..8] == [0; 8] {
        return Err(Reason::Martian);
    }
    let total = 40 + usize::from(header.payload_length());
    if total > bytes.len() {
        return Err(Reason::Truncated);
    }
    let walked = walk(header.next_header(), &bytes[40..total])?;
    let seen = Seen {
        src: header.source_addr().into(),
        dst: header.destination_addr().into(),
        protocol: walked.protocol,
        what: What::LaterFragment,
        ports: (0, 0),
        tcp_flags: 0,
        part: walked.part,
        fragment: walked.fragment,
        inner: None,
    };
    transport(walked.rest, seen)
}

/// Where a chain of extension headers leads.
struct Walked<'a> {
    protocol: u8,
    part: Part,
    fragment: (u32, u16),
    rest: &'a [u8],
}

fn walk(first: IpNumber, bytes: &[u8]) -> Result<Walked<'_>, Reason> {
    let mut walked = Walked {
        protocol: first.0,
        part: Part::Whole,
        fragment: (0, 0),
        rest: bytes,
    };
    let mut fragmented = false;
    let mut position = 0;
    while is_extension(walked.protocol) {
        if position == 6 {
            return Err(Reason::ExtensionHeader);
        }
        if walked.rest.len() < 8 {
            return Err(Reason::Truncated);
        }
        match walked.protocol {
            44 if !fragmented => {
                fragmented = true;
                let header = Ipv6FragmentHeaderSlice::from_slice(walked.rest).unwrap();
                let offset = header.fragment_offset().byte_offset();
                walked.part = part(offset, header.more_fragments());
                assert_eq!(walked.part != Part::Whole, header.is_fragmenting_payload());
                if walked.part != Part::Whole {
                    walked.fragment = (header.identification(), offset);
                }
                walked.protocol = header.next_header().0;
                walked.rest = &walked.rest[header.slice().len()..];
                if walked.part == Part::Later {
                    return Ok(walked);
                }
            }
            number if is_walked(number, position, walked.rest) => {
                let Ok(header) = Ipv6RawExtHeaderSlice::from_slice(walked.rest) else {
                    return Err(beyond(&walked, position));
                };
                walked.protocol = header.next_header().0;
                walked.rest = &walked.rest[header.slice().len()..];
            }
            _ => return Err(Reason::ExtensionHeader),
        }
        position += 1;
    }
    // The chain as a whole, where etherparse's end is ours too.
    if walked.protocol != 51 {
        let (_, next, rest) = Ipv6ExtensionsSlice::from_slice(first, bytes).unwrap();
        assert_eq!((walked.protocol, walked.rest), (next.0, rest));
    }
    Ok(walked)
}

/// Whether a header of options or routing is one that the filter walks over.
fn is_walked(number: u8, position: usize, header: &[u8]) -> bool {
    match number {
        0 => position == 0,
        43 => header[3] == 0,
        _ => number == 60,
    }
}

/// What is wrong with a header that says that it is longer than the packet: it says what follows,
/// too, though that lies beyond the end: a seventh header, or an upper layer.
fn beyond(walked: &Walked<'_>, position: usize) -> Reason {
    match (is_extension(walked.rest[0]), walked.part) {
        (true, _) if position == 5 => Reason::ExtensionHeader,
        (false, Part::First) => Reason::FragmentTiny,
        _ => Reason::Truncated,
    }
}

/// What comes before an upper layer (IANA "IPv6 Extension Header Types", without AH and ESP).
fn is_extension(number: u8) -> bool {
    matches!(number, 0 | 43 | 44 | 59 | 60 | 135 | 139 | 140)
}

fn part(offset: u16, more: bool) -> Part {
    match (offset, more) {
        (0, false) => Part::Whole,
        (0, true) => Part::First,
        _ => Part::Later,
    }
}

/// Reads the upper layer from `rest`.
fn transport(rest: &[u8], mut seen: Seen) -> Result<Seen, Reason> {
    if seen.part == Part::Later {
        return Ok(seen);
    }
    let v6 = seen.src.is_ipv6();
    let deciding = match seen.protocol {
        6 => 20,
        132 => 16,
        1 | 17 | 58 => 8,
        _ => 0,
    };
    if rest.len() < deciding {
        return Err(if seen.part == Part::First {
            Reason::FragmentTiny
        } else {
            Reason::Truncated
        });
    }
    seen.what = What::Datagram;
    match seen.protocol {
        6 => {
            let mut header: [u8; 20] = rest[..20].try_into().unwrap();
            header[12] = 0x50;
            let header = TcpHeaderSlice::from_slice(&header).unwrap();
            seen.what = What::Segment;
            seen.ports = (header.source_port(), header.destination_port());
            let flags = [
                header.fin(),
                header.syn(),
                header.rst(),
                header.psh(),
                header.ack(),
                header.urg(),
                header.ece(),
                header.cwr(),
            ];
            let bits = flags.iter().enumerate();
            seen.tcp_flags = bits.map(|(bit, set)| u8::from(*set) << bit).sum();
        }
        17 => {
            let (header, _) = UdpHeader::from_slice(rest).unwrap();
            seen.ports = (header.source_port, header.destination_port);
        }
        132 => {
            seen.ports = two_numbers(rest);
            seen.what = if rest[12] == 1 {
                What::SctpInit
            } else {
                What::SctpOther
            };
        }
        1 if !v6 => (seen.what, seen.ports) = icmp_v4(rest),
        58 if v6 => (seen.what, seen.ports) = icmp_v6(rest),
        _ => {}
    }
    if seen.what == What::Error && seen.part == Part::Whole {
        seen.inner = embedded(&rest[8..], v6);
    }
    Ok(seen)
}

fn two_numbers(bytes: &[u8]) -> (u16, u16) {
    let number = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    (number(0), number(2))
}

fn icmp_v4(rest: &[u8]) -> (What, (u16, u16)) {
    // As long as a timestamp must be, and of code 0.
    let mut message = [0; 20];
    message[..8].copy_from_slice(&rest[..8]);
    message[1] = 0;
    let timestamp = matches!(rest[0], 13 | 14);
    let message = if timestamp {
        &message[..]
    } else {
        &message[..8]
    };
    match Icmpv4Slice::from_slice(message).unwrap().icmp_type() {
        Icmpv4Type::EchoRequest(echo) => (What::Request, (echo.id, 0)),
        Icmpv4Type::EchoReply(echo) => (What::Reply, (echo.id, 0)),
        Icmpv4Type::TimestampRequest(times) => (What::Request, (times.id, 0)),
        Icmpv4Type::TimestampReply(times) => (What::Reply, (times.id, 0)),
        Icmpv4Type::DestinationUnreachable(_)
        | Icmpv4Type::TimeExceeded(_)
        | Icmpv4Type::ParameterProblem(_) => (What::Error, (0, 0)),
        Icmpv4Type::Unknown { .. } | Icmpv4Type::Redirect(_) => (What::OtherIcmp, (0, 0)),
    }
}

fn icmp_v6(rest: &[u8]) -> (What, (u16, u16)) {
    let mut message: [u8; 8] = rest[..8].try_into().unwrap();
    message[1] = 0;
    match Icmpv6Slice::from_slice(&message).unwrap().icmp_type() {
        Icmpv6Type::EchoRequest(echo) => (What::Request, (echo.id, 0)),
        Icmpv6Type::EchoReply(echo) => (What::Reply, (echo.id, 0)),
        Icmpv6Type::DestinationUnreachable(_)
        | Icmpv6Type::PacketTooBig { .. }
        | Icmpv6Type::TimeExceeded(_)
        | Icmpv6Type::ParameterProblem(_) => (What::Error, (0, 0)),
        _ => (What::OtherIcmp, (0, 0)),
    }
}

fn embedded(bytes: &[u8], v6: bool) -> Option<Embedded> {
    let (src, dst, protocol, rest): (IpAddr, IpAddr, _, _) = if v6 {
        let header = Ipv6HeaderSlice::from_slice(bytes).ok()?;
        let walked = walk_within(header.next_header(), &bytes[40..])?;
        let (src, dst) = (header.source_addr(), header.destination_addr());
        (src.into(), dst.into(), walked.0, walked.1)
    } else {
        let header = Ipv4HeaderSlice::from_slice(bytes).ok()?;
        if header.fragments_offset().value() != 0 {
            return None;
        }
        let (src, dst) = (header.source_addr(), header.destination_addr());
        let rest = &bytes[header.slice().len()..];
        (src.into(), dst.into(), header.protocol().0, rest)
    };
    let start: [u8; 8] = rest.get(..8)?.try_into().ok()?;
    let (what, ports) = match protocol {
        6 | 17 | 132 => (What::Datagram, two_numbers(&start)),
        1 if !v6 => named(icmp_v4(&start), &start),
        58 if v6 => named(icmp_v6(&start), &start),
        _ => (What::Datagram, (0, 0)),
    };
    // An error about an error names no flow.
    (what != What::Error).then_some((src, dst, protocol, what, ports))
}

/// An embedded ICMP message is named by what stands where a question has its identifier.
fn named((what, _): (What, (u16, u16)), start: &[u8; 8]) -> (What, (u16, u16)) {
    (what, (u16::from_be_bytes([start[4], start[5]]), 0))
}

/// The same walk in an embedded packet, in which fragment headers may be several.
fn walk_within(first: IpNumber, bytes: &[u8]) -> Option<(u8, &[u8])> {
    let (mut next, mut rest) = (first.0, bytes);
    for position in 0..6 {
        if !is_extension(next) {
            break;
        }
        let start = rest.get(..8)?;
        let (after, length) = match next {
            44 => {
                let header = Ipv6FragmentHeaderSlice::from_slice(rest).ok()?;
                if header.fragment_offset().value() != 0 {
                    return None;
                }
                (header.next_header(), header.slice().len())
            }
            number if is_walked(number, position, start) => {
                let header = Ipv6RawExtHeaderSlice::from_slice(rest).ok()?;
                (header.next_header(), header.slice().len())
            }
            _ => return None,
        };
        next = after.0;
        rest = &rest[length..];
    }
    (!is_extension(next)).then_some((next, rest))
}
