//! DERP, version 2: how a node and a relay talk, and nothing of how bytes get from one to the other.
//!
//! A stream of frames in both directions:
//!
//! ```text
//!  0        1        2        3        4        5
//! ┌────────┬───────────────────────────────────┬───────────────┐
//! │  kind  │  length of the body, big-endian   │  body …       │
//! └────────┴───────────────────────────────────┴───────────────┘
//!
//! relay → node   ServerKey                                who I am
//! node  → relay  ClientInfo  (key, box of JSON)           who I am, proven, with a permit
//! relay → node   ServerInfo  (box of JSON)                welcome
//! then           SendPacket → … → RecvPacket, Ping/Pong, PeerGone, KeepAlive, …
//! ```
//!
//! A node's key is its address. The relay sees sealed packets and never what is in them. Bodies may
//! be longer than what is known of them, and frames of unknown kinds are skipped: that is how the
//! protocol grows. [`login`] holds the boxes and the JSON in them; the page `docs/derp.md` the whole
//! in prose.

pub mod login;

pub use crate::disco::{MAGIC as DISCO_MAGIC, MIN_BYTES as DISCO_MIN_BYTES, is_disco};
use crate::id::NetworkId;
use crate::key::{KEY_BYTES, NodeKey, RelayKey};
pub use crate::nacl::{NaclBox as LoginBox, Sealed};
use crate::net::{decode_endpoint, encode_endpoint};
pub use login::{ClientInfo, ServerInfo};
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

/// The version that is spoken here.
pub const VERSION: u32 = 2;
/// First bytes of a relay's first frame: `DERP🔑`.
pub const MAGIC: [u8; 8] = *b"DERP\xf0\x9f\x94\x91";
/// Kind and length, before each body.
pub const HEADER_BYTES: usize = 5;
/// Longest packet that is carried.
pub const MAX_PACKET_BYTES: usize = 64 << 10;
/// Longest body of any frame that is not a packet.
pub const MAX_INFO_BYTES: usize = 1 << 20;
/// What [`Frame::Within`] puts before the other frame's body.
pub const WITHIN_BYTES: usize = 8 + 1;
/// What a Ping carries and a Pong brings back.
pub const PING_BYTES: usize = 8;
/// A relay says at least so often that it is alive (and up to [`KEEP_ALIVE_JITTER`] later).
pub const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// Spread of the above, so that a relay's clients do not wake it at once.
pub const KEEP_ALIVE_JITTER: Duration = Duration::from_secs(5);
/// Longest login, from the connection to ServerInfo.
pub const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
/// What `Upgrade` names in the request that opens the stream.
pub const UPGRADE: &str = "DERP";
/// Request header of a client that needs no answer to its upgrade: it read the relay's key from the
/// certificate that [`META_CERTIFICATE_PREFIX`] names, and the first byte it gets is a frame's.
pub const FAST_START_HEADER: &str = "Derp-Fast-Start";
/// Common name, up to the relay's key in hex, of the certificate that ends a relay's chain. Its
/// serial number is [`VERSION`].
pub const META_CERTIFICATE_PREFIX: &str = "derpkey";

/// Kinds of frames, as they stand in the first byte.
pub mod kind {
    /// magic 8 ‖ key 32
    pub const SERVER_KEY: u8 = 0x01;
    /// key 32 ‖ nonce 24 ‖ box
    pub const CLIENT_INFO: u8 = 0x02;
    /// nonce 24 ‖ box
    pub const SERVER_INFO: u8 = 0x03;
    /// destination 32 ‖ packet
    pub const SEND_PACKET: u8 = 0x04;
    /// source 32 ‖ packet
    pub const RECV_PACKET: u8 = 0x05;
    /// nothing
    pub const KEEP_ALIVE: u8 = 0x06;
    /// 0 or 1
    pub const NOTE_PREFERRED: u8 = 0x07;
    /// key 32 ‖ reason 1
    pub const PEER_GONE: u8 = 0x08;
    /// key 32 ‖ address 16 ‖ port 2 ‖ flags 1; all but the key may be missing
    pub const PEER_PRESENT: u8 = 0x09;
    /// source 32 ‖ destination 32 ‖ packet
    pub const FORWARD_PACKET: u8 = 0x0a;
    /// nothing
    pub const WATCH_CONNS: u8 = 0x10;
    /// key 32
    pub const CLOSE_PEER: u8 = 0x11;
    /// 8 bytes
    pub const PING: u8 = 0x12;
    /// the same 8 bytes
    pub const PONG: u8 = 0x13;
    /// UTF-8; empty: all is well again
    pub const HEALTH: u8 = 0x14;
    /// milliseconds to wait 4 ‖ milliseconds to keep trying 4
    pub const RESTARTING: u8 = 0x15;
    /// network 8 ‖ kind 1 ‖ body of that kind; weir's own
    pub const WITHIN: u8 = 0x57;
}

