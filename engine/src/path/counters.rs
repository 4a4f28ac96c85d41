//! What the kernel's counters say of a path: where the kernel roamed to, and whether packets pass.

use super::claims::Told;
use super::probe::DOUBT;
use super::{CONVERSING, HANDSHAKE_BYTES, KEEPALIVE_BYTES, PROOF, Path, TRIAL, WITNESSED, Way};
use super::{Fault, Source, Tier};
use crate::plan::Stats;
use std::net::SocketAddr;
use std::time::Instant;

/// Packets on a direct path have no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Silence {
    pub(super) since: Instant,
    /// What the peer told first of the time since then.
    pub(super) told: Option<Told>,
    /// In how many looks at the kernel something more was sent.
    asks: u32,
}

/// A direct path that swallowed packets, while the relay is tried in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trial {
    endpoint: SocketAddr,
    until: Instant,
    sent: bool,
}

/// A direct path whose probes have no answer, while its packets are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// What comes from now on counts.
    Raised,
    /// The counters are known, as of then.
    Noted(Instant),
    /// Nothing came.
    Confirmed,
}
/// How the kernel's counters moved between two observations.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Growth {
    /// Something came.
    pub(super) answered: bool,
    /// A session began.
    pub(super) shaken: bool,
    /// The counters began anew.
    pub(super) restarted: bool,
    /// Bytes that went out, and that came in.
    pub(super) sent: u64,
    pub(super) received: u64,
    /// Something went out that asks for an answer.
    pub(super) asked: bool,
    /// More than the kernel does by itself.
    pub(super) lively: bool,
}

impl Growth {
    fn between(before: &Stats, after: &Stats) -> Self {
        let restarted = after.tx_bytes < before.tx_bytes;
        let none = Stats::default();
        let before = if restarted { &none } else { before };
        let shaken = after.last_handshake > before.last_handshake;
        let sent = after.tx_bytes.saturating_sub(before.tx_bytes);
        let received = after.rx_bytes.saturating_sub(before.rx_bytes);
        let quiet = KEEPALIVE_BYTES + if shaken { HANDSHAKE_BYTES } else { 0 };
        Self {
            answered: received > 0 || shaken,
            shaken,
            received,
            restarted,
            sent,
            asked: sent > 0 && sent != KEEPALIVE_BYTES,
            lively: sent > quiet || received > quiet,
        }
    }
}
impl Path {
    /// What the kernel says of the peer now. `tier`: how near its endpoint is, if it is one that
    /// can be used, and not an address of ours on `lo`.
    pub fn observe(&mut self, now: Instant, stats: &Stats, tier: Option<Tier>) {
        let direct = stats.endpoint.zip(tier);
        let seen_at = self.seen_at.replace(now).unwrap_or(now);
        let Some(before) = self.seen.replace(stats.clone()) else {
            self.live = stats.last_handshake.is_some();
            self.adopt(now, stats, direct);
            return;
        };
        let growth = Growth::between(&before, stats);
        if growth.lively {
            self.activate(now);
        }
        if growth.answered {
            self.heard = Some(now);
            self.one_way = false;
        }
        if self.way != Way::Relay && !self.yields {
            self.crossing.see(now, growth);
        }
        let was_live = self.live;
        if growth.answered || growth.restarted {
            self.live = growth.answered;
        }
        self.say_where(now);
        if stats.endpoint != before.endpoint && growth.answered {
            self.roam(now, direct);
        }
        match self.way {
            Way::Direct(endpoint) => {
                self.witness(now, growth.answered && stats.endpoint == Some(endpoint));
                let silent = !growth.answered && !growth.restarted;
                match silent && stats.endpoint == Some(endpoint) {
                    true => self.prove(now, endpoint, stats, growth, seen_at),
                    false => self.silence = None,
                }
                if self.way == Way::Direct(endpoint) {
                    let there = growth.asked && stats.endpoint == Some(endpoint) && self.live;
                    self.claim(now, if there { growth.sent } else { 0 });
                }
            }
            Way::Relay => self.judge(now, growth),
            Way::Blind => {
                let current = stats.endpoint;
                let given_up = self
                    .blind
                    .observe(now, &self.ranked, was_live, current, growth);
                self.live &= !given_up;
                self.take_what_works(now, direct, growth);
            }
        }
    }

    /// First sight: of a peer just made, or of one found at start. A session that is there is
    /// believed until it proves otherwise, and its endpoint is the kernel's to know.
    fn adopt(&mut self, now: Instant, stats: &Stats, direct: Option<(SocketAddr, Tier)>) {
        if self.blind.wanted == stats.endpoint {
            self.blind.wanted = None;
        }
        let Some((endpoint, tier)) = direct.filter(|_| self.live) else {
            return;
        };
        match self.way {
            Way::Direct(_) => {}
            Way::Relay | Way::Blind if self.probes => {
                self.follow(now, endpoint, tier);
            }
            Way::Relay | Way::Blind => self.blind.wanted = None,
        }
    }

