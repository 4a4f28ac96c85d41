//! What a netmap may not say: one line a lie, and the reason that refuses it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use engine::trust::{Distrust, VerifiedNetmap, verify};
use proto::filter::{Filter, Label, Rule, Selector};
use proto::id::{Generation, NetworkId, NodeId};
use proto::key::NodeKey;
use proto::net::Prefix;
use proto::netmap::{MAX_ENDPOINTS_PER_NODE, Me, Netmap, Network, Owner, Peer};
use std::collections::BTreeSet;
use std::net::IpAddr;

const ME: NodeKey = NodeKey([99; 32]);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn owner() -> Owner {
    Owner::User("ana@example.com".to_owned())
}

fn peer(id: u8) -> Peer {
    Peer {
        id: NodeId(id.into()),
        name: format!("n{id}"),
        key: NodeKey([id; 32]),
        addrs: vec![ip(&format!("100.64.0.{id}")), ip(&format!("fd00::{id}"))],
        routes: BTreeSet::new(),
        endpoints: vec![],
        owner: owner(),
        labels: [Label(0)].into(),
        online: true,
        disco: None,
        home: None,
    }
}

fn netmap() -> Netmap {
    let mut router = peer(3);
    router.routes = [prefix("10.0.0.0/8")].into();
    let mut nested = peer(4);
    nested.routes = [prefix("10.4.0.0/16"), prefix("0.0.0.0/0")].into();
    Netmap {
        generation: Generation(5),
        network: Network {
            id: NetworkId(1),
            name: "home".to_owned(),
            v4: prefix("100.64.0.0/10"),
            v6: prefix("fd00::/48"),
            stun: Vec::new(),
            relays: std::collections::BTreeMap::new(),
        },
        me: Me {
            id: NodeId(99),
            name: "me".to_owned(),
            key: ME,
            addrs: vec![ip("100.64.0.99")],
            routes: [prefix("192.168.7.0/24")].into(),
            owner: owner(),
            labels: BTreeSet::new(),
        },
        peers: [peer(2), router, nested].map(|peer| (peer.id, peer)).into(),
        filter: Filter {
            labels: vec!["*".to_owned()],
            ..Filter::default()
        },
        peers_empty_on_purpose: false,
    }
}

fn good() -> VerifiedNetmap {
    verify(netmap(), ME, None).unwrap()
}

fn two(netmap: &mut Netmap) -> &mut Peer {
    netmap.peers.get_mut(&NodeId(2)).unwrap()
}

/// A lie told by a netmap that follows a good one, and the answer.
#[track_caller]
fn check(lie: impl Fn(&mut Netmap), expected: Distrust) {
    let last = good();
    let mut netmap = netmap();
    lie(&mut netmap);
    assert_eq!(verify(netmap, ME, Some(&last)), Err(expected));
}

#[test]
fn a_good_netmap_is_taken_and_taken_again() {
    let last = good();
    assert_eq!(last.netmap(), &netmap());
    assert!(verify(netmap(), ME, Some(&last)).is_ok(), "the same again");
}

#[test]
fn who_it_is_for_and_when() {
    let other = NodeKey([1; 32]);
    check(|map| map.me.key = other, Distrust::ForeignKey(other));
    let (joined, offered) = (NetworkId(1), NetworkId(2));
    check(
        |map| map.network.id = offered,
        Distrust::ForeignNetwork { joined, offered },
    );
    let (have, offered) = (Generation(5), Generation(4));
    check(
        |map| map.generation = offered,
        Distrust::Older { have, offered },
    );
}

#[test]
fn an_empty_netmap_must_be_meant() {
    check(
        |map| map.peers.clear(),
        Distrust::EmptyUnannounced { had: 3 },
    );
    let meant = |map: &mut Netmap| {
        map.peers.clear();
        map.peers_empty_on_purpose = true;
    };
    let mut empty = netmap();
    meant(&mut empty);
    let last = verify(empty, ME, Some(&good())).unwrap();
    let mut still = netmap();
    still.peers.clear();
    assert!(verify(still, ME, Some(&last)).is_ok(), "there were none");
}

#[test]
fn keys() {
    check(
        |map| two(map).key = NodeKey([0; 32]),
        Distrust::ZeroKey(NodeId(2)),
    );
    check(
        |map| two(map).key = NodeKey([3; 32]),
        Distrust::DuplicateKey(NodeId(2), NodeId(3)),
    );
    check(
        |map| two(map).key = ME,
        Distrust::DuplicateKey(NodeId(99), NodeId(2)),
    );
}

