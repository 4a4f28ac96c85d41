//! All that one node may know of its network, and how that changes.
//!
//! The coordinator sends one [`Update::Full`], then [`Update::Delta`]s that each name the
//! generation they build on. A delta on any other base is refused ([`StaleBase`]) and the node asks
//! for a full netmap: there is no "unchanged unless said" and no guessing. A netmap is a claim of
//! the coordinator; nobody acts on it before `engine::trust` has turned it into a `VerifiedNetmap`.

use crate::filter::{Filter, Label};
use crate::id::{Generation, NetworkId, NodeId, RegionId};
use crate::key::{DiscoKey, Fingerprint, NodeKey};
use crate::net::Prefix;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Most peers in one netmap.
pub const MAX_PEERS: usize = 100_000;
/// Most routes that one node may serve. Bounded so that a peer fits a few netlink messages.
pub const MAX_ROUTES_PER_NODE: usize = 1_024;
/// Most STUN servers of a network.
pub const MAX_STUN_SERVERS: usize = 16;
/// Most regions of a relay map.
pub const MAX_REGIONS: usize = 64;
/// Most relays of one region.
pub const MAX_HOSTS_PER_REGION: usize = 8;
/// Longest name of a region, in bytes.
pub const MAX_REGION_NAME_BYTES: usize = 63;
/// Most endpoints that one node may report.
pub const MAX_ENDPOINTS_PER_NODE: usize = 32;

/// One node's view of its network at one generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Netmap {
    /// The network's version that this view shows.
    pub generation: Generation,
    /// The network.
    pub network: Network,
    /// The node that this netmap is for.
    pub me: Me,
    /// The peers that policy lets this node talk with, in either direction.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Policy compiled for this node.
    pub filter: Filter,
    /// Set by the coordinator when it means `peers` to be empty. An empty list without it, where
    /// there were peers before, is taken for a fault and refused.
    pub peers_empty_on_purpose: bool,
}

/// The network as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Its name, for people.
    pub name: String,
    /// Nodes' IPv4 addresses come from here.
    pub v4: Prefix,
    /// Nodes' IPv6 addresses come from here.
    pub v6: Prefix,
    /// STUN servers as `HOST:PORT`, by which nodes learn how the world sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stun: Vec<String>,
    /// The relay map: where packets go that find no direct way, and who answers STUN there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub relays: BTreeMap<RegionId, Region>,
}

/// A place with relays that know nothing of other places: a node is reached through the region that
/// it calls its home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Its name, for people.
    pub name: String,
    /// Its relays, best first: the others are for when it cannot be reached.
    pub hosts: Vec<RelayHost>,
}

/// One relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayHost {
    /// `HOST:PORT` of its DERP door, by TCP.
    pub addr: String,
    /// The UDP port of the same host that answers STUN, if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stun: Option<u16>,
    /// Whether it is spoken to without TLS.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
    /// The one certificate to take from it; `None`: any that the public authorities vouch for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Fingerprint>,
}

/// The node itself, as the coordinator has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Me {
    /// Its id.
    pub id: NodeId,
    /// Its name in the network, for people.
    pub name: String,
    /// Its WireGuard public key; a netmap for another key is not for this node.
    pub key: NodeKey,
    /// Its addresses, at most one of each family.
    pub addrs: Vec<IpAddr>,
    /// Subnet routes that it advertised and that were approved.
    pub routes: BTreeSet<Prefix>,
    /// Who it belongs to.
    pub owner: Owner,
    /// Labels that the policy's selectors give it.
    pub labels: BTreeSet<Label>,
}

/// Another node, as this one sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its id.
    pub id: NodeId,
    /// Its name in the network, for people.
    pub name: String,
    /// Its WireGuard public key.
    pub key: NodeKey,
    /// Its addresses, at most one of each family.
    pub addrs: Vec<IpAddr>,
    /// Subnet routes behind it that were approved.
    pub routes: BTreeSet<Prefix>,
    /// Where it may be reached: what it reported and what the coordinator saw, best first.
    pub endpoints: Vec<SocketAddr>,
    /// Who it belongs to.
    pub owner: Owner,
    /// Labels that the policy's selectors give it.
    pub labels: BTreeSet<Label>,
    /// Whether the coordinator has a live connection to it.
    pub online: bool,
    /// What probes of paths to it are sealed for; `None`: it does not probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disco: Option<DiscoKey>,
    /// The region whose relay it is connected to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<RegionId>,
}

/// Whose a node is: a user's, or nobody's but its tags'.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// A user, by login name (`ana@example.com`).
    User(String),
    /// Tags (`tag:web`); a tagged node has no user.
    Tags(BTreeSet<String>),
}

/// A change of a netmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// Everything.
    Full(Box<Netmap>),
    /// What changed since `base`.
    Delta(Box<Delta>),
}

