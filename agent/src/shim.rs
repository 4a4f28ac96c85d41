//! Relayed data: between the kernel's WireGuard and the connections to relays.
//!
//! ```text
//! wg ── to 127.x.y.z:PORT ──► one UDP socket on lo ──► Forward (the peer's relay)
//! wg ◄── from 127.x.y.z:PORT, or as from the wanted endpoint ── raw sockets on lo ◄── inject()
//! ```
//!
//! Each relayed peer has a loopback address on this node, which the kernel is told as its endpoint:
//! so WireGuard's datagrams say by their destination whom they are for. The socket is bound to `lo`,
//! and a filter leaves it deaf to anything that does not come from WireGuard's own port, which the
//! kernel holds: no other program of this machine can speak through it, and nobody outside.
//!
//! What relays bring is *injected*, headers and all, by raw sockets that are bound to `lo` too. The
//! kernel moves a peer's endpoint to wherever its last packet came from. So while the relay is the
//! wanted path, packets come from the peer's loopback address; and while a direct one is wanted, a
//! late one comes *as from the wanted endpoint*, and moves nothing. A packet that is sent over `lo`
//! carries its route along, so that not even strict `rp_filter` asks where it came from.
//!
//! IPv6 has one catch: the kernel answers from the address that a packet came *to*
//! (`wg_socket_endpoint_from_skb`), and unlike in IPv4 it does not notice that `::1` is the wrong
//! one. So IPv6 packets go to the address that the host itself would send from.
//!
//! Messages of a handshake are kept for a moment, and said again when they got lost between nodes that
//! are not connected to their relays yet ([`handshakes`]).
//!
//! Raw sockets need `CAP_NET_RAW`. The engine decides who is relayed, and how; data never meets it.

pub mod handshakes;

use bytes::Bytes;
use engine::relays::{RelayTable, RelayedPeer};
use handshakes::{Handshakes, Kind};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrIn, SockaddrIn6, SockaddrLike, recvmmsg,
    sendmmsg, setsockopt, sockopt,
};
use proto::id::RegionId;
use proto::key::{KEY_BYTES, NodeKey};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::Notify;

/// Datagrams that one system call takes or gives.
const BATCH: usize = 32;
/// Longest datagram of WireGuard: a jumbo frame.
const MAX_BYTES: usize = 9_216;
/// Datagrams of WireGuard that may wait for us, in bytes: it sends them without asking.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Seconds after which it is said again that data of a peer comes.
const AGAIN: u64 = 5;
/// After an error, so that one that stays does not keep a processor busy.
const PAUSE: Duration = Duration::from_millis(100);
const UDP: u8 = 17;
const UDP_BYTES: usize = 8;
const V4_BYTES: usize = 20;
const V6_BYTES: usize = 40;
/// Hops that an injected packet may go: none beyond this host.
const HOPS: u8 = 1;

/// A packet and its peer.
type Packet = (NodeKey, Bytes);
/// Sends packets to peers by the relay of a region.
pub type Forward = Arc<dyn Fn(RegionId, &[Packet]) + Send + Sync>;

/// The sockets, and who is relayed how.
pub struct Shim {
    wireguard_port: u16,
    port: u16,
    outgoing: UdpSocket,
    v4: Socket,
    /// A host may have no IPv6 at all.
    v6: Option<Socket>,
    table: RwLock<Arc<Table>>,
    handshakes: Mutex<Handshakes>,
    /// A handshake message became due before its time.
    hurried: Notify,
}

/// A [`RelayTable`], ready for look-ups.
struct Table {
    since: Instant,
    by_loopback: BTreeMap<Ipv4Addr, (RegionId, NodeKey)>,
    by_peer: BTreeMap<NodeKey, Rule>,
}

struct Rule {
    region: RegionId,
    from: SocketAddr,
    /// When it was last said that data of this peer comes: seconds after the table came into force,
    /// and one; 0: never.
    said: AtomicU64,
}

impl Table {
    fn empty() -> Self {
        Self {
            since: Instant::now(),
            by_loopback: BTreeMap::new(),
            by_peer: BTreeMap::new(),
        }
    }

