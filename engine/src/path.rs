//! One peer's [`Path`]: which of its endpoints the kernel should send to.
//!
//! A peer reports where it may be reached and the coordinator adds where it saw it: the
//! *candidates*, ranked by [`rank`]. The kernel sends to one endpoint at a time and moves it by
//! itself to wherever an authenticated packet came from ("roaming", WireGuard paper 2.1). So there
//! are two truths, kept apart: what we **want** and what is **observed**, and the rule is never to
//! fight the second with the first:
//!
//! - A new peer gets the best candidate.
//! - While packets come back, nothing is written, whatever the candidates say. Roaming is followed.
//! - Only *distress* moves us: we send and nothing comes back for [`PATIENCE_TRYING`] (no session
//!   yet) or [`PATIENCE_LIVE`] (there was one). Then the next candidate is wanted, once, round and
//!   round. A peer to which nobody sends is never in distress, so an idle mesh writes nothing.
//!
//! Distress is seen in the kernel's byte counters: handshakes count on both sides, and a live peer
//! answers data within 10 s (WireGuard paper 6.5), so `sent grew, received did not` for longer than
//! that means that the endpoint is dead. No clock of the kernel is compared with ours.
//!
//! **Calls.** Where NATs are about, a hole must be open on both sides before a handshake passes, and
//! the kernel starts one only every 5 s (`REKEY_TIMEOUT`). So when a path that does not work gets
//! news of either end's addresses ([`Path::strive`]), the peer is *called* a few times in quick
//! succession, at its best candidates in turn: made anew in the kernel, which forgets when it last
//! tried, and greeted. The other side does the same at about the same time, for the same netmap told
//! it; the node with the greater key [`YIELD`]s, because two handshakes that cross cancel each other.
//! A path that works is never called, so no session is ever lost to this.
//!
//! Relays are not here.

use crate::plan::Stats;
use proto::net::Prefix;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Sending without an answer for this long, with no session yet, is distress: one handshake
/// attempt (`REKEY_TIMEOUT`, 5 s) has then gone unanswered.
pub const PATIENCE_TRYING: Duration = Duration::from_secs(5);
/// Sending without an answer for this long, on a path that worked, is distress: a live peer sends
/// at least a keepalive within `KEEPALIVE_TIMEOUT` (10 s), and `KEEPALIVE_TIMEOUT +
/// REKEY_TIMEOUT` (15 s) later the kernel itself starts a new handshake.
pub const PATIENCE_LIVE: Duration = Duration::from_secs(20);

/// A keepalive: an empty data message (WireGuard paper 5.4.6). It is not answered.
const KEEPALIVE_BYTES: u64 = 32;
/// Between two calls: time for a handshake around the world.
pub const CALL_PAUSE: Duration = Duration::from_millis(700);
/// How much later than the other one the node with the greater key calls.
pub const YIELD: Duration = Duration::from_millis(300);
/// Candidates that are called, the best ones: each takes its time.
const CALLED: usize = 4;

/// How we reach one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    candidates: Vec<SocketAddr>,
    /// What the kernel is to be told; `None` while it is to be left alone.
    wanted: Option<SocketAddr>,
    /// What was last observed; `None` before the first observation.
    seen: Option<Stats>,
    /// Whether anything came back on the endpoint in use.
    live: bool,
    /// Since when we send without an answer.
    silent_since: Option<Instant>,
    /// Calls under way.
    calls: Option<Calls>,
    /// Whether it was ever called.
    called: bool,
}

/// One call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Where to.
    pub endpoint: SocketAddr,
    /// Whether the kernel must forget when it tried last. The first call needs that not, and then
    /// harms no session that begins at the same moment.
    pub anew: bool,
}

/// Calls of a peer, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calls {
    next: Instant,
    made: usize,
}

/// How good a candidate is, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// In a network that one of our own interfaces is in.
    OnLink,
    /// A route leads there.
    Routed,
    /// No route leads there now; one may come.
    Unrouted,
}

/// What [`rank`] must know of this host.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Our own addresses. Hosts share some by convention (container bridges): such a candidate
    /// would reach ourselves.
    pub own: &'a BTreeSet<IpAddr>,
    /// Networks that our interfaces are in, the WireGuard device's excepted.
    pub on_link: &'a Cover,
    /// Where the host's own routes lead, the WireGuard device's excepted.
    pub routed: &'a Cover,
    /// What is reached through the tunnel: an endpoint in there would be a loop.
    pub tunnelled: &'a Cover,
}

/// The addresses of many prefixes: a question costs one look-up for each length in use, however
/// many prefixes there are.
#[derive(Clone, Debug, Default)]
pub struct Cover {
    prefixes: BTreeSet<Prefix>,
    lengths: BTreeSet<u8>,
}

