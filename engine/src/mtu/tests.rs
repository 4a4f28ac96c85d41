//! One peer's path against a network that takes packets up to a length.
#![allow(clippy::disallowed_methods, reason = "a test brings the time")]

use super::*;
use proptest::prelude::*;

const V4: &str = "203.0.113.2:51820";
const V6: &str = "[2001:db8::2]:51820";
const RTT: Duration = Duration::from_millis(30);

struct Rig {
    mtu: Mtu,
    seen: Seen,
    start: Instant,
    now: Instant,
    /// Longer ones are lost.
    takes: u16,
    /// So many more pings are lost, whatever their length.
    lost: usize,
    sent: Vec<(Instant, u16)>,
    pongs: Vec<(Instant, TxId)>,
    /// What was known, and since when.
    history: Vec<(Instant, Option<u16>)>,
}

impl Rig {
    fn new(endpoint: &str, links: u32, takes: u16) -> Self {
        let now = Instant::now();
        let seen = Seen {
            endpoint: endpoint.parse().ok(),
            active: true,
            rtt: Some(RTT),
            links,
        };
        let mut mtu = Mtu::default();
        mtu.follow(now, seen);
        Self {
            mtu,
            seen,
            start: now,
            now,
            takes,
            lost: 0,
            sent: Vec::new(),
            pongs: Vec::new(),
            history: vec![(now, None)],
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let pong = self.pongs.iter().map(|(at, _)| *at).min();
            let next = self.mtu.deadline().into_iter().chain(pong).min();
            let Some(at) = next.filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(at);
            self.step();
        }
        self.now = end;
    }

    fn step(&mut self) {
        let now = self.now;
        for bytes in self.mtu.poll(now) {
            let number = u128::try_from(self.sent.len()).unwrap().to_be_bytes();
            let tx = TxId(number[4..].try_into().unwrap());
            self.mtu.pinged(bytes, tx);
            self.sent.push((now, bytes));
            if self.lost > 0 {
                self.lost -= 1;
            } else if bytes <= self.takes {
                self.pongs.push((now + RTT, tx));
            }
        }
        let from = self.seen.endpoint.unwrap();
        let (due, later) = self.pongs.iter().partition(|(at, _)| *at <= now);
        self.pongs = later;
        let due: Vec<(Instant, TxId)> = due;
        for (_, tx) in due {
            assert!(self.mtu.ponged(now, tx, from) || !self.mtu.is_studying());
        }
        if self.history.last().unwrap().1 != self.mtu.known() {
            self.history.push((now, self.mtu.known()));
        }
    }

    fn seconds(&mut self, seconds: u64) {
        self.pass(Duration::from_secs(seconds));
    }

    /// After how long that was known which is known now.
    fn took(&self, since: Instant) -> Duration {
        self.history.last().unwrap().0 - since
    }
}

#[test]
fn every_path_is_known_in_a_second_and_few_pings() {
    for endpoint in [V4, V6] {
        for links in [1_500, 9_000] {
            for takes in [1_280, 1_360, 1_400, 1_492, 1_500, 9_000] {
                let mut rig = Rig::new(endpoint, links, takes);
                rig.seconds(4);
                let expected = takes.min(u16::try_from(links).unwrap());
                assert_eq!(rig.mtu.known(), Some(expected), "{endpoint} {links}");
                let (took, pings) = (rig.took(rig.start), rig.sent.len());
                assert!(took <= Duration::from_millis(800), "{expected}: {took:?}");
                assert!(pings <= 26, "{expected}: {pings}");
                let overhead = if endpoint == V4 { 60 } else { 80 };
                assert_eq!(rig.mtu.inner(), Some(expected - overhead));
            }
        }
    }
    let mut rig = Rig::new(V4, 1_500, 1_500);
    rig.seconds(4);
    assert_eq!((rig.sent.len(), rig.took(rig.start)), (1, RTT));
}

#[test]
fn links_that_take_an_unusual_length_are_asked_for_that() {
    let mut rig = Rig::new(V6, 1_450, 9_000);
    rig.seconds(1);
    assert_eq!(rig.mtu.known(), Some(1_450));
    rig.seen.links = 1_300;
    rig.takes = 1_300;
    rig.mtu.follow(rig.now, rig.seen);
    rig.seconds(1);
    assert_eq!(rig.mtu.known(), Some(1_300));
}

#[test]
fn a_path_that_takes_less_than_the_floor_is_told_from_one_that_is_dead() {
    let mut rig = Rig::new(V4, 1_500, 1_124);
    rig.seconds(4);
    assert_eq!(rig.mtu.known(), Some(FLOOR));
    rig.seconds(REGROW.as_secs() + 10);
    rig.sent.clear();
    rig.seconds(REGROW.as_secs());
    assert_eq!(rig.sent, [], "there is nothing to fall to");
    let mut rig = Rig::new(V4, 1_500, 1_500);
    rig.lost = usize::MAX;
    rig.seconds(60);
    assert_eq!(rig.mtu.known(), None);
    rig.lost = 0;
    rig.seconds(10);
    assert_eq!(rig.mtu.known(), Some(1_500));
}

