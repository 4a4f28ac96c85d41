//! Discovery: the probes by which two nodes find a path between them, on the wire as other programs
//! speak it.
//!
//! ```text
//!  0       6                    38                   62
//! ┌───────┬────────────────────┬────────────────────┬──────────────────────────────┐
//! │ magic │ sender's disco key │ nonce              │ box                          │
//! └───────┴────────────────────┴────────────────────┴──────────────────────────────┘
//!                                       in the box:  kind 1 ‖ version 1 (0) ‖ body
//!
//! 01 Ping         transaction 12 ‖ node key 32 ‖ zeros …      are you there?
//! 02 Pong         transaction 12 ‖ address 16 ‖ port 2        yes, and I see you at
//!                 (‖ 'w' ‖ bytes 8 ‖ milliseconds 4)          and took so much of you
//! 03 CallMeMaybe  (address 16 ‖ port 2) …                     try me there; by relay alone
//! ```
//!
//! It travels beside WireGuard's packets, on the same port and by the same relays, and is told from
//! them by its first byte. Integers are big-endian, IPv4 addresses are mapped into IPv6. A box that
//! opens proves its sender's disco key ([`nacl`](crate::nacl)); that it belongs to a node is the
//! netmap's word. Bodies may be longer than what is known of them, and kinds that are not known are
//! [`Message::Unknown`].

use crate::derp::MAX_PACKET_BYTES;
use crate::key::{DiscoKey, DiscoSecret, KEY_BYTES, NodeKey};
use crate::nacl::{BOX_OVERHEAD, NONCE_BYTES, NaclBox, Sealed};
use crate::net::{decode_endpoint, encode_endpoint};
use crate::netmap::MAX_ENDPOINTS_PER_NODE;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// First bytes of every packet: `TS💬`.
pub const MAGIC: [u8; 6] = *b"TS\xf0\x9f\x92\xac";
/// Shortest packet that is taken for discovery: magic, sender's key, nonce.
pub const MIN_BYTES: usize = MAGIC.len() + KEY_BYTES + NONCE_BYTES;
/// Length of a transaction's id.
pub const TX_BYTES: usize = 12;
/// Length of the packet that a [`Message::Ping`] without padding is.
pub const PING_BYTES: usize = MIN_BYTES + BOX_OVERHEAD + MESSAGE_HEADER + TX_BYTES + KEY_BYTES;
/// Most padding of a ping: no underlay takes longer datagrams than 9,000 bytes.
pub const MAX_PADDING: u16 = 9_000 - PING_BYTES as u16;

const MESSAGE_HEADER: usize = 2;
const PING: u8 = 1;
const PONG: u8 = 2;
const CALL_ME_MAYBE: u8 = 3;
/// What begins a [`Took`] behind a pong.
const TOOK: u8 = b'w';

/// What joins a pong to its ping. Not guessable, so that a pong proves that its ping arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TxId(pub [u8; TX_BYTES]);

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// Are you there?
    Ping {
        /// To be brought back.
        tx: TxId,
        /// The sender's node key; other programs' first versions did not say it.
        node: Option<NodeKey>,
        /// How many zeros make the packet longer, to find out whether long ones pass.
        padding: u16,
    },
    /// Yes.
    Pong {
        /// The ping's.
        tx: TxId,
        /// Where the ping came from, as this side sees it.
        seen: SocketAddr,
        /// What came of the other side's packets. Other programs neither say nor read it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        took: Option<Took>,
    },
    /// I am about to ping you: ping me at these, so that both our routers let the other's pings in.
    CallMeMaybe {
        /// At most [`MAX_ENDPOINTS_PER_NODE`]; others are left out.
        endpoints: Vec<SocketAddr>,
    },
    /// A kind of a later version, or one that we have no use for.
    Unknown(u8),
}

/// How much of a session the sender's kernel took: proof for the other side that its packets arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Took {
    /// Bytes received from the peer, as WireGuard counts them.
    pub bytes: u64,
    /// How many milliseconds before the message the counter was read.
    pub ago_ms: u32,
}

impl Took {
    fn decode(rest: &[u8]) -> Option<Self> {
        let (bytes, rest) = rest.strip_prefix(&[TOOK])?.split_first_chunk()?;
        let (ago_ms, _) = rest.split_first_chunk()?;
        Some(Self {
            bytes: u64::from_be_bytes(*bytes),
            ago_ms: u32::from_be_bytes(*ago_ms),
        })
    }

    fn encode(self, out: &mut Vec<u8>) {
        out.push(TOOK);
        out.extend_from_slice(&self.bytes.to_be_bytes());
        out.extend_from_slice(&self.ago_ms.to_be_bytes());
    }
}

/// Why a packet is not a message for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum DiscoError {
    /// It does not begin as discovery does.
    #[error("this is no discovery packet")]
    Magic,
    /// It is longer than any packet may be.
    #[error("a discovery packet is too long")]
    TooLong,
    /// Another key sealed it, or for another.
    #[error("a discovery packet's box does not open")]
    Box,
    /// The box holds less than its kind needs.
    #[error("a discovery message is too short")]
    TooShort,
}

