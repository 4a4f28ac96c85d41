//! Netmap -> [`VerifiedNetmap`]: what has to hold before anybody acts on the coordinator's word.
//!
//! A netmap is a claim. The kernel would believe any of it: a prefix given to two peers belongs to
//! whoever was written last, an empty peer list cuts every session, an address outside the network
//! takes traffic that was never the mesh's. So [`VerifiedNetmap`] is the only type that `plan` and
//! `path` accept, [`verify`] is the only way to one, and a netmap that fails is refused whole, with
//! one [`Distrust`] that says why; the last good netmap stays in force.
//!
//! **Who owns a prefix.** Allowed IPs are every address and every route of a node. The same prefix
//! may have one owner only, this node included. A route *inside* the network's own prefixes is
//! refused too: it would capture addresses of nodes. Nested routes of two nodes are legal
//! (10.0.0.0/8 here, 10.1.0.0/16 there): WireGuard and the acl both take the longest match, so each
//! address still has one owner.
//!
//! **Order.** Generations never fall within one network. An empty peer list after one with peers
//! is refused unless the coordinator says that it means it: a failed query must not look like a
//! network that everybody left.

use proto::control::MAX_HOSTNAME_BYTES;
use proto::filter::{Filter, Label, MAX_RULES, Selector};
use proto::id::{Generation, NetworkId, NodeId};
use proto::key::NodeKey;
use proto::net::Prefix;
use proto::netmap::{
    MAX_ENDPOINTS_PER_NODE, MAX_PEERS, MAX_ROUTES_PER_NODE, MAX_STUN_SERVERS, Me, Netmap, Network,
    Peer,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A netmap that passed [`verify`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedNetmap {
    netmap: Netmap,
}

/// Why a netmap is refused. Nothing of it is used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    /// It is made out to another node key.
    #[error("it is made out to another node ({0}), not to this one")]
    ForeignKey(NodeKey),
    /// It is of another network than the one this node joined.
    #[error("it is of network {offered}, but this node joined network {joined}")]
    ForeignNetwork {
        /// The network that this node joined.
        joined: NetworkId,
        /// The network that the netmap is of.
        offered: NetworkId,
    },
    /// Its generation is lower than that of the netmap in force.
    #[error("it shows generation {offered}, but generation {have} is already in force")]
    Older {
        /// What is in force.
        have: Generation,
        /// What was offered.
        offered: Generation,
    },
    /// All peers are gone and the coordinator does not say that it means it.
    #[error("it lists no peers where there were {had}, and does not say that this is meant")]
    EmptyUnannounced {
        /// How many peers are in force.
        had: usize,
    },
    /// A prefix of the network cannot be used: wrong family, or loopback, multicast, link-local.
    #[error("the network's prefix {0} cannot be used for nodes")]
    NetworkPrefix(Prefix),
    /// A peer is listed under an id that is not its own, or under this node's.
    #[error("peer {0} is listed under an id that is not its own")]
    Misfiled(NodeId),
    /// A node has no address at all.
    #[error("node {0} has no address")]
    NoAddress(NodeId),
    /// A node has two addresses of one family.
    #[error("node {0} has more than one address of a family")]
    SecondAddress(NodeId),
    /// An address lies outside the network's prefixes.
    #[error("address {addr} of node {node} lies outside the network's prefixes")]
    AddressOutside {
        /// Whose address.
        node: NodeId,
        /// The address.
        addr: IpAddr,
    },
    /// A key is all zeroes.
    #[error("node {0} has a key that is all zeroes")]
    ZeroKey(NodeId),
    /// Two nodes have the same key.
    #[error("nodes {0} and {1} have the same key")]
    DuplicateKey(NodeId, NodeId),
    /// Two nodes have the same address or route.
    #[error("nodes {first} and {second} both own {prefix}")]
    Overlap {
        /// One owner.
        first: NodeId,
        /// The other.
        second: NodeId,
        /// What both own.
        prefix: Prefix,
    },
    /// A route lies inside the network's own prefixes and would capture nodes' addresses.
    #[error("route {prefix} of node {node} lies inside the network's own addresses")]
    RouteInside {
        /// Who is said to serve it.
        node: NodeId,
        /// The route.
        prefix: Prefix,
    },
    /// A route covers only addresses that are never routed (loopback, multicast, link-local).
    #[error("route {prefix} of node {node} can never be routed")]
    RouteUnusable {
        /// Who is said to serve it.
        node: NodeId,
        /// The route.
        prefix: Prefix,
    },
    /// A node carries a label, or a rule names one, that the filter does not define.
    #[error("label {} is used but not defined", .0.0)]
    UnknownLabel(Label),
    /// A name has characters that a terminal or a host name must not see, or is too long.
    #[error("node {0} has a name that is no host name")]
    Name(NodeId),
    /// A list is longer than its limit.
    #[error("it has more {what} than the {limit} that are allowed")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How many may be.
        limit: usize,
    },
}

