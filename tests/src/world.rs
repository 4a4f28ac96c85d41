//! Whole networks in one process on virtual time: real engines, a real coordinator's view, and
//! models of all that is between them.
//!
//! ```text
//!   engine ── plans ──► wireguard (model) ── datagrams ──► nat … nat ──► wireguard ── engine
//!      ▲  └─ discovery ─────────────────────────┘   └─► stun         ▲
//!      │  └─ relay table ─► frames ─► relays (model) ─────────────────┘
//!      └── netmaps ◄── coordinator's snapshot and delta, policy compiled ◄── reports
//! ```
//!
//! A seed decides everything that is left to chance: delays, loss, order. The same seed gives the
//! same run, event for event, so a failing seed is a test by itself ([`World::fingerprint`]).
//! Nothing here waits: an hour passes in the time that its events take.
//!
//! Always checked, at every event: nothing but WireGuard, discovery and STUN is on a link; no
//! packet reaches an application that policy denies; an engine keeps no unbounded queue, sends no
//! storm, and does not flap. What a test asks for itself: who reaches whom, over what, how soon ([`Talk`]).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::netcheck::ports::GUESSES;
use engine::trace::{Line, Recorder, Start, VERSION};
use engine::{Config, Engine, Input, LinkAddr, Links, Output, RelayTable, Via};
use proto::disco;
use proto::id::{NodeId, RegionId};
use proto::key::{DiscoKey, NodeKey};
use proto::net::Prefix;
use proto::netmap::{Netmap, Update};

mod acl;
mod authority;
pub mod nat;
mod relays;
mod shim;
mod trouble;
mod watch;
mod wire;
pub mod wireguard;

use authority::Authority;
use nat::{Kind, Nat};
use shim::Shim;
use wireguard::{Inner, Kernel, Message};

/// The port that every node's WireGuard has.
pub const PORT: u16 = 51820;
/// The port of the agents' sockets for relayed data.
const SHIM: u16 = 51821;
/// How often the kernel's timers run.
const KERNEL_TICK: Duration = Duration::from_millis(100);
/// What carrying out a plan, or reading the kernel, takes.
const HAND: Duration = Duration::from_millis(2);
/// How long a connection that died unannounced stays unnoticed.
const NOTICED: Duration = Duration::from_secs(3);
/// Between two attempts to reach a relay.
const REDIAL: Duration = Duration::from_secs(1);
/// The longest packet of a link, in bytes.
const ETHERNET: u32 = 1_500;
/// Most routers on a way.
const MAX_HOPS: usize = 8;
/// Most outputs of one input: more is a loop.
const MAX_OUTPUTS: usize = 10_000;
/// Most discovery messages of one node in any second, for each node that there is: bursts, answers
/// to those of others, and guesses.
const STORM: usize = 60 + GUESSES;

/// What a datagram carries. There is no other kind: a packet of an application has no place here.
#[derive(Clone, Debug)]
enum Payload {
    WireGuard(NodeKey, NodeKey, Message),
    /// Whose box, and for whom alone.
    Disco(DiscoKey, DiscoKey, disco::Message),
    StunRequest,
    StunAnswer(SocketAddr),
}

enum Event {
    /// A datagram is at the door of a host.
    Datagram(usize, SocketAddr, Payload),
    /// A frame of a relay is at a node.
    Frame(usize, RegionId, NodeKey, Payload),
    /// Something for an engine, from its own host.
    Input(usize, Input),
    /// The engine's deadline.
    Deadline(usize, Duration),
    /// The plan is carried out.
    Apply(usize, Vec<engine::plan::Step>),
    /// The kernel is read.
    Observe(usize),
    /// A node's report is at the coordinator.
    Report(usize, proto::control::Report),
    /// The kernels' timers.
    KernelTick,
    /// A connection to a relay stands, or does not.
    Dialled(usize, RegionId),
    /// A conversation's next question.
    Ask(usize),
    /// A message of a handshake may have to be said again.
    Repeat(usize),
}

