//! [`Mtu`]: how long the packets may be that the direct path to one peer takes.
//!
//! Nobody else tells. Over IPv4 a router may cut WireGuard's packets, and many a firewall drops the
//! pieces; over IPv6 what is too long is dropped, and the word of it (ICMP) often as well. So pings
//! are padded and sent whole, and those that are answered say what passes.
//!
//! **A study** asks in [`ROUNDS`] rounds, each as long as an answer may take:
//!
//! ```text
//! first    the longest that our own links take, 1,500 where that is more, what we knew
//! then     every rung of LADDER between the longest answered and the longest asked
//! ```
//!
//! So a path without a bottleneck costs one ping and one round trip. What is answered is believed at
//! once, since nothing but arriving brings an answer. That the rest does not pass is believed when all
//! rounds are over and something shorter was answered meanwhile, be it a ping without padding: a lost
//! ping is no verdict, and a path that answers nothing has another illness, which is not treated here.
//!
//! **When.** On each new path at once. Then, while the peer is in use, the figure is confirmed by one
//! ping every [`CONFIRM`], and longer ones are tried every [`GROW`], the first time after
//! [`REGROW`]. It is confirmed at once when packets get no answer ([`Mtu::suspect`]), and when the
//! other side is seen to ask for less. An idle peer costs nothing; one in use at most 900 pings an
//! hour.
//!
//! Each end finds out what it may send; what it receives is the other's to find out.

use proto::disco::{PING_BYTES, TxId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Bytes of a packet, its IP header included, that are worth asking for: what paths are known to
/// take. IPv6's least; what leaves IPv6's least to the tunnel, over IPv4 and over IPv6; clouds'
/// gateways, VXLAN, GRE and other tunnels; PPPoE; Ethernet; clouds' and everybody's jumbo frames.
pub const LADDER: [u16; 12] = [
    FLOOR, 1_340, 1_360, 1_400, 1_420, 1_440, 1_460, 1_480, 1_492, ETHERNET, 8_896, CEILING,
];
/// Nothing shorter is asked for. A path that takes less is treated as if it took this.
pub const FLOOR: u16 = 1_280;
/// Nothing longer is asked for.
pub const CEILING: u16 = 9_000;
const ETHERNET: u16 = 1_500;
/// A ping without padding: whether there is a path at all.
const BARE: u16 = 0;

/// What WireGuard adds to a packet over IPv4: IP 20, UDP 8, its own header 16 and tag 16. It pads to
/// sixteens, but never beyond the MTU of the packet's route (`calculate_skb_padding`).
pub const OVERHEAD_V4: u16 = 60;
/// The same over IPv6, whose header has 40 bytes.
pub const OVERHEAD_V6: u16 = 80;

/// How often a length is asked for at most, until no answer is an answer.
pub const ROUNDS: u8 = 3;
/// A round takes at least so long.
pub const LEAST_PATIENCE: Duration = Duration::from_millis(250);
/// And at most.
pub const MOST_PATIENCE: Duration = Duration::from_secs(1);
/// Between two confirmations of what is known of a path in use.
pub const CONFIRM: Duration = Duration::from_secs(5);
/// Between two studies that begin with lengths beyond what is known.
pub const GROW: Duration = Duration::from_secs(600);
/// The same, after the figure became another one: what made it fall may be over, and what it could
/// be besides may have been lost.
pub const REGROW: Duration = Duration::from_secs(60);
/// Between two studies that suspicion begins.
pub const SUSPECT_PAUSE: Duration = Duration::from_secs(2);
/// A round that there was no budget for is tried again after this.
pub const POSTPONED: Duration = Duration::from_millis(100);

/// The direct path as it is now, as far as it matters here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Where packets go; `None` while the path is not direct, or the peer answers no pings.
    pub endpoint: Option<SocketAddr>,
    /// Whether packets were exchanged lately.
    pub active: bool,
    /// How long an answer took lately.
    pub rtt: Option<Duration>,
    /// The longest packet that a link of this host takes, in bytes.
    pub links: u32,
}

