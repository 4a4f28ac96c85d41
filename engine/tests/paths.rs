//! Two engines that find each other: a perfect network, a relay, and what may break between them.
//! Whole networks, with NATs and real models of WireGuard, are in the package `tests`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::disallowed_methods, reason = "a test brings time")]

use engine::plan::{Device, LiveRoute, Observed};
use engine::status::{Now, Probe};
use engine::{Config, Engine, Input, LinkAddr, Links, Output, RelayEvent, RelayTable, Via};
use proptest::prelude::*;
use proto::disco::{Message, PING_BYTES};
use proto::filter::Filter;
use proto::id::{Generation, NetworkId, NodeId, RegionId};
use proto::key::{DiscoKey, NodeKey};
use proto::net::Prefix;
use proto::netmap::{Me, Netmap, Network, Owner, Peer, Region, RelayHost, Update};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

const HOP: Duration = Duration::from_millis(10);
const RELAYED: Duration = Duration::from_millis(40);
const ONE: RegionId = RegionId(1);
const TWO: RegionId = RegionId(2);

fn disco(side: usize) -> DiscoKey {
    DiscoKey([side as u8 + 40; 32])
}

fn key(side: usize) -> NodeKey {
    NodeKey([side as u8 + 1; 32])
}

fn addr(side: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2 + side as u8, 1], 51820))
}

fn netmap(side: usize, generation: u64, home: Option<RegionId>) -> Netmap {
    let other = 1 - side;
    let region = |id: RegionId| {
        let hosts = vec![RelayHost {
            addr: format!("relay-{id}:443"),
            stun: None,
            plain: false,
            certificate: None,
        }];
        let name = format!("r{id}");
        (id, Region { name, hosts })
    };
    let peer = Peer {
        id: NodeId(other as u64 + 1),
        name: format!("n{other}"),
        key: key(other),
        addrs: vec![[100, 64, 0, other as u8 + 1].into()],
        routes: BTreeSet::new(),
        endpoints: vec![addr(other)],
        owner: Owner::User("ana@example.com".to_owned()),
        labels: BTreeSet::new(),
        online: true,
        disco: Some(disco(other)),
        home,
    };
    Netmap {
        generation: Generation(generation),
        network: Network {
            id: NetworkId(1),
            name: "home".to_owned(),
            v4: "100.64.0.0/10".parse().unwrap(),
            v6: "fd00::/48".parse().unwrap(),
            stun: Vec::new(),
            relays: home
                .into_iter()
                .flat_map(|_| [ONE, TWO].map(region))
                .collect(),
        },
        me: Me {
            id: NodeId(side as u64 + 1),
            name: format!("n{side}"),
            key: key(side),
            addrs: vec![[100, 64, 0, side as u8 + 1].into()],
            routes: BTreeSet::new(),
            owner: Owner::User("ana@example.com".to_owned()),
            labels: BTreeSet::new(),
        },
        peers: [(peer.id, peer)].into(),
        filter: Filter::default(),
        peers_empty_on_purpose: false,
    }
}

struct Side {
    engine: Engine,
    kernel: Observed,
    table: Arc<RelayTable>,
    /// Regions it is connected to.
    connected: BTreeSet<RegionId>,
    /// Whether news of data are owed since the last table.
    armed: bool,
    deadline: Instant,
    transmits: Vec<Instant>,
    reported: Option<RegionId>,
}

fn side(side: usize, start: Instant) -> Side {
    let config = Config {
        interface: "weir0".to_owned(),
        listen_port: 51820,
        shim_port: 51821,
    };
    Side {
        engine: Engine::new(config, key(side), disco(side), [side as u8; 32]),
        kernel: Observed::default(),
        table: Arc::default(),
        connected: BTreeSet::new(),
        armed: true,
        deadline: start,
        transmits: Vec::new(),
        reported: None,
    }
}

