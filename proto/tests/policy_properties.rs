//! What must hold of every policy, tried on random ones.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use proptest::prelude::*;
use proptest::sample::select;
use proto::filter::{Direction, Initiation, Label, Rule, Selector, Service};
use proto::id::NodeId;
use proto::net::Protocol;
use proto::netmap::Owner;
use proto::policy::{
    Compiled, Diff, Directory, DirectoryNode, DirectoryUser, Effect, Explainer, Flow, Pairs,
    Policy, diff, parse,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A network small enough that random rules often meet: three users, tagged servers, routers whose
/// LANs nest, and an exit node.
fn directory() -> Directory {
    let node = |name: &str, addrs: &[&str], owner: &str, routes: &[&str]| {
        let owner = match owner.strip_prefix("tag:") {
            Some(_) => Owner::Tags(owner.split(',').map(str::to_owned).collect()),
            None => Owner::User(owner.to_owned()),
        };
        DirectoryNode {
            name: name.to_owned(),
            owner,
            addrs: addrs.iter().map(|addr| addr.parse().unwrap()).collect(),
            routes: routes.iter().map(|route| route.parse().unwrap()).collect(),
            advertised: BTreeSet::new(),
        }
    };
    let nodes = [
        node("a1", &["100.64.0.1", "fd7a::1"], "ana@example.com", &[]),
        node("a2", &["100.64.0.2", "fd7a::2"], "ana@example.com", &[]),
        node("b1", &["100.64.0.3", "fd7a::3"], "bob@example.org", &[]),
        node("web", &["100.64.0.4", "fd7a::4"], "tag:web", &[]),
        node("db", &["100.64.0.5", "fd7a::5"], "tag:db,tag:web", &[]),
        node(
            "wide",
            &["100.64.0.6", "fd7a::6"],
            "tag:router",
            &["10.0.0.0/8"],
        ),
        node(
            "narrow",
            &["100.64.0.7", "fd7a::7"],
            "tag:router,tag:east",
            &["10.1.0.0/16"],
        ),
        node(
            "exit",
            &["100.64.0.8", "fd7a::8"],
            "tag:exit",
            &["0.0.0.0/0", "::/0"],
        ),
    ];
    let users = ["ana@example.com", "bob@example.org", "eve@example.com"];
    let users = users.map(|login| DirectoryUser {
        login: login.to_owned(),
        roles: BTreeSet::new(),
    });
    let numbered = nodes.into_iter().enumerate();
    Directory {
        v4: "100.64.0.0/10".parse().unwrap(),
        v6: "fd7a::/48".parse().unwrap(),
        users: users.to_vec(),
        nodes: numbered.map(|(n, node)| (NodeId(n as u64), node)).collect(),
    }
}

const ADDRS: [&str; 15] = [
    "100.64.0.1",
    "100.64.0.2",
    "100.64.0.3",
    "100.64.0.4",
    "100.64.0.5",
    "100.64.0.6",
    "100.64.0.7",
    "fd7a::1",
    "fd7a::4",
    "fd7a::7",
    "10.1.0.9",
    "10.2.0.9",
    "192.168.7.7",
    "8.8.8.8",
    "2001:4860::1",
];
const SOURCES: [&str; 16] = [
    "*",
    "ana@example.com",
    "bob@example.org",
    "user:*@example.com",
    "group:dev",
    "group:none",
    "tag:web",
    "tag:db",
    "tag:router",
    "autogroup:member",
    "autogroup:tagged",
    "10.1.0.0/16",
    "10.0.0.0/8",
    "100.64.0.2-100.64.0.5",
    "lan",
    "ipset:some",
];
const DESTINATIONS: [&str; 14] = [
    "*",
    "bob@example.org",
    "group:dev",
    "tag:web",
    "tag:db",
    "tag:east",
    "autogroup:member",
    "autogroup:tagged",
    "autogroup:internet",
    "10.1.0.0/24",
    "10.0.0.0/8",
    "fd7a::4",
    "host",
    "ipset:some",
];
const PORTS: [&str; 4] = ["*", "80", "22,443", "20-90"];
const PROTOCOLS: [&str; 4] = ["", "tcp", "udp", "icmp"];

/// An entry of `acls` or `grants`, as text.
fn rule() -> impl Strategy<Value = (bool, String)> {
    let selectors = |from: &'static [&'static str]| prop::collection::vec(select(from), 1..3);
    let parts = (
        selectors(&SOURCES),
        selectors(&DESTINATIONS),
        select(&PORTS[..]),
        select(&PROTOCOLS[..]),
        0..4u8,
    );
    parts.prop_map(|(srcs, dsts, ports, protocol, kind)| {
        let srcs = quoted(srcs.iter().map(|src| (*src).to_owned()));
        let ports = if protocol == "icmp" { "*" } else { ports };
        if kind == 0 {
            let dst = quoted(dsts.iter().map(|dst| (*dst).to_owned()));
            let service = if protocol.is_empty() {
                ports.to_owned()
            } else {
                format!("{protocol}:{ports}")
            };
            let via = if ports == "*" {
                r#", "via": ["tag:east"]"#
            } else {
                ""
            };
            return (
                true,
                format!(r#"{{"src": [{srcs}], "dst": [{dst}], "ip": ["{service}"]{via}}}"#),
            );
        }
        if kind == 1 {
            let src =
                ["group:dev", "ana@example.com", "autogroup:member"][(srcs.len() + dsts.len()) % 3];
            let own = format!(
                r#"{{"action": "accept", "src": ["{src}"], "dst": ["autogroup:self:{ports}"]}}"#
            );
            return (false, own);
        }
        let dst = quoted(dsts.iter().map(|dst| format!("{dst}:{ports}")));
        let protocol = format!(r#""proto": "{protocol}", "#);
        (
            false,
            format!(r#"{{"action": "accept", {protocol}"src": [{srcs}], "dst": [{dst}]}}"#),
        )
    })
}

fn quoted(texts: impl Iterator<Item = String>) -> String {
    texts
        .map(|text| format!("\"{text}\""))
        .collect::<Vec<_>>()
        .join(", ")
}

fn rules() -> impl Strategy<Value = Vec<(bool, String)>> {
    prop::collection::vec(rule(), 0..6)
}

fn policy(rules: &[(bool, String)]) -> Policy {
    let section = |grants: bool| {
        let entries = rules.iter().filter(|(is_grant, _)| *is_grant == grants);
        entries
            .map(|(_, text)| text.as_str())
            .collect::<Vec<_>>()
            .join(",\n")
    };
    let text = format!(
        r#"{{"groups": {{"group:dev": ["ana@example.com", "bob@example.org"], "group:none": []}},
            "hosts": {{"lan": "10.2.0.0/16", "host": "100.64.0.4"}},
            "ipsets": {{"ipset:some": ["10.1.0.0/16", "100.64.0.3", "remove 10.1.0.0/25"]}},
            "tagOwners": {{"tag:web": [], "tag:db": [], "tag:router": [], "tag:east": [],
                           "tag:exit": []}},
            "acls": [{}], "grants": [{}]}}"#,
        section(false),
        section(true)
    );
    parse(&text).unwrap_or_else(|faults| panic!("{faults}"))
}

fn flows() -> impl Iterator<Item = Flow> {
    let addrs = ADDRS.iter().map(|addr| addr.parse::<IpAddr>().unwrap());
    let pairs = addrs
        .clone()
        .flat_map(move |src| addrs.clone().map(move |dst| (src, dst)));
    let pairs = pairs.filter(|(src, dst)| src.is_ipv4() == dst.is_ipv4() && src != dst);
    let services = [
        (Protocol::TCP, 80),
        (Protocol::TCP, 22),
        (Protocol::UDP, 443),
        (Protocol(1), 0),
    ];
    pairs.flat_map(move |(src, dst)| {
        services.map(|(protocol, port)| Flow {
            src,
            dst,
            protocol,
            port,
        })
    })
}

/// Every node that a packet of `addr` may enter or leave the network by.
fn holders(directory: &Directory, addr: IpAddr) -> Vec<NodeId> {
    let nodes = directory.nodes.iter();
    let owner = nodes.clone().find(|(_, node)| node.addrs.contains(&addr));
    if let Some((id, _)) = owner {
        return vec![*id];
    }
    let carries = |node: &DirectoryNode| node.routes.iter().any(|route| route.contains(addr));
    nodes
        .filter(|(_, node)| carries(node))
        .map(|(id, _)| *id)
        .collect()
}

/// Who holds the two ends of a flow, if both ends let it pass.
fn passes(compiled: &Compiled, directory: &Directory, flow: &Flow) -> Option<(NodeId, NodeId)> {
    let labels = |addr: IpAddr| -> BTreeSet<Label> {
        let owner = directory
            .nodes
            .iter()
            .find(|(_, node)| node.addrs.contains(&addr));
        owner.map_or_else(BTreeSet::new, |(id, _)| compiled.labels(*id))
    };
    let initiation = Initiation {
        src: flow.src,
        src_labels: &labels(flow.src),
        dst: flow.dst,
        dst_labels: &labels(flow.dst),
        protocol: flow.protocol,
        port: flow.port,
    };
    let lets = |addr, direction| {
        let holders = holders(directory, addr).into_iter();
        let mut lets = holders.filter(|id| {
            compiled
                .filter(*id)
                .allows(direction, &initiation)
                .is_some()
        });
        lets.next()
    };
    Some((
        lets(flow.src, Direction::Egress)?,
        lets(flow.dst, Direction::Ingress)?,
    ))
}

/// The rules of a filter without their places: what it allows, as a set.
fn meaning(compiled: &Compiled, id: NodeId) -> BTreeMap<bool, BTreeSet<Meaning>> {
    let filter = compiled.filter(id);
    let named = |selector: &Selector| match selector {
        Selector::Label(label) => filter.labels[label.0 as usize].clone(),
        Selector::Prefix(prefix) => prefix.to_string(),
    };
    let one = |rule: &Rule| Meaning {
        srcs: rule.srcs.iter().map(named).collect(),
        dsts: rule.dsts.iter().map(named).collect(),
        services: rule.services.iter().copied().collect(),
    };
    let all = |rules: &[Rule]| rules.iter().map(one).collect();
    BTreeMap::from([(false, all(&filter.ingress)), (true, all(&filter.egress))])
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Meaning {
    srcs: BTreeSet<String>,
    dsts: BTreeSet<String>,
    services: BTreeSet<Service>,
}

/// A failure is fixed with a test of its own in `policy.rs`, not kept as a seed.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn both_ends_allow_exactly_what_the_document_says(rules in rules()) {
        let (policy, directory) = (policy(&rules), directory());
        let compiled = Compiled::new(&policy, &directory).unwrap();
        let explainer = Explainer::new(&policy, &directory);
        for flow in flows() {
            if holders(&directory, flow.src).is_empty() || holders(&directory, flow.dst).is_empty() {
                continue;
            }
            let explained = explainer.explain(&flow);
            let passed = passes(&compiled, &directory, &flow);
            prop_assert_eq!(explained.allowed, passed.is_some(), "{:?} {:?}", flow, explained);
            if let Some((src, dst)) = passed.filter(|(src, dst)| src != dst) {
                prop_assert!(compiled.sees(src, dst), "{:?}: {} does not see {}", flow, src, dst);
            }
        }
    }

    #[test]
    fn the_order_of_rules_means_nothing(rules in rules(), turn in 0..6usize) {
        let directory = directory();
        let mut turned = rules.clone();
        turned.rotate_left(turn.min(rules.len()));
        turned.reverse();
        let one = Compiled::new(&policy(&rules), &directory).unwrap();
        let other = Compiled::new(&policy(&turned), &directory).unwrap();
        for id in directory.nodes.keys() {
            prop_assert_eq!(meaning(&one, *id), meaning(&other, *id));
            prop_assert_eq!(one.peers_of(*id), other.peers_of(*id));
            prop_assert_eq!(one.labels(*id), other.labels(*id));
        }
    }

    #[test]
    fn a_rule_less_never_allows_more(rules in rules(), gone in any::<prop::sample::Index>()) {
        prop_assume!(!rules.is_empty());
        let directory = directory();
        let mut fewer = rules.clone();
        fewer.remove(gone.index(rules.len()));
        let all = Compiled::new(&policy(&rules), &directory).unwrap();
        let fewer = Compiled::new(&policy(&fewer), &directory).unwrap();
        for flow in flows() {
            let (less, more) = (passes(&fewer, &directory, &flow), passes(&all, &directory, &flow));
            prop_assert!(less.is_none() || more.is_some(), "{:?}", flow);
        }
    }

    #[test]
    fn sees_is_symmetric_and_the_same_for_one_and_for_all(rules in rules()) {
        let directory = directory();
        let compiled = Compiled::new(&policy(&rules), &directory).unwrap();
        for a in directory.nodes.keys() {
            let peers = compiled.peers_of(*a);
            for b in directory.nodes.keys() {
                prop_assert_eq!(compiled.sees(*a, *b), compiled.sees(*b, *a));
                prop_assert_eq!(compiled.sees(*a, *b), peers.contains(b));
            }
        }
    }
}

