//! WireGuard by generic netlink (include/uapi/linux/wireguard.h), on one blocking socket.
//!
//! Written on the socket of the netlink crates that `route` uses anyway, with our own few
//! attributes ([`message`]), because the ready-made clients cannot do what a mesh needs: update a
//! peer without re-creating one that was just removed (`UPDATE_ONLY`), give a peer more than a few
//! hundred prefixes, or change a peer without touching the link. It also keeps the private key,
//! which the kernel puts into every dump, out of buffers and logs that are not ours: all buffers
//! here are wiped.
//!
//! Peers go out many to a message, each peer whole in one: its prefixes change in one step, without
//! a moment in which one that stays is missing. A dump may split a device over many messages, and
//! a peer over two; [`WireGuard::dump`] puts them together and starts over if the peers changed
//! meanwhile.

mod message;

use engine::plan::{PeerChange, PeerState};
use message::{Attributes, Message, Nest};
use proto::key::{KEY_BYTES, NodeKey};
use proto::net::Prefix;
use rtnetlink::sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_GENERIC};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;
use zeroize::Zeroizing;

/// Peers are put into one message up to this size. One nested attribute holds at most 64 KiB; a
/// peer with the most routes that a node may have takes about 41 KiB.
const MESSAGE_BYTES: usize = 20 << 10;
/// Room for one read: the kernel writes dumps in pieces of at most 32 KiB.
const READ_BYTES: usize = 64 << 10;
/// How often a dump that was interrupted by a change is started over.
const DUMP_ATTEMPTS: usize = 5;

/// What a device is, as WireGuard tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dump {
    /// Public half of its key; `None` if it has none.
    pub key: Option<NodeKey>,
    /// UDP port; 0 if none is set.
    pub listen_port: u16,
    /// Peers.
    pub peers: BTreeMap<NodeKey, PeerState>,
}

/// What has been written to the kernel since start: the cost of changes, for tests and benches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Messages.
    pub messages: usize,
    /// Peers in them.
    pub peers: usize,
}

/// A way to the WireGuard of the network namespace that it was opened in.
pub struct WireGuard {
    socket: Socket,
    family: u16,
    sequence: u32,
    written: Written,
}