impl FromIterator<Prefix> for Cover {
    fn from_iter<I: IntoIterator<Item = Prefix>>(prefixes: I) -> Self {
        let prefixes: BTreeSet<Prefix> = prefixes.into_iter().collect();
        let lengths = prefixes.iter().map(Prefix::len).collect();
        Self { prefixes, lengths }
    }
}

impl Cover {
    /// Whether a prefix contains `addr`.
    #[must_use]
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.lengths.iter().any(|len| {
            let around = Prefix::containing(addr, *len);
            around.is_ok_and(|around| self.prefixes.contains(&around))
        })
    }
}

/// The candidates that can be used, best first. The order that the coordinator gave decides among
/// equals, so the result is the same wherever it is computed.
#[must_use]
pub fn rank(candidates: &[SocketAddr], host: Surroundings<'_>) -> Vec<SocketAddr> {
    let mut seen = BTreeSet::new();
    let mut ranked: Vec<(Rank, SocketAddr)> = candidates
        .iter()
        .filter(|candidate| is_usable(candidate) && seen.insert(**candidate))
        .filter(|candidate| !host.own.contains(&candidate.ip()))
        .filter(|candidate| !host.tunnelled.contains(candidate.ip()))
        .map(|candidate| {
            let rank = if host.on_link.contains(candidate.ip()) {
                Rank::OnLink
            } else if host.routed.contains(candidate.ip()) {
                Rank::Routed
            } else {
                Rank::Unrouted
            };
            (rank, *candidate)
        })
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, candidate)| candidate).collect()
}

fn is_usable(candidate: &SocketAddr) -> bool {
    let ip = candidate.ip();
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    candidate.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !ip.is_loopback()
        && !link_local
}

impl Path {
    /// The path of a peer that was just learned, with its candidates in order of preference.
    #[must_use]
    pub fn new(candidates: Vec<SocketAddr>) -> Self {
        Self {
            wanted: candidates.first().copied(),
            candidates,
            seen: None,
            live: false,
            silent_since: None,
            calls: None,
            called: false,
        }
    }

    /// What the kernel is to be told now, if anything.
    #[must_use]
    pub fn wanted(&self) -> Option<SocketAddr> {
        self.wanted
    }

    /// Whether packets come back on the endpoint in use, as far as was observed.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// The peer may be reached elsewhere from now on. A path that works, or is being tried at an
    /// endpoint that is still a candidate, is not disturbed. Returns whether that is news.
    pub fn set_candidates(&mut self, candidates: Vec<SocketAddr>) -> bool {
        if self.candidates == candidates {
            return false;
        }
        self.candidates = candidates;
        let current = self
            .wanted
            .or(self.seen.as_ref().and_then(|stats| stats.endpoint));
        let still_there = current.is_some_and(|endpoint| self.candidates.contains(&endpoint));
        if !self.live && !still_there {
            self.wanted = self.candidates.first().copied();
            self.silent_since = None;
        }
        true
    }

    /// Calls the peer from `now` on, unless the path works. `first`: whether the other side yields.
    pub fn strive(&mut self, now: Instant, first: bool) {
        let next = if first { now } else { now + YIELD };
        let calls = Calls { next, made: 0 };
        self.calls = (!self.live && !self.candidates.is_empty()).then_some(calls);
    }

    /// When the next call is due, if one is.
    #[must_use]
    pub fn next_call(&self) -> Option<Instant> {
        self.calls.map(|calls| calls.next)
    }

    /// The call to make now, if one is due. To be asked right after [`Path::observe`], so
    /// that no handshake that just succeeded is undone.
    pub fn call(&mut self, now: Instant) -> Option<Call> {
        let calls = self.calls.filter(|calls| now >= calls.next)?;
        let called = self.candidates.len().min(CALLED);
        if self.live || calls.made >= 2 * called + 2 {
            self.calls = None;
            return None;
        }
        self.calls = Some(Calls {
            next: now + CALL_PAUSE,
            made: calls.made + 1,
        });
        self.wanted = None;
        self.silent_since = None;
        let anew = std::mem::replace(&mut self.called, true);
        let endpoint = self.candidates.get(calls.made % called).copied()?;
        Some(Call { endpoint, anew })
    }

