//! [`Guesses`]: ports of a peer's router that its call names beside the one that it is known by.
//!
//! A peer behind a hard NAT is seen by us at a port that no server saw; it tells those that are
//! likely ([`ports`](crate::netcheck::ports)). Its own ping to us has opened one of them, for us
//! alone, before its call arrives: so each is pinged once, if plain candidates have not answered by
//! then. Whichever answers becomes a candidate like any other; and if that ping gets lost beyond our
//! own router, that one lets in the peer's next.
//!
//! It must be no search, and of nobody's ports but those of who calls. So guesses are of one public
//! address for each call, they are [`GUESSES`] at most, and all peers' guesses at one address share
//! [`GUESSED_A_MINUTE`] ([`Limits`]); when they are spent, nothing is sent.

use super::candidate::{PING_TIMEOUT, Tier};
use super::{Path, Way};
use crate::netcheck::ports::GUESSES;
use proto::disco::TxId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// How long plain candidates have, from a call on, before guesses are pinged. A call with better
/// guesses may follow meanwhile.
pub const GUESS_AFTER: Duration = Duration::from_millis(200);
/// What was guessed is not guessed again for so long: the ping opened our own router meanwhile, so
/// that the peer's come in if it is there.
const TRIED: Duration = Duration::from_secs(20);
/// Pings of guesses at one address in a minute, whoever named it.
pub const GUESSED_A_MINUTE: usize = 64;
/// Addresses that are guessed at in a minute.
pub const MAX_GUESSED_ADDRS: usize = 32;
/// Pings whose answers are waited for.
const MAX_OUTSTANDING: usize = 2 * GUESSES;
const MINUTE: Duration = Duration::from_secs(60);

/// What is to be guessed of one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Guesses {
    all: Vec<SocketAddr>,
    /// When to ping them.
    next: Option<Instant>,
    outstanding: BTreeMap<TxId, (SocketAddr, Instant)>,
    /// When each was pinged.
    tried: BTreeMap<SocketAddr, Instant>,
}

impl Guesses {
    /// Takes from what a call names the guesses that are in it: of the first public IPv4 address
    /// with several ports, all but the first. Returns the rest.
    pub(super) fn sort_out(
        &mut self,
        now: Instant,
        named: &[(Tier, SocketAddr)],
    ) -> Vec<(Tier, SocketAddr)> {
        let mut hosts = BTreeSet::new();
        let mut guessed: Option<IpAddr> = None;
        let (mut plain, mut all) = (Vec::new(), Vec::new());
        for (tier, addr) in named {
            let again = !hosts.insert(addr.ip());
            let fits = *tier == Tier::Public && addr.is_ipv4();
            if again && fits && *guessed.get_or_insert(addr.ip()) == addr.ip() {
                all.push(*addr);
            } else {
                plain.push((*tier, *addr));
            }
        }
        let recent = |at: &Instant| now.saturating_duration_since(*at) < TRIED;
        self.tried.retain(|_, at| recent(at));
        all.retain(|addr| !self.tried.contains_key(addr));
        all.truncate(GUESSES);
        self.next = (!all.is_empty()).then_some(now + GUESS_AFTER);
        self.all = all;
        plain
    }

    /// Nothing is guessed any more.
    pub(super) fn stop(&mut self) {
        self.next = None;
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.next
    }

    /// What is to be pinged now.
    fn due(&mut self, now: Instant) -> Vec<SocketAddr> {
        if self.next.is_none_or(|at| now < at) {
            return Vec::new();
        }
        self.next = None;
        self.all.clone()
    }

    /// One was pinged.
    pub(super) fn pinged(&mut self, now: Instant, addr: SocketAddr, tx: TxId) {
        let recent = |at: Instant| now.saturating_duration_since(at) < PING_TIMEOUT;
        self.outstanding.retain(|_, (_, at)| recent(*at));
        if self.all.contains(&addr) && self.outstanding.len() < MAX_OUTSTANDING {
            self.outstanding.insert(tx, (addr, now));
            self.tried.insert(addr, now);
        }
    }

    /// When the guess was pinged that this answers, from where it was.
    fn answered(&mut self, tx: TxId, from: SocketAddr) -> Option<Instant> {
        let (addr, at) = self.outstanding.remove(&tx)?;
        (addr == from).then_some(at)
    }
}

impl Path {
    /// Guesses that are to be pinged now, if there is no direct path yet.
    pub(super) fn guess(&mut self, now: Instant) -> Vec<SocketAddr> {
        if matches!(self.way, Way::Direct(_)) {
            self.guesses.stop();
        }
        self.guesses.due(now)
    }

    /// If an answer is that of a guess, it has become a candidate.
    pub(super) fn prove_guess(&mut self, tx: TxId, from: SocketAddr) {
        if let Some(at) = self.guesses.answered(tx, from) {
            if !self.candidates.contains_key(&from) {
                self.see(Tier::Public, from);
            }
            if let Some(candidate) = self.candidates.get_mut(&from) {
                candidate.pinged(at, tx);
            }
        }
    }
}

/// How much is guessed at each address, by all paths together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Limits {
    /// When, in the last minute.
    spent: BTreeMap<IpAddr, VecDeque<Instant>>,
}