#[test]
fn ids_and_names() {
    check(|map| two(map).id = NodeId(7), Distrust::Misfiled(NodeId(7)));
    let itself = |map: &mut Netmap| {
        let mut peer = peer(2);
        peer.id = map.me.id;
        map.peers.insert(peer.id, peer);
    };
    check(itself, Distrust::Misfiled(NodeId(99)));
    for name in ["", "a b", "a\u{1b}[2J", "a\n", "ä", &"x".repeat(64)] {
        let name = name.to_owned();
        check(
            |map| two(map).name.clone_from(&name),
            Distrust::Name(NodeId(2)),
        );
    }
}

#[test]
fn addresses() {
    check(|map| two(map).addrs.clear(), Distrust::NoAddress(NodeId(2)));
    check(|map| map.me.addrs.clear(), Distrust::NoAddress(NodeId(99)));
    check(
        |map| two(map).addrs.push(ip("100.64.9.9")),
        Distrust::SecondAddress(NodeId(2)),
    );
    let outside = |node: u64, text: &str| Distrust::AddressOutside {
        node: NodeId(node),
        addr: ip(text),
    };
    check(
        |map| two(map).addrs[0] = ip("8.8.8.8"),
        outside(2, "8.8.8.8"),
    );
    check(
        |map| map.me.addrs[0] = ip("fd01::1"),
        outside(99, "fd01::1"),
    );
    let overlap = |first: u64, second: u64, text: &str| Distrust::Overlap {
        first: NodeId(first),
        second: NodeId(second),
        prefix: prefix(text),
    };
    check(
        |map| two(map).addrs[0] = ip("100.64.0.3"),
        overlap(2, 3, "100.64.0.3"),
    );
    check(
        |map| two(map).addrs[0] = ip("100.64.0.99"),
        overlap(99, 2, "100.64.0.99"),
    );
}

#[test]
fn routes() {
    let overlap = |first: u64, second: u64, text: &str| Distrust::Overlap {
        first: NodeId(first),
        second: NodeId(second),
        prefix: prefix(text),
    };
    let give = |text: &'static str| {
        move |map: &mut Netmap| {
            two(map).routes.insert(prefix(text));
        }
    };
    check(give("10.0.0.0/8"), overlap(2, 3, "10.0.0.0/8"));
    check(give("192.168.7.0/24"), overlap(99, 2, "192.168.7.0/24"));
    let node = NodeId(2);
    for inside in ["100.64.0.3/32", "100.64.0.0/10", "fd00::/64"] {
        let prefix = prefix(inside);
        check(give(inside), Distrust::RouteInside { node, prefix });
    }
    for never in [
        "127.1.0.0/16",
        "224.0.0.0/4",
        "fe80::/64",
        "::1/128",
        "::ffff:10.0.0.0/104",
    ] {
        let prefix = prefix(never);
        check(give(never), Distrust::RouteUnusable { node, prefix });
    }
}

#[test]
fn the_networks_own_prefixes() {
    for bad in ["127.0.0.0/8", "0.0.0.0/0", "fd00::/48"] {
        check(
            |map| map.network.v4 = prefix(bad),
            Distrust::NetworkPrefix(prefix(bad)),
        );
    }
    for bad in ["fe80::/10", "::/0", "::ffff:0:0/96", "10.0.0.0/8"] {
        check(
            |map| map.network.v6 = prefix(bad),
            Distrust::NetworkPrefix(prefix(bad)),
        );
    }
}

#[test]
fn labels_and_limits() {
    let undefined = Distrust::UnknownLabel(Label(1));
    check(|map| map.me.labels = [Label(1)].into(), undefined.clone());
    check(|map| two(map).labels = [Label(1)].into(), undefined.clone());
    let rule = |map: &mut Netmap| {
        map.filter.egress.push(Rule {
            index: 0,
            line: 1,
            srcs: vec![],
            dsts: vec![Selector::Label(Label(1))],
            services: vec![],
        });
    };
    check(rule, undefined);
    check(
        |map| {
            let port = |n: usize| ([192, 0, 2, 1], u16::try_from(n).unwrap() + 1).into();
            two(map).endpoints = (0..=MAX_ENDPOINTS_PER_NODE).map(port).collect();
        },
        Distrust::Limit {
            what: "endpoints",
            limit: MAX_ENDPOINTS_PER_NODE,
        },
    );
}