impl WireGuard {
    /// Opens a socket and finds WireGuard's family.
    ///
    /// # Errors
    /// `NotFound` if the kernel has no WireGuard (loaded, or loadable).
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddr::new(0, 0))?;
        let mut wireguard = Self {
            socket,
            family: 0,
            sequence: 0,
            written: Written::default(),
        };
        wireguard.family = wireguard.find_family()?;
        Ok(wireguard)
    }

    /// What has been written so far.
    #[must_use]
    pub fn written(&self) -> Written {
        self.written
    }

    /// Gives the device its private key and its port.
    ///
    /// # Errors
    /// What the kernel says: `AddrInUse` if the port is taken.
    pub fn configure(
        &mut self,
        index: u32,
        secret: &[u8; KEY_BYTES],
        listen_port: u16,
    ) -> io::Result<()> {
        let mut message = self.set_device(index);
        message.bytes(device::PRIVATE_KEY, secret);
        message.bytes(device::LISTEN_PORT, &listen_port.to_ne_bytes());
        self.call(message)
    }

    /// Makes and changes peers, as many to a message as fit.
    ///
    /// # Errors
    /// What the kernel says; the messages before it are done.
    pub fn set_peers(&mut self, index: u32, changes: &[PeerChange]) -> io::Result<()> {
        self.write_peers(index, changes, put_change)
    }

    /// Removes peers; those that are not there are no error.
    ///
    /// # Errors
    /// What the kernel says; the messages before it are done.
    pub fn remove_peers(&mut self, index: u32, keys: &[NodeKey]) -> io::Result<()> {
        self.write_peers(index, keys, put_removal)
    }

    /// Reads the device: one dump.
    ///
    /// # Errors
    /// What the kernel says: `ENODEV` if there is no such device, `EOPNOTSUPP` if it is none of
    /// WireGuard's.
    pub fn dump(&mut self, index: u32) -> io::Result<Dump> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(dump) = self.dump_once(index)? {
                return Ok(dump);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::Interrupted,
            "the peers change faster than they can be read",
        ))
    }

    fn dump_once(&mut self, index: u32) -> io::Result<Option<Dump>> {
        let mut request = self.message(message::DUMP, GET_DEVICE);
        request.bytes(device::IFINDEX, &index.to_ne_bytes());
        let mut dump = Dump::default();
        let consistent = self.exchange(request, |attributes| read_device(attributes, &mut dump))?;
        Ok(consistent.then_some(dump))
    }

    fn write_peers<T>(
        &mut self,
        index: u32,
        items: &[T],
        put: impl Fn(&mut Message, &T),
    ) -> io::Result<()> {
        let mut items = items.iter().peekable();
        while items.peek().is_some() {
            let mut message = self.set_device(index);
            let peers = message.begin(device::PEERS);
            let mut count = 0;
            while message.len() < MESSAGE_BYTES
                && let Some(item) = items.next()
            {
                let one: Nest = message.begin(0);
                put(&mut message, item);
                message.end(one);
                count += 1;
            }
            message.end(peers);
            self.call(message)?;
            self.written.peers += count;
        }
        Ok(())
    }

    fn find_family(&mut self) -> io::Result<u16> {
        let mut request = Message::new(CONTROL_FAMILY, message::ACK, self.next(), GET_FAMILY);
        request.bytes(CONTROL_NAME, b"wireguard\0");
        let mut family = None;
        self.exchange(request, |attributes| {
            for (kind, value) in attributes {
                if kind == CONTROL_ID {
                    family = value.try_into().ok().map(u16::from_ne_bytes);
                }
            }
        })?;
        family.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    fn set_device(&mut self, index: u32) -> Message {
        let mut message = self.message(message::ACK, SET_DEVICE);
        message.bytes(device::IFINDEX, &index.to_ne_bytes());
        message
    }

    fn message(&mut self, flags: u16, command: u8) -> Message {
        Message::new(self.family, flags, self.next(), command)
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn call(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message, |_| ())?;
        self.written.messages += 1;
        Ok(())
    }

    /// Sends `request` and takes in every part of the answer. `false` if a dump was interrupted.
    fn exchange(
        &mut self,
        request: Message,
        mut part: impl FnMut(Attributes<'_>),
    ) -> io::Result<bool> {
        let bytes = request.finish();
        self.socket.send(&bytes, 0)?;
        let sequence = self.sequence;
        let mut consistent = true;
        let mut buffer = Zeroizing::new(Vec::with_capacity(READ_BYTES));
        loop {
            buffer.clear();
            self.socket.recv(&mut *buffer, 0)?;
            for answer in message::answers(&buffer, sequence) {
                consistent &= !answer.interrupted;
                match answer.content {
                    message::Content::Part(attributes) => part(attributes),
                    message::Content::Done(0) => return Ok(consistent),
                    message::Content::Done(errno) => {
                        return Err(io::Error::from_raw_os_error(errno));
                    }
                }
            }
        }
    }
}

fn put_removal(message: &mut Message, key: &NodeKey) {
    message.bytes(peer::PUBLIC_KEY, &key.0);
    message.bytes(peer::FLAGS, &peer::REMOVE_ME.to_ne_bytes());
}

/// One peer of `WGDEVICE_A_PEERS`.
fn put_change(message: &mut Message, change: &PeerChange) {
    let mut flags = 0;
    if !change.create {
        flags |= peer::UPDATE_ONLY;
    }
    if change.replace_allowed_ips {
        flags |= peer::REPLACE_ALLOWEDIPS;
    }
    message.bytes(peer::PUBLIC_KEY, &change.key.0);
    message.bytes(peer::FLAGS, &flags.to_ne_bytes());
    if let Some(endpoint) = change.endpoint {
        message.bytes(peer::ENDPOINT, &sockaddr(endpoint));
    }
    if let Some(keepalive) = change.keepalive {
        message.bytes(peer::KEEPALIVE, &keepalive.to_ne_bytes());
    }
    if change.allowed_ips.is_empty() {
        return;
    }
    let list = message.begin(peer::ALLOWED_IPS);
    for prefix in &change.allowed_ips {
        let one = message.begin(0);
        match prefix.addr() {
            IpAddr::V4(addr) => {
                message.bytes(allowed_ip::FAMILY, &AF_INET.to_ne_bytes());
                message.bytes(allowed_ip::ADDR, &addr.octets());
            }
            IpAddr::V6(addr) => {
                message.bytes(allowed_ip::FAMILY, &AF_INET6.to_ne_bytes());
                message.bytes(allowed_ip::ADDR, &addr.octets());
            }
        }
        message.bytes(allowed_ip::MASK, &[prefix.len()]);
        message.end(one);
    }
    message.end(list);
}

fn read_device(attributes: Attributes<'_>, dump: &mut Dump) {
    for (kind, value) in attributes {
        match kind {
            device::PUBLIC_KEY => dump.key = key(value),
            device::LISTEN_PORT => dump.listen_port = number(value, u16::from_ne_bytes),
            device::PEERS => {
                for (_, value) in Attributes::new(value) {
                    read_peer(Attributes::new(value), dump);
                }
            }
            _ => {}
        }
    }
}

/// One peer, or the rest of the prefixes of one that a message before began.
fn read_peer(attributes: Attributes<'_>, dump: &mut Dump) {
    let find_key = |(kind, value)| (kind == peer::PUBLIC_KEY).then(|| key(value)).flatten();
    let Some(key) = attributes.clone().find_map(find_key) else {
        return;
    };
    let state = dump.peers.entry(key).or_default();
    let stats = &mut state.stats;
    for (kind, value) in attributes {
        match kind {
            peer::ENDPOINT => stats.endpoint = endpoint(value),
            peer::KEEPALIVE => state.keepalive = number(value, u16::from_ne_bytes),
            peer::LAST_HANDSHAKE => stats.last_handshake = timestamp(value),
            peer::RX_BYTES => stats.rx_bytes = number(value, u64::from_ne_bytes),
            peer::TX_BYTES => stats.tx_bytes = number(value, u64::from_ne_bytes),
            peer::ALLOWED_IPS => {
                let prefixes = Attributes::new(value);
                let prefixes = prefixes.filter_map(|(_, value)| prefix(Attributes::new(value)));
                state.allowed_ips.extend(prefixes);
            }
            _ => {}
        }
    }
}

/// A number that the kernel sends whole; 0 should it ever not.
fn number<const N: usize, T: Default>(value: &[u8], from: impl Fn([u8; N]) -> T) -> T {
    value.try_into().map(from).unwrap_or_default()
}

fn key(value: &[u8]) -> Option<NodeKey> {
    value.try_into().ok().map(NodeKey)
}

/// `struct __kernel_timespec`, all zeroes for never.
fn timestamp(value: &[u8]) -> Option<Duration> {
    let seconds: u64 = number(value.get(..8)?, u64::from_ne_bytes);
    let nanos: u64 = number(value.get(8..16)?, u64::from_ne_bytes);
    let at = Duration::from_secs(seconds) + Duration::from_nanos(nanos);
    (!at.is_zero()).then_some(at)
}

fn prefix(attributes: Attributes<'_>) -> Option<Prefix> {
    let (mut addr, mut len) = (None, None);
    for (kind, value) in attributes {
        match kind {
            allowed_ip::ADDR => addr = ip(value),
            allowed_ip::MASK => len = value.first().copied(),
            _ => {}
        }
    }
    Prefix::containing(addr?, len?).ok()
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(value).map(IpAddr::from);
    let v6 = <[u8; 16]>::try_from(value).map(IpAddr::from);
    v4.or(v6).ok()
}

/// `struct sockaddr_in` or `sockaddr_in6`.
fn sockaddr(endpoint: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    let family = if endpoint.is_ipv4() {
        AF_INET
    } else {
        AF_INET6
    };
    bytes.extend(family.to_ne_bytes());
    bytes.extend(endpoint.port().to_be_bytes());
    match endpoint {
        SocketAddr::V4(v4) => {
            bytes.extend(v4.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(v6) => {
            bytes.extend(v6.flowinfo().to_be_bytes());
            bytes.extend(v6.ip().octets());
            bytes.extend(v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

fn endpoint(value: &[u8]) -> Option<SocketAddr> {
    let family: u16 = number(value.get(..2)?, u16::from_ne_bytes);
    let port: u16 = number(value.get(2..4)?, u16::from_be_bytes);
    if family == AF_INET {
        let addr: [u8; 4] = value.get(4..8)?.try_into().ok()?;
        return Some(SocketAddr::new(Ipv4Addr::from(addr).into(), port));
    }
    let addr: [u8; 16] = value.get(8..24)?.try_into().ok()?;
    let scope: u32 = number(value.get(24..28)?, u32::from_ne_bytes);
    Some(SocketAddrV6::new(Ipv6Addr::from(addr), port, 0, scope).into())
}

/// `AF_INET` and `AF_INET6` (include/linux/socket.h).
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// `GENL_ID_CTRL` and what finds a family by name (include/uapi/linux/genetlink.h).
const CONTROL_FAMILY: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const CONTROL_ID: u16 = 1;
const CONTROL_NAME: u16 = 2;

/// `enum wg_cmd`.
const GET_DEVICE: u8 = 0;
const SET_DEVICE: u8 = 1;

/// `enum wgdevice_attribute`.
mod device {
    pub(super) const IFINDEX: u16 = 1;
    pub(super) const PRIVATE_KEY: u16 = 3;
    pub(super) const PUBLIC_KEY: u16 = 4;
    pub(super) const LISTEN_PORT: u16 = 6;
    pub(super) const PEERS: u16 = 8;
}

/// `enum wgpeer_attribute` and `enum wgpeer_flag`.
mod peer {
    pub(super) const PUBLIC_KEY: u16 = 1;
    pub(super) const FLAGS: u16 = 3;
    pub(super) const ENDPOINT: u16 = 4;
    pub(super) const KEEPALIVE: u16 = 5;
    pub(super) const LAST_HANDSHAKE: u16 = 6;
    pub(super) const RX_BYTES: u16 = 7;
    pub(super) const TX_BYTES: u16 = 8;
    pub(super) const ALLOWED_IPS: u16 = 9;

    pub(super) const REMOVE_ME: u32 = 1;
    pub(super) const REPLACE_ALLOWEDIPS: u32 = 2;
    pub(super) const UPDATE_ONLY: u32 = 4;
}

/// `enum wgallowedip_attribute`.
mod allowed_ip {
    pub(super) const FAMILY: u16 = 1;
    pub(super) const ADDR: u16 = 2;
    pub(super) const MASK: u16 = 3;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_survive_the_kernels_form() {
        for text in ["192.0.2.1:51820", "[2001:db8::1]:1"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(endpoint(&sockaddr(addr)), Some(addr));
        }
        assert_eq!(endpoint(&[2, 0, 1]), None);
    }

    #[test]
    fn a_peer_split_over_two_messages_is_one() {
        let part = |prefix: &str| {
            let mut message = Message::new(0, 0, 1, GET_DEVICE);
            let peers = message.begin(device::PEERS);
            let one = message.begin(0);
            put_change(
                &mut message,
                &PeerChange {
                    key: NodeKey([3; 32]),
                    create: true,
                    replace_allowed_ips: false,
                    allowed_ips: [prefix.parse().unwrap()].into(),
                    endpoint: Some("192.0.2.1:7".parse().unwrap()),
                    keepalive: Some(25),
                },
            );
            message.end(one);
            message.end(peers);
            message.finish()
        };
        let mut dump = Dump::default();
        for prefix in ["10.1.0.0/16", "fd00::/64"] {
            let bytes = part(prefix);
            read_device(Attributes::new(&bytes[message::HEADER_BYTES..]), &mut dump);
        }
        let peer = &dump.peers[&NodeKey([3; 32])];
        assert_eq!(dump.peers.len(), 1);
        assert_eq!(peer.allowed_ips.len(), 2);
        assert_eq!(peer.keepalive, 25);
        assert_eq!(peer.stats.endpoint, Some("192.0.2.1:7".parse().unwrap()));
    }

    #[test]
    fn a_peer_with_the_most_routes_fits_one_message() {
        let routes = (0..proto::netmap::MAX_ROUTES_PER_NODE as u128 + 2)
            .map(|n| Prefix::host(Ipv6Addr::from(n << 8).into()))
            .collect();
        let mut message = Message::new(0, 0, 1, SET_DEVICE);
        let peers = message.begin(device::PEERS);
        let one = message.begin(0);
        let change = PeerChange {
            key: NodeKey([3; 32]),
            create: true,
            replace_allowed_ips: true,
            allowed_ips: routes,
            endpoint: Some("[2001:db8::1]:7".parse().unwrap()),
            keepalive: Some(0),
        };
        put_change(&mut message, &change);
        message.end(one);
        message.end(peers);
        // Together with the peers that may precede it in a message.
        assert!(message.len() + MESSAGE_BYTES < usize::from(u16::MAX));
    }
}
