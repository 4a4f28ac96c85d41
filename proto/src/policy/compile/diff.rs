//! What a change of policy opens and closes: who may start what with whom, before and after.
//!
//! Both policies are compiled for the same network. Its endpoints are the addresses of nodes, and
//! the stretches of subnet routes that no selector of either policy tells apart. Endpoints that
//! nothing in either policy tells apart share a *class*, and the answer is computed between
//! classes. Only pairs that a changed rule speaks of are looked at: what both policies say changes
//! nothing.

use super::super::addrset::AddrSet;
use super::super::directory::{Directory, DirectoryNode};
use super::lookup::PrefixIndex;
use super::{Compiled, SelectorId};
use crate::filter::{Label, Selector, Service};
use crate::id::NodeId;
use crate::net::{PortRange, Prefix, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

/// Most pairs of classes that are compared; a change that touches more is too large to tell.
const MAX_PAIRS: usize = 4_000_000;

/// Whether a change lets more or less through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effect {
    /// Was denied, is allowed.
    Opens,
    /// Was allowed, is denied.
    Closes,
}

/// One difference: the same services between every endpoint of `srcs` and every one of `dsts`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// More or less.
    pub effect: Effect,
    /// Who initiates.
    pub srcs: Vec<Endpoint>,
    /// To whom.
    pub dsts: Vec<Endpoint>,
    /// What; no two overlap.
    pub services: Vec<Service>,
}

/// Where packets come from or go to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// The node's name, or the prefix behind a router.
    pub name: String,
    /// One address of the node, or exactly the stretch behind a router.
    pub addrs: Vec<Prefix>,
}

/// A change touches too many pairs to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the change touches more than {MAX_PAIRS} pairs of endpoints that policy tells apart")]
pub struct TooLarge;

/// Everything that differs between `old` and `new`, both compiled for `directory`. Pairs of one
/// endpoint with itself, and of two families, do not exist.
///
/// # Errors
/// [`TooLarge`].
pub fn diff(
    old: &Compiled,
    new: &Compiled,
    directory: &Directory,
) -> Result<Vec<Change>, TooLarge> {
    let classes = classes(old, new, directory);
    let before = View::new(old, classes.iter().map(|class| (class, &class.old)));
    let after = View::new(new, classes.iter().map(|class| (class, &class.new)));
    let mut outcomes = Outcomes::default();
    for (src, dsts) in candidates(&classes, &before, &after)? {
        for dst in dsts {
            outcomes.note(&before, &after, src, dst);
        }
    }
    let mut out = Vec::new();
    let ends = |set: &[usize]| -> Vec<Endpoint> {
        let all = set
            .iter()
            .flat_map(|class| classes[*class].ends.iter().cloned());
        all.collect::<BTreeSet<Endpoint>>().into_iter().collect()
    };
    for ((effect, services), pairs) in outcomes.found {
        for (dsts, srcs) in rectangles(&pairs) {
            out.push(Change {
                effect,
                srcs: ends(&srcs),
                dsts: ends(&dsts),
                services: services.list(),
            });
        }
    }
    out.sort();
    Ok(out)
}

/// Rules and own services that decide about a pair, in both policies.
type Deciding = (Vec<u32>, Vec<u32>, Option<u32>);

/// What was found so far. Few pairs are decided by different rules, so answers are kept.
#[derive(Default)]
struct Outcomes {
    found: BTreeMap<(Effect, Services), Vec<(usize, usize)>>,
    known: BTreeMap<Deciding, Vec<(Effect, Services)>>,
}

impl Outcomes {
    fn note(&mut self, before: &View, after: &View, src: usize, dst: usize) {
        let own = before.same_user(src, dst);
        let deciding = (before.common(src, dst), after.common(src, dst), own);
        let known = self
            .known
            .entry(deciding)
            .or_insert_with_key(|(old, new, own)| {
                let (old, new) = (before.services(old, *own), after.services(new, *own));
                let both = [
                    (Effect::Opens, new.without(&old)),
                    (Effect::Closes, old.without(&new)),
                ];
                both.into_iter()
                    .filter(|(_, services)| !services.0.is_empty())
                    .collect()
            });
        for outcome in known.iter() {
            match self.found.get_mut(outcome) {
                Some(pairs) => pairs.push((src, dst)),
                None => {
                    self.found.insert(outcome.clone(), vec![(src, dst)]);
                }
            }
        }
    }
}

