//! One path against a world of two words: which endpoints answer probes, and which carry packets.
#![allow(clippy::disallowed_methods, reason = "a test brings the time")]

mod claims;

use super::*;
use proptest::prelude::*;
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
fn a_peer_that_no_relay_has_is_tried_where_it_was_last() {
    let mut rig = Rig::new(&[LAN, WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(30));
    rig.answers.clear();
    rig.carries.clear();
    rig.pass(seconds(10));
    assert_eq!(rig.path.way(), Way::Relay);
    rig.path.set_relay(rig.now, None);
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
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
fn a_relay_that_comes_back_is_taken_by_whoever_has_no_way() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(30));
    rig.path.set_relay(rig.now, None);
    rig.shut(WAN);
    rig.pass(seconds(4));
    assert_eq!(rig.path.way(), Way::Blind);
    rig.path.set_relay(rig.now, Some((at(LOOPBACK), true)));
    assert_eq!(rig.path.wanted(), Some(at(LOOPBACK)));
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
fn roaming_is_followed_and_a_choice_that_the_peer_overrules_is_not_repeated() {
    let mut rig = Rig::new(&[WAN, SIX], true).works(WAN, 30).works(SIX, 30);
    rig.sending = true;
    rig.pass(seconds(5));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    for _ in 0..20 {
        // The peer sends from its IPv4 address.
        rig.stats.endpoint = Some(at(WAN));
        rig.stats.rx_bytes += 100;
        rig.look();
        rig.pass(seconds(10));
    }
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
    assert_eq!(rig.ways.len(), 3, "{:?}", rig.ways);
}

#[test]
fn the_kernel_is_not_left_at_the_relay_by_a_late_packet() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(5));
    rig.stats.endpoint = Some(at(LOOPBACK));
    rig.stats.rx_bytes += 100;
    rig.look();
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
}

#[test]
fn a_session_found_at_start_keeps_its_endpoint_and_is_asked() {
    let mut rig = Rig::new(&[WAN], true).works(SIX, 30);
    rig.stats = Stats {
        endpoint: Some(at(SIX)),
        last_handshake: Some(seconds(1)),
        tx_bytes: 5,
        rx_bytes: 5,
    };
    rig.look();
    rig.observe_at = rig.now + OBSERVED;
    rig.pass(seconds(30));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    rig.shut(SIX);
    rig.sending = true;
    rig.pass(seconds(8));
    assert_eq!(rig.path.way(), Way::Relay);
}

#[test]
fn a_call_is_followed_by_pings_and_not_more_often_than_it_may() {
    let mut rig = Rig::new(&[], true);
    for _ in 0..100 {
        rig.path.called(rig.now, &named(&[WAN]));
        rig.pass(Duration::from_millis(100));
    }
    let pings = rig.pings_since(rig.start);
    assert!((6..=60).contains(&pings), "{pings} in ten seconds");
    let calls = rig.calls();
    assert!((1..=6).contains(&calls), "{calls} calls in ten seconds");
}

#[test]
fn without_a_relay_the_best_candidate_is_tried_while_probes_look() {
    let mut rig = Rig::new(&[WAN, SIX], false).works(SIX, 30);
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
    assert!(!rig.path.wants_keepalive() || rig.path.is_live());
    rig.path.seek(rig.now, true);
    assert!(
        rig.path.is_mute(),
        "no greeting to an endpoint that may be the wrong one"
    );
    rig.path.owe_greeting();
    rig.pass(seconds(1));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    assert!(rig.path.take_greeting());
    assert!(!rig.path.take_greeting(), "once");
}

#[test]
fn without_a_relay_a_path_in_distress_is_looked_for_again() {
    let mut rig = Rig::new(&[WAN, SIX], false).works(WAN, 30);
    rig.path.seek(rig.now, true);
    rig.sending = true;
    rig.pass(seconds(10));
    rig.shut(WAN);
    rig.pass(seconds(5));
    rig.open(SIX, 30);
    rig.pass(seconds(15));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    rig.shut(SIX);
    rig.pass(seconds(4));
    rig.open(WAN, 30);
    rig.pass(seconds(15));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
}

#[test]
fn a_relay_that_is_lost_leaves_the_kernel_its_candidates() {
    let mut rig = Rig::new(&[WAN], true);
    rig.pass(seconds(1));
    rig.path.set_relay(rig.now, None);
    assert_eq!(
        (rig.path.way(), rig.path.wanted()),
        (Way::Blind, Some(at(WAN)))
    );
    rig.path.set_relay(rig.now, Some((at(LOOPBACK), true)));
    assert_eq!(rig.path.wanted(), Some(at(LOOPBACK)));
}

mod heartbeats;
mod links;

