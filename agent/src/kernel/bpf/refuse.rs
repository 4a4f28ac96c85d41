//! The switch of answers to refused packets, and how many there were.
//!
//! The switch is one word in a pinned map, so it holds while no agent runs: 0 and refusals are
//! silent, or the mark by which the programs know their own answers again. The mark is drawn at
//! random when answers are switched on, and stays as long as they are on: an agent that starts
//! changes nothing for answers on their way.

use super::{ANY, Acl, AclError, failed};
use ebpf::abi::{Counter, maps};
use ebpf::refuse::Outcome;

impl Acl {
    /// Switches answers to refused packets on or off.
    ///
    /// # Errors
    /// [`AclError::Map`]; the switch is as it was.
    pub fn answer_refusals(&self, answer: bool) -> Result<(), AclError> {
        let now: u32 = self.mark.get(&0_u32)?.unwrap_or_default();
        if (now != 0) == answer {
            return Ok(());
        }
        let mark = if answer { random_mark()? } else { 0 };
        self.mark.put(&0_u32, &mark, ANY).map(|_| ())
    }

    /// What became of answers that were due, in a fixed order.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn answers(&self) -> Result<Vec<(Outcome, u64)>, AclError> {
        let count = |outcome: Outcome| {
            let shares = self.answers.get_per_cpu::<_, Counter>(&(outcome as u32))?;
            Ok((outcome, shares.iter().map(|share| share.packets).sum()))
        };
        Outcome::ALL.into_iter().map(count).collect()
    }
}

/// Any number but 0.
fn random_mark() -> Result<u32, AclError> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes)
        .map_err(|error| failed("draw", maps::MARK, std::io::Error::other(error.to_string())))?;
    Ok(u32::from_ne_bytes(bytes).max(1))
}
