//! Which port a hard NAT will show a destination that was not spoken to before.
//!
//! Some NATs draw it by chance, and nobody foresees it. Others take the next one, or the next but
//! one, of a counter that all their hosts share; or have few ports for each host (carriers give
//! blocks of them; MAP-E, RFC 7597 5.1). Then the ports that servers saw tell where to look:
//! [`guesses`]. A guess costs a peer one packet; a NAT in which there is nothing to see gets none.

use std::collections::BTreeSet;

/// Guesses that are told at a time.
pub const GUESSES: usize = 24;
/// A NAT is taken for a counter if it goes on by at most this much from one server to the next:
/// other hosts behind it count too.
pub const MOST_STEP: u16 = 16;
/// Ports that are never further apart than this come from one block.
pub const MOST_SPREAD: u16 = 128;
/// How often guesses are others, before the first are told again.
pub const ROUNDS: usize = 4;
/// NATs leave the ports below to services (RFC 4787, REQ-3).
const FIRST_PORT: u16 = 1_024;

/// Ports that are likely next, the likeliest first; none if there is nothing to see. `seen`: what
/// servers saw, in the order in which they were asked. `round`: how often that was in vain.
#[must_use]
pub fn guesses(seen: &[u16], round: usize) -> Vec<u16> {
    let distinct: BTreeSet<u16> = seen.iter().copied().collect();
    let (Some(least), Some(most)) = (distinct.first(), distinct.last()) else {
        return Vec::new();
    };
    if distinct.len() < 2 {
        return Vec::new();
    }
    let near = if most - least <= MOST_SPREAD {
        around(*least, *most)
    } else {
        Vec::new()
    };
    let all = match step(seen) {
        None => near,
        Some(step) if step.abs() == 1 => onwards(seen, step),
        // Few servers may well draw ports of a block that look like those of a counter.
        Some(step) => by_turns(onwards(seen, step), near),
    };
    let rounds = all.len().div_ceil(GUESSES).clamp(1, ROUNDS);
    let others = all.into_iter().skip(round % rounds * GUESSES);
    others.take(GUESSES).collect()
}

/// By how much a counter goes on, and which way; `None` if it is none. Other hosts make it leap, by
/// a multiple.
fn step(seen: &[u16]) -> Option<i32> {
    let leaps = seen
        .windows(2)
        .map(|two| i32::from(two[1]) - i32::from(two[0]));
    let leaps: Vec<i32> = leaps.collect();
    let way = leaps.first()?.signum();
    let small = |leap: &i32| leap.signum() == way && leap.unsigned_abs() <= MOST_STEP.into();
    (way != 0 && leaps.iter().all(small)).then(|| leaps.iter().fold(0, |gcd, it| divisor(gcd, *it)))
}

/// The greatest common divisor, with the sign of the second.
fn divisor(one: i32, other: i32) -> i32 {
    let (mut a, mut b) = (one.abs(), other.abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a * other.signum()
}

/// What a counter shows next; and, as nobody knows whether a peer was spoken to just before the
/// servers or just after them, each third time what it showed before.
fn onwards(seen: &[u16], step: i32) -> Vec<u16> {
    let (Some(first), Some(last)) = (seen.first(), seen.last()) else {
        return Vec::new();
    };
    let (mut after, mut before) = (i32::from(*last), i32::from(*first));
    let mut found = Vec::new();
    for number in 1..=ROUNDS * GUESSES {
        let port = if number % 3 == 0 {
            before -= step;
            before
        } else {
            after += step;
            after
        };
        found.extend(u16::try_from(port).ok().filter(|port| *port >= FIRST_PORT));
    }
    found
}

/// A block of which these are the least and the greatest that were seen: what lies between, then
/// what lies beside.
fn around(least: u16, most: u16) -> Vec<u16> {
    let beside = (1..=MOST_SPREAD).flat_map(|far| [most.checked_add(far), least.checked_sub(far)]);
    let all = (least..=most).chain(beside.flatten());
    let all = all.filter(|port| *port >= FIRST_PORT);
    all.take(ROUNDS * GUESSES).collect()
}

/// One of each, without what was said already.
fn by_turns(one: Vec<u16>, other: Vec<u16>) -> Vec<u16> {
    let mut said = BTreeSet::new();
    let both = one.into_iter().zip(other);
    let all = both.flat_map(|(one, other)| [one, other]);
    all.filter(|port| said.insert(*port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(seen: &[u16]) -> Vec<u16> {
        (0..ROUNDS).flat_map(|round| guesses(seen, round)).collect()
    }

    #[test]
    fn a_counter_is_followed_whatever_its_step_and_way() {
        assert_eq!(
            guesses(&[40_000, 40_001, 40_002], 0)[..4],
            [40_003, 40_004, 39_999, 40_005]
        );
        assert_eq!(
            guesses(&[40_000, 40_002], 0)[..4],
            [40_004, 40_000, 40_006, 40_001]
        );
        assert_eq!(
            guesses(&[40_000, 39_997, 39_991], 0)[..3],
            [39_988, 39_991, 39_985]
        );
    }

    #[test]
    fn a_small_block_is_searched_whole() {
        let found = all(&[40_012, 40_003, 40_009]);
        assert!(
            (40_000..40_016).all(|port| found.contains(&port)),
            "{found:?}"
        );
        assert_eq!(found[..3], [40_003, 40_004, 40_005]);
    }

    #[test]
    fn chance_is_not_guessed_at() {
        assert!(all(&[40_012, 61_003, 1_500]).is_empty());
        assert!(all(&[40_012, 40_500]).is_empty());
        assert!(all(&[40_012]).is_empty());
        assert!(all(&[40_012, 40_012]).is_empty());
        assert!(all(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn guesses_are_few_and_differ_and_are_never_of_services(
            seen in prop::collection::vec(prop_oneof![any::<u16>(), 1_000u16..1_100], 0..6),
            round in 0usize..100,
        ) {
            let found = guesses(&seen, round);
            let distinct: BTreeSet<&u16> = found.iter().collect();
            prop_assert!(found.len() <= GUESSES);
            prop_assert_eq!(distinct.len(), found.len());
            prop_assert!(found.iter().all(|port| *port >= FIRST_PORT));
        }

        /// However the hosts behind a counter share it: if so few flows lie between that it is still
        /// taken for one, the port that a peer gets is among the guesses.
        #[test]
        fn a_counter_that_others_use_too_is_found(
            first in 2_000u16..60_000,
            step in 1u16..4,
            others in prop::collection::vec(0u16..4, 2..5),
        ) {
            let mut port = first;
            let mut next = |skipped: u16| {
                port += step * (skipped + 1);
                port
            };
            let seen: Vec<u16> = others.iter().map(|skipped| next(*skipped)).collect();
            let peer = next(1);
            let leap = seen.windows(2).map(|two| two[1] - two[0]).fold(0, |gcd, it| {
                u16::try_from(divisor(gcd.into(), it.into())).unwrap()
            });
            prop_assume!((peer - seen[seen.len() - 1]).is_multiple_of(leap));
            prop_assert!(all(&seen).contains(&peer), "{seen:?} {peer}");
        }
    }
}