/// The sources of each set of destinations: as few blocks as equal rows allow.
fn rectangles(pairs: &[(usize, usize)]) -> BTreeMap<Vec<usize>, Vec<usize>> {
    let mut out: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
    for row in pairs.chunk_by(|one, other| one.0 == other.0) {
        let dsts = row.iter().map(|(_, dst)| *dst).collect();
        out.entry(dsts)
            .or_default()
            .extend(row.first().map(|(src, _)| *src));
    }
    out
}

/// Endpoints that nothing tells apart.
struct Class {
    v4: bool,
    /// Behind a router, not a node's own.
    routed: bool,
    /// Selectors that match it in each policy.
    old: Vec<SelectorId>,
    new: Vec<SelectorId>,
    /// Its user, where one of the policies has rules among a user's own nodes.
    login: Option<String>,
    ends: Vec<Endpoint>,
}

fn classes(old: &Compiled, new: &Compiled, directory: &Directory) -> Vec<Class> {
    let (old_lookup, new_lookup) = (old.lookup(), new.lookup());
    let with_self = !old.self_rules.is_empty() || !new.self_rules.is_empty();
    let mut out: BTreeMap<_, Vec<Endpoint>> = BTreeMap::new();
    let mut add = |end: Endpoint, addr: IpAddr, node: Option<(&NodeId, &DirectoryNode)>| {
        let id = node.map(|(id, _)| *id);
        let login = node
            .and_then(|(_, node)| node.login())
            .filter(|_| with_self);
        let signature = (
            addr.is_ipv4(),
            node.is_none(),
            old.matching(&old_lookup, addr, id),
            new.matching(&new_lookup, addr, id),
            login.map(str::to_owned),
        );
        out.entry(signature).or_default().push(end);
    };
    let mut owned = BTreeSet::new();
    for (id, node) in &directory.nodes {
        for addr in &node.addrs {
            owned.insert(Prefix::host(*addr));
            let end = Endpoint {
                name: node.name.clone(),
                addrs: vec![Prefix::host(*addr)],
            };
            add(end, *addr, Some((id, node)));
        }
    }
    for end in stretches(old, new, directory, &owned) {
        if let Some(first) = end.addrs.first() {
            add(end.clone(), first.addr(), None);
        }
    }
    let class = |((v4, routed, old, new, login), ends)| Class {
        v4,
        routed,
        old,
        new,
        login,
        ends,
    };
    out.into_iter().map(class).collect()
}

/// The subnet routes, cut where a prefix selector of either policy begins or ends, without the
/// addresses of nodes.
fn stretches(
    old: &Compiled,
    new: &Compiled,
    directory: &Directory,
    owned: &BTreeSet<Prefix>,
) -> Vec<Endpoint> {
    let routes = directory
        .nodes
        .values()
        .flat_map(DirectoryNode::subnet_routes);
    let routes: BTreeSet<Prefix> = routes.copied().collect();
    let whole = AddrSet::of(&routes).without(&AddrSet::of(owned));
    let mut cuts = routes;
    for selector in old.selectors.iter().chain(&new.selectors) {
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
        let rest = AddrSet::of([cut]).without(&AddrSet::of(smaller.clone()));
        let addrs = rest.intersection(&whole).prefixes();
        if addrs.is_empty() {
            continue;
        }
        let name = if addrs == [*cut] {
            cut.to_string()
        } else {
            format!("the rest of {cut}")
        };
        out.push(Endpoint { name, addrs });
    }
    out
}

/// Selectors by what they match.
struct Lookup {
    prefixes: PrefixIndex,
    labels: BTreeMap<Label, SelectorId>,
}

impl Compiled {
    fn lookup(&self) -> Lookup {
        let label = |(id, selector): (usize, &Selector)| match selector {
            Selector::Label(label) => Some((*label, id as SelectorId)),
            Selector::Prefix(_) => None,
        };
        Lookup {
            prefixes: PrefixIndex::new(&self.selectors),
            labels: self
                .selectors
                .iter()
                .enumerate()
                .filter_map(label)
                .collect(),
        }
    }

    /// The selectors that match one address.
    fn matching(&self, lookup: &Lookup, addr: IpAddr, owner: Option<NodeId>) -> Vec<SelectorId> {
        let mut out = Vec::new();
        lookup.prefixes.containing(addr, &mut out);
        let facts = owner.and_then(|owner| self.facts(owner));
        let labels = facts.into_iter().flat_map(|facts| &facts.labels);
        out.extend(labels.filter_map(|label| lookup.labels.get(label)));
        super::unique(&mut out);
        out
    }