    /// The kernel uses this endpoint, by its own choice; so do we, until it proves no good.
    fn follow(&mut self, now: Instant, endpoint: SocketAddr, tier: Tier) {
        match self.candidates.get_mut(&endpoint) {
            Some(candidate) => {
                candidate.sources.insert(Source::Seen);
            }
            None => self.see(tier, endpoint),
        }
        self.turn(now, Way::Direct(endpoint));
        self.heart.check(now);
    }

    /// The kernel moved: a packet of the peer came from elsewhere.
    fn roam(&mut self, now: Instant, direct: Option<(SocketAddr, Tier)>) {
        let Some((endpoint, tier)) = direct.filter(|(to, _)| self.wanted() != Some(*to)) else {
            return;
        };
        if !self.probes {
            return;
        }
        let fault = self
            .candidates
            .get(&endpoint)
            .and_then(|it| it.fault_at(now));
        match (self.way, fault) {
            (_, Some(Fault::Swallows | Fault::Silent)) if self.relay.is_some() => return,
            (Way::Direct(ours), _) if self.heart.unanswered == 0 => {
                if let Some(candidate) = self.candidates.get_mut(&ours) {
                    candidate.fail(now, Fault::Overruled);
                }
            }
            (Way::Direct(_) | Way::Relay | Way::Blind, _) => {}
        }
        if let Some(candidate) = self.candidates.get_mut(&endpoint) {
            candidate.forgive();
        }
        self.follow(now, endpoint, tier);
    }

    /// A session without a choice of ours that works becomes the path.
    fn take_what_works(
        &mut self,
        now: Instant,
        direct: Option<(SocketAddr, Tier)>,
        growth: Growth,
    ) {
        if let Some((endpoint, tier)) = direct
            && self.probes
            && growth.answered
        {
            self.follow(now, endpoint, tier);
        }
    }

    /// Whether packets pass where probes do: nothing came since the last look.
    fn prove(
        &mut self,
        now: Instant,
        endpoint: SocketAddr,
        stats: &Stats,
        growth: Growth,
        seen_at: Instant,
    ) {
        let unshaken = stats.last_handshake.is_none();
        let conversing = |at| now.saturating_duration_since(at) < CONVERSING;
        let Some(silence) = &mut self.silence else {
            // Whether what was sent had time for an answer, the next looks will tell.
            if growth.asked && (unshaken || self.heard.is_some_and(conversing)) {
                self.silence = Some(Silence {
                    since: seen_at,
                    told: None,
                    asks: 1,
                });
                self.hurry(now);
            }
            return;
        };
        silence.asks += u32::from(growth.asked);
        let Silence { since, asks, .. } = *silence;
        let long = now.saturating_duration_since(since) >= PROOF;
        // Without another way there is nothing to gain.
        let other = self.is_relay_up() || (unshaken && self.relay.is_some());
        if long && (asks > 1 || unshaken) && !self.one_way && other && self.probes {
            // A single packet, the first of a handshake, may just have been lost; and where probes
            // are lost too, nothing is swallowed that could be told from the rest.
            let fault = if asks > 1 && self.heart.unanswered < DOUBT {
                Fault::Swallows
            } else {
                Fault::Silent
            };
            self.demote(now, endpoint, fault);
            let until = now + TRIAL;
            let sent = false;
            self.trial = Some(Trial {
                endpoint,
                until,
                sent,
            });
        } else if !conversing(since) {
            self.silence = None;
        }
    }

    /// Whether packets come where probes have no answer. What the relay brings does not count.
    fn witness(&mut self, now: Instant, heard: bool) {
        match self.doubt {
            None | Some(Doubt::Confirmed) => {}
            Some(Doubt::Raised) => self.doubt = Some(Doubt::Noted(now)),
            Some(Doubt::Noted(since)) => {
                if heard && self.relayed.is_none_or(|at| at + WITNESSED < since) {
                    self.heart.answered(now);
                    self.doubt = None;
                } else {
                    self.doubt = Some(Doubt::Confirmed);
                }
            }
        }
    }

    /// Whether the relay brings what a direct path did not.
    fn judge(&mut self, now: Instant, growth: Growth) {
        let Some(trial) = &mut self.trial else {
            return;
        };
        trial.sent |= growth.asked;
        if growth.answered {
            self.trial = None;
        } else if now >= trial.until {
            let Trial { endpoint, sent, .. } = *trial;
            self.trial = None;
            if sent && self.is_relay_up() {
                self.one_way = true;
                if let Some(candidate) = self.candidates.get_mut(&endpoint) {
                    candidate.forgive();
                }
                self.next_burst = Some(self.held_until().unwrap_or(now).max(now));
            }
        }
    }
}
