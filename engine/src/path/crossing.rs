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
/// Within this long the messages of one crossing are seen; it may take more than one look at the kernel.
const UNDER_WAY: Duration = Duration::from_secs(3);
/// A peer is not given anew more often than this.
const PAUSE: Duration = Duration::from_secs(1);

/// What is known of handshakes that may cross.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Crossing {
    /// Bytes sent and received, of handshakes only, and since when.
    messages: (u64, u64),
    since: Option<Instant>,
    /// They crossed, and there was no session since.
    crossed: bool,
    renewed: Option<Instant>,
    due: bool,
}

impl Crossing {
    /// How the counters moved without a relay, at the node that goes first.
    pub(super) fn see(&mut self, now: Instant, growth: Growth) {
        let Growth { sent, received, .. } = growth;
        let lately = |at: Option<Instant>, long| at.is_some_and(|it| now - it < long);
        let handshakes = [0, INITIATION, RESPONSE, INITIATION + RESPONSE];
        if growth.shaken {
            *self = Self {
                renewed: self.renewed,
                ..Self::default()
            };
        } else if !handshakes.contains(&sent) || ![0, INITIATION].contains(&received) {
            self.since = None;
        } else if (sent, received) != (0, 0) {
            if !lately(self.since, UNDER_WAY) {
                (self.messages, self.since) = ((0, 0), Some(now));
            }
            self.messages.0 += sent;
            self.messages.1 += received;
            // What is more than one handshake each belongs to a later attempt.
            if self.messages.0 > INITIATION + RESPONSE || self.messages.1 > INITIATION {
                (self.messages, self.since) = ((sent, received), Some(now));
            }
            self.crossed |= self.messages == (INITIATION + RESPONSE, INITIATION);
        }
        if self.crossed && !lately(self.renewed, PAUSE) {
            *self = Self {
                renewed: Some(now),
                due: true,
                ..Self::default()
            };
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
        // The kernel counts its answer before that which it answers.
        assert!(crosses(&[(240, 0, false), (0, 148, false)]));
        assert!(crosses(&[(148, 0, false), (92, 0, false), (0, 148, false)]));
        // What went before was the end of a session, or an attempt that was lost.
        assert!(crosses(&[
            (32, 0, false),
            (148, 0, false),
            (92, 148, false)
        ]));
        assert!(crosses(&[
            (148, 0, false),
            (148, 0, false),
            (92, 148, false)
        ]));
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
        assert_eq!(times, 30);
    }

    /// Two of a new network cross as they start, and again at once.
    #[test]
    fn who_crosses_soon_after_a_renewal_waits_only_that_long() {
        let (mut crossing, start) = (Crossing::default(), Instant::now());
        let mut after = |ms, sent, received, shaken| {
            let now = start + Duration::from_millis(ms);
            crossing.see(now, growth(sent, received, shaken));
            crossing.take()
        };
        assert!(after(0, 240, 148, false));
        assert!(!after(300, 148, 92, true), "that one made a session");
        assert!(!after(600, 240, 148, false));
        assert!(!after(900, 0, 0, false));
        assert!(after(1_100, 0, 0, false));
        assert!(!after(2_500, 0, 0, false));
    }

    #[test]
    fn a_session_ends_the_wait_for_a_renewal() {
        let (mut crossing, start) = (Crossing::default(), Instant::now());
        let looks = [
            (0, 240, 148),
            (300, 240, 148),
            (700, 148, 92),
            (1_500, 0, 0),
        ];
        let times = looks.map(|(ms, sent, received)| {
            let now = start + Duration::from_millis(ms);
            crossing.see(now, growth(sent, received, received == 92));
            crossing.take()
        });
        assert_eq!(times, [true, false, false, false]);
    }
}
