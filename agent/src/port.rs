//! STUN and discovery on WireGuard's own UDP port, beside the kernel's socket and without its
//! knowledge.
//!
//! The kernel owns the port: a second UDP socket on it cannot be bound, whatever its options (the
//! kernel's has no `SO_REUSEPORT`). Raw sockets need no port. One per family *receives* a copy of
//! the UDP datagrams that have our port as destination and STUN's magic cookie or discovery's magic
//! where it belongs; a classic BPF filter leaves everything else to the kernel, so the agent sleeps
//! while tunnels carry traffic. The same sockets *send*: we write the UDP header, so the source port
//! is WireGuard's and a NAT makes one mapping for all. The WireGuard device receives these packets
//! too, and drops what is not WireGuard.
//!
//! What is sent goes whole or not at all, and as long as its interface takes: a ping that is answered
//! says that packets of its length pass. Word of a shorter MTU, which the kernel may have from
//! anybody, does not count here.
//!
//! Packets pass the host's own firewall like any others, before the raw socket sees them: a firewall
//! that lets in the WireGuard port, or only answers, suffices.
//!
//! Raw sockets need `CAP_NET_RAW`. Nothing here decides whom to ask, or when, and nothing here
//! opens what is sealed.

use proto::derp::{DISCO_MAGIC, is_disco};
use proto::stun::{self, TRANSACTION_BYTES, Transaction};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;
use tokio::sync::mpsc::{self, error::TrySendError};

/// Words that may wait to be sent.
const QUEUE: usize = 256;
/// An answer that takes longer is nobody's.
const PATIENCE: Duration = Duration::from_secs(5);
/// Questions that wait for an answer; more are forgotten, the oldest first.
const MAX_PENDING: usize = 256;
/// Longest datagram that is looked at, its IP header included.
const MAX_BYTES: usize = 9_216;
/// After an error, so that one that stays does not keep a processor busy.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes of a UDP header (RFC 768).
const UDP_BYTES: usize = 8;
/// The protocol number of UDP.
const UDP: u8 = 17;
/// RFC 8489 5.
const MAGIC_COOKIE: u32 = 0x2112_a442;

/// A server answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Who.
    pub server: SocketAddr,
    /// Where it saw our question come from.
    pub mapped: SocketAddr,
}

/// What came to the port.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A server answered.
    Answer(Answer),
    /// A discovery packet, sealed as it came.
    Disco {
        /// Where it came from.
        from: SocketAddr,
        /// All of it.
        bytes: Vec<u8>,
    },
}

/// What is to leave from the port.
#[derive(Debug)]
pub enum Word {
    /// A question to a STUN server.
    Ask(SocketAddr),
    /// These bytes.
    Send {
        /// Where to.
        to: SocketAddr,
        /// All of them.
        bytes: Vec<u8>,
    },
}

impl Word {
    fn to(&self) -> SocketAddr {
        match self {
            Self::Ask(to) | Self::Send { to, .. } => *to,
        }
    }
}

/// Opens the sockets and starts to serve: every word that comes in is sent, and events come out,
/// until one of the channels closes. Discovery that nobody takes in time is dropped: anybody can
/// send it.
///
/// # Errors
/// What the kernel says: `EPERM` without `CAP_NET_RAW`.
pub fn spawn(port: u16, events: mpsc::Sender<Event>) -> io::Result<mpsc::Sender<Word>> {
    let v4 = open(Domain::IPV4, &filter_v4(port))?;
    set_ip_mtu_discover(&v4, Ipv4PathMtuDiscovery::PROBE)?;
    // A host may have no IPv6 at all.
    let v6 = open(Domain::IPV6, &filter_v6(port)).ok();
    if let Some(v6) = &v6 {
        set_ipv6_mtu_discover(v6, Ipv6PathMtuDiscovery::PROBE)?;
    }
    let (words_in, words) = mpsc::channel(QUEUE);
    tokio::spawn(serve(port, v4, v6, words, events));
    Ok(words_in)
}

