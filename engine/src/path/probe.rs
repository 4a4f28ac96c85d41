//! When to probe: bursts that look for a path, heartbeats that watch one, and a budget for both.

use super::candidate::Candidate;
use super::score::Score;
use super::{Doubt, Errand, Fault, Greeting, Path, WITNESS, Way};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Pauses after each round of a burst, in which every candidate that has not answered is pinged.
/// Both sides begin at about the same time; while the first pings of one open its router, those of
/// the other may be refused, so a burst lasts three seconds.
pub const BURST: [Duration; 6] = [
    Duration::from_millis(100),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1600),
];
/// Most candidates that are pinged in one round, the best ones.
pub const BURST_CANDIDATES: usize = 16;
/// Pauses between bursts that found nothing; the last one repeats.
pub const AGAIN: [Duration; 5] = [
    Duration::from_secs(3),
    Duration::from_secs(7),
    Duration::from_secs(15),
    Duration::from_secs(30),
    Duration::from_secs(60),
];
/// While a direct path is in use, a better one is looked for this often.
pub const UPGRADE: Duration = Duration::from_secs(60);
/// Between the beginnings of two bursts that news or the other side ask for.
pub const PROMPTED_PAUSE: Duration = Duration::from_secs(1);
/// Between two calls of one peer.
pub const CALL_PAUSE: Duration = Duration::from_secs(2);
/// Between two heartbeats of a direct path in use.
pub const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long an answer is waited for at least, before the path is asked again.
pub const LEAST_PATIENCE: Duration = Duration::from_millis(250);
/// How long at most.
pub const MOST_PATIENCE: Duration = Duration::from_millis(600);
/// So many pings in a row without an answer: the path is gone.
pub const DISTRESS: u32 = 6;
/// So many: it may be, and others are asked.
pub const DOUBT: u32 = 2;
/// Packets of discovery that a node sends in a second, at most; that many at once.
pub const MAX_TRANSMITS: u32 = 1_000;

/// A burst under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Burst {
    pub(super) began: Instant,
    pub(super) next: Instant,
    round: usize,
}

impl Burst {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            next: now,
            round: 0,
        }
    }

    /// The next round is due now, if there is one.
    pub(super) fn hurry(&mut self, now: Instant) {
        if self.round < BURST.len() {
            self.next = now;
        }
    }

    /// The round that is due, if one is; `Err` when it is over.
    pub(super) fn round(&mut self, now: Instant) -> Result<Option<usize>, Over> {
        if now < self.next {
            return Ok(None);
        }
        let pause = BURST.get(self.round).ok_or(Over)?;
        self.next = now + *pause;
        self.round += 1;
        Ok(Some(self.round - 1))
    }
}

/// A burst is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over;

/// The pulse of a direct path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heart {
    /// When to ask next; `None` while nobody uses the path.
    pub(super) next: Option<Instant>,
    /// Pings since the last answer.
    pub(super) unanswered: u32,
}

impl Heart {
    /// The path is to be asked now, unless it is being asked.
    pub(super) fn check(&mut self, now: Instant) {
        if self.unanswered == 0 {
            self.next = Some(now);
        }
    }

    /// Asked: how long to wait, for a path that answered in `rtt`.
    pub(super) fn asked(&mut self, now: Instant, rtt: Option<Duration>) {
        let patience = rtt.map_or(LEAST_PATIENCE, |rtt| rtt.saturating_mul(2));
        self.next = Some(now + patience.clamp(LEAST_PATIENCE, MOST_PATIENCE));
        self.unanswered += 1;
    }

    pub(super) fn answered(&mut self, now: Instant) {
        (self.unanswered, self.next) = (0, Some(now + HEARTBEAT));
    }
}

/// How much may be sent: a bucket that holds as much as it takes in within a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    spent: u32,
    at: Option<Instant>,
}

impl Budget {
    /// Whether one more may be sent out of `per_second`.
    pub fn take(&mut self, now: Instant, per_second: u32) -> bool {
        let since = self.at.map(|at| now.saturating_duration_since(at));
        let elapsed = since.unwrap_or(Duration::MAX).min(Duration::from_secs(1));
        let back = elapsed.as_millis() * u128::from(per_second) / 1_000;
        let back = u32::try_from(back).unwrap_or(u32::MAX);
        if back > 0 || self.at.is_none() {
            self.spent = self.spent.saturating_sub(back);
            self.at = Some(now);
        }
        let may = self.spent < per_second;
        self.spent += u32::from(may);
        may
    }
}

