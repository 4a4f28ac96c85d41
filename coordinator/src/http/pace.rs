//! How often one machine may ask for what can change its network.
//!
//! A node that reports a new endpoint a thousand times a second would wake all its peers and fill
//! the audit log as often. Each machine therefore has [`BURST`] such calls at hand and gets one
//! back every [`REFILL`]: more than any healthy node needs, and a bound on what a sick one costs.
//! The count is kept in memory; a coordinator that restarts, or another replica, begins anew.

use proto::key::MachineId;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Calls that a machine may make at once.
const BURST: u32 = 30;
/// The time after which it may make one more.
const REFILL: Duration = Duration::from_secs(2);
/// Machines counted. When there are more, those that have been quiet are forgotten, and if none
/// was, the newcomer waits.
const MAX_MACHINES: usize = 100_000;

/// The count of each machine that called lately.
#[derive(Default)]
pub struct Pace {
    // Guards the counts for the moment of one look-up, from the tasks of all connections.
    counts: Mutex<BTreeMap<MachineId, Count>>,
}

#[derive(Clone, Copy)]
struct Count {
    left: u32,
    refilled: Instant,
}

impl Count {
    fn at(self, now: Instant) -> Self {
        let passed = now.saturating_duration_since(self.refilled).as_millis() / REFILL.as_millis();
        let gained = u32::try_from(passed).unwrap_or(u32::MAX);
        Self {
            left: self.left.saturating_add(gained).min(BURST),
            refilled: self.refilled + REFILL.saturating_mul(gained),
        }
    }
}

impl Pace {
    /// Counts a call. `false`: it is one too many.
    #[must_use]
    pub fn allows(&self, machine: MachineId, now: Instant) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() >= MAX_MACHINES && !counts.contains_key(&machine) {
            counts.retain(|_, count| count.at(now).left < BURST);
            if counts.len() >= MAX_MACHINES {
                return false;
            }
        }
        let fresh = Count {
            left: BURST,
            refilled: now,
        };
        let count = counts.entry(machine).or_insert(fresh);
        *count = count.at(now);
        let allowed = count.left > 0;
        count.left = count.left.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_may_hurry_once_and_then_waits_and_nobody_waits_for_it() {
        let pace = Pace::default();
        let (sick, healthy) = (MachineId([1; 32]), MachineId([2; 32]));
        let start = Instant::now();
        let calls = (0..BURST * 10).filter(|_| pace.allows(sick, start)).count();
        assert_eq!(calls, BURST as usize);
        assert!(pace.allows(healthy, start));
        assert!(!pace.allows(sick, start + REFILL / 2));
        assert!(pace.allows(sick, start + REFILL));
        assert!(!pace.allows(sick, start + REFILL));
        let later = start + REFILL * BURST * 100;
        let calls = (0..BURST * 10).filter(|_| pace.allows(sick, later)).count();
        assert_eq!(calls, BURST as usize, "quiet time is not saved up");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let pace = Pace::default();
        let start = Instant::now();
        let machine = |number: usize| {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&number.to_be_bytes());
            MachineId(id)
        };
        for number in 0..MAX_MACHINES {
            assert!(pace.allows(machine(number), start));
        }
        assert!(!pace.allows(machine(MAX_MACHINES), start));
        assert!(pace.allows(machine(0), start), "who is known goes on");
        assert!(pace.allows(machine(MAX_MACHINES), start + REFILL * 2));
        assert_eq!(pace.counts.lock().unwrap().len(), 1);
    }
}
