//! What leads from one lowered policy to the next.

use super::{Acl, PrefixKey, Tables};
use ebpf::abi::{Addr, Identity, Page, PageKey, PairKey, Ports, PortsKey, SetId, side};
use proto::filter::{Direction, Filter, Label, Rule, Selector};
use proto::net::Prefix;
use std::collections::{BTreeMap, BTreeSet};

/// Most entries that are changed one by one; beyond that a swap is cheaper and simpler.
const MAX_IN_PLACE: usize = 1_024;

/// How the tables in the kernel become the lowered ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// They are.
    None,
    /// Entry by entry in the active slot. Each step is the old policy or the new one, for each
    /// address by itself.
    InPlace(Box<Patch>),
    /// Fill the idle slot and switch.
    Swap {
        /// Whether something may be allowed no more: raise the epoch.
        narrows: bool,
    },
}

/// Single entries to write and to remove, to be applied from the first field to the last: what is
/// named comes before what names it, longer prefixes before the shorter ones around them, and what
/// nothing names any more goes last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patch {
    /// Pages to write.
    pub pages: Vec<(PageKey, Page)>,
    /// Port sets to write.
    pub ports: Vec<(PortsKey, Ports)>,
    /// Pairs to write.
    pub pairs: Vec<(PairKey, SetId)>,
    /// Addresses to forget.
    pub identities_removed: Vec<Addr>,
    /// Prefixes to forget, shortest first.
    pub prefixes_removed: Vec<PrefixKey>,
    /// Prefixes to write, longest first.
    pub prefixes: Vec<(PrefixKey, Identity)>,
    /// Addresses to write.
    pub identities: Vec<(Addr, Identity)>,
    /// Pairs to forget.
    pub pairs_removed: Vec<PairKey>,
    /// Port sets to forget.
    pub ports_removed: Vec<PortsKey>,
    /// Pages to forget.
    pub pages_removed: Vec<PageKey>,
    /// Whether something may be allowed no more: raise the epoch when done.
    pub narrows: bool,
}

impl Patch {
    /// Entries that it writes or removes.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.pages.len()
            + self.ports.len()
            + self.pairs.len()
            + self.identities_removed.len()
            + self.prefixes_removed.len()
            + self.prefixes.len()
            + self.identities.len()
            + self.pairs_removed.len()
            + self.ports_removed.len()
            + self.pages_removed.len()
    }
}

/// The change from `old` to `new`. With the `same_filter`, numbers mean the same in both.
pub(super) fn between(old: &Acl, new: &Acl, same_filter: bool) -> Change {
    if old.me.is_some() && old.tables == new.tables && same_filter {
        return Change::None;
    }
    if same_filter && let Some(patch) = patch(old, new) {
        return Change::InPlace(Box::new(patch));
    }
    Change::Swap {
        narrows: !only_widens(old, new),
    }
}

fn patch(old: &Acl, new: &Acl) -> Option<Patch> {
    let (before, after) = (&old.tables, &new.tables);
    let replaced = |(key, identity): (&PrefixKey, &Identity)| {
        after.prefixes.get(key).is_some_and(|now| now != identity)
    };
    if before.prefixes.iter().any(replaced) {
        return None;
    }
    let mut patch = Patch {
        pages: written(&before.pages, &after.pages),
        ports: written(&before.ports, &after.ports),
        pairs: written(&before.pairs, &after.pairs),
        identities_removed: removed(&before.identities, &after.identities),
        prefixes_removed: removed(&before.prefixes, &after.prefixes),
        prefixes: written(&before.prefixes, &after.prefixes),
        identities: written(&before.identities, &after.identities),
        pairs_removed: removed(&before.pairs, &after.pairs),
        ports_removed: removed(&before.ports, &after.ports),
        pages_removed: removed(&before.pages, &after.pages),
        narrows: false,
    };
    // Keys order by length first.
    patch.prefixes.reverse();
    if patch.entries() > MAX_IN_PLACE {
        return None;
    }
    patch.narrows = !patch.identities_removed.is_empty()
        || !patch.prefixes_removed.is_empty()
        || !patch.prefixes.is_empty() && shadows(before, &patch)
        || patch
            .identities
            .iter()
            .any(|(addr, identity)| loses(old, new, addr, identity));
    Some(patch)
}

