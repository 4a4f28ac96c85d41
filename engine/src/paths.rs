//! [`Paths`]: the paths of all peers, and what they say to each other: wakes each path in time, and
//! keeps all of them together within one budget.
//!
//! What a message says of its sender is believed as far as its box proved it: the disco key that
//! opened it belongs to one peer of the netmap, and to that peer's path alone it goes.

use crate::Via;
use crate::dice::Dice;
use crate::mtu::{self, Mtu, Seen};
use crate::netcheck::ports;
use crate::path::probe::{Budget, MAX_TRANSMITS};
use crate::path::{Errand, Path, Surroundings, Way, guess};
use crate::plan::{PeerState, Present, Stats};
use crate::relays::{Relays, is_loopback};
use proto::disco::{Message, TxId};
use proto::key::{DiscoKey, NodeKey};
use proto::net::Prefix;
use proto::netmap::{MAX_ENDPOINTS_PER_NODE, Peer};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// With at most so many peers, news alone makes paths, so that the first packet finds one. With
/// more, or where a relay carries the first packets anyway, traffic does.
pub const EAGER_PEERS: usize = 128;
/// Answers to one peer in a second, at most.
const MAX_ANSWERS: u32 = 50;
/// Servers answer one after the other: what each says of a hard NAT is told at once no more often.
const RECALL_PAUSE: Duration = Duration::from_millis(250);
/// Rounds of long pings in a second, at most; with many peers a fifth of their number.
const MAX_LONG_ROUNDS: u32 = 50;

/// All peers' paths.
pub(crate) struct Paths {
    me: NodeKey,
    disco: DiscoKey,
    dice: Dice,
    all: BTreeMap<NodeKey, Entry>,
    by_disco: BTreeMap<DiscoKey, NodeKey>,
    /// When each path wants to be asked: at most one entry each.
    timers: BTreeSet<(Instant, NodeKey)>,
    budget: Budget,
    long: Budget,
    guessed: guess::Limits,
    ground: Surroundings,
    /// Where we can be reached, for calls.
    endpoints: Vec<SocketAddr>,
    /// The ports that servers see behind a hard NAT of this address, in the order of asking.
    seen: Option<(IpAddr, Vec<u16>)>,
    /// When they were last told at once to those who are being called.
    recalled: Option<Instant>,
    /// Whether a path was looked for, so that these should be new.
    sought: bool,
    outbox: VecDeque<Sent>,
    /// Whether what is wanted of kernel or relays may have changed.
    moved: bool,
    look: bool,
}

/// Which way, for whom, what.
type Sent = (Via, DiscoKey, Message);

struct Entry {
    path: Path,
    mtu: Mtu,
    /// What was last said of it.
    inner: Option<u16>,
    disco: Option<DiscoKey>,
    timer: Option<Instant>,
    answers: Budget,
    /// How often it was called since servers saw other ports behind a hard NAT.
    calls: usize,
}

impl Paths {
    pub(crate) fn new(me: NodeKey, disco: DiscoKey, seed: [u8; 32]) -> Self {
        Self {
            me,
            disco,
            dice: Dice::new(seed),
            all: BTreeMap::new(),
            by_disco: BTreeMap::new(),
            timers: BTreeSet::new(),
            budget: Budget::default(),
            long: Budget::default(),
            guessed: guess::Limits::default(),
            ground: Surroundings::default(),
            endpoints: Vec::new(),
            seen: None,
            recalled: None,
            sought: false,
            outbox: VecDeque::new(),
            moved: false,
            look: false,
        }
    }

    pub(crate) fn disco_key(&self) -> DiscoKey {
        self.disco
    }

    pub(crate) fn knows(&self, disco: &DiscoKey) -> bool {
        self.by_disco.contains_key(disco)
    }

    pub(crate) fn get(&self, key: &NodeKey) -> Option<&Path> {
        self.all.get(key).map(|entry| &entry.path)
    }

    pub(crate) fn with_mtu(&self, key: &NodeKey) -> Option<(&Path, &Mtu)> {
        self.all.get(key).map(|entry| (&entry.path, &entry.mtu))
    }

    /// The longest packet inside the tunnel that the path to this peer takes, if that is known.
    pub(crate) fn inner(&self, key: &NodeKey) -> Option<u16> {
        self.all.get(key)?.inner
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&NodeKey, &Path)> {
        self.all.iter().map(|(key, entry)| (key, &entry.path))
    }

