//! Provenance for people: which selectors of a rule matched, and which rules came close.
//!
//! The programs know classes and port sets only. A rule is found again through the classes: each
//! keeps the list of rules that select it, so no look here walks all rules of a large policy.

use super::Acl;
use proto::filter::{Direction, Label, Rule, Selector};
use proto::net::Protocol;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Most rules of one end that are looked at in search of near misses.
const MAX_LOOKED_AT: usize = 4_096;

/// What a rule that does not allow a first packet lacks. The nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lacks {
    /// It is for these two and this protocol, on other ports.
    Port,
    /// It is for these two, by other protocols.
    Protocol,
    /// It is for this source, to other destinations.
    Destination,
    /// It is for this destination, from other sources.
    Source,
}

/// A rule that came close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Near<'a> {
    /// What it lacks.
    pub lacks: Lacks,
    /// The rule.
    pub rule: &'a Rule,
}

impl Acl {
    /// The selectors of `rule` that a first packet from `src` to `dst` matches, as the policy wrote
    /// them; `None` where it matches none of one side.
    #[must_use]
    pub fn matched(&self, rule: &Rule, src: IpAddr, dst: IpAddr) -> Option<(String, String)> {
        let side = |selectors: &[Selector], addr| {
            let labels = self.labels_of(addr);
            let found = selectors.iter().find(|one| one.matches(addr, labels));
            found.map(|selector| self.written(selector))
        };
        side(&rule.srcs, src).zip(side(&rule.dsts, dst))
    }

    /// At most `limit` rules that came closest to allowing what no rule allows, nearest first.
    #[must_use]
    pub fn near(&self, direction: Direction, flow: &Flow, limit: usize) -> Vec<Near<'_>> {
        let (roles, rules) = (self.roles(direction), self.filter.rules(direction));
        let class = |addr, of: fn(&ebpf::abi::Identity) -> u32| {
            self.identity(addr).map_or(0, |identity| of(&identity))
        };
        let of_source = roles.source.rules(class(flow.src, |one| one.as_source));
        let of_destination = roles
            .destination
            .rules(class(flow.dst, |one| one.as_destination));
        let serves = |rule: &Rule| {
            let mut services = rule.services.iter();
            services.any(|service| service.matches(flow.protocol, flow.port))
        };
        // By what it lacks, and whether it would be the right service; then as in the policy.
        let mut found: BTreeMap<(Lacks, bool, u32), &Rule> = BTreeMap::new();
        for (list, other, lacks) in [
            (of_source, of_destination, Lacks::Destination),
            (of_destination, of_source, Lacks::Source),
        ] {
            for index in list.iter().take(MAX_LOOKED_AT) {
                let Some(rule) = rules.get(*index as usize) else {
                    continue;
                };
                let lacks = if other.binary_search(index).is_err() {
                    lacks
                } else if rule.services.iter().any(|one| one.speaks(flow.protocol)) {
                    Lacks::Port
                } else {
                    Lacks::Protocol
                };
                found.insert((lacks, !serves(rule), *index), rule);
            }
        }
        let nearest = found.into_iter().take(limit);
        nearest
            .map(|((lacks, _, _), rule)| Near { lacks, rule })
            .collect()
    }

    /// The text of a selector, as the policy wrote it if that is known here.
    #[must_use]
    pub fn written(&self, selector: &Selector) -> String {
        match selector {
            Selector::Label(Label(index)) => {
                let text = self.filter.labels.get(*index as usize);
                text.map_or_else(|| format!("label {index}"), Clone::clone)
            }
            Selector::Prefix(prefix) if prefix.is_host() => prefix.addr().to_string(),
            Selector::Prefix(prefix) if prefix.len() == 0 => "*".to_owned(),
            Selector::Prefix(prefix) => prefix.to_string(),
        }
    }

    /// Labels of the node that has this very address; none for what lies behind a node.
    fn labels_of(&self, addr: IpAddr) -> &BTreeSet<Label> {
        static NONE: BTreeSet<Label> = BTreeSet::new();
        let own = self.me.iter().map(|me| (&me.addrs, &me.labels));
        let peers = self.peers.values().map(|peer| (&peer.addrs, &peer.labels));
        let mut all = own.chain(peers);
        all.find(|(addrs, _)| addrs.contains(&addr))
            .map_or(&NONE, |(_, labels)| labels)
    }
}