proptest! {
    #![proptest_config(config(2_000))]

    #[test]
    fn no_text_makes_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        render_faults(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn no_damage_to_a_policy_makes_the_reader_panic(
        rules in rules(),
        at in any::<prop::sample::Index>(),
        len in 0..8usize,
        insert in "[\\[\\]{}\",:/*a-z@\u{e9}\u{1f600}\n-]{0,4}",
    ) {
        let mut text: Vec<char> = policy(&rules).text().chars().collect();
        let at = at.index(text.len());
        text.splice(at..(at + len).min(text.len()), insert.chars());
        render_faults(&text.into_iter().collect::<String>());
    }
}

/// Reads a text and prints its faults, which exercises places and carets.
fn render_faults(text: &str) {
    if let Err(faults) = parse(text) {
        assert!(!faults.is_empty() && !faults.render("policy").is_empty());
    }
}

/// Whether a diff tells of a flow, and how often.
fn told(diff: &Diff, effect: Effect, flow: &Flow) -> usize {
    let holding = |some: &[u32], addr: IpAddr| {
        let mut ends = some.iter().map(|end| &diff.ends[*end as usize]);
        ends.find(|end| end.addrs.iter().any(|prefix| prefix.contains(addr)))
            .map(|end| end.user.clone())
    };
    let tells = diff.changes.iter().filter(|change| {
        let (Some(src), Some(dst)) = (
            holding(&change.srcs, flow.src),
            holding(&change.dsts, flow.dst),
        ) else {
            return false;
        };
        let same_user = src.is_some() && src == dst;
        let family = if flow.src.is_ipv4() {
            change.v4
        } else {
            change.v6
        };
        let services = change
            .services
            .iter()
            .any(|service| service.matches(flow.protocol, flow.port));
        let pair = match change.pairs {
            Pairs::All => true,
            Pairs::OneUser => same_user,
            Pairs::OtherUsers => !same_user,
        };
        change.effect == effect && family && services && pair
    });
    tells.count()
}

proptest! {
    #![proptest_config(config(160))]

    #[test]
    fn a_diff_tells_exactly_what_opens_and_closes(before in rules(), after in rules(), keep in 0..4usize) {
        // Half of the rules stay, so that unchanged rules cover some of what changes.
        let after: Vec<_> = before.iter().take(keep).cloned().chain(after).collect();
        let directory = directory();
        let (old_policy, new_policy) = (policy(&before), policy(&after));
        let old = Compiled::new(&old_policy, &directory).unwrap();
        let new = Compiled::new(&new_policy, &directory).unwrap();
        let diff = diff(&old, &new, &directory).unwrap();
        let was = Explainer::new(&old_policy, &directory);
        let is = Explainer::new(&new_policy, &directory);
        let mut any = false;
        for flow in flows() {
            if holders(&directory, flow.src).is_empty() || holders(&directory, flow.dst).is_empty() {
                continue;
            }
            let (was, is) = (was.explain(&flow).allowed, is.explain(&flow).allowed);
            any |= was != is;
            let opens = told(&diff, Effect::Opens, &flow);
            let closes = told(&diff, Effect::Closes, &flow);
            prop_assert_eq!(opens, usize::from(!was && is), "{:?} opens {:?}", flow, diff);
            prop_assert_eq!(closes, usize::from(was && !is), "{:?} closes {:?}", flow, diff);
        }
        prop_assert!(!any || !diff.is_empty());
        prop_assert!(diff.to_string().lines().count() > 0);
    }

    #[test]
    fn a_policy_does_not_differ_from_itself(rules in rules(), turn in 0..6usize) {
        let directory = directory();
        let mut turned = rules.clone();
        turned.rotate_left(turn.min(rules.len()));
        let one = Compiled::new(&policy(&rules), &directory).unwrap();
        let other = Compiled::new(&policy(&turned), &directory).unwrap();
        prop_assert!(diff(&one, &other, &directory).unwrap().is_empty());
    }
}
