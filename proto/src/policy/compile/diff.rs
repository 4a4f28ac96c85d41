//! What a change of policy opens and closes: who may start what with whom, before and after.
//!
//! Both policies are compiled for the same network. Its endpoints ([`ends`]) are nodes, the
//! stretches of subnet routes that no selector of either policy tells apart, and what lies beyond
//! exit nodes. Endpoints that the same rules of both policies select as a source share a *source
//! class*, likewise destinations, and the answer is computed between classes. Only pairs that a
//! changed rule speaks of are looked at: what both policies say changes nothing.
//!
//! Rules to `autogroup:self` would give every user a class of his own. Instead a pair of classes
//! has two answers, one for nodes of one user and one for all others, and a change says for which
//! of them it holds ([`Pairs`]).

use super::super::directory::Directory;
use super::Compiled;
use crate::filter::{Label, Service};
use ends::Census;
use services::Services;
use std::collections::{BTreeMap, BTreeSet};

mod ends;
mod services;
mod text;

pub use ends::Endpoint;

/// Most pairs of classes that are compared; a change that touches more is too large to tell.
const MAX_PAIRS: usize = 4_000_000;
/// Most entries of the lists by class, all together: bounds memory at some hundred megabytes.
const MAX_LISTED: usize = 32_000_000;

/// Whether a change lets more or less through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effect {
    /// Was denied, is allowed.
    Opens,
    /// Was allowed, is denied.
    Closes,
}

/// For which pairs of a source and a destination a change holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pairs {
    /// For all.
    All,
    /// Where both are nodes of one user.
    OneUser,
    /// For all but those.
    OtherUsers,
}

/// One difference: the same services from every endpoint of `srcs` to every one of `dsts`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Who initiates: indices into [`Diff::ends`], sorted.
    pub srcs: Vec<u32>,
    /// To whom.
    pub dsts: Vec<u32>,
    /// More or less.
    pub effect: Effect,
    /// For which pairs.
    pub pairs: Pairs,
    /// Between their IPv4 addresses.
    pub v4: bool,
    /// Between their IPv6 addresses.
    pub v6: bool,
    /// What; no two overlap.
    pub services: Vec<Service>,
}

/// All that differs. Pairs of one endpoint with itself do not exist.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// Every endpoint of the network.
    pub ends: Vec<Endpoint>,
    /// The differences, by source.
    pub changes: Vec<Change>,
    groups: Vec<text::Group>,
}

/// A change touches too much to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the change is too large to be told: more than {MAX_PAIRS} pairs of endpoints that policy \
     tells apart; compare in smaller steps"
)]
pub struct TooLarge;

/// Everything that differs between `old` and `new`, both compiled for `directory`.
///
/// # Errors
/// [`TooLarge`].
pub fn diff(old: &Compiled, new: &Compiled, directory: &Directory) -> Result<Diff, TooLarge> {
    let policies = [old, new];
    let census = Census::new(policies, directory);
    let users = Users::new(policies, &census.ends);
    let sources = classes(policies, &census, &users, Role::Source)?;
    let destinations = classes(policies, &census, &users, Role::Destination)?;
    let views = [0, 1].map(|it| view(it, policies[it], &sources, &destinations));
    let rows = rows(&views, &sources, &destinations, &users)?;
    let mut outcomes = Outcomes {
        views: &views,
        users: &users,
        numbers: BTreeMap::new(),
        known: BTreeMap::new(),
        found: Vec::new(),
        key: Vec::new(),
    };
    let mut marks = Marks(views.each_ref().map(|rules| vec![false; rules.len()]));
    for (src, row) in rows.iter().enumerate() {
        let class = &sources[src];
        marks.set(class, true);
        for dst in row {
            let pair = (src as u32, *dst);
            outcomes.note(pair, &marks, class, &destinations[*dst as usize]);
        }
        marks.set(class, false);
    }
    Ok(Diff {
        changes: changes(&outcomes, &sources, &destinations),
        groups: text::groups(policies, &census.ends),
        ends: census.ends,
    })
}

