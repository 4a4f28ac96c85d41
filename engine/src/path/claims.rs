//! What the peer says of our packets: how much of the session its kernel took.
//!
//! Whoever sends and hears nothing may have a peer that just listens (a stream of logs, a camera), or
//! a way that swallows what it sends; the own counters cannot tell which. So a pong says how many
//! bytes the answering kernel had taken when it was last read, and how long ago that was
//! ([`Took`]). What we send over a direct path is a *claim* that the peer's figure grows; a later
//! figure proves it, or refutes it, whatever comes back and by whichever way.

use super::{Fault, HANDSHAKE_BYTES, Path, Way};
use proto::disco::Took;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long packets may be under way, and wait to be counted.
const SLACK: Duration = Duration::from_millis(500);
/// A single packet may be lost: so many looks at the kernel must have seen more of them,
const LOOKS: u32 = 2;
/// and so many bytes: handshakes that cross are not counted by who takes them.
const LEAST: u64 = 2 * HANDSHAKE_BYTES;
/// While a figure is waited for, the peer is asked this often.
const HURRY: Duration = Duration::from_millis(500);

/// A figure of the peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Told {
    bytes: u64,
    /// Between these moments the peer read it.
    read: (Instant, Instant),
}

/// We sent something over a direct path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// The peer's figure from before.
    before: u64,
    /// In so many looks at the kernel more was sent,
    looks: u32,
    /// so many bytes,
    sent: u64,
    /// when it was first enough.
    at: Option<Instant>,
}

impl Path {
    /// We look at the kernel, and so many bytes were sent since the last look.
    pub(super) fn claim(&mut self, now: Instant, sent: u64) {
        // What was said before that look was said before those packets.
        let before = std::mem::replace(&mut self.told_before, self.told);
        if sent == 0 {
            return;
        }
        let begun = before.map(|told| Claim {
            before: told.bytes,
            looks: 0,
            sent: 0,
            at: None,
        });
        let Some(mut claim) = self.claim.or(begun) else {
            return;
        };
        claim.looks = claim.looks.saturating_add(1);
        claim.sent = claim.sent.saturating_add(sent);
        if claim.at.is_none() && claim.looks >= LOOKS && claim.sent > LEAST {
            claim.at = Some(now);
            self.hurry(now);
        }
        self.claim = Some(claim);
    }

    /// The peer is asked soon, and says what it took.
    pub(super) fn hurry(&mut self, now: Instant) {
        if let Some(next) = &mut self.heart.next {
            *next = (*next).min(now + HURRY);
        }
    }

    /// A pong that took `rtt` said this.
    pub(super) fn told(&mut self, now: Instant, endpoint: SocketAddr, rtt: Duration, took: Took) {
        let ago = Duration::from_millis(took.ago_ms.into());
        let read = |since: Duration| now.checked_sub(since).unwrap_or(now);
        let told = Told {
            bytes: took.bytes,
            read: (read(ago.saturating_add(rtt)), read(ago)),
        };
        self.told = Some(told);
        let grew = |from: u64| from != told.bytes;
        if let Some(silence) = &mut self.silence {
            match silence.told {
                None if told.read.0 >= silence.since => silence.told = Some(told),
                Some(first) if told.read.0 > first.read.1 && grew(first.bytes) => {
                    self.silence = None;
                }
                None | Some(_) => {}
            }
        }
        if self.silence.is_some() {
            self.hurry(now);
        }
        let Some(claim) = self.claim else {
            return;
        };
        if grew(claim.before) {
            (self.claim, self.refuted) = (None, false);
        } else if claim.at.is_some_and(|at| told.read.0 >= at + SLACK) {
            if self.way == Way::Direct(endpoint) && self.is_relay_up() {
                self.demote(now, endpoint, Fault::Swallows);
            } else {
                // Once there is another way, the peer is asked again.
                self.refuted = true;
                self.hurry(now);
            }
        } else if claim.at.is_some() {
            self.hurry(now);
        }
    }

    /// What our kernel took of the peer's packets, as we last read it: for a pong.
    #[must_use]
    pub fn took(&self, now: Instant) -> Option<Took> {
        let (stats, at) = self.seen.as_ref().zip(self.seen_at)?;
        let ago = now.saturating_duration_since(at).as_millis();
        Some(Took {
            bytes: stats.rx_bytes,
            ago_ms: u32::try_from(ago).ok()?,
        })
    }
}
