//! The guard on WireGuard's UDP port: which datagrams from the underlay are worth a look.
//!
//! WireGuard answers no stranger, but it looks at whatever its port is sent, and a handshake
//! initiation costs it two agreements on a curve. The guard stands before it, on each interface of
//! the underlay:
//!
//! | datagram to our address and port | what becomes of it |
//! |---|---|
//! | WireGuard data, response, cookie reply; discovery; STUN | passes, counted |
//! | handshake initiation | passes within its prefix's limit, and within the limit of all |
//! | anything else ([`Class::Other`]) | dropped; passes where this host forwards |
//!
//! **It fails open.** A missing map, a header that cannot be read, an address that is not listed: the
//! packet passes, uncounted. That is no breach of default deny: the guard refuses for the sake of
//! time, and permits nothing. What it lets through is for WireGuard to authenticate and for the ACL
//! to judge, just as if there were no guard; and what it would drop by mistake is somebody else's
//! packet, because it stands on interfaces that are not ours.
//!
//! So it looks at as little as it can. Later fragments pass: they have no ports, and without their
//! first fragment, which is judged, nothing is put together from them. A frame of a VLAN is for the
//! VLAN's interface, which has a guard of its own; only a tag that says no more than a priority is
//! stepped over. Where this host forwards, an answer to a machine behind it may come to our address
//! and port, if that machine happened to speak from the same port and its address is translated: it
//! is none of ours and not for us to drop.
//!
//! A *limit* is one number in a bucket: the time until which what has come is paid for. Each
//! initiation adds its interval, and none is let through that would pay further ahead than the burst.
//! An IPv4 /24 and an IPv6 /48 are one bucket, because whoever can forge one source address there can
//! forge them all; the limit of all prefixes together bounds what a forger of any address can cost.
//! The prefixes that peers are at are exempt from that last one, so that they still get through.

use crate::abi::Addr;
use crate::classify::{Class, HEAD_BYTES, classify};
use crate::packet::{MAX_EXTENSIONS, protocol};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version of all layouts below. Maps of another version are left behind: what they hold is worth a
/// second of traffic.
pub const VERSION: u32 = 1;

/// Initiations that one prefix may send for long, in a second. A node sends one every two minutes to
/// each peer, and one every five seconds to a peer that does not answer: so 500 nodes behind one NAT
/// that all lost this node at once are served.
pub const PREFIX_RATE: u64 = 100;
/// Initiations that one prefix may send at once.
pub const PREFIX_BURST: u64 = 500;
/// Initiations of all prefixes in a second. One costs WireGuard about a tenth of a millisecond: a
/// flood costs at most a fifth of one processor.
pub const TOTAL_RATE: u64 = 2_000;
/// Initiations of all prefixes at once.
pub const TOTAL_BURST: u64 = 2_000;
/// Prefixes that are remembered; the one not heard of for longest makes room. A forger of random
/// addresses makes room soon, and is bounded by [`TOTAL_RATE`].
pub const BUCKETS: u32 = 16_384;
/// Prefixes that peers are at. Beyond so many, some are not exempt from [`TOTAL_RATE`].
pub const PEER_PREFIXES: u32 = 16_384;
/// Addresses of this host that are guarded. Packets to others pass.
pub const OWN_ADDRS: u32 = 1_024;

const SECOND_NS: u64 = 1_000_000_000;
const PREFIX: Limit = Limit::new(PREFIX_RATE, PREFIX_BURST);
const TOTAL: Limit = Limit::new(TOTAL_RATE, TOTAL_BURST);

/// Names of the maps in the object, and of their pins.
pub mod maps {
    /// [`Config`](super::Config), in an array of one.
    pub const CONFIG: &str = "CONFIG";
    /// This host's addresses on the underlay.
    pub const OWN: &str = "OWN";
    /// Prefixes that peers are at, as [`prefix_of`](super::prefix_of) has them.
    pub const PEERS: &str = "PEERS";
    /// What each prefix's initiations are paid until.
    pub const PREFIXES: &str = "PREFIXES";
    /// The same of all.
    pub const TOTAL: &str = "TOTAL";
    /// Packets by [`Outcome`](super::Outcome).
    pub const COUNTERS: &str = "COUNTERS";

    /// All of them.
    pub const ALL: [&str; 6] = [CONFIG, OWN, PEERS, PREFIXES, TOTAL, COUNTERS];
}