/// What is known of the path to one peer, and what is being found out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mtu {
    seen: Seen,
    /// The longest packet that passes, in bytes, as far as it was found out.
    known: Option<u16>,
    study: Option<Study>,
    /// When the next one is due, if the peer is in use then.
    next: Option<Instant>,
    /// When lengths beyond what is known are tried again.
    grow_at: Option<Instant>,
    suspected: Option<Instant>,
    /// The padding that the other side last asked for.
    overheard: Option<u16>,
}

/// Pings under way.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Study {
    /// Rounds that were begun.
    round: u8,
    /// When the next one begins, or the last one ends.
    next: Instant,
    /// What was known before.
    known: Option<u16>,
    /// The longest that is asked for.
    top: u16,
    /// The longest that was answered.
    best: Option<u16>,
    asked: BTreeMap<TxId, u16>,
}

impl Mtu {
    /// The longest packet that the path takes, in bytes with its IP header, if that is known;
    /// [`FLOOR`] stands for less, too.
    #[must_use]
    pub fn known(&self) -> Option<u16> {
        self.known
    }

    /// The longest packet inside the tunnel that leads to none longer than that.
    #[must_use]
    pub fn inner(&self) -> Option<u16> {
        Some(self.known? - overhead(self.seen.endpoint?))
    }

    /// Whether pings are under way.
    #[must_use]
    pub fn is_studying(&self) -> bool {
        self.study.is_some()
    }

    /// Takes over what an earlier run of the agent found out, as said by its routes: packets of
    /// this many bytes inside the tunnel pass. Whoever knows better does not listen.
    pub fn adopt(&mut self, inner: u16) {
        if let (None, Some(endpoint)) = (self.known, self.seen.endpoint) {
            let bytes = inner.saturating_add(overhead(endpoint));
            self.known = Some(bytes.clamp(FLOOR, self.ceiling()));
        }
    }

    /// The path is this now. Another one is studied at once.
    pub fn follow(&mut self, now: Instant, seen: Seen) {
        let before = std::mem::replace(&mut self.seen, seen);
        if before.endpoint != seen.endpoint {
            *self = Self {
                seen,
                ..Self::default()
            };
        }
        let ceiling = self.ceiling();
        self.known = self.known.map(|known| known.min(ceiling));
        let changed = before.endpoint != seen.endpoint || before.links != seen.links;
        if changed && seen.endpoint.is_some() {
            self.begin(now, true);
        }
    }

    /// Packets get no answer: maybe because they are too long now.
    pub fn suspect(&mut self, now: Instant) {
        let lately = |at| now.saturating_duration_since(at) < SUSPECT_PAUSE;
        let idle = self.study.is_none() && self.seen.endpoint.is_some();
        if idle && !self.suspected.is_some_and(lately) {
            self.suspected = Some(now);
            self.begin(now, false);
        }
    }

    /// The other side asks for packets with so much padding: for shorter ones than pass, only when
    /// longer ones no longer do.
    pub fn overheard(&mut self, now: Instant, theirs: u16) {
        let Some((known, endpoint)) = self.known.zip(self.seen.endpoint) else {
            return;
        };
        // Who asks for the same again and again only confirms what it knows.
        let usual = self.overheard.replace(theirs) == Some(theirs);
        if theirs < padding(known, endpoint) && !usual {
            self.suspect(now);
        }
    }

