//! A diff for people: by source, what is gained and what is lost; and as JSON.
//!
//! Endpoints are told as the policy would: a group, a tag or a user that has exactly these nodes
//! stands for them, and only what is left over is told by name.

use super::super::Compiled;
use super::{Change, Diff, Effect, Endpoint, Pairs};
use crate::filter::Service;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::services::Services;

/// Most names of endpoints in one list for people.
const MAX_NAMES: usize = 12;
/// Most changes that people are shown.
const MAX_SHOWN: usize = 200;

/// Nodes that have a name in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    name: String,
    /// Indices of endpoints, sorted; at least two.
    members: Vec<u32>,
}

/// The groups, tags, users and so on that mean the same nodes in both policies, largest first.
/// Nodes are the first endpoints, in the order of the directory.
pub(super) fn groups(policies: [&Compiled; 2], ends: &[Endpoint]) -> Vec<Group> {
    let mut by_name: BTreeMap<String, BTreeSet<Vec<u32>>> = BTreeMap::new();
    for policy in policies {
        let mut members: Vec<Vec<u32>> = vec![Vec::new(); policy.labels.len()];
        for (number, facts) in policy.nodes.iter().enumerate() {
            for label in &facts.labels {
                members[label.0 as usize].push(number as u32);
            }
        }
        for (name, members) in policy.labels.iter().zip(members) {
            by_name.entry(name.clone()).or_default().insert(members);
        }
    }
    let mut users: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for (number, end) in ends.iter().enumerate() {
        if let Some(login) = &end.user {
            users.entry(login).or_default().push(number as u32);
        }
    }
    for (login, members) in users {
        by_name.entry(login.to_owned()).or_default().insert(members);
    }
    let nodes = policies.iter().map(|policy| policy.nodes.len()).max();
    let everyone = (0..nodes.unwrap_or_default() as u32).collect();
    by_name.insert("every node".to_owned(), BTreeSet::from([everyone]));
    let group = |(name, mut meanings): (String, BTreeSet<Vec<u32>>)| {
        let members = meanings.pop_first().filter(|_| meanings.is_empty())?;
        (members.len() > 1).then_some(Group { name, members })
    };
    let mut out: Vec<Group> = by_name.into_iter().filter_map(group).collect();
    out.sort_by_key(|group| std::cmp::Reverse(group.members.len()));
    out
}

impl Diff {
    /// Whether nothing changes for anybody.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The names of some endpoints, for people: of groups first, the largest before the others, as
    /// far as they say more than what is named already.
    fn names(&self, some: &[u32]) -> String {
        let mut wanted = vec![false; self.ends.len()];
        some.iter().for_each(|end| wanted[*end as usize] = true);
        let (mut left, mut unnamed) = (wanted.clone(), some.len());
        let mut names = Vec::new();
        for group in &self.groups {
            if unnamed < 2 || names.len() == MAX_NAMES {
                break;
            }
            let members = group.members.iter().map(|member| *member as usize);
            if members.clone().any(|member| !wanted[member]) {
                continue;
            }
            let told = members.clone().filter(|member| left[*member]).count();
            if told > 1 {
                members.for_each(|member| left[member] = false);
                unnamed -= told;
                names.push(format!("{} ({} nodes)", group.name, group.members.len()));
            }
        }
        let room = MAX_NAMES - names.len();
        let single = some.iter().filter(|end| left[**end as usize]);
        let single = single.filter_map(|end| self.ends.get(*end as usize));
        names.extend(single.take(room).map(|end| end.name.clone()));
        let mut out = names.join(", ");
        if unnamed > room {
            out += &format!(" and {} more", unnamed - room);
        }
        out
    }

    fn sentence(&self, change: &Change) -> String {
        let (sign, may) = match change.effect {
            Effect::Opens => ('+', "may reach"),
            Effect::Closes => ('-', "may no longer reach"),
        };
        let which = match change.pairs {
            Pairs::All => "",
            Pairs::OneUser => ", if of the same user,",
            Pairs::OtherUsers => ", unless of the same user,",
        };
        let family = match (change.v4, change.v6) {
            (true, false) if self.has(change, false) => ", at IPv4 addresses only",
            (false, true) if self.has(change, true) => ", at IPv6 addresses only",
            _ => "",
        };
        let services = Services::of(&change.services);
        let dsts = self.names(&change.dsts);
        format!("  {sign} {may} {dsts}{which} on {services}{family}\n")
    }

    /// Whether both sides of a change have addresses of a family.
    fn has(&self, change: &Change, v4: bool) -> bool {
        let any = |some: &[u32]| {
            let ends = some.iter().filter_map(|end| self.ends.get(*end as usize));
            ends.flat_map(|end| &end.addrs)
                .any(|prefix| prefix.is_v4() == v4)
        };
        any(&change.srcs) && any(&change.dsts)
    }

    /// As JSON: `same`; `changes`, each with `effect` (`opens`, `closes`), `srcs` and `dsts` (names),
    /// `pairs` (`all`, `one_user`, `other_users`), `families` (`v4`, `v6`) and `services`
    /// (`protocol`, `first`, `last`); and `endpoints`, by name, with `addrs` and `user`.
    #[must_use]
    pub fn document(&self) -> Value {
        let ends = |some: &[u32]| -> Vec<&Endpoint> {
            let ends = some.iter().filter_map(|end| self.ends.get(*end as usize));
            ends.collect()
        };
        let names = |some: &[u32]| -> Vec<&str> {
            ends(some).iter().map(|end| end.name.as_str()).collect()
        };
        let service = |service: &Service| {
            json!({
                "protocol": service.protocol,
                "first": service.ports.first(),
                "last": service.ports.last(),
            })
        };
        let mut endpoints = BTreeMap::new();
        let mut changes = Vec::new();
        for change in &self.changes {
            for end in ends(&change.srcs).into_iter().chain(ends(&change.dsts)) {
                let about = json!({ "addrs": end.addrs, "user": end.user });
                endpoints.insert(end.name.as_str(), about);
            }
            let families = [(change.v4, "v4"), (change.v6, "v6")];
            let families = families.iter().filter(|(there, _)| *there);
            let services: Vec<Value> = change.services.iter().map(service).collect();
            changes.push(json!({
                "effect": match change.effect {
                    Effect::Opens => "opens",
                    Effect::Closes => "closes",
                },
                "srcs": names(&change.srcs),
                "dsts": names(&change.dsts),
                "pairs": match change.pairs {
                    Pairs::All => "all",
                    Pairs::OneUser => "one_user",
                    Pairs::OtherUsers => "other_users",
                },
                "families": families.map(|(_, name)| *name).collect::<Vec<_>>(),
                "services": services,
            }));
        }
        json!({ "same": self.is_empty(), "changes": changes, "endpoints": endpoints })
    }
}

/// For people: by source, a line for each change.
impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing changes for anybody\n");
        }
        let mut sources: Option<&[u32]> = None;
        for change in self.changes.iter().take(MAX_SHOWN) {
            if sources != Some(&change.srcs) {
                writeln!(f, "{}", self.names(&change.srcs))?;
                sources = Some(&change.srcs);
            }
            f.write_str(&self.sentence(change))?;
        }
        let more = self.changes.len().saturating_sub(MAX_SHOWN);
        if more > 0 {
            writeln!(f, "and {more} more; --json has all of them")?;
        }
        Ok(())
    }
}
