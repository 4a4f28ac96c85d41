//! One path against a world of two words: which endpoints answer probes, and which carry packets.
#![allow(clippy::disallowed_methods, reason = "a test brings the time")]

mod blind;
mod calls;
mod claims;
mod heartbeats;
mod kernel;
mod links;
mod mischief;
mod relays;

use super::*;
use proto::disco::{Took, TxId};

const LAN: &str = "10.1.0.2:51820";
const WAN: &str = "203.0.113.2:40001";
const SIX: &str = "[2001:db8::2]:51820";
const LOOPBACK: &str = "127.64.0.9:51821";
const OBSERVED: Duration = Duration::from_secs(2);

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn tier(addr: SocketAddr) -> Tier {
    if addr == at(LAN) {
        Tier::OnLink
    } else {
        Tier::Public
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn named(candidates: &[&str]) -> Vec<(Tier, SocketAddr)> {
    let mut named: Vec<_> = candidates.iter().map(|it| (tier(at(it)), at(it))).collect();
    named.sort_by_key(|(tier, _)| *tier);
    named
}

/// A path, and a kernel that does as it is told.
struct Rig {
    path: Path,
    start: Instant,
    now: Instant,
    /// Who answers probes, and how soon.
    answers: BTreeMap<SocketAddr, Duration>,
    /// By which endpoints packets get answers.
    carries: BTreeSet<SocketAddr>,
    /// Whether somebody sends.
    sending: bool,
    stats: Stats,
    pongs: BTreeMap<Instant, Vec<(TxId, SocketAddr)>>,
    sent: Vec<(Instant, Errand)>,
    ways: Vec<(Instant, Way)>,
    drawn: u64,
    observe_at: Instant,
    /// As whom the peer sees us.
    appears: SocketAddr,
    /// Whether the peer's pongs say what its kernel took,
    tells: bool,
    /// and what that is, in bytes.
    taken: u64,
    /// Whether the peer only listens: its kernel sends a keepalive every 10 s.
    listens: bool,
    keepalive_at: Instant,
}

impl Rig {
    fn new(candidates: &[&str], relay: bool) -> Self {
        let relay = relay.then_some((at(LOOPBACK), true));
        let path = Path::new(true, false, &named(candidates), relay);
        let start = Instant::now();
        Self {
            ways: vec![(start, path.way())],
            path,
            start,
            now: start,
            answers: BTreeMap::new(),
            carries: [at(LOOPBACK)].into(),
            sending: false,
            stats: Stats::default(),
            pongs: BTreeMap::new(),
            sent: Vec::new(),
            drawn: 0,
            observe_at: start,
            appears: at("198.51.100.1:20000"),
            tells: false,
            taken: 0,
            listens: false,
            keepalive_at: start,
        }
    }

    /// It answers probes and carries packets.
    fn works(mut self, addr: &str, millis: u64) -> Self {
        self.open(addr, millis);
        self
    }

    fn open(&mut self, addr: &str, millis: u64) {
        self.answers.insert(at(addr), Duration::from_millis(millis));
        self.carries.insert(at(addr));
    }

    fn shut(&mut self, addr: &str) {
        self.answers.remove(&at(addr));
        self.carries.remove(&at(addr));
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.settle();
            let pong = self.pongs.keys().next().copied();
            let deadline = self.path.deadline(self.now);
            let next = [Some(self.observe_at), pong, deadline];
            let next = next.into_iter().flatten().fold(end, Instant::min);
            self.now = next.max(self.now);
            if next >= end {
                return;
            }
            if pong.is_some_and(|pong| pong <= self.now) {
                let (_, pongs) = self.pongs.pop_first().unwrap();
                for (tx, from) in pongs {
                    let took = self.tells.then_some(Took {
                        bytes: self.taken,
                        ago_ms: 0,
                    });
                    self.path.ponged(self.now, tx, from, self.appears, took);
                }
            }
            if self.observe_at <= self.now {
                self.observe();
            }
        }
    }

    fn settle(&mut self) {
        for turn in 0.. {
            assert!(turn < 20, "the path does not come to rest");
            let errands = self.path.poll(self.now);
            for errand in errands {
                self.sent.push((self.now, errand));
                if let Errand::Ping(endpoint) = errand {
                    self.ping(endpoint);
                }
            }
            if self.path.deadline(self.now).is_none_or(|at| at > self.now) {
                break;
            }
        }
        if self.path.take_look() {
            self.observe_at = self.now;
        }
        if self.ways.last().unwrap().1 != self.path.way() {
            self.ways.push((self.now, self.path.way()));
        }
    }

    fn ping(&mut self, endpoint: SocketAddr) {
        self.drawn += 1;
        let mut tx = [0; 12];
        tx[..8].copy_from_slice(&self.drawn.to_be_bytes());
        self.path.pinged(self.now, endpoint, TxId(tx));
        if let Some(rtt) = self.answers.get(&endpoint) {
            let pongs = self.pongs.entry(self.now + *rtt).or_default();
            pongs.push((TxId(tx), endpoint));
        }
    }

    fn observe(&mut self) {
        if let Some(wanted) = self.path.wanted() {
            self.stats.endpoint = Some(wanted);
        }
        if self.sending {
            self.stats.tx_bytes += 5_000;
            let carried = |it| self.carries.contains(&it);
            if self.stats.endpoint.is_some_and(carried) {
                self.taken += 5_000;
                self.answer();
            }
        }
        self.look();
        let tick = if self.path.is_watched(self.now) {
            seconds(1)
        } else {
            OBSERVED
        };
        self.observe_at = self.now + tick;
    }

    /// What the peer sends back for what it took.
    fn answer(&mut self) {
        if !self.listens {
            self.stats.rx_bytes += 5_000;
            self.stats.last_handshake = Some(seconds(1));
        } else if self.now >= self.keepalive_at {
            self.stats.rx_bytes += KEEPALIVE_BYTES;
            self.keepalive_at = self.now + seconds(10);
        }
    }

    fn look(&mut self) {
        let endpoint = self.stats.endpoint.filter(|it| !it.ip().is_loopback());
        self.path.observe(self.now, &self.stats, endpoint.map(tier));
    }

    /// When the way last changed, since the start of the test.
    fn changed(&self) -> Duration {
        self.ways.last().unwrap().0 - self.start
    }

    fn pings_since(&self, since: Instant) -> usize {
        let pings = self.sent.iter().filter(|(at, _)| *at >= since);
        pings
            .filter(|(_, it)| matches!(it, Errand::Ping(_)))
            .count()
    }

    fn calls(&self) -> usize {
        self.sent
            .iter()
            .filter(|(_, it)| *it == Errand::Call)
            .count()
    }
}

#[test]
fn a_peer_starts_at_the_relay_and_traffic_makes_it_direct() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.pass(seconds(60));
    assert_eq!(rig.path.wanted(), Some(at(LOOPBACK)));
    assert_eq!(rig.sent, [], "an idle peer is left alone");
    let first = rig.now;
    rig.path.relayed(first);
    rig.sending = true;
    rig.pass(Duration::from_millis(31));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
    assert_eq!(rig.calls(), 1, "both sides ping at once");
    rig.pass(seconds(600));
    assert_eq!(rig.ways.len(), 2, "and there it stays: {:?}", rig.ways);
}

