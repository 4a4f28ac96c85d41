//! What each ipset stands for: everything that it adds, without everything that it removes.
//!
//! Resolved once, when a policy is read, however often rules name a set. Sets may contain sets, to
//! a small depth; one that contains itself is refused.

use super::addrset::AddrSet;
use super::diagnostic::{Code, Diagnostics};
use super::document::{IpsetItem, Policy, Span};
use super::selector::Target;
use crate::net::Prefix;
use std::collections::{BTreeMap, BTreeSet};

/// How deep ipsets may contain ipsets. Bounds recursion over a hostile text.
const MAX_DEPTH: usize = 16;

/// The addresses of every ipset; faults are sets that contain themselves or nest too deep.
pub(super) fn resolve(policy: &Policy, faults: &mut Diagnostics) -> BTreeMap<String, AddrSet> {
    let mut resolver = Resolver {
        policy,
        faults,
        done: BTreeMap::new(),
        open: BTreeSet::new(),
    };
    for (name, items) in &policy.ipsets {
        resolver.set(name, items.span);
    }
    resolver.done
}

struct Resolver<'p, 'f> {
    policy: &'p Policy,
    faults: &'f mut Diagnostics,
    done: BTreeMap<String, AddrSet>,
    /// The sets that are being resolved, from the outermost in.
    open: BTreeSet<&'p str>,
}

impl<'p> Resolver<'p, '_> {
    /// Makes sure that `name`, which is mentioned at `span`, is done; unknown names are not ours.
    fn set(&mut self, name: &'p str, span: Span) {
        let Some(items) = self.policy.ipsets.get(name) else {
            return;
        };
        if self.done.contains_key(name) {
            return;
        }
        if self.open.len() >= MAX_DEPTH || !self.open.insert(name) {
            let source = &self.policy.source;
            self.faults.push(|| {
                let message = format!("`{name}` contains itself, or sets nest too deep");
                let hint = format!("ipsets may nest {MAX_DEPTH} deep: list the addresses here");
                source.fault(span, Code::BadValue, message, hint)
            });
            return;
        }
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        for item in &items.value {
            let (target, list) = match &item.value {
                IpsetItem::Add(target) => (target, &mut added),
                IpsetItem::Remove(target) => (target, &mut removed),
            };
            self.member(target, item.span, list);
        }
        self.open.remove(name);
        let set = AddrSet::of(&added).without(&AddrSet::of(&removed));
        self.done.insert(name.to_owned(), set);
    }

    fn member(&mut self, target: &'p Target, span: Span, list: &mut Vec<Prefix>) {
        match target {
            Target::Addrs(prefixes) => list.extend(prefixes.iter().copied()),
            Target::Host(host) => list.extend(self.policy.hosts.get(host).map(|host| host.value)),
            Target::Ipset(inner) => {
                self.set(inner, span);
                list.extend(self.done.get(inner).into_iter().flat_map(AddrSet::prefixes));
            }
            Target::Any
            | Target::Autogroup(_)
            | Target::User(_)
            | Target::Domain(_)
            | Target::Group(_)
            | Target::Tag(_)
            | Target::Service(_) => {}
        }
    }
}
