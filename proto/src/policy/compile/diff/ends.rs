//! Where packets come from and go to, as far as two policies can tell: nodes, stretches of subnet
//! routes, and what lies beyond exit nodes.

use super::super::super::addrset::AddrSet;
use super::super::super::directory::{Directory, DirectoryNode};
use super::super::lookup::{PrefixIndex, internet};
use super::super::{Compiled, SelectorId, unique};
use crate::filter::{Label, Selector};
use crate::id::NodeId;
use crate::net::Prefix;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Beyond exit nodes, and not the internet: private and reserved addresses.
const BEYOND: &str = "other addresses beyond exit nodes";

/// Where packets come from or go to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Endpoint {
    /// The node's name; the prefix behind a router; or what lies beyond exit nodes, in words.
    pub name: String,
    /// The node's addresses, or exactly the stretch that is no node's.
    pub addrs: Vec<Prefix>,
    /// Login of the node's user.
    pub user: Option<String>,
}

/// The addresses of one family of an [`Endpoint`], and what either policy says of them.
pub(super) struct Face {
    /// Index of the endpoint.
    pub(super) end: u32,
    pub(super) v4: bool,
    /// Index of what matches it.
    pub(super) matched: usize,
}

/// What policy can say of an address. Faces with equal ones are never told apart by selectors.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Matched {
    /// Behind a router or an exit node, not a node's own.
    pub(super) routed: bool,
    /// The selectors that match, in the old policy and in the new, sorted.
    pub(super) selectors: [Vec<SelectorId>; 2],
}

/// Every endpoint of a network.
#[derive(Default)]
pub(super) struct Census {
    pub(super) ends: Vec<Endpoint>,
    pub(super) faces: Vec<Face>,
    pub(super) matched: Vec<Matched>,
    numbers: BTreeMap<Matched, usize>,
}

impl Census {
    pub(super) fn new(policies: [&Compiled; 2], directory: &Directory) -> Self {
        let lookups = policies.map(Lookup::new);
        let matching = |addr: IpAddr, owner: Option<NodeId>| Matched {
            routed: owner.is_none(),
            selectors: [0, 1].map(|it| lookups[it].matching(policies[it], addr, owner)),
        };
        let mut out = Self::default();
        for (id, node) in &directory.nodes {
            let end = out.end(Endpoint {
                name: node.name.clone(),
                addrs: node.addrs.iter().copied().map(Prefix::host).collect(),
                user: node.login().map(str::to_owned),
            });
            for addr in &node.addrs {
                out.face(end, addr.is_ipv4(), matching(*addr, Some(*id)));
            }
        }
        for (name, addrs) in stretches(policies, directory) {
            if let Some(first) = addrs.first() {
                let (v4, matched) = (first.is_v4(), matching(first.addr(), None));
                let end = out.end(Endpoint {
                    name,
                    addrs,
                    user: None,
                });
                out.face(end, v4, matched);
            }
        }
        for (name, (addrs, matched)) in beyond(&lookups, directory) {
            let user = None;
            let end = out.end(Endpoint { name, addrs, user });
            for (v4, matched) in matched {
                out.face(end, v4, matched);
            }
        }
        out
    }

    fn end(&mut self, endpoint: Endpoint) -> u32 {
        self.ends.push(endpoint);
        self.ends.len() as u32 - 1
    }

    fn face(&mut self, end: u32, v4: bool, matched: Matched) {
        let next = self.matched.len();
        let number = *self.numbers.entry(matched).or_insert_with_key(|matched| {
            self.matched.push(matched.clone());
            next
        });
        self.faces.push(Face {
            end,
            v4,
            matched: number,
        });
    }
}

/// Selectors by what they match.
struct Lookup {
    prefixes: PrefixIndex,
    exact: BTreeMap<Selector, SelectorId>,
}

impl Lookup {
    fn new(policy: &Compiled) -> Self {
        let numbered = policy.selectors.iter().enumerate();
        Self {
            prefixes: PrefixIndex::new(&policy.selectors),
            exact: numbered
                .map(|(id, selector)| (*selector, id as SelectorId))
                .collect(),
        }
    }

    /// The selectors that match one address.
    fn matching(&self, policy: &Compiled, addr: IpAddr, owner: Option<NodeId>) -> Vec<SelectorId> {
        let mut out = Vec::new();
        self.prefixes.containing(addr, &mut out);
        let facts = owner.and_then(|owner| policy.facts(owner));
        let labels = facts.into_iter().flat_map(|facts| &facts.labels);
        out.extend(labels.filter_map(|label: &Label| self.exact.get(&Selector::Label(*label))));
        unique(&mut out);
        out
    }