#[test]
fn an_idle_direct_path_stays_and_nothing_is_sent() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(10));
    rig.sending = false;
    rig.pass(ACTIVE + seconds(5));
    let idle = rig.now;
    rig.pass(seconds(3600));
    assert_eq!(rig.pings_since(idle), 0);
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    // A keepalive and a handshake of the kernel are no traffic.
    for _ in 0..10 {
        rig.stats.tx_bytes += 148 + 32;
        rig.stats.rx_bytes += 92;
        rig.stats.last_handshake = rig.stats.last_handshake.map(|at| at + seconds(120));
        rig.pass(seconds(120));
    }
    assert_eq!(rig.pings_since(idle), 0);
}

#[test]
fn a_path_that_falls_silent_is_given_up_in_time_and_taken_again_when_it_is_back() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(30));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    rig.shut(WAN);
    let cut = rig.now - rig.start;
    rig.pass(seconds(4));
    assert_eq!(rig.path.way(), Way::Relay);
    let taken = rig.changed() - cut;
    assert!(taken <= Duration::from_millis(3_600), "{taken:?}");
    rig.pass(seconds(20));
    rig.open(WAN, 30);
    rig.pass(probe::AGAIN[3]);
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
}

#[test]
fn a_peer_whose_agent_is_dead_keeps_the_path_that_its_kernel_answers_on() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(30));
    rig.answers.clear();
    rig.carries.remove(&at(LOOPBACK));
    rig.pass(seconds(300));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)), "{:?}", rig.ways);
    assert_eq!(rig.ways.len(), 2, "{:?}", rig.ways);
}

