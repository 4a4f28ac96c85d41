//! Candidates: endpoints that a peer may be reached at, how near they are, and what probes of them
//! came to.

use proto::disco::TxId;
use proto::net::Prefix;
use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Pings of one candidate whose answers are still waited for.
const MAX_OUTSTANDING: usize = 8;
/// An answer that comes later than this is none.
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// A candidate that fell silent is not chosen again for this long.
pub const SILENT_PAUSE: Duration = Duration::from_secs(10);
/// One that answers probes and swallows packets is not chosen for this long at first, and for
/// twice as long each time it does so again.
pub const SWALLOWED_PAUSE: Duration = Duration::from_secs(30);
/// The longest such pause.
pub const LONGEST_SWALLOWED_PAUSE: Duration = Duration::from_secs(600);
/// One that the kernel was moved away from, though it answered, is left to the peer's choice.
pub const OVERRULED_PAUSE: Duration = Duration::from_secs(300);

/// How near a candidate is, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// In a network that one of our own interfaces is in.
    OnLink,
    /// A private address (RFC 1918, RFC 4193) that a route leads to.
    Private,
    /// Any other that a route leads to.
    Public,
    /// No route leads there now; one may come.
    Unrouted,
}

/// What must be known of this host to say how near a candidate is.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Our own addresses. Hosts share some by convention (container bridges): such a candidate
    /// would reach ourselves.
    pub own: BTreeSet<IpAddr>,
    /// Networks that our interfaces are in, the WireGuard device's excepted.
    pub on_link: Cover,
    /// Where the host's own routes lead, the WireGuard device's excepted.
    pub routed: Cover,
    /// What is reached through the tunnel: an endpoint in there would be a loop.
    pub tunnelled: Cover,
    /// The longest packet, in bytes, that a link of this host takes.
    pub mtu: u32,
}

/// The addresses of many prefixes: a question costs one look-up for each length in use, however
/// many prefixes there are.
#[derive(Clone, Debug, Default)]
pub struct Cover {
    prefixes: BTreeSet<Prefix>,
    lengths: BTreeSet<u8>,
}

impl FromIterator<Prefix> for Cover {
    fn from_iter<I: IntoIterator<Item = Prefix>>(prefixes: I) -> Self {
        let prefixes: BTreeSet<Prefix> = prefixes.into_iter().collect();
        let lengths = prefixes.iter().map(Prefix::len).collect();
        Self { prefixes, lengths }
    }
}

impl Cover {
    /// Whether a prefix contains `addr`.
    #[must_use]
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.lengths.iter().any(|len| {
            let around = Prefix::containing(addr, *len);
            around.is_ok_and(|around| self.prefixes.contains(&around))
        })
    }
}

impl Surroundings {
    /// How near `candidate` is; `None` if it cannot be used at all.
    #[must_use]
    pub fn tier(&self, candidate: SocketAddr) -> Option<Tier> {
        let ip = candidate.ip();
        if !is_usable(&candidate) || self.own.contains(&ip) || self.tunnelled.contains(ip) {
            return None;
        }
        Some(if self.on_link.contains(ip) {
            Tier::OnLink
        } else if !self.routed.contains(ip) {
            Tier::Unrouted
        } else if is_private(ip) {
            Tier::Private
        } else {
            Tier::Public
        })
    }

    /// The candidates that can be used, best first. The order that the coordinator gave decides
    /// among equals, so the result is the same wherever it is computed.
    #[must_use]
    pub fn rank(&self, candidates: &[SocketAddr]) -> Vec<(Tier, SocketAddr)> {
        let mut seen = BTreeSet::new();
        let mut ranked: Vec<(Tier, SocketAddr)> = candidates
            .iter()
            .filter(|candidate| seen.insert(**candidate))
            .filter_map(|candidate| Some((self.tier(*candidate)?, *candidate)))
            .collect();
        ranked.sort_by_key(|(tier, _)| *tier);
        ranked
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_private(),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}

fn is_usable(candidate: &SocketAddr) -> bool {
    let ip = candidate.ip();
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    candidate.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !ip.is_loopback()
        && !link_local
}

/// Who named a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The netmap.
    Netmap,
    /// The peer's own call.
    Call,
    /// A packet of the peer came from there.
    Seen,
}