impl VerifiedNetmap {
    /// The netmap itself.
    #[must_use]
    pub fn netmap(&self) -> &Netmap {
        &self.netmap
    }

    /// This node.
    #[must_use]
    pub fn me(&self) -> &Me {
        &self.netmap.me
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.netmap.network
    }

    /// All peers, by id.
    #[must_use]
    pub fn peers(&self) -> &BTreeMap<NodeId, Peer> {
        &self.netmap.peers
    }

    /// Policy for this node.
    #[must_use]
    pub fn filter(&self) -> &Filter {
        &self.netmap.filter
    }
}

/// What a node owns: its addresses as host prefixes, then its routes.
pub fn allowed_ips<'a>(
    addrs: &'a [IpAddr],
    routes: &'a BTreeSet<Prefix>,
) -> impl Iterator<Item = Prefix> + 'a {
    let hosts = addrs.iter().map(|addr| Prefix::host(*addr));
    hosts.chain(routes.iter().copied())
}

/// Turns a claim into something to act on. `me` is this node's own key, `last` the netmap in force.
///
/// # Errors
/// The first [`Distrust`] found; nothing of the netmap may then be used.
pub fn verify(
    netmap: Netmap,
    me: NodeKey,
    last: Option<&VerifiedNetmap>,
) -> Result<VerifiedNetmap, Distrust> {
    if netmap.me.key != me {
        return Err(Distrust::ForeignKey(netmap.me.key));
    }
    if let Some(last) = last {
        check_order(&netmap, last.netmap())?;
    }
    check_limits(&netmap)?;
    check_network(&netmap.network)?;
    check_nodes(&netmap)?;
    check_labels(&netmap)?;
    Ok(VerifiedNetmap { netmap })
}

fn check_order(netmap: &Netmap, last: &Netmap) -> Result<(), Distrust> {
    if netmap.network.id != last.network.id {
        return Err(Distrust::ForeignNetwork {
            joined: last.network.id,
            offered: netmap.network.id,
        });
    }
    if netmap.generation < last.generation {
        return Err(Distrust::Older {
            have: last.generation,
            offered: netmap.generation,
        });
    }
    let emptied = netmap.peers.is_empty() && !last.peers.is_empty();
    if emptied && !netmap.peers_empty_on_purpose {
        return Err(Distrust::EmptyUnannounced {
            had: last.peers.len(),
        });
    }
    Ok(())
}

fn check_limits(netmap: &Netmap) -> Result<(), Distrust> {
    let at_most = |what, count: usize, limit| {
        (count <= limit)
            .then_some(())
            .ok_or(Distrust::Limit { what, limit })
    };
    at_most("peers", netmap.peers.len(), MAX_PEERS)?;
    at_most("STUN servers", netmap.network.stun.len(), MAX_STUN_SERVERS)?;
    at_most("rules", netmap.filter.ingress.len(), MAX_RULES)?;
    at_most("rules", netmap.filter.egress.len(), MAX_RULES)?;
    at_most("routes", netmap.me.routes.len(), MAX_ROUTES_PER_NODE)?;
    for peer in netmap.peers.values() {
        at_most("routes", peer.routes.len(), MAX_ROUTES_PER_NODE)?;
        at_most("endpoints", peer.endpoints.len(), MAX_ENDPOINTS_PER_NODE)?;
    }
    Ok(())
}

fn check_network(network: &Network) -> Result<(), Distrust> {
    for (prefix, of_family) in [
        (network.v4, network.v4.is_v4()),
        (network.v6, !network.v6.is_v4()),
    ] {
        if !of_family || never_routed().any(|special| special.overlaps(&prefix)) {
            return Err(Distrust::NetworkPrefix(prefix));
        }
    }
    Ok(())
}