#[test]
fn packets_that_the_relay_brings_are_no_proof_of_a_direct_path() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(30));
    rig.answers.clear();
    for _ in 0..40 {
        rig.path.relayed(rig.now);
        rig.pass(Duration::from_millis(100));
    }
    assert_eq!(rig.path.way(), Way::Relay);
}

#[test]
fn a_peer_that_comes_by_relay_while_the_path_is_in_doubt_is_answered_there() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(30));
    rig.path.relayed(rig.now);
    rig.pass(seconds(1));
    assert_eq!(
        rig.path.way(),
        Way::Direct(at(WAN)),
        "a late packet moves nothing"
    );
    rig.shut(WAN);
    while rig.path.heart.unanswered < DOUBT {
        rig.pass(Duration::from_millis(50));
    }
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    rig.path.relayed(rig.now);
    assert_eq!(rig.path.way(), Way::Relay);
}

#[test]
fn a_lost_ping_is_no_distress() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(5));
    for _ in 0..200 {
        rig.answers.clear();
        rig.pass(Duration::from_millis(1_000));
        rig.open(WAN, 30);
        rig.pass(Duration::from_millis(2_700));
    }
    assert_eq!(rig.ways.len(), 2, "{:?}", rig.ways);
}

#[test]
fn another_candidate_takes_over_when_the_one_in_use_is_in_doubt() {
    let mut rig = Rig::new(&[WAN, SIX], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(20));
    rig.shut(WAN);
    rig.open(SIX, 50);
    rig.pass(seconds(3));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    assert!(
        rig.ways
            .iter()
            .all(|(at, way)| *way != Way::Relay || *at == rig.start)
    );
}

#[test]
fn a_path_that_swallows_packets_is_given_up_and_not_answered() {
    let mut rig = Rig::new(&[WAN], true);
    rig.sending = true;
    rig.pass(seconds(3));
    // Probes pass, packets do not.
    rig.answers.insert(at(WAN), Duration::from_millis(30));
    rig.path.relayed(rig.now);
    rig.path.called(rig.now, &named(&[WAN]));
    while rig.path.way() == Way::Relay {
        rig.pass(Duration::from_millis(100));
    }
    let taken = rig.changed();
    rig.pass(seconds(6));
    assert_eq!(rig.path.way(), Way::Relay);
    let lasted = rig.changed() - taken;
    assert!(lasted <= seconds(5), "{lasted:?}");
    assert!(!rig.path.pinged_by(rig.now, Tier::Public, at(WAN)));
    let calls = rig.calls();
    assert!(calls >= 2, "the other side is told to look: {calls}");
    rig.pass(seconds(600));
    let turns = rig
        .ways
        .iter()
        .filter(|(_, way)| *way == Way::Direct(at(WAN)))
        .count();
    assert!(
        (2..=7).contains(&turns),
        "tried again, less and less: {turns}"
    );
    rig.open(WAN, 30);
    rig.pass(candidate::LONGEST_SWALLOWED_PAUSE + seconds(120));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
}

#[test]
fn a_peer_that_has_just_nothing_to_say_keeps_its_direct_path() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(20));
    // From now on nothing comes back, whichever way is taken.
    rig.carries.clear();
    rig.pass(seconds(8));
    assert_eq!(rig.path.way(), Way::Relay, "it might be the path");
    rig.pass(seconds(20));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)), "it was not");
    let before = rig.ways.len();
    rig.pass(seconds(600));
    assert_eq!(rig.ways.len(), before);
}

#[test]
fn nearer_wins_at_once_and_faster_when_it_is_worth_it() {
    let mut rig = Rig::new(&[WAN, LAN], true).works(WAN, 5).works(LAN, 40);
    rig.sending = true;
    rig.pass(seconds(3));
    assert_eq!(rig.path.way(), Way::Direct(at(LAN)));
    assert_eq!(rig.ways.len(), 3, "{:?}", rig.ways);
    rig.pass(seconds(300));
    assert_eq!(rig.ways.len(), 3, "{:?}", rig.ways);
}

#[test]
fn a_path_that_was_just_asked_when_traffic_begins_is_asked_again_in_time() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 20);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(30));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    rig.path.relayed(rig.now);
    let before = rig.now;
    rig.pass(probe::HEARTBEAT + Duration::from_millis(100));
    assert!(rig.pings_since(before) > 0, "{:?}", rig.sent);
}
