//! One peer's [`Path`]: how we reach it now, and how that changes.
//!
//! ```text
//!            traffic, news, a call                 an answer
//! Relay ───────────────────────────► (probing) ───────────────────► Direct(endpoint)
//!   ▲                                                                   │
//!   └───── distress: answers cease, or packets are swallowed ───────────┘
//! ```
//!
//! The kernel sends to one endpoint at a time and moves it by itself to wherever an authenticated
//! packet came from ("roaming", WireGuard paper 2.1). So there are two truths, kept apart: what we
//! **want** ([`Path::wanted`]) and what is **observed** ([`counters`]). A peer that can be reached
//! by relay starts there, at its own address on `lo`; a direct path replaces that when it is
//! proven, and the session goes on.
//!
//! **Probes promote.** *Candidates* are what the netmap and the peer's calls name and where its
//! pings come from ([`candidate`]). All of them are pinged from WireGuard's own port in a *burst*
//! ([`probe`]), when there is traffic or news; a burst calls the peer by relay, so that both sides
//! send at once and both routers let answers in. An answer proves both directions ([`disco`]). The
//! first one is taken, a better one ([`score`]: nearness, family, time) replaces it.
//!
//! **Only distress demotes.** While there is traffic a direct path is pinged every
//! [`probe::HEARTBEAT`]; without answers it is given up within [`probe::DISTRESS`] pings. And it
//! must carry packets. With its pongs the peer says how much of the session its kernel took
//! ([`claims`]): if we send and that does not grow, something on the way swallows WireGuard, and
//! the path is given up as well. Then we do not answer the peer's pings for a while, so that it
//! comes to the same end. Of a peer that does not say it, silence has to do: if we had heard from
//! it and hear nothing for [`PROOF`] though probes are answered; and if the relay brings no
//! answers either, it had just nothing to say, and the path is forgiven.
//!
//! The other way round, packets that come from there are a better proof than any probe: whose agent
//! is dead, or just starts anew, still has a kernel that answers, and keeps its path.
//! A path idle for [`ACTIVE`] is left as it is, and nothing is sent.
//!
//! **Nothing flaps.** After a return to the relay the next direct path is taken [`HOLD`] later at
//! the earliest, unless the host's own links change. Where the kernel roams, we follow; a choice of
//! ours that the peer overrules by sending from elsewhere is not repeated for five minutes.
//!
//! Where neither probes nor relays reach, the kernel's counters are all there is ([`blind`]).

mod blind;
pub mod candidate;
mod claims;
mod counters;
mod crossing;
mod disco;
pub mod guess;
pub mod probe;
mod score;

pub use blind::{PATIENCE_LIVE, PATIENCE_TRYING};
pub use candidate::{Candidate, Cover, Fault, Source, Surroundings, Tier};

use crate::plan::Stats;
use blind::Blind;
use claims::{Claim, Told};
use counters::{Doubt, Silence, Trial};
use crossing::Crossing;
use guess::Guesses;
use probe::{Budget, Burst, DOUBT, Heart, PROMPTED_PAUSE};
use score::Score;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A peer with which packets were exchanged this lately is in use.
pub const ACTIVE: Duration = Duration::from_secs(45);
/// A direct path that answers probes is given up if packets get no answer for this long.
pub const PROOF: Duration = Duration::from_secs(3);
/// Whoever was heard this lately is expected to answer.
const CONVERSING: Duration = Duration::from_secs(10);
/// Time for the relay to bring the answers that a direct path did not.
const TRIAL: Duration = Duration::from_secs(6);
/// From a return to the relay to the next direct path, at least; and between two changes among
/// direct paths that are no improvement.
pub const HOLD: Duration = Duration::from_secs(10);
/// How much later than the other one the node with the greater key greets: two handshakes that
/// cross cancel each other.
pub const YIELD: Duration = Duration::from_millis(300);
/// Bursts that news start, with nobody sending.
const EAGER_BURSTS: u32 = 3;
/// Pings that are waited for longer while the kernel's counters are not known yet.
const WITNESS: u32 = 3;
/// News of relayed packets come at least so often while there are any.
const WITNESSED: Duration = Duration::from_secs(5);
/// A ping back to where a ping came from, at most so often.
const RETURN_PAUSE: Duration = Duration::from_millis(500);