fn check_nodes(netmap: &Netmap) -> Result<(), Distrust> {
    let me = &netmap.me;
    let mut keys = BTreeMap::from([(me.key, me.id)]);
    let mut owners = BTreeMap::new();
    check_node(netmap, &mut owners, me.id, (&me.addrs, &me.routes))?;
    check_name(me.id, &me.name)?;
    for (id, peer) in &netmap.peers {
        if peer.id != *id || peer.id == me.id {
            return Err(Distrust::Misfiled(peer.id));
        }
        if peer.key.is_zero() {
            return Err(Distrust::ZeroKey(peer.id));
        }
        if let Some(first) = keys.insert(peer.key, peer.id) {
            return Err(Distrust::DuplicateKey(first, peer.id));
        }
        check_node(netmap, &mut owners, peer.id, (&peer.addrs, &peer.routes))?;
        check_name(peer.id, &peer.name)?;
    }
    Ok(())
}

fn check_node(
    netmap: &Netmap,
    owners: &mut BTreeMap<Prefix, NodeId>,
    node: NodeId,
    (addrs, routes): (&[IpAddr], &BTreeSet<Prefix>),
) -> Result<(), Distrust> {
    let network = &netmap.network;
    if addrs.is_empty() {
        return Err(Distrust::NoAddress(node));
    }
    let v4 = addrs.iter().filter(|addr| addr.is_ipv4()).count();
    if v4 > 1 || addrs.len() - v4 > 1 {
        return Err(Distrust::SecondAddress(node));
    }
    for &addr in addrs {
        if !network.v4.contains(addr) && !network.v6.contains(addr) {
            return Err(Distrust::AddressOutside { node, addr });
        }
    }
    for &prefix in routes {
        if network.v4.covers(&prefix) || network.v6.covers(&prefix) {
            return Err(Distrust::RouteInside { node, prefix });
        }
        if never_routed().any(|special| special.covers(&prefix)) {
            return Err(Distrust::RouteUnusable { node, prefix });
        }
    }
    for prefix in allowed_ips(addrs, routes) {
        if let Some(first) = owners.insert(prefix, node) {
            return Err(Distrust::Overlap {
                first,
                second: node,
                prefix,
            });
        }
    }
    Ok(())
}

/// Names reach terminals and later DNS: no control characters, no spaces, bounded.
fn check_name(node: NodeId, name: &str) -> Result<(), Distrust> {
    let fits = !name.is_empty()
        && name.len() <= MAX_HOSTNAME_BYTES
        && name.bytes().all(|byte| byte.is_ascii_graphic());
    fits.then_some(()).ok_or(Distrust::Name(node))
}

fn check_labels(netmap: &Netmap) -> Result<(), Distrust> {
    let defined = netmap.filter.labels.len();
    let carried = netmap.peers.values().flat_map(|peer| &peer.labels);
    let rules = netmap.filter.ingress.iter().chain(&netmap.filter.egress);
    let named = rules
        .flat_map(|rule| rule.srcs.iter().chain(&rule.dsts))
        .filter_map(|selector| match selector {
            Selector::Label(label) => Some(label),
            Selector::Prefix(_) => None,
        });
    let mut used = netmap.me.labels.iter().chain(carried).chain(named);
    match used.find(|label| label.0 as usize >= defined) {
        Some(label) => Err(Distrust::UnknownLabel(*label)),
        None => Ok(()),
    }
}

/// Address blocks that no route and no node may lie in (IANA special-purpose registries): "this
/// network", loopback, link-local, multicast and reserved; and the v4-mapped block, because the acl
/// writes IPv4 addresses that way.
fn never_routed() -> impl Iterator<Item = Prefix> {
    let v4 = [
        ([0, 0, 0, 0], 8),
        ([127, 0, 0, 0], 8),
        ([169, 254, 0, 0], 16),
        ([224, 0, 0, 0], 3),
    ];
    let v6 = [
        (Ipv6Addr::UNSPECIFIED, 127),
        (Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), 96),
        (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
        (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    ];
    let v4 = v4.map(|(addr, len)| (IpAddr::from(addr), len));
    let v6 = v6.map(|(addr, len)| (IpAddr::V6(addr), len));
    v4.into_iter()
        .chain(v6)
        .filter_map(|(addr, len)| Prefix::containing(addr, len).ok())
}
