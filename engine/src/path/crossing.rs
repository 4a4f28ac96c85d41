//! [`Crossing`]: two handshakes that cancelled each other.
//!
//! When both ends send an initiation before the other's has come, each kernel forgets its own as it
//! takes the other's, and nobody takes a response. The next attempt of both is five seconds after that
//! (`REKEY_TIMEOUT`), so where both have something to say it crosses again: on a path of 160 ms two
//! kernels had no session after 30 s (`tests/lab/kernel_scenarios.rs`). By relay the agent decides who
//! goes first; on a direct path nothing stands between the kernels. But the counters show it: an
//! initiation went out and one came in, a response went out, and there is no session.
//!
//! Then the node that goes first gives its kernel the peer anew. A peer that was just made may send an
//! initiation at once, and the other end, which waits, answers it. Between the two messages to the
//! kernel there is no such peer, and it refuses a packet to it (`ENOKEY`, host unreachable).

use super::counters::Growth;
use std::time::{Duration, Instant};

/// Bytes of a handshake's messages (WireGuard paper 5.4.2, 5.4.3). Those of data are multiples of 16.
const INITIATION: u64 = 148;
const RESPONSE: u64 = 92;
/// For how long an initiation of ours is remembered: from one look at the kernel to the next one.
const UNDER_WAY: Duration = Duration::from_secs(3);
/// A peer is not given anew more often than this.
const PAUSE: Duration = Duration::from_secs(3);

/// What is known of handshakes that may cross.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Crossing {
    /// When nothing but an initiation of ours was seen to have gone out.
    asked: Option<Instant>,
    renewed: Option<Instant>,
    due: bool,
}

impl Crossing {
    /// How the counters moved, on a direct path of a node that goes first.
    pub(super) fn see(&mut self, now: Instant, growth: Growth) {
        let Growth { sent, received, .. } = growth;
        let lately = |at: Option<Instant>, long| at.is_some_and(|it| now - it < long);
        let both = sent == INITIATION + RESPONSE;
        let asked = both || lately(self.asked, UNDER_WAY);
        if growth.shaken {
            self.asked = None;
        } else if asked && (both || sent == RESPONSE) && received == INITIATION {
            self.asked = None;
            if !lately(self.renewed, PAUSE) {
                (self.due, self.renewed) = (true, Some(now));
            }
        } else if sent == INITIATION {
            self.asked = Some(now);
        }
    }

    /// Whether the kernel is to be given the peer anew. Said once.
    pub(super) fn take(&mut self) -> bool {
        std::mem::take(&mut self.due)
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test brings the time")]
mod tests {
    use super::*;

    fn growth(sent: u64, received: u64, shaken: bool) -> Growth {
        Growth {
            sent,
            received,
            shaken,
            ..Growth::default()
        }
    }

    /// Whether these looks, half a second apart, end in a peer given anew.
    fn crosses(looks: &[(u64, u64, bool)]) -> bool {
        let (mut crossing, mut now) = (Crossing::default(), Instant::now());
        let mut due = false;
        for (sent, received, shaken) in looks {
            now += Duration::from_millis(500);
            crossing.see(now, growth(*sent, *received, *shaken));
            due |= crossing.take();
        }
        due
    }

    #[test]
    fn both_asked_and_nobody_was_answered() {
        assert!(crosses(&[(240, 148, false)]));
        assert!(crosses(&[(148, 0, false), (92, 148, false)]));
        assert!(crosses(&[(148, 0, false), (0, 0, false), (92, 148, false)]));
    }

    #[test]
    fn a_session_or_one_that_asked_alone_is_no_crossing() {
        assert!(!crosses(&[(240, 148, true)]));
        assert!(!crosses(&[(92, 148, false)]), "only the peer asked");
        assert!(!crosses(&[
            (148, 0, false),
            (180, 92, true),
            (92, 148, false)
        ]));
        assert!(
            !crosses(&[(148, 0, false), (148, 0, false)]),
            "nobody is there"
        );
        assert!(!crosses(&[(240 + 128, 148 + 128, false)]), "packets pass");
        let mut late = [(0, 0, false); 8];
        (late[0], late[7]) = ((148, 0, false), (92, 148, false));
        assert!(!crosses(&late), "that one was lost long ago");
    }

    #[test]
    fn a_peer_is_not_given_anew_over_and_over() {
        let (mut crossing, mut now) = (Crossing::default(), Instant::now());
        let mut times = 0;
        for _ in 0..60 {
            now += Duration::from_millis(500);
            crossing.see(now, growth(240, 148, false));
            times += u32::from(crossing.take());
        }
        assert_eq!(times, 10);
    }
}
