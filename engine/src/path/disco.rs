//! What the peer says by discovery, and what we make of it: its calls, its pings, and its answers
//! to ours.
//!
//! A call names candidates, a ping shows one, an answer proves one. What each does depends on the
//! [`Way`] in use: whoever is direct asks the path in use first, everyone else looks for one.

use super::candidate::{Candidate, Fault, Source, Tier};
use super::{Greeting, Path, RETURN_PAUSE, Way};
use proto::disco::{Took, TxId};
use std::net::SocketAddr;
use std::time::Instant;

/// Most candidates of each source but the netmap, which has its own limit.
const MAX_NAMED: usize = 16;
/// Endpoints not heard of before that a peer may show in a second. More than one or two is a router
/// that maps each packet anew, and none of those lasts.
pub(super) const NEWCOMERS: u32 = 16;

impl Path {
    /// The peer calls: it is about to ping us, and can be pinged here.
    pub fn called(&mut self, now: Instant, candidates: &[(Tier, SocketAddr)]) {
        let plain = self.guesses.sort_out(now, candidates);
        let candidates = plain.get(..MAX_NAMED).unwrap_or(&plain);
        let new = candidates.iter().map(|(_, addr)| *addr);
        let new: Vec<SocketAddr> = new.filter(|it| !self.candidates.contains_key(it)).collect();
        self.name(candidates, Source::Call);
        match self.way {
            Way::Direct(_) => self.check_if_due(now),
            Way::Relay | Way::Blind => {
                self.urgent.extend(new);
                self.prompted(now);
            }
        }
    }

    /// A ping of the peer came from there. Returns whether to answer.
    pub fn pinged_by(&mut self, now: Instant, tier: Tier, from: SocketAddr) -> bool {
        let known = self.candidates.get_mut(&from);
        let is_new = known.is_none();
        // Where every ping makes a router map anew, each would otherwise call for the next.
        if is_new && !self.newcomers.take(now, NEWCOMERS) {
            return true;
        }
        // Its router lets us in now, whenever we asked last.
        let is_open = known.is_none_or(|it| it.sources.insert(Source::Seen));
        if is_new {
            self.see(tier, from);
        }
        let held = self.held(now);
        let Some(candidate) = self.candidates.get_mut(&from) else {
            return true;
        };
        candidate.heard(now);
        match (candidate.fault_at(now), held) {
            // An answer would say that packets pass.
            (Some(Fault::Swallows), _) | (None, Some(Fault::Swallows)) => return false,
            (Some(Fault::Silent | Fault::Overruled), _) => return true,
            (None, _) => {}
        }
        let lately = |at| now.saturating_duration_since(at) < RETURN_PAUSE;
        let quiet = !candidate.asked.is_some_and(lately);
        match self.way {
            Way::Direct(endpoint) if endpoint == from => {}
            Way::Direct(_) => {
                if is_new {
                    self.check_if_due(now);
                    self.urgent.insert(from);
                } else if quiet && self.heart.unanswered > 0 {
                    self.urgent.insert(from);
                }
            }
            Way::Relay | Way::Blind if quiet || is_open => {
                self.urgent.insert(from);
            }
            Way::Relay | Way::Blind => {}
        }
        true
    }

    /// Notes an endpoint that the peer sent from; among many such, one that never answered goes.
    pub(super) fn see(&mut self, tier: Tier, from: SocketAddr) {
        let only_seen = |it: &Candidate| it.sources.iter().all(|source| *source == Source::Seen);
        let seen = self.candidates.iter().filter(|(_, it)| only_seen(it));
        if seen.clone().count() >= MAX_NAMED {
            let in_use = |addr: &SocketAddr| self.way == Way::Direct(*addr);
            let spare = seen.filter(|(addr, _)| !in_use(addr));
            let oldest = spare.min_by_key(|(_, it)| it.answered.map(|(at, _)| at));
            let Some(oldest) = oldest.map(|(addr, _)| *addr) else {
                return;
            };
            self.candidates.remove(&oldest);
        }
        self.candidates
            .insert(from, Candidate::new(tier, Source::Seen));
        self.rank();
    }

    /// A ping went out.
    pub fn pinged(&mut self, now: Instant, endpoint: SocketAddr, tx: TxId) {
        match self.candidates.get_mut(&endpoint) {
            Some(candidate) => candidate.pinged(now, tx),
            None => self.guesses.pinged(now, endpoint, tx),
        }
    }

    /// A ping that was asked for could not go out: there was no budget for it.
    pub fn unsent(&mut self, endpoint: SocketAddr) {
        if self.way == Way::Direct(endpoint) {
            self.heart.unanswered = self.heart.unanswered.saturating_sub(1);
        }
    }

    /// An answer came from there, to us as the peer sees us, and with what it took of our packets.
    pub fn ponged(
        &mut self,
        now: Instant,
        tx: TxId,
        from: SocketAddr,
        seen: SocketAddr,
        took: Option<Took>,
    ) {
        self.prove_guess(tx, from);
        let Some(candidate) = self.candidates.get_mut(&from) else {
            return;
        };
        let Some(rtt) = candidate.ponged(now, tx) else {
            return;
        };
        if candidate.fault_at(now).is_some() {
            return;
        }
        match self.way {
            Way::Direct(endpoint) if endpoint == from => {
                self.heart.answered(now);
                self.doubt = None;
                if self.heart.next.is_some() && !self.is_active(now) {
                    self.heart.next = None;
                }
            }
            Way::Direct(endpoint) => self.compare(now, endpoint, from),
            Way::Relay if self.held(now).is_some() => {}
            Way::Relay => self.promote(now, from),
            Way::Blind => self.promote(now, from),
        }
        if self.way == Way::Direct(from) {
            self.appear(now, from, seen);
            if let Some(took) = took {
                self.told(now, from, rtt, took);
            }
        }
    }

    /// A router that suddenly maps us to another address lets nothing in by the old one, and a peer
    /// that has something to say cannot know. An empty packet of ours moves its kernel.
    fn appear(&mut self, now: Instant, from: SocketAddr, seen: SocketAddr) {
        let before = self.appears.replace((from, seen));
        self.strayed |= before.is_some_and(|(at, as_whom)| at == from && as_whom != seen);
        self.strayed |= std::mem::take(&mut self.shaken);
        self.say_where(now);
    }

    /// As soon as there is a session, if that was not known to be there before.
    pub(super) fn say_where(&mut self, now: Instant) {
        if self.strayed && self.live && self.greeting == Greeting::None {
            self.strayed = false;
            self.greeting = Greeting::Due(now);
        }
    }
}
