//! How peers are reached, for people: the engine's view in the words of the local API.

use super::answer::unknown;
use super::{Daemon, Response};
use crate::local::report::{Candidate, PeerPath, PeerStatus, Region, Way};
use crate::relay::Transport;
use engine::path::{Source, Tier};
use engine::plan::{Observed, Stats};
use engine::status::{CandidateStatus, Connection, Now, PathStatus, Probe, RegionStatus};
use proto::id::RegionId;
use proto::key::NodeKey;
use proto::netmap::Peer;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Over how long rates are taken, at least.
const WINDOW: Duration = Duration::from_secs(1);
/// A rate older than this is none.
const STALE: Duration = Duration::from_secs(20);

/// How much passes between this node and each peer.
#[derive(Default)]
pub(super) struct Rates(BTreeMap<NodeKey, Rate>);

struct Rate {
    at: Instant,
    rx_bytes: u64,
    tx_bytes: u64,
    /// Bytes a second.
    rx: u64,
    tx: u64,
}

impl Rates {
    /// What the kernel counts now.
    pub(super) fn note(&mut self, now: Instant, observed: &Observed) {
        let Some(present) = observed.present() else {
            self.0.clear();
            return;
        };
        self.0.retain(|key, _| present.peers.contains_key(key));
        for (key, peer) in &present.peers {
            let Stats {
                rx_bytes, tx_bytes, ..
            } = peer.stats;
            let rate = self.0.entry(*key).or_insert(Rate {
                at: now,
                rx_bytes,
                tx_bytes,
                rx: 0,
                tx: 0,
            });
            let passed = now.saturating_duration_since(rate.at);
            if passed < WINDOW {
                continue;
            }
            let per_second = |after: u64, before: u64| {
                (after.saturating_sub(before) as f64 / passed.as_secs_f64()) as u64
            };
            *rate = Rate {
                at: now,
                rx: per_second(rx_bytes, rate.rx_bytes),
                tx: per_second(tx_bytes, rate.tx_bytes),
                rx_bytes,
                tx_bytes,
            };
        }
    }

    /// Bytes a second received and sent.
    pub(super) fn of(&self, now: Instant, key: &NodeKey) -> (u64, u64) {
        let rate = self.0.get(key);
        let fresh = rate.filter(|rate| now.saturating_duration_since(rate.at) < STALE);
        fresh.map_or((0, 0), |rate| (rate.rx, rate.tx))
    }
}

/// The way in words of the local API, the region if it is a relay's, and how long it takes.
pub(super) fn way(now: &Now) -> (Way, Option<RegionId>, Option<Duration>) {
    match now {
        Now::Direct { rtt, .. } => (Way::Direct, None, *rtt),
        Now::Relayed {
            region, latency, ..
        } => (Way::Relayed, Some(*region), *latency),
        Now::None => (Way::None, None, None),
    }
}

pub(super) fn micros(time: Duration) -> u64 {
    time.as_micros().try_into().unwrap_or(u64::MAX)
}

impl Daemon {
    /// How that peer is reached, and why so.
    pub(super) fn path(&self, name: &str) -> Response {
        let addrs = match self.find(name) {
            Ok(addrs) => addrs,
            Err(response) => return response,
        };
        let netmap = self.engine.status().netmap;
        let mut peers = netmap.into_iter().flat_map(|netmap| netmap.peers.values());
        let found = peers.find(|peer| peer.addrs.iter().any(|addr| addrs.contains(addr)));
        let path = found.and_then(|peer| {
            let path = self.engine.path_of(Instant::now(), &peer.key)?;
            Some(Response::Path(Box::new(self.peer_path(peer, path))))
        });
        path.unwrap_or_else(|| unknown(name))
    }