#[test]
fn lost_pings_are_no_verdict() {
    let mut rig = Rig::new(V4, 1_500, 1_500);
    rig.seconds(4);
    for _ in 0..100 {
        // The next one, and the long ones of the round that follows.
        rig.lost = 1;
        rig.seconds(5);
    }
    assert_eq!(rig.history.len(), 2, "{:?}", rig.history);
    // Nothing at all is answered for a while, twice: the path is ill in another way.
    for _ in 0..2 {
        rig.lost = 100;
        rig.seconds(20);
        rig.lost = 0;
        rig.seconds(20);
    }
    assert_eq!(rig.history.len(), 2, "{:?}", rig.history);
}

#[test]
fn a_path_that_shrinks_is_noticed_and_one_that_grows_too() {
    let mut rig = Rig::new(V6, 9_000, 9_000);
    rig.seconds(20);
    let from = rig.now;
    rig.takes = 1_400;
    rig.seconds(10);
    assert_eq!(rig.mtu.known(), Some(1_400));
    let took = rig.took(from);
    assert!(took <= CONFIRM + Duration::from_secs(1), "{took:?}");
    // Suspected at once, it is known in the time of a study.
    let from = rig.now;
    rig.takes = 1_360;
    rig.mtu.suspect(rig.now);
    rig.seconds(3);
    assert_eq!(rig.mtu.known(), Some(1_360));
    let took = rig.took(from);
    assert!(took <= LEAST_PATIENCE * 3, "{took:?}");
    let from = rig.now;
    rig.takes = 1_500;
    rig.seconds(100);
    assert_eq!(rig.mtu.known(), Some(1_500));
    assert!(rig.took(from) <= REGROW + CONFIRM + Duration::from_secs(1));
    let from = rig.now;
    rig.takes = 9_000;
    rig.seconds(GROW.as_secs() + 10);
    assert_eq!(rig.mtu.known(), Some(9_000));
    assert!(rig.took(from) <= GROW + CONFIRM + Duration::from_secs(1));
}

#[test]
fn an_idle_peer_costs_nothing_and_one_in_use_what_was_said() {
    for takes in [1_280, 1_400, 1_492, 1_500] {
        let mut rig = Rig::new(V4, 1_500, takes);
        rig.seconds(5);
        rig.sent.clear();
        rig.seconds(3_600);
        assert!(rig.sent.len() <= 900, "{takes}: {}", rig.sent.len());
        rig.seen.active = false;
        rig.mtu.follow(rig.now, rig.seen);
        rig.sent.clear();
        rig.seconds(3_600);
        assert_eq!(rig.sent, []);
        rig.seen.active = true;
        rig.mtu.follow(rig.now, rig.seen);
        rig.seconds(1);
        assert!(!rig.sent.is_empty(), "what it was may be over");
    }
}

#[test]
fn another_path_is_another_matter_and_one_found_at_start_is_believed() {
    let mut rig = Rig::new(V4, 1_500, 1_400);
    rig.seconds(4);
    rig.seen.endpoint = None;
    rig.mtu.follow(rig.now, rig.seen);
    assert_eq!((rig.mtu.known(), rig.mtu.deadline()), (None, None));
    rig.seen.endpoint = V6.parse().ok();
    rig.mtu.follow(rig.now, rig.seen);
    assert_eq!(rig.mtu.inner(), None);
    rig.mtu.adopt(1_320);
    assert_eq!(rig.mtu.inner(), Some(1_320));
    rig.mtu.adopt(1_420);
    assert_eq!(rig.mtu.inner(), Some(1_320), "who knows does not listen");
    rig.seconds(1);
    assert_eq!(rig.history[2..], [], "it was so, and is");
}

#[test]
fn padding_makes_a_packet_of_the_length() {
    for (endpoint, headers) in [(V4, 28), (V6, 48)] {
        for bytes in LADDER {
            let padding = padding(bytes, endpoint.parse().unwrap());
            let ping = proto::disco::Message::Ping {
                tx: TxId([0; 12]),
                node: Some(proto::key::NodeKey([1; 32])),
                padding,
            };
            let sealed = PING_BYTES - 46 + ping.encode().len();
            assert_eq!(sealed + headers, usize::from(bytes));
        }
    }
}

proptest! {
    /// Whatever the path does and whoever suspects it: no storm of pings, and no figure that was
    /// never answered.
    #[test]
    fn no_storm_and_nothing_is_invented(
        steps in prop::collection::vec((0u64..8_000, 1_000u16..9_100, 0usize..20, any::<bool>()), 1..60),
    ) {
        let mut rig = Rig::new(V4, 9_000, 1_500);
        let mut most = rig.takes;
        for (millis, takes, lost, suspect) in steps {
            rig.pass(Duration::from_millis(millis));
            (rig.takes, rig.lost) = (takes, lost);
            most = most.max(takes);
            if suspect {
                rig.mtu.suspect(rig.now);
            }
            prop_assert!(rig.mtu.known() <= Some(most.max(FLOOR)));
        }
        for (from, _) in &rig.sent {
            let window = |at: &Instant| *at >= *from && *at - *from < Duration::from_secs(1);
            let within = rig.sent.iter().filter(|(at, _)| window(at)).count();
            prop_assert!(within <= 60, "{} pings in a second", within);
        }
    }
}