/// As the kernel says, of a peer that does not probe.
mod blind {
    use super::*;

    fn stats(endpoint: &str, tx_bytes: u64, rx_bytes: u64) -> Stats {
        Stats {
            endpoint: Some(at(endpoint)),
            last_handshake: (rx_bytes > 0).then_some(seconds(rx_bytes)),
            tx_bytes,
            rx_bytes,
        }
    }

    fn trying() -> (Path, Instant) {
        let mut path = Path::new(false, false, &named(&[WAN, SIX]), None);
        let start = Instant::now();
        assert_eq!(path.wanted(), Some(at(WAN)));
        path.observe(start, &stats(WAN, 0, 0), Some(Tier::Public));
        assert_eq!(
            path.wanted(),
            None,
            "once the kernel has it, nothing is left to say"
        );
        (path, start)
    }

    #[test]
    fn unanswered_handshakes_rotate_through_the_candidates() {
        let (mut path, start) = trying();
        let mut see = |second, stats: &Stats| {
            path.observe(start + seconds(second), stats, Some(Tier::Public));
            path.wanted()
        };
        assert_eq!(see(1, &stats(WAN, 148, 0)), None);
        assert_eq!(
            see(5, &stats(WAN, 148, 0)),
            None,
            "not before its patience ends"
        );
        assert_eq!(see(6, &stats(WAN, 296, 0)), Some(at(SIX)));
        assert_eq!(see(7, &stats(SIX, 444, 0)), None);
        assert_eq!(
            see(12, &stats(SIX, 592, 0)),
            Some(at(WAN)),
            "round and round"
        );
    }

    #[test]
    fn roaming_is_followed_and_a_dead_session_is_given_longer() {
        let (mut path, start) = trying();
        let third = "203.0.113.3:1";
        let see = |path: &mut Path, second, stats: &Stats| {
            path.observe(start + seconds(second), stats, Some(Tier::Public));
            path.wanted()
        };
        see(&mut path, 1, &stats(third, 148, 92));
        assert!(path.is_live());
        path.set_candidates(&named(&[SIX, WAN]));
        assert_eq!(see(&mut path, 2, &stats(third, 9_000, 92)), None);
        assert_eq!(see(&mut path, 21, &stats(third, 9_148, 92)), None);
        assert_eq!(see(&mut path, 22, &stats(third, 9_296, 92)), Some(at(SIX)));
    }

    #[test]
    fn an_idle_peer_and_keepalives_alone_are_left_alone_for_ever() {
        let (mut path, start) = trying();
        for hour in 1..100 {
            path.observe(
                start + seconds(3600 * hour),
                &stats(WAN, 0, 0),
                Some(Tier::Public),
            );
            assert_eq!(path.wanted(), None);
        }
        path.observe(
            start + seconds(400_000),
            &stats(WAN, 148, 92),
            Some(Tier::Public),
        );
        for n in 1..20 {
            let now = start + seconds(400_000 + 25 * n);
            path.observe(now, &stats(WAN, 148 + 32 * n, 92), Some(Tier::Public));
            assert_eq!((path.is_live(), path.wanted()), (true, None));
        }
    }
}

/// What an adversary on the way, or chance, may do.
#[derive(Clone, Debug)]
enum Mischief {
    /// A ping of the peer, replayed from anywhere.
    Ping(usize),
    /// A call, replayed.
    Call(usize),
    Relayed,
    /// An endpoint begins or ceases to answer, or to carry.
    Answer(usize, bool),
    Carry(usize, bool),
    /// A packet of the peer by the other way.
    Roam(usize),
    Traffic(bool),
    News,
}