struct Net {
    sides: [Side; 2],
    start: Instant,
    now: Instant,
    queue: BTreeMap<(Instant, usize), (usize, Input)>,
    count: usize,
    /// Nothing passes directly; or all but WireGuard.
    blocked: bool,
    swallowing: bool,
    /// The longest packet that passes directly, in bytes; those of the kernels are as long as their
    /// routes say.
    takes: u32,
    dead: BTreeSet<RegionId>,
}

impl Net {
    fn new(home: Option<RegionId>) -> Self {
        let start = Instant::now();
        let mut net = Self {
            sides: [side(0, start), side(1, start)],
            start,
            now: start,
            queue: BTreeMap::new(),
            count: 0,
            blocked: false,
            swallowing: false,
            takes: 1_500,
            dead: BTreeSet::new(),
        };
        for side in 0..2 {
            let netmap = Box::new(netmap(side, 1, home));
            net.begin(side, Input::Netmap(Update::Full(netmap)));
        }
        net
    }

    /// Tells an engine what each is told first.
    fn begin(&mut self, side: usize, netmap: Input) {
        let links = Links {
            addrs: [LinkAddr {
                interface: "eth0".to_owned(),
                addr: addr(side).ip(),
                prefix_len: 24,
            }]
            .into(),
            routes: [LiveRoute {
                prefix: "0.0.0.0/0".parse().unwrap(),
                interface: "eth0".to_owned(),
            }]
            .into(),
            gateway: None,
            mtu: 1_500,
        };
        self.input(side, Input::Links(links));
        self.input(side, netmap);
        self.input(side, Input::Up(true));
    }

    /// The agent dies, and another one takes its place.
    fn restart(&mut self, side: usize, home: Option<RegionId>) {
        self.sides[side] = Side {
            kernel: std::mem::take(&mut self.sides[side].kernel),
            ..self::side(side, self.now)
        };
        self.begin(side, Input::Cached(Box::new(netmap(side, 1, home))));
    }

    /// What the kernel takes for the longest packet to the other side, inside the tunnel.
    fn inner(&self, side: usize) -> u32 {
        let routes = &self.sides[side].kernel.present().unwrap().routes;
        let host = Prefix::host([100, 64, 0, 2 - side as u8].into());
        let whole = "100.64.0.0/10".parse().unwrap();
        routes.get(&host).unwrap_or(&routes[&whole]).mtu
    }

    fn input(&mut self, side: usize, input: Input) {
        self.sides[side].engine.handle(self.now, input);
        self.settle(side);
    }

    fn later(&mut self, delay: Duration, side: usize, input: Input) {
        self.count += 1;
        self.queue
            .insert((self.now + delay, self.count), (side, input));
    }

    fn settle(&mut self, index: usize) {
        for turn in 0.. {
            assert!(turn < 300, "the engine does not come to rest");
            let (now, side) = (self.now, &mut self.sides[index]);
            match side.engine.poll(now) {
                Output::Timeout(at) => {
                    assert!(at > now);
                    side.deadline = at;
                    return;
                }
                Output::Observe => {
                    let seen = Input::Observed(side.kernel.clone());
                    side.engine.handle(now, seen);
                }
                Output::Apply(steps) => {
                    steps.iter().for_each(|step| side.kernel.apply(step));
                    side.engine.handle(now, Input::Applied);
                }
                Output::Transmit { via, to, message } => {
                    side.transmits.push(now);
                    assert_eq!(to, disco(1 - index));
                    self.transmit(index, via, message);
                }
                Output::Relays(table) => self.connect(index, table),
                Output::Report(about) => side.reported = about.home,
                _ => {}
            }
        }
    }

    fn transmit(&mut self, from: usize, via: Via, message: Message) {
        let (to, sender) = (1 - from, disco(from));
        match via {
            Via::Direct(endpoint) if endpoint == addr(to) && !self.blocked => {
                if let Message::Ping { padding, .. } = message
                    && 28 + PING_BYTES as u32 + u32::from(padding) > self.takes
                {
                    return;
                }
                let disco = Input::Disco {
                    from: addr(from),
                    sender,
                    message,
                };
                self.later(HOP, to, disco);
            }
            Via::Direct(_) => {}
            Via::Relay(region, node) => {
                assert_eq!(node, key(to));
                if self.carries(from, region) {
                    let event = RelayEvent::Disco {
                        from: key(from),
                        sender,
                        message,
                    };
                    self.later(RELAYED, to, Input::Relay(region, event));
                }
            }
        }
    }