/// Why bytes are not a frame. The stream they came from is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header announces more than frames of its kind may have.
    #[error("a frame of kind {kind:#04x} announces {length} bytes, which is too many")]
    TooLong {
        /// Its kind.
        kind: u8,
        /// What it announces.
        length: usize,
    },
    /// The body is shorter than what its kind needs.
    #[error("a frame of kind {kind:#04x} is too short")]
    TooShort {
        /// Its kind.
        kind: u8,
    },
    /// A ServerKey frame without the magic: not a relay.
    #[error("the other side is no relay: its first frame has no DERP magic")]
    Magic,
    /// A Health frame that is not UTF-8.
    #[error("a health frame holds no text")]
    Text,
}

/// Kind and length of a frame whose body follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// See [`kind`].
    pub kind: u8,
    /// Bytes of the body.
    pub length: usize,
}

/// Why a packet's destination is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoneReason {
    /// It was connected and left.
    Disconnected,
    /// It is not connected to this relay.
    NotHere,
    /// A reason of a later version.
    Other(u8),
}

/// One frame; what is in its body is borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The relay's first word.
    ServerKey(RelayKey),
    /// The node's login.
    ClientInfo {
        /// Who it says it is; true if the box opens.
        key: NodeKey,
        /// A [`ClientInfo`].
        sealed: Sealed<'a>,
    },
    /// The login succeeded; a [`ServerInfo`].
    ServerInfo(Sealed<'a>),
    /// Carry this to `dst`.
    SendPacket {
        /// Where to.
        dst: NodeKey,
        /// Sealed by WireGuard or by disco.
        packet: &'a [u8],
    },
    /// This came from `src`.
    RecvPacket {
        /// Where from; the relay has proof of it.
        src: NodeKey,
        /// What [`Frame::SendPacket`] carried.
        packet: &'a [u8],
    },
    /// Between relays of a region: this came from `src` for `dst`.
    ForwardPacket {
        /// Where from.
        src: NodeKey,
        /// Where to.
        dst: NodeKey,
        /// What [`Frame::SendPacket`] carried.
        packet: &'a [u8],
    },
    /// The relay is alive.
    KeepAlive,
    /// Whether this relay is the node's home.
    NotePreferred(bool),
    /// Nothing reaches `peer` here.
    PeerGone {
        /// Who.
        peer: NodeKey,
        /// Why.
        reason: GoneReason,
    },
    /// To those who watch: `peer` connected.
    PeerPresent {
        /// Who.
        peer: NodeKey,
        /// From where.
        addr: Option<SocketAddr>,
        /// Bits of later versions.
        flags: Option<u8>,
    },
    /// Between relays: tell me who comes and goes.
    WatchConns,
    /// Between relays: end this node's connection.
    ClosePeer(NodeKey),
    /// Are you there?
    Ping([u8; PING_BYTES]),
    /// I am.
    Pong([u8; PING_BYTES]),
    /// What is wrong with this connection; empty when all is well again.
    Health(&'a str),
    /// The relay is about to end.
    Restarting {
        /// Wait this long before connecting again.
        reconnect_in: Duration,
        /// Keep trying for this long before looking elsewhere.
        try_for: Duration,
    },
    /// Between weir's relays of a region: another frame, and of which network its keys are. Relays
    /// of others skip it.
    Within {
        /// Whose nodes are meant.
        network: NetworkId,
        /// See [`kind`].
        kind: u8,
        /// For [`Frame::decode`].
        body: &'a [u8],
    },
    /// A kind of a later version: skip it.
    Unknown(u8),
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] if the body would exceed what its kind may have.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let [kind, a, b, c, d] = bytes;
        // 32 bits always fit: weir runs on 64-bit machines alone.
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > max_length(kind) {
            return Err(FrameError::TooLong { kind, length });
        }
        Ok(Self { kind, length })
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let length = u32::try_from(self.length).unwrap_or(u32::MAX);
        let [a, b, c, d] = length.to_be_bytes();
        [self.kind, a, b, c, d]
    }
}

fn max_length(kind: u8) -> usize {
    match kind {
        kind::SEND_PACKET | kind::RECV_PACKET => KEY_BYTES + MAX_PACKET_BYTES,
        kind::FORWARD_PACKET => 2 * KEY_BYTES + MAX_PACKET_BYTES,
        kind::WITHIN => WITHIN_BYTES + 2 * KEY_BYTES + MAX_PACKET_BYTES,
        _ => MAX_INFO_BYTES,
    }
}