/// What a host of a network is.
#[derive(Clone, Copy)]
enum Place {
    Node(usize),
    /// The outside of the router of this realm.
    Router(usize),
    Stun,
}

/// A network of hosts that reach each other, behind a router or the internet itself.
struct Realm {
    hosts: BTreeMap<IpAddr, Place>,
    router: Option<(Nat, usize)>,
}

/// A relay region.
struct Relay {
    up: bool,
    delay: Duration,
    connected: BTreeSet<usize>,
}

/// One node.
struct Node {
    id: NodeId,
    key: NodeKey,
    /// Its address in the network.
    addr: IpAddr,
    realm: usize,
    local: IpAddr,
    delay: Duration,
    linked: bool,
    kernel: Kernel,
    engine: Option<Engine>,
    cache: Option<Box<Netmap>>,
    table: Arc<RelayTable>,
    /// Regions that are connected, and those being dialled.
    connected: BTreeSet<RegionId>,
    dialling: BTreeSet<RegionId>,
    deadline: Option<Duration>,
    shim: Shim,
    /// Peers of whose relayed data was told, and when.
    said: BTreeMap<NodeKey, Duration>,
    /// Discovery messages in the current second.
    second: (u64, usize),
    /// What its engine was told since it started, if that is recorded.
    trace: Option<(Recorder, Vec<String>)>,
    /// When a direct path last took the relay's place, for each peer, in this agent's life.
    promoted: BTreeMap<NodeKey, Duration>,
    /// Since when its host sleeps, and how long it slept before.
    asleep: Option<Duration>,
    slept: Duration,
    /// What happens to it when it wakes up.
    deferred: Vec<Event>,
}

/// Questions from one node to another, one after the other, and what came of them.
#[derive(Clone, Debug, Default)]
pub struct Talk {
    /// Who asks whom.
    pub from: usize,
    /// See `from`.
    pub to: usize,
    /// How many were asked.
    pub asked: u64,
    /// How many were answered, by number.
    pub answered: BTreeSet<u64>,
    /// When the first answer came.
    pub first: Option<Duration>,
    /// When the asker's kernel was first seen to send straight to the peer, at an answer.
    pub direct: Option<Duration>,
    /// Longest pause between two answers.
    pub longest_pause: Duration,
    last: Option<Duration>,
    pause: Duration,
    until: Duration,
}

/// How datagrams fare.
#[derive(Clone, Copy, Debug)]
pub struct Quality {
    /// Of a thousand, how many get lost.
    pub loss: u64,
    /// Most time that is added by chance, which also changes the order.
    pub jitter: Duration,
}

/// A network of nodes.
pub struct World {
    now: Duration,
    base: Instant,
    serial: u64,
    events: BTreeMap<(Duration, u64), Event>,
    chance: u64,
    fingerprint: u64,
    realms: Vec<Realm>,
    relays: BTreeMap<RegionId, Relay>,
    nodes: Vec<Node>,
    authority: Authority,
    talks: Vec<Talk>,
    questions: BTreeMap<u64, usize>,
    /// How datagrams fare now.
    pub quality: Quality,
    /// Pairs of nodes between which no datagram passes, one way.
    cut: BTreeSet<(usize, usize)>,
    /// Pairs between which discovery passes, and WireGuard does not.
    swallows: BTreeSet<(usize, usize)>,
    /// The longest packets that pass between a pair directly, in bytes; Ethernet's if nothing is said.
    takes: BTreeMap<(usize, usize), u32>,
    /// Whether the coordinator answers.
    coordinator: bool,
    /// Whether it is written down what engines are told that start from now on.
    pub recorded: bool,
}

