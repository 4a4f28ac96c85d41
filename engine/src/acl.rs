//! Lowering: from the filter and the peers to the tables that the programs look into.
//!
//! ```text
//! address ─► identity (class as source, class as destination, ours or a peer's)
//! (source class, destination class, direction) ─► port set ─► protocol ─► ports
//! ```
//!
//! Addresses that no rule tells apart share a class ([`classes`]); equal port sets share an id
//! ([`ports`]). So a packet costs the same few look-ups for one rule and for a hundred thousand,
//! and the tables hold no product of rules and addresses: a node is the only destination on
//! ingress and the only source on egress (with the routes that it serves), which leaves about one
//! pair a class of peers.
//!
//! [`Acl::lower`] keeps its numbers from one call to the next, as long as the filter is the same.
//! A peer that joins then adds its own addresses and, if it is the first of its kind, a pair or
//! two; [`Change::InPlace`] lists just these. Any other change is a [`Change::Swap`]: the idle slot
//! is filled, then one word makes it count. Whether a change *can narrow* what is allowed decides
//! whether the epoch rises and living flows are decided again.
//!
//! Sizes are checked here, before anything changes: [`TooLarge`] names the table, its limit and
//! the rules that cost most ([`cost`]), and the old tables stay.

pub mod addresses;
mod change;
mod classes;
mod cost;
pub mod lines;
mod near;
mod ports;

use classes::{Interner, Role, Roles, host, own_is_source};
use ebpf::abi::{
    Addr, Direction as AbiDirection, EVERYTHING, Grant, Identity, Page, PageKey, PairKey, Ports,
    PortsKey, SetId, share_of, side,
};
use ports::{Entries, PortSet};
use proto::filter::{Direction, Filter, Label, Rule};
use proto::id::NodeId;
use proto::net::{Prefix, Protocol};
use proto::netmap::{Me, Peer};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

pub use change::{Change, Patch};
pub use cost::{RuleCost, Table, TooLarge};
pub use near::{Flow, Lacks, Near};

/// Most overlay addresses: two for each of the most peers, and our own.
pub const MAX_IDENTITIES: usize = 262_144;
/// Most entries in the longest-prefix table: routes, and prefixes that rules name inside them.
/// Freeing a very large trie holds a CPU for seconds.
pub const MAX_PREFIXES: usize = 32_768;
/// Most pairs of classes.
pub const MAX_PAIRS: usize = 524_288;
/// Most (port set, protocol) entries.
pub const MAX_PORTS: usize = 262_144;
/// Most pages of 512 ports: 128 of them are one set with ranges all over.
pub const MAX_PAGES: usize = 131_072;

/// A prefix as the longest-prefix table orders it. IPv4 lies in `::ffff:0:0/96`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PrefixKey {
    /// Length in bits, 0 to 128.
    pub bits: u32,
    /// First address.
    pub addr: Addr,
}

impl From<Prefix> for PrefixKey {
    fn from(prefix: Prefix) -> Self {
        let offset = if prefix.is_v4() { 96 } else { 0 };
        Self {
            bits: u32::from(prefix.len()) + offset,
            addr: prefix.addr().into(),
        }
    }
}

/// The contents of one slot of every policy table. Empty tables deny everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Overlay addresses of peers and of the node itself.
    pub identities: BTreeMap<Addr, Identity>,
    /// Routes, and prefixes that rules tell apart inside them.
    pub prefixes: BTreeMap<PrefixKey, Identity>,
    /// What one class may initiate to another.
    pub pairs: BTreeMap<PairKey, Grant>,
    /// Port sets by protocol, beside what grants hold of them.
    pub ports: BTreeMap<PortsKey, Ports>,
    /// Bitmaps of large port sets.
    pub pages: BTreeMap<PageKey, Page>,
}

/// The lowered policy of a node, and what is needed to lower the next one with few changes.
#[derive(Clone, Debug, Default)]
pub struct Acl {
    filter: Filter,
    me: Option<Me>,
    peers: BTreeMap<NodeId, Peer>,
    ingress: Roles,
    egress: Roles,
    unions: BTreeMap<PairKey, Option<SetId>>,
    sets: Interner<PortSet>,
    contents: BTreeMap<SetId, PortSet>,
    tables: Tables,
}

impl Acl {
    /// The tables as last lowered. Empty before the first time.
    #[must_use]
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Lowers `filter` for `me` among `peers`, and says what that changes in the tables.
    ///
    /// # Errors
    /// [`TooLarge`]; `self` is then unchanged.
    pub fn lower(
        &mut self,
        filter: &Filter,
        me: &Me,
        peers: &BTreeMap<NodeId, Peer>,
    ) -> Result<Change, TooLarge> {
        let same_filter = self.me.is_some() && self.filter == *filter;
        let mut next = if same_filter {
            // The old tables are compared with, not needed in the copy.
            let tables = std::mem::take(&mut self.tables);
            let next = self.clone();
            self.tables = tables;
            next
        } else {
            Self {
                filter: filter.clone(),
                ingress: Roles::new(&filter.ingress),
                egress: Roles::new(&filter.egress),
                ..Self::default()
            }
        };
        next.me = Some(me.clone());
        next.peers.clone_from(peers);
        next.fill(me, peers)?;
        let change = change::between(self, &next, same_filter);
        *self = next;
        Ok(change)
    }