    /// What a user's own nodes may do among themselves.
    fn among_own(&self, login: &str) -> Services {
        let label = self.labels.iter().position(|name| name == login);
        let label = label.map(|number| Label(number as u32));
        let named = |users: &Option<BTreeSet<Label>>| match (users, label) {
            (None, _) => true,
            (Some(users), Some(label)) => users.contains(&label),
            (Some(_), None) => false,
        };
        let rules = self.self_rules.iter().filter(|rule| named(&rule.users));
        Services::of(rules.flat_map(|rule| &rule.services))
    }
}

/// One policy over classes.
struct View {
    rules: Vec<ClassRule>,
    /// By class: the rules that have it as a source, and as a destination.
    as_src: Vec<Vec<u32>>,
    as_dst: Vec<Vec<u32>>,
    /// By class: its user.
    users: Vec<Option<u32>>,
    /// By user: what the user's own nodes may do among themselves.
    own: Vec<Services>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ClassRule {
    srcs: BTreeSet<usize>,
    dsts: BTreeSet<usize>,
    services: Services,
}

impl View {
    fn new<'c>(
        compiled: &Compiled,
        classes: impl Iterator<Item = (&'c Class, &'c Vec<SelectorId>)>,
    ) -> Self {
        let mut members: BTreeMap<SelectorId, BTreeSet<usize>> = BTreeMap::new();
        let (mut routed, mut users, mut own) = (BTreeSet::new(), Vec::new(), Vec::new());
        let mut numbers: BTreeMap<&str, u32> = BTreeMap::new();
        for (number, (class, selectors)) in classes.enumerate() {
            for selector in selectors {
                members.entry(*selector).or_default().insert(number);
            }
            if class.routed {
                routed.insert(number);
            }
            users.push(class.login.as_deref().map(|login| {
                *numbers.entry(login).or_insert_with(|| {
                    own.push(compiled.among_own(login));
                    own.len() as u32 - 1
                })
            }));
        }
        let all = |ids: &[SelectorId]| -> BTreeSet<usize> {
            ids.iter()
                .filter_map(|id| members.get(id))
                .flatten()
                .copied()
                .collect()
        };
        let rules = compiled.rules.iter().map(|rule| {
            let mut dsts = all(&rule.dsts);
            if !rule.via.is_empty() {
                dsts.retain(|class| routed.contains(class));
            }
            ClassRule {
                srcs: all(&rule.srcs),
                dsts,
                services: Services::of(&rule.services),
            }
        });
        let rules: Vec<ClassRule> = rules.collect();
        let (mut as_src, mut as_dst) =
            (vec![Vec::new(); users.len()], vec![Vec::new(); users.len()]);
        for (number, rule) in rules.iter().enumerate() {
            rule.srcs
                .iter()
                .for_each(|class| as_src[*class].push(number as u32));
            rule.dsts
                .iter()
                .for_each(|class| as_dst[*class].push(number as u32));
        }
        Self {
            rules,
            as_src,
            as_dst,
            users,
            own,
        }
    }

    /// The rules that let one class start something with another, sorted.
    fn common(&self, src: usize, dst: usize) -> Vec<u32> {
        let (one, other) = (&self.as_src[src], &self.as_dst[dst]);
        let (short, long) = if one.len() < other.len() {
            (one, other)
        } else {
            (other, one)
        };
        short
            .iter()
            .copied()
            .filter(|rule| long.binary_search(rule).is_ok())
            .collect()
    }

    /// The user whose nodes both classes are.
    fn same_user(&self, src: usize, dst: usize) -> Option<u32> {
        self.users[src].filter(|user| self.users[dst] == Some(*user))
    }

    fn services(&self, rules: &[u32], own: Option<u32>) -> Services {
        let rules = rules
            .iter()
            .map(|rule| &self.rules[*rule as usize].services);
        Services::union(rules.chain(own.map(|user| &self.own[user as usize])))
    }
}