impl World {
    /// A network with relay regions this far away, and nobody in it.
    ///
    /// # Errors
    /// If the policy does not compile.
    pub fn new(seed: u64, regions: &[Duration]) -> anyhow::Result<World> {
        let internet = Realm {
            hosts: BTreeMap::new(),
            router: None,
        };
        let mut world = World {
            now: Duration::ZERO,
            #[allow(clippy::disallowed_methods, reason = "a point to count from")]
            base: Instant::now(),
            serial: 0,
            events: BTreeMap::new(),
            chance: seed,
            fingerprint: 0,
            realms: vec![internet],
            relays: BTreeMap::new(),
            nodes: Vec::new(),
            authority: Authority::new(regions.len())?,
            talks: Vec::new(),
            questions: BTreeMap::new(),
            quality: Quality {
                loss: 0,
                jitter: Duration::ZERO,
            },
            cut: BTreeSet::new(),
            swallows: BTreeSet::new(),
            takes: BTreeMap::new(),
            coordinator: true,
            recorded: false,
        };
        for (index, delay) in regions.iter().enumerate() {
            let relay = Relay {
                up: true,
                delay: *delay,
                connected: BTreeSet::new(),
            };
            world.relays.insert(authority::region(index), relay);
            let stun = authority::relay_addr(index);
            world.realms[0].hosts.insert(stun, Place::Stun);
        }
        world.after(KERNEL_TICK, Event::KernelTick);
        Ok(world)
    }

    /// A router in `outer` (0: the internet) with a network behind it. Returns that network.
    pub fn router(&mut self, kind: Kind, outer: usize) -> usize {
        let realm = self.realms.len();
        let number = u8::try_from(realm).unwrap_or(u8::MAX);
        let outside = match outer {
            0 => IpAddr::V4(Ipv4Addr::new(198, 51, 100, number)),
            _ => IpAddr::V4(Ipv4Addr::new(10, 200, number, 1)),
        };
        self.realms[outer]
            .hosts
            .insert(outside, Place::Router(realm));
        self.realms.push(Realm {
            hosts: BTreeMap::new(),
            router: Some((Nat::new(kind, outside), outer)),
        });
        realm
    }

    /// A node in a network (0: the internet), `delay` away from everything. Its agent starts now.
    ///
    /// # Errors
    /// If the coordinator does not take it.
    pub fn node(&mut self, realm: usize, delay: Duration) -> anyhow::Result<usize> {
        let index = self.nodes.len();
        let number = u8::try_from(index + 1)?;
        let local = match realm {
            0 => IpAddr::V4(Ipv4Addr::new(203, 0, 113, number)),
            _ => IpAddr::V4(Ipv4Addr::new(10, u8::try_from(realm)?, 0, number)),
        };
        let key = NodeKey([number; 32]);
        let id = self.authority.join(number, key, disco_key(key))?;
        self.realms[realm].hosts.insert(local, Place::Node(index));
        self.nodes.push(Node {
            id,
            key,
            addr: self.authority.addr(id),
            realm,
            local,
            delay,
            linked: true,
            kernel: Kernel::new(number.into()),
            engine: None,
            cache: None,
            table: Arc::default(),
            connected: BTreeSet::new(),
            dialling: BTreeSet::new(),
            deadline: None,
            shim: Shim::new(key),
            said: BTreeMap::new(),
            second: (0, 0),
            trace: None,
            promoted: BTreeMap::new(),
            asleep: None,
            slept: Duration::ZERO,
            deferred: Vec::new(),
        });
        self.start_agent(index);
        self.publish();
        Ok(index)
    }