/// Who the endpoints' users are, and what their own nodes may do among themselves.
struct Users {
    /// By endpoint.
    of: Vec<Option<u32>>,
    /// By user: which of `services`; `None` if there is nothing in either policy.
    own: Vec<Option<u32>>,
    /// In the old policy and in the new.
    services: Vec<[Services; 2]>,
}

impl Users {
    fn new(policies: [&Compiled; 2], ends: &[Endpoint]) -> Self {
        let mut numbers: BTreeMap<&str, u32> = BTreeMap::new();
        let mut of = Vec::new();
        for end in ends {
            let next = numbers.len() as u32;
            let login = end.user.as_deref();
            of.push(login.map(|login| *numbers.entry(login).or_insert(next)));
        }
        let mut own = vec![None; numbers.len()];
        let mut known: BTreeMap<[Services; 2], u32> = BTreeMap::new();
        for (login, number) in numbers {
            let services = policies.map(|policy| among_own(policy, login));
            if services.iter().any(|services| !services.is_empty()) {
                let next = known.len() as u32;
                own[number as usize] = Some(*known.entry(services).or_insert(next));
            }
        }
        let mut numbered: Vec<([Services; 2], u32)> = known.into_iter().collect();
        numbered.sort_by_key(|(_, number)| *number);
        let services = numbered.into_iter().map(|(services, _)| services).collect();
        Self { of, own, services }
    }

    fn own_of(&self, end: u32) -> Option<u32> {
        self.of[end as usize].and_then(|user| self.own[user as usize])
    }
}

/// What a user's own nodes may do among themselves.
fn among_own(policy: &Compiled, login: &str) -> Services {
    let label = policy.labels.iter().position(|name| name == login);
    let label = label.map(|number| Label(number as u32));
    let named = |users: &Option<BTreeSet<Label>>| match (users, label) {
        (None, _) => true,
        (Some(users), Some(label)) => users.contains(&label),
        (Some(_), None) => false,
    };
    let rules = policy.self_rules.iter().filter(|rule| named(&rule.users));
    Services::of(rules.flat_map(|rule| &rule.services))
}

#[derive(Clone, Copy)]
enum Role {
    Source,
    Destination,
}

/// Faces that the same rules select in one role.
struct Class {
    v4: bool,
    /// As in [`Users::own`], the same for all of them.
    own: Option<u32>,
    /// The rules, in the old policy and in the new, sorted.
    rules: [Vec<u32>; 2],
    /// Endpoints, sorted.
    ends: Vec<u32>,
    /// Their users, sorted.
    users: Vec<u32>,
}

fn classes(
    policies: [&Compiled; 2],
    census: &Census,
    users: &Users,
    role: Role,
) -> Result<Vec<Class>, TooLarge> {
    let mut listed = 0;
    let mut rules = Vec::with_capacity(census.matched.len());
    for matched in &census.matched {
        let lists = [0, 1].map(|it| {
            let by_selector = match role {
                Role::Source => &policies[it].as_src,
                Role::Destination => &policies[it].as_dst,
            };
            let ids = matched.selectors[it].iter();
            let mut rules: Vec<u32> = ids
                .flat_map(|id| &by_selector[*id as usize])
                .copied()
                .collect();
            super::unique(&mut rules);
            // Such a rule opens routes, never the router itself.
            if matches!(role, Role::Destination) && !matched.routed {
                rules.retain(|rule| policies[it].rules[*rule as usize].via.is_empty());
            }
            rules
        });
        listed += lists[0].len() + lists[1].len();
        if listed > MAX_LISTED {
            return Err(TooLarge);
        }
        rules.push(lists);
    }
    let mut out: BTreeMap<_, Vec<u32>> = BTreeMap::new();
    for face in &census.faces {
        let (own, rules) = (users.own_of(face.end), &rules[face.matched]);
        if own.is_some() || rules.iter().any(|rules| !rules.is_empty()) {
            out.entry((face.v4, own, rules)).or_default().push(face.end);
        }
    }
    let class = |((v4, own, rules), mut ends): ((bool, _, &[Vec<u32>; 2]), Vec<u32>)| {
        super::unique(&mut ends);
        let mut users: Vec<u32> = ends
            .iter()
            .filter_map(|end| users.of[*end as usize])
            .collect();
        super::unique(&mut users);
        let rules = rules.clone();
        Class {
            v4,
            own,
            rules,
            ends,
            users,
        }
    };
    Ok(out.into_iter().map(class).collect())
}