async fn serve(
    port: u16,
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    mut words: mpsc::Receiver<Word>,
    events: mpsc::Sender<Event>,
) {
    let mut pending = Pending::default();
    let mut buffers = [vec![0; MAX_BYTES], vec![0; MAX_BYTES]];
    loop {
        let [buffer_v4, buffer_v6] = &mut buffers;
        let received = tokio::select! {
            word = words.recv() => {
                let Some(word) = word else { return };
                let to = word.to();
                let socket = if to.is_ipv4() { Some(&v4) } else { v6.as_ref() };
                if let Some(socket) = socket
                    && let Err(error) = say(socket, port, word, &mut pending)
                {
                    tracing::debug!(%to, %error, "nothing could be sent from the WireGuard port");
                }
                continue;
            }
            received = receive(Some(&v4), buffer_v4, after_header) => received,
            received = receive(v6.as_ref(), buffer_v6, |packet| Some(packet)) => received,
        };
        let datagram = match received {
            Ok(Some(datagram)) => datagram,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(%error, "nothing can be received on the WireGuard port");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let event = if is_disco(&datagram.payload) {
            Some(Event::Disco {
                from: datagram.from,
                bytes: datagram.payload,
            })
        } else {
            pending.answer(&datagram).map(Event::Answer)
        };
        if let Some(event) = event
            && let Err(TrySendError::Closed(_)) = events.try_send(event)
        {
            return;
        }
    }
}

/// A raw socket. To receive and to send it is used like a UDP socket, which is what tokio takes it
/// for.
fn open(domain: Domain, filter: &[Op]) -> io::Result<UdpSocket> {
    let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::UDP))?;
    let filter = filter
        .iter()
        .map(|(code, yes, no, k)| SockFilter::new(*code, *yes, *no, *k));
    socket.attach_filter(&filter.collect::<Vec<_>>())?;
    let socket = UdpSocket::from_std(socket.into())?;
    // What came in before the filter stood is of any kind; it is read and thrown away.
    while socket.try_recv(&mut [0]).is_ok() {}
    Ok(socket)
}

/// A UDP datagram without its header, and who sent it.
struct Datagram {
    from: SocketAddr,
    payload: Vec<u8>,
}

/// The next datagram, once there is one. `None`: one that makes no sense.
async fn receive(
    socket: Option<&UdpSocket>,
    buffer: &mut [u8],
    udp: impl Fn(&[u8]) -> Option<&[u8]>,
) -> io::Result<Option<Datagram>> {
    let Some(socket) = socket else {
        return std::future::pending().await;
    };
    let (length, from) = socket.recv_from(buffer).await?;
    let read = || {
        let (header, payload) = udp(buffer.get(..length)?)?.split_first_chunk::<UDP_BYTES>()?;
        let [p0, p1, ..] = *header;
        Some(Datagram {
            from: SocketAddr::new(from.ip(), u16::from_be_bytes([p0, p1])),
            payload: payload.to_vec(),
        })
    };
    Ok(read())
}

/// Raw IPv4 sockets deliver the IP header too (raw(7)), IPv6 ones do not (RFC 3542 3).
fn after_header(packet: &[u8]) -> Option<&[u8]> {
    let words = usize::from(packet.first()? & 0xf);
    packet.get(words * 4..)
}

fn say(socket: &UdpSocket, port: u16, word: Word, pending: &mut Pending) -> io::Result<()> {
    match word {
        Word::Send { to, bytes } => send(socket, port, to, &bytes),
        Word::Ask(server) => {
            let mut transaction = [0; TRANSACTION_BYTES];
            getrandom::fill(&mut transaction).map_err(|_| io::Error::other("no random bytes"))?;
            send(socket, port, server, &stun::request(transaction))?;
            pending.note(transaction, server);
            Ok(())
        }
    }
}

fn send(socket: &UdpSocket, port: u16, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
    let datagram = udp(SocketAddr::new(source(to)?, port), to, payload);
    // A port other than 0 would be taken for a protocol number (`rawv6_sendmsg`).
    let to = SocketAddr::new(to.ip(), 0);
    socket.try_send_to(&datagram, to).map(drop)
}

/// The address that the kernel sends from to `peer`.
fn source(peer: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Connecting a UDP socket sends nothing: it is how to ask for the route.
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}

/// A UDP datagram with its header (RFC 768).
fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(UDP_BYTES + payload.len()).unwrap_or(u16::MAX);
    let mut out = Vec::with_capacity(usize::from(length));
    for word in [from.port(), to.port(), length, 0] {
        out.extend_from_slice(&word.to_be_bytes());
    }
    out.extend_from_slice(payload);
    // RFC 768: "If the computed checksum is zero, it is transmitted as all ones".
    let sum = match checksum(from.ip(), to.ip(), &out) {
        0 => u16::MAX,
        sum => sum,
    };
    out[6..8].copy_from_slice(&sum.to_be_bytes());
    out
}

