//! What leads from one lowered policy to the next.

use super::{Acl, PrefixKey, Tables};
use ebpf::abi::{Addr, Grant, Identity, Page, PageKey, PairKey, Ports, PortsKey};
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
    /// By adding entries to the active slot, one by one. Nothing that is there changes, so a packet
    /// meets the old policy or the new one for each address, and nothing is narrowed.
    InPlace(Box<Patch>),
    /// Fill the idle slot and switch.
    Swap {
        /// Whether something may be allowed no more: raise the epoch.
        narrows: bool,
    },
}

/// Entries to add, from the first field to the last: what is named comes before what names it, and
/// longer prefixes before the shorter ones around them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patch {
    /// Bitmaps of large port sets.
    pub pages: Vec<(PageKey, Page)>,
    /// Port sets.
    pub ports: Vec<(PortsKey, Ports)>,
    /// Pairs of classes.
    pub pairs: Vec<(PairKey, Grant)>,
    /// Prefixes.
    pub prefixes: Vec<(PrefixKey, Identity)>,
    /// Addresses.
    pub identities: Vec<(Addr, Identity)>,
}

impl Patch {
    /// Entries that it adds.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.pages.len()
            + self.ports.len()
            + self.pairs.len()
            + self.prefixes.len()
            + self.identities.len()
    }
}

/// The change from `old` to `new`. With the `same_filter`, numbers mean the same in both.
pub(super) fn between(old: &Acl, new: &Acl, same_filter: bool) -> Change {
    if same_filter && old.tables == new.tables {
        return Change::None;
    }
    if same_filter && let Some(patch) = additions(&old.tables, &new.tables) {
        return Change::InPlace(Box::new(patch));
    }
    Change::Swap {
        narrows: !only_widens(old, new),
    }
}

/// What `after` has more than `before`, if it has no less and takes no address from anyone.
fn additions(before: &Tables, after: &Tables) -> Option<Patch> {
    let mut patch = Patch {
        pages: added(&before.pages, &after.pages)?,
        ports: added(&before.ports, &after.ports)?,
        pairs: added(&before.pairs, &after.pairs)?,
        prefixes: added(&before.prefixes, &after.prefixes)?,
        identities: added(&before.identities, &after.identities)?,
    };
    // Keys order by length first.
    patch.prefixes.reverse();
    let inside = |addr: &Addr| before.route((*addr).into()).is_some();
    let taken = patch.prefixes.iter().any(|(key, _)| inside(&key.addr))
        || patch.identities.iter().any(|(addr, _)| inside(addr));
    (!taken && patch.entries() <= MAX_IN_PLACE).then_some(patch)
}

/// The entries of `after` that `before` lacks; `None` if one of `before` changed or is gone.
fn added<K: Ord + Copy, V: PartialEq + Copy>(
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
) -> Option<Vec<(K, V)>> {
    let kept = before
        .iter()
        .all(|(key, value)| after.get(key) == Some(value));
    let new = after.iter().filter(|(key, _)| !before.contains_key(key));
    kept.then(|| new.map(|(key, value)| (*key, *value)).collect())
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