    /// Whether a region carries packets of this side to the other.
    fn carries(&self, from: usize, region: RegionId) -> bool {
        let there = |side: &Side| side.connected.contains(&region);
        !self.dead.contains(&region)
            && self.sides.iter().all(there)
            && self.sides[1 - from].table.home == Some(region)
    }

    fn connect(&mut self, index: usize, table: Arc<RelayTable>) {
        let wanted: BTreeSet<RegionId> = table.regions.keys().copied().collect();
        let side = &mut self.sides[index];
        let new: Vec<RegionId> = wanted.difference(&side.connected).copied().collect();
        side.connected = wanted;
        (side.table, side.armed) = (table, true);
        for region in new {
            let event = match self.dead.contains(&region) {
                true => RelayEvent::Down("refused".to_owned()),
                false => RelayEvent::Up,
            };
            self.later(RELAYED, index, Input::Relay(region, event));
        }
    }

    fn kill(&mut self, region: RegionId) {
        self.dead.insert(region);
        for side in 0..2 {
            let event = RelayEvent::Down("killed".to_owned());
            self.input(side, Input::Relay(region, event));
        }
    }

    fn endpoint(&mut self, side: usize) -> Option<SocketAddr> {
        self.stats(side).endpoint
    }

    fn stats(&mut self, side: usize) -> &mut engine::plan::Stats {
        let Device::Present(device) = &mut self.sides[side].kernel.device else {
            panic!("the device is there");
        };
        &mut device.peers.get_mut(&key(1 - side)).unwrap().stats
    }