    /// Whether anything changed that plans or relays depend on, since this was last asked.
    pub(crate) fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    pub(crate) fn is_moved(&self) -> bool {
        self.moved
    }

    pub(crate) fn clear(&mut self) {
        self.all.clear();
        self.by_disco.clear();
        self.timers.clear();
        self.outbox.clear();
    }

    /// Where we can be reached. Paths that are not direct yet may become so if that is news.
    pub(crate) fn set_endpoints(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        if self.endpoints == endpoints {
            return;
        }
        self.endpoints = endpoints.to_vec();
        for key in self.keys() {
            self.touch(now, key, |path| path.recall(now));
            self.news(now, key);
        }
    }

    /// What servers see behind a hard NAT. Whoever is being called hears what follows from it.
    pub(crate) fn set_seen(&mut self, now: Instant, seen: Option<(IpAddr, Vec<u16>)>) {
        if self.seen == seen {
            return;
        }
        self.seen = seen;
        for entry in self.all.values_mut() {
            entry.calls = 0;
        }
        let lately = |at| now.saturating_duration_since(at) < RECALL_PAUSE;
        if self.seen.is_none() || self.recalled.is_some_and(lately) {
            return;
        }
        self.recalled = Some(now);
        for key in self.keys() {
            self.touch(now, key, |path| {
                if path.is_probing() && !matches!(path.way(), Way::Direct(_)) {
                    path.recall(now);
                }
            });
        }
    }

    /// Whether paths were looked for since this was last asked.
    pub(crate) fn take_sought(&mut self) -> bool {
        std::mem::take(&mut self.sought)
    }

    fn keys(&self) -> Vec<NodeKey> {
        self.all.keys().copied().collect()
    }

