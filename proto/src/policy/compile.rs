//! Document + directory → what each node enforces, and whom it sees.
//!
//! Every rule is lowered once into ids of *selectors* (a label or a prefix); both directions of
//! "which rules name this selector" and "which nodes does it select" are indexed. A node's filter
//! is then a walk over the selectors that match it, so the work for one node grows with what
//! concerns it.
//!
//! A selector matches a node by its label, by one of its addresses, or by an overlap with a subnet
//! route that it serves. Default routes overlap nothing but `*` and `autogroup:internet`: whoever
//! may reach 10.0.0.0/8 may not do so through somebody's exit node.
//!
//! `autogroup:self` becomes, for each user that the sources name, one rule from the user's label
//! to the user's label: nodes of that user get it, and a further node changes no filter.
//!
//! A rule with `srcPosture` grants nothing until nodes report attributes: what cannot be checked
//! is denied.

use super::addrset::AddrSet;
use super::diagnostic::{Code, Diagnostic, Diagnostics};
use super::directory::{Directory, DirectoryNode};
use super::document::{Access, IpService, Policy, Section};
use super::selector::{Autogroup, Target};
use crate::filter::{Filter, Label, MAX_RULES, Rule, Selector, Service};
use crate::id::NodeId;
use crate::net::{PortRange, Prefix};
use std::collections::{BTreeMap, BTreeSet};

mod diff;
mod lookup;

pub use diff::{Change, Diff, Effect, Endpoint, Pairs, TooLarge, diff};
pub(super) use lookup::internet;
use lookup::{PrefixIndex, Roster};

/// Most selectors that all rules together may list, after `*` was spelled out. Bounds memory at
/// some tens of megabytes.
pub const MAX_SELECTORS: usize = 4_000_000;

type SelectorId = u32;
type NodeIndex = u32;

/// A policy compiled against a directory.
#[derive(Clone, Debug)]
pub struct Compiled {
    labels: Vec<String>,
    selectors: Vec<Selector>,
    rules: Vec<Lowered>,
    self_rules: Vec<SelfRule>,
    /// By selector: the rules that list it as a source, and as a destination.
    as_src: Vec<Vec<u32>>,
    as_dst: Vec<Vec<u32>>,
    /// By selector: the nodes that it selects.
    members: Vec<Vec<NodeIndex>>,
    nodes: Vec<NodeFacts>,
    index: BTreeMap<NodeId, NodeIndex>,
}

/// An access rule, or the part of one that has the same ports everywhere.
#[derive(Clone, Debug)]
struct Lowered {
    index: u32,
    line: u32,
    srcs: Vec<SelectorId>,
    dsts: Vec<SelectorId>,
    services: Vec<Service>,
    /// Only through nodes with one of these labels; empty: no such condition.
    via: Vec<Label>,
}

/// A rule to `autogroup:self`.
#[derive(Clone, Debug)]
struct SelfRule {
    index: u32,
    line: u32,
    services: Vec<Service>,
    /// The labels of the users that it names; `None`: every user.
    users: Option<BTreeSet<Label>>,
}

#[derive(Clone, Debug)]
struct NodeFacts {
    id: NodeId,
    labels: BTreeSet<Label>,
    /// Selectors that match its labels or addresses, sorted.
    own: Vec<SelectorId>,
    /// Selectors that overlap the routes it serves, sorted.
    routed: Vec<SelectorId>,
    /// The label of its user, if it has one and some rule speaks of `autogroup:self`.
    user: Option<Label>,
}

impl Compiled {
    /// Compiles `policy` for the network in `directory`. Nothing is expanded into addresses.
    ///
    /// # Errors
    /// A policy that is too large for [`MAX_RULES`] or [`MAX_SELECTORS`]; nothing else can be
    /// wrong with a [`Policy`].
    pub fn new(policy: &Policy, directory: &Directory) -> Result<Self, Diagnostics> {
        let mut builder = Builder::new(policy, directory);
        for access in policy.access() {
            builder.lower(access)?;
        }
        Ok(builder.finish())
    }

    /// The text of every label. Depends on the policy alone, unless it speaks of
    /// `autogroup:self`: then every user has a label, oldest user first.
    #[must_use]
    pub fn label_names(&self) -> &[String] {
        &self.labels
    }

    /// Which of the policy's selectors name this node; empty for a node that is not in the
    /// directory.
    #[must_use]
    pub fn labels(&self, node: NodeId) -> BTreeSet<Label> {
        self.facts(node)
            .map_or_else(BTreeSet::new, |facts| facts.labels.clone())
    }

