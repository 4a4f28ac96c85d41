//! The engine driven by streams of inputs: it is total, deterministic, and converges on a kernel
//! that does as it is told.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::disallowed_methods, reason = "a test brings time and files")]

mod driver;
mod failures;

use driver::{Driver, HOME, engine, full, links, netmap, peer, prefix};
use engine::path::PATIENCE_TRYING;
use engine::plan::{Acl, Device, Observed, Step};
use engine::status::{Failure, FailureKind, Problem};
use engine::{Input, LONGEST_PAUSE, LinkAddr, Output, RelayEvent, TICK};
use proptest::prelude::*;
use proto::disco::{Message, TxId};
use proto::filter::{Rule, Selector, Service};
use proto::id::{Generation, NetworkId, NodeId, RegionId};
use proto::key::{DiscoKey, NodeKey};
use proto::net::{PortRange, Prefix};
use proto::netmap::{Delta, Netmap, Region, RelayHost, Update};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

#[test]
fn nothing_is_touched_before_the_operator_and_a_netmap_have_spoken() {
    let mut engine = engine();
    let now = Instant::now();
    engine.handle(now, full(1, &[2]));
    engine.handle(now, Input::Links(links(HOME)));
    assert!(matches!(engine.poll(now), Output::Report(_)));
    assert!(matches!(engine.poll(now), Output::Timeout(_)));
    let mut driver = Driver::new();
    driver.pass(Duration::from_secs(60));
    assert!(driver.plans.is_empty());
}

#[test]
fn a_netmap_becomes_a_device_with_peers() {
    let mut driver = Driver::new();
    driver.input(full(1, &[2, 3]));
    let device = driver.kernel.present().unwrap();
    assert!(device.up && device.peers.len() == 2);
    assert!(driver.engine.status().converged);
    let kept = |output: &Output| matches!(output, Output::Persist(map) if map.peers.len() == 2);
    assert!(driver.told.iter().any(kept));
    driver.pass(Duration::from_secs(120));
    assert_eq!(driver.plans.len(), 1, "and then there is nothing to do");
    let ticks = 120 / TICK.as_secs() as usize;
    assert!(
        driver.observed <= ticks + 4,
        "a few at first, then one dump a tick: {}",
        driver.observed
    );
}

#[test]
fn a_session_that_begins_just_after_the_first_look_is_seen_within_a_second() {
    let mut driver = Driver::new();
    driver.input(full(1, &[2]));
    driver.pass(Duration::from_millis(550));
    let looks = driver.observed;
    assert!(looks >= 2, "before and after the plan: {looks}");
    let key = NodeKey([2; 32]);
    let stats = driver.stats(key);
    (stats.tx_bytes, stats.rx_bytes) = (180, 92);
    stats.last_handshake = Some(Duration::from_secs(1));
    driver.pass(Duration::from_millis(600));
    assert_eq!(driver.observed, looks + 1);
    let status = driver.engine.status();
    let seen = status.observed.and_then(Observed::present).unwrap();
    assert!(seen.peers[&key].stats.last_handshake.is_some());
}

#[test]
fn the_cache_is_not_written_back_and_a_changed_one_is() {
    let mut driver = Driver::new();
    driver.input(Input::Cached(Box::new(netmap(3, &[2]))));
    assert_eq!(driver.kernel.present().unwrap().peers.len(), 1);
    let kept = |driver: &Driver| {
        let told = driver.told.iter();
        told.filter(|output| matches!(output, Output::Persist(_)))
            .count()
    };
    assert_eq!(kept(&driver), 0);
    driver.input(full(4, &[2, 3]));
    assert_eq!(kept(&driver), 1);
}

#[test]
fn a_delta_on_the_wrong_base_asks_for_everything() {
    let mut driver = Driver::new();
    driver.input(full(5, &[2]));
    let delta = |base, next| {
        let delta = Delta {
            base: Generation(base),
            next: Generation(next),
            network: None,
            me: None,
            set: vec![peer(3)],
            removed: vec![],
            filter: None,
            peers_empty_on_purpose: false,
        };
        Input::Netmap(Update::Delta(Box::new(delta)))
    };
    driver.told.clear();
    driver.input(delta(4, 6));
    assert_eq!(driver.told, [Output::NeedFull]);
    driver.input(delta(5, 6));
    assert_eq!(driver.kernel.present().unwrap().peers.len(), 2);
}