/// A keepalive: an empty data message (WireGuard paper 5.4.6). It is not answered.
const KEEPALIVE_BYTES: u64 = 32;
/// What a handshake adds in one direction at most: a message and the first empty data message.
const HANDSHAKE_BYTES: u64 = 148 + KEEPALIVE_BYTES;

/// The way that packets to a peer are to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By relay.
    Relay,
    /// To this endpoint, which is proven or was found in use.
    Direct(SocketAddr),
    /// To whatever candidate may work.
    Blind,
}

/// How we reach one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Whether the peer probes.
    probes: bool,
    /// Whether the other side goes first where two would cross.
    yields: bool,
    /// Its address on `lo`, if a relay can be used; and whether that is connected.
    relay: Option<(SocketAddr, bool)>,
    candidates: BTreeMap<SocketAddr, Candidate>,
    /// The candidates, best first.
    ranked: Vec<SocketAddr>,
    way: Way,
    /// Since when.
    since: Option<Instant>,
    /// When a direct path last took the place of another way.
    promoted: Option<Instant>,
    blind: Blind,
    /// What was last observed; `None` before the first observation.
    seen: Option<Stats>,
    seen_at: Option<Instant>,
    /// Whether anything came back on the endpoint in use.
    live: bool,
    /// When bytes last came.
    heard: Option<Instant>,
    active_until: Option<Instant>,
    heart: Heart,
    doubt: Option<Doubt>,
    /// Whether the kernel is to be looked at now.
    look: bool,
    /// When packets last came by relay.
    relayed: Option<Instant>,
    last_direct: Option<SocketAddr>,
    burst: Option<Burst>,
    /// When the last one began.
    last_burst: Option<Instant>,
    next_burst: Option<Instant>,
    /// Bursts in a row that found nothing.
    tries: usize,
    /// Bursts that are made although nobody sends.
    eager: u32,
    called: Option<Instant>,
    /// No direct path before this, and why.
    hold: Option<(Instant, Fault)>,
    silence: Option<Silence>,
    /// What the peer said last of our packets,
    told: Option<Told>,
    /// what it had said when the kernel was last looked at,
    told_before: Option<Told>,
    /// and what it is to say of those that we sent since.
    claim: Option<Claim>,
    /// Whether it said that they did not come.
    refuted: bool,
    /// The peer has nothing to say: silence proves nothing.
    one_way: bool,
    trial: Option<Trial>,
    greeting: Greeting,
    /// By which endpoint the peer was asked last, and as whom it saw us there.
    appears: Option<(SocketAddr, SocketAddr)>,
    /// Whether that became another address, which the peer's kernel does not know yet.
    strayed: bool,
    /// Whether the host's links changed since a direct path last answered.
    shaken: bool,
    /// Until when the other side may go first.
    settles: Option<Instant>,
    /// Whether something became due that the kernel is to be told.
    ripe: bool,
    /// To be pinged at once.
    urgent: BTreeSet<SocketAddr>,
    newcomers: Budget,
    guesses: Guesses,
    crossing: Crossing,
}

/// An empty packet that makes a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Greeting {
    None,
    /// As soon as there is a way.
    Owed,
    Due(Instant),
    Now,
}

/// What is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// A ping to this endpoint.
    Ping(SocketAddr),
    /// Likewise, and the peer may not be there.
    Guess(SocketAddr),
    /// A call by relay, with our endpoints.
    Call,
}