    /// What the node enforces: the rules that concern it, each reduced to the side that is its
    /// own. A node that is not in the directory gets the filter that denies everything.
    #[must_use]
    pub fn filter(&self, node: NodeId) -> Filter {
        let Some(facts) = self.facts(node) else {
            return Filter::default();
        };
        let mut filter = Filter {
            labels: self.labels.clone(),
            ingress: Vec::new(),
            egress: Vec::new(),
        };
        for rule in self.rules_at(facts, &self.as_dst) {
            let mine = self.mine(facts, &rule.dsts, &rule.via);
            if !mine.is_empty() {
                filter.ingress.push(self.rule(rule, &rule.srcs, &mine));
            }
        }
        for rule in self.rules_at(facts, &self.as_src) {
            let mine = self.mine(facts, &rule.srcs, &[]);
            filter.egress.push(self.rule(rule, &mine, &rule.dsts));
        }
        for rule in self.self_rules_of(facts) {
            filter.ingress.push(rule.clone());
            filter.egress.push(rule);
        }
        filter
    }

    /// Whether policy lets the two talk, in either direction. Symmetric; false for a node and
    /// itself.
    #[must_use]
    pub fn sees(&self, a: NodeId, b: NodeId) -> bool {
        let (Some(a), Some(b)) = (self.facts(a), self.facts(b)) else {
            return false;
        };
        a.id != b.id
            && (self.reaches(a, b)
                || self.reaches(b, a)
                || (a.user.is_some() && a.user == b.user && self.has_self_rule(a)))
    }

    /// Every node that `node` sees; the same answer as [`Self::sees`], for all at once.
    #[must_use]
    pub fn peers_of(&self, node: NodeId) -> BTreeSet<NodeId> {
        let Some(facts) = self.facts(node) else {
            return BTreeSet::new();
        };
        let mut seen = vec![false; self.nodes.len()];
        let mut visited = vec![false; self.selectors.len()];
        for rule in self.rules_at(facts, &self.as_src) {
            if rule.via.is_empty() {
                self.mark(&rule.dsts, &mut visited, &mut seen);
            } else {
                self.mark_via(rule, &mut seen);
            }
        }
        let mut visited = vec![false; self.selectors.len()];
        for rule in self.rules_at(facts, &self.as_dst) {
            if !self.mine(facts, &rule.dsts, &rule.via).is_empty() {
                self.mark(&rule.srcs, &mut visited, &mut seen);
            }
        }
        if let Some(user) = facts.user.filter(|_| self.has_self_rule(facts)) {
            let same = self
                .nodes
                .iter()
                .enumerate()
                .filter(|(_, other)| other.user == Some(user));
            same.for_each(|(index, _)| seen[index] = true);
        }
        let all = self.nodes.iter().zip(seen).filter(|(_, seen)| *seen);
        all.map(|(facts, _)| facts.id)
            .filter(|id| *id != node)
            .collect()
    }

    fn facts(&self, node: NodeId) -> Option<&NodeFacts> {
        self.index
            .get(&node)
            .map(|index| &self.nodes[*index as usize])
    }