/// Whether a prefix or address to be written lies inside a prefix that already was there.
fn shadows(before: &Tables, patch: &Patch) -> bool {
    patch
        .prefixes
        .iter()
        .any(|(key, _)| before.route(key.addr.into()).is_some())
}

/// Whether an address gets another identity that is selected by fewer rules.
fn loses(old: &Acl, new: &Acl, addr: &Addr, identity: &Identity) -> bool {
    let Some(before) = old.identity((*addr).into()) else {
        return false;
    };
    if before.side != identity.side {
        return true;
    }
    let (as_source, as_destination) = if identity.side == side::OWN {
        (Direction::Egress, Direction::Ingress)
    } else {
        (Direction::Ingress, Direction::Egress)
    };
    let fewer = |old: &[u32], new: &[u32]| old.iter().any(|r| new.binary_search(r).is_err());
    fewer(
        old.roles(as_source).source.rules(before.as_source),
        new.roles(as_source).source.rules(identity.as_source),
    ) || fewer(
        old.roles(as_destination)
            .destination
            .rules(before.as_destination),
        new.roles(as_destination)
            .destination
            .rules(identity.as_destination),
    )
}

fn written<K: Ord + Copy, V: PartialEq + Copy>(
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
) -> Vec<(K, V)> {
    let differs = |(key, value): &(&K, &V)| before.get(key) != Some(value);
    after
        .iter()
        .filter(differs)
        .map(|(key, value)| (*key, *value))
        .collect()
}

fn removed<K: Ord + Copy, V>(before: &BTreeMap<K, V>, after: &BTreeMap<K, V>) -> Vec<K> {
    before
        .keys()
        .filter(|key| !after.contains_key(key))
        .copied()
        .collect()
}

/// Whether all that `old` allows, `new` allows too, as far as that can be seen without a proof:
/// no rule, address, label or route is gone, and no route is new (it could take addresses from
/// another).
fn only_widens(old: &Acl, new: &Acl) -> bool {
    // Without an old policy nothing is known of what the kernel has: an earlier agent's, perhaps.
    let (Some(me), Some(now)) = (&old.me, &new.me) else {
        return false;
    };
    let texts = |filter: &Filter, labels: &BTreeSet<Label>| -> BTreeSet<String> {
        labels
            .iter()
            .filter_map(|label| filter.labels.get(label.0 as usize))
            .cloned()
            .collect()
    };
    let keeps_labels = |old_labels, new_labels| {
        texts(&old.filter, old_labels).is_subset(&texts(&new.filter, new_labels))
    };
    let me_keeps = me.addrs.iter().all(|addr| now.addrs.contains(addr))
        && me.routes == now.routes
        && keeps_labels(&me.labels, &now.labels);
    let peers_keep = old.peers.iter().all(|(id, peer)| {
        new.peers.get(id).is_some_and(|now| {
            peer.addrs.iter().all(|addr| now.addrs.contains(addr))
                && keeps_labels(&peer.labels, &now.labels)
        })
    });
    let routes = |acl: &Acl| -> BTreeSet<Prefix> {
        acl.peers
            .values()
            .flat_map(|peer| &peer.routes)
            .copied()
            .collect()
    };
    me_keeps
        && peers_keep
        && routes(old) == routes(new)
        && [Direction::Ingress, Direction::Egress]
            .into_iter()
            .all(|direction| {
                readable_rules(&old.filter, direction)
                    .is_subset(&readable_rules(&new.filter, direction))
            })
}

/// A rule with labels by name, for comparison across filters.
type ReadableRule = (Vec<Readable>, Vec<Readable>, Vec<proto::filter::Service>);

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Readable {
    Label(String),
    Prefix(Prefix),
}

fn readable_rules(filter: &Filter, direction: Direction) -> BTreeSet<ReadableRule> {
    let readable = |selector: &Selector| match selector {
        Selector::Label(label) => {
            let name = filter.labels.get(label.0 as usize).cloned();
            Readable::Label(name.unwrap_or_else(|| format!("label {}", label.0)))
        }
        Selector::Prefix(prefix) => Readable::Prefix(*prefix),
    };
    let side = |selectors: &[Selector]| selectors.iter().map(readable).collect();
    let rule = |rule: &Rule| (side(&rule.srcs), side(&rule.dsts), rule.services.clone());
    filter.rules(direction).iter().map(rule).collect()
}