    /// The rules that allow `src` to initiate `protocol` to `port` of `dst`: provenance for
    /// `explain`, from the classes that the programs use.
    #[must_use]
    pub fn allowing(
        &self,
        direction: Direction,
        src: IpAddr,
        dst: IpAddr,
        protocol: Protocol,
        port: u16,
    ) -> Vec<&Rule> {
        let (Some(source), Some(destination)) = (self.identity(src), self.identity(dst)) else {
            return Vec::new();
        };
        let roles = self.roles(direction);
        let wanted = roles.destination.rules(destination.as_destination);
        let rules = roles.source.rules(source.as_source).iter();
        rules
            .filter(|index| wanted.binary_search(index).is_ok())
            .filter_map(|index| self.filter.rules(direction).get(*index as usize))
            .filter(|rule| {
                rule.services
                    .iter()
                    .any(|service| service.matches(protocol, port))
            })
            .collect()
    }

    /// What the tables know of an address: exact first, then the longest prefix.
    #[must_use]
    pub fn identity(&self, addr: IpAddr) -> Option<Identity> {
        self.tables
            .identities
            .get(&addr.into())
            .copied()
            .or_else(|| self.tables.route(addr))
    }

    fn roles(&self, direction: Direction) -> &Roles {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    fn fill(&mut self, me: &Me, peers: &BTreeMap<NodeId, Peer>) -> Result<(), TooLarge> {
        let mut tables = Tables::default();
        for peer in peers.values() {
            for addr in &peer.addrs {
                let identity = self.identify(&host(*addr), &peer.labels, peer_owner(peer));
                tables.identities.insert((*addr).into(), identity);
            }
        }
        for addr in &me.addrs {
            let identity = self.identify(&host(*addr), &me.labels, OURS);
            tables.identities.insert((*addr).into(), identity);
        }
        self.fits(Table::Addresses, tables.identities.len(), MAX_IDENTITIES)?;
        self.fill_prefixes(&mut tables, me, peers)?;
        let sets = self.fill_sets(&tables)?;
        self.fill_pairs(&mut tables, &sets)?;
        self.tables = tables;
        Ok(())
    }

    fn identify(&mut self, prefix: &Prefix, labels: &BTreeSet<Label>, owner: Owner) -> Identity {
        let Owner { side, share } = owner;
        let (source, destination) = if side == side::OWN {
            (&mut self.egress.source, &mut self.ingress.destination)
        } else {
            (&mut self.ingress.source, &mut self.egress.destination)
        };
        Identity {
            as_source: source.class(prefix, labels),
            as_destination: destination.class(prefix, labels),
            side,
            share,
        }
    }

    /// Every route is an entry, and so is every named prefix that lies inside one: an address then
    /// has the selectors of the entry that it matches longest, exactly.
    fn fill_prefixes(
        &mut self,
        tables: &mut Tables,
        me: &Me,
        peers: &BTreeMap<NodeId, Peer>,
    ) -> Result<(), TooLarge> {
        let mut routes: BTreeMap<Prefix, Owner> = BTreeMap::new();
        for peer in peers.values() {
            for route in &peer.routes {
                routes.insert(*route, peer_owner(peer));
            }
        }
        // What we serve ourselves is ours, whoever else serves it too.
        for route in &me.routes {
            routes.insert(*route, OURS);
        }
        let mut entries = routes.clone();
        for named in self.named_prefixes() {
            if let Some(owner) = longest_cover(&routes, &named) {
                entries.insert(named, owner);
            }
        }
        self.fits(Table::Prefixes, entries.len(), MAX_PREFIXES)?;
        let nobody = BTreeSet::new();
        for (prefix, owner) in entries {
            let identity = self.identify(&prefix, &nobody, owner);
            tables.prefixes.insert(prefix.into(), identity);
        }
        Ok(())
    }

    fn named_prefixes(&self) -> BTreeSet<Prefix> {
        let roles = [&self.ingress, &self.egress];
        let both = roles
            .iter()
            .flat_map(|roles| [&roles.source, &roles.destination]);
        both.flat_map(Role::prefixes).copied().collect()
    }

    /// The port set of every pair that has one.
    fn fill_sets(&mut self, tables: &Tables) -> Result<BTreeMap<PairKey, SetId>, TooLarge> {
        let mut sets = BTreeMap::new();
        for direction in [Direction::Ingress, Direction::Egress] {
            let (sources, destinations) = used_classes(tables, direction);
            for &source in &sources {
                for &destination in &destinations {
                    let abi_direction = abi(direction) as u32;
                    let key = PairKey {
                        source,
                        destination,
                        direction: abi_direction,
                    };
                    if let Some(set) = self.union(direction, key) {
                        sets.insert(key, set);
                    }
                }
                self.fits(Table::Pairs, sets.len(), MAX_PAIRS)?;
            }
        }
        Ok(sets)
    }

    /// The port set of all rules that select both classes of a pair.
    fn union(&mut self, direction: Direction, key: PairKey) -> Option<SetId> {
        if let Some(known) = self.unions.get(&key) {
            return *known;
        }
        let roles = self.roles(direction);
        let (few, many) = {
            let source = roles.source.rules(key.source);
            let destination = roles.destination.rules(key.destination);
            if source.len() <= destination.len() {
                (source, destination)
            } else {
                (destination, source)
            }
        };
        let rules = self.filter.rules(direction);
        let shared = few.iter().filter(|index| many.binary_search(index).is_ok());
        let services: BTreeSet<_> = shared
            .filter_map(|index| rules.get(*index as usize))
            .flat_map(|rule| &rule.services)
            .collect();
        let set = (!services.is_empty()).then(|| {
            let ports = PortSet::of(services);
            if ports.is_everything() {
                return EVERYTHING;
            }
            let (id, new) = self.sets.number(ports.clone());
            if new {
                self.contents.insert(id, ports);
            }
            id
        });
        self.unions.insert(key, set);
        set
    }

    fn fill_pairs(
        &self,
        tables: &mut Tables,
        sets: &BTreeMap<PairKey, SetId>,
    ) -> Result<(), TooLarge> {
        let used: BTreeSet<SetId> = sets.values().copied().collect();
        let mut grants = BTreeMap::from([(EVERYTHING, Grant::EVERYTHING)]);
        for id in used {
            let Some(set) = self.contents.get(&id) else {
                continue;
            };
            let Entries {
                grant,
                ports,
                pages,
            } = set.entries(id);
            grants.insert(id, grant);
            tables.ports.extend(ports);
            tables.pages.extend(pages);
            self.fits(Table::PortSets, tables.ports.len(), MAX_PORTS)?;
            self.fits(Table::Pages, tables.pages.len(), MAX_PAGES)?;
        }
        let granted = |(key, set): (&PairKey, &SetId)| Some((*key, *grants.get(set)?));
        tables.pairs = sets.iter().filter_map(granted).collect();
        Ok(())
    }

    fn fits(&self, table: Table, entries: usize, limit: usize) -> Result<(), TooLarge> {
        if entries <= limit {
            Ok(())
        } else {
            Err(self.too_large(table, limit))
        }
    }
}

impl Tables {
    /// The identity of the longest prefix that contains `addr`.
    #[must_use]
    pub fn route(&self, addr: IpAddr) -> Option<Identity> {
        let bits: u8 = if addr.is_ipv4() { 32 } else { 128 };
        (0..=bits).rev().find_map(|len| {
            let prefix = Prefix::containing(addr, len).ok()?;
            self.prefixes.get(&prefix.into()).copied()
        })
    }