    /// The rules that list a selector which matches the node, in the order of the policy.
    fn rules_at<'a>(
        &'a self,
        facts: &NodeFacts,
        by_selector: &'a [Vec<u32>],
    ) -> impl Iterator<Item = &'a Lowered> {
        let matching = facts.own.iter().chain(&facts.routed);
        let ids: BTreeSet<u32> = matching
            .flat_map(|id| by_selector[*id as usize].iter().copied())
            .collect();
        ids.into_iter().map(|id| &self.rules[id as usize])
    }

    /// Those of `selectors` that match the node; with `via`, only by its routes and its tags.
    fn mine(&self, facts: &NodeFacts, selectors: &[SelectorId], via: &[Label]) -> Vec<SelectorId> {
        if !via.is_empty() && !via.iter().any(|tag| facts.labels.contains(tag)) {
            return Vec::new();
        }
        let has = |id: &SelectorId| {
            facts.routed.binary_search(id).is_ok()
                || (via.is_empty() && facts.own.binary_search(id).is_ok())
        };
        selectors.iter().copied().filter(has).collect()
    }

    fn reaches(&self, from: &NodeFacts, to: &NodeFacts) -> bool {
        self.rules_at(from, &self.as_src)
            .any(|rule| !self.mine(to, &rule.dsts, &rule.via).is_empty())
    }

    fn mark(&self, selectors: &[SelectorId], visited: &mut [bool], seen: &mut [bool]) {
        for id in selectors {
            if !std::mem::replace(&mut visited[*id as usize], true) {
                self.members[*id as usize]
                    .iter()
                    .for_each(|node| seen[*node as usize] = true);
            }
        }
    }

    fn mark_via(&self, rule: &Lowered, seen: &mut [bool]) {
        for id in &rule.dsts {
            for node in &self.members[*id as usize] {
                let facts = &self.nodes[*node as usize];
                if !self.mine(facts, &[*id], &rule.via).is_empty() {
                    seen[*node as usize] = true;
                }
            }
        }
    }

    fn rule(&self, rule: &Lowered, srcs: &[SelectorId], dsts: &[SelectorId]) -> Rule {
        let selectors =
            |ids: &[SelectorId]| ids.iter().map(|id| self.selectors[*id as usize]).collect();
        Rule {
            index: rule.index,
            line: rule.line,
            srcs: selectors(srcs),
            dsts: selectors(dsts),
            services: rule.services.clone(),
        }
    }

    fn has_self_rule(&self, facts: &NodeFacts) -> bool {
        self.self_rules_of(facts).next().is_some()
    }

    fn self_rules_of(&self, facts: &NodeFacts) -> impl Iterator<Item = Rule> {
        let user = facts.user;
        self.self_rules.iter().filter_map(move |rule| {
            let user = user?;
            let named = rule
                .users
                .as_ref()
                .is_none_or(|users| users.contains(&user));
            named.then(|| Rule {
                index: rule.index,
                line: rule.line,
                srcs: vec![Selector::Label(user)],
                dsts: vec![Selector::Label(user)],
                services: rule.services.clone(),
            })
        })
    }
}

/// Lowers rules one by one.
struct Builder<'p> {
    policy: &'p Policy,
    directory: &'p Directory,
    roster: Roster,
    selectors: Vec<Selector>,
    ids: BTreeMap<Selector, SelectorId>,
    rules: Vec<Lowered>,
    self_rules: Vec<SelfRule>,
    /// Nodes that serve routes, by label: those that `via` can mean.
    routers: BTreeMap<Label, Vec<&'p DirectoryNode>>,
    /// The fewest prefixes that cover all subnet routes: part of `*` as a source.
    routes: Vec<Prefix>,
    internet: Vec<Prefix>,
    selectors_listed: usize,
}

impl<'p> Builder<'p> {
    fn new(policy: &'p Policy, directory: &'p Directory) -> Self {
        let routes = directory
            .nodes
            .values()
            .flat_map(DirectoryNode::subnet_routes);
        let roster = Roster::new(policy, directory);
        let mut routers: BTreeMap<Label, Vec<&DirectoryNode>> = BTreeMap::new();
        for node in directory
            .nodes
            .values()
            .filter(|node| !node.routes.is_empty())
        {
            for label in roster.labels(node) {
                routers.entry(label).or_default().push(node);
            }
        }
        Self {
            policy,
            directory,
            roster,
            routers,
            selectors: Vec::new(),
            ids: BTreeMap::new(),
            rules: Vec::new(),
            self_rules: Vec::new(),
            routes: AddrSet::of(routes).prefixes(),
            internet: internet(directory),
            selectors_listed: 0,
        }
    }

    fn lower(&mut self, access: &Access) -> Result<(), Diagnostic> {
        let postures = !access.postures.is_empty() || !self.policy.default_src_posture.is_empty();
        if postures || access.services.is_empty() {
            return Ok(());
        }
        let mut srcs = Vec::new();
        for src in &access.srcs {
            self.source(&src.value, &mut srcs);
        }
        unique(&mut srcs);
        let tag = |target: &Target| match target {
            Target::Tag(name) => self.roster.label(name),
            _ => None,
        };
        let via: Vec<Label> = access
            .via
            .iter()
            .filter_map(|tag_| tag(&tag_.value))
            .collect();
        for (services, targets) in by_services(access) {
            let mut dsts = Vec::new();
            for target in targets {
                if *target == Target::Autogroup(Autogroup::SelfNodes) {
                    self.lower_self(access, &services);
                } else if access.via.is_empty() {
                    self.destination(target, &mut dsts);
                } else {
                    self.served(target, &via, &mut dsts);
                }
            }
            unique(&mut dsts);
            self.push(access, &srcs, dsts, services, &via)?;
        }
        Ok(())
    }

