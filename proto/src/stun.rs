//! STUN, as far as a node needs it to learn its own address: binding requests and their answers
//! (RFC 8489).
//!
//! ```text
//!  0               2               4               8                              20
//! ┌───────────────┬───────────────┬───────────────┬──────────────────────────────┬─────────────
//! │ type          │ length        │ 2112A442      │ transaction, 12 bytes        │ attributes …
//! └───────────────┴───────────────┴───────────────┴──────────────────────────────┴─────────────
//! ```
//!
//! No credentials, no errors, no other methods. What is not a request is not answered at all, and
//! an answer has 44 bytes at most where known clients ask with 40, so that nobody can be flooded by
//! it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Length of a header.
pub const HEADER_BYTES: usize = 20;
/// Length of a transaction id.
pub const TRANSACTION_BYTES: usize = 12;
/// Longest message that is looked at: what fits the smallest IPv6 packet.
pub const MAX_BYTES: usize = 1232;

const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const BINDING_REQUEST: u16 = 0x0001;
const BINDING_SUCCESS: u16 = 0x0101;
const MAPPED_ADDRESS: u16 = 0x0001;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
/// Attributes from here on may be ignored when unknown (RFC 8489 14).
const OPTIONAL: u16 = 0x8000;
const SOFTWARE: u16 = 0x8022;
const FINGERPRINT: u16 = 0x8028;
/// RFC 8489 14.7: "the ASCII string 'STUN'", so that CRCs of other protocols differ.
const FINGERPRINT_XOR: u32 = 0x5354_554e;
/// Bytes of a FINGERPRINT attribute.
const FINGERPRINT_BYTES: usize = 8;
/// The name by which widespread servers know the clients that they answer; others ignore it.
const SOFTWARE_NAME: &[u8; 8] = b"tailnode";

/// What an answer is matched to its request by.
pub type Transaction = [u8; TRANSACTION_BYTES];

/// Why a datagram is not what it was read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum StunError {
    /// Not STUN at all.
    #[error("this is no STUN message")]
    NotStun,
    /// Another method, or an answer where a question was expected.
    #[error("a STUN message of another kind")]
    Kind,
    /// Attributes that do not add up.
    #[error("a STUN message with broken attributes")]
    Malformed,
    /// The checksum is wrong.
    #[error("a STUN message with a wrong fingerprint")]
    Fingerprint,
    /// It demands that an attribute be understood that is not.
    #[error("a STUN message with an attribute that must be understood and is not")]
    Unknown,
    /// An answer without an address.
    #[error("a STUN answer without an address")]
    NoAddress,
}

/// Whether a datagram may be STUN, by its first bytes: neither WireGuard nor disco looks so.
#[must_use]
pub fn is_stun(datagram: &[u8]) -> bool {
    datagram.len() >= HEADER_BYTES
        && datagram.first().is_some_and(|byte| byte & 0xc0 == 0)
        && datagram.get(4..8) == Some(&MAGIC_COOKIE)
}

/// A binding request.
#[must_use]
pub fn request(transaction: Transaction) -> Vec<u8> {
    let length = 4 + SOFTWARE_NAME.len() + FINGERPRINT_BYTES;
    let mut out = header(BINDING_REQUEST, length, transaction);
    attribute(SOFTWARE, SOFTWARE_NAME, &mut out);
    let crc = fingerprint(&out);
    attribute(FINGERPRINT, &crc.to_be_bytes(), &mut out);
    out
}

/// The transaction of a binding request.
///
/// # Errors
/// If the datagram is not one, or demands more than is understood here.
pub fn parse_request(datagram: &[u8]) -> Result<Transaction, StunError> {
    let message = Message::parse(datagram, BINDING_REQUEST)?;
    for (kind, _) in message.attributes() {
        if kind < OPTIONAL {
            return Err(StunError::Unknown);
        }
    }
    Ok(message.transaction)
}

/// The answer to a request that came from `addr`.
#[must_use]
pub fn response(transaction: Transaction, addr: SocketAddr) -> Vec<u8> {
    let key = xor_key(transaction);
    let (family, ip) = match addr.ip().to_canonical() {
        IpAddr::V4(v4) => (1, v4.octets().to_vec()),
        IpAddr::V6(v6) => (2, v6.octets().to_vec()),
    };
    let port = addr.port().to_be_bytes();
    let mut value = vec![0, family];
    value.extend(port.iter().zip(key).map(|(byte, key)| byte ^ key));
    value.extend(ip.iter().zip(key).map(|(byte, key)| byte ^ key));
    let mut out = header(BINDING_SUCCESS, 4 + value.len(), transaction);
    attribute(XOR_MAPPED_ADDRESS, &value, &mut out);
    out
}