impl Path {
    /// When there is something to do at the latest; `None`: not before something happens.
    #[must_use]
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let greeting = match self.greeting {
            Greeting::Due(at) => Some(at),
            Greeting::None | Greeting::Owed | Greeting::Now => None,
        };
        let again = self.next_burst.filter(|_| self.may_burst(now));
        let urgent = (!self.urgent.is_empty()).then_some(now);
        let burst = self.burst.map(|burst| burst.next);
        let all = [
            greeting,
            self.settles,
            again,
            urgent,
            self.heart.next,
            burst,
            self.guesses.deadline(),
        ];
        all.into_iter().flatten().min()
    }

    fn may_burst(&self, now: Instant) -> bool {
        self.eager > 0 || self.is_active(now)
    }

    /// What is to be sent now.
    pub fn poll(&mut self, now: Instant) -> Vec<Errand> {
        let mut errands = Vec::new();
        self.ripen(now);
        self.beat(now, &mut errands);
        if self.next_burst.is_some_and(|at| now >= at) {
            self.next_burst = None;
            if self.may_burst(now) {
                self.start_burst(now);
            }
        }
        self.burst(now, &mut errands);
        let urgent = std::mem::take(&mut self.urgent);
        errands.extend(urgent.into_iter().map(Errand::Ping));
        errands.extend(self.guess(now).into_iter().map(Errand::Guess));
        errands
    }

    fn ripen(&mut self, now: Instant) {
        if self.settles.is_some_and(|at| now >= at) {
            (self.settles, self.ripe) = (None, true);
        }
        if matches!(self.greeting, Greeting::Due(at) if now >= at) {
            (self.greeting, self.ripe) = (Greeting::Now, true);
        }
    }

    fn beat(&mut self, now: Instant, errands: &mut Vec<Errand>) {
        let Way::Direct(endpoint) = self.way else {
            self.heart = Heart::default();
            return;
        };
        if self.heart.next.is_none_or(|at| now < at) {
            return;
        }
        let waits = self.doubt != Some(Doubt::Confirmed) && self.relay.is_some();
        let patience = if waits { DISTRESS + WITNESS } else { DISTRESS };
        if self.heart.unanswered >= patience {
            self.demote(now, endpoint, Fault::Silent);
            return;
        }
        let rtt = self.candidates.get(&endpoint).and_then(|it| it.answered);
        self.heart.asked(now, rtt.map(|(_, rtt)| rtt));
        errands.push(Errand::Ping(endpoint));
        if self.heart.unanswered == DOUBT {
            self.start_burst(now);
            self.doubt = Some(Doubt::Raised);
            self.look = true;
        }
    }

    fn burst(&mut self, now: Instant, errands: &mut Vec<Errand>) {
        let Some(mut burst) = self.burst else {
            return;
        };
        match burst.round(now) {
            Ok(None) => {}
            Ok(Some(round)) => {
                let targets = self.targets(now, burst.began);
                let wanting = !matches!(self.way, Way::Direct(_)) || !targets.is_empty();
                let again = |at| round == 0 && now.saturating_duration_since(at) >= CALL_PAUSE;
                let may = self.is_relay_up() && self.called.is_none_or(again);
                if wanting && may {
                    self.called = Some(now);
                    errands.push(Errand::Call);
                }
                errands.extend(targets.into_iter().map(Errand::Ping));
                self.burst = Some(burst);
            }
            Err(Over) => {
                self.burst = None;
                self.eager = self.eager.saturating_sub(1);
                self.next_burst = Some(match self.way {
                    Way::Direct(_) => now + UPGRADE,
                    Way::Relay | Way::Blind => self.next_try(now),
                });
                if self.greeting == Greeting::Owed && !self.is_mute() {
                    self.greet(now);
                }
            }
        }
    }

    fn next_try(&mut self, now: Instant) -> Instant {
        let last = AGAIN.len() - 1;
        let pause = AGAIN[self.tries.min(last)];
        self.tries += 1;
        // A path that was just given up may be back when it may be taken again.
        (now + pause).max(self.held_until().unwrap_or(now))
    }

    /// Who is pinged in a round of a burst: those that have not answered in it and might be taken.
    fn targets(&self, now: Instant, began: Instant) -> Vec<SocketAddr> {
        let class = |addr: &SocketAddr| Some(Score::of(*addr, self.candidates.get(addr)?).class);
        let better = |addr: &SocketAddr| match self.way {
            Way::Direct(current) if self.heart.unanswered >= DOUBT => *addr != current,
            Way::Direct(current) => class(addr) < class(&current),
            Way::Relay | Way::Blind => true,
        };
        let open = |it: &Candidate| it.fault_at(now).is_none() && !it.answered_since(began);
        let ranked = self.ranked.iter().copied();
        ranked
            .filter(|addr| self.candidates.get(addr).is_some_and(open) && better(addr))
            .take(BURST_CANDIDATES)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        #[allow(clippy::disallowed_methods, reason = "a test brings the time")]
        fn no_second_gets_more_than_two_buckets(
            steps in prop::collection::vec((0u64..30, 0u32..20), 1..200),
        ) {
            let (mut budget, mut now) = (Budget::default(), Instant::now());
            let mut sent: Vec<Instant> = Vec::new();
            for (millis, tries) in steps {
                now += Duration::from_millis(millis);
                sent.extend((0..tries).filter(|_| budget.take(now, 50)).map(|_| now));
                let lately = sent.iter().filter(|at| now - **at < Duration::from_secs(1));
                prop_assert!(lately.count() <= 100);
            }
        }
    }
}