impl Path {
    /// The path of a peer that was just learned, with its candidates in order of preference.
    /// `yields`: whether our key is the greater one; `relay`: see [`Path::set_relay`].
    #[must_use]
    pub fn new(
        probes: bool,
        yields: bool,
        candidates: &[(Tier, SocketAddr)],
        relay: Option<(SocketAddr, bool)>,
    ) -> Self {
        let mut path = Self {
            probes,
            yields,
            relay: relay.filter(|_| probes),
            candidates: BTreeMap::new(),
            ranked: Vec::new(),
            way: Way::Blind,
            since: None,
            promoted: None,
            blind: Blind::default(),
            seen: None,
            seen_at: None,
            live: false,
            heard: None,
            active_until: None,
            heart: Heart::default(),
            doubt: None,
            look: false,
            relayed: None,
            last_direct: None,
            burst: None,
            last_burst: None,
            next_burst: None,
            tries: 0,
            eager: 0,
            called: None,
            hold: None,
            silence: None,
            told: None,
            told_before: None,
            claim: None,
            refuted: false,
            one_way: false,
            trial: None,
            greeting: Greeting::None,
            appears: None,
            strayed: false,
            shaken: false,
            settles: None,
            ripe: false,
            urgent: BTreeSet::new(),
            newcomers: Budget::default(),
            guesses: Guesses::default(),
            crossing: Crossing::default(),
        };
        path.name(candidates, Source::Netmap);
        match path.relay {
            Some(_) => path.way = Way::Relay,
            None => path.blind = Blind::new(path.ranked.first().copied()),
        }
        path
    }

    /// What the kernel is to be told now, if anything.
    #[must_use]
    pub fn wanted(&self) -> Option<SocketAddr> {
        match self.way {
            Way::Relay => self.relay.map(|(loopback, _)| loopback),
            Way::Direct(endpoint) => Some(endpoint),
            Way::Blind => self.blind.wanted,
        }
    }

    /// The way that is wanted.
    #[must_use]
    pub fn way(&self) -> Way {
        self.way
    }

    /// Since when, if it ever changed.
    #[must_use]
    pub fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Whether packets come back on the endpoint in use, as far as was observed.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Whether packets were exchanged lately.
    #[must_use]
    pub fn is_active(&self, now: Instant) -> bool {
        self.active_until.is_some_and(|until| now < until)
    }

    /// Whether candidates are being pinged for a path.
    #[must_use]
    pub fn is_probing(&self) -> bool {
        self.burst.is_some()
    }

    /// Whether the peer answers probes at all, in this version of it.
    #[must_use]
    pub fn can_probe(&self) -> bool {
        self.probes
    }

    /// Until when no direct path is taken, because one just failed.
    #[must_use]
    pub fn held_until(&self) -> Option<Instant> {
        self.hold.map(|(until, _)| until)
    }

    /// Why no direct path is taken now, because one just failed.
    fn held(&self, now: Instant) -> Option<Fault> {
        let (_, fault) = self.hold.filter(|(until, _)| now < *until)?;
        Some(fault)
    }

    /// Whether the kernel's counters should be looked at often: they prove a direct path in use.
    #[must_use]
    pub fn is_watched(&self, now: Instant) -> bool {
        let in_use = self.is_active(now) || self.doubt.is_some();
        in_use && matches!(self.way, Way::Direct(_)) && self.relay.is_some()
    }

