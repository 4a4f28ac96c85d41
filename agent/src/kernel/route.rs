//! The device as a link, its addresses, its routes, and forwarding for subnets: rtnetlink.
//!
//! Routes go into the main table with our protocol number, [`ROUTE_PROTOCOL`], so that ours are
//! told from everybody else's and no policy rule is needed. Addresses have no prefix beside
//! themselves (/32, /128): what lies behind the device is said by routes alone.
//!
//! Forwarding is switched on per interface, never for the machine. What an interface had before is
//! written to a file first, and put back from it. IPv6 knows no forwarding of one interface before
//! Linux 6.17 (`force_forwarding`): there we use what the machine has and say so if it has none.

use engine::plan::{Family, Forwarding, RouteMtu, Side};
use futures_util::{StreamExt, TryStreamExt};
use proto::net::Prefix;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
};
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::packet_route::{AddressFamily, route::RouteScope};
use rtnetlink::{Handle, LinkUnspec, LinkWireguard, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// `rtm_protocol` of our routes: a number that no routing daemon in iproute2's list uses.
pub const ROUTE_PROTOCOL: u8 = 119;

/// What a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Whether it is a WireGuard device.
    pub wireguard: bool,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is this host's loopback.
    pub loopback: bool,
    /// Whether its packets have Ethernet headers.
    pub ethernet: bool,
    /// Whether it is a driver's own, and not made of others or of nothing.
    pub card: bool,
}

/// A way to the links, addresses and routes of the network namespace that it was opened in.
pub struct Routes {
    handle: Handle,
    /// Filters dumps in the kernel.
    strict: Handle,
}

impl Routes {
    /// Opens two sockets; their tasks run on the current runtime.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let (connection, strict, _) = rtnetlink::new_connection_with_strict_check()?;
        tokio::spawn(connection);
        Ok(Self { handle, strict })
    }

    /// The link of this name, if there is one.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn link(&self, name: &str) -> io::Result<Option<Link>> {
        let request = self.handle.link().get().match_name(name).execute();
        let mut answers = std::pin::pin!(request);
        match answers.try_next().await {
            Ok(found) => Ok(found.as_ref().map(read_link)),
            Err(error) => match errno(error) {
                error if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Makes a WireGuard device, down.
    ///
    /// # Errors
    /// What the kernel says: `EOPNOTSUPP` if it has no WireGuard.
    pub async fn create(&self, name: &str, mtu: u32) -> io::Result<()> {
        let message = LinkWireguard::new(name).mtu(mtu).down().build();
        done(
            self.handle.link().add(message).execute().await,
            libc::EEXIST,
        )
    }

    /// Deletes a link; one that is not there is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn delete(&self, index: u32) -> io::Result<()> {
        done(self.handle.link().del(index).execute().await, libc::ENODEV)
    }

    /// Sets a link's MTU.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(errno)
    }

    /// Brings a link up or takes it down.
    ///
    /// # Errors
    /// What the kernel says: `AddrInUse` if another socket has the WireGuard port.
    pub async fn set_up(&self, index: u32, up: bool) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index);
        let message = if up { message.up() } else { message.down() };
        let request = self.handle.link().set(message.build());
        request.execute().await.map_err(errno)
    }

    /// Deletes a link's clsact qdisc, unless somebody has filters there.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn remove_clsact(&self, index: u32) -> io::Result<()> {
        let index = i32::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut filters = self.handle.traffic_filter(index);
        for request in [filters.get().ingress(), filters.get().egress()] {
            let mut answers = std::pin::pin!(request.execute());
            if answers.try_next().await.map_err(errno)?.is_some() {
                return Ok(());
            }
        }
        let mut request = self.handle.qdisc().del(index);
        request.message_mut().header.parent = TcHandle::CLSACT;
        done(request.execute().await, libc::ENOENT)
    }

    /// The addresses of a link.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn addrs(&self, index: u32) -> io::Result<BTreeSet<(IpAddr, u8)>> {
        let mut request = self.strict.address().get();
        request.message_mut().header.index = index;
        let mut answers = std::pin::pin!(request.execute());
        let mut addrs = BTreeSet::new();
        while let Some(message) = answers.try_next().await.map_err(errno)? {
            if message.header.index == index
                && let Some(addr) = own_address(&message.attributes)
            {
                addrs.insert((addr, message.header.prefix_len));
            }
        }
        Ok(addrs)
    }

    /// Adds an address as a host prefix; one that is there is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn add_addr(&self, index: u32, addr: IpAddr) -> io::Result<()> {
        let len = Prefix::host(addr).len();
        let request = self.handle.address().add(index, addr, len);
        done(request.execute().await, libc::EEXIST)
    }

    /// Removes an address; one that is not there is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn remove_addr(&self, index: u32, addr: IpAddr, len: u8) -> io::Result<()> {
        let message = match addr {
            IpAddr::V4(v4) => rtnetlink::AddressMessageBuilder::<std::net::Ipv4Addr>::new()
                .index(index)
                .address(v4, len)
                .build(),
            IpAddr::V6(v6) => rtnetlink::AddressMessageBuilder::<std::net::Ipv6Addr>::new()
                .index(index)
                .address(v6, len)
                .build(),
        };
        let request = self.handle.address().del(message);
        done(request.execute().await, libc::EADDRNOTAVAIL)
    }

    /// Our routes to a link: filtered by the kernel, so that a host with a million routes of its
    /// own sends only these.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn routes(&self, index: u32) -> io::Result<BTreeMap<Prefix, RouteMtu>> {
        let mut routes = BTreeMap::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut wanted = RouteMessage::default();
            wanted.header.address_family = family;
            wanted.header.table = RouteHeader::RT_TABLE_MAIN;
            wanted.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
            wanted.attributes = vec![RouteAttribute::Oif(index)];
            let answers = self.strict.route().get(wanted).execute();
            let mut answers = std::pin::pin!(answers);
            while let Some(answer) = answers.next().await {
                match answer.map_err(errno) {
                    Ok(message) if is_ours(&message, index) => {
                        let mtu = says(&message);
                        routes.extend(destination(&message).map(|prefix| (prefix, mtu)));
                    }
                    Ok(_) => {}
                    // The kernel says so when a filtered dump finds nothing.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(routes)
    }

    /// Routes a prefix into a link; one that is there is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn add_route(&self, index: u32, prefix: Prefix, mtu: RouteMtu) -> io::Result<()> {
        let message = saying(route(index, prefix)?, mtu);
        done(
            self.handle.route().add(message).execute().await,
            libc::EEXIST,
        )
    }

    /// Puts a route of ours in the place of one that says something else of its packets.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn change_route(&self, index: u32, prefix: Prefix, mtu: RouteMtu) -> io::Result<()> {
        let message = saying(route(index, prefix)?, mtu);
        let request = self.handle.route().add(message).replace();
        request.execute().await.map_err(errno)
    }

    /// Takes a route of ours away; one that is not there is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn remove_route(&self, index: u32, prefix: Prefix) -> io::Result<()> {
        let message = route(index, prefix)?;
        done(
            self.handle.route().del(message).execute().await,
            libc::ESRCH,
        )
    }
}