    fn region_of(&self, peer: &NodeKey) -> Option<RegionId> {
        self.by_peer.get(peer).map(|rule| rule.region)
    }
}

impl Rule {
    /// Whether it is to be said that data of this peer comes.
    fn is_news(&self, now: u64) -> bool {
        let said = self.said.load(Ordering::Relaxed);
        let news = said == 0 || now - said.min(now) >= AGAIN;
        if news {
            self.said.store(now, Ordering::Relaxed);
        }
        news
    }
}

impl Shim {
    /// Opens the sockets: on the port after WireGuard's, or any other if somebody has that one.
    ///
    /// # Errors
    /// What the kernel says: `EPERM` without `CAP_NET_RAW`.
    pub fn open(wireguard_port: u16) -> io::Result<Arc<Self>> {
        let outgoing = listen(wireguard_port)?;
        let port = outgoing.local_addr()?.port();
        let v4 = raw(Domain::IPV4)?;
        v4.bind_device(Some(b"lo"))?;
        Ok(Arc::new(Self {
            wireguard_port,
            port,
            outgoing,
            v4,
            v6: raw(Domain::IPV6).ok(),
            table: RwLock::new(Arc::new(Table::empty())),
            handshakes: Mutex::new(Handshakes::new(NodeKey([0; KEY_BYTES]))),
            hurried: Notify::new(),
        }))
    }

    /// This is the key of our WireGuard, from now on.
    pub fn set_identity(&self, me: NodeKey) {
        self.with_handshakes(|handshakes| *handshakes = Handshakes::new(me));
    }