/// The pairs of classes that something in only one of the policies speaks of, by source. Users
/// have the same numbers in both views: classes are numbered once.
fn candidates(
    classes: &[Class],
    before: &View,
    after: &View,
) -> Result<BTreeMap<usize, BTreeSet<usize>>, TooLarge> {
    let mut out: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    let mut pairs = 0;
    let mut add = |src: usize, dsts: &mut dyn Iterator<Item = usize>| {
        let row = out.entry(src).or_default();
        let had = row.len();
        let alone = classes[src].ends.len() == 1;
        let fits = |dst: &usize| classes[src].v4 == classes[*dst].v4 && (src != *dst || !alone);
        row.extend(dsts.filter(fits));
        pairs += row.len() - had;
        if pairs > MAX_PAIRS {
            Err(TooLarge)
        } else {
            Ok(())
        }
    };
    let old: BTreeSet<&ClassRule> = before.rules.iter().collect();
    let new: BTreeSet<&ClassRule> = after.rules.iter().collect();
    for rule in old.symmetric_difference(&new) {
        for src in &rule.srcs {
            add(*src, &mut rule.dsts.iter().copied())?;
        }
    }
    let mut changed: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (class, user) in before.users.iter().enumerate() {
        if let Some(user) =
            user.filter(|user| before.own[*user as usize] != after.own[*user as usize])
        {
            changed.entry(user).or_default().push(class);
        }
    }
    for own in changed.values() {
        for src in own {
            add(*src, &mut own.iter().copied())?;
        }
    }
    Ok(out)
}

/// A set of services: by protocol, port ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Services(BTreeMap<Protocol, Vec<(u16, u16)>>);

impl Services {
    fn of<'s>(services: impl IntoIterator<Item = &'s Service>) -> Self {
        let mut out = Self::default();
        for service in services {
            let protocols = match service.protocol {
                Some(protocol) => protocol..=protocol,
                None => Protocol(0)..=Protocol(u8::MAX),
            };
            for number in protocols.start().0..=protocols.end().0 {
                let protocol = Protocol(number);
                let all = if protocol.has_ports() {
                    service.ports
                } else {
                    PortRange::ALL
                };
                out.0
                    .entry(protocol)
                    .or_default()
                    .push((all.first(), all.last()));
            }
        }
        out.tidy();
        out
    }

    fn union<'s>(sets: impl Iterator<Item = &'s Self>) -> Self {
        let mut out = Self::default();
        for (protocol, ports) in sets.flat_map(|set| &set.0) {
            out.0.entry(*protocol).or_default().extend(ports);
        }
        out.tidy();
        out
    }

    fn tidy(&mut self) {
        for ports in self.0.values_mut() {
            ports.sort_unstable();
            let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ports.len());
            for (first, last) in ports.drain(..) {
                match merged.last_mut() {
                    Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                    _ => merged.push((first, last)),
                }
            }
            *ports = merged;
        }
    }

    fn without(&self, other: &Self) -> Self {
        let mut out = Self::default();
        for (protocol, ports) in &self.0 {
            let taken = other.0.get(protocol).map_or(&[][..], Vec::as_slice);
            let mut left = Vec::new();
            for &(first, last) in ports {
                let mut start = Some(first);
                for &(low, high) in taken
                    .iter()
                    .filter(|(low, high)| *low <= last && *high >= first)
                {
                    if let Some(at) = start
                        && at < low
                    {
                        left.push((at, low - 1));
                    }
                    start = high.checked_add(1).filter(|next| *next <= last);
                }
                left.extend(start.map(|at| (at, last)));
            }
            if !left.is_empty() {
                out.0.insert(*protocol, left);
            }
        }
        out
    }

    fn list(&self) -> Vec<Service> {
        let one = |protocol: &Protocol, (first, last): &(u16, u16)| {
            let ports = PortRange::new(*first, *last).ok()?;
            Some(Service {
                protocol: Some(*protocol),
                ports,
            })
        };
        let all = self.0.iter();
        all.flat_map(|(protocol, ports)| ports.iter().filter_map(|range| one(protocol, range)))
            .collect()
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |ends: &[Endpoint]| {
            let names: BTreeSet<&str> = ends.iter().map(|end| end.name.as_str()).collect();
            names.into_iter().collect::<Vec<_>>().join(", ")
        };
        let service = |service: &Service| match service.protocol {
            Some(protocol) if !protocol.has_ports() => protocol.to_string(),
            Some(protocol) => format!("{protocol} {}", service.ports),
            None => "everything".to_owned(),
        };
        let services: Vec<String> = self.services.iter().map(service).collect();
        let effect = match self.effect {
            Effect::Opens => "opens",
            Effect::Closes => "closes",
        };
        let (srcs, dsts) = (names(&self.srcs), names(&self.dsts));
        write!(f, "{effect} {srcs} -> {dsts}: {}", services.join(", "))
    }
}