/// Seals and opens between our key and one peer's.
pub struct DiscoBox {
    us: DiscoKey,
    peer: DiscoKey,
    seal: NaclBox,
}

/// Whether a packet is discovery: relays carry it before data, and nodes tell it from WireGuard's.
#[must_use]
pub fn is_disco(packet: &[u8]) -> bool {
    packet.len() >= MIN_BYTES && packet.starts_with(&MAGIC)
}

/// Who a packet says it is from; true if [`DiscoBox::open`] opens it.
#[must_use]
pub fn sender(packet: &[u8]) -> Option<DiscoKey> {
    Some(split(packet)?.0)
}

/// The sender and the box with its nonce.
fn split(packet: &[u8]) -> Option<(DiscoKey, &[u8])> {
    let (key, rest) = packet.strip_prefix(&MAGIC)?.split_first_chunk()?;
    Some((DiscoKey(*key), rest))
}

impl DiscoBox {
    /// `None` if the peer's key is a low-order point.
    #[must_use]
    pub fn new(secret: &DiscoSecret, peer: DiscoKey) -> Option<Self> {
        let agreed = secret.agree(peer.0)?;
        Some(Self {
            us: secret.public(),
            peer,
            seal: NaclBox::new(&agreed),
        })
    }

    /// The peer's key.
    #[must_use]
    pub fn peer(&self) -> DiscoKey {
        self.peer
    }

    /// The packet that says `message` to the peer. The nonce must be fresh.
    #[must_use]
    pub fn seal(&self, nonce: [u8; NONCE_BYTES], message: &Message) -> Vec<u8> {
        let bytes = &self.seal.seal(nonce, &message.encode());
        let mut packet = Vec::with_capacity(MIN_BYTES + bytes.len());
        packet.extend_from_slice(&MAGIC);
        packet.extend_from_slice(&self.us.0);
        Sealed { nonce, bytes }.encode(&mut packet);
        packet
    }

    /// What the peer says in this packet.
    ///
    /// # Errors
    /// If it is not discovery, not sealed by the peer for us, or says less than its kind must.
    pub fn open(&self, packet: &[u8]) -> Result<Message, DiscoError> {
        if packet.len() > MAX_PACKET_BYTES {
            return Err(DiscoError::TooLong);
        }
        let (from, sealed) = split(packet).ok_or(DiscoError::Magic)?;
        let sealed = Sealed::parse(sealed).ok_or(DiscoError::TooShort)?;
        if from != self.peer {
            return Err(DiscoError::Box);
        }
        let plain = self.seal.open(sealed).ok_or(DiscoError::Box)?;
        Message::decode(&plain).ok_or(DiscoError::TooShort)
    }
}

impl Message {
    /// Reads what a box holds; `None` if it is too short for its kind.
    #[must_use]
    pub fn decode(plain: &[u8]) -> Option<Self> {
        let ([kind, _version], body) = plain.split_first_chunk()?;
        let transaction = || {
            let (tx, rest) = body.split_first_chunk()?;
            Some((TxId(*tx), rest))
        };
        Some(match *kind {
            PING => {
                let (tx, rest) = transaction()?;
                let (node, zeros) = match rest.split_first_chunk() {
                    Some((key, zeros)) => (Some(NodeKey(*key)), zeros),
                    None => (None, rest),
                };
                let padding =
                    u16::try_from(zeros.len()).map_or(MAX_PADDING, |it| it.min(MAX_PADDING));
                Self::Ping { tx, node, padding }
            }
            PONG => {
                let (tx, rest) = transaction()?;
                let (seen, rest) = decode_endpoint(rest)?;
                let took = Took::decode(rest);
                Self::Pong { tx, seen, took }
            }
            CALL_ME_MAYBE => {
                let mut rest = body;
                let mut endpoints = Vec::new();
                while let Some((endpoint, more)) = decode_endpoint(rest)
                    && endpoints.len() < MAX_ENDPOINTS_PER_NODE
                {
                    endpoints.push(endpoint);
                    rest = more;
                }
                Self::CallMeMaybe { endpoints }
            }
            other => Self::Unknown(other),
        })
    }

    /// The bytes that a box is to hold.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.kind(), 0];
        match self {
            Self::Ping { tx, node, padding } => {
                out.extend_from_slice(&tx.0);
                if let Some(node) = node {
                    out.extend_from_slice(&node.0);
                }
                let zeros = usize::from((*padding).min(MAX_PADDING));
                out.resize(out.len() + zeros, 0);
            }
            Self::Pong { tx, seen, took } => {
                out.extend_from_slice(&tx.0);
                encode_endpoint(*seen, &mut out);
                if let Some(took) = took {
                    took.encode(&mut out);
                }
            }
            Self::CallMeMaybe { endpoints } => {
                for endpoint in endpoints.iter().take(MAX_ENDPOINTS_PER_NODE) {
                    encode_endpoint(*endpoint, &mut out);
                }
            }
            Self::Unknown(_) => {}
        }
        out
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Ping { .. } => PING,
            Self::Pong { .. } => PONG,
            Self::CallMeMaybe { .. } => CALL_ME_MAYBE,
            Self::Unknown(kind) => *kind,
        }
    }
}