/// A rule over classes.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct ClassRule {
    srcs: Vec<u32>,
    dsts: Vec<u32>,
    services: Services,
}

/// The rules of the policy `it` over classes.
fn view(it: usize, policy: &Compiled, sources: &[Class], destinations: &[Class]) -> Vec<ClassRule> {
    let services = policy.rules.iter().map(|rule| Services::of(&rule.services));
    let rule = |services| ClassRule {
        services,
        ..ClassRule::default()
    };
    let mut out: Vec<ClassRule> = services.map(rule).collect();
    for (number, class) in sources.iter().enumerate() {
        for rule in &class.rules[it] {
            out[*rule as usize].srcs.push(number as u32);
        }
    }
    for (number, class) in destinations.iter().enumerate() {
        for rule in &class.rules[it] {
            out[*rule as usize].dsts.push(number as u32);
        }
    }
    out
}

/// The pairs of classes that something in only one of the policies speaks of: by source, the
/// destinations, sorted.
fn rows(
    views: &[Vec<ClassRule>; 2],
    sources: &[Class],
    destinations: &[Class],
    users: &Users,
) -> Result<Vec<Vec<u32>>, TooLarge> {
    let named = views
        .each_ref()
        .map(|rules| rules.iter().collect::<BTreeSet<_>>());
    let changed = [(0, 1), (1, 0)].map(|(one, other)| -> Vec<bool> {
        let rules: &Vec<ClassRule> = &views[one];
        rules
            .iter()
            .map(|rule| !named[other].contains(rule))
            .collect()
    });
    let mut by_own: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (number, class) in destinations.iter().enumerate() {
        if let Some(own) = class.own {
            by_own.entry(own).or_default().push(number as u32);
        }
    }
    let (mut out, mut pairs, mut listed) = (Vec::with_capacity(sources.len()), 0, 0);
    let mut united: BTreeMap<BTreeSet<&Vec<u32>>, Vec<u32>> = BTreeMap::new();
    for class in sources {
        let lists = [0, 1].map(|it| {
            let rules = class.rules[it].iter().map(|rule| *rule as usize);
            rules
                .filter(|rule| changed[it][*rule])
                .map(|rule| &views[it][rule].dsts)
                .collect::<Vec<_>>()
        });
        let lists: BTreeSet<&Vec<u32>> = lists.into_iter().flatten().collect();
        let row = united.entry(lists).or_insert_with_key(|lists| {
            let mut row: Vec<u32> = lists.iter().copied().flatten().copied().collect();
            listed += row.len();
            super::unique(&mut row);
            row
        });
        let same_family = |dst: &&u32| destinations[**dst as usize].v4 == class.v4;
        let mut row: Vec<u32> = row.iter().filter(same_family).copied().collect();
        if let Some(own) = class.own
            && users.services[own as usize][0] != users.services[own as usize][1]
        {
            let own = by_own.get(&own).into_iter().flatten();
            row.extend(own.filter(same_family));
            super::unique(&mut row);
        }
        pairs += row.len();
        if pairs > MAX_PAIRS || listed > MAX_LISTED {
            return Err(TooLarge);
        }
        out.push(row);
    }
    Ok(out)
}