    /// What the kernel says of the peer now.
    pub fn observe(&mut self, now: Instant, stats: &Stats) {
        if self.wanted == stats.endpoint {
            self.wanted = None;
        }
        let Some(before) = self.seen.replace(stats.clone()) else {
            // First sight: of a peer just made, or of one found at start. A session that is there
            // is believed until it proves otherwise, and its endpoint is the kernel's to know.
            self.live = stats.last_handshake.is_some();
            if self.live && stats.endpoint.is_some() {
                self.wanted = None;
            }
            return;
        };
        let answered =
            stats.rx_bytes > before.rx_bytes || stats.last_handshake > before.last_handshake;
        let restarted = stats.tx_bytes < before.tx_bytes;
        if answered || restarted {
            self.live = answered;
            self.silent_since = None;
            if answered && stats.endpoint.is_some() {
                self.wanted = None;
            }
            return;
        }
        let sent = stats.tx_bytes.saturating_sub(before.tx_bytes);
        // A keepalive asks for nothing.
        if sent > 0 && sent != KEEPALIVE_BYTES && self.silent_since.is_none() {
            self.silent_since = Some(now);
        }
        let patience = if self.live {
            PATIENCE_LIVE
        } else {
            PATIENCE_TRYING
        };
        let distress = self
            .silent_since
            .is_some_and(|since| now.saturating_duration_since(since) >= patience);
        if distress {
            self.try_next(stats.endpoint);
        }
    }

    fn try_next(&mut self, current: Option<SocketAddr>) {
        self.live = false;
        self.silent_since = None;
        let position = self
            .candidates
            .iter()
            .position(|candidate| Some(*candidate) == current);
        let next = position.map_or(0, |position| position + 1);
        let next = self
            .candidates
            .get(next)
            .or_else(|| self.candidates.first());
        self.wanted = next.copied().filter(|next| Some(*next) != current);
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test brings the time")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn stats(endpoint: &str, tx_bytes: u64, rx_bytes: u64) -> Stats {
        Stats {
            endpoint: Some(at(endpoint)),
            last_handshake: (rx_bytes > 0).then_some(Duration::from_secs(rx_bytes)),
            tx_bytes,
            rx_bytes,
        }
    }

    const A: &str = "192.0.2.1:51820";
    const B: &str = "192.0.2.2:51820";
    const C: &str = "[2001:db8::3]:51820";

    fn trying() -> (Path, Instant) {
        let (mut path, start) = (Path::new(vec![at(A), at(B)]), Instant::now());
        assert_eq!(path.wanted(), Some(at(A)));
        path.observe(start, &stats(A, 0, 0));
        assert_eq!(
            path.wanted(),
            None,
            "once the kernel has it, nothing is left to say"
        );
        (path, start)
    }

    #[test]
    fn an_idle_peer_is_left_alone_for_ever() {
        let (mut path, start) = trying();
        for hour in 1..100 {
            path.observe(start + Duration::from_secs(3600 * hour), &stats(A, 0, 0));
            assert_eq!(path.wanted(), None);
        }
    }

    #[test]
    fn unanswered_handshakes_rotate_through_the_candidates() {
        let (mut path, start) = trying();
        let second = Duration::from_secs(1);
        path.observe(start + second, &stats(A, 148, 0));
        path.observe(start + second * 5, &stats(A, 148, 0));
        assert_eq!(path.wanted(), None, "not before its patience ends");
        path.observe(start + second * 6, &stats(A, 296, 0));
        assert_eq!(path.wanted(), Some(at(B)));
        path.observe(start + second * 7, &stats(B, 444, 0));
        assert_eq!(path.wanted(), None);
        path.observe(start + second * 12, &stats(B, 592, 0));
        assert_eq!(path.wanted(), Some(at(A)), "round and round");
    }

    #[test]
    fn roaming_is_followed_and_not_fought() {
        let (mut path, start) = trying();
        path.observe(start + Duration::from_secs(1), &stats(C, 148, 92));
        assert!(path.is_live());
        path.set_candidates(vec![at(B), at(A)]);
        path.observe(start + Duration::from_secs(2), &stats(C, 1000, 1000));
        assert_eq!(path.wanted(), None);
    }

    #[test]
    fn a_dead_session_is_given_longer_and_then_moves() {
        let (mut path, start) = trying();
        let second = Duration::from_secs(1);
        path.observe(start + second, &stats(A, 148, 92));
        path.observe(start + second * 2, &stats(A, 9000, 92));
        path.observe(start + second * 21, &stats(A, 9148, 92));
        assert_eq!(path.wanted(), None);
        path.observe(start + second * 22, &stats(A, 9296, 92));
        assert_eq!(path.wanted(), Some(at(B)));
    }

    #[test]
    fn a_session_found_at_start_keeps_its_endpoint() {
        let mut path = Path::new(vec![at(A)]);
        path.observe(Instant::now(), &stats(C, 5, 5));
        assert_eq!(path.wanted(), None);
    }