/// A netmap under whose policy anybody may do anything.
fn open_netmap(generation: u64, peers: &[u8]) -> Netmap {
    let everything = Rule {
        index: 0,
        line: 1,
        srcs: vec![Selector::Prefix(Prefix::ALL_V4)],
        dsts: vec![Selector::Prefix(Prefix::ALL_V4)],
        services: vec![Service {
            protocol: None,
            ports: PortRange::ALL,
        }],
    };
    let mut netmap = netmap(generation, peers);
    netmap.filter.ingress = vec![everything.clone()];
    netmap.filter.egress = vec![everything];
    netmap
}

/// Whether the tables in the kernel let something in, and something out.
fn lets(driver: &Driver) -> (bool, bool) {
    let steps = driver.plans.iter().flatten();
    let mut policies = steps.filter_map(|step| match step {
        Step::SetAcl(policy) => Some(policy),
        _ => None,
    });
    let tables = &policies.next_back().unwrap().tables;
    let any = |direction: u32| tables.pairs.keys().any(|pair| pair.direction == direction);
    (any(0), any(1))
}

#[test]
fn nothing_that_comes_from_outside_lowers_shields() {
    let mut driver = Driver::new();
    let whole = |map: Netmap| Input::Netmap(Update::Full(Box::new(map)));
    driver.input(whole(open_netmap(1, &[2])));
    assert_eq!(lets(&driver), (true, true));
    driver.input(Input::ShieldsUp(true));
    assert_eq!(lets(&driver), (false, true));
    assert!(driver.engine.status().converged);
    // Another netmap, a delta with another policy, another network, the cache of an earlier run.
    driver.input(whole(open_netmap(2, &[2, 3])));
    assert_eq!(lets(&driver), (false, true));
    let mut filter = open_netmap(3, &[2]).filter;
    filter.ingress[0].line = 9;
    driver.input(Input::Netmap(Update::Delta(Box::new(Delta {
        base: Generation(2),
        next: Generation(3),
        network: None,
        me: None,
        set: vec![],
        removed: vec![],
        filter: Some(filter),
        peers_empty_on_purpose: false,
    }))));
    assert_eq!(lets(&driver), (false, true));
    driver.input(Input::Forget);
    driver.input(whole(open_netmap(1, &[4])));
    assert_eq!(lets(&driver), (false, true));
    driver.input(Input::ShieldsUp(false));
    assert_eq!(lets(&driver), (true, true));

    let mut restarted = Driver::new();
    restarted.input(Input::ShieldsUp(true));
    restarted.input(Input::Cached(Box::new(open_netmap(3, &[2]))));
    assert_eq!(lets(&restarted), (false, true));
}

#[test]
fn a_refused_netmap_leaves_the_last_good_one_and_says_why() {
    let mut driver = Driver::new();
    driver.input(full(5, &[2, 3]));
    let before = driver.kernel.clone();
    let mut bad = netmap(6, &[2, 3]);
    bad.peers.get_mut(&NodeId(2)).unwrap().key = NodeKey([3; 32]);
    driver.input(Input::Netmap(Update::Full(Box::new(bad.clone()))));
    assert_eq!(driver.kernel, before);
    let status = driver.engine.status();
    assert_eq!(status.netmap.unwrap().generation, Generation(5));
    assert!(matches!(status.problems[..], [Problem::Netmap(_)]));
    // A change of the refused one that mends it is understood.
    let mended = bad.delta_to(&netmap(7, &[2, 3, 4]));
    driver.input(Input::Netmap(Update::Delta(Box::new(mended))));
    assert_eq!(driver.kernel.present().unwrap().peers.len(), 3);
    assert!(driver.engine.status().problems.is_empty());
}

#[test]
fn an_overlap_of_the_network_keeps_the_device_away() {
    let mut driver = Driver::new();
    driver.input(Input::Links(links(&[("100.64.0.0/16", "eth1")])));
    driver.input(full(1, &[2]));
    assert_eq!(driver.kernel, Observed::default());
    assert_eq!(driver.engine.status().problems[0].code(), "network_overlap");
    driver.input(Input::Links(links(HOME)));
    assert!(driver.kernel.present().unwrap().up);
    // What works is not cut when somebody adds such a route later.
    driver.input(Input::Links(links(&[("100.64.0.0/16", "eth1")])));
    driver.pass(Duration::from_secs(10));
    assert!(driver.kernel.present().unwrap().up);
    assert!(driver.engine.status().problems.is_empty());
}