    /// The selectors that match what lies beyond an exit node: these prefixes themselves, because
    /// default routes overlap nothing else.
    fn exactly(&self, prefixes: &[Prefix]) -> Vec<SelectorId> {
        let ids = prefixes
            .iter()
            .filter_map(|prefix| self.exact.get(&Selector::Prefix(*prefix)));
        let mut out: Vec<SelectorId> = ids.copied().collect();
        unique(&mut out);
        out
    }
}

/// The subnet routes, cut where a prefix selector of either policy begins or ends, without the
/// addresses of nodes.
fn stretches(policies: [&Compiled; 2], directory: &Directory) -> Vec<(String, Vec<Prefix>)> {
    let routes = subnet_routes(directory);
    let whole = AddrSet::of(&routes).without(&own_addrs(directory));
    let mut cuts = routes;
    for selector in policies.iter().flat_map(|policy| &policy.selectors) {
        if let Selector::Prefix(prefix) = selector
            && prefix.len() > 0
            && whole.overlaps(prefix)
        {
            cuts.insert(*prefix);
        }
    }
    let mut out = Vec::new();
    for cut in &cuts {
        // Prefixes nest or are disjoint, so the next ones tell what is cut out of this one.
        let smaller = cuts
            .range(cut..)
            .skip(1)
            .take_while(|other| cut.covers(other));
        let rest = AddrSet::of([cut]).without(&AddrSet::of(smaller));
        let addrs = rest.intersection(&whole).prefixes();
        if addrs.is_empty() {
            continue;
        }
        let name = if cut.is_host() {
            cut.addr().to_string()
        } else if addrs == [*cut] {
            cut.to_string()
        } else {
            format!("the rest of {cut}")
        };
        out.push((name, addrs));
    }
    out
}

/// What lies beyond exit nodes, if there are any: the internet, and every other address that is
/// neither the network's nor behind a subnet route. With what matches it, by family.
fn beyond(
    lookups: &[Lookup; 2],
    directory: &Directory,
) -> BTreeMap<String, (Vec<Prefix>, BTreeMap<bool, Matched>)> {
    let mut out: BTreeMap<String, (Vec<Prefix>, BTreeMap<bool, Matched>)> = BTreeMap::new();
    let known = AddrSet::of([directory.v4, directory.v6].iter())
        .union(&AddrSet::of(&subnet_routes(directory)))
        .union(&own_addrs(directory));
    let internet = internet(directory);
    for all in [Prefix::ALL_V4, Prefix::ALL_V6] {
        let mut nodes = directory.nodes.values();
        if !nodes.any(|node| node.routes.contains(&all)) {
            continue;
        }
        let matching = |prefixes: &[Prefix]| Matched {
            routed: true,
            selectors: [0, 1].map(|it| lookups[it].exactly(prefixes)),
        };
        let open = AddrSet::of([&all]).without(&known);
        // A rule may name a piece of the internet by exactly its prefix, and so tell it apart.
        let mut groups: BTreeMap<Matched, Vec<Prefix>> = BTreeMap::new();
        for prefix in internet.iter().filter(|prefix| all.covers(prefix)) {
            let matched = matching(&[*prefix, all]);
            groups.entry(matched).or_default().push(*prefix);
        }
        let most = groups.values().map(Vec::len).max();
        let mut groups: Vec<(String, Matched, AddrSet)> = groups
            .into_iter()
            .map(|(matched, prefixes)| {
                let name = if Some(prefixes.len()) == most {
                    "the internet".to_owned()
                } else {
                    let names: Vec<String> = prefixes.iter().map(Prefix::to_string).collect();
                    names.join("+")
                };
                (name, matched, AddrSet::of(&prefixes))
            })
            .collect();
        let rest = AddrSet::of([&all]).without(&AddrSet::of(&internet));
        groups.push((BEYOND.to_owned(), matching(&[all]), rest));
        for (name, matched, addrs) in groups {
            let addrs = addrs.intersection(&open).prefixes();
            if !addrs.is_empty() {
                let end = out.entry(name).or_default();
                end.0.extend(addrs);
                end.1.insert(all.is_v4(), matched);
            }
        }
    }
    out
}

fn subnet_routes(directory: &Directory) -> BTreeSet<Prefix> {
    let nodes = directory.nodes.values();
    let routes = nodes.flat_map(DirectoryNode::subnet_routes);
    routes.copied().collect()
}

fn own_addrs(directory: &Directory) -> AddrSet {
    let addrs = directory.nodes.values().flat_map(|node| &node.addrs);
    let hosts: Vec<Prefix> = addrs.copied().map(Prefix::host).collect();
    AddrSet::of(&hosts)
}