fn route(index: u32, prefix: Prefix) -> io::Result<RouteMessage> {
    let builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(prefix.addr(), prefix.len())
        .map_err(io::Error::other)?
        .output_interface(index)
        .protocol(RouteProtocol::Other(ROUTE_PROTOCOL));
    // An IPv4 route without a gateway has link scope; IPv6 knows no scopes.
    let builder = if prefix.is_v4() {
        builder.scope(RouteScope::Link)
    } else {
        builder
    };
    Ok(builder.build())
}

fn saying(mut message: RouteMessage, mtu: RouteMtu) -> RouteMessage {
    let metrics = [RouteMetric::Mtu(mtu.mtu), RouteMetric::Advmss(mtu.mss)];
    let metrics = metrics
        .into_iter()
        .filter(|metric| !matches!(metric, RouteMetric::Mtu(0) | RouteMetric::Advmss(0)));
    let metrics = RouteAttribute::Metrics(metrics.collect());
    message.attributes.push(metrics);
    message
}

/// What a route says of its packets.
fn says(message: &RouteMessage) -> RouteMtu {
    let mut mtu = RouteMtu::default();
    let metrics = message
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            RouteAttribute::Metrics(metrics) => Some(metrics),
            _ => None,
        });
    for metric in metrics.flatten() {
        match metric {
            RouteMetric::Mtu(bytes) => mtu.mtu = *bytes,
            RouteMetric::Advmss(bytes) => mtu.mss = *bytes,
            _ => {}
        }
    }
    mtu
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        wireguard: false,
        up: message.header.flags.contains(LinkFlags::Up),
        mtu: 0,
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        card: true,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                link.wireguard = infos.contains(&LinkInfo::Kind(InfoKind::Wireguard));
                // Only the drivers of software devices say a kind.
                link.card = !infos.iter().any(|info| matches!(info, LinkInfo::Kind(_)));
            }
            _ => {}
        }
    }
    link
}