    /// When [`Mtu::poll`] has something to do at the latest; `None`: not before something happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.seen.endpoint?;
        match &self.study {
            Some(study) => Some(study.next),
            None => self.next.filter(|_| self.seen.active),
        }
    }

    /// Which lengths are to be asked for now.
    pub fn poll(&mut self, now: Instant) -> Vec<u16> {
        if self.deadline().is_none_or(|at| now < at) {
            return Vec::new();
        }
        if self.study.is_none() {
            let grows = self.grow_at.is_none_or(|at| now >= at);
            self.begin(now, grows);
        }
        let ceiling = self.ceiling();
        let patience = self.patience();
        let Some(study) = &mut self.study else {
            return Vec::new();
        };
        if study.round == ROUNDS {
            self.conclude(now);
            return Vec::new();
        }
        if study.best.is_some_and(|best| best >= FLOOR) {
            self.known = self.known.max(study.best);
        }
        study.next = now + patience;
        study.round += 1;
        let landmark = Some(ETHERNET).filter(|it| *it < study.top && self.known != Some(study.top));
        let first = [Some(study.top), landmark, self.known];
        let mut lengths: Vec<u16> = match study.round {
            1 => first.into_iter().flatten().collect(),
            _ => [BARE]
                .into_iter()
                .chain(rungs(ceiling))
                .filter(|rung| Some(*rung) > study.best && *rung <= study.top)
                .collect(),
        };
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// The round that is due cannot be paid for now.
    pub fn postpone(&mut self, now: Instant) {
        match &mut self.study {
            Some(study) => study.next = now + POSTPONED,
            None => self.next = Some(now + POSTPONED),
        }
    }

    /// A ping of this length went out.
    pub fn pinged(&mut self, bytes: u16, tx: TxId) {
        if let Some(study) = &mut self.study {
            study.asked.insert(tx, bytes);
        }
    }

    /// An answer came from there. Returns whether it was one to a ping of ours.
    pub fn ponged(&mut self, now: Instant, tx: TxId, from: SocketAddr) -> bool {
        let Some(study) = &mut self.study else {
            return false;
        };
        let Some(bytes) = study.asked.remove(&tx) else {
            return false;
        };
        if self.seen.endpoint != Some(from) {
            return true;
        }
        study.best = study.best.max(Some(bytes));
        if study.best == Some(study.top) {
            self.conclude(now);
        }
        true
    }

    fn begin(&mut self, now: Instant, grows: bool) {
        let ceiling = self.ceiling();
        let top = match self.known {
            Some(known) if !grows => known,
            Some(_) | None => ceiling,
        };
        self.study = Some(Study {
            round: 0,
            next: now,
            known: self.known,
            top,
            best: None,
            asked: BTreeMap::new(),
        });
    }

    fn conclude(&mut self, now: Instant) {
        let Some(study) = self.study.take() else {
            return;
        };
        let found = study.best.map(|best| best.max(FLOOR)).or(self.known);
        let (fell, news) = (found < study.known, found != study.known);
        if fell || study.top == self.ceiling() {
            let again = news && found != Some(self.ceiling());
            self.grow_at = Some(now + if again { REGROW } else { GROW });
        }
        let confirm_at = Some(now + CONFIRM);
        // Nothing is left to fall to.
        self.next = if found == Some(FLOOR) {
            self.grow_at
        } else {
            confirm_at
        };
        self.known = found;
    }

    fn ceiling(&self) -> u16 {
        ceiling(self.seen.links)
    }

    fn patience(&self) -> Duration {
        let twice = self.seen.rtt.map(|rtt| rtt.saturating_mul(2));
        twice
            .unwrap_or_default()
            .clamp(LEAST_PATIENCE, MOST_PATIENCE)
    }
}

/// The device's MTU where our own links take packets of this many bytes: what any path may lead to,
/// for routes to say less.
#[must_use]
pub fn of_device(links: u32) -> u32 {
    ceiling(links).saturating_sub(OVERHEAD_V4).max(FLOOR).into()
}

/// The longest packet worth asking for where our own links take this many bytes.
fn ceiling(links: u32) -> u16 {
    let links = u16::try_from(links).unwrap_or(u16::MAX);
    links.clamp(FLOOR, CEILING)
}

/// How many zeros make a ping to `endpoint` a packet of so many bytes.
#[must_use]
pub fn padding(bytes: u16, endpoint: SocketAddr) -> u16 {
    // WireGuard's own header and tag are not in it.
    let headers = overhead(endpoint) - 32;
    bytes.saturating_sub(headers + PING_BYTES as u16)
}

fn overhead(endpoint: SocketAddr) -> u16 {
    match endpoint {
        SocketAddr::V4(_) => OVERHEAD_V4,
        SocketAddr::V6(_) => OVERHEAD_V6,
    }
}

/// The lengths worth asking for where our links take `ceiling`.
fn rungs(ceiling: u16) -> impl Iterator<Item = u16> {
    let below = LADDER.into_iter().filter(move |rung| *rung < ceiling);
    below.chain([ceiling])
}

#[cfg(test)]
mod tests;