#[test]
fn an_overlap_of_one_route_refuses_that_route_alone() {
    let mut driver = Driver::new();
    driver.input(Input::Links(links(&[("10.1.2.0/24", "lan0")])));
    let mut map = netmap(1, &[2]);
    let routes = [
        prefix("10.0.0.0/8"),
        prefix("172.16.0.0/12"),
        prefix("0.0.0.0/0"),
    ];
    map.peers.get_mut(&NodeId(2)).unwrap().routes = routes.into();
    driver.input(Input::Netmap(Update::Full(Box::new(map))));
    let device = driver.kernel.present().unwrap();
    let expected = ["100.64.0.0/10", "172.16.0.0/12", "fd00::/48"].map(prefix);
    assert_eq!(
        device.routes.keys().copied().collect::<Vec<_>>(),
        expected,
        "a default route covers the LAN too"
    );
    let peer = &device.peers[&NodeKey([2; 32])];
    assert!(!peer.allowed_ips.contains(&prefix("10.0.0.0/8")));
    assert_eq!(driver.engine.status().problems[0].code(), "route_overlap");
}

/// As [`full`]; peer 2 offers this, and the relay has this name.
fn around(generation: u64, routes: &[&str], relay: &str) -> Input {
    let mut map = netmap(generation, &[2]);
    map.peers.get_mut(&NodeId(2)).unwrap().routes = routes.iter().map(|it| prefix(it)).collect();
    let host = RelayHost {
        addr: relay.to_owned(),
        stun: None,
        plain: false,
        certificate: None,
    };
    let region = Region {
        name: "near".to_owned(),
        hosts: vec![host],
    };
    map.network.relays = [(RegionId(1), region)].into();
    Input::Netmap(Update::Full(Box::new(map)))
}

/// What is routed into the device beside the network itself.
fn routed(driver: &Driver) -> Vec<String> {
    let routes = driver.kernel.present().unwrap().routes.keys();
    let routes = routes.filter(|it| !prefix("100.64.0.0/10").covers(it) && it.is_v4());
    routes.map(ToString::to_string).collect()
}

#[test]
fn what_the_tunnel_needs_is_left_out_of_subnet_routes() {
    let mut driver = Driver::new();
    driver.input(Input::Coordinator("10.0.0.3:8443".to_owned()));
    driver.input(around(1, &["10.0.0.0/30"], "10.0.0.1:443"));
    assert_eq!(routed(&driver), ["10.0.0.0/32", "10.0.0.2/32"]);
    // Nothing is cut while it becomes one again, and what another names stays its own.
    driver.plans.clear();
    driver.input(around(2, &["10.0.0.0/30", "10.0.0.2/31"], "192.0.2.1:443"));
    let pieces = ["10.0.0.0/31", "10.0.0.2/32"];
    assert_eq!(routed(&driver), pieces, "10.0.0.3 is the coordinator");
    let steps: Vec<&Step> = driver.plans.iter().flatten().collect();
    let place = |wanted: fn(&Step) -> bool| steps.iter().position(|step| wanted(step));
    let added = place(|step| matches!(step, Step::AddRoute(it, _) if it.len() == 31));
    let removed = place(|step| matches!(step, Step::RemoveRoute(it) if it.len() == 32));
    assert!(added.is_some() && added < removed, "{steps:?}");
}

#[test]
fn subnet_routes_stay_as_they_are_until_names_are_looked_up() {
    const RELAY: &str = "relay.example:443";
    let answer = || Input::Resolved([("10.0.0.1:443".parse().unwrap(), RELAY.to_owned())].into());
    let mut driver = Driver::new();
    driver.input(around(1, &["10.0.0.0/31"], RELAY));
    assert!(
        driver
            .told
            .contains(&Output::Resolve(vec![RELAY.to_owned()]))
    );
    assert_eq!(routed(&driver), [""; 0]);
    driver.input(answer());
    assert_eq!(routed(&driver), ["10.0.0.0/32"]);
    // Another agent finds them so, and leaves them while a live route collides.
    driver.engine = engine();
    driver.input(Input::Up(true));
    driver.input(Input::Links(links(&[("10.0.0.0/24", "lan0")])));
    driver.input(around(1, &["10.0.0.0/31"], RELAY));
    assert_eq!(routed(&driver), ["10.0.0.0/32"]);
    driver.input(answer());
    assert_eq!(routed(&driver), ["10.0.0.0/32"]);
    // Without a resolver the routes come all the same.
    let mut driver = Driver::new();
    driver.input(around(1, &["10.0.0.0/31"], RELAY));
    driver.pass(Duration::from_secs(3));
    assert_eq!(routed(&driver), ["10.0.0.0/31"]);
}

