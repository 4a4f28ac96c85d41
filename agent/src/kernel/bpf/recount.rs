//! Counts anew what each peer has of the table of lasting flows.
//!
//! The programs count up and down as flows come and go, but nobody tells them of a flow that timed
//! out unseen, so their counts rise over time. A count that is too high denies nothing: its peer's
//! next flows are only less protected. While no agent lives, that is all.
//!
//! While more than half of what may last is there, what nobody used for [`SPARED_NS`] goes too: after
//! a flood of flows that nobody closes there is room again as soon as they are old.

use super::{ANY, Acl, AclError, now_ns};
use ebpf::abi::{SHARES, Share};
use ebpf::flows::SPARED_NS;
use ebpf::verdict::{Limits, Store, is_live};
use std::collections::BTreeMap;

/// So often at most: a full table takes some fifty milliseconds to read.
const EVERY_NS: u64 = 60_000_000_000;
/// The share that is all peers together.
const TOGETHER: u32 = 0;

impl Acl {
    /// Counts anew, if that is due: once after the start, and then each minute while a quarter of
    /// what may last is there. What timed out is removed.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn recount(&mut self) -> Result<(), AclError> {
        self.recount_at(now_ns())
    }

    /// [`Self::recount`] at this time of the monotonic clock.
    ///
    /// # Errors
    /// As for that.
    pub fn recount_at(&mut self, now: u64) -> Result<(), AclError> {
        let first = self.recounted_ns.is_none();
        if self
            .recounted_ns
            .is_some_and(|last| now.saturating_sub(last) < EVERY_NS)
        {
            return Ok(());
        }
        self.recounted_ns = Some(now);
        self.renew_tracks()?;
        let together: Share = self.shares.get(&TOGETHER)?.unwrap_or_default();
        if !first && together.established < Limits::USUAL.established / 4 {
            return Ok(());
        }
        let spared = if together.established > Limits::USUAL.established / 2 {
            SPARED_NS
        } else {
            u64::MAX
        };
        let counts = self.count_lasting(now, spared)?;
        for number in 0..SHARES {
            let share: Share = self.shares.get(&number)?.unwrap_or_default();
            let established = counts.get(&number).copied().unwrap_or_default();
            if share.established != established {
                let share = Share {
                    established,
                    ..share
                };
                self.shares.put(&number, &share, ANY)?;
            }
        }
        Ok(())
    }

    fn count_lasting(&self, now: u64, spared_ns: u64) -> Result<BTreeMap<u32, u32>, AclError> {
        let mut counts = BTreeMap::new();
        let table = self.flows.table()?;
        for (store, key, flow) in table.iter() {
            let idle_ns = now.saturating_sub(flow.last_seen_ns);
            let gives_way = store == Store::Established && idle_ns > spared_ns;
            if !is_live(&key, store, &flow, now) || gives_way {
                table.remove(store, &key);
                continue;
            }
            if store != Store::Established {
                continue;
            }
            *counts.entry(TOGETHER).or_default() += 1;
            let share = u32::from(flow.share);
            if share != TOGETHER {
                *counts.entry(share).or_default() += 1;
            }
        }
        Ok(counts)
    }
}