    /// The kernel sends a packet; whether it arrives.
    fn send(&mut self, from: usize) -> bool {
        let to = 1 - from;
        let fits = self.inner(from) + 60 <= self.takes;
        let stats = self.stats(from);
        stats.tx_bytes += 128;
        let Some(endpoint) = stats.endpoint else {
            return false;
        };
        let roams = if endpoint.ip().is_loopback() {
            let region = self.sides[from].table.peers[&key(to)].region;
            if !self.carries(from, region) {
                return false;
            }
            let there = self.sides[to].table.peers[&key(from)];
            if std::mem::take(&mut self.sides[to].armed) {
                let event = RelayEvent::Data { from: key(from) };
                self.later(RELAYED, to, Input::Relay(region, event));
            }
            there.appear_as.unwrap_or(there.loopback)
        } else if endpoint == addr(to) && !self.blocked && !self.swallowing && fits {
            addr(from)
        } else {
            return false;
        };
        let stats = self.stats(to);
        stats.endpoint = Some(roams);
        stats.rx_bytes += 128;
        stats.last_handshake = Some(Duration::from_secs(1));
        true
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let queued = self.queue.keys().next().map(|(at, _)| *at);
            let due = self
                .sides
                .iter()
                .map(|side| side.deadline)
                .chain(queued)
                .min()
                .unwrap();
            if due >= end {
                break;
            }
            self.now = due.max(self.now);
            while let Some(((at, _), _)) = self.queue.first_key_value()
                && *at <= self.now
            {
                let (_, (side, input)) = self.queue.pop_first().unwrap();
                self.input(side, input);
            }
            for side in 0..2 {
                if self.sides[side].deadline <= self.now {
                    self.input(side, Input::Timeout);
                }
            }
        }
        self.now = end;
    }

    /// Asks and answers ten times a second; how many were lost, and for how long at most in a row.
    fn talk(&mut self, time: Duration) -> (usize, Duration) {
        let pause = Duration::from_millis(100);
        let (end, mut lost, mut row, mut worst) = (self.now + time, 0, 0, 0);
        while self.now < end {
            self.pass(pause);
            let passed = self.send(0) && self.send(1);
            lost += usize::from(!passed);
            row = if passed { 0 } else { row + 1 };
            worst = worst.max(row);
        }
        (lost, pause * worst)
    }

    fn is_direct(&self, side: usize) -> bool {
        let status = self.sides[side].engine.path_of(self.now, &key(1 - side));
        matches!(status.unwrap().now, Now::Direct { .. })
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn routes_say_what_passes_and_a_new_agent_leaves_them_as_they_are() {
    for home in [None, Some(ONE)] {
        let mut net = Net::new(home);
        net.takes = 1_400;
        net.pass(SECOND * 2);
        assert_eq!([net.inner(0), net.inner(1)], [1_340; 2]);
        let (lost, _) = net.talk(SECOND * 20);
        assert_eq!(lost, 0);
        let before = net.sides[0].kernel.present().unwrap().clone();
        net.restart(0, home);
        let now = |net: &Net| net.sides[0].kernel.present().unwrap().clone();
        assert_eq!(
            (now(&net).routes, &now(&net).peers),
            (before.routes.clone(), &before.peers)
        );
        assert_eq!(net.talk(SECOND * 20).0, 0, "{home:?}");
        assert_eq!(now(&net).routes, before.routes);
    }
}

#[test]
fn a_path_that_shrinks_is_fitted_and_not_given_up() {
    let mut net = Net::new(Some(ONE));
    net.pass(SECOND);
    assert_eq!(net.talk(SECOND * 30).0, 0);
    assert_eq!(net.inner(0), 1_440);
    net.takes = 1_300;
    let (_, gap) = net.talk(SECOND * 20);
    assert!(gap <= SECOND * 3, "{gap:?}");
    assert_eq!([net.inner(0), net.inner(1)], [1_220; 2]);
    let since = net.sides[0].engine.path_of(net.now, &key(1)).unwrap().since;
    assert!(net.is_direct(0) && since > Some(SECOND * 40), "{since:?}");
    assert_eq!(net.talk(SECOND * 20).0, 0);
    // It widens, which nobody is in a hurry to learn.
    net.takes = 1_500;
    assert_eq!(net.talk(SECOND * 80).0, 0);
    assert_eq!(net.inner(0), 1_440);
}

#[test]
fn the_first_packets_go_by_relay_and_the_others_directly_and_none_is_lost() {
    let mut net = Net::new(Some(ONE));
    net.blocked = true;
    net.pass(SECOND * 10);
    assert!(net.endpoint(0).unwrap().ip().is_loopback());
    assert_eq!(net.talk(SECOND * 20), (0, Duration::ZERO));
    net.blocked = false;
    assert_eq!(net.talk(SECOND * 70), (0, Duration::ZERO));
    assert!(net.is_direct(0) && net.is_direct(1));
    assert_eq!(
        (net.endpoint(0), net.endpoint(1)),
        (Some(addr(1)), Some(addr(0)))
    );
}

#[test]
fn traffic_makes_a_path_direct_at_once() {
    let mut net = Net::new(Some(ONE));
    // What news make of it, packets would make too.
    net.pass(Duration::from_millis(200));
    assert!(net.is_direct(0) && net.is_direct(1));
    assert_eq!(net.talk(SECOND * 60).0, 0);
}

#[test]
fn a_blocked_path_falls_back_and_returns() {
    let mut net = Net::new(Some(ONE));
    net.pass(SECOND);
    net.talk(SECOND * 30);
    net.blocked = true;
    let (_, gap) = net.talk(SECOND * 30);
    assert!(gap <= SECOND * 5, "{gap:?}");
    assert!(!net.is_direct(0));
    net.blocked = false;
    assert_eq!(net.talk(SECOND * 61).0, 0);
    assert!(net.is_direct(0) && net.is_direct(1));
}

#[test]
fn packets_that_are_swallowed_where_probes_pass_take_the_relay_soon() {
    let mut net = Net::new(Some(ONE));
    net.pass(SECOND);
    net.talk(SECOND * 30);
    net.swallowing = true;
    let (_, gap) = net.talk(SECOND * 25);
    assert!(gap <= SECOND * 6, "{gap:?}");
    let status = net.sides[0].engine.path_of(net.now, &key(1)).unwrap();
    assert!(matches!(status.now, Now::Relayed { .. }), "{status:?}");
    assert!(
        status
            .candidates
            .iter()
            .any(|it| it.result == Probe::Swallows)
    );
    assert!(status.why.contains("WireGuard not"), "{}", status.why);
}

#[test]
fn a_lost_region_costs_seconds_with_the_coordinator_down() {
    let mut net = Net::new(Some(ONE));
    net.blocked = true;
    net.pass(SECOND);
    net.talk(SECOND * 10);
    net.kill(ONE);
    let (_, gap) = net.talk(SECOND * 200);
    assert!(gap <= SECOND * 5, "{gap:?}");
    assert_eq!(
        net.sides.each_ref().map(|side| side.reported),
        [Some(TWO), Some(TWO)]
    );
}

#[test]
fn without_relays_probes_alone_find_the_path_and_find_it_again() {
    let mut net = Net::new(None);
    net.pass(SECOND);
    assert!(net.is_direct(0) && net.is_direct(1));
    net.talk(SECOND * 10);
    net.blocked = true;
    net.talk(SECOND * 30);
    net.blocked = false;
    let (_, gap) = net.talk(SECOND * 70);
    assert!(gap <= SECOND * 61, "{gap:?}");
}

#[test]
fn an_idle_pair_sends_nothing() {
    let mut net = Net::new(Some(ONE));
    net.talk(SECOND * 10);
    net.pass(SECOND * 60);
    let before = net.sides.each_ref().map(|side| side.transmits.len());
    net.pass(SECOND * 3600);
    assert_eq!(
        net.sides.each_ref().map(|side| side.transmits.len()),
        before
    );
}

/// What happens to the network.
#[derive(Clone, Copy, Debug)]
enum Change {
    Block(bool),
    Swallow(bool),
    Talk,
    Idle,
    /// Bytes of an earlier discovery packet come again, from elsewhere.
    Replay(usize),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<bool>().prop_map(Change::Block),
        any::<bool>().prop_map(Change::Swallow),
        Just(Change::Talk),
        Just(Change::Idle),
        (0usize..50).prop_map(Change::Replay),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever happened: once nothing breaks any more, packets pass, soon directly, and at no time
    /// did a storm of probes go out.
    #[test]
    fn two_engines_come_together(
        changes in prop::collection::vec((change(), 1u64..20), 0..12),
        relay in any::<bool>(),
    ) {
        let mut net = Net::new(relay.then_some(ONE));
        for (change, seconds) in changes {
            match change {
                Change::Block(on) => net.blocked = on,
                Change::Swallow(on) => net.swallowing = on,
                Change::Talk => {
                    net.talk(SECOND * 10);
                }
                Change::Idle => net.pass(SECOND * 50),
                Change::Replay(which) => {
                    let queued = net.queue.values().nth(which).cloned();
                    if let Some((side, Input::Disco { sender, message, .. })) = queued {
                        let from = SocketAddr::from(([203, 0, 113, 7], 7));
                        let disco = Input::Disco {
                            from,
                            sender,
                            message,
                        };
                        net.input(side, disco);
                    }
                }
            }
            net.talk(SECOND * u32::try_from(seconds).unwrap());
        }
        (net.blocked, net.swallowing) = (false, false);
        // The longest pause after packets were swallowed is ten minutes.
        net.talk(SECOND * 700);
        prop_assert_eq!(net.talk(SECOND * 10).0, 0);
        prop_assert!(net.is_direct(0) && net.is_direct(1));
        for side in &net.sides {
            let crowd = side.transmits.windows(60);
            for crowd in crowd.filter(|crowd| crowd.len() == 60) {
                prop_assert!(crowd[59] - crowd[0] >= SECOND, "a storm at {:?}", crowd[0] - net.start);
            }
        }
    }
}
