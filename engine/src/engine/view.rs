//! What an engine knows and what is wrong, for people. Nothing here changes it.

use super::Engine;
use crate::path::Path;
use crate::plan::{Device, Observed, Overlap, Stats, diff};
use crate::status::{PathStatus, Problem, RegionStatus, Status};
use crate::trust::VerifiedNetmap;
use proto::id::RegionId;
use proto::key::NodeKey;
use proto::netmap::Region;
use std::time::Instant;

impl Engine {
    /// Whether packets come back from this peer by the endpoint in use, as far as was observed.
    #[must_use]
    pub fn is_reached(&self, peer: &NodeKey) -> bool {
        self.paths.get(peer).is_some_and(Path::is_live)
    }

    /// A read-only view for people.
    #[must_use]
    pub fn status(&self) -> Status<'_> {
        let desired = self.desired();
        let converged = match (&desired, &self.observed) {
            (Some(desired), Some(observed)) => diff(desired, observed).is_empty(),
            (None, _) | (_, None) => false,
        };
        Status {
            up_wanted: self.up == Some(true),
            netmap: self.trusted.as_ref().map(VerifiedNetmap::netmap),
            lowered: &self.lowered,
            observed: self.observed.as_ref(),
            converged: converged && self.in_flight.is_none() && self.offered.is_none(),
            outside: &self.routing.outside,
            problems: self.problems(),
        }
    }

    /// How one peer is reached, for people; `None` if there is no such peer.
    #[must_use]
    pub fn path_of(&self, now: Instant, peer: &NodeKey) -> Option<PathStatus> {
        let (path, mtu) = self.paths.with_mtu(peer)?;
        let region = self.relays.region_of(peer);
        let connection = region.map(|region| self.relays.connection(region));
        Some(PathStatus::of(now, path, mtu, region.zip(connection)))
    }

    /// The network's relay regions, for people.
    #[must_use]
    pub fn regions(&self) -> Vec<RegionStatus> {
        let near = self.netcheck.regions();
        let status = |(id, region): (&RegionId, &Region)| {
            let (connection, latency) = self.relays.connection(*id);
            RegionStatus {
                id: *id,
                name: region.name.clone(),
                is_home: self.relays.home() == Some(*id),
                connection,
                latency: near.get(id).copied().or(latency),
            }
        };
        self.relays.map().iter().map(status).collect()
    }

    /// What the kernel counts of one peer, as last read.
    #[must_use]
    pub fn status_of(&self, peer: &NodeKey) -> Option<&Stats> {
        let present = self.observed.as_ref()?.present()?;
        present.peers.get(peer).map(|peer| &peer.stats)
    }

    fn problems(&self) -> Vec<Problem> {
        let foreign = self
            .observed
            .as_ref()
            .is_some_and(|observed| observed.device == Device::Foreign);
        let foreign = foreign.then(|| Problem::ForeignDevice {
            interface: self.config.interface.clone(),
        });
        let overlaps = self.routing.overlaps.iter().map(|overlap| {
            let overlap = overlap.clone();
            match overlap.node {
                None => Problem::NetworkOverlap(overlap),
                Some(node) => Problem::RouteOverlap {
                    node: self.name_of(&overlap, node),
                    overlap,
                },
            }
        });
        let (network, routes): (Vec<_>, Vec<_>) =
            overlaps.partition(|problem| matches!(problem, Problem::NetworkOverlap(_)));
        let device = self.observed.as_ref().and_then(Observed::present);
        let v6 = self.trusted.iter().flat_map(|netmap| &netmap.me().addrs);
        let v6 = v6.filter(|addr| addr.is_ipv6()).count() > 0;
        let without_v6 = device.filter(|device| device.without_v6 && v6);
        let without_v6 = without_v6.map(|_| Problem::WithoutV6 {
            interface: self.config.interface.clone(),
        });
        let unserved = self.routing.unserved.iter().copied().map(Problem::Unserved);
        foreign
            .into_iter()
            .chain(network)
            .chain(self.failed.clone())
            .chain(self.held.problems().cloned())
            .chain(self.distrust.clone().map(Problem::Netmap))
            .chain(self.acl_error.clone().map(Problem::Acl))
            .chain(routes)
            .chain(unserved)
            .chain(without_v6)
            .collect()
    }

    fn name_of(&self, overlap: &Overlap, node: proto::id::NodeId) -> String {
        let peers = self.trusted.as_ref().map(VerifiedNetmap::peers);
        peers
            .and_then(|peers| peers.get(&node))
            .map_or_else(|| overlap.prefix.to_string(), |peer| peer.name.clone())
    }
}