#[test]
fn dead_endpoints_are_left_and_roaming_is_followed() {
    let mut driver = Driver::new();
    driver.input(full(1, &[2]));
    let key = NodeKey([2; 32]);
    let endpoint = |driver: &Driver| driver.kernel.present().unwrap().peers[&key].stats.endpoint;
    let first = endpoint(&driver).unwrap();
    assert_eq!(first, "192.0.2.2:51820".parse().unwrap(), "on link first");
    driver.pass(Duration::from_secs(60));
    assert_eq!(
        endpoint(&driver),
        Some(first),
        "nobody sends: nothing moves"
    );
    let sends = |driver: &mut Driver, tx: u64, rx: u64, to: Option<SocketAddr>| {
        let stats = driver.stats(key);
        (stats.tx_bytes, stats.rx_bytes) = (tx, rx);
        if to.is_some() {
            stats.endpoint = to;
        }
    };
    for n in 1..=(PATIENCE_TRYING.as_secs() + 3 * TICK.as_secs()) {
        sends(&mut driver, 148 * n, 0, None);
        driver.pass(Duration::from_secs(1));
    }
    let second = endpoint(&driver).unwrap();
    assert_eq!(second, "198.51.100.2:51820".parse().unwrap());
    let roamed = "203.0.113.1:1024".parse().unwrap();
    sends(&mut driver, 10_000, 92, Some(roamed));
    driver.pass(Duration::from_secs(60));
    assert_eq!(endpoint(&driver), Some(roamed));
}

#[test]
fn foreign_hands_are_undone_at_the_next_tick() {
    let mut driver = Driver::new();
    driver.input(full(1, &[2, 3]));
    let good = driver.kernel.clone();
    let Device::Present(device) = &mut driver.kernel.device else {
        panic!("it is there");
    };
    device.peers.remove(&NodeKey([2; 32]));
    device.routes.clear();
    device.addrs.clear();
    driver.pass(TICK * 2);
    assert_eq!(driver.kernel, good);
    driver.kernel.device = Device::Absent;
    driver.kernel.acl = Acl::Pinned;
    driver.pass(TICK * 2);
    assert!(driver.kernel.present().is_some_and(|device| device.up));
}

#[test]
fn going_down_and_forgetting() {
    let mut driver = Driver::new();
    driver.input(full(7, &[2]));
    driver.input(Input::Up(false));
    assert_eq!(driver.kernel, Observed::default());
    assert!(driver.engine.status().converged);
    driver.input(Input::Up(true));
    assert!(
        driver.kernel.present().unwrap().up,
        "without being told again"
    );
    driver.input(Input::Up(false));
    driver.input(Input::Forget);
    let mut elsewhere = netmap(1, &[3]);
    elsewhere.network.id = NetworkId(2);
    driver.input(Input::Netmap(Update::Full(Box::new(elsewhere))));
    driver.input(Input::Up(true));
    assert!(
        driver
            .kernel
            .present()
            .unwrap()
            .peers
            .contains_key(&NodeKey([3; 32]))
    );
}

#[test]
fn what_is_told_to_the_coordinator() {
    let mut driver = Driver::new();
    let reports = |driver: &Driver| -> Vec<_> {
        let told = driver.told.iter();
        told.filter_map(|output| match output {
            Output::Report(report) => Some(report.clone()),
            _ => None,
        })
        .collect()
    };
    assert_eq!(reports(&driver).len(), 1);
    let mut more = links(HOME);
    more.addrs.insert(LinkAddr {
        interface: "lan0".to_owned(),
        addr: [10, 0, 0, 1].into(),
        prefix_len: 24,
    });
    driver.input(Input::Advertise([prefix("10.0.0.0/24")].into()));
    driver.input(Input::Links(more.clone()));
    driver.input(Input::Links(more));
    let reports = reports(&driver);
    assert_eq!(reports.len(), 3, "only what changed");
    let expected = ["192.0.2.99:51820", "10.0.0.1:51820"].map(|text| text.parse().unwrap());
    assert_eq!(
        reports[2].endpoints, expected,
        "what only our LAN reaches comes last"
    );
}

