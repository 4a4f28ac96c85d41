//! A network at one generation, and what each of its nodes may know of it. Pure: rows in, netmaps
//! and deltas out.
//!
//! A [`Snapshot`] is built from all rows ([`Snapshot::build`]) or from the one before and the rows
//! that changed ([`Snapshot::advance`]), and is never changed. Nodes are shared between snapshots,
//! so what a change costs grows with the change: each snapshot remembers which nodes the last few
//! changes touched, [`delta`] looks at those alone, and only a new policy looks at everyone.

use crate::config::Relays;
use crate::store::{NetworkRow, NodeRow, Rows};
use proto::filter::Filter;
use proto::id::{Generation, NetworkId, NodeId};
use proto::net::Prefix;
use proto::netmap::{self, Delta, MAX_ENDPOINTS_PER_NODE, Me, Netmap, Peer};
use proto::policy::{
    self, Compiled, Diagnostics, Directory, DirectoryNode, DirectoryUser, RelayChange,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Changes that a snapshot remembers one by one; a longer way back compares whole views.
const MAX_STEPS: usize = 128;

/// A network at one generation.
#[derive(Clone)]
pub struct Snapshot {
    generation: Generation,
    network: netmap::Network,
    nodes: BTreeMap<NodeId, Arc<Node>>,
    policy: Arc<Access>,
    steps: VecDeque<Arc<Step>>,
}

/// A node, as its peers may see it, and what only policy asks for.
#[derive(PartialEq, Eq)]
struct Node {
    peer: Peer,
    advertised: BTreeSet<Prefix>,
}

/// Who may talk with whom.
struct Access {
    users: Vec<String>,
    text: Option<String>,
    /// `None`: there is no policy, so nobody may.
    compiled: Option<Compiled>,
    relays: RelayChange,
}

/// One change, from the generation before.
struct Step {
    base: Generation,
    touched: BTreeSet<NodeId>,
    policy: bool,
}

impl Snapshot {
    /// The network that these rows are.
    ///
    /// # Errors
    /// If the policy among them does not compile for the nodes among them.
    pub fn build(rows: Rows) -> Result<Self, Diagnostics> {
        debug_assert!(rows.complete);
        let empty = Self {
            generation: Generation(0),
            network: network(&rows.network),
            nodes: BTreeMap::new(),
            policy: Arc::new(Access {
                users: Vec::new(),
                text: None,
                compiled: None,
                relays: RelayChange::default(),
            }),
            steps: VecDeque::new(),
        };
        let mut snapshot = empty.advance(rows)?;
        snapshot.steps.clear();
        Ok(snapshot)
    }

    /// The network after these changes.
    ///
    /// # Errors
    /// If the policy does not compile for the nodes as they now are.
    pub fn advance(&self, rows: Rows) -> Result<Self, Diagnostics> {
        if rows.complete && self.generation > Generation(0) {
            return Self::build(rows);
        }
        let mut next = self.clone();
        next.generation = rows.network.generation;
        let mut step = Step {
            base: self.generation,
            touched: BTreeSet::new(),
            policy: rows.policy.is_some(),
        };
        let mut directory_changed = step.policy;
        for id in rows.removed {
            directory_changed |= next.nodes.remove(&id).is_some();
            step.touched.insert(id);
        }
        for row in &rows.nodes {
            let node = node(row, &next.network);
            let before = self.nodes.get(&row.id);
            directory_changed |= before.is_none_or(|old| in_directory(old) != in_directory(&node));
            step.touched.insert(row.id);
            next.nodes.insert(row.id, Arc::new(node));
        }
        if directory_changed {
            next.policy = Arc::new(next.compile(rows.policy)?);
        }
        let labelled: Vec<NodeId> = if step.policy {
            next.nodes.keys().copied().collect()
        } else {
            step.touched.iter().copied().collect()
        };
        next.label(&labelled);
        next.steps.push_back(Arc::new(step));
        while next.steps.len() > MAX_STEPS {
            next.steps.pop_front();
        }
        Ok(next)
    }

    /// The same with these relays, which no row holds, as far as policy leaves them.
    #[must_use]
    pub fn with_relays(mut self, relays: &Relays) -> Self {
        let Relays { stun, regions } = relays;
        self.network.stun.clone_from(stun);
        self.network.relays.clone_from(regions);
        let network = &mut self.network;
        self.policy
            .relays
            .apply(&mut network.relays, &mut network.stun);
        self
    }

    fn compile(&self, news: Option<(Vec<String>, Option<String>)>) -> Result<Access, Diagnostics> {
        let old = || (self.policy.users.clone(), self.policy.text.clone());
        let (users, text) = news.unwrap_or_else(old);
        let mut relays = RelayChange::default();
        let compiled = match &text {
            Some(text) => {
                let policy = policy::parse(text)?;
                relays.clone_from(&policy.relays);
                Some(Compiled::new(&policy, &self.directory_with(&users))?)
            }
            None => None,
        };
        Ok(Access {
            users,
            text,
            compiled,
            relays,
        })
    }

    /// The network as policy sees it.
    #[must_use]
    pub fn directory(&self) -> Directory {
        self.directory_with(&self.policy.users)
    }

    fn directory_with(&self, users: &[String]) -> Directory {
        // Nobody gives users roles yet, so nobody has one.
        let user = |login: &String| DirectoryUser {
            login: login.clone(),
            roles: BTreeSet::new(),
        };
        Directory {
            v4: self.network.v4,
            v6: self.network.v6,
            users: users.iter().map(user).collect(),
            nodes: self
                .nodes
                .iter()
                .map(|(id, node)| (*id, in_directory(node)))
                .collect(),
        }
    }

    /// Writes into these nodes which of the policy's selectors name them.
    fn label(&mut self, nodes: &[NodeId]) {
        let policy = Arc::clone(&self.policy);
        for id in nodes {
            let Some(node) = self.nodes.get_mut(id) else {
                continue;
            };
            let labels = policy
                .compiled
                .as_ref()
                .map(|it| it.labels(*id))
                .unwrap_or_default();
            if node.peer.labels != labels {
                let mut peer = node.peer.clone();
                peer.labels = labels;
                *node = Arc::new(Node {
                    peer,
                    advertised: node.advertised.clone(),
                });
            }
        }
    }

    /// The network's generation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The network's id.
    #[must_use]
    pub fn network(&self) -> NetworkId {
        self.network.id
    }

    /// Whether its nodes are told of any relay.
    #[must_use]
    pub fn has_relays(&self) -> bool {
        !self.network.relays.is_empty()
    }

    /// Whether this node is in the network.
    #[must_use]
    pub fn contains(&self, node: NodeId) -> bool {
        self.nodes.contains_key(&node)
    }

    /// All that `node` may know, or `None` if it is not in the network.
    #[must_use]
    pub fn view_for(&self, node: NodeId) -> Option<Netmap> {
        let me = self.nodes.get(&node)?;
        let ids = self.peers_of(node);
        let peers = ids
            .iter()
            .filter_map(|id| self.nodes.get(id).map(|it| (*id, it.peer.clone())));
        Some(Netmap {
            generation: self.generation,
            network: self.network.clone(),
            me: to_me(&me.peer),
            peers: peers.collect(),
            filter: self.filter(node),
            peers_empty_on_purpose: ids.is_empty(),
        })
    }

    fn peers_of(&self, node: NodeId) -> BTreeSet<NodeId> {
        self.policy
            .compiled
            .as_ref()
            .map(|it| it.peers_of(node))
            .unwrap_or_default()
    }

    fn sees(&self, node: NodeId, other: NodeId) -> bool {
        let both = self.nodes.contains_key(&node) && self.nodes.contains_key(&other);
        both && node != other
            && self
                .policy
                .compiled
                .as_ref()
                .is_some_and(|it| it.sees(node, other))
    }

    fn filter(&self, node: NodeId) -> Filter {
        self.policy
            .compiled
            .as_ref()
            .map(|it| it.filter(node))
            .unwrap_or_default()
    }

    /// The nodes that changed since `old`; `None`: take it that everything did.
    fn touched_since(&self, old: &Self) -> Option<BTreeSet<NodeId>> {
        let mut touched = BTreeSet::new();
        let mut reached = self.generation;
        for step in self.steps.iter().rev() {
            if reached <= old.generation {
                break;
            }
            if step.policy {
                return None;
            }
            touched.extend(&step.touched);
            reached = step.base;
        }
        (reached == old.generation).then_some(touched)
    }
}

/// What leads `node` from its view of `old` to its view of `new`; `None` if nothing does. `base`
/// is the generation that the node has, which may be older than `old` where its view is the same.
#[must_use]
pub fn delta(old: &Snapshot, new: &Snapshot, node: NodeId, base: Generation) -> Option<Delta> {
    let (old_me, new_me) = (old.nodes.get(&node)?, new.nodes.get(&node)?);
    let mut delta = no_news(new, base);
    let touched = new
        .touched_since(old)
        .filter(|touched| !touched.contains(&node) || in_directory(old_me) == in_directory(new_me));
    let candidates = touched.unwrap_or_else(|| &old.peers_of(node) | &new.peers_of(node));
    for id in candidates {
        match (old.sees(node, id), new.sees(node, id)) {
            (true, true) if old.nodes.get(&id) == new.nodes.get(&id) => {}
            (_, true) => delta
                .set
                .extend(new.nodes.get(&id).map(|it| it.peer.clone())),
            (true, false) => delta.removed.push(id),
            (false, false) => {}
        }
    }
    if old.network != new.network {
        delta.network = Some(new.network.clone());
    }
    if to_me(&old_me.peer) != to_me(&new_me.peer) {
        delta.me = Some(to_me(&new_me.peer));
    }
    if !Arc::ptr_eq(&old.policy, &new.policy) {
        let filter = new.filter(node);
        delta.filter = (filter != old.filter(node)).then_some(filter);
    }
    let news = delta.network.is_some()
        || delta.me.is_some()
        || delta.filter.is_some()
        || !delta.set.is_empty()
        || !delta.removed.is_empty();
    if !news {
        return None;
    }
    delta.peers_empty_on_purpose = delta.set.is_empty() && new.peers_of(node).is_empty();
    Some(delta)
}

/// A delta that only says that `node`'s view at `new` is the one that it has from `base`.
#[must_use]
pub fn empty_delta(new: &Snapshot, node: NodeId, base: Generation) -> Delta {
    let peers_empty_on_purpose = new.peers_of(node).is_empty();
    Delta {
        peers_empty_on_purpose,
        ..no_news(new, base)
    }
}

fn no_news(new: &Snapshot, base: Generation) -> Delta {
    Delta {
        base,
        next: new.generation,
        network: None,
        me: None,
        set: Vec::new(),
        removed: Vec::new(),
        filter: None,
        peers_empty_on_purpose: false,
    }
}

fn network(row: &NetworkRow) -> netmap::Network {
    netmap::Network {
        id: row.id,
        name: row.name.clone(),
        v4: row.v4,
        v6: row.v6,
        stun: Vec::new(),
        relays: BTreeMap::new(),
    }
}

fn node(row: &NodeRow, network: &netmap::Network) -> Node {
    let peer = Peer {
        id: row.id,
        name: row.name.clone(),
        key: row.key,
        addrs: addrs((network.v4, network.v6), row.host).to_vec(),
        routes: &row.advertised & &row.approved,
        endpoints: endpoints(row),
        owner: row.owner.clone(),
        labels: BTreeSet::new(),
        online: row.online,
        disco: row.disco,
        home: row.home,
    };
    Node {
        peer,
        advertised: row.advertised.clone(),
    }
}

/// The addresses of host number `host` in a network of these prefixes.
#[must_use]
pub fn addrs((v4, v6): (Prefix, Prefix), host: u64) -> [IpAddr; 2] {
    [v4, v6].map(|prefix| match prefix.addr() {
        // The host number was checked against both prefixes when it was given out.
        IpAddr::V4(base) => IpAddr::from((base.to_bits() | host as u32).to_be_bytes()),
        IpAddr::V6(base) => IpAddr::from((base.to_bits() | u128::from(host)).to_be_bytes()),
    })
}

/// Where the node may be reached. What the coordinator saw stands first, unless the node itself
/// knows that address: it is known to have carried packets.
fn endpoints(row: &NodeRow) -> Vec<SocketAddr> {
    // Behind a NAT the port is a guess, and a node that knows that address with a port knows better.
    let known = |addr: &IpAddr| row.endpoints.iter().any(|known| known.ip() == *addr);
    let seen = row
        .seen_addr
        .filter(|addr| !known(addr))
        .map(|addr| SocketAddr::new(addr, row.listen_port));
    let mut out: Vec<SocketAddr> = Vec::new();
    for endpoint in seen.into_iter().chain(row.endpoints.iter().copied()) {
        if is_endpoint(endpoint) && !out.contains(&endpoint) && out.len() < MAX_ENDPOINTS_PER_NODE {
            out.push(endpoint);
        }
    }
    out
}

/// Whether another machine could send to it.
#[must_use]
pub fn is_endpoint(endpoint: SocketAddr) -> bool {
    let ip = endpoint.ip();
    let local = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    endpoint.port() != 0 && !local && !link_local
}

fn in_directory(node: &Node) -> DirectoryNode {
    DirectoryNode {
        name: node.peer.name.clone(),
        owner: node.peer.owner.clone(),
        addrs: node.peer.addrs.clone(),
        routes: node.peer.routes.clone(),
        advertised: node.advertised.clone(),
    }
}

fn to_me(peer: &Peer) -> Me {
    Me {
        id: peer.id,
        name: peer.name.clone(),
        key: peer.key,
        addrs: peer.addrs.clone(),
        routes: peer.routes.clone(),
        owner: peer.owner.clone(),
        labels: peer.labels.clone(),
    }
}