    #[test]
    fn loops_and_unusable_candidates_are_left_out_and_near_ones_come_first() {
        let prefix = |text: &str| Cover::from_iter([text.parse().unwrap()]);
        let candidates = [
            "100.64.0.1:1",
            "198.51.100.1:1",
            "10.1.0.1:1",
            "127.0.0.1:1",
            "10.1.0.1:0",
            "172.17.0.1:1",
            "10.1.0.1:1",
            "[2001:db8::1]:1",
        ];
        let ranked = rank(
            &candidates.map(at),
            Surroundings {
                own: &BTreeSet::from(["172.17.0.1".parse().unwrap()]),
                on_link: &prefix("10.1.0.0/24"),
                routed: &prefix("0.0.0.0/0"),
                tunnelled: &prefix("100.64.0.0/10"),
            },
        );
        let expected = ["10.1.0.1:1", "198.51.100.1:1", "[2001:db8::1]:1"];
        assert_eq!(ranked, expected.map(at));
    }

    #[test]
    fn calls_take_the_candidates_in_turn_until_one_answers() {
        let (mut path, start) = trying();
        let mut called: Vec<Call> = Vec::new();
        path.strive(start, true);
        let mut now = start;
        while let Some(next) = path.next_call() {
            now = next;
            path.observe(now, &stats(A, 0, 0));
            called.extend(path.call(now));
        }
        let anew: Vec<bool> = called.iter().map(|call| call.anew).collect();
        assert_eq!(anew, [false, true, true, true, true, true]);
        let called: Vec<SocketAddr> = called.iter().map(|call| call.endpoint).collect();
        assert_eq!(called, [A, B, A, B, A, B].map(at));
        assert!(now - start <= CALL_PAUSE * 6);
        path.strive(now, false);
        assert_eq!(
            path.next_call(),
            Some(now + YIELD),
            "the other one goes first"
        );
        path.observe(now, &stats(B, 148, 92));
        assert_eq!(path.call(now + YIELD), None);
        assert_eq!(path.next_call(), None, "a path that works is not called");
        path.strive(now, true);
        assert_eq!(path.next_call(), None);
    }

    #[test]
    fn keepalives_alone_are_no_distress() {
        let (mut path, start) = trying();
        path.observe(start, &stats(A, 148, 92));
        for n in 1..20 {
            let now = start + Duration::from_secs(25 * n);
            path.observe(now, &stats(A, 148 + 32 * n, 92));
            assert_eq!((path.is_live(), path.wanted()), (true, None));
        }
    }

    proptest! {
        /// However often news come, a path that works is never called, and calls keep their pace.
        #[test]
        fn calls_never_disturb_and_never_hurry(
            steps in prop::collection::vec((0u64..900, any::<bool>(), 0u64..2), 1..80),
        ) {
            let (mut path, mut now) = trying();
            let (mut tx, mut rx, mut last) = (0, 0, None::<Instant>);
            for (millis, news, received) in steps {
                now += Duration::from_millis(millis);
                (tx, rx) = (tx + 148, rx + received);
                path.observe(now, &stats(A, tx, rx));
                if news && path.next_call().is_none() {
                    path.strive(now, true);
                }
                if let Some(to) = path.call(now) {
                    prop_assert!(!path.is_live());
                    prop_assert!([at(A), at(B)].contains(&to.endpoint));
                    prop_assert!(last.is_none_or(|last| now - last >= CALL_PAUSE));
                    last = Some(now);
                }
            }
        }

        /// Whatever the kernel reports, the path asks only for candidates, and never for the
        /// endpoint that is already in use, and asks for nothing while answers come.
        #[test]
        fn asks_only_for_other_candidates(
            steps in prop::collection::vec((0u64..4, 0u64..3, 0u64..2, 0usize..3), 1..60),
        ) {
            let pool = [at(A), at(B), at(C)];
            let mut path = Path::new(vec![pool[0], pool[1]]);
            let (mut now, mut tx, mut rx) = (Instant::now(), 0, 0);
            path.observe(now, &stats(A, 0, 0));
            for (seconds, sent, received, endpoint) in steps {
                now += Duration::from_secs(seconds * 4);
                (tx, rx) = (tx + sent, rx + received);
                let endpoint = pool[endpoint];
                let report = Stats { endpoint: Some(endpoint), ..stats(A, tx, rx) };
                path.observe(now, &report);
                if let Some(wanted) = path.wanted() {
                    prop_assert!(pool[..2].contains(&wanted));
                    prop_assert_ne!(wanted, endpoint);
                    prop_assert_eq!(received, 0);
                }
            }
        }
    }
}
