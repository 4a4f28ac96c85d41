//! Packets that no honest host would send: any source, any flags, any protocol.
//!
//! Built by hand and sent over a raw socket with the header included (raw(7), RFC 791, RFC 8200),
//! so that they leave through whatever device the host's routes choose, the WireGuard device too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};

use crate::host::Host;

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// Protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// Protocol number that opens a socket on which whole packets are sent.
pub const WHOLE: u8 = 255;

/// TCP flags by their bit (RFC 9293 3.1).
pub mod flag {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Opens a connection.
    pub const SYN: u8 = 2;
    /// Ends a connection at once.
    pub const RST: u8 = 4;
    /// Deliver now.
    pub const PSH: u8 = 8;
    /// Acknowledges.
    pub const ACK: u8 = 16;
    /// Urgent data.
    pub const URG: u8 = 32;
}

/// A TCP segment without data.
#[must_use]
pub fn tcp(src: (IpAddr, u16), dst: (IpAddr, u16), flags: u8) -> Vec<u8> {
    let mut segment = vec![0; 20];
    segment[..2].copy_from_slice(&src.1.to_be_bytes());
    segment[2..4].copy_from_slice(&dst.1.to_be_bytes());
    segment[4..8].copy_from_slice(&1u32.to_be_bytes());
    segment[12] = 5 << 4;
    segment[13] = flags;
    segment[14..16].copy_from_slice(&1024u16.to_be_bytes());
    checksummed(src.0, dst.0, TCP, segment, 16)
}

/// A UDP datagram.
#[must_use]
pub fn udp(src: (IpAddr, u16), dst: (IpAddr, u16), data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap_or(u16::MAX);
    let mut datagram = Vec::with_capacity(8 + data.len());
    for field in [src.1, dst.1, length, 0] {
        datagram.extend(field.to_be_bytes());
    }
    datagram.extend(data);
    checksummed(src.0, dst.0, UDP, datagram, 6)
}

/// A packet of any protocol, whose payload is sent as it is.
#[must_use]
pub fn ip(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ipv4(src, dst, protocol, payload, (0, 0)),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ipv6(src, dst, protocol, payload),
        _ => panic!("a packet has addresses of one family"),
    }
}

/// An IPv4 packet; `fragment` is its identification and the field of flags and offset.
#[must_use]
pub fn ipv4(
    src: Ipv4Addr,
    dst: Ipv4Addr,
    protocol: u8,
    payload: &[u8],
    fragment: (u16, u16),
) -> Vec<u8> {
    let total = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX);
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend(fragment.0.to_be_bytes());
    packet.extend(fragment.1.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(src.octets());
    packet.extend(dst.octets());
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

/// An IPv6 packet; `next` is the first next-header, extension headers stand in `payload`.
#[must_use]
pub fn ipv6(src: Ipv6Addr, dst: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(src.octets());
    packet.extend(dst.octets());
    packet.extend(payload);
    packet
}

/// Sends a whole packet from a host, wherever its routes lead. `false` if the host's own side
/// refused it.
///
/// # Errors
/// If no raw socket can be had.
pub fn send(host: &Host, dst: IpAddr, packet: &[u8]) -> anyhow::Result<bool> {
    let socket = host.enter(|| raw_socket(dst, WHOLE))?;
    Ok(socket.send_to(packet, (dst, 0)).is_ok())
}

/// A raw socket of a protocol in the family of `addr`. (std knows no raw sockets; what its UDP
/// socket does with a descriptor is send, receive and wait, which is all that is needed.)
///
/// # Errors
/// If we are not root.
pub fn raw_socket(addr: IpAddr, number: u8) -> anyhow::Result<UdpSocket> {
    let number = std::num::NonZeroU32::new(u32::from(number));
    let protocol = number.map(Protocol::from_raw);
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family(addr), SocketType::RAW, flags, protocol)?;
    Ok(UdpSocket::from(socket))
}

/// The address family of an address.
#[must_use]
pub fn family(addr: IpAddr) -> AddressFamily {
    if addr.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    }
}

/// The unspecified address of the same family.
#[must_use]
pub fn unspecified(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// An ICMP or ICMPv6 echo request, for a raw socket of that protocol. The kernel fills in the
/// checksum of ICMPv6 (RFC 3542 3.1).
#[must_use]
pub fn echo_request(dst: IpAddr, id: u16, sequence: u16, data: &[u8]) -> Vec<u8> {
    let mut message = vec![if dst.is_ipv4() { 8 } else { 128 }, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend(data);
    if dst.is_ipv4() {
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// Whether what a raw socket received is the reply to an echo request with that id.
#[must_use]
pub fn is_echo_reply(received: &[u8], peer: IpAddr, id: u16) -> bool {
    let message = payload(received, peer);
    let reply = if peer.is_ipv4() { 0 } else { 129 };
    message.len() >= 8 && message[0] == reply && message[4..6] == id.to_be_bytes()
}

/// What follows the IP header in what a raw socket received: IPv4 sockets show the header, IPv6
/// sockets do not.
#[must_use]
pub fn payload(received: &[u8], peer: IpAddr) -> &[u8] {
    let header = match received.first() {
        Some(first) if peer.is_ipv4() => usize::from(first & 15) * 4,
        _ => 0,
    };
    received.get(header..).unwrap_or_default()
}

/// Puts the checksum with its pseudo header (RFC 9293 3.1, RFC 8200 8.1) at `offset`, and the IP
/// header in front.
fn checksummed(
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    mut segment: Vec<u8>,
    offset: usize,
) -> Vec<u8> {
    let mut pseudo = Vec::new();
    for addr in [src, dst] {
        match addr {
            IpAddr::V4(addr) => pseudo.extend(addr.octets()),
            IpAddr::V6(addr) => pseudo.extend(addr.octets()),
        }
    }
    // The order and width of these two differ between the families; their sum does not.
    pseudo.extend([0, protocol]);
    pseudo.extend(
        u16::try_from(segment.len())
            .unwrap_or(u16::MAX)
            .to_be_bytes(),
    );
    let sum = checksum(&[&pseudo, &segment]);
    segment[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
    ip(src, dst, protocol, &segment)
}

/// Whether the checksum of an IPv4 packet's ICMP message or TCP segment is right.
#[must_use]
pub fn is_whole(packet: &[u8]) -> bool {
    let (header, body) = packet.split_at(packet.len().min(20));
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes();
    match header.get(9) {
        Some(&ICMP) => checksum(&[body]) == 0,
        Some(&TCP) => checksum(&[&header[12..], &[0, TCP], &length, body]) == 0,
        _ => false,
    }
}

/// The Internet checksum (RFC 1071) of parts of which all but the last have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| low.into());
    let mut sum: u32 = words.map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_rfc_1071() {
        // The example of RFC 1071 3: the sum is 0xddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&[&bytes]), !0xddf2);
        assert_eq!(checksum(&[&bytes[..4], &bytes[4..]]), !0xddf2);
    }
}