/// The transaction of an answer and the address that the server saw.
///
/// # Errors
/// If the datagram is not an answer that holds one.
pub fn parse_response(datagram: &[u8]) -> Result<(Transaction, SocketAddr), StunError> {
    let message = Message::parse(datagram, BINDING_SUCCESS)?;
    let mut mapped = None;
    for (kind, value) in message.attributes() {
        match kind {
            XOR_MAPPED_ADDRESS => {
                let addr = address(value, xor_key(message.transaction));
                return Ok((message.transaction, addr.ok_or(StunError::Malformed)?));
            }
            // Of old servers. Some routers rewrite it in passing, hence second choice.
            MAPPED_ADDRESS => mapped = address(value, [0; 16]),
            _ => {}
        }
    }
    let addr = mapped.ok_or(StunError::NoAddress)?;
    Ok((message.transaction, addr))
}

/// A message whose header and attribute lengths add up.
struct Message<'a> {
    transaction: Transaction,
    attributes: &'a [u8],
}

impl<'a> Message<'a> {
    fn parse(datagram: &'a [u8], kind: u16) -> Result<Self, StunError> {
        if !is_stun(datagram) || datagram.len() > MAX_BYTES {
            return Err(StunError::NotStun);
        }
        let (head, attributes) = datagram
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or(StunError::NotStun)?;
        let [k0, k1, l0, l1, _, _, _, _, transaction @ ..] = *head;
        if usize::from(u16::from_be_bytes([l0, l1])) != attributes.len() {
            return Err(StunError::NotStun);
        }
        if u16::from_be_bytes([k0, k1]) != kind {
            return Err(StunError::Kind);
        }
        let message = Self {
            transaction,
            attributes,
        };
        message.check(datagram)?;
        Ok(message)
    }

    /// Attributes fill the message exactly; a fingerprint is the last one and right.
    fn check(&self, datagram: &[u8]) -> Result<(), StunError> {
        let mut attributes = self.attributes();
        while let Some((kind, value)) = attributes.next() {
            if kind != FINGERPRINT {
                continue;
            }
            let before = datagram.len().saturating_sub(FINGERPRINT_BYTES);
            let covered = datagram.get(..before).unwrap_or_default();
            if !attributes.rest.is_empty() || *value != fingerprint(covered).to_be_bytes() {
                return Err(StunError::Fingerprint);
            }
        }
        if attributes.rest.is_empty() {
            Ok(())
        } else {
            Err(StunError::Malformed)
        }
    }

    fn attributes(&self) -> Attributes<'a> {
        Attributes {
            rest: self.attributes,
        }
    }
}

/// Ends early, with something left, when an attribute is longer than the message.
struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (head, rest) = self.rest.split_first_chunk::<4>()?;
        let [k0, k1, l0, l1] = *head;
        let length = usize::from(u16::from_be_bytes([l0, l1]));
        let value = rest.get(..length)?;
        // RFC 8489 14: "padded to a multiple of 4 bytes".
        let rest = rest.get(length.next_multiple_of(4)..)?;
        self.rest = rest;
        Some((u16::from_be_bytes([k0, k1]), value))
    }
}

fn header(kind: u16, length: usize, transaction: Transaction) -> Vec<u8> {
    let length = u16::try_from(length).unwrap_or(u16::MAX);
    let mut out = Vec::with_capacity(HEADER_BYTES + usize::from(length));
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&MAGIC_COOKIE);
    out.extend_from_slice(&transaction);
    out
}

/// Appends an attribute; all of ours have lengths that need no padding.
fn attribute(kind: u16, value: &[u8], out: &mut Vec<u8>) {
    let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(value);
}

/// What an address is hidden with, so that routers do not rewrite it: cookie and transaction.
fn xor_key(transaction: Transaction) -> [u8; 16] {
    let mut key = [0; 16];
    let bytes = MAGIC_COOKIE.iter().chain(&transaction);
    for (to, from) in key.iter_mut().zip(bytes) {
        *to = *from;
    }
    key
}

fn address(value: &[u8], key: [u8; 16]) -> Option<SocketAddr> {
    let (head, ip) = value.split_first_chunk::<4>()?;
    let [_, family, p0, p1] = *head;
    let [k0, k1, ..] = key;
    let port = u16::from_be_bytes([p0 ^ k0, p1 ^ k1]);
    let ip = match family {
        1 => {
            let bytes: [u8; 4] = ip.try_into().ok()?;
            let [k0, k1, k2, k3, ..] = key;
            let key = u32::from_be_bytes([k0, k1, k2, k3]);
            IpAddr::V4(Ipv4Addr::from(u32::from_be_bytes(bytes) ^ key))
        }
        2 => {
            let bytes: [u8; 16] = ip.try_into().ok()?;
            let key = u128::from_be_bytes(key);
            IpAddr::V6(Ipv6Addr::from(u128::from_be_bytes(bytes) ^ key))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// RFC 8489 14.7: CRC-32 of all before the attribute, whose length the header counts already.
fn fingerprint(message: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in message {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = crc & 1;
            crc = (crc >> 1) ^ (carry.wrapping_neg() & 0xedb8_8320);
        }
    }
    !crc ^ FINGERPRINT_XOR
}
