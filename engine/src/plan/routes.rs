//! Which prefixes are routed into the device, and which are refused.
//!
//! weir never hijacks: a prefix that shares an address with a live route of the host is not
//! routed, and status says which and why. Default routes do not count as overlap (every host has
//! one), so a peer's *default* route is refused on any host that has its own; exit nodes come
//! later. A prefix that is already routed into our device stays, whatever appears beside it later:
//! cutting what works would help nobody.

use super::{Family, Forwarding, Side};
use crate::trust::VerifiedNetmap;
use proto::id::NodeId;
use proto::net::Prefix;
use std::collections::{BTreeMap, BTreeSet};

/// A route of the host that is not ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LiveRoute {
    /// Where it leads.
    pub prefix: Prefix,
    /// The interface it leaves by; empty for one that leads nowhere (blackhole, unreachable).
    pub interface: String,
}

/// A prefix that is not routed, because the host already uses its addresses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Overlap {
    /// What is refused.
    pub prefix: Prefix,
    /// Whose it is; `None` for the network's own prefix.
    pub node: Option<NodeId>,
    /// What it shares addresses with.
    pub live: LiveRoute,
}

/// What follows from the netmap for this host's routing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// Prefixes to route into the device.
    pub routes: BTreeSet<Prefix>,
    /// Where packets must be forwarded, for the routes that this node serves.
    pub forwarding: BTreeSet<Forwarding>,
    /// Prefixes that are refused. If one has no node, nothing may be routed at all.
    pub overlaps: Vec<Overlap>,
    /// Approved routes of this node that no route of the host leads to.
    pub unserved: BTreeSet<Prefix>,
}

impl Routing {
    /// Whether the network's own prefixes cannot be used on this host.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.overlaps.iter().any(|overlap| overlap.node.is_none())
    }

    /// Whether `prefix` was refused.
    #[must_use]
    pub fn refuses(&self, prefix: &Prefix) -> bool {
        self.overlaps
            .iter()
            .any(|overlap| overlap.prefix == *prefix)
    }

    /// Decides. `live` are the host's own routes, `installed` those that already lead to our
    /// device.
    #[must_use]
    pub fn choose(
        netmap: &VerifiedNetmap,
        live: &BTreeSet<LiveRoute>,
        installed: &BTreeSet<Prefix>,
    ) -> Self {
        let mut routing = Self::default();
        let network = netmap.network();
        for prefix in [network.v4, network.v6] {
            let used = netmap.me().addrs.iter().any(|addr| prefix.contains(*addr));
            if used {
                routing.consider(prefix, None, live, installed);
            }
        }
        let peers = netmap.peers().values();
        for (node, prefix) in peers.flat_map(|peer| peer.routes.iter().map(|p| (peer.id, *p))) {
            routing.consider(prefix, Some(node), live, installed);
        }
        routing.serve(&netmap.me().routes, live);
        routing
    }

    fn consider(
        &mut self,
        prefix: Prefix,
        node: Option<NodeId>,
        live: &BTreeSet<LiveRoute>,
        installed: &BTreeSet<Prefix>,
    ) {
        let collides = |route: &&LiveRoute| {
            let both_default = route.prefix.len() == 0 && prefix.len() == 0;
            route.prefix.overlaps(&prefix) && (route.prefix.len() > 0 || both_default)
        };
        match live.iter().find(collides) {
            Some(route) if !installed.contains(&prefix) => self.overlaps.push(Overlap {
                prefix,
                node,
                live: route.clone(),
            }),
            Some(_) | None => {
                self.routes.insert(prefix);
            }
        }
    }

    /// Forwarding from the tunnel and from each interface behind which a served route lies.
    fn serve(&mut self, served: &BTreeSet<Prefix>, live: &BTreeSet<LiveRoute>) {
        for prefix in served {
            let behind: BTreeMap<&str, ()> = live
                .iter()
                .filter(|route| route.prefix.len() > 0 && route.prefix.overlaps(prefix))
                .filter(|route| !route.interface.is_empty())
                .map(|route| (route.interface.as_str(), ()))
                .collect();
            if behind.is_empty() {
                self.unserved.insert(*prefix);
                continue;
            }
            let family = Family::of(prefix);
            let lans = behind.into_keys().map(|name| Side::Lan(name.to_owned()));
            for side in lans.chain([Side::Tunnel]) {
                self.forwarding.insert(Forwarding { side, family });
            }
        }
    }
}