    fn peer_path(&self, peer: &Peer, path: PathStatus) -> PeerPath {
        PeerPath {
            peer: self.peer(peer),
            why: path.why,
            since_seconds: path.since.map(|since| since.as_secs()),
            active: path.active,
            probing: path.probing,
            region: path.region.map(|region| self.region_name(region)),
            candidates: path.candidates.into_iter().map(candidate).collect(),
        }
    }

    /// The peers with which packets were exchanged lately.
    pub(super) fn active(&self) -> Vec<PeerStatus> {
        let now = Instant::now();
        let netmap = self.engine.status().netmap;
        let peers = netmap.into_iter().flat_map(|netmap| netmap.peers.values());
        let active = |peer: &&Peer| {
            let path = self.engine.path_of(now, &peer.key);
            path.is_some_and(|path| path.active)
        };
        let mut active: Vec<_> = peers.filter(active).map(|peer| self.peer(peer)).collect();
        active.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        active
    }

    pub(super) fn region_name(&self, id: RegionId) -> String {
        let netmap = self.engine.status().netmap;
        let region = netmap.and_then(|netmap| netmap.network.relays.get(&id));
        region.map_or_else(|| id.to_string(), |region| region.name.clone())
    }

    /// The network's relays.
    pub(super) fn regions(&self) -> Vec<Region> {
        let region = |status: RegionStatus| {
            let (through, proxy) = (
                self.relayed.transport(status.id),
                self.proxy_to_region(status.id),
            );
            region(through, proxy, status)
        };
        self.engine.regions().into_iter().map(region).collect()
    }

    /// The proxy that `HOST:PORT` is reached through.
    pub(super) fn proxy_to(&self, target: &str) -> Option<String> {
        let proxy = self.proxy.address().filter(|_| self.proxy.is_for(target));
        proxy.map(str::to_owned)
    }

    fn proxy_to_region(&self, id: RegionId) -> Option<String> {
        let netmap = self.engine.status().netmap;
        let region = netmap.and_then(|netmap| netmap.network.relays.get(&id))?;
        region
            .hosts
            .iter()
            .find_map(|host| self.proxy_to(&host.addr))
    }
}

fn region(transport: Option<Transport>, proxy: Option<String>, status: RegionStatus) -> Region {
    let (connection, why) = match status.connection {
        Connection::Unused => ("unused", None),
        Connection::Connecting => ("connecting", None),
        Connection::Up => ("up", None),
        Connection::Down(why) => ("down", Some(why)),
    };
    Region {
        id: status.id,
        name: status.name,
        home: status.is_home,
        connection: connection.to_owned(),
        why,
        transport: transport.map(|transport| match transport {
            Transport::Derp => "derp".to_owned(),
            Transport::WebSocket => "websocket".to_owned(),
        }),
        proxy,
        latency_us: status.latency.map(micros),
    }
}

fn candidate(status: CandidateStatus) -> Candidate {
    let tier = match status.tier {
        Tier::OnLink => "on_link",
        Tier::Private => "private",
        Tier::Public => "public",
        Tier::Unrouted => "unrouted",
    };
    let source = |source: Source| match source {
        Source::Netmap => "netmap",
        Source::Call => "call",
        Source::Seen => "seen",
    };
    let (result, rtt) = match status.result {
        Probe::Never => ("never", None),
        Probe::Waiting => ("waiting", None),
        Probe::Answered(rtt) => ("answered", Some(rtt)),
        Probe::Silent => ("silent", None),
        Probe::Swallows => ("swallows", None),
        Probe::Overruled => ("overruled", None),
    };
    Candidate {
        endpoint: status.endpoint,
        tier: tier.to_owned(),
        sources: status
            .sources
            .into_iter()
            .map(source)
            .map(str::to_owned)
            .collect(),
        probed_ms_ago: status
            .probed
            .map(|ago| ago.as_millis().try_into().unwrap_or(u64::MAX)),
        result: result.to_owned(),
        rtt_us: rtt.map(micros),
        in_use: status.in_use,
    }
}
