//! Look-ups that keep compilation linear: labels by owner, prefixes by address and route.

use super::super::addrset::AddrSet;
use super::super::directory::{Directory, DirectoryNode};
use super::super::document::Policy;
use super::super::render::in_domain;
use super::super::selector::{Autogroup, Target};
use super::SelectorId;
use crate::filter::{Label, Selector};
use crate::net::Prefix;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The label table, and which labels an owner has.
pub(super) struct Roster {
    names: Vec<String>,
    numbers: BTreeMap<String, Label>,
    /// By login: the labels that the policy gives this user's nodes.
    by_login: BTreeMap<String, BTreeSet<Label>>,
    /// Labels of every node that has a user, or tags.
    member: Option<Label>,
    tagged: Option<Label>,
    /// Labels that every user of a domain has.
    domains: Vec<(String, Label)>,
}

impl Roster {
    /// Numbers the labels: the policy's own in sorted order, then, if `autogroup:self` occurs, the
    /// users that the policy does not name, oldest first.
    pub(super) fn new(policy: &Policy, directory: &Directory) -> Self {
        let mut written = BTreeSet::new();
        let mut with_self = false;
        for access in policy.access() {
            let dsts = access.dsts.iter().map(|dst| &dst.target.value);
            let srcs = access.srcs.iter().chain(&access.via).map(|src| &src.value);
            for target in srcs.chain(dsts) {
                with_self |= *target == Target::Autogroup(Autogroup::SelfNodes);
                written.extend(label_text(target));
            }
        }
        let mut names: Vec<String> = written.iter().cloned().collect();
        if with_self {
            let logins = directory.users.iter().map(|user| user.login.as_str());
            let owners = directory.nodes.values().filter_map(DirectoryNode::login);
            for login in logins.chain(owners) {
                if written.insert(login.to_owned()) {
                    names.push(login.to_owned());
                }
            }
        }
        let numbered = names.iter().enumerate();
        let numbers: BTreeMap<String, Label> = numbered
            .map(|(number, name)| (name.clone(), Label(number as u32)))
            .collect();
        Self {
            by_login: logins(policy, directory, &numbers),
            member: numbers.get("autogroup:member").copied(),
            tagged: numbers.get("autogroup:tagged").copied(),
            domains: domains(policy, &numbers),
            names,
            numbers,
        }
    }

    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    pub(super) fn label(&self, name: &str) -> Option<Label> {
        self.numbers.get(name).copied()
    }

    pub(super) fn label_of(&self, target: &Target) -> Option<Label> {
        label_text(target).and_then(|text| self.label(&text))
    }

    /// The labels of a node.
    pub(super) fn labels(&self, node: &DirectoryNode) -> BTreeSet<Label> {
        match node.login() {
            Some(login) => self.user_labels(login),
            None => {
                let tags = node.tags().filter_map(|tag| self.label(tag));
                tags.chain(self.tagged).collect()
            }
        }
    }

    fn user_labels(&self, login: &str) -> BTreeSet<Label> {
        let mut out = self.by_login.get(login).cloned().unwrap_or_default();
        out.extend(self.label(login));
        out.extend(self.member);
        let domains = self
            .domains
            .iter()
            .filter(|(domain, _)| in_domain(login, domain));
        out.extend(domains.map(|(_, label)| *label));
        out
    }

    /// The labels of the users that a source of an `autogroup:self` rule names; `None`: all.
    pub(super) fn users_named_by(
        &self,
        policy: &Policy,
        target: &Target,
    ) -> Option<BTreeSet<Label>> {
        match target {
            Target::User(login) => Some(self.label(login).into_iter().collect()),
            Target::Group(name) => {
                let members = policy
                    .members(name)
                    .map(|member| self.users_named_by(policy, member));
                Some(members.flatten().flatten().collect())
            }
            Target::Domain(_) | Target::Autogroup(Autogroup::Role(_)) => {
                let named = self.label_of(target);
                let carries = |login: &&String| {
                    named.is_some_and(|label| self.user_labels(login).contains(&label))
                };
                let users = self.names.iter().filter(|name| name.contains('@'));
                Some(
                    users
                        .filter(carries)
                        .filter_map(|login| self.label(login))
                        .collect(),
                )
            }
            Target::Any | Target::Autogroup(_) => None,
            Target::Tag(_)
            | Target::Host(_)
            | Target::Ipset(_)
            | Target::Service(_)
            | Target::Addrs(_) => Some(BTreeSet::new()),
        }
    }
}

/// The text of a selector that is a label; `None` for what is named by prefix.
fn label_text(target: &Target) -> Option<String> {
    match target {
        Target::User(text) | Target::Group(text) | Target::Tag(text) | Target::Service(text) => {
            Some(text.clone())
        }
        Target::Domain(domain) => Some(format!("user:*@{domain}")),
        Target::Autogroup(group) => match group {
            Autogroup::Member | Autogroup::Tagged | Autogroup::Shared | Autogroup::Role(_) => {
                Some(group.to_string())
            }
            Autogroup::SelfNodes
            | Autogroup::Internet
            | Autogroup::DangerAll
            | Autogroup::NonRoot => None,
        },
        Target::Any | Target::Host(_) | Target::Ipset(_) | Target::Addrs(_) => None,
    }
}