    /// The peers and the host are these. Candidates are ranked anew; new peers get a path, the one
    /// that is `present` if there is one, gone ones lose it.
    pub(crate) fn refresh<'a>(
        &mut self,
        now: Instant,
        peers: impl Iterator<Item = &'a Peer>,
        ground: Surroundings,
        relays: &Relays,
        present: Option<&Present>,
    ) {
        self.ground = ground;
        let mut before = std::mem::take(&mut self.all);
        self.by_disco.clear();
        let (mut news, mut new) = (Vec::new(), Vec::new());
        for peer in peers {
            let candidates = self.ground.rank(&peer.endpoints);
            let relay = relays.way_to(now, &peer.key);
            let entry = match before.remove(&peer.key) {
                Some(mut entry) => {
                    if entry.path.set_candidates(&candidates) {
                        news.push(peer.key);
                    }
                    if entry.disco != peer.disco {
                        entry.disco = peer.disco;
                        entry.path.set_probes(peer.disco.is_some());
                    }
                    entry.path.set_relay(now, relay);
                    entry
                }
                None => {
                    news.push(peer.key);
                    new.push(peer);
                    let (probes, yields) = (peer.disco.is_some(), self.me > peer.key);
                    Entry {
                        path: Path::new(probes, yields, &candidates, relay),
                        mtu: Mtu::default(),
                        inner: None,
                        disco: peer.disco,
                        timer: None,
                        answers: Budget::default(),
                        calls: 0,
                    }
                }
            };
            if let Some(disco) = entry.disco {
                self.by_disco.entry(disco).or_insert(peer.key);
            }
            self.all.insert(peer.key, entry);
        }
        self.timers.retain(|(_, key)| self.all.contains_key(key));
        for (peer, present) in new.into_iter().zip(present.into_iter().cycle()) {
            self.adopt(now, peer, present);
        }
        for key in news {
            self.news(now, key);
        }
        for key in self.keys() {
            self.reschedule(now, key);
        }
        self.moved = true;
    }

    /// The host's links changed: every path that is in use is asked, the others are looked for.
    pub(crate) fn shaken(&mut self, now: Instant) {
        for key in self.keys() {
            self.touch(now, key, |path| path.shaken(now));
            self.news(now, key);
        }
    }

    /// The host slept, and has no sessions any more.
    pub(crate) fn woke(&mut self, now: Instant) {
        for key in self.keys() {
            self.touch(now, key, |path| path.woke(now));
        }
    }

    /// There is news of one end of a path.
    fn news(&mut self, now: Instant, key: NodeKey) {
        let few = self.all.len() <= EAGER_PEERS;
        self.touch(now, key, |path| {
            let relayed = matches!(path.way(), Way::Relay);
            if few || !relayed || path.is_active(now) {
                path.seek(now, few || !relayed);
            }
        });
    }

    /// Relays came or went.
    pub(crate) fn refresh_relays(&mut self, now: Instant, relays: &Relays) {
        for key in self.keys() {
            let relay = relays.way_to(now, &key);
            self.touch(now, key, |path| path.set_relay(now, relay));
        }
    }

    /// A device came up: who can be greeted only later is remembered.
    pub(crate) fn owe_greetings(&mut self) {
        for entry in self.all.values_mut() {
            if entry.path.is_mute() {
                entry.path.owe_greeting();
            }
        }
    }

    /// A plan ended before these were greeted.
    pub(crate) fn owe_again(&mut self, keys: impl Iterator<Item = NodeKey>) {
        for key in keys {
            if let Some(entry) = self.all.get_mut(&key) {
                entry.path.owe_greeting_now();
            }
        }
    }

    /// Peers that the kernel is to be given anew. Each is said once.
    pub(crate) fn take_renewals(&mut self) -> Vec<NodeKey> {
        let entries = self.all.iter_mut();
        let due = entries.filter_map(|(key, entry)| entry.path.take_renewal().then_some(*key));
        due.inspect(
            |key| tracing::info!(peer = %key, "handshakes crossed: it is given to the kernel anew"),
        )
        .collect()
    }

    /// Peers that are to be greeted now. Each is said once.
    pub(crate) fn take_greetings(&mut self) -> Vec<NodeKey> {
        let mut due = Vec::new();
        for (key, entry) in &mut self.all {
            if entry.path.take_greeting() {
                due.push(*key);
            }
        }
        due
    }

    pub(crate) fn observe(&mut self, now: Instant, peers: &BTreeMap<NodeKey, PeerState>) {
        for key in self.keys() {
            let Some(peer) = peers.get(&key) else {
                self.touch(now, key, Path::unmade);
                continue;
            };
            let tier = self.tier_of(&peer.stats);
            self.touch(now, key, |path| path.observe(now, &peer.stats, tier));
            if let Some(entry) = self.all.get_mut(&key)
                && entry.path.is_silent()
            {
                entry.mtu.suspect(now);
                self.reschedule(now, key);
            }
        }
    }

    /// Takes over what an earlier run of the agent left of a new path: a session at its endpoint,
    /// and routes that say how long its packets may be.
    fn adopt(&mut self, now: Instant, peer: &Peer, present: &Present) {
        let Some(state) = present.peers.get(&peer.key) else {
            return;
        };
        let tier = self.tier_of(&state.stats);
        self.touch(now, peer.key, |path| path.observe(now, &state.stats, tier));
        let mut hosts = peer.addrs.iter().map(|addr| Prefix::host(*addr));
        let said = hosts.find_map(|host| present.routes.get(&host));
        if let (Some(said), Some(entry)) = (said, self.all.get_mut(&peer.key)) {
            entry.mtu.adopt(said.inner());
            self.reschedule(now, peer.key);
        }
    }

    fn tier_of(&self, stats: &Stats) -> Option<crate::path::Tier> {
        let endpoint = stats.endpoint.filter(|it| !is_loopback(*it))?;
        self.ground.tier(endpoint)
    }

    /// Peers that the kernel was just given: their counters begin here.
    pub(crate) fn made(&mut self, now: Instant, peers: &BTreeMap<NodeKey, PeerState>) {
        for key in self.keys() {
            let unseen = self.all.get(&key).is_some_and(|it| !it.path.is_seen());
            if let Some(peer) = peers.get(&key).filter(|_| unseen) {
                let tier = self.tier_of(&peer.stats);
                self.touch(now, key, |path| path.observe(now, &peer.stats, tier));
                // Nobody was answered before; a burst may have ended meanwhile.
                self.news(now, key);
            }
        }
    }

    /// Whether some path fell silent, so that the kernel should be read now, and servers be asked
    /// whether we are still who we were. Said once.
    pub(crate) fn take_look(&mut self) -> bool {
        std::mem::take(&mut self.look)
    }

    /// Whether some path is in use that the kernel's counters prove, so that they are read often.
    pub(crate) fn are_watched(&self, now: Instant) -> bool {
        self.all.values().any(|entry| entry.path.is_watched(now))
    }

    /// Packets of this peer come by relay.
    pub(crate) fn relayed(&mut self, now: Instant, from: NodeKey) {
        self.touch(now, from, |path| path.relayed(now));
    }

    /// A discovery packet came, and the sender's box opened.
    pub(crate) fn receive(
        &mut self,
        now: Instant,
        from: Via,
        sender: DiscoKey,
        message: Message,
        relays: &Relays,
    ) {
        let Some(key) = self.by_disco.get(&sender).copied() else {
            return;
        };
        match (message, from) {
            (Message::Ping { tx, node, padding }, from) => {
                if node.is_none_or(|node| node == key) {
                    self.overhear(now, key, padding);
                    self.answer(now, key, tx, from, relays);
                }
            }
            (Message::Pong { tx, seen, took }, Via::Direct(addr)) => {
                let (addr, seen) = (canonical(addr), canonical(seen));
                let entry = self.all.get_mut(&key);
                if entry.is_some_and(|entry| entry.mtu.ponged(now, tx, addr)) {
                    self.reschedule(now, key);
                } else {
                    self.touch(now, key, |path| path.ponged(now, tx, addr, seen, took));
                }
            }
            (Message::CallMeMaybe { endpoints }, Via::Relay(_, node)) if node == key => {
                let candidates = self.ground.rank(&endpoints);
                self.touch(now, key, |path| path.called(now, &candidates));
            }
            (Message::Pong { .. }, Via::Relay(..))
            | (Message::CallMeMaybe { .. }, Via::Direct(_) | Via::Relay(..))
            | (Message::Unknown(_), _) => {}
        }
    }

    /// The other side asks for a length.
    fn overhear(&mut self, now: Instant, key: NodeKey, padding: u16) {
        if padding > 0
            && let Some(entry) = self.all.get_mut(&key)
        {
            entry.mtu.overheard(now, padding);
            self.reschedule(now, key);
        }
    }

    fn answer(&mut self, now: Instant, key: NodeKey, tx: TxId, from: Via, relays: &Relays) {
        let Some(entry) = self.all.get_mut(&key) else {
            return;
        };
        let (via, seen) = match from {
            Via::Direct(addr) => {
                let addr = canonical(addr);
                let Some(tier) = self.ground.tier(addr) else {
                    return;
                };
                // Who is answered sends packets, and a kernel that does not know the peer yet would
                // drop them: a handshake costs 5 s then.
                let answers = entry.path.pinged_by(now, tier, addr) && entry.path.is_seen();
                self.reschedule(now, key);
                if !answers {
                    return;
                }
                (Via::Direct(addr), addr)
            }
            Via::Relay(..) => {
                let Some(region) = relays.region_of(&key) else {
                    return;
                };
                let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
                (Via::Relay(region, key), nowhere)
            }
        };
        let Some(entry) = self.all.get_mut(&key) else {
            return;
        };
        let took = entry.path.took(now);
        if entry.answers.take(now, MAX_ANSWERS) && self.may_send(now) {
            self.send(key, via, Message::Pong { tx, seen, took });
        }
    }

    fn send(&mut self, key: NodeKey, via: Via, message: Message) {
        let disco = self.all.get(&key).and_then(|entry| entry.disco);
        let sent = disco.map(|to| (via, to, message));
        self.outbox.extend(sent);
    }

    /// What is to be sent now.
    pub(crate) fn poll(&mut self, now: Instant, relays: &Relays) -> Option<Sent> {
        while self.outbox.is_empty() {
            let (at, key) = *self.timers.first()?;
            if at > now {
                return None;
            }
            self.timers.pop_first();
            let Some(entry) = self.all.get_mut(&key) else {
                continue;
            };
            entry.timer = None;
            let way = entry.path.way();
            let errands = entry.path.poll(now);
            self.moved |= entry.path.take_ripe() || way != entry.path.way();
            self.look |= entry.path.take_look();
            for errand in errands {
                self.run(now, key, errand, relays);
            }
            self.reschedule(now, key);
            self.measure(now, key);
        }
        self.outbox.pop_front()
    }

    /// Many peers in use need a heartbeat each in two seconds.
    fn may_send(&mut self, now: Instant) -> bool {
        let peers = u32::try_from(self.all.len()).unwrap_or(u32::MAX);
        self.budget.take(now, MAX_TRANSMITS.max(peers))
    }

    fn run(&mut self, now: Instant, key: NodeKey, errand: Errand, relays: &Relays) {
        // Whoever is behind a hard NAT itself is nowhere that a peer could let in.
        if let Errand::Guess(to) = errand
            && (self.seen.is_some() || !self.guessed.take(now, to.ip()))
        {
            return;
        }
        if !self.may_send(now) {
            if let (Errand::Ping(endpoint), Some(entry)) = (errand, self.all.get_mut(&key)) {
                entry.path.unsent(endpoint);
            }
            return;
        }
        match errand {
            Errand::Ping(endpoint) | Errand::Guess(endpoint) => {
                let tx = TxId(self.dice.draw());
                if let Some(entry) = self.all.get_mut(&key) {
                    entry.path.pinged(now, endpoint, tx);
                }
                let node = Some(self.me);
                let ping = Message::Ping {
                    tx,
                    node,
                    padding: 0,
                };
                self.send(key, Via::Direct(endpoint), ping);
            }
            Errand::Call => {
                if let Some(region) = relays.region_of(&key) {
                    let endpoints = self.told_to(key);
                    let call = Message::CallMeMaybe { endpoints };
                    self.send(key, Via::Relay(region, key), call);
                }
            }
        }
    }

    /// Where a peer is told that we can be reached: by turns where a hard NAT most likely shows us to
    /// it, which may have got lost, and at other ports.
    fn told_to(&mut self, key: NodeKey) -> Vec<SocketAddr> {
        let mut endpoints = self.endpoints.clone();
        if let (Some((ip, seen)), Some(entry)) = (&self.seen, self.all.get_mut(&key))
            && !matches!(entry.path.way(), Way::Direct(_))
        {
            self.sought = true;
            let round = if entry.calls.is_multiple_of(2) {
                0
            } else {
                entry.calls / 2
            };
            entry.calls += 1;
            let ports = ports::guesses(seen, round);
            endpoints.extend(ports.into_iter().map(|port| SocketAddr::new(*ip, port)));
            endpoints.truncate(MAX_ENDPOINTS_PER_NODE);
        }
        endpoints
    }

    /// Long pings, if some are due.
    fn measure(&mut self, now: Instant, key: NodeKey) {
        let peers = u32::try_from(self.all.len()).unwrap_or(u32::MAX);
        let Some(entry) = self.all.get_mut(&key) else {
            return;
        };
        if entry.mtu.deadline().is_none_or(|at| now < at) {
            return;
        }
        let endpoint = match entry.path.way() {
            Way::Direct(endpoint) => endpoint,
            Way::Relay | Way::Blind => return,
        };
        let mut pings = Vec::new();
        if self.long.take(now, MAX_LONG_ROUNDS.max(peers / 5)) {
            for bytes in entry.mtu.poll(now) {
                let tx = TxId(self.dice.draw());
                entry.mtu.pinged(bytes, tx);
                pings.push(Message::Ping {
                    tx,
                    node: Some(self.me),
                    padding: mtu::padding(bytes, endpoint),
                });
            }
        } else {
            entry.mtu.postpone(now);
        }
        for ping in pings {
            self.send(key, Via::Direct(endpoint), ping);
        }
        self.reschedule(now, key);
    }

    /// When there is something to do at the latest.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Does something with one path, and notes what that changes.
    fn touch(&mut self, now: Instant, key: NodeKey, act: impl FnOnce(&mut Path)) {
        let Some(entry) = self.all.get_mut(&key) else {
            return;
        };
        let ways = |path: &Path| (path.wanted(), path.needs_relay());
        let before = ways(&entry.path);
        act(&mut entry.path);
        self.moved |= ways(&entry.path) != before;
        self.reschedule(now, key);
    }

    fn reschedule(&mut self, now: Instant, key: NodeKey) {
        let Some(entry) = self.all.get_mut(&key) else {
            return;
        };
        entry.mtu.follow(now, entry.seen(now, &self.ground));
        let inner = entry.mtu.inner();
        if inner != entry.inner {
            if inner < entry.inner {
                entry.path.excuse();
            }
            (entry.inner, self.moved) = (inner, true);
        }
        let deadlines = [entry.path.deadline(now), entry.mtu.deadline()];
        let at = deadlines.into_iter().flatten().min();
        if entry.timer == at {
            return;
        }
        if let Some(old) = std::mem::replace(&mut entry.timer, at) {
            self.timers.remove(&(old, key));
        }
        self.timers.extend(at.map(|at| (at, key)));
    }
}

impl Entry {
    fn seen(&self, now: Instant, ground: &Surroundings) -> Seen {
        let endpoint = match self.path.way() {
            Way::Direct(endpoint) if self.path.can_probe() => Some(endpoint),
            Way::Direct(_) | Way::Relay | Way::Blind => None,
        };
        Seen {
            endpoint,
            active: self.path.is_active(now),
            rtt: self.path.rtt(),
            links: ground.mtu,
        }
    }
}

/// Sockets of both families say IPv4 addresses in two ways.
fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