    /// Starts a node's agent: with the netmap on disk, if there is one.
    pub fn start_agent(&mut self, index: usize) {
        let config = Config {
            interface: "weir0".into(),
            listen_port: PORT,
            shim_port: SHIM,
        };
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.chance().to_le_bytes());
        let (now, recorded) = (self.at(index), self.recorded);
        let node = &mut self.nodes[index];
        let start = Start {
            version: VERSION,
            weir: env!("CARGO_PKG_VERSION").into(),
            config,
            me: node.key,
            disco: disco_key(node.key),
            seed,
        };
        node.engine = Some(start.engine());
        let first = text(&Line::Start(Cow::Owned(start)));
        node.trace = recorded.then(|| (Recorder::new(now), vec![first]));
        let cached = node.cache.clone();
        let links = self.links_of(index);
        self.tell(index, Input::Up(true));
        self.tell(index, Input::Links(links));
        if let Some(netmap) = cached {
            self.tell(index, Input::Cached(netmap));
        }
        self.full(index);
    }

    /// Whether policy lets a node ask another.
    #[must_use]
    pub fn permits(&self, from: usize, to: usize) -> bool {
        let id = |index: usize| self.nodes[index].id;
        self.authority.permits(id(from), id(to))
    }

    /// Starts a conversation: a question each `pause` for `long`. Returns its number.
    pub fn talk(&mut self, from: usize, to: usize, pause: Duration, long: Duration) -> usize {
        let talk = self.talks.len();
        self.talks.push(Talk {
            from,
            to,
            pause,
            until: self.now + long,
            ..Talk::default()
        });
        self.after(Duration::ZERO, Event::Ask(talk));
        talk
    }

    /// What came of a conversation so far.
    #[must_use]
    pub fn heard(&self, talk: usize) -> &Talk {
        &self.talks[talk]
    }

    /// Whether a node's kernel sends to this peer without a relay.
    #[must_use]
    pub fn is_direct(&self, from: usize, to: usize) -> bool {
        let endpoint = self.nodes[from].kernel.endpoint(&self.nodes[to].key);
        endpoint.is_some_and(|endpoint| !endpoint.ip().is_loopback())
    }

    /// The longest packet that a node's routes let go to this peer, inside the tunnel, in bytes.
    #[must_use]
    pub fn inner_mtu(&self, from: usize, to: usize) -> u32 {
        self.nodes[from].kernel.mtu(self.nodes[to].addr)
    }

    /// How many handshakes with this peer a node completed.
    #[must_use]
    pub fn handshakes(&self, from: usize, to: usize) -> u64 {
        self.nodes[from].kernel.handshakes(&self.nodes[to].key)
    }

    /// The lines of a node's trace, if it is recorded.
    #[must_use]
    pub fn trace(&self, index: usize) -> &[String] {
        let trace = self.nodes[index].trace.as_ref();
        trace.map_or(&[], |(_, lines)| lines)
    }

    /// The world's time.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.now
    }

    /// A number that two runs share only if they were the same, event for event.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Lets time pass.
    pub fn run(&mut self, long: Duration) {
        let end = self.now + long;
        while let Some(entry) = self.events.first_entry() {
            if entry.key().0 > end {
                break;
            }
            let ((at, serial), event) = entry.remove_entry();
            self.now = at;
            self.fingerprint = mix(self.fingerprint ^ serial ^ (at.as_nanos() as u64));
            self.happen(event);
        }
        self.now = end;
    }

    /// Lets time pass until something holds, but not longer than `long`. Says whether it held.
    pub fn run_until(&mut self, long: Duration, holds: impl Fn(&World) -> bool) -> bool {
        let end = self.now + long;
        while self.now < end {
            if holds(self) {
                return true;
            }
            self.run(KERNEL_TICK.min(end - self.now));
        }
        holds(self)
    }
}

/// A node's key for discovery.
fn disco_key(node: NodeKey) -> DiscoKey {
    DiscoKey(node.0.map(|byte| !byte))
}

/// A line of a trace, as it stands in a file.
fn text(line: &Line<'_>) -> String {
    serde_json::to_string(line).unwrap_or_default()
}

fn relay_lost() -> String {
    "the relay closed the connection".into()
}

// What happens.
impl World {
    fn happen(&mut self, event: Event) {
        let Some(event) = self.unless_asleep(event) else {
            return;
        };
        match event {
            Event::Datagram(index, from, payload) => self.arrive(index, from, payload),
            Event::Frame(index, region, from, payload) => {
                self.arrive_relayed(index, region, from, payload);
            }
            Event::Input(index, input) => self.tell(index, input),
            Event::Deadline(index, at) => {
                if self.nodes[index].deadline == Some(at) {
                    self.tell(index, Input::Timeout);
                }
            }
            Event::Apply(index, steps) => self.apply(index, &steps),
            Event::Observe(index) => {
                let observed = self.nodes[index].kernel.observed.clone();
                self.tell(index, Input::Observed(observed));
            }
            Event::Report(index, report) => {
                if self.coordinator && self.authority.report(self.nodes[index].id, &report) {
                    self.publish();
                }
            }
            Event::KernelTick => {
                let awake = |index: &usize| self.nodes[*index].asleep.is_none();
                let awake: Vec<usize> = (0..self.nodes.len()).filter(awake).collect();
                for index in awake {
                    let sent = self.nodes[index].kernel.tick(self.now);
                    self.send_all(index, sent);
                }
                self.after(KERNEL_TICK, Event::KernelTick);
            }
            Event::Dialled(index, region) => self.dialled(index, region),
            Event::Ask(talk) => self.ask(talk),
            Event::Repeat(index) => self.repeat(index),
        }
    }