    /// What `target` means behind the nodes that carry a `via` label: their routes, cut down to
    /// it, and never the nodes themselves.
    fn served(&mut self, target: &Target, via: &[Label], out: &mut Vec<SelectorId>) {
        let wanted = match target {
            Target::Any | Target::Autogroup(Autogroup::Internet) => Vec::new(),
            Target::Host(_) | Target::Ipset(_) | Target::Addrs(_) => self.listed(target),
            Target::Autogroup(_)
            | Target::User(_)
            | Target::Domain(_)
            | Target::Group(_)
            | Target::Tag(_)
            | Target::Service(_) => return,
        };
        let routers = via.iter().filter_map(|tag| self.routers.get(tag)).flatten();
        let mut served = BTreeSet::new();
        for route in routers.clone().flat_map(|node| node.subnet_routes()) {
            if *target == Target::Any {
                served.insert(*route);
            }
            let shared = wanted.iter().filter(|prefix| prefix.overlaps(route));
            served.extend(shared.map(|prefix| {
                if prefix.covers(route) {
                    *route
                } else {
                    *prefix
                }
            }));
        }
        let beyond = matches!(target, Target::Any | Target::Autogroup(Autogroup::Internet));
        if beyond && routers.clone().any(|node| node.is_exit()) {
            served.extend(&self.internet);
        }
        self.prefixes(&served, out);
    }

    fn push(
        &mut self,
        access: &Access,
        srcs: &[SelectorId],
        dsts: Vec<SelectorId>,
        services: Vec<Service>,
        via: &[Label],
    ) -> Result<(), Diagnostic> {
        if srcs.is_empty() || dsts.is_empty() {
            return Ok(());
        }
        self.selectors_listed += srcs.len() + dsts.len();
        if self.rules.len() >= MAX_RULES || self.selectors_listed > MAX_SELECTORS {
            let message = format!(
                "the policy is too large: up to here it has {} rules that list {} selectors, and \
                 {MAX_RULES} and {MAX_SELECTORS} are the most",
                self.rules.len() + 1,
                self.selectors_listed,
            );
            let hint = "give groups, tags or wider prefixes instead of many single rules";
            return Err(self
                .policy
                .source
                .fault(access.span, Code::BadValue, message, hint));
        }
        self.rules.push(Lowered {
            index: access.index,
            line: access.line,
            srcs: srcs.to_vec(),
            dsts,
            services,
            via: via.to_vec(),
        });
        Ok(())
    }

    fn lower_self(&mut self, access: &Access, services: &[Service]) {
        let mut users = Some(BTreeSet::new());
        for src in &access.srcs {
            match (
                self.roster.users_named_by(self.policy, &src.value),
                &mut users,
            ) {
                (Some(named), Some(users)) => users.extend(named),
                (None, users) => *users = None,
                (Some(_), None) => {}
            }
        }
        self.self_rules.push(SelfRule {
            index: access.index,
            line: access.line,
            services: services.to_vec(),
            users,
        });
    }

    fn source(&mut self, target: &Target, out: &mut Vec<SelectorId>) {
        match target {
            Target::Any => {
                let network = [self.directory.v4, self.directory.v6];
                let routes = self.routes.clone();
                self.prefixes(network.iter().chain(&routes), out);
            }
            Target::Autogroup(Autogroup::DangerAll) => {
                self.prefixes(&[Prefix::ALL_V4, Prefix::ALL_V6], out);
            }
            other => self.named(other, out),
        }
    }

    fn destination(&mut self, target: &Target, out: &mut Vec<SelectorId>) {
        match target {
            Target::Any => self.prefixes(&[Prefix::ALL_V4, Prefix::ALL_V6], out),
            Target::Autogroup(Autogroup::Internet) => {
                let internet = self.internet.clone();
                self.prefixes(&internet, out);
            }
            other => self.named(other, out),
        }
    }

    /// What means the same as a source and as a destination.
    fn named(&mut self, target: &Target, out: &mut Vec<SelectorId>) {
        match target {
            Target::Addrs(_) | Target::Host(_) | Target::Ipset(_) => {
                let list = self.listed(target);
                self.prefixes(&list, out);
            }
            Target::Any
            | Target::Autogroup(_)
            | Target::User(_)
            | Target::Domain(_)
            | Target::Group(_)
            | Target::Tag(_)
            | Target::Service(_) => {
                if let Some(label) = self.roster.label_of(target) {
                    out.push(self.id(Selector::Label(label)));
                }
            }
        }
    }