    /// Whether packets go out and none comes back, though probes are answered.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.silence.is_some()
    }

    /// Whether the peer's relay is to be connected to: it is the way, or may soon have to be.
    #[must_use]
    pub fn needs_relay(&self) -> bool {
        let doubted = self.is_silent() || self.doubt.is_some() || self.refuted;
        self.way == Way::Relay || doubted
    }

    /// Packets were too long for the path: that they had no answer proves nothing against it.
    pub fn excuse(&mut self) {
        self.silence = None;
    }

    /// How long an answer of the endpoint in use took lately.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        let Way::Direct(endpoint) = self.way else {
            return None;
        };
        self.candidates.get(&endpoint)?.answered.map(|(_, rtt)| rtt)
    }

    /// The kernel does not have the peer, or no longer: it is to be told all of it.
    pub fn unmade(&mut self) {
        if self.seen.take().is_some() {
            self.live = false;
            if self.way == Way::Blind {
                let best = self.ranked.first().copied();
                self.blind = Blind::new(self.last_direct.or(best));
            }
        }
    }

    /// Whether the kernel is to be given the peer anew; then it is as one that it does not have, and
    /// is to be greeted. Said once.
    pub fn take_renewal(&mut self) -> bool {
        let due = self.crossing.take();
        if due {
            self.unmade();
            self.greeting = Greeting::Now;
        }
        due
    }

    /// Whether the kernel's counters were ever looked at.
    #[must_use]
    pub fn is_seen(&self) -> bool {
        self.seen.is_some()
    }

    /// Whether the kernel's counters should be looked at now. Said once.
    pub fn take_look(&mut self) -> bool {
        std::mem::take(&mut self.look)
    }

    /// The candidates.
    #[must_use]
    pub fn candidates(&self) -> &BTreeMap<SocketAddr, Candidate> {
        &self.candidates
    }

    /// Whether a router between us and the peer must be kept from forgetting us.
    #[must_use]
    pub fn wants_keepalive(&self) -> bool {
        match self.way {
            Way::Relay => false,
            Way::Direct(endpoint) => {
                let tier = self.candidates.get(&endpoint).map(|it| it.tier);
                // Switched on without a session it begins one, and two must not cross.
                tier != Some(Tier::OnLink) && (self.live || self.settles.is_none())
            }
            // A handshake to a wrong endpoint would hold up the right one for 5 s.
            Way::Blind => !self.probes || self.tries > 0 || self.live,
        }
    }

    /// A device that has just come up has no sessions, and peers do not know: they are to be told
    /// as soon as there is a way. Whether there is none now.
    #[must_use]
    pub fn is_mute(&self) -> bool {
        match self.way {
            Way::Relay => !self.is_relay_up(),
            Way::Direct(_) => false,
            Way::Blind => self.probes && self.tries == 0 && self.burst.is_some(),
        }
    }

    /// The peer is to be greeted as soon as there is a way.
    pub fn owe_greeting(&mut self) {
        if self.greeting == Greeting::None {
            self.greeting = Greeting::Owed;
        }
    }

    /// The peer was to be greeted, and was not.
    pub fn owe_greeting_now(&mut self) {
        self.greeting = Greeting::Now;
    }

    /// Whether the peer is to be greeted now. Said once.
    pub fn take_greeting(&mut self) -> bool {
        if self.greeting != Greeting::Now {
            return false;
        }
        let mute = self.is_mute();
        self.greeting = if mute { Greeting::Owed } else { Greeting::None };
        !mute
    }

    /// Whether something became due that the kernel is to be told. Said once.
    pub fn take_ripe(&mut self) -> bool {
        std::mem::take(&mut self.ripe)
    }

    fn greet(&mut self, now: Instant) {
        let later = if self.yields { YIELD } else { Duration::ZERO };
        self.greeting = Greeting::Due(now + later);
    }

    fn is_relay_up(&self) -> bool {
        self.relay.is_some_and(|(_, up)| up)
    }

    fn name(&mut self, candidates: &[(Tier, SocketAddr)], source: Source) {
        for candidate in self.candidates.values_mut() {
            candidate.sources.remove(&source);
        }
        for (tier, addr) in candidates {
            let entry = self.candidates.entry(*addr);
            let candidate = entry.or_insert_with(|| Candidate::new(*tier, source));
            candidate.tier = *tier;
            candidate.sources.insert(source);
        }
        let in_use = match self.way {
            Way::Direct(endpoint) => Some(endpoint),
            Way::Relay | Way::Blind => None,
        };
        self.candidates
            .retain(|addr, it| !it.sources.is_empty() || Some(*addr) == in_use);
        self.rank();
    }

    fn rank(&mut self) {
        let before = std::mem::take(&mut self.ranked);
        let place = |addr: &SocketAddr| before.iter().position(|it| it == addr);
        self.ranked = self.candidates.keys().copied().collect();
        self.ranked.sort_by_key(|addr| {
            (
                self.candidates[addr].tier,
                place(addr).unwrap_or(usize::MAX),
            )
        });
    }

    /// The netmap's candidates are these. A path that works is not disturbed. Returns whether that
    /// is news.
    pub fn set_candidates(&mut self, candidates: &[(Tier, SocketAddr)]) -> bool {
        let named = |it: &Candidate| it.sources.contains(&Source::Netmap);
        let before = self.candidates.iter().filter(|(_, it)| named(it));
        let before: BTreeSet<_> = before.map(|(addr, it)| (it.tier, *addr)).collect();
        let is_news = before != candidates.iter().copied().collect();
        // The coordinator's order decides among equals.
        self.ranked = candidates.iter().map(|(_, addr)| *addr).collect();
        self.name(candidates, Source::Netmap);
        if self.way == Way::Blind {
            let current = self.seen.as_ref().and_then(|stats| stats.endpoint);
            self.blind.set_candidates(&self.ranked, self.live, current);
        }
        is_news
    }

    /// Whether the peer probes, from now on.
    pub fn set_probes(&mut self, probes: bool) {
        self.probes = probes;
    }

    /// The peer's address on `lo` if it can be reached by relay, and whether that relay is
    /// connected.
    pub fn set_relay(&mut self, now: Instant, relay: Option<(SocketAddr, bool)>) {
        let was_up = self.is_relay_up();
        self.relay = relay.filter(|_| self.probes);
        match (self.way, self.relay) {
            (Way::Relay, None) => {
                self.turn(now, Way::Blind);
                // What worked last may work still: the peer's agent may be all that is gone.
                let best = self.ranked.first().copied();
                self.blind = Blind::new(self.last_direct.or(best));
                self.seek(now, true);
            }
            // What works would be direct by now.
            (Way::Blind, Some(_)) => self.turn(now, Way::Relay),
            _ => {}
        }
        if self.is_relay_up() && !was_up {
            if self.greeting == Greeting::Owed && self.way == Way::Relay {
                self.greet(now);
            }
            // Whoever could not be called can be now.
            if self.burst.is_some() || (self.way == Way::Relay && self.is_active(now)) {
                self.burst = None;
                self.called = None;
                self.seek(now, false);
            }
        }
    }

    fn turn(&mut self, now: Instant, way: Way) {
        if matches!(way, Way::Direct(_)) && !matches!(self.way, Way::Direct(_)) {
            self.promoted = Some(now);
        }
        (self.way, self.since) = (way, Some(now));
        self.settles = (self.yields && !self.live).then_some(now + YIELD);
        self.silence = None;
        (self.told, self.told_before, self.claim) = (None, None, None);
        self.refuted = false;
        (self.heart, self.doubt) = (Heart::default(), None);
        self.blind = Blind::default();
        if let Way::Direct(endpoint) = way {
            self.last_direct = Some(endpoint);
        }
    }

    /// There is news of either end: a path is looked for, or the one in use is asked. `eager`:
    /// although nobody sends.
    pub fn seek(&mut self, now: Instant, eager: bool) {
        if !self.probes {
            return;
        }
        if eager {
            self.eager = EAGER_BURSTS;
        }
        self.tries = 0;
        if matches!(self.way, Way::Direct(_)) {
            self.heart.check(now);
        }
        self.freshen_burst(now);
        self.start_burst(now);
    }

    /// The host's links changed. What fell silent may speak again, and the peer's kernel may send
    /// to where we are no more: it learns better from a packet of ours, as soon as there is a way.
    pub fn shaken(&mut self, now: Instant) {
        self.shaken = true;
        self.hold = None;
        for candidate in self.candidates.values_mut() {
            candidate.heard(now);
        }
    }

    /// The host slept: its kernel wiped the session's keys, and the peer's kernel did not. Who can be
    /// asked directly is greeted when it answers; who is relayed is greeted as soon as that works.
    pub fn woke(&mut self, now: Instant) {
        if self.way == Way::Relay && self.live && self.greeting == Greeting::None {
            match self.is_relay_up() {
                true => self.greet(now),
                false => self.greeting = Greeting::Owed,
            }
        }
    }

    /// We can be reached elsewhere: whoever was called with other endpoints is called again.
    pub fn recall(&mut self, now: Instant) {
        self.called = None;
        if let Some(burst) = &mut self.burst {
            burst.hurry(now);
        }
    }

    fn start_burst(&mut self, now: Instant) {
        if self.burst.is_none() {
            (self.burst, self.last_burst) = (Some(Burst::new(now)), Some(now));
        }
        self.next_burst = None;
    }

    /// A burst that the other side asks for, by a call or by packets.
    fn prompted(&mut self, now: Instant) {
        self.freshen_burst(now);
        if self.may_prompt(now) {
            self.start_burst(now);
        }
    }

    /// The pauses of a burst become longer and longer: with news it begins anew.
    fn freshen_burst(&mut self, now: Instant) {
        if self.burst.is_some() && self.may_prompt(now) {
            self.burst = None;
            self.start_burst(now);
        }
    }

    fn may_prompt(&self, now: Instant) -> bool {
        let recent = |at: Instant| now.saturating_duration_since(at) < PROMPTED_PAUSE;
        !self.last_burst.is_some_and(recent)
    }

    /// Packets of the peer come by relay.
    pub fn relayed(&mut self, now: Instant) {
        self.relayed = Some(now);
        self.activate(now);
        match self.way {
            // The peer knows more than we do.
            Way::Direct(endpoint) if self.heart.unanswered >= DOUBT => {
                self.demote(now, endpoint, Fault::Silent);
            }
            Way::Direct(_) => self.check_if_due(now),
            Way::Relay | Way::Blind => self.prompted(now),
        }
    }

    /// Asks the path in use, if that was not just done.
    fn check_if_due(&mut self, now: Instant) {
        let Way::Direct(endpoint) = self.way else {
            return;
        };
        let asked = self.candidates.get(&endpoint).and_then(|it| it.asked);
        let lately = |at: &Instant| now.saturating_duration_since(*at) < RETURN_PAUSE;
        match asked.filter(lately) {
            _ if !self.probes => {}
            Some(at) => {
                self.heart.next.get_or_insert(at + probe::HEARTBEAT);
            }
            None => self.heart.check(now),
        }
    }

    fn activate(&mut self, now: Instant) {
        let was = self.is_active(now);
        self.active_until = Some(now + ACTIVE);
        if was || !self.probes {
            return;
        }
        self.tries = 0;
        match self.way {
            Way::Direct(_) => self.check_if_due(now),
            Way::Relay | Way::Blind => self.start_burst(now),
        }
    }

    /// Both answer, or the one in use no longer does.
    fn compare(&mut self, now: Instant, current: SocketAddr, other: SocketAddr) {
        let score = |addr| Some(Score::of(addr, self.candidates.get(&addr)?));
        let (Some(old), Some(new)) = (score(current), score(other)) else {
            return;
        };
        let settled = |since| now.saturating_duration_since(since) >= HOLD;
        let settled = self.since.is_none_or(settled) || self.relay.is_none();
        let in_doubt = self.heart.unanswered >= DOUBT;
        let change = in_doubt || new.is_much_faster_than(old);
        if new.class < old.class || (settled && change) {
            self.promote(now, other);
        }
    }

    fn promote(&mut self, now: Instant, endpoint: SocketAddr) {
        self.turn(now, Way::Direct(endpoint));
        self.tries = 0;
        self.hold = None;
        self.trial = None;
        if self.is_active(now) {
            self.heart.next = Some(now + probe::HEARTBEAT);
        }
        let unheard = !self.live && self.relay.is_none();
        if self.greeting == Greeting::Owed || (unheard && self.greeting == Greeting::None) {
            self.greet(now);
        }
    }

    /// The direct path in use is no good any more.
    fn demote(&mut self, now: Instant, endpoint: SocketAddr, fault: Fault) {
        if self.relay.is_some() {
            if let Some(candidate) = self.candidates.get_mut(&endpoint) {
                candidate.fail(now, fault);
            }
            // What swallows packets of one path swallows those of all, most likely.
            let since = match fault {
                Fault::Swallows => Some(now),
                Fault::Silent | Fault::Overruled => self.promoted,
            };
            self.hold = since.map(|since| (since + HOLD, fault));
            self.turn(now, Way::Relay);
            // The other side must know, whatever it was told before.
            self.called = None;
        } else {
            self.turn(now, Way::Blind);
        }
        self.burst = None;
        self.start_burst(now);
    }
}

#[cfg(test)]
mod tests;