    fn apply(&mut self, index: usize, steps: &[engine::plan::Step]) {
        // The agent may have been killed in the middle: then the rest is never done.
        if self.nodes[index].engine.is_none() {
            return;
        }
        for step in steps {
            self.count_promotions(index, step);
            let sent = self.nodes[index].kernel.apply(self.now, step);
            self.send_all(index, sent);
        }
        self.tell(index, Input::Applied);
    }

    fn ask(&mut self, number: usize) {
        let talk = &mut self.talks[number];
        if self.now > talk.until {
            return;
        }
        talk.asked += 1;
        let (from, to, pause, asked) = (talk.from, talk.to, talk.pause, talk.asked);
        let question = (number as u64) << 32 | asked;
        self.questions.insert(question, number);
        let inner = Inner {
            src: self.nodes[from].addr,
            dst: self.nodes[to].addr,
            number: question,
            answer: false,
        };
        self.send_inner(from, inner);
        self.after(pause, Event::Ask(number));
    }

    /// An application sends: its own kernel asks policy, then WireGuard carries.
    fn send_inner(&mut self, index: usize, inner: Inner) {
        let sent = self.nodes[index].kernel.send(self.now, inner);
        self.send_all(index, sent);
    }

    /// An application receives.
    fn deliver(&mut self, index: usize, inner: Inner) {
        let id = |addr| {
            self.nodes
                .iter()
                .find(|node| node.addr == addr)
                .map(|node| node.id)
        };
        let permitted = id(inner.src).zip(id(inner.dst));
        let permitted = permitted.is_some_and(|(src, dst)| self.authority.permits(src, dst));
        assert!(permitted, "policy denies what node {index} got: {inner:?}");
        if !inner.answer {
            let answer = Inner {
                answer: true,
                ..inner
            };
            self.send_inner(index, answer);
            return;
        }
        let Some(number) = self.questions.remove(&inner.number) else {
            return;
        };
        let direct = self.is_direct(self.talks[number].from, self.talks[number].to);
        let now = self.now;
        let talk = &mut self.talks[number];
        talk.answered.insert(inner.number & 0xffff_ffff);
        talk.first.get_or_insert(now);
        if direct {
            talk.direct.get_or_insert(now);
        }
        let before = talk.last.replace(now).unwrap_or(now);
        talk.longest_pause = talk.longest_pause.max(now - before);
    }
}

// Engines.
impl World {
    /// A node's monotonic clock.
    fn at(&self, index: usize) -> Instant {
        self.base + (self.now - self.nodes[index].slept)
    }

    fn tell(&mut self, index: usize, input: Input) {
        let at = self.at(index);
        let Node {
            engine,
            trace,
            slept,
            ..
        } = &mut self.nodes[index];
        let Some(engine) = engine else {
            return;
        };
        if let Some((recorder, lines)) = trace {
            recorder.input(at, engine, &input, |line| lines.push(text(&line)));
        }
        engine.handle(at, input);
        let mut outputs = Vec::new();
        let deadline = loop {
            let output = engine.poll(at);
            if let Some((recorder, lines)) = trace {
                recorder.output(at, &output, |line| lines.push(text(&line)));
            }
            match output {
                Output::Timeout(deadline) => break deadline,
                output => outputs.push(output),
            }
            assert!(
                outputs.len() < MAX_OUTPUTS,
                "node {index} does not come to an end"
            );
        };
        let deadline = deadline.saturating_duration_since(self.base) + *slept;
        assert!(
            deadline > self.now,
            "node {index} wants to be asked at once, for ever"
        );
        self.nodes[index].deadline = Some(deadline);
        self.at_time(deadline, Event::Deadline(index, deadline));
        for output in outputs {
            self.carry_out(index, output);
        }
    }

