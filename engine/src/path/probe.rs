//! When to probe: bursts that look for a path, heartbeats that watch one, and a budget for both.

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
/// Between two bursts that the other side asks for.
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
