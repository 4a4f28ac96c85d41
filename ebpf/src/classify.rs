//! What a UDP datagram on WireGuard's port is, told by its length and its first eight bytes.
//!
//! ```text
//!  0   1   2   3   4   5   6   7
//! ┌───┬───────────┬───────────────┐
//! │ 1 │ 0   0   0 │ sender        │  148 bytes          WireGuard: handshake initiation
//! │ 2 │ 0   0   0 │ sender        │   92 bytes          handshake response
//! │ 3 │ 0   0   0 │ receiver      │   64 bytes          cookie reply
//! │ 4 │ 0   0   0 │ receiver      │ ≥ 32 bytes          data
//! ├───┴───────────┴───────┬───────┤
//! │ T   S  f0  9f  92  ac │ key … │ ≥ 62 bytes          discovery
//! ├───────┬───────┬───────┴───────┤
//! │ 00… … │ bytes │ 21  12  a4  42│ ≥ 20 + bytes        STUN
//! └───────┴───────┴───────────────┘
//! ```
//!
//! WireGuard's own words are in drivers/net/wireguard/messages.h, STUN's in RFC 8489 5; discovery is
//! `proto`'s `disco`. A datagram is at most one of them, but for data whose receiver is STUN's
//! cookie, and that is data. Nothing is proved here: a forger knows these words too. What is
//! [`Class::Other`] nobody on this port has a use for.

/// A kind of datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord, Hash))]
#[repr(u8)]
pub enum Class {
    /// The first message of a WireGuard handshake, which costs its receiver two agreements.
    Initiation,
    /// The second.
    Response,
    /// A WireGuard responder under load asks for proof of the address.
    Cookie,
    /// WireGuard data, or its keepalive.
    Data,
    /// Discovery.
    Disco,
    /// STUN.
    Stun,
    /// None of these.
    Other,
}

/// How many first bytes decide.
pub const HEAD_BYTES: u32 = 8;

/// `struct message_handshake_initiation`.
const INITIATION_BYTES: u32 = 148;
/// `struct message_handshake_response`.
const RESPONSE_BYTES: u32 = 92;
/// `struct message_handshake_cookie`.
const COOKIE_BYTES: u32 = 64;
/// `struct message_data` with the tag of an empty packet: a keepalive. Packets are padded to
/// sixteens, but never beyond the device's MTU (`calculate_skb_padding`), so their length says no
/// more.
const MIN_DATA_BYTES: u32 = 32;
/// Magic, sender's key, nonce.
const MIN_DISCO_BYTES: u32 = 6 + 32 + 24;
const STUN_HEADER_BYTES: u32 = 20;

const MAGIC: [u32; 2] = [
    u32::from_ne_bytes([b'T', b'S', 0xf0, 0x9f]),
    u32::from_ne_bytes([0x92, 0xac, 0, 0]),
];
const MAGIC_TAIL: u32 = u32::from_ne_bytes([0xff, 0xff, 0, 0]);
const STUN_COOKIE: u32 = u32::from_ne_bytes([0x21, 0x12, 0xa4, 0x42]);

/// What a datagram of so many bytes is that begins with these eight, four at a time in memory order.
/// One that has fewer is [`Class::Other`], whatever `head` says.
#[inline(always)]
#[must_use]
pub const fn classify(bytes: u32, head: [u32; 2]) -> Class {
    if bytes < HEAD_BYTES {
        return Class::Other;
    }
    // The type and its three reserved bytes are one little-endian word, as WireGuard reads them.
    let class = match (u32::from_le(head[0]), bytes) {
        (1, INITIATION_BYTES) => Class::Initiation,
        (2, RESPONSE_BYTES) => Class::Response,
        (3, COOKIE_BYTES) => Class::Cookie,
        (4, MIN_DATA_BYTES..) => Class::Data,
        _ => Class::Other,
    };
    if !matches!(class, Class::Other) {
        return class;
    }
    if head[0] == MAGIC[0] && head[1] & MAGIC_TAIL == MAGIC[1] && bytes >= MIN_DISCO_BYTES {
        return Class::Disco;
    }
    let [kind, _, high, low] = head[0].to_ne_bytes();
    let length = u16::from_be_bytes([high, low]) as u32;
    let whole = length.is_multiple_of(4) && STUN_HEADER_BYTES + length <= bytes;
    if head[1] == STUN_COOKIE && kind & 0xc0 == 0 && whole {
        return Class::Stun;
    }
    Class::Other
}