/// By login: the labels of the groups and roles that name the user.
fn logins(
    policy: &Policy,
    directory: &Directory,
    numbers: &BTreeMap<String, Label>,
) -> BTreeMap<String, BTreeSet<Label>> {
    let mut out: BTreeMap<String, BTreeSet<Label>> = BTreeMap::new();
    for group in policy.groups.keys() {
        let Some(label) = numbers.get(group) else {
            continue;
        };
        for member in policy.members(group) {
            if let Target::User(login) = member {
                out.entry(login.to_owned()).or_default().insert(*label);
            }
        }
    }
    for user in &directory.users {
        for role in &user.roles {
            let name = Autogroup::Role(*role).to_string();
            let label = numbers.get(&name);
            out.entry(user.login.clone()).or_default().extend(label);
        }
    }
    out
}

/// Group labels that a whole domain carries, because `user:*@domain` is a member.
fn domains(policy: &Policy, numbers: &BTreeMap<String, Label>) -> Vec<(String, Label)> {
    let mut out = Vec::new();
    for (name, label) in numbers {
        let own = name.strip_prefix("user:*@").map(str::to_owned);
        let members = policy.members(name).filter_map(|member| match member {
            Target::Domain(domain) => Some(domain.clone()),
            _ => None,
        });
        out.extend(
            own.into_iter()
                .chain(members)
                .map(|domain| (domain, *label)),
        );
    }
    out
}

/// Prefix selectors, to be found by an address inside or by an overlapping route.
pub(super) struct PrefixIndex {
    ids: BTreeMap<Prefix, SelectorId>,
    /// The lengths that occur, of each family.
    v4_lens: BTreeSet<u8>,
    v6_lens: BTreeSet<u8>,
}

impl PrefixIndex {
    pub(super) fn new(selectors: &[Selector]) -> Self {
        let mut out = Self {
            ids: BTreeMap::new(),
            v4_lens: BTreeSet::new(),
            v6_lens: BTreeSet::new(),
        };
        for (id, selector) in selectors.iter().enumerate() {
            if let Selector::Prefix(prefix) = selector {
                out.ids.insert(*prefix, id as SelectorId);
                let lens = if prefix.is_v4() {
                    &mut out.v4_lens
                } else {
                    &mut out.v6_lens
                };
                lens.insert(prefix.len());
            }
        }
        out
    }

    /// Adds every selector whose prefix contains `addr`.
    pub(super) fn containing(&self, addr: IpAddr, out: &mut Vec<SelectorId>) {
        self.covering(&Prefix::host(addr), out);
    }

    /// Adds every selector whose prefix shares an address with `route`.
    pub(super) fn overlapping(&self, route: &Prefix, out: &mut Vec<SelectorId>) {
        self.covering(route, out);
        let inside = self
            .ids
            .range(route..)
            .take_while(|(prefix, _)| route.covers(prefix));
        out.extend(inside.map(|(_, id)| *id));
    }

    fn covering(&self, inner: &Prefix, out: &mut Vec<SelectorId>) {
        let lens = if inner.is_v4() {
            &self.v4_lens
        } else {
            &self.v6_lens
        };
        for len in lens.range(..=inner.len()) {
            let outer = Prefix::containing(inner.addr(), *len).ok();
            out.extend(outer.and_then(|outer| self.ids.get(&outer)));
        }
    }
}

/// What lies beyond exit nodes: every public address that is not the network's own.
pub(in super::super) fn internet(directory: &Directory) -> Vec<Prefix> {
    /// Not the internet: RFC 6890 special-purpose blocks, and multicast.
    const PRIVATE: [([u8; 4], u8); 9] = [
        ([0, 0, 0, 0], 8),
        ([10, 0, 0, 0], 8),
        ([100, 64, 0, 0], 10),
        ([127, 0, 0, 0], 8),
        ([169, 254, 0, 0], 16),
        ([172, 16, 0, 0], 12),
        ([192, 168, 0, 0], 16),
        ([224, 0, 0, 0], 4),
        ([240, 0, 0, 0], 4),
    ];
    /// Global unicast, RFC 4291.
    const GLOBAL_V6: ([u16; 8], u8) = ([0x2000, 0, 0, 0, 0, 0, 0, 0], 3);
    let private = PRIVATE
        .iter()
        .filter_map(|(addr, len)| Prefix::containing(IpAddr::from(*addr), *len).ok());
    let mut inside: Vec<Prefix> = private.collect();
    inside.extend([directory.v4, directory.v6]);
    let global = Prefix::containing(IpAddr::from(GLOBAL_V6.0), GLOBAL_V6.1).ok();
    let all: Vec<Prefix> = global.into_iter().chain([Prefix::ALL_V4]).collect();
    AddrSet::of(&all).without(&AddrSet::of(&inside)).prefixes()
}