/// The address of this end: on a point-to-point link `Address` is the other's.
pub(super) fn own_address(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(addr) => Some(*addr),
        _ => None,
    });
    local.or_else(|| {
        attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(addr) => Some(*addr),
            _ => None,
        })
    })
}

fn is_ours(message: &RouteMessage, index: u32) -> bool {
    message.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
        && message.header.table == RouteHeader::RT_TABLE_MAIN
        && message.attributes.contains(&RouteAttribute::Oif(index))
}

/// Where a route leads.
pub(super) fn destination(message: &RouteMessage) -> Option<Prefix> {
    let len = message.header.destination_prefix_length;
    let named = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(addr)) => Some(IpAddr::V4(*addr)),
            RouteAttribute::Destination(RouteAddress::Inet6(addr)) => Some(IpAddr::V6(*addr)),
            _ => None,
        });
    match (named, message.header.address_family) {
        (Some(addr), _) => Prefix::containing(addr, len).ok(),
        (None, AddressFamily::Inet) => Some(Prefix::ALL_V4),
        (None, AddressFamily::Inet6) => Some(Prefix::ALL_V6),
        (None, _) => None,
    }
}

fn done(result: Result<(), rtnetlink::Error>, already: i32) -> io::Result<()> {
    match result.map_err(errno) {
        Err(error) if error.raw_os_error() == Some(already) => Ok(()),
        other => other,
    }
}