/// Names of the programs in the object.
pub mod programs {
    /// For the driver of a network card (XDP).
    pub const DRIVER: &str = "driver";
    /// For ingress of an interface with Ethernet headers (tc).
    pub const ETHERNET: &str = "ethernet";
    /// For ingress of an interface whose packets begin with the IP header (tc).
    pub const BARE: &str = "bare";
}

/// What the agent tells the programs.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Config {
    /// WireGuard's UDP port; 0, and nothing is looked at.
    pub port: u32,
    /// 1 if this host forwards packets of others, else 0.
    pub forwards: u32,
}

/// What became of a datagram to our port; each has a counter.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord, Hash))]
#[repr(u8)]
pub enum Outcome {
    /// A handshake initiation passed.
    Initiation,
    /// A handshake response passed.
    Response,
    /// A cookie reply passed.
    Cookie,
    /// Data passed.
    Data,
    /// Discovery passed.
    Disco,
    /// STUN passed.
    Stun,
    /// Something else passed, because this host forwards.
    Foreign,
    /// Something else was dropped.
    Other,
    /// An initiation was dropped: too many of its prefix.
    PrefixLimit,
    /// An initiation was dropped: too many of all.
    TotalLimit,
}

impl Outcome {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 10] = [
        Self::Initiation,
        Self::Response,
        Self::Cookie,
        Self::Data,
        Self::Disco,
        Self::Stun,
        Self::Foreign,
        Self::Other,
        Self::PrefixLimit,
        Self::TotalLimit,
    ];

    /// Whether the packet goes on.
    #[inline(always)]
    #[must_use]
    pub const fn passes(self) -> bool {
        match self {
            Self::Initiation
            | Self::Response
            | Self::Cookie
            | Self::Data
            | Self::Disco
            | Self::Stun
            | Self::Foreign => true,
            Self::Other | Self::PrefixLimit | Self::TotalLimit => false,
        }
    }

    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Initiation => "handshake_initiation",
            Self::Response => "handshake_response",
            Self::Cookie => "cookie_reply",
            Self::Data => "data",
            Self::Disco => "disco",
            Self::Stun => "stun",
            Self::Foreign => "foreign",
            Self::Other => "other",
            Self::PrefixLimit => "prefix_limit",
            Self::TotalLimit => "total_limit",
        }
    }
}

/// What the programs know and remember.
pub trait Tables {
    /// The monotonic clock. Asked for initiations alone.
    fn now_ns(&self) -> u64;
    /// What the agent told.
    fn config(&self) -> Option<Config>;
    /// Whether this is an address of this host.
    fn is_own(&self, addr: &Addr) -> bool;
    /// Whether a peer is in this prefix.
    fn has_peer(&self, prefix: &Addr) -> bool;
    /// Until when a prefix has paid; `None` if nothing is known of it.
    fn paid(&self, prefix: &Addr) -> Option<u64>;
    /// Remembers that.
    fn pay(&self, prefix: &Addr, until_ns: u64);
    /// Until when all have paid; `None` without the map.
    fn all_paid(&self) -> Option<u64>;
    /// Remembers that.
    fn pay_all(&self, until_ns: u64);
}

/// A frame of the underlay.
pub trait Frame {
    /// The `4 * N` bytes at an offset that is known when this is built, in memory order.
    fn near<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;
    /// The same at any offset.
    fn far<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;
    /// For datagrams that the kernel put together into one: how long each is, and how many they are.
    fn segments(&self) -> Option<(u32, u32)>;
}

impl Frame for &[u8] {
    fn near<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        crate::packet::Bytes::words(self, offset)
    }

    fn far<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.near(offset)
    }

    fn segments(&self) -> Option<(u32, u32)> {
        None
    }
}

/// Bytes of an Ethernet header.
const ETHERNET_BYTES: u32 = 14;
/// Where its type is (IEEE 802.3).
const TYPE_AT: u32 = 12;
/// Bytes of a VLAN tag.
const TAG_BYTES: u32 = 4;
const ETH_IPV4: u16 = 0x0800;
const ETH_IPV6: u16 = 0x86dd;
const ETH_VLAN: u16 = 0x8100;
const ETH_SERVICE_VLAN: u16 = 0x88a8;
const IPV4_BYTES: u32 = 20;
const IPV6_BYTES: u32 = 40;
const UDP_BYTES: u32 = 8;
/// The VLAN's number in a tag, after its priority.
const VLAN: u16 = 0x0fff;
/// Fragment offset of IPv4, in a 16-bit field beside three flags.
const V4_OFFSET: u16 = 0x1fff;
/// Fragment offset of IPv6, before two reserved bits and a flag.
const V6_OFFSET: u16 = 0xfff8;