const SERVER: &str = "198.51.100.77:3478";

/// As [`full`], of a network with a STUN server.
fn with_stun(generation: u64, peers: &[u8]) -> Input {
    let mut map = netmap(generation, peers);
    map.network.stun = vec![SERVER.to_owned()];
    Input::Netmap(Update::Full(Box::new(map)))
}

fn mapped(addr: &str) -> Input {
    Input::Mapped {
        server: SERVER.parse().unwrap(),
        addr: addr.parse().unwrap(),
    }
}

#[test]
fn what_servers_see_is_told_and_keeps_routers_from_forgetting() {
    let mut driver = Driver::new();
    driver.input(with_stun(1, &[2]));
    let names = vec![SERVER.to_owned()];
    assert!(driver.told.contains(&Output::Resolve(names.clone())));
    let server: SocketAddr = SERVER.parse().unwrap();
    driver.input(Input::Resolved([(server, SERVER.to_owned())].into()));
    assert!(driver.told.contains(&Output::Ask([server].into())));
    driver.told.clear();
    driver.plans.clear();
    driver.input(mapped("203.0.113.9:40001"));
    let first = driver.told.iter().find_map(|output| match output {
        Output::Report(report) => Some(report.endpoints.clone()),
        _ => None,
    });
    let expected = ["203.0.113.9:40001", "192.0.2.99:51820"].map(|text| text.parse().unwrap());
    assert_eq!(first.unwrap(), expected, "the mapping first");
    let device = driver.kernel.present().unwrap();
    let peer = &device.peers[&NodeKey([2; 32])];
    assert_eq!(peer.keepalive, engine::KEEPALIVE_SECONDS);
}

/// As [`full`], of a network with relays where peer 2 is at home, and peer 3 that probes alone.
fn with_relays(generation: u64) -> Input {
    let mut map = netmap(generation, &[2, 3]);
    let host = RelayHost {
        addr: "relay.example.com:443".to_owned(),
        stun: None,
        plain: false,
        certificate: None,
    };
    let region = |id: u16| Region {
        name: format!("r{id}"),
        hosts: vec![host.clone()],
    };
    map.network.relays = (1..3).map(|id| (RegionId(id), region(id))).collect();
    for (id, peer) in &mut map.peers {
        peer.disco = Some(DiscoKey([id.0 as u8; 32]));
        peer.home = (id.0 == 2).then_some(RegionId(2));
    }
    Input::Netmap(Update::Full(Box::new(map)))
}

/// Anything that a box may hold, of a peer or a stranger.
fn disco() -> impl Strategy<Value = (DiscoKey, Message)> {
    let addr = (any::<[u8; 4]>(), any::<u16>()).prop_map(SocketAddr::from);
    let tx = any::<[u8; 12]>().prop_map(TxId);
    let node = prop::option::of((1u8..5).prop_map(|id| NodeKey([id; 32])));
    let message = prop_oneof![
        (tx.clone(), node, any::<u16>()).prop_map(|(tx, node, padding)| Message::Ping {
            tx,
            node,
            padding
        }),
        (tx, addr.clone()).prop_map(|(tx, seen)| Message::Pong {
            tx,
            seen,
            took: None
        }),
        prop::collection::vec(addr, 0..20).prop_map(|endpoints| Message::CallMeMaybe { endpoints }),
        any::<u8>().prop_map(Message::Unknown),
    ];
    ((1u8..5).prop_map(|id| DiscoKey([id; 32])), message)
}

fn relay_event() -> impl Strategy<Value = RelayEvent> {
    let node = (1u8..5).prop_map(|id| NodeKey([id; 32]));
    prop_oneof![
        Just(RelayEvent::Up),
        Just(RelayEvent::Down("no".to_owned())),
        (0u64..500).prop_map(|millis| RelayEvent::Latency(Duration::from_millis(millis))),
        node.clone().prop_map(RelayEvent::PeerGone),
        node.clone().prop_map(|from| RelayEvent::Data { from }),
        (node, disco()).prop_map(|(from, (sender, message))| RelayEvent::Disco {
            from,
            sender,
            message,
        }),
    ]
}

