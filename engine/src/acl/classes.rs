//! Classes: addresses that no rule tells apart share a number.
//!
//! Only four roles exist, and each has its own numbers: on ingress a *peer* is the source and *we*
//! are the destination, on egress the other way round. An address's class in a role is the set of
//! rules that select it there. To find that set without asking every rule of every address, an
//! address is first reduced to the selectors that match it (its labels, and the prefixes around it,
//! by one look-up a prefix length); addresses with the same selectors have the same rules.
//!
//! Numbers are handed out in order and never reused while an [`Interner`] lives, so that a table
//! can be changed in place: an entry that nothing names yet harms nobody.

use proto::filter::{Direction, Label, Rule, Selector};
use proto::net::Prefix;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Gives equal values equal numbers, from 1.
#[derive(Clone, Debug)]
pub(super) struct Interner<T> {
    numbers: BTreeMap<T, u32>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self {
            numbers: BTreeMap::new(),
        }
    }
}

impl<T: Ord> Interner<T> {
    /// The number of `value`, and whether it is new.
    pub(super) fn number(&mut self, value: T) -> (u32, bool) {
        let next = u32::try_from(self.numbers.len()).unwrap_or(u32::MAX - 2) + 1;
        let mut new = false;
        let number = *self.numbers.entry(value).or_insert_with(|| {
            new = true;
            next
        });
        (number, new)
    }
}

/// Which rules select what, in one role.
#[derive(Clone, Debug, Default)]
pub(super) struct Role {
    by_label: BTreeMap<Label, Vec<u32>>,
    by_prefix: BTreeMap<Prefix, Vec<u32>>,
    /// Lengths in use, by family (v4 first).
    lengths: [BTreeSet<u8>; 2],
    /// Rules of each combination of selectors that was met.
    combinations: BTreeMap<(Vec<Label>, Vec<Prefix>), u32>,
    classes: Interner<Vec<u32>>,
    /// Rules of each class; class 0, first, has none.
    rules: Vec<Vec<u32>>,
}

impl Role {
    /// Indexes one side of `rules`.
    pub(super) fn new(rules: &[Rule], side: impl Fn(&Rule) -> &[Selector]) -> Self {
        let mut role = Self {
            rules: vec![Vec::new()],
            ..Self::default()
        };
        for (index, rule) in (0..).zip(rules) {
            for selector in side(rule) {
                let list = match selector {
                    Selector::Label(label) => role.by_label.entry(*label).or_default(),
                    Selector::Prefix(prefix) => {
                        role.lengths[usize::from(!prefix.is_v4())].insert(prefix.len());
                        role.by_prefix.entry(*prefix).or_default()
                    }
                };
                if list.last() != Some(&index) {
                    list.push(index);
                }
            }
        }
        role
    }

    /// The class of a prefix (a host prefix for an address) whose owner has `labels`.
    /// Label selectors mean a node's own addresses: for what lies behind it, `labels` is empty.
    pub(super) fn class(&mut self, prefix: &Prefix, labels: &BTreeSet<Label>) -> u32 {
        let labels: Vec<Label> = labels
            .iter()
            .filter(|label| self.by_label.contains_key(label))
            .copied()
            .collect();
        let around = self.around(prefix);
        let key = (labels, around);
        if let Some(class) = self.combinations.get(&key) {
            return *class;
        }
        let of_labels = key.0.iter().filter_map(|label| self.by_label.get(label));
        let of_prefixes = key.1.iter().filter_map(|prefix| self.by_prefix.get(prefix));
        let mut rules: Vec<u32> = of_labels.chain(of_prefixes).flatten().copied().collect();
        rules.sort_unstable();
        rules.dedup();
        let class = if rules.is_empty() {
            0
        } else {
            let (class, new) = self.classes.number(rules.clone());
            if new {
                self.rules.push(rules);
            }
            class
        };
        self.combinations.insert(key, class);
        class
    }

    /// The rules that select a class.
    pub(super) fn rules(&self, class: u32) -> &[u32] {
        self.rules.get(class as usize).map_or(&[], Vec::as_slice)
    }

    /// Prefixes that rules name.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = &Prefix> {
        self.by_prefix.keys()
    }

    /// The named prefixes that cover `prefix`.
    fn around(&self, prefix: &Prefix) -> Vec<Prefix> {
        let lengths = &self.lengths[usize::from(!prefix.is_v4())];
        lengths
            .range(..=prefix.len())
            .filter_map(|len| Prefix::containing(prefix.addr(), *len).ok())
            .filter(|candidate| self.by_prefix.contains_key(candidate))
            .collect()
    }
}

/// The two roles of one direction.
#[derive(Clone, Debug, Default)]
pub(super) struct Roles {
    /// Who initiates.
    pub(super) source: Role,
    /// To whom.
    pub(super) destination: Role,
}

impl Roles {
    /// Indexes the rules of one direction.
    pub(super) fn new(rules: &[Rule]) -> Self {
        Self {
            source: Role::new(rules, |rule| &rule.srcs),
            destination: Role::new(rules, |rule| &rule.dsts),
        }
    }
}

/// Whose addresses are the source in `direction`: a peer's on ingress, our own on egress.
pub(super) fn own_is_source(direction: Direction) -> bool {
    match direction {
        Direction::Ingress => false,
        Direction::Egress => true,
    }
}

/// The host prefix of `addr`.
pub(super) fn host(addr: IpAddr) -> Prefix {
    Prefix::host(addr)
}