/// Where a UDP header is.
#[derive(Clone, Copy)]
struct Place {
    at: u32,
    /// Whether that is known when this is built.
    near: bool,
}

impl Place {
    #[inline(always)]
    fn read<const N: usize>(self, frame: &impl Frame, offset: u32) -> Option<[u32; N]> {
        if self.near {
            frame.near(self.at + offset)
        } else {
            frame.far(self.at + offset)
        }
    }
}

/// What becomes of a frame with an Ethernet header; `None` for what is not ours to judge.
#[inline(always)]
pub fn judge_ethernet(tables: &impl Tables, frame: &impl Frame) -> Option<Outcome> {
    let [word] = frame.near(TYPE_AT)?;
    let (kind, tag) = halves(word);
    if kind != ETH_VLAN && kind != ETH_SERVICE_VLAN {
        return judge_type(tables, frame, kind, ETHERNET_BYTES);
    }
    if tag & VLAN != 0 {
        return None;
    }
    let [word] = frame.near(TYPE_AT + TAG_BYTES)?;
    let kind = halves(word).0;
    judge_type(tables, frame, kind, ETHERNET_BYTES + TAG_BYTES)
}

#[inline(always)]
fn judge_type(tables: &impl Tables, frame: &impl Frame, kind: u16, start: u32) -> Option<Outcome> {
    match kind {
        ETH_IPV4 => judge_v4(tables, frame, start),
        ETH_IPV6 => judge_v6(tables, frame, start),
        _ => None,
    }
}

/// The same for a frame that begins with its IP header.
#[inline(always)]
pub fn judge_bare(tables: &impl Tables, frame: &impl Frame) -> Option<Outcome> {
    let [word] = frame.near(0)?;
    match word.to_ne_bytes()[0] >> 4 {
        4 => judge_v4(tables, frame, 0),
        6 => judge_v6(tables, frame, 0),
        _ => None,
    }
}

#[inline(always)]
fn judge_v4(tables: &impl Tables, frame: &impl Frame, start: u32) -> Option<Outcome> {
    let [first, fragment, kind, src, dst] = frame.near(start)?;
    let version = first.to_ne_bytes()[0];
    let header = u32::from(version & 0x0f) * 4;
    let later = halves(fragment).1 & V4_OFFSET != 0;
    if kind.to_ne_bytes()[1] != protocol::UDP || later || version >> 4 != 4 || header < IPV4_BYTES {
        return None;
    }
    let near = header == IPV4_BYTES;
    let at = start + if near { IPV4_BYTES } else { header };
    let (class, count) = to_us(tables, frame, Place { at, near })?;
    let (src, dst) = (Addr::from_v4_word(src), Addr::from_v4_word(dst));
    judge(tables, src, dst, class, count)
}

#[inline(always)]
fn judge_v6(tables: &impl Tables, frame: &impl Frame, start: u32) -> Option<Outcome> {
    let words: [u32; 10] = frame.near(start)?;
    let [_, w1, s0, s1, s2, s3, d0, d1, d2, d3] = words;
    let next = w1.to_ne_bytes()[2];
    let place = if next == protocol::UDP {
        Place {
            at: start + IPV6_BYTES,
            near: true,
        }
    } else {
        behind_extensions(frame, next, start + IPV6_BYTES)?
    };
    let (class, count) = to_us(tables, frame, place)?;
    let src = Addr {
        words: [s0, s1, s2, s3],
    };
    let dst = Addr {
        words: [d0, d1, d2, d3],
    };
    judge(tables, src, dst, class, count)
}