    /// The port of all loopback addresses.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on peers are relayed so.
    pub fn set(&self, table: &RelayTable) {
        let mut new = Table::empty();
        for (
            key,
            RelayedPeer {
                region,
                loopback,
                appear_as,
            },
        ) in &table.peers
        {
            if let SocketAddr::V4(addr) = loopback {
                new.by_loopback.insert(*addr.ip(), (*region, *key));
            }
            let rule = Rule {
                region: *region,
                from: appear_as.unwrap_or(*loopback),
                said: AtomicU64::new(0),
            };
            new.by_peer.insert(*key, rule);
        }
        let new = Arc::new(new);
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *table, Arc::clone(&new));
        drop(table);
        self.with_handshakes(|handshakes| {
            let unanswered: Vec<NodeKey> = handshakes.unanswered().copied().collect();
            for key in unanswered {
                if new.region_of(&key) != old.region_of(&key) {
                    handshakes.moved(Instant::now(), &key);
                }
            }
        });
        self.hurried.notify_one();
    }

    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives peers' packets to WireGuard, and returns the peers of whom these were the first since
    /// [`Shim::set`], or for some seconds. A packet of nobody we know is dropped, and so is one that the kernel does not
    /// take at once.
    pub fn inject(&self, packets: &[Packet]) -> Vec<NodeKey> {
        let table = self.table();
        let now = table.since.elapsed().as_secs() + 1;
        let mut first = Vec::new();
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (key, packet) in packets {
            let Some(rule) = table.by_peer.get(key) else {
                continue;
            };
            if rule.is_news(now) {
                first.push(*key);
            }
            if Kind::of(packet).is_some() && !self.is_for_kernel(*key, packet) {
                continue;
            }
            match rule.from {
                SocketAddr::V4(from) => {
                    let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.wireguard_port);
                    v4.extend(header_v4(from, to, packet).map(|header| (header, packet)));
                }
                SocketAddr::V6(from) => {
                    let header = own_v6(from).and_then(|own| {
                        let to = SocketAddrV6::new(own, self.wireguard_port, 0, 0);
                        Some((to, header_v6(from, to, packet)?))
                    });
                    v6.extend(header.map(|(to, header)| (to, header, packet)));
                }
            }
        }
        for batch in v4.chunks(BATCH) {
            let to = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
            let slices: Vec<_> = batch
                .iter()
                .map(|(header, packet)| [IoSlice::new(header), IoSlice::new(packet)])
                .collect();
            send(&self.v4, &slices, &vec![Some(to); batch.len()]);
        }
        if let Some(socket) = &self.v6 {
            for batch in v6.chunks(BATCH) {
                // A port other than 0 would be taken for a protocol number (`rawv6_sendmsg`).
                let to = |to: &SocketAddrV6| SocketAddrV6::new(*to.ip(), 0, 0, 0);
                let to: Vec<_> = batch
                    .iter()
                    .map(|(addr, ..)| Some(SockaddrIn6::from(to(addr))))
                    .collect();
                let slices: Vec<_> = batch
                    .iter()
                    .map(|(_, header, packet)| [IoSlice::new(header), IoSlice::new(packet)])
                    .collect();
                send(socket, &slices, &to);
            }
        }
        first
    }

    /// Whether a peer's handshake message is given to WireGuard.
    fn is_for_kernel(&self, from: NodeKey, packet: &Bytes) -> bool {
        let received = |it: &mut Handshakes| it.received(Instant::now(), from, packet);
        let is_for_kernel = self.with_handshakes(received);
        if !is_for_kernel {
            self.hurried.notify_one();
        }
        is_for_kernel
    }

    fn with_handshakes<T>(&self, use_them: impl FnOnce(&mut Handshakes) -> T) -> T {
        use_them(
            &mut self
                .handshakes
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// Forwards what WireGuard sends, for as long as the task lives.
    pub async fn run(self: Arc<Self>, forward: Forward) {
        let mut buffers = vec![[0; MAX_BYTES]; BATCH];
        loop {
            let descriptor = self.outgoing.as_raw_fd();
            let deadline = self.with_handshakes(|it| it.deadline(Instant::now()));
            let received = self
                .outgoing
                .async_io(Interest::READABLE, || receive(descriptor, &mut buffers));
            tokio::select! {
                received = received => match received {
                    Ok(datagrams) => self.forward(&datagrams, &buffers, &forward),
                    Err(error) => {
                        tracing::warn!(%error, "relayed packets of WireGuard cannot be received");
                        tokio::time::sleep(PAUSE).await;
                    }
                },
                () = until(deadline) => {}
                () = self.hurried.notified() => {}
            }
            self.repeat(&forward);
        }
    }

    /// Says again what is due of handshakes.
    fn repeat(&self, forward: &Forward) {
        let due = self.with_handshakes(|it| it.due(Instant::now()));
        if due.is_empty() {
            return;
        }
        let table = self.table();
        for (peer, packet) in due {
            if let Some(region) = table.region_of(&peer) {
                forward(region, &[(peer, packet)]);
            }
        }
    }

    fn forward(
        &self,
        datagrams: &[(Ipv4Addr, usize)],
        buffers: &[[u8; MAX_BYTES]],
        forward: &Forward,
    ) {
        let table = self.table();
        let mut by_region: BTreeMap<RegionId, Vec<Packet>> = BTreeMap::new();
        for ((to, length), buffer) in datagrams.iter().zip(buffers) {
            if let Some((region, peer)) = table.by_loopback.get(to)
                && let Some(bytes) = buffer.get(..*length)
            {
                let bytes = Bytes::copy_from_slice(bytes);
                if Kind::of(&bytes).is_some() {
                    self.with_handshakes(|it| it.sent(Instant::now(), *peer, &bytes));
                }
                by_region.entry(*region).or_default().push((*peer, bytes));
            }
        }
        for (region, packets) in by_region {
            forward(region, &packets);
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The socket that WireGuard sends to.
fn listen(wireguard_port: u16) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    socket.attach_filter(&only_from(wireguard_port))?;
    socket.bind_device(Some(b"lo"))?;
    let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let next = wireguard_port.checked_add(1).unwrap_or(0);
    socket
        .bind(&any(next).into())
        .or_else(|_| socket.bind(&any(0).into()))?;
    setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
    // A smaller buffer costs packets, not more.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
    UdpSocket::from_std(socket.into())
}

/// A raw socket that sends whole IP packets (raw(7): `IPPROTO_RAW` "implies enabled IP_HDRINCL",
/// in both families) and receives none.
fn raw(domain: Domain) -> io::Result<Socket> {
    const IPPROTO_RAW: i32 = 255;
    let protocol = Some(Protocol::from(IPPROTO_RAW));
    Socket::new(domain, Type::RAW.nonblocking(), protocol)
}

/// Lets through what comes from this port; the packet begins with its UDP header.
fn only_from(port: u16) -> [SockFilter; 4] {
    const LOAD_HALF: u16 = 0x28;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_HALF, 0, 0, 0),
        SockFilter::new(JUMP_EQUAL, 0, 1, port.into()),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

/// Destination and length of each datagram, in the order of `buffers`.
fn receive(
    descriptor: RawFd,
    buffers: &mut [[u8; MAX_BYTES]],
) -> io::Result<Vec<(Ipv4Addr, usize)>> {
    let space = Some(nix::cmsg_space!(libc::in_pktinfo));
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(buffers.len(), space);
    let mut slices: Vec<[IoSliceMut<'_>; 1]> = buffers
        .iter_mut()
        .map(|buffer| [IoSliceMut::new(buffer)])
        .collect();
    let flags = MsgFlags::MSG_DONTWAIT;
    let received = recvmmsg(descriptor, &mut headers, slices.iter_mut(), flags, None)?;
    let datagrams = received.map(|message| {
        let destination = message.cmsgs().ok().and_then(|mut messages| {
            messages.find_map(|message| match message {
                ControlMessageOwned::Ipv4PacketInfo(info) => Some(info.ipi_addr.s_addr),
                _ => None,
            })
        });
        // Without one it is nobody's.
        let destination = destination.map_or(Ipv4Addr::UNSPECIFIED, |addr| {
            Ipv4Addr::from(u32::from_be(addr))
        });
        (destination, message.bytes)
    });
    Ok(datagrams.collect())
}

/// Sends as many as the kernel takes at once.
fn send<S: SockaddrLike + Copy>(socket: &Socket, slices: &[[IoSlice<'_>; 2]], to: &[Option<S>]) {
    let mut headers = MultiHeaders::<S>::preallocate(slices.len(), None);
    let sent = sendmmsg(
        socket.as_raw_fd(),
        &mut headers,
        slices,
        to,
        [],
        MsgFlags::MSG_DONTWAIT,
    );
    if let Err(error) = sent {
        tracing::debug!(%error, "relayed packets could not be given to WireGuard");
    }
}

/// The address that this host sends from to `peer`: where the kernel expects its packets.
fn own_v6(peer: SocketAddrV6) -> Option<Ipv6Addr> {
    // Connecting a UDP socket sends nothing: it is how to ask for the route.
    let socket = std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(peer).ok()?;
    match socket.local_addr().ok()? {
        SocketAddr::V6(own) => Some(*own.ip()),
        SocketAddr::V4(_) => None,
    }
}

/// IPv4 and UDP headers (RFC 791 3.1, RFC 768). The kernel fills in the total length and the IP
/// checksum; UDP needs none in IPv4, and WireGuard has its own.
fn header_v4(
    from: SocketAddrV4,
    to: SocketAddrV4,
    payload: &[u8],
) -> Option<[u8; V4_BYTES + UDP_BYTES]> {
    let length = u16::try_from(UDP_BYTES + payload.len()).ok()?;
    let mut header = [0; V4_BYTES + UDP_BYTES];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&length.checked_add(V4_BYTES as u16)?.to_be_bytes());
    header[8] = HOPS;
    header[9] = UDP;
    header[12..16].copy_from_slice(&from.ip().octets());
    header[16..20].copy_from_slice(&to.ip().octets());
    header[20..22].copy_from_slice(&from.port().to_be_bytes());
    header[22..24].copy_from_slice(&to.port().to_be_bytes());
    header[24..26].copy_from_slice(&length.to_be_bytes());
    Some(header)
}

/// IPv6 and UDP headers (RFC 8200 3 and 8.1: UDP must have a checksum).
fn header_v6(
    from: SocketAddrV6,
    to: SocketAddrV6,
    payload: &[u8],
) -> Option<[u8; V6_BYTES + UDP_BYTES]> {
    let length = u16::try_from(UDP_BYTES + payload.len()).ok()?;
    let mut header = [0; V6_BYTES + UDP_BYTES];
    header[0] = 0x60;
    header[4..6].copy_from_slice(&length.to_be_bytes());
    header[6] = UDP;
    header[7] = HOPS;
    header[8..24].copy_from_slice(&from.ip().octets());
    header[24..40].copy_from_slice(&to.ip().octets());
    header[40..42].copy_from_slice(&from.port().to_be_bytes());
    header[42..44].copy_from_slice(&to.port().to_be_bytes());
    header[44..46].copy_from_slice(&length.to_be_bytes());
    // The pseudo header is the addresses, the length and the protocol.
    let addresses = header.get(8..40)?;
    let udp = header.get(40..)?;
    let pseudo = u32::from(length) + u32::from(UDP);
    let sum = match !fold(pseudo + sum(addresses) + sum(udp) + sum(payload)) {
        0 => u16::MAX,
        sum => sum,
    };
    header[46..48].copy_from_slice(&sum.to_be_bytes());
    Some(header)
}

/// The sum of 16-bit words (RFC 1071); 64 KiB of them stay below 2^32.
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| {
            let low = pair.get(1).copied().unwrap_or_default();
            u32::from(u16::from_be_bytes([pair[0], low]))
        })
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetHeaders, PacketHeaders, TransportHeader};

    /// What another parser reads in an injected packet.
    fn check(packet: &[u8], from: SocketAddr, to: SocketAddr, payload: &[u8]) {
        let read = PacketHeaders::from_ip_slice(packet).unwrap();
        let Some(TransportHeader::Udp(udp)) = read.transport else {
            panic!("no UDP");
        };
        assert_eq!(
            (udp.source_port, udp.destination_port),
            (from.port(), to.port())
        );
        assert_eq!(read.payload.slice(), payload);
        match read.net.unwrap() {
            NetHeaders::Ipv4(ip, _) => {
                let ends = (from.ip(), to.ip());
                let ip: (Ipv4Addr, Ipv4Addr) = (ip.source.into(), ip.destination.into());
                assert_eq!((ip.0.into(), ip.1.into()), ends);
                assert_eq!(udp.checksum, 0);
            }
            NetHeaders::Ipv6(ip, _) => {
                let sum = udp.calc_checksum_ipv6(&ip, payload).unwrap();
                assert_eq!(udp.checksum, sum);
                let ip: (Ipv6Addr, Ipv6Addr) = (ip.source.into(), ip.destination.into());
                assert_eq!(
                    (std::net::IpAddr::from(ip.0), ip.1.into()),
                    (from.ip(), to.ip())
                );
            }
            NetHeaders::Arp(_) => panic!("no IP"),
        }
    }

    #[test]
    fn injected_packets_are_what_they_say() {
        for payload in [&b""[..], b"odd", &[0xff; 1_452]] {
            let (from, to): (SocketAddrV4, SocketAddrV4) = (
                "198.51.100.7:40001".parse().unwrap(),
                "127.0.0.1:51820".parse().unwrap(),
            );
            let mut packet = header_v4(from, to, payload).unwrap().to_vec();
            packet.extend_from_slice(payload);
            check(&packet, from.into(), to.into(), payload);
            let (from, to): (SocketAddrV6, SocketAddrV6) = (
                "[2001:db8::7]:40001".parse().unwrap(),
                "[2001:db8::1]:51820".parse().unwrap(),
            );
            let mut packet = header_v6(from, to, payload).unwrap().to_vec();
            packet.extend_from_slice(payload);
            check(&packet, from.into(), to.into(), payload);
        }
        let from = "198.51.100.7:40001".parse().unwrap();
        assert_eq!(header_v4(from, from, &[0; 65_530]), None, "too long for IP");
    }
}
