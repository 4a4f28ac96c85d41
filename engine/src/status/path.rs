//! How one peer is reached, and why so, for `weir path`, `weir ping` and `weir status`.

use crate::mtu::Mtu;
use crate::path::candidate::PING_TIMEOUT;
use crate::path::{Candidate, Fault, Path, Source, Tier, Way};
use crate::relays::Connection;
use proto::id::RegionId;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How one peer is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathStatus {
    /// The way that packets take.
    pub now: Now,
    /// For how long it has been so; `None`: from the beginning.
    pub since: Option<Duration>,
    /// Why so, as a sentence.
    pub why: String,
    /// Whether packets were exchanged lately.
    pub active: bool,
    /// Whether candidates are being pinged for a path right now.
    pub probing: bool,
    /// The region where the peer is found, if it can be reached by relay.
    pub region: Option<RegionId>,
    /// The longest packet, in bytes, that the direct path takes, if there is one and that is known.
    pub mtu: Option<u16>,
    /// What that leaves for a packet inside the tunnel, in bytes.
    pub inner_mtu: Option<u16>,
    /// Whether long pings are being sent to find out.
    pub measuring: bool,
    /// Every endpoint that it may be reached at, the one in use first, then best first.
    pub candidates: Vec<CandidateStatus>,
}

/// The way that packets to a peer take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Now {
    /// Directly.
    Direct {
        /// To this endpoint.
        endpoint: SocketAddr,
        /// How long the last probe of it took; `None` if none was answered yet.
        rtt: Option<Duration>,
    },
    /// By the relay of a region.
    Relayed {
        /// Which.
        region: RegionId,
        /// How our connection to it is.
        connection: Connection,
        /// How long the relay itself takes to answer, if that is known.
        latency: Option<Duration>,
    },
    /// Nothing proves that there is one; the kernel tries an endpoint after the other.
    None,
}

/// One endpoint that a peer may be reached at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CandidateStatus {
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// How near it is.
    pub tier: Tier,
    /// Who named it.
    pub sources: Vec<Source>,
    /// How long ago it was last probed; `None`: never.
    pub probed: Option<Duration>,
    /// What came of it.
    pub result: Probe,
    /// Whether packets go there now.
    pub in_use: bool,
}

/// What came of the last probe of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It was never probed.
    Never,
    /// The answer may still come.
    Waiting,
    /// It answered, in this time.
    Answered(Duration),
    /// It did not.
    Silent,
    /// It answers probes and swallows packets: it is not used for a while.
    Swallows,
    /// It works, but the peer sends from elsewhere, and the kernel follows the peer.
    Overruled,
}

/// One region of the network's relay map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionStatus {
    /// Its id.
    pub id: RegionId,
    /// Its name.
    pub name: String,
    /// Whether others find this node there.
    pub is_home: bool,
    /// How our connection to it is.
    pub connection: Connection,
    /// How far it is, if that was measured.
    pub latency: Option<Duration>,
}

type Reached = (RegionId, (Connection, Option<Duration>));

impl PathStatus {
    pub(crate) fn of(now: Instant, path: &Path, mtu: &Mtu, reached: Option<Reached>) -> Self {
        let region = reached.as_ref().map(|(region, _)| *region);
        let in_use = match path.way() {
            Way::Direct(endpoint) => Some(endpoint),
            Way::Relay | Way::Blind => None,
        };
        let of = |(endpoint, it): (&SocketAddr, &Candidate)| CandidateStatus {
            endpoint: *endpoint,
            tier: it.tier,
            sources: it.sources.iter().copied().collect(),
            probed: it.asked.map(|at| now.saturating_duration_since(at)),
            result: probe(now, it),
            in_use: Some(*endpoint) == in_use,
        };
        let mut candidates: Vec<_> = path.candidates().iter().map(of).collect();
        candidates.sort_by_key(|it| (!it.in_use, it.tier, it.endpoint));
        Self {
            since: path.since().map(|at| now.saturating_duration_since(at)),
            why: why(now, path, &candidates, reached.as_ref()),
            active: path.is_active(now),
            probing: path.is_probing(),
            region,
            mtu: mtu.known(),
            inner_mtu: mtu.inner(),
            measuring: mtu.is_studying(),
            now: how(path, reached),
            candidates,
        }
    }
}