impl Limits {
    /// Whether one more ping may be sent there.
    pub(crate) fn take(&mut self, now: Instant, to: IpAddr) -> bool {
        self.spent.retain(|_, times| {
            times.retain(|at| now.saturating_duration_since(*at) < MINUTE);
            !times.is_empty()
        });
        let known = self.spent.contains_key(&to);
        if !known && self.spent.len() >= MAX_GUESSED_ADDRS {
            return false;
        }
        let times = self.spent.entry(to).or_default();
        let may = times.len() < GUESSED_A_MINUTE;
        if may {
            times.push_back(now);
        }
        may
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test brings the time")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(host: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([198, 51, 100, host], port))
    }

    fn public(addr: SocketAddr) -> (Tier, SocketAddr) {
        (Tier::Public, addr)
    }

    #[test]
    fn further_ports_of_one_public_address_are_guesses_and_nothing_else_is() {
        let (mut guesses, now) = (Guesses::default(), Instant::now());
        let lan = SocketAddr::from(([10, 0, 0, 1], 1));
        let lan_too = SocketAddr::from(([10, 0, 0, 1], 2));
        let named = [
            (Tier::Private, lan),
            (Tier::Private, lan_too),
            public(at(1, 5)),
            public(at(2, 5)),
            public(at(1, 6)),
            public(at(2, 6)),
            public(at(1, 7)),
        ];
        let plain = guesses.sort_out(now, &named);
        let left: Vec<SocketAddr> = plain.iter().map(|(_, addr)| *addr).collect();
        assert_eq!(left, [lan, lan_too, at(1, 5), at(2, 5), at(2, 6)]);
        assert!(guesses.due(now).is_empty(), "plain ones go first");
        assert_eq!(guesses.due(now + GUESS_AFTER), [at(1, 6), at(1, 7)]);
        assert_eq!(guesses.deadline(), None, "once");
        guesses.sort_out(now, &named);
        guesses.sort_out(now, &named[..3]);
        assert_eq!(guesses.deadline(), None, "the last call counts");
    }

    #[test]
    fn what_was_just_guessed_is_not_guessed_again() {
        let (mut guesses, now) = (Guesses::default(), Instant::now());
        let named = [public(at(1, 5)), public(at(1, 6)), public(at(1, 7))];
        guesses.sort_out(now, &named);
        guesses.pinged(now, at(1, 6), TxId([1; 12]));
        guesses.sort_out(now, &named);
        assert_eq!(guesses.due(now + GUESS_AFTER), [at(1, 7)]);
        guesses.sort_out(now + TRIED, &named);
        assert_eq!(guesses.due(now + TRIED + GUESS_AFTER), [at(1, 6), at(1, 7)]);
    }

    #[test]
    fn only_the_answer_to_a_guess_from_where_it_went_proves_it() {
        let (mut guesses, now) = (Guesses::default(), Instant::now());
        guesses.sort_out(now, &[public(at(1, 5)), public(at(1, 6))]);
        guesses.pinged(now, at(1, 6), TxId([1; 12]));
        guesses.pinged(now, at(1, 9), TxId([2; 12]));
        assert_eq!(guesses.answered(TxId([1; 12]), at(1, 7)), None);
        assert_eq!(guesses.answered(TxId([2; 12]), at(1, 9)), None);
        guesses.pinged(now, at(1, 6), TxId([3; 12]));
        assert_eq!(guesses.answered(TxId([3; 12]), at(1, 6)), Some(now));
        assert_eq!(guesses.answered(TxId([3; 12]), at(1, 6)), None, "once");
    }

    proptest! {
        /// Whoever calls however often, with whatever: no address gets more in any minute than it
        /// may, and no more than so many addresses get any.
        #[test]
        fn no_address_is_searched(
            calls in prop::collection::vec(
                (0u64..2_000, prop::collection::vec((0u8..60, 1u16..200), 0..60)),
                1..80,
            ),
        ) {
            let (mut guesses, mut limits) = (Guesses::default(), Limits::default());
            let mut now = Instant::now();
            let mut sent: Vec<(Instant, IpAddr)> = Vec::new();
            for (millis, named) in calls {
                now += Duration::from_millis(millis);
                let named: Vec<_> = named.iter().map(|(host, port)| public(at(*host, *port))).collect();
                guesses.sort_out(now, &named);
                now += GUESS_AFTER;
                let due = guesses.due(now);
                prop_assert!(due.len() <= GUESSES);
                let may = due.into_iter().filter(|addr| limits.take(now, addr.ip()));
                sent.extend(may.map(|addr| (now, addr.ip())));
                prop_assert!(guesses.due(now + MINUTE).is_empty(), "once a call");
                let lately = sent.iter().filter(|(at, _)| now - *at < MINUTE);
                let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
                for (_, ip) in lately {
                    *counts.entry(*ip).or_default() += 1;
                }
                prop_assert!(counts.values().all(|count| *count <= GUESSED_A_MINUTE));
                prop_assert!(counts.len() <= MAX_GUESSED_ADDRS);
            }
        }
    }
}