    /// The prefixes of a selector that lists addresses.
    fn listed(&self, target: &Target) -> Vec<Prefix> {
        match target {
            Target::Addrs(list) => list.clone(),
            Target::Host(name) => self
                .policy
                .hosts
                .get(name)
                .map(|host| host.value)
                .into_iter()
                .collect(),
            Target::Ipset(name) => {
                let set = self.policy.ipset_addrs.get(name);
                set.map_or_else(Vec::new, AddrSet::prefixes)
            }
            Target::Any
            | Target::Autogroup(_)
            | Target::User(_)
            | Target::Domain(_)
            | Target::Group(_)
            | Target::Tag(_)
            | Target::Service(_) => Vec::new(),
        }
    }

    fn prefixes<'a>(
        &mut self,
        prefixes: impl IntoIterator<Item = &'a Prefix>,
        out: &mut Vec<SelectorId>,
    ) {
        for prefix in prefixes {
            out.push(self.id(Selector::Prefix(*prefix)));
        }
    }

    fn id(&mut self, selector: Selector) -> SelectorId {
        let next = self.selectors.len() as SelectorId;
        *self.ids.entry(selector).or_insert_with(|| {
            self.selectors.push(selector);
            next
        })
    }

    fn finish(self) -> Compiled {
        let mut as_src = vec![Vec::new(); self.selectors.len()];
        let mut as_dst = vec![Vec::new(); self.selectors.len()];
        for (number, rule) in self.rules.iter().enumerate() {
            rule.srcs
                .iter()
                .for_each(|id| as_src[*id as usize].push(number as u32));
            rule.dsts
                .iter()
                .for_each(|id| as_dst[*id as usize].push(number as u32));
        }
        let prefixes = PrefixIndex::new(&self.selectors);
        let internet: Vec<SelectorId> = self
            .internet
            .iter()
            .chain(&[Prefix::ALL_V4, Prefix::ALL_V6])
            .filter_map(|prefix| self.ids.get(&Selector::Prefix(*prefix)).copied())
            .collect();
        let with_self = !self.self_rules.is_empty();
        let facts = |(id, node): (&NodeId, &DirectoryNode)| {
            let labels = self.roster.labels(node);
            let by_label = labels
                .iter()
                .filter_map(|label| self.ids.get(&Selector::Label(*label)));
            let mut own: Vec<SelectorId> = by_label.copied().collect();
            node.addrs
                .iter()
                .for_each(|addr| prefixes.containing(*addr, &mut own));
            let mut routed = Vec::new();
            node.subnet_routes()
                .for_each(|route| prefixes.overlapping(route, &mut routed));
            if node.is_exit() {
                routed.extend(&internet);
            }
            unique(&mut own);
            unique(&mut routed);
            let user = node.login().and_then(|login| self.roster.label(login));
            NodeFacts {
                id: *id,
                labels,
                own,
                routed,
                user: user.filter(|_| with_self),
            }
        };
        let nodes: Vec<NodeFacts> = self.directory.nodes.iter().map(facts).collect();
        let mut members = vec![Vec::new(); self.selectors.len()];
        for (index, facts) in nodes.iter().enumerate() {
            let matching: BTreeSet<&SelectorId> = facts.own.iter().chain(&facts.routed).collect();
            matching
                .iter()
                .for_each(|id| members[**id as usize].push(index as NodeIndex));
        }
        let numbered = nodes.iter().enumerate();
        Compiled {
            labels: self.roster.names().to_vec(),
            selectors: self.selectors,
            rules: self.rules,
            self_rules: self.self_rules,
            as_src,
            as_dst,
            members,
            index: numbered
                .map(|(index, facts)| (facts.id, index as NodeIndex))
                .collect(),
            nodes,
        }
    }
}

fn unique(ids: &mut Vec<SelectorId>) {
    ids.sort_unstable();
    ids.dedup();
}

/// The destinations of a rule, grouped by what is allowed there.
fn by_services(access: &Access) -> BTreeMap<Vec<Service>, Vec<&Target>> {
    let mut out: BTreeMap<Vec<Service>, Vec<&Target>> = BTreeMap::new();
    for dst in &access.dsts {
        let per_service = access.services.iter().flat_map(|service| {
            let ports = match access.section {
                Section::Acls => &dst.ports,
                Section::Grants => &service.ports,
            };
            services(service, ports)
        });
        let all: BTreeSet<Service> = per_service.collect();
        out.entry(all.into_iter().collect())
            .or_default()
            .push(&dst.target.value);
    }
    out
}

fn services(service: &IpService, ports: &[PortRange]) -> Vec<Service> {
    let mut out = Vec::new();
    for protocol in service.protocols.list() {
        let ports = if protocol.has_ports() {
            ports
        } else {
            &[PortRange::ALL]
        };
        out.extend(ports.iter().map(|ports| Service {
            protocol: Some(protocol),
            ports: *ports,
        }));
    }
    out
}