/// The Internet checksum over pseudo header and datagram (RFC 768, RFC 8200 8.1).
fn checksum(from: IpAddr, to: IpAddr, datagram: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    for addr in [from, to] {
        match addr {
            IpAddr::V4(addr) => bytes.extend_from_slice(&addr.octets()),
            IpAddr::V6(addr) => bytes.extend_from_slice(&addr.octets()),
        }
    }
    let length = u16::try_from(datagram.len()).unwrap_or(u16::MAX);
    bytes.extend_from_slice(&[0, UDP]);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(datagram);
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or_default();
        sum += u32::from(u16::from_be_bytes([pair[0], low]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Questions that wait for an answer.
#[derive(Default)]
struct Pending {
    asked: BTreeMap<Transaction, (SocketAddr, Instant)>,
}

impl Pending {
    fn note(&mut self, transaction: Transaction, server: SocketAddr) {
        let now = Instant::now();
        self.asked
            .retain(|_, (_, at)| now.saturating_duration_since(*at) < PATIENCE);
        if self.asked.len() < MAX_PENDING {
            self.asked.insert(transaction, (server, now));
        }
    }

    /// What an answer says, if it is one to a question of ours, from whom we asked.
    fn answer(&mut self, datagram: &Datagram) -> Option<Answer> {
        let (transaction, mapped) = stun::parse_response(&datagram.payload).ok()?;
        let (server, _) = *self.asked.get(&transaction)?;
        if server != datagram.from {
            return None;
        }
        self.asked.remove(&transaction);
        Some(Answer { server, mapped })
    }
}

/// Opcodes of classic BPF (linux/filter.h).
mod op {
    pub const LOAD_HEADER_LENGTH: u16 = 0xb1;
    pub const LOAD_HALF: u16 = 0x28;
    pub const LOAD_WORD: u16 = 0x20;
    pub const LOAD_HALF_AFTER: u16 = 0x48;
    pub const LOAD_WORD_AFTER: u16 = 0x40;
    pub const JUMP_EQUAL: u16 = 0x15;
    pub const RETURN: u16 = 0x06;
}

/// The first four bytes of [`DISCO_MAGIC`], and the last two.
const DISCO_HEAD: u32 = first_word(DISCO_MAGIC);
const DISCO_TAIL: u32 = last_half(DISCO_MAGIC);

const fn first_word([a, b, c, d, ..]: [u8; 6]) -> u32 {
    u32::from_be_bytes([a, b, c, d])
}

const fn last_half([.., e, f]: [u8; 6]) -> u32 {
    u32::from_be_bytes([0, 0, e, f])
}

/// An instruction: code, how far to jump if it is so and if not, operand.
type Op = (u16, u8, u8, u32);

/// Lets STUN and discovery to `port` through. The packet begins with its IPv4 header.
fn filter_v4(port: u16) -> [Op; 11] {
    [
        (op::LOAD_HEADER_LENGTH, 0, 0, 0),
        (op::LOAD_HALF_AFTER, 0, 0, 2),
        (op::JUMP_EQUAL, 0, 7, port.into()),
        (op::LOAD_WORD_AFTER, 0, 0, 12),
        (op::JUMP_EQUAL, 4, 0, MAGIC_COOKIE),
        (op::LOAD_WORD_AFTER, 0, 0, 8),
        (op::JUMP_EQUAL, 0, 3, DISCO_HEAD),
        (op::LOAD_HALF_AFTER, 0, 0, 12),
        (op::JUMP_EQUAL, 0, 1, DISCO_TAIL),
        (op::RETURN, 0, 0, u32::MAX),
        (op::RETURN, 0, 0, 0),
    ]
}

/// The same; the packet begins with its UDP header.
fn filter_v6(port: u16) -> [Op; 10] {
    [
        (op::LOAD_HALF, 0, 0, 2),
        (op::JUMP_EQUAL, 0, 7, port.into()),
        (op::LOAD_WORD, 0, 0, 12),
        (op::JUMP_EQUAL, 4, 0, MAGIC_COOKIE),
        (op::LOAD_WORD, 0, 0, 8),
        (op::JUMP_EQUAL, 0, 3, DISCO_HEAD),
        (op::LOAD_HALF, 0, 0, 12),
        (op::JUMP_EQUAL, 0, 1, DISCO_TAIL),
        (op::RETURN, 0, 0, u32::MAX),
        (op::RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_right_in_both_families() {
        for (from, to) in [
            ("192.0.2.1:51820", "198.51.100.7:3478"),
            ("[2001:db8::1]:51820", "[2001:db8::7]:3478"),
        ] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            for payload in [&b"even"[..], b"odd"] {
                let datagram = udp(from, to, payload);
                assert_eq!(
                    checksum(from.ip(), to.ip(), &datagram),
                    0,
                    "the receiver's test"
                );
                assert_eq!(datagram.len(), 8 + payload.len());
            }
        }
        // Summed up by hand: 7f00 + 1 + 7f00 + 1, 11 + 8, 1 + 2 + 8.
        let (from, to): (SocketAddr, SocketAddr) = (
            "127.0.0.1:1".parse().unwrap(),
            "127.0.0.1:2".parse().unwrap(),
        );
        assert_eq!(udp(from, to, b"")[6..8], (!0xfe26_u16).to_be_bytes());
    }

    #[test]
    fn only_answers_to_our_questions_from_whom_we_asked_count() {
        let server: SocketAddr = "192.0.2.1:3478".parse().unwrap();
        let mapped: SocketAddr = "198.51.100.1:4".parse().unwrap();
        let mut pending = Pending::default();
        pending.note([7; 12], server);
        let datagram = |from, transaction| Datagram {
            from,
            payload: stun::response(transaction, mapped),
        };
        let stranger = "192.0.2.2:3478".parse().unwrap();
        assert_eq!(pending.answer(&datagram(stranger, [7; 12])), None);
        assert_eq!(pending.answer(&datagram(server, [8; 12])), None);
        let answer = Answer { server, mapped };
        assert_eq!(pending.answer(&datagram(server, [7; 12])), Some(answer));
        assert_eq!(pending.answer(&datagram(server, [7; 12])), None, "once");
    }

    /// What a filter says of a packet, as the kernel runs it: an access beyond the end is a no.
    fn passes(filter: &[Op], packet: &[u8]) -> bool {
        let load = |at: usize, length: usize| {
            let bytes = packet.get(at..at + length)?;
            Some(
                bytes
                    .iter()
                    .fold(0, |sum, byte| sum << 8 | u32::from(*byte)),
            )
        };
        let (mut a, mut x, mut at) = (0, 0, 0);
        loop {
            let (code, yes, no, k) = filter[at];
            let place = k as usize;
            at += 1;
            let loaded = match code {
                op::LOAD_HEADER_LENGTH => {
                    x = usize::from(packet[place] & 15) * 4;
                    continue;
                }
                op::JUMP_EQUAL => {
                    at += usize::from(if a == k { yes } else { no });
                    continue;
                }
                op::RETURN => return k != 0,
                op::LOAD_HALF => load(place, 2),
                op::LOAD_WORD => load(place, 4),
                op::LOAD_HALF_AFTER => load(x + place, 2),
                op::LOAD_WORD_AFTER => load(x + place, 4),
                other => panic!("{other:#x}"),
            };
            match loaded {
                Some(loaded) => a = loaded,
                None => return false,
            }
        }
    }

    #[test]
    fn filters_pass_stun_and_discovery_to_our_port_and_nothing_else() {
        let mut disco = DISCO_MAGIC.to_vec();
        disco.resize(80, 1);
        let mut almost = disco.clone();
        almost[5] ^= 1;
        let wireguard = [&[4, 0, 0, 0][..], &[7; 28]].concat();
        let stun = stun::request([9; 12]);
        for (payload, port, expected) in [
            (&disco, 51820, true),
            (&disco, 51821, false),
            (&almost, 51820, false),
            (&stun, 51820, true),
            (&stun, 1, false),
            (&wireguard, 51820, false),
            (&Vec::new(), 51820, false),
        ] {
            let from: SocketAddr = "192.0.2.1:9".parse().unwrap();
            let to = SocketAddr::new(from.ip(), port);
            let datagram = udp(from, to, payload);
            assert_eq!(
                passes(&filter_v6(51820), &datagram),
                expected,
                "{payload:?}"
            );
            for words in [5, 6, 15] {
                let mut packet = vec![0x40 | words; usize::from(words) * 4];
                packet.extend_from_slice(&datagram);
                assert_eq!(passes(&filter_v4(51820), &packet), expected, "{payload:?}");
            }
        }
    }

    #[test]
    fn the_length_of_the_ip_header_is_believed_only_within_the_packet() {
        assert_eq!(after_header(&[]), None);
        assert_eq!(after_header(&[0x4f; 20]), None);
        assert_eq!(after_header(&[0x45; 28]).map(<[u8]>::len), Some(8));
    }
}