/// Why a candidate is not chosen for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It stopped answering probes.
    Silent,
    /// It answers probes, and packets sent there are never answered.
    Swallows,
    /// It works, but the peer sends from elsewhere, and the kernel follows the peer.
    Overruled,
}

/// One candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// How near it is.
    pub tier: Tier,
    /// Who named it; never empty.
    pub sources: BTreeSet<Source>,
    /// When it was last probed.
    pub asked: Option<Instant>,
    /// When it last answered, and how long that took.
    pub answered: Option<(Instant, Duration)>,
    /// Until when it is not chosen, and why.
    pub fault: Option<(Instant, Fault)>,
    /// How often in a row it swallowed packets.
    swallowed: u32,
    outstanding: VecDeque<(TxId, Instant)>,
}

impl Candidate {
    pub(super) fn new(tier: Tier, source: Source) -> Self {
        Self {
            tier,
            sources: [source].into(),
            asked: None,
            answered: None,
            fault: None,
            swallowed: 0,
            outstanding: VecDeque::new(),
        }
    }

    pub(super) fn pinged(&mut self, now: Instant, tx: TxId) {
        self.asked = Some(now);
        if self.outstanding.len() == MAX_OUTSTANDING {
            self.outstanding.pop_front();
        }
        self.outstanding.push_back((tx, now));
    }

    /// Takes an answer; `None` if nobody asked, or too long ago. An answer counts once.
    pub(super) fn ponged(&mut self, now: Instant, tx: TxId) -> Option<Duration> {
        let position = self.outstanding.iter().position(|(sent, _)| *sent == tx)?;
        let (_, sent) = self.outstanding.remove(position)?;
        let rtt = now.saturating_duration_since(sent);
        if rtt > PING_TIMEOUT {
            return None;
        }
        self.answered = Some((now, rtt));
        Some(rtt)
    }

    /// Whether it answered at or after `since`.
    pub(super) fn answered_since(&self, since: Instant) -> bool {
        self.answered.is_some_and(|(at, _)| at >= since)
    }

    /// What is held against it now.
    #[must_use]
    pub fn fault_at(&self, now: Instant) -> Option<Fault> {
        let (until, fault) = self.fault?;
        (now < until).then_some(fault)
    }

    pub(super) fn fail(&mut self, now: Instant, fault: Fault) {
        let pause = match fault {
            Fault::Silent => SILENT_PAUSE,
            Fault::Overruled => OVERRULED_PAUSE,
            Fault::Swallows => {
                let doublings = self.swallowed.min(8);
                self.swallowed = self.swallowed.saturating_add(1);
                (SWALLOWED_PAUSE * (1 << doublings)).min(LONGEST_SWALLOWED_PAUSE)
            }
        };
        self.fault = Some((now + pause, fault));
    }

    /// Something came from there, or the way there is another: it may have been silent, it is to be
    /// asked again.
    pub(super) fn heard(&mut self, now: Instant) {
        if self.fault_at(now) == Some(Fault::Silent) {
            self.fault = None;
        }
    }

    /// What was held against it was not its fault.
    pub(super) fn forgive(&mut self) {
        self.fault = None;
        self.swallowed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn loops_and_unusable_candidates_are_left_out_and_near_ones_come_first() {
        let prefix = |text: &str| Cover::from_iter([text.parse().unwrap()]);
        let candidates = [
            "100.64.0.1:1",
            "198.51.100.1:1",
            "10.2.0.1:1",
            "10.1.0.1:1",
            "127.0.0.1:1",
            "10.1.0.1:0",
            "172.17.0.1:1",
            "10.1.0.1:1",
            "[2001:db8::1]:1",
        ];
        let host = Surroundings {
            own: BTreeSet::from(["172.17.0.1".parse().unwrap()]),
            on_link: prefix("10.1.0.0/24"),
            routed: prefix("0.0.0.0/0"),
            tunnelled: prefix("100.64.0.0/10"),
            mtu: 1500,
        };
        let expected = [
            (Tier::OnLink, at("10.1.0.1:1")),
            (Tier::Private, at("10.2.0.1:1")),
            (Tier::Public, at("198.51.100.1:1")),
            (Tier::Unrouted, at("[2001:db8::1]:1")),
        ];
        assert_eq!(host.rank(&candidates.map(at)), expected);
    }
}