/// Any input, legal or not.
fn input() -> impl Strategy<Value = Input> {
    let id = 1u8..5;
    let peers = prop::collection::btree_set(id.clone(), 0..4);
    prop_oneof![
        any::<bool>().prop_map(Input::Up),
        any::<bool>().prop_map(Input::ShieldsUp),
        (0u64..9, peers.clone()).prop_map(|(generation, peers)| {
            full(generation, &peers.into_iter().collect::<Vec<_>>())
        }),
        (0u64..9, peers).prop_map(|(generation, peers)| {
            Input::Cached(Box::new(netmap(
                generation,
                &peers.into_iter().collect::<Vec<_>>(),
            )))
        }),
        (0u64..9, 0u64..9, id.clone(), id).prop_map(|(base, next, set, removed)| {
            let delta = Delta {
                base: Generation(base),
                next: Generation(next),
                network: None,
                me: None,
                set: vec![peer(set)],
                removed: vec![NodeId(removed.into())],
                filter: None,
                peers_empty_on_purpose: false,
            };
            Input::Netmap(Update::Delta(Box::new(delta)))
        }),
        (0u64..9).prop_map(|generation| with_stun(generation, &[2, 3])),
        Just(Input::Resolved(
            [(SERVER.parse().unwrap(), SERVER.to_owned())].into()
        )),
        Just(mapped("203.0.113.9:40001")),
        Just(mapped("203.0.113.9:40002")),
        (any::<[u8; 4]>(), disco()).prop_map(|(from, (sender, message))| Input::Disco {
            from: (from, 51820).into(),
            sender,
            message,
        }),
        (0u16..3, relay_event()).prop_map(|(region, event)| Input::Relay(RegionId(region), event)),
        (0u64..9).prop_map(with_relays),
        Just(Input::Forget),
        Just(Input::Links(links(HOME))),
        Just(Input::Links(links(&[("100.64.0.0/16", "eth1")]))),
        Just(Input::Observed(Observed::default())),
        Just(Input::Observed(Observed {
            device: Device::Foreign,
            ..Observed::default()
        })),
        Just(Input::Unreadable("no".to_owned())),
        Just(Input::Applied),
        (0usize..30).prop_map(|done| {
            Input::Failed(Failure {
                done,
                kind: FailureKind::Kernel,
                detail: String::new(),
            })
        }),
        Just(Input::Timeout),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_stream_of_inputs_is_survived_and_replays_the_same(
        stream in prop::collection::vec((0u64..40, input()), 0..40),
    ) {
        let start = Instant::now();
        let run = || {
            let (mut engine, mut now, mut outputs) = (engine(), start, Vec::new());
            let mut in_flight = false;
            for (seconds, input) in &stream {
                now += Duration::from_secs(*seconds);
                in_flight &= !matches!(input, Input::Applied | Input::Failed(_));
                engine.handle(now, input.clone());
                for turn in 0.. {
                    assert!(turn < 200, "the engine does not come to rest");
                    let output = engine.poll(now);
                    if matches!(output, Output::Apply(_)) {
                        assert!(!in_flight, "two plans at once");
                        in_flight = true;
                    }
                    let last = match &output {
                        Output::Timeout(at) => {
                            assert!(*at > now);
                            true
                        }
                        _ => false,
                    };
                    outputs.push(output);
                    if last {
                        break;
                    }
                }
            }
            outputs
        };
        prop_assert_eq!(run(), run());
    }

    #[test]
    fn whatever_came_before_a_good_netmap_is_reached(
        stream in prop::collection::vec(input(), 0..20),
        peers in prop::collection::btree_set(1u8..5, 0..4),
    ) {
        let mut driver = Driver::new();
        for input in stream {
            // What the kernel is, this kernel says itself.
            if !matches!(input, Input::Observed(_) | Input::Applied | Input::Failed(_)) {
                driver.input(input);
            }
        }
        let peers: Vec<u8> = peers.into_iter().collect();
        driver.input(Input::Links(links(HOME)));
        driver.input(full(100, &peers));
        driver.input(Input::Up(true));
        driver.pass(LONGEST_PAUSE * 2);
        let device = driver.kernel.present().unwrap();
        let keys: BTreeSet<NodeKey> = device.peers.keys().copied().collect();
        let expected: BTreeSet<NodeKey> = peers.iter().map(|id| NodeKey([*id; 32])).collect();
        prop_assert_eq!(keys, expected);
        prop_assert!(driver.engine.status().converged);
        let owners: BTreeMap<_, _> = device.peers.iter().flat_map(|(key, peer)| {
            peer.allowed_ips.iter().map(move |prefix| (*prefix, *key))
        }).collect();
        prop_assert_eq!(owners.len(), peers.len());
    }
}