fn how(path: &Path, reached: Option<Reached>) -> Now {
    match (path.way(), reached) {
        (Way::Direct(endpoint), _) => {
            let candidate = path.candidates().get(&endpoint);
            let answered = candidate.and_then(|it| it.answered);
            let rtt = answered.map(|(_, rtt)| rtt);
            Now::Direct { endpoint, rtt }
        }
        (Way::Relay, Some((region, (connection, latency)))) => Now::Relayed {
            region,
            connection,
            latency,
        },
        (Way::Relay, None) | (Way::Blind, _) => Now::None,
    }
}

fn probe(now: Instant, candidate: &Candidate) -> Probe {
    match (candidate.fault_at(now), candidate.asked, candidate.answered) {
        (Some(Fault::Swallows), ..) => Probe::Swallows,
        (Some(Fault::Overruled), ..) => Probe::Overruled,
        (Some(Fault::Silent), ..) => Probe::Silent,
        (None, None, _) => Probe::Never,
        (None, Some(asked), Some((at, rtt))) if at >= asked => Probe::Answered(rtt),
        (None, Some(asked), answered) => {
            let waits = now.saturating_duration_since(asked) < PING_TIMEOUT;
            match answered {
                // A heartbeat under way says nothing yet.
                Some((_, rtt)) if waits => Probe::Answered(rtt),
                None if waits => Probe::Waiting,
                Some(_) | None => Probe::Silent,
            }
        }
    }
}

fn why(
    now: Instant,
    path: &Path,
    candidates: &[CandidateStatus],
    reached: Option<&Reached>,
) -> String {
    let not_up = match reached {
        Some((region, (Connection::Down(why), _))) => {
            format!("; the relay of region {region} cannot be reached: {why}")
        }
        Some((region, (Connection::Connecting, _))) => {
            format!("; the relay of region {region} is being connected to")
        }
        Some(_) | None => String::new(),
    };
    match path.way() {
        Way::Direct(_) => why_direct(path, candidates),
        Way::Relay => format!("{}{not_up}", why_relayed(now, path, candidates)),
        Way::Blind if !path.can_probe() => "the peer's agent answers no probes, so the kernel \
            tries its endpoints in turn"
            .to_owned(),
        Way::Blind => format!(
            "{}, and no relay can be used{not_up}",
            why_relayed(now, path, candidates)
        ),
    }
}

fn why_direct(path: &Path, candidates: &[CandidateStatus]) -> String {
    let current = candidates.iter().find(|it| it.in_use);
    let near = match current.map(|it| it.tier) {
        Some(Tier::OnLink) => "it is in a network of this machine",
        Some(Tier::Private) => "it is the nearest that answers, by private addresses",
        Some(Tier::Public) => "it is the nearest that answers",
        Some(Tier::Unrouted) | None => "the kernel found it",
    };
    match current.map(|it| it.result) {
        Some(Probe::Answered(_)) => format!("{near}, and it answers probes"),
        _ if path.is_live() => "packets come back from there".to_owned(),
        _ => "it answered; no packets have come yet".to_owned(),
    }
}

fn why_relayed(now: Instant, path: &Path, candidates: &[CandidateStatus]) -> String {
    let swallows = candidates.iter().find(|it| it.result == Probe::Swallows);
    let answers = |it: &&CandidateStatus| matches!(it.result, Probe::Answered(_));
    if let Some(candidate) = swallows {
        return format!(
            "{} answers probes, but packets sent there got no answer: something on the way lets \
             probes through and WireGuard not",
            candidate.endpoint
        );
    }
    if let Some(until) = path.held_until().filter(|until| now < *until) {
        let seconds = until.saturating_duration_since(now).as_secs() + 1;
        return format!("the direct path fell silent; another is taken in {seconds} s at most");
    }
    if candidates.is_empty() {
        return "the peer has told no address that can be reached from here".to_owned();
    }
    if path.is_probing() {
        return format!("{} direct endpoints are being probed", candidates.len());
    }
    if candidates.iter().any(|it| answers(&it)) {
        return "a direct endpoint answered lately; it is tried again with the next packets"
            .to_owned();
    }
    if candidates.iter().all(|it| it.probed.is_none()) {
        return "there was no traffic yet that a direct path would be worth looking for".to_owned();
    }
    format!(
        "none of {} direct endpoints answered: a NAT that shows each destination another port, or \
         a firewall that drops UDP, is in the way",
        candidates.len()
    )
}