/// Where the UDP header is behind extension headers; `None` if there is none, or if it is in
/// another fragment.
#[inline(always)]
fn behind_extensions(frame: &impl Frame, first: u8, start: u32) -> Option<Place> {
    let (mut next, mut at) = (first, start);
    for _ in 0..MAX_EXTENSIONS {
        let bytes = match next {
            protocol::HOP_BY_HOP | protocol::DESTINATION | protocol::ROUTING => {
                let [word] = frame.far(at)?;
                let [after, length, ..] = word.to_ne_bytes();
                next = after;
                (u32::from(length) + 1) * 8
            }
            protocol::FRAGMENT => {
                let [word] = frame.far(at)?;
                if halves(word).1 & V6_OFFSET != 0 {
                    return None;
                }
                next = word.to_ne_bytes()[0];
                8
            }
            _ => return None,
        };
        at += bytes;
        if next == protocol::UDP {
            return Some(Place { at, near: false });
        }
    }
    None
}

/// What a datagram is that goes to our port, and how many it stands for; `None` for another port.
#[inline(always)]
fn to_us(tables: &impl Tables, frame: &impl Frame, udp: Place) -> Option<(Class, u32)> {
    let [ports, length] = udp.read(frame, 0)?;
    let (port, bytes) = (u32::from(halves(ports).1), u32::from(halves(length).0));
    if port == 0 || tables.config()?.port != port {
        return None;
    }
    let Some(payload) = bytes.checked_sub(UDP_BYTES) else {
        return Some((Class::Other, 1));
    };
    let (payload, count) = frame.segments().unwrap_or((payload, 1));
    if payload < HEAD_BYTES {
        return Some((Class::Other, count));
    }
    let head = udp.read(frame, UDP_BYTES)?;
    Some((classify(payload, head), count))
}

#[inline(always)]
fn judge(tables: &impl Tables, src: Addr, dst: Addr, class: Class, count: u32) -> Option<Outcome> {
    Some(match class {
        Class::Response => Outcome::Response,
        Class::Cookie => Outcome::Cookie,
        Class::Data => Outcome::Data,
        Class::Disco => Outcome::Disco,
        Class::Stun => Outcome::Stun,
        Class::Initiation | Class::Other if !tables.is_own(&dst) => return None,
        Class::Initiation => admit(tables, src, count),
        Class::Other if tables.config()?.forwards != 0 => Outcome::Foreign,
        Class::Other => Outcome::Other,
    })
}

/// Whether an initiation is within the limits. Two processors may lose a count to each other: limits
/// bound a rate, they do not keep accounts.
#[inline(always)]
fn admit(tables: &impl Tables, src: Addr, count: u32) -> Outcome {
    let now_ns = tables.now_ns();
    let prefix = prefix_of(&src);
    match PREFIX.take(tables.paid(&prefix).unwrap_or(0), count, now_ns) {
        Some(until) => tables.pay(&prefix, until),
        None => return Outcome::PrefixLimit,
    }
    if tables.has_peer(&prefix) {
        return Outcome::Initiation;
    }
    let Some(paid) = tables.all_paid() else {
        return Outcome::Initiation;
    };
    match TOTAL.take(paid, count, now_ns) {
        Some(until) => {
            tables.pay_all(until);
            Outcome::Initiation
        }
        None => Outcome::TotalLimit,
    }
}

/// The prefix that an address shares its limit with: /24 of IPv4, /48 of IPv6.
#[inline(always)]
#[must_use]
pub const fn prefix_of(addr: &Addr) -> Addr {
    let [a, b, _, d] = addr.words;
    if addr.is_v4() {
        let mask = u32::from_ne_bytes([0xff, 0xff, 0xff, 0]);
        return Addr::from_v4_word(d & mask);
    }
    let mask = u32::from_ne_bytes([0xff, 0xff, 0, 0]);
    Addr {
        words: [a, b & mask, 0, 0],
    }
}

/// A rate, and what may come at once.
struct Limit {
    interval_ns: u64,
    burst_ns: u64,
}

impl Limit {
    const fn new(rate: u64, burst: u64) -> Self {
        Self {
            interval_ns: SECOND_NS / rate,
            burst_ns: SECOND_NS / rate * burst,
        }
    }

    /// Until when all is paid for with so many more, if they are within the limit.
    #[inline(always)]
    const fn take(&self, paid_ns: u64, count: u32, now_ns: u64) -> Option<u64> {
        let from = if paid_ns > now_ns { paid_ns } else { now_ns };
        let until = from + self.interval_ns * count as u64;
        if until - now_ns > self.burst_ns {
            return None;
        }
        Some(until)
    }
}

/// The two 16-bit numbers of four bytes.
#[inline(always)]
const fn halves(word: u32) -> (u16, u16) {
    let [a, b, c, d] = word.to_ne_bytes();
    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}