/// What changed between two generations. Absent (`None`, empty) means: not changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delta {
    /// The generation it builds on.
    pub base: Generation,
    /// The generation it leads to; greater than `base`.
    pub next: Generation,
    /// New value of the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// New value of the node itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub me: Option<Me>,
    /// Peers that are new or changed, whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<Peer>,
    /// Peers that are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<NodeId>,
    /// New value of the filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Filter>,
    /// See [`Netmap::peers_empty_on_purpose`]; always the value after the change.
    pub peers_empty_on_purpose: bool,
}

/// A delta does not build on the netmap at hand: ask for a full one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the change builds on generation {base}, but this netmap is at {have}")]
pub struct StaleBase {
    /// What the delta builds on.
    pub base: Generation,
    /// What is at hand; 0 if nothing is.
    pub have: Generation,
}

impl Netmap {
    /// The netmap after `delta`.
    ///
    /// # Errors
    /// [`StaleBase`] if it builds on another generation or does not lead forward; `self` is then
    /// unchanged.
    pub fn apply(&mut self, delta: Delta) -> Result<(), StaleBase> {
        if delta.base != self.generation || delta.next <= delta.base {
            return Err(StaleBase {
                base: delta.base,
                have: self.generation,
            });
        }
        self.generation = delta.next;
        self.peers_empty_on_purpose = delta.peers_empty_on_purpose;
        if let Some(network) = delta.network {
            self.network = network;
        }
        if let Some(me) = delta.me {
            self.me = me;
        }
        if let Some(filter) = delta.filter {
            self.filter = filter;
        }
        for id in delta.removed {
            self.peers.remove(&id);
        }
        for peer in delta.set {
            self.peers.insert(peer.id, peer);
        }
        Ok(())
    }

    /// The delta that leads from `self` to `next`. Its size grows with the change.
    #[must_use]
    pub fn delta_to(&self, next: &Self) -> Delta {
        let changed = |peer: &&Peer| self.peers.get(&peer.id) != Some(*peer);
        let gone = |id: &&NodeId| !next.peers.contains_key(*id);
        Delta {
            base: self.generation,
            next: next.generation,
            network: (self.network != next.network).then(|| next.network.clone()),
            me: (self.me != next.me).then(|| next.me.clone()),
            set: next.peers.values().filter(changed).cloned().collect(),
            removed: self.peers.keys().filter(gone).copied().collect(),
            filter: (self.filter != next.filter).then(|| next.filter.clone()),
            peers_empty_on_purpose: next.peers_empty_on_purpose,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn netmap(generation: u64, peers: &[u64]) -> Netmap {
        let owner = Owner::User("ana@example.com".to_owned());
        let peer = |&id: &u64| Peer {
            id: NodeId(id),
            name: format!("n{id}"),
            key: NodeKey([id as u8; 32]),
            addrs: vec![IpAddr::from([100, 64, 0, id as u8])],
            routes: BTreeSet::new(),
            endpoints: Vec::new(),
            owner: owner.clone(),
            labels: BTreeSet::new(),
            online: true,
            disco: None,
            home: None,
        };
        Netmap {
            generation: Generation(generation),
            network: Network {
                id: NetworkId(1),
                name: "home".to_owned(),
                v4: "100.64.0.0/10".parse().unwrap(),
                v6: "fd00::/48".parse().unwrap(),
                stun: Vec::new(),
                relays: BTreeMap::new(),
            },
            me: Me {
                id: NodeId(1000),
                name: "me".to_owned(),
                key: NodeKey([9; 32]),
                addrs: vec![],
                routes: BTreeSet::new(),
                owner: owner.clone(),
                labels: BTreeSet::new(),
            },
            peers: peers.iter().map(|id| (NodeId(*id), peer(id))).collect(),
            filter: Filter::default(),
            peers_empty_on_purpose: peers.is_empty(),
        }
    }

    #[test]
    fn a_delta_leads_from_one_netmap_to_the_other() {
        for (old, new) in [
            (&[1, 2][..], &[2, 3][..]),
            (&[], &[1]),
            (&[1], &[]),
            (&[1], &[1]),
        ] {
            let (mut have, want) = (netmap(4, old), netmap(7, new));
            have.apply(have.delta_to(&want)).unwrap();
            assert_eq!(have, want);
        }
    }

    #[test]
    fn a_delta_on_another_base_or_backwards_is_refused_and_changes_nothing() {
        let mut have = netmap(4, &[1]);
        let wrong_base = netmap(5, &[1]).delta_to(&netmap(6, &[]));
        let backwards = have.delta_to(&netmap(3, &[]));
        for delta in [wrong_base, backwards] {
            assert!(have.apply(delta).is_err());
            assert_eq!(have, netmap(4, &[1]));
        }
    }
}