/// What the kernel said, as the error that it is.
pub(super) fn errno(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// Switches under /proc/sys/net, and what they were before they were touched.
///
/// Besides forwarding there is one that the kernel touches itself: a WireGuard device that comes up
/// switches off `send_redirects` for the whole network namespace (`wg_open` in
/// drivers/net/wireguard/device.c) and nobody switches it on again.
pub struct Switches {
    /// Name of our device.
    interface: String,
    /// Where it is written down what was there: switch (below `root`) -> value.
    file: PathBuf,
    /// `/proc/sys/net`.
    root: PathBuf,
    /// What could not be written down yet: a full disk keeps no device down.
    unwritten: Notes,
}

type Notes = BTreeMap<String, String>;

const REDIRECTS: &str = "ipv4/conf/all/send_redirects";
const V4_FORWARDING: (&str, &str) = ("ipv4/conf/", "/forwarding");
const V6_FORWARDING: (&str, &str) = ("ipv6/conf/", "/force_forwarding");

/// A switch cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The kernel knows no IPv6 forwarding of one interface, and the machine's is off.
    #[error("IPv6 forwarding is off on this machine, and this kernel has it only for all of it")]
    WholeMachine,
    /// A switch or the notes cannot be read or written.
    #[error("`{path}`")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl Switches {
    /// Switches of the current network namespace; notes go to `file`.
    #[must_use]
    pub fn new(interface: &str, file: PathBuf) -> Self {
        Self {
            interface: interface.to_owned(),
            file,
            root: PathBuf::from("/proc/sys/net"),
            unwritten: Notes::new(),
        }
    }

    /// Whether IPv6 is switched off on our device, or the kernel has none.
    #[must_use]
    pub fn is_without_v6(&self) -> bool {
        let conf = self.root.join("ipv6/conf");
        let switch = conf.join(&self.interface).join("disable_ipv6");
        !conf.exists() || read(&switch).is_ok_and(|value| value != "0")
    }

    /// Forwarding that we switched on and that still is on.
    #[must_use]
    pub fn observe(&self) -> BTreeSet<Forwarding> {
        let notes = self.notes();
        let ours = notes.keys().filter_map(|switch| self.noted(switch));
        ours.filter(|forwarding| self.is_on(forwarding)).collect()
    }

    /// Switches forwarding on, noting what was there.
    ///
    /// # Errors
    /// [`SwitchError`].
    pub fn forward(&mut self, forwarding: &Forwarding) -> Result<(), SwitchError> {
        let switch = self.switch(forwarding);
        let path = self.root.join(&switch);
        let before = match read(&path) {
            Err(_) if forwarding.family == Family::V6 && !path.exists() => {
                if !self.is_on(forwarding) {
                    return Err(SwitchError::WholeMachine);
                }
                None
            }
            before => Some(before.map_err(at(&path))?),
        };
        let mut notes = self.notes();
        let noted = before.clone().unwrap_or_else(|| "1".to_owned());
        notes.entry(switch).or_insert(noted);
        self.keep(&notes)?;
        match before {
            Some(_) => std::fs::write(&path, "1").map_err(at(&path)),
            None => Ok(()),
        }
    }

    /// Puts back what was there.
    ///
    /// # Errors
    /// [`SwitchError`]; an interface that is gone is none.
    pub fn restore(&mut self, forwarding: &Forwarding) -> Result<(), SwitchError> {
        self.put_back_noted(&self.switch(forwarding))
    }

    /// Forgets the switches of our device, which is gone.
    ///
    /// # Errors
    /// [`SwitchError::Io`].
    pub fn forget_tunnel(&mut self) -> Result<(), SwitchError> {
        let mut notes = self.notes();
        let before = notes.len();
        let lan = |switch: &String| {
            let noted = self.noted(switch);
            noted.is_none_or(|forwarding| forwarding.side != Side::Tunnel)
        };
        notes.retain(|switch, _| lan(switch));
        if notes.len() == before {
            return Ok(());
        }
        self.keep(&notes)
    }

    /// Where IPv6 has no switch of this interface, the machine's decides.
    fn is_on(&self, forwarding: &Forwarding) -> bool {
        let mut path = self.root.join(self.switch(forwarding));
        if forwarding.family == Family::V6 && !path.exists() {
            path = self.root.join("ipv6/conf/all/forwarding");
        }
        read(&path).is_ok_and(|value| value == "1")
    }

    /// Notes what the kernel is about to switch off. What cannot be written down is remembered.
    pub fn note_redirects(&mut self) {
        let mut notes = self.notes();
        let Ok(before) = read(&self.root.join(REDIRECTS)) else {
            return;
        };
        if notes.contains_key(REDIRECTS) || before == "0" {
            return;
        }
        notes.insert(REDIRECTS.to_owned(), before.clone());
        if let Err(error) = self.keep(&notes) {
            tracing::warn!(%error, "`{REDIRECTS}` is put back by this process alone");
            self.unwritten.insert(REDIRECTS.to_owned(), before);
        }
    }

    /// Puts that back.
    ///
    /// # Errors
    /// [`SwitchError::Io`].
    pub fn restore_redirects(&mut self) -> Result<(), SwitchError> {
        self.put_back_noted(REDIRECTS)
    }

    fn put_back_noted(&mut self, switch: &str) -> Result<(), SwitchError> {
        let mut notes = self.notes();
        let Some(before) = notes.remove(switch) else {
            return Ok(());
        };
        self.put_back(switch, &before)?;
        self.unwritten.remove(switch);
        self.keep(&notes)
    }

    fn put_back(&self, switch: &str, value: &str) -> Result<(), SwitchError> {
        let path = self.root.join(switch);
        match std::fs::write(&path, value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path)(error)),
            _ => Ok(()),
        }
    }

    fn switch(&self, forwarding: &Forwarding) -> String {
        let name = match &forwarding.side {
            Side::Tunnel => &self.interface,
            Side::Lan(name) => name,
        };
        let (before, after) = match forwarding.family {
            Family::V4 => V4_FORWARDING,
            Family::V6 => V6_FORWARDING,
        };
        format!("{before}{name}{after}")
    }

    /// The forwarding that a noted switch is about.
    fn noted(&self, switch: &str) -> Option<Forwarding> {
        let families = [(Family::V4, V4_FORWARDING), (Family::V6, V6_FORWARDING)];
        families.into_iter().find_map(|(family, (before, after))| {
            let name = switch.strip_prefix(before)?.strip_suffix(after)?;
            let side = if name == self.interface {
                Side::Tunnel
            } else {
                Side::Lan(name.to_owned())
            };
            Some(Forwarding { side, family })
        })
    }

    /// What was written down, and what could not be. A file that says nothing (the power went while
    /// it was written) is set aside: what it said is lost, and must not hold up all else.
    fn notes(&self) -> Notes {
        let parse = |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(io::Error::other);
        let written = match std::fs::read(&self.file).and_then(parse) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Notes::new(),
            Err(error) => {
                let aside = std::fs::rename(&self.file, self.file.with_extension("damaged"));
                if aside.is_ok() {
                    let file = self.file.display();
                    tracing::warn!(%file, %error, "what is to be put back is not known any more");
                }
                Notes::new()
            }
            Ok(notes) => notes,
        };
        let unwritten = self.unwritten.clone().into_iter();
        unwritten.chain(written).collect()
    }

    fn keep(&mut self, notes: &Notes) -> Result<(), SwitchError> {
        if notes.is_empty() {
            return match std::fs::remove_file(&self.file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&self.file)(error)),
                _ => Ok(()),
            };
        }
        let text = serde_json::to_vec(notes).map_err(|error| at(&self.file)(error.into()))?;
        let new = self.file.with_extension("new");
        let write = || -> io::Result<()> {
            let mut file = std::fs::File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()
        };
        write().map_err(at(&new))?;
        std::fs::rename(&new, &self.file).map_err(at(&self.file))?;
        self.unwritten.clear();
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<String> {
    Ok(std::fs::read_to_string(path)?.trim().to_owned())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SwitchError {
    let path = path.to_owned();
    |source| SwitchError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_is_put_back_to_what_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let conf = folder.path().join("ipv4/conf");
        for (name, value) in [("lan0", "0"), ("lan1", "1"), ("weir0", "0")] {
            std::fs::create_dir_all(conf.join(name)).unwrap();
            std::fs::write(conf.join(name).join("forwarding"), value).unwrap();
        }
        let mut switches = Switches {
            interface: "weir0".to_owned(),
            file: folder.path().join("forwarding.json"),
            root: folder.path().to_owned(),
            unwritten: Notes::new(),
        };
        let lan = |name: &str| Forwarding {
            side: Side::Lan(name.to_owned()),
            family: Family::V4,
        };
        let value = |name: &str| read(&conf.join(name).join("forwarding")).unwrap();
        for name in ["lan0", "lan1"] {
            switches.forward(&lan(name)).unwrap();
            switches.forward(&lan(name)).unwrap();
            assert_eq!(value(name), "1");
        }
        let both = BTreeSet::from([lan("lan0"), lan("lan1")]);
        assert_eq!(switches.observe(), both);
        for name in ["lan0", "lan1"] {
            switches.restore(&lan(name)).unwrap();
        }
        assert_eq!((value("lan0"), value("lan1")), ("0".into(), "1".into()));
        assert!(!switches.file.exists());
        std::fs::create_dir_all(conf.join("all")).unwrap();
        std::fs::write(conf.join("all/send_redirects"), "1").unwrap();
        switches.note_redirects();
        std::fs::write(conf.join("all/send_redirects"), "0").unwrap();
        switches.note_redirects();
        switches.restore_redirects().unwrap();
        assert_eq!(read(&conf.join("all/send_redirects")).unwrap(), "1");
        let tunnel = |family| Forwarding {
            side: Side::Tunnel,
            family,
        };
        switches.forward(&tunnel(Family::V4)).unwrap();
        let v6 = tunnel(Family::V6);
        assert!(matches!(
            switches.forward(&v6),
            Err(SwitchError::WholeMachine)
        ));
        std::fs::create_dir_all(folder.path().join("ipv6/conf/all")).unwrap();
        let machine = folder.path().join("ipv6/conf/all/forwarding");
        std::fs::write(machine, "1").unwrap();
        let on = BTreeSet::from([tunnel(Family::V4)]);
        assert_eq!(switches.observe(), on, "only what we asked for");
        switches.forward(&v6).unwrap();
        assert!(switches.observe().contains(&v6));
        switches.forget_tunnel().unwrap();
        assert!(switches.observe().is_empty());
    }

    #[test]
    fn notes_that_cannot_be_kept_or_read_hold_nothing_up() {
        let folder = tempfile::tempdir().unwrap();
        let all = folder.path().join("ipv4/conf/all");
        std::fs::create_dir_all(&all).unwrap();
        let redirects = all.join("send_redirects");
        let mut switches = Switches {
            interface: "weir0".to_owned(),
            file: folder.path().join("full/notes"),
            root: folder.path().to_owned(),
            unwritten: Notes::new(),
        };
        std::fs::write(&redirects, "1").unwrap();
        switches.note_redirects();
        std::fs::write(&redirects, "0").unwrap();
        switches.restore_redirects().unwrap();
        assert_eq!(read(&redirects).unwrap(), "1", "it was remembered");

        switches.file = folder.path().join("notes");
        std::fs::write(&switches.file, "").unwrap();
        assert!(switches.observe().is_empty());
        assert!(folder.path().join("notes.damaged").exists());
        switches.note_redirects();
        assert!(switches.notes().contains_key(REDIRECTS));
    }

    #[test]
    fn ipv6_is_off_where_its_switch_says_so_or_the_kernel_has_none() {
        let folder = tempfile::tempdir().unwrap();
        let mut switches = Switches::new("weir0", folder.path().join("notes"));
        switches.root = folder.path().to_owned();
        assert!(switches.is_without_v6());
        let ours = folder.path().join("ipv6/conf/weir0");
        std::fs::create_dir_all(ours.parent().unwrap()).unwrap();
        assert!(!switches.is_without_v6(), "too short an MTU for it");
        std::fs::create_dir(&ours).unwrap();
        for (value, off) in [("0", false), ("1", true)] {
            std::fs::write(ours.join("disable_ipv6"), value).unwrap();
            assert_eq!(switches.is_without_v6(), off);
        }
    }
}
