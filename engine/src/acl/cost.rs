//! What a policy costs that does not fit, and which of its rules cost it.
//!
//! A limit counts entries of one table, so what is told of a rule is in how many entries of that
//! table it has a part: pairs that it allows something for, port sets and pages that hold its
//! ports, prefixes that it names. That is what gets smaller when the rule does.

use super::classes::Roles;
use super::{Acl, abi};
use ebpf::abi::{EVERYTHING, PAGE_PORTS, PairKey, SetId};
use proto::filter::{Direction, Rule, Selector};
use proto::net::{Prefix, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Most rules that are named.
const MAX_NAMED: usize = 3;
/// Most pairs of classes that are looked at, so that a refusal takes no longer than a change.
const MAX_LOOKED_AT: usize = 65_536;

/// A table with a limit of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Overlay addresses.
    Addresses,
    /// Routes, and prefixes inside them.
    Prefixes,
    /// Pairs of classes.
    Pairs,
    /// Port sets, by protocol.
    PortSets,
    /// Bitmaps of large port sets.
    Pages,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Addresses => "addresses of peers",
            Self::Prefixes => "prefixes in and of subnet routes",
            Self::Pairs => "pairs of sources and destinations that rules tell apart",
            Self::PortSets => "port sets",
            Self::Pages => "pages of scattered ports",
        })
    }
}

/// The tables that this policy and these peers need do not fit. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct TooLarge {
    /// Which table.
    pub table: Table,
    /// Its limit, in entries.
    pub limit: usize,
    /// The rules that have a part in most of its entries, the costliest first. None of them has a
    /// part in addresses and routes, which are there whatever the policy says.
    pub rules: Vec<RuleCost>,
}

/// What one rule costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleCost {
    /// Where it starts in the policy file.
    pub line: u32,
    /// Entries in which it has a part.
    pub entries: usize,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            table,
            limit,
            rules,
        } = self;
        write!(f, "this node would need more than {limit} {table}; ")?;
        for (number, RuleCost { line, entries }) in rules.iter().enumerate() {
            match number {
                0 => write!(f, "the rule at line {line} has a part in {entries} of them")?,
                _ => write!(f, ", the one at line {line} in {entries}")?,
            }
        }
        f.write_str(match (table, rules.is_empty()) {
            (Table::Addresses, _)
            | (Table::Prefixes | Table::Pairs | Table::PortSets | Table::Pages, true) => {
                "let it see fewer peers and routes: name fewer of them in rules about it"
            }
            (Table::Prefixes, false) => ": name fewer prefixes there, or wider ones",
            (Table::Pairs, false) => ": name fewer distinct sources or destinations there",
            (Table::PortSets | Table::Pages, false) => {
                ": name fewer or wider port ranges or a protocol there, or give the same ports to \
                 more sources at once"
            }
        })
    }
}

impl Acl {
    /// Says which rules need more than `limit` entries of `table`.
    pub(super) fn too_large(&self, table: Table, limit: usize) -> TooLarge {
        let mut costs: BTreeMap<u32, usize> = BTreeMap::new();
        for direction in [Direction::Ingress, Direction::Egress] {
            match table {
                Table::Addresses => {}
                Table::Prefixes => self.count_prefixes(direction, &mut costs),
                Table::Pairs | Table::PortSets | Table::Pages => {
                    self.count_pairs(table, direction, &mut costs);
                }
            }
        }
        let mut rules: Vec<RuleCost> = costs
            .into_iter()
            .map(|(line, entries)| RuleCost { line, entries })
            .filter(|cost| cost.entries > 0)
            .collect();
        rules.sort_by_key(|cost| (std::cmp::Reverse(cost.entries), cost.line));
        rules.truncate(MAX_NAMED);
        TooLarge {
            table,
            limit,
            rules,
        }
    }

    /// The prefixes inside routes that each rule names.
    fn count_prefixes(&self, direction: Direction, costs: &mut BTreeMap<u32, usize>) {
        let ours = self.me.iter().flat_map(|me| &me.routes);
        let theirs = self.peers.values().flat_map(|peer| &peer.routes);
        let routes: BTreeSet<Prefix> = ours.chain(theirs).copied().collect();
        let inside = |prefix: &Prefix| {
            let mut around = (0..prefix.len()).filter_map(|len| {
                let around = Prefix::containing(prefix.addr(), len);
                around.ok().filter(|around| routes.contains(around))
            });
            around.next().is_some()
        };
        for rule in self.filter.rules(direction) {
            let named = rule.srcs.iter().chain(&rule.dsts);
            let counted = named.filter(|selector| match selector {
                Selector::Prefix(prefix) => inside(prefix),
                Selector::Label(_) => false,
            });
            *costs.entry(rule.line).or_default() += counted.count();
        }
    }

    /// The entries for pairs of classes in which each rule has a part.
    fn count_pairs(&self, table: Table, direction: Direction, costs: &mut BTreeMap<u32, usize>) {
        let (roles, rules) = (self.roles(direction), self.filter.rules(direction));
        let mut counted: BTreeSet<(SetId, u32)> = BTreeSet::new();
        let met = self.unions.iter().filter_map(|(key, set)| {
            let mine = key.direction == abi(direction) as u32;
            set.filter(|_| mine).map(|set| (key, set))
        });
        for (key, set) in met.take(MAX_LOOKED_AT) {
            for index in common(roles, key) {
                let Some(rule) = rules.get(index as usize) else {
                    continue;
                };
                let entries = match table {
                    Table::Pairs => 1,
                    Table::Addresses | Table::Prefixes => 0,
                    Table::PortSets | Table::Pages => {
                        let new = set != EVERYTHING && counted.insert((set, index));
                        if new { self.parts(table, set, rule) } else { 0 }
                    }
                };
                *costs.entry(rule.line).or_default() += entries;
            }
        }
    }

    /// Entries of one port set in which a rule has a part.
    fn parts(&self, table: Table, set: SetId, rule: &Rule) -> usize {
        let Some(ports) = self.contents.get(&set) else {
            return 0;
        };
        let mut parts = BTreeSet::new();
        for protocol in ports.protocols() {
            let speaks = |wanted: Option<Protocol>| wanted.is_none_or(|it| it == protocol);
            let services = rule.services.iter();
            for service in services.filter(|service| speaks(service.protocol)) {
                match table {
                    Table::Pages if ports.is_paged(protocol) => {
                        let (first, last) = (service.ports.first(), service.ports.last());
                        let pages = first / PAGE_PORTS..=last / PAGE_PORTS;
                        parts.extend(pages.map(|page| (protocol, page)));
                    }
                    Table::PortSets => {
                        parts.insert((protocol, 0));
                    }
                    Table::Addresses | Table::Prefixes | Table::Pairs | Table::Pages => {}
                }
            }
        }
        parts.len()
    }
}

/// The rules that select both classes of a pair.
fn common(roles: &Roles, key: &PairKey) -> Vec<u32> {
    let wanted = roles.destination.rules(key.destination);
    let rules = roles.source.rules(key.source).iter();
    let both = rules.filter(|index| wanted.binary_search(index).is_ok());
    both.copied().collect()
}
