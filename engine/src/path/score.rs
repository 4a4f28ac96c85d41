//! [`Score`]: which of two candidates that answer is better, and when that is worth a change.

use super::candidate::{Candidate, Tier};
use std::net::SocketAddr;
use std::time::Duration;

/// A change for speed alone must gain this much,
const LEAST_GAIN: Duration = Duration::from_millis(5);
/// and leave at most this part of the old time: two thirds.
const GAIN_RATIO: (u32, u32) = (2, 3);

/// The address family, best first: IPv6 needs no translation on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    V6,
    V4,
}

/// What a change is worth whatever the times are, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Class(Tier, Family);

/// How good a candidate is that answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score {
    pub(super) class: Class,
    rtt: Duration,
}

impl Score {
    pub(super) fn of(addr: SocketAddr, candidate: &Candidate) -> Self {
        let family = if addr.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        };
        Self {
            class: Class(candidate.tier, family),
            // One that never answered (the kernel roamed there) is as slow as can be.
            rtt: candidate.answered.map_or(Duration::MAX, |(_, rtt)| rtt),
        }
    }

    /// Whether it is worth leaving `old`, which works too, for the sake of time alone.
    pub(super) fn is_much_faster_than(self, old: Self) -> bool {
        let (part, whole) = GAIN_RATIO;
        let fast = self.rtt.saturating_mul(whole) <= old.rtt.saturating_mul(part);
        self.class == old.class && fast && old.rtt.saturating_sub(self.rtt) >= LEAST_GAIN
    }
}

#[cfg(test)]
mod tests {
    use super::super::candidate::Source;
    use super::*;
    use proto::disco::TxId;
    use std::time::Instant;

    #[allow(clippy::disallowed_methods, reason = "a test brings the time")]
    fn score(addr: &str, tier: Tier, millis: u64) -> Score {
        let (mut candidate, now) = (Candidate::new(tier, Source::Netmap), Instant::now());
        candidate.pinged(now, TxId([1; 12]));
        candidate.ponged(now + Duration::from_millis(millis), TxId([1; 12]));
        Score::of(addr.parse().unwrap(), &candidate)
    }

    #[test]
    fn nearness_goes_before_family_and_family_before_time() {
        let near = score("10.0.0.1:1", Tier::OnLink, 90);
        let six = score("[2001:db8::1]:1", Tier::Public, 50);
        let four = score("192.0.2.1:1", Tier::Public, 10);
        assert!(near.class < six.class && six.class < four.class);
        assert!(
            !four.is_much_faster_than(six),
            "another class is no matter of time"
        );
    }

    #[test]
    fn a_change_for_time_must_be_worth_it() {
        let score = |millis| score("192.0.2.1:1", Tier::Public, millis);
        assert!(score(60).is_much_faster_than(score(100)));
        assert!(!score(70).is_much_faster_than(score(100)));
        assert!(!score(1).is_much_faster_than(score(4)));
    }
}