impl GoneReason {
    fn decode(byte: u8) -> Self {
        match byte {
            0 => Self::Disconnected,
            1 => Self::NotHere,
            other => Self::Other(other),
        }
    }

    fn encode(self) -> u8 {
        match self {
            Self::Disconnected => 0,
            Self::NotHere => 1,
            Self::Other(other) => other,
        }
    }
}

impl<'a> Frame<'a> {
    /// The first frame of `bytes` and how many of them it takes; `None` when more must come first.
    ///
    /// # Errors
    /// If these bytes cannot become a frame, whatever follows.
    pub fn split(bytes: &'a [u8]) -> Result<Option<(Self, usize)>, FrameError> {
        let Some((header, rest)) = bytes.split_first_chunk() else {
            return Ok(None);
        };
        let Header { kind, length } = Header::decode(*header)?;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        Ok(Some((Self::decode(kind, body)?, HEADER_BYTES + length)))
    }

    /// Reads the body of a frame.
    ///
    /// # Errors
    /// If the body is too short for its kind or not what it should be.
    pub fn decode(kind: u8, body: &'a [u8]) -> Result<Self, FrameError> {
        Self::parse(kind, body)
            .unwrap_or(Err(FrameError::TooShort { kind }))
            .and_then(|frame| match frame {
                Self::SendPacket { packet, .. }
                | Self::RecvPacket { packet, .. }
                | Self::ForwardPacket { packet, .. }
                    if packet.len() > MAX_PACKET_BYTES =>
                {
                    let length = body.len();
                    Err(FrameError::TooLong { kind, length })
                }
                frame => Ok(frame),
            })
    }

