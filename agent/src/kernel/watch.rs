//! The host's own addresses and routes, and word when they change.
//!
//! Multicast only wakes: what changed is read anew, whole, after a moment of quiet ([`SETTLE`]).
//! So a burst of changes is read once, and a message that was lost costs nothing.

use super::route::{destination, errno, own_address};
use engine::plan::LiveRoute;
use engine::{LinkAddr, Links};
use futures_util::{StreamExt, TryStreamExt};
use proto::net::Prefix;
use rtnetlink::packet_route::address::{AddressHeaderFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType,
};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Changes come in bursts (an interface comes up, a routing daemon converges): this long after the
/// first of a burst the host is read.
const SETTLE: Duration = Duration::from_millis(200);

/// A host with a million routes takes long to read, and its routes never rest: it is read for at
/// most one part in this many of the time. What changes after a time of quiet is read at once.
const SHARE: u32 = 8;

/// Sends the host's links to `links` now and after every change, until nobody listens.
///
/// # Errors
/// What the kernel says.
pub async fn run(interface: &str, links: mpsc::Sender<Links>) -> io::Result<()> {
    let (connection, handle, mut changes) = rtnetlink::new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ])?;
    tokio::spawn(connection);
    loop {
        let start = Instant::now();
        let now = read(&handle, interface).await?;
        let rest = start.elapsed() * SHARE;
        if links.send(now).await.is_err() {
            return Ok(());
        }
        tokio::select! {
            change = changes.next() => {
                if change.is_none() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            () = links.closed() => return Ok(()),
        }
        let rest = rest.saturating_sub(start.elapsed());
        tokio::time::sleep(SETTLE.max(rest)).await;
        while changes.try_recv().is_ok() {}
    }
}

/// The host's links, without our device.
///
/// # Errors
/// What the kernel says.
pub async fn read(handle: &Handle, interface: &str) -> io::Result<Links> {
    let names = names(handle).await?;
    let foreign = |index: &u32| names.get(index).filter(|link| link.name != interface);
    let mut links = Links::default();
    let mut answers = std::pin::pin!(handle.address().get().execute());
    while let Some(message) = answers.try_next().await.map_err(errno)? {
        if let Some(link) = foreign(&message.header.index)
            && !link.loopback
            && link.carries
            && let Some(addr) = reachable(&message)
        {
            links.mtu = links.mtu.max(link.mtu);
            links.addrs.insert(LinkAddr {
                interface: link.name.clone(),
                addr,
                prefix_len: message.header.prefix_len,
            });
        }
    }
    let requests = [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ];
    let mut best = None;
    for request in requests {
        let mut answers = std::pin::pin!(handle.route().get(request).execute());
        while let Some(message) = answers.try_next().await.map_err(errno)? {
            links.routes.extend(live(&message, &names, interface));
            best = best.into_iter().chain(gateway(&message)).min();
        }
    }
    links.gateway = best.map(|(_, gateway)| gateway);
    Ok(links)
}

/// What is to be known of a link.
#[derive(Default)]
struct Link {
    name: String,
    loopback: bool,
    /// Whether its cable is plugged in. Nobody reaches an address where it is not, and nobody is
    /// reached from there.
    carries: bool,
    mtu: u32,
}

async fn names(handle: &Handle) -> io::Result<BTreeMap<u32, Link>> {
    let mut names = BTreeMap::new();
    let mut answers = std::pin::pin!(handle.link().get().execute());
    while let Some(message) = answers.try_next().await.map_err(errno)? {
        let mut link = Link {
            loopback: message.header.flags.contains(LinkFlags::Loopback),
            carries: message.header.flags.contains(LinkFlags::LowerUp),
            ..Link::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                _ => {}
            }
        }
        names.insert(message.header.index, link);
    }
    Ok(names)
}

/// An address that others may reach, for long.
fn reachable(message: &AddressMessage) -> Option<IpAddr> {
    let passing = AddressHeaderFlags::Deprecated
        | AddressHeaderFlags::Tentative
        | AddressHeaderFlags::Dadfailed;
    // IFA_F_SECONDARY is IFA_F_TEMPORARY for IPv6.
    let addr = own_address(&message.attributes)?;
    let temporary = addr.is_ipv6() && message.header.flags.contains(AddressHeaderFlags::Secondary);
    let usable = message.header.scope == AddressScope::Universe
        && !message.header.flags.intersects(passing)
        && !temporary
        && !addr.is_loopback();
    usable.then_some(addr)
}

/// Routes of the main table that lead out by another device than ours, or nowhere.
fn live(message: &RouteMessage, names: &BTreeMap<u32, Link>, interface: &str) -> Vec<LiveRoute> {
    let table = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let Some(prefix) = destination(message).filter(|prefix| !is_boilerplate(prefix)) else {
        return Vec::new();
    };
    if table.unwrap_or(u32::from(message.header.table)) != main {
        return Vec::new();
    }
    let route = |interface: &str| LiveRoute {
        prefix,
        interface: interface.to_owned(),
    };
    match message.header.kind {
        RouteType::Unicast => exits(message)
            .iter()
            .filter_map(|index| names.get(index))
            .filter(|link| link.name != interface)
            .map(|link| route(&link.name))
            .collect(),
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            vec![route("")]
        }
        _ => Vec::new(),
    }
}

/// Metric and gateway of an IPv4 default route of the main table.
fn gateway(message: &RouteMessage) -> Option<(u32, Ipv4Addr)> {
    let main = message.header.table == RouteHeader::RT_TABLE_MAIN;
    if !main || message.header.destination_prefix_length > 0 {
        return None;
    }
    let mut metric = 0;
    let mut gateway = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Gateway(RouteAddress::Inet(addr)) => gateway = Some(*addr),
            _ => {}
        }
    }
    gateway.map(|gateway| (metric, gateway))
}

fn exits(message: &RouteMessage) -> BTreeSet<u32> {
    let of = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    };
    message.attributes.iter().flat_map(of).collect()
}

/// Link-local and multicast prefixes, which every interface has.
fn is_boilerplate(prefix: &Prefix) -> bool {
    match prefix.addr() {
        IpAddr::V4(addr) => addr.is_link_local() || addr.is_multicast(),
        IpAddr::V6(addr) => addr.is_unicast_link_local() || addr.is_multicast(),
    }
}