/// What changes between two classes.
type Outcome = (Effect, Pairs, Services);

/// Which pairs of nodes two classes of equal [`Class::own`] have.
#[derive(Clone, Copy)]
enum Mix {
    OneUser,
    Both,
}

/// The rules that select one source, marked: by policy, by rule.
struct Marks([Vec<bool>; 2]);

impl Marks {
    fn set(&mut self, class: &Class, marked: bool) {
        for (marks, rules) in self.0.iter_mut().zip(&class.rules) {
            rules.iter().for_each(|rule| marks[*rule as usize] = marked);
        }
    }
}

/// What was found so far. Few pairs are decided by different rules, so answers are kept, and
/// outcomes are known by number.
struct Outcomes<'v> {
    views: &'v [Vec<ClassRule>; 2],
    users: &'v Users,
    numbers: BTreeMap<Outcome, usize>,
    /// By what decides about a pair ([`Outcomes::key`]): its outcomes.
    known: BTreeMap<Vec<u32>, Vec<usize>>,
    /// By outcome.
    found: Vec<Vec<(u32, u32)>>,
    /// Of the pair at hand: how many rules of the old policy decide, these, those of the new one,
    /// and, where it has nodes of one user, what these may do among themselves and the [`Mix`].
    key: Vec<u32>,
}

impl Outcomes<'_> {
    fn note(&mut self, pair: (u32, u32), marks: &Marks, src: &Class, dst: &Class) {
        if src.ends.len() == 1 && src.ends == dst.ends {
            return;
        }
        self.key.clear();
        self.key.push(0);
        let common = |it: usize| {
            let rules = dst.rules[it].iter().copied();
            rules.filter(move |rule| marks.0[it][*rule as usize])
        };
        self.key.extend(common(0));
        let old = self.key.len();
        self.key[0] = old as u32;
        self.key.extend(common(1));
        let new = self.key.len();
        let own = src.own.filter(|own| dst.own == Some(*own));
        let own = own.and_then(|own| Some((own, mix(src, dst, &self.users.of)?)));
        if let Some((own, mix)) = own {
            self.key.extend([u32::MAX, own, mix as u32]);
        }
        let known = match self.known.get(&self.key) {
            Some(known) => known,
            None => {
                let common = [&self.key[1..old], &self.key[old..new]];
                let mut numbered = Vec::new();
                for outcome in answers(self.views, self.users, common, own) {
                    let next = self.found.len();
                    let number = *self.numbers.entry(outcome).or_insert(next);
                    if number == next {
                        self.found.push(Vec::new());
                    }
                    numbered.push(number);
                }
                self.known.entry(self.key.clone()).or_insert(numbered)
            }
        };
        for outcome in known {
            self.found[*outcome].push(pair);
        }
    }
}

/// Whether the two classes have pairs of different nodes of one user, and others; `None` if they
/// have only others.
fn mix(src: &Class, dst: &Class, of: &[Option<u32>]) -> Option<Mix> {
    let nodes = |class: &Class, user: u32| -> Vec<u32> {
        let ends = class.ends.iter().copied();
        ends.filter(|end| of[*end as usize] == Some(user)).collect()
    };
    let mut shared = src
        .users
        .iter()
        .filter(|user| dst.users.binary_search(user).is_ok());
    let pair = |user: &u32| {
        let (srcs, dsts) = (nodes(src, *user), nodes(dst, *user));
        srcs.len() > 1 || srcs != dsts
    };
    shared.any(pair).then_some(())?;
    let alone = src.users.len() == 1 && src.users == dst.users;
    Some(if alone { Mix::OneUser } else { Mix::Both })
}

