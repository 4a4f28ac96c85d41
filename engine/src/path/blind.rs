//! [`Blind`]: the choice of an endpoint where nothing tells but the kernel's counters: a peer that
//! does not probe, or one that no probe and no relay reaches.
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

use super::counters::Growth;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Sending without an answer for this long, with no session yet, is distress: one handshake
/// attempt (`REKEY_TIMEOUT`, 5 s) has then gone unanswered.
pub const PATIENCE_TRYING: Duration = Duration::from_secs(5);
/// Sending without an answer for this long, on a path that worked, is distress: a live peer sends
/// at least a keepalive within `KEEPALIVE_TIMEOUT` (10 s), and `KEEPALIVE_TIMEOUT +
/// REKEY_TIMEOUT` (15 s) later the kernel itself starts a new handshake.
pub const PATIENCE_LIVE: Duration = Duration::from_secs(20);

/// What the kernel is to be told, and since when it waits for an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Blind {
    /// What the kernel is to be told; `None` while it is to be left alone.
    pub(super) wanted: Option<SocketAddr>,
    /// Since when we send without an answer.
    silent_since: Option<Instant>,
}

impl Blind {
    pub(super) fn new(wanted: Option<SocketAddr>) -> Self {
        Self {
            wanted,
            silent_since: None,
        }
    }

    /// What the kernel says now. `candidates` best first; `live`: whether there was a session until
    /// now. Returns whether the endpoint in use is given up.
    pub(super) fn observe(
        &mut self,
        now: Instant,
        candidates: &[SocketAddr],
        live: bool,
        current: Option<SocketAddr>,
        growth: Growth,
    ) -> bool {
        if self.wanted == current {
            self.wanted = None;
        }
        if growth.answered || growth.restarted {
            self.silent_since = None;
            if growth.answered && current.is_some() {
                self.wanted = None;
            }
            return false;
        }
        if growth.asked && self.silent_since.is_none() {
            self.silent_since = Some(now);
        }
        let patience = if live { PATIENCE_LIVE } else { PATIENCE_TRYING };
        let silent = self.silent_since;
        if silent.is_none_or(|since| now.saturating_duration_since(since) < patience) {
            return false;
        }
        self.silent_since = None;
        self.wanted = after(candidates, current).filter(|next| Some(*next) != current);
        true
    }

    /// Other candidates are known. One that is being tried and still is one is not disturbed.
    pub(super) fn set_candidates(
        &mut self,
        candidates: &[SocketAddr],
        live: bool,
        current: Option<SocketAddr>,
    ) {
        let current = self.wanted.or(current);
        if !live && current.is_none_or(|endpoint| !candidates.contains(&endpoint)) {
            *self = Self::new(candidates.first().copied());
        }
    }
}

/// The candidate after `current`, round and round.
fn after(candidates: &[SocketAddr], current: Option<SocketAddr>) -> Option<SocketAddr> {
    let position = candidates.iter().position(|it| Some(*it) == current);
    let next = position.map_or(0, |position| position + 1);
    candidates.get(next).or_else(|| candidates.first()).copied()
}