    /// `None` when the body is too short.
    fn parse(kind: u8, body: &'a [u8]) -> Option<Result<Self, FrameError>> {
        let key = |bytes: &'a [u8]| {
            let (key, rest) = bytes.split_first_chunk()?;
            Some((NodeKey(*key), rest))
        };
        Some(Ok(match kind {
            kind::SERVER_KEY => {
                let (magic, rest) = body.split_first_chunk()?;
                if *magic != MAGIC {
                    return Some(Err(FrameError::Magic));
                }
                Self::ServerKey(RelayKey(*rest.first_chunk()?))
            }
            kind::CLIENT_INFO => {
                let (key, rest) = key(body)?;
                let sealed = Sealed::parse(rest)?;
                Self::ClientInfo { key, sealed }
            }
            kind::SERVER_INFO => Self::ServerInfo(Sealed::parse(body)?),
            kind::SEND_PACKET => {
                let (dst, packet) = key(body)?;
                Self::SendPacket { dst, packet }
            }
            kind::RECV_PACKET => {
                let (src, packet) = key(body)?;
                Self::RecvPacket { src, packet }
            }
            kind::FORWARD_PACKET => {
                let (src, rest) = key(body)?;
                let (dst, packet) = key(rest)?;
                Self::ForwardPacket { src, dst, packet }
            }
            kind::KEEP_ALIVE => Self::KeepAlive,
            kind::NOTE_PREFERRED => Self::NotePreferred(*body.first()? != 0),
            kind::PEER_GONE => {
                let (peer, rest) = key(body)?;
                // Relays of the first days said no reason, and meant this one.
                let reason = GoneReason::decode(rest.first().copied().unwrap_or(0));
                Self::PeerGone { peer, reason }
            }
            kind::PEER_PRESENT => {
                let (peer, rest) = key(body)?;
                let (addr, flags) = decode_origin(rest);
                Self::PeerPresent { peer, addr, flags }
            }
            kind::WATCH_CONNS => Self::WatchConns,
            kind::CLOSE_PEER => Self::ClosePeer(key(body)?.0),
            kind::PING => Self::Ping(*body.first_chunk()?),
            kind::PONG => Self::Pong(*body.first_chunk()?),
            kind::HEALTH => match std::str::from_utf8(body) {
                Ok(text) => Self::Health(text),
                Err(_) => return Some(Err(FrameError::Text)),
            },
            kind::RESTARTING => {
                let (wait, rest) = body.split_first_chunk()?;
                let millis = |bytes: [u8; 4]| {
                    let millis = u32::from_be_bytes(bytes);
                    Duration::from_millis(u64::from(millis))
                };
                Self::Restarting {
                    reconnect_in: millis(*wait),
                    try_for: millis(*rest.first_chunk()?),
                }
            }
            kind::WITHIN => {
                let (network, rest) = body.split_first_chunk()?;
                let (kind, body) = rest.split_first()?;
                Self::Within {
                    network: NetworkId(u64::from_be_bytes(*network)),
                    kind: *kind,
                    body,
                }
            }
            unknown => Self::Unknown(unknown),
        }))
    }

    /// Appends the frame to `out`. A packet or text that exceeds the limits is the caller's mistake
    /// and is refused by the other side.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let kind = self.kind();
        out.extend_from_slice(&Header { kind, length: 0 }.encode());
        self.encode_body(out);
        let length = out.len() - start - HEADER_BYTES;
        let header = Header { kind, length }.encode();
        if let Some(place) = out.get_mut(start..start + HEADER_BYTES) {
            place.copy_from_slice(&header);
        }
    }

    /// The frame's bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode(&mut out);
        out
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        match *self {
            Self::ServerKey(key) => {
                out.extend_from_slice(&MAGIC);
                out.extend_from_slice(&key.0);
            }
            Self::ClientInfo { key, sealed } => {
                out.extend_from_slice(&key.0);
                sealed.encode(out);
            }
            Self::ServerInfo(sealed) => sealed.encode(out),
            Self::SendPacket { dst: key, packet } | Self::RecvPacket { src: key, packet } => {
                out.extend_from_slice(&key.0);
                out.extend_from_slice(packet);
            }
            Self::ForwardPacket { src, dst, packet } => {
                out.extend_from_slice(&src.0);
                out.extend_from_slice(&dst.0);
                out.extend_from_slice(packet);
            }
            Self::Within {
                network,
                kind,
                body,
            } => {
                out.extend_from_slice(&network.0.to_be_bytes());
                out.push(kind);
                out.extend_from_slice(body);
            }
            Self::KeepAlive | Self::WatchConns | Self::Unknown(_) => {}
            Self::NotePreferred(preferred) => out.push(u8::from(preferred)),
            Self::PeerGone { peer, reason } => {
                out.extend_from_slice(&peer.0);
                out.push(reason.encode());
            }
            Self::PeerPresent { peer, addr, flags } => {
                out.extend_from_slice(&peer.0);
                encode_origin(addr, flags, out);
            }
            Self::ClosePeer(peer) => out.extend_from_slice(&peer.0),
            Self::Ping(bytes) | Self::Pong(bytes) => out.extend_from_slice(&bytes),
            Self::Health(text) => out.extend_from_slice(text.as_bytes()),
            Self::Restarting {
                reconnect_in,
                try_for,
            } => {
                for time in [reconnect_in, try_for] {
                    let millis = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
                    out.extend_from_slice(&millis.to_be_bytes());
                }
            }
        }
    }

    /// See [`kind`].
    #[must_use]
    pub fn kind(&self) -> u8 {
        match self {
            Self::ServerKey(_) => kind::SERVER_KEY,
            Self::ClientInfo { .. } => kind::CLIENT_INFO,
            Self::ServerInfo(_) => kind::SERVER_INFO,
            Self::SendPacket { .. } => kind::SEND_PACKET,
            Self::RecvPacket { .. } => kind::RECV_PACKET,
            Self::ForwardPacket { .. } => kind::FORWARD_PACKET,
            Self::KeepAlive => kind::KEEP_ALIVE,
            Self::NotePreferred(_) => kind::NOTE_PREFERRED,
            Self::PeerGone { .. } => kind::PEER_GONE,
            Self::PeerPresent { .. } => kind::PEER_PRESENT,
            Self::WatchConns => kind::WATCH_CONNS,
            Self::ClosePeer(_) => kind::CLOSE_PEER,
            Self::Ping(_) => kind::PING,
            Self::Pong(_) => kind::PONG,
            Self::Health(_) => kind::HEALTH,
            Self::Restarting { .. } => kind::RESTARTING,
            Self::Within { .. } => kind::WITHIN,
            Self::Unknown(kind) => *kind,
        }
    }
}

/// `address 16 ‖ port 2 ‖ flags 1`, IPv4 as v4-mapped; older relays leave out the end or all of it.
fn decode_origin(bytes: &[u8]) -> (Option<SocketAddr>, Option<u8>) {
    match decode_endpoint(bytes) {
        Some((addr, rest)) => (Some(addr), rest.first().copied()),
        None => (None, None),
    }
}

/// Flags need an address before them: without one they are sent after the unspecified one.
fn encode_origin(addr: Option<SocketAddr>, flags: Option<u8>, out: &mut Vec<u8>) {
    if addr.is_none() && flags.is_none() {
        return;
    }
    let unspecified = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    encode_endpoint(addr.unwrap_or(unspecified), out);
    out.extend(flags);
}