fn answers(
    views: &[Vec<ClassRule>; 2],
    users: &Users,
    common: [&[u32]; 2],
    own: Option<(u32, Mix)>,
) -> Vec<Outcome> {
    let across = [0, 1].map(|it| {
        let rules = common[it].iter();
        Services::union(rules.map(|rule| &views[it][*rule as usize].services))
    });
    let differ = |[old, new]: &[Services; 2], effect| match effect {
        Effect::Opens => new.without(old),
        Effect::Closes => old.without(new),
    };
    let mut out = Vec::new();
    for effect in [Effect::Opens, Effect::Closes] {
        let others = differ(&across, effect);
        let Some((own, mix)) = own else {
            out.push((effect, Pairs::All, others));
            continue;
        };
        let own = &users.services[own as usize];
        let within = [0, 1].map(|it| Services::union([&across[it], &own[it]].into_iter()));
        let same = differ(&within, effect);
        match mix {
            Mix::OneUser => out.push((effect, Pairs::All, same)),
            Mix::Both => {
                let (only_same, only_others) = (same.without(&others), others.without(&same));
                out.push((effect, Pairs::All, same.without(&only_same)));
                out.push((effect, Pairs::OneUser, only_same));
                out.push((effect, Pairs::OtherUsers, only_others));
            }
        }
    }
    out.retain(|(_, _, services)| !services.is_empty());
    out
}

/// The changes between endpoints, the same ones of both families in one.
fn changes(outcomes: &Outcomes<'_>, sources: &[Class], destinations: &[Class]) -> Vec<Change> {
    let mut out: BTreeMap<Change, (bool, bool)> = BTreeMap::new();
    for ((effect, pairs, services), number) in &outcomes.numbers {
        for (srcs, dsts) in rectangles(&outcomes.found[*number]) {
            let Some(v4) = srcs.first().map(|class| sources[*class as usize].v4) else {
                continue;
            };
            let (mut srcs, mut dsts) = (ends(sources, &srcs), ends(destinations, &dsts));
            // One with itself is no pair, and need not look like one.
            if let [alone] = srcs[..] {
                dsts.retain(|end| *end != alone);
            } else if let [alone] = dsts[..] {
                srcs.retain(|end| *end != alone);
            }
            let change = Change {
                srcs,
                dsts,
                effect: *effect,
                pairs: *pairs,
                v4: false,
                v6: false,
                services: services.list(),
            };
            let families = out.entry(change).or_default();
            families.0 |= v4;
            families.1 |= !v4;
        }
    }
    let all = out.into_iter();
    all.map(|(change, (v4, v6))| Change { v4, v6, ..change })
        .collect()
}

/// The endpoints of some classes, sorted.
fn ends(classes: &[Class], some: &[u32]) -> Vec<u32> {
    let classes = some.iter().map(|class| &classes[*class as usize]);
    let mut out: Vec<u32> = classes.flat_map(|class| &class.ends).copied().collect();
    super::unique(&mut out);
    out
}

/// Pairs as few blocks of sources and destinations: by equal rows or by equal columns, whichever
/// are fewer. Classes of two families are in no pair, so no block mixes them.
fn rectangles(pairs: &[(u32, u32)]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let blocks = |pairs: &[(u32, u32)]| {
        let mut out: BTreeMap<Vec<u32>, Vec<u32>> = BTreeMap::new();
        for row in pairs.chunk_by(|one, other| one.0 == other.0) {
            let of_row = row.iter().map(|(_, column)| *column).collect();
            let row = row.first().map(|(row, _)| *row);
            out.entry(of_row).or_default().extend(row);
        }
        out
    };
    let by_row = blocks(pairs);
    let mut turned: Vec<(u32, u32)> = pairs.iter().map(|(src, dst)| (*dst, *src)).collect();
    turned.sort_unstable();
    let by_column = blocks(&turned);
    if by_row.len() <= by_column.len() {
        by_row
            .into_iter()
            .map(|(dsts, srcs)| (srcs, dsts))
            .collect()
    } else {
        by_column.into_iter().collect()
    }
}