fn mischief() -> impl Strategy<Value = Mischief> {
    let which = 0usize..4;
    prop_oneof![
        which.clone().prop_map(Mischief::Ping),
        which.clone().prop_map(Mischief::Call),
        Just(Mischief::Relayed),
        (which.clone(), any::<bool>()).prop_map(|(it, on)| Mischief::Answer(it, on)),
        (which.clone(), any::<bool>()).prop_map(|(it, on)| Mischief::Carry(it, on)),
        which.prop_map(Mischief::Roam),
        any::<bool>().prop_map(Mischief::Traffic),
        Just(Mischief::News),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is replayed and whatever breaks: what is wanted is the relay or a candidate, a way
    /// back to a direct path is not taken twice in ten seconds, and no storm of probes goes out.
    #[test]
    fn nothing_makes_it_flap_or_storm(
        steps in prop::collection::vec((0u64..3_000, mischief()), 1..80),
    ) {
        let pool = [LAN, WAN, SIX, "203.0.113.77:7"];
        let mut rig = Rig::new(&[LAN, WAN], true);
        for (millis, step) in steps {
            rig.pass(Duration::from_millis(millis));
            let now = rig.now;
            match step {
                Mischief::Ping(which) => {
                    let from = at(pool[which]);
                    rig.path.pinged_by(now, tier(from), from);
                }
                Mischief::Call(which) => rig.path.called(now, &named(&[pool[which]])),
                Mischief::Relayed => rig.path.relayed(now),
                Mischief::Answer(which, true) => {
                    rig.answers.insert(at(pool[which]), Duration::from_millis(20));
                }
                Mischief::Answer(which, false) => {
                    rig.answers.remove(&at(pool[which]));
                }
                Mischief::Carry(which, true) => {
                    rig.carries.insert(at(pool[which]));
                }
                Mischief::Carry(which, false) => {
                    rig.carries.remove(&at(pool[which]));
                }
                // The kernel moves for authenticated packets alone, which only the peer can send.
                Mischief::Roam(which) if matches!(rig.path.way(), Way::Direct(_)) => {
                    rig.stats.endpoint = Some(at(pool[which]));
                    rig.stats.rx_bytes += 100;
                    rig.look();
                }
                Mischief::Roam(_) => {}
                Mischief::Traffic(on) => rig.sending = on,
                Mischief::News => rig.path.seek(now, true),
            }
            rig.settle();
            if let Some(wanted) = rig.path.wanted() {
                let known = rig.path.candidates().contains_key(&wanted);
                prop_assert!(known || wanted == at(LOOPBACK));
            }
        }
        rig.pass(seconds(5));
        let turns = rig.ways.windows(2);
        let returns = turns.filter(|pair| pair[0].1 == Way::Relay).map(|pair| pair[1].0);
        let returns: Vec<Instant> = returns.collect();
        for pair in returns.windows(2) {
            prop_assert!(pair[1] - pair[0] >= HOLD, "{:?}", rig.ways);
        }
        for (from, _) in &rig.sent {
            let within = rig.sent.iter().filter(|(at, _)| *at >= *from && *at - *from < seconds(1));
            prop_assert!(within.count() <= 60);
        }
    }
}

#[test]
fn who_is_suddenly_seen_elsewhere_says_so_in_a_packet() {
    let mut rig = Rig::new(&[WAN], false).works(WAN, 20);
    rig.sending = true;
    rig.pass(seconds(10));
    while rig.path.take_greeting() {}
    rig.pass(seconds(10));
    assert!(!rig.path.take_greeting(), "nothing changed");
    rig.appears = at("198.51.100.1:20001");
    rig.pass(seconds(3));
    assert!(rig.path.take_greeting());
    rig.pass(seconds(10));
    assert!(!rig.path.take_greeting(), "once");
}

#[test]
fn who_is_seen_elsewhere_before_the_session_is_known_says_so_when_it_is() {
    let mut rig = Rig::new(&[WAN], false).works(WAN, 20);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(50));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    while rig.path.take_greeting() {}
    rig.appears = at("198.51.100.1:20001");
    rig.path.heart.check(rig.now);
    rig.pass(Duration::from_millis(50));
    assert!(!rig.path.is_live() && !rig.path.take_greeting());
    rig.sending = true;
    rig.pass(seconds(5));
    assert!(rig.path.is_live() && rig.path.take_greeting());
    rig.pass(seconds(10));
    assert!(!rig.path.take_greeting(), "once");
}

#[test]
fn the_first_look_at_a_peer_that_was_just_made_sees_that_it_is_in_use() {
    let mut rig = Rig::new(&[WAN], false).works(WAN, 20);
    // As the plan leaves it that makes the peer.
    rig.look();
    rig.path.seek(rig.now, true);
    rig.sending = true;
    rig.pass(OBSERVED + Duration::from_millis(100));
    assert!(rig.path.is_active(rig.now));
    assert!(rig.path.heart.next.is_some(), "and is asked");
}

#[test]
fn a_call_that_comes_late_in_a_burst_is_followed_at_once() {
    let mut rig = Rig::new(&[WAN], true);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(1_700));
    let before = rig.now;
    rig.path.called(before, &named(&[WAN]));
    rig.pass(Duration::from_millis(10));
    assert_eq!(rig.pings_since(before), 1, "the next round was 1.5 s away");
}

#[test]
fn whoever_is_called_hears_of_new_endpoints_at_once() {
    let mut rig = Rig::new(&[WAN], true);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(500));
    assert_eq!(rig.calls(), 1);
    rig.path.recall(rig.now);
    rig.pass(Duration::from_millis(10));
    assert_eq!(rig.calls(), 2);
    rig.pass(seconds(2));
    assert_eq!(rig.calls(), 2);
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