    fn carry_out(&mut self, index: usize, output: Output) {
        match output {
            Output::Apply(steps) => self.after(HAND, Event::Apply(index, steps)),
            Output::Observe => self.after(HAND, Event::Observe(index)),
            Output::NeedFull => self.full(index),
            Output::Report(report) => {
                let delay = self.nodes[index].delay * 2;
                self.after(delay, Event::Report(index, report));
            }
            Output::Persist(netmap) => self.nodes[index].cache = Some(netmap),
            Output::Resolve(names) => {
                let found = names.into_iter();
                let found = found.filter_map(|name| Some((name.parse().ok()?, name)));
                self.after(HAND, Event::Input(index, Input::Resolved(found.collect())));
            }
            Output::Ask(servers) => {
                for server in servers {
                    self.datagram(index, server, Payload::StunRequest);
                }
            }
            Output::Transmit { via, to, message } => self.transmit(index, via, to, message),
            Output::Relays(table) => self.set_table(index, table),
            Output::Router(_) | Output::Timeout(_) => {}
        }
    }

    fn transmit(&mut self, index: usize, via: Via, to: DiscoKey, message: disco::Message) {
        let second = self.now.as_secs();
        let peers = self.nodes.len();
        let node = &mut self.nodes[index];
        if node.second.0 != second {
            node.second = (second, 0);
        }
        node.second.1 += 1;
        assert!(
            node.second.1 <= STORM * peers,
            "node {index} sent {} discovery messages in a second",
            node.second.1
        );
        let payload = Payload::Disco(disco_key(node.key), to, message);
        match via {
            Via::Direct(to) => self.datagram(index, to, payload),
            Via::Relay(region, to) => self.frame(index, region, to, payload),
        }
    }

    fn links_of(&self, index: usize) -> Links {
        let node = &self.nodes[index];
        if !node.linked {
            return Links::default();
        }
        let addr = LinkAddr {
            interface: "eth0".into(),
            addr: node.local,
            prefix_len: 24,
        };
        let default = engine::plan::LiveRoute {
            prefix: Prefix::ALL_V4,
            interface: "eth0".into(),
        };
        Links {
            addrs: BTreeSet::from([addr]),
            routes: BTreeSet::from([default]),
            gateway: None,
            mtu: ETHERNET,
        }
    }

    /// The coordinator tells everybody what changed for them.
    fn publish(&mut self) {
        if !self.coordinator {
            return;
        }
        for index in 0..self.nodes.len() {
            if let Some(update) = self.authority.news(self.nodes[index].id) {
                let delay = self.nodes[index].delay * 2;
                self.after(delay, Event::Input(index, Input::Netmap(update)));
            }
        }
    }

    fn full(&mut self, index: usize) {
        if !self.coordinator {
            return;
        }
        let id = self.nodes[index].id;
        if let Some(netmap) = self.authority.full(id) {
            let update = Update::Full(Box::new(netmap));
            let delay = self.nodes[index].delay * 2;
            self.after(delay, Event::Input(index, Input::Netmap(update)));
        }
    }
}

// Time and chance.
impl World {
    fn after(&mut self, delay: Duration, event: Event) {
        self.at_time(self.now + delay, event);
    }

    fn at_time(&mut self, at: Duration, event: Event) {
        self.serial += 1;
        self.events.insert((at, self.serial), event);
    }

    /// A number nobody foresees but who knows the seed (Steele, Lea, Flood: SplitMix64).
    pub fn chance(&mut self) -> u64 {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.chance)
    }

    fn jitter(&mut self) -> Duration {
        let most = self.quality.jitter.as_nanos() as u64;
        Duration::from_nanos(self.chance() % most.max(1))
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