    /// Entries of all tables together.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.identities.len()
            + self.prefixes.len()
            + self.pairs.len()
            + self.ports.len()
            + self.pages.len()
    }
}

/// Whose an address is, and which share of the flow tables its flows take.
#[derive(Clone, Copy)]
struct Owner {
    side: u32,
    share: u32,
}

/// This node, and what lies behind it.
const OURS: Owner = Owner {
    side: side::OWN,
    share: 0,
};

fn peer_owner(peer: &Peer) -> Owner {
    Owner {
        side: side::PEER,
        share: share_of(peer.id.0),
    }
}

/// The map's number of a direction.
fn abi(direction: Direction) -> AbiDirection {
    match direction {
        Direction::Ingress => AbiDirection::Ingress,
        Direction::Egress => AbiDirection::Egress,
    }
}

/// The classes that addresses in the tables have as sources and as destinations of `direction`.
fn used_classes(tables: &Tables, direction: Direction) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let own_is_source = own_is_source(direction);
    let (mut sources, mut destinations) = (BTreeSet::new(), BTreeSet::new());
    for identity in tables.identities.values().chain(tables.prefixes.values()) {
        if (identity.side == side::OWN) == own_is_source {
            sources.insert(identity.as_source);
        } else {
            destinations.insert(identity.as_destination);
        }
    }
    sources.remove(&0);
    destinations.remove(&0);
    (sources, destinations)
}

/// Whose the longest route around `prefix` is.
fn longest_cover(routes: &BTreeMap<Prefix, Owner>, prefix: &Prefix) -> Option<Owner> {
    (0..=prefix.len()).rev().find_map(|len| {
        let around = Prefix::containing(prefix.addr(), len).ok()?;
        routes.get(&around).copied()
    })
}