/// A first packet: who initiates what to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol.
    pub protocol: Protocol,
    /// Destination port; 0 where the protocol has none.
    pub port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::filter::{Filter, Service};
    use proto::id::NodeId;
    use proto::key::NodeKey;
    use proto::net::PortRange;
    use proto::netmap::{Me, Owner, Peer};

    const DEV: Selector = Selector::Label(Label(0));
    const OPS: Selector = Selector::Label(Label(1));
    const WEB: Selector = Selector::Label(Label(2));

    fn rule(line: u32, src: Selector, dst: Selector, protocol: u8, port: u16) -> Rule {
        Rule {
            index: line,
            line,
            srcs: vec![src],
            dsts: vec![dst],
            services: vec![Service {
                protocol: Some(Protocol(protocol)),
                ports: PortRange::single(port),
            }],
        }
    }

    /// We are 100.64.0.1 and `tag:web`; 100.64.0.2 is of `group:dev`, and 10.1.0.0/16 behind it.
    fn lowered(ingress: Vec<Rule>, egress: Vec<Rule>) -> Acl {
        let owner = Owner::User("ana@example.com".to_owned());
        let me = Me {
            id: NodeId(1),
            name: "me".to_owned(),
            key: NodeKey([1; 32]),
            addrs: vec![IpAddr::from([100, 64, 0, 1])],
            routes: BTreeSet::new(),
            owner: owner.clone(),
            labels: [Label(2)].into(),
        };
        let peer = Peer {
            id: NodeId(2),
            name: "laptop".to_owned(),
            key: NodeKey([2; 32]),
            addrs: vec![IpAddr::from([100, 64, 0, 2])],
            routes: ["10.1.0.0/16".parse().unwrap()].into(),
            endpoints: Vec::new(),
            owner,
            labels: [Label(0)].into(),
            online: true,
            disco: None,
            home: None,
        };
        let filter = Filter {
            labels: ["group:dev", "group:ops", "tag:web"]
                .map(str::to_owned)
                .into(),
            ingress,
            egress,
        };
        let mut acl = Acl::default();
        acl.lower(&filter, &me, &[(peer.id, peer)].into()).unwrap();
        acl
    }

    fn flow(src: &str, dst: &str) -> Flow {
        Flow {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            protocol: Protocol::TCP,
            port: 22,
        }
    }

    fn lines(acl: &Acl, direction: Direction, flow: &Flow) -> Vec<(u32, Lacks)> {
        let near = acl.near(direction, flow, 8).into_iter();
        near.map(|near| (near.rule.line, near.lacks)).collect()
    }

    #[test]
    fn rules_that_lack_least_come_first() {
        let from_dev = |line, protocol, port| rule(line, DEV, WEB, protocol, port);
        let ingress = vec![
            rule(3, OPS, WEB, 17, 53),
            rule(4, OPS, WEB, 6, 22),
            from_dev(5, 17, 22),
            from_dev(6, 6, 80),
        ];
        let acl = lowered(ingress, Vec::new());
        let flow = flow("100.64.0.2", "100.64.0.1");
        let want = [
            (6, Lacks::Port),
            (5, Lacks::Protocol),
            (4, Lacks::Source),
            (3, Lacks::Source),
        ];
        assert_eq!(lines(&acl, Direction::Ingress, &flow), want);
        assert_eq!(acl.near(Direction::Ingress, &flow, 1).len(), 1);
        assert_eq!(lines(&acl, Direction::Egress, &flow), []);
    }

    #[test]
    fn a_rule_to_elsewhere_lacks_the_destination() {
        let elsewhere = Selector::Prefix("10.1.7.0/24".parse().unwrap());
        let acl = lowered(Vec::new(), vec![rule(9, WEB, elsewhere, 6, 22)]);
        let near = |dst| lines(&acl, Direction::Egress, &flow("100.64.0.1", dst));
        assert_eq!(near("10.1.8.1"), [(9, Lacks::Destination)]);
        assert_eq!(near("100.64.0.2"), [(9, Lacks::Destination)]);
    }

    #[test]
    fn selectors_are_named_as_the_policy_has_them() {
        let route = Selector::Prefix("10.1.7.0/24".parse().unwrap());
        let all = Selector::Prefix(proto::net::Prefix::ALL_V4);
        let acl = lowered(Vec::new(), vec![rule(9, WEB, route, 6, 22)]);
        let matched = |rule: &Rule, dst: &str| {
            let flow = flow("100.64.0.1", dst);
            acl.matched(rule, flow.src, flow.dst)
        };
        let both = |src: &str, dst: &str| Some((src.to_owned(), dst.to_owned()));
        let want = both("tag:web", "10.1.7.0/24");
        assert_eq!(matched(&rule(9, WEB, route, 6, 22), "10.1.7.9"), want);
        assert_eq!(matched(&rule(9, WEB, route, 6, 22), "10.1.8.9"), None);
        let want = both("tag:web", "group:dev");
        assert_eq!(matched(&rule(9, WEB, DEV, 6, 22), "100.64.0.2"), want);
        assert_eq!(
            matched(&rule(9, WEB, all, 6, 22), "100.64.0.2"),
            both("tag:web", "*")
        );
        // A label is a node's own addresses, not what lies behind it.
        assert_eq!(matched(&rule(9, WEB, DEV, 6, 22), "10.1.7.9"), None);
    }
}
