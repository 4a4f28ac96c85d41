//! Which prefixes are routed into the device, and which are refused.
//!
//! weir never hijacks: a prefix that shares an address with a live route of the host is not
//! routed, and status says which and why. Default routes do not count as overlap (every host has
//! one), so a peer's *default* route is refused on any host that has its own; exit nodes come
//! later. A prefix that is already routed into our device stays, whatever appears beside it later:
//! cutting what works would help nobody.
//!
//! Each route says how long its packets may be. The network's own say what passes nearly everywhere;
//! what is known of the path to one peer, the routes of its subnets and those of its addresses say,
//! which there are for that alone.

use super::{Family, Forwarding, Side};
use crate::trust::VerifiedNetmap;
use proto::id::NodeId;
use proto::key::NodeKey;
use proto::net::Prefix;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Packets inside the tunnel that leave as outer ones of 1,360 bytes at most, where nothing better
/// is known; and IPv6's least (RFC 8200 5).
pub const LEAST_MTU: u32 = 1_280;
/// What passes where IPv6 does: 1,280 less WireGuard over IPv6.
const LEAST_INNER: u32 = 1_200;
/// Headers of IPv6 and TCP.
const TCP_V6: u32 = 60;

/// What a route into the device says of its packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RouteMtu {
    /// The longest, in bytes; 0: as long as the device takes.
    pub mtu: u32,
    /// The longest segment that TCP asks the other end for, in bytes; 0: what follows from `mtu`.
    pub mss: u32,
}

impl RouteMtu {
    /// For a path that takes packets of this many bytes inside the tunnel, if that is known.
    ///
    /// IPv6 is not told less than its least: datagrams could not be sent at all. On a path that
    /// takes less, or may take less, TCP asks the other end for segments that fit; where the other
    /// end does the same, TCP is spared what befalls longer packets.
    #[must_use]
    pub fn of(inner: Option<u16>, family: Family) -> Self {
        let inner = inner.map(u32::from);
        match family {
            Family::V4 => Self {
                mtu: inner.unwrap_or(LEAST_MTU),
                mss: 0,
            },
            Family::V6 => {
                let inner = inner.unwrap_or(LEAST_INNER);
                // WireGuard pads to sixteens, up to what the route says: more than the path takes.
                let whole = inner / 16 * 16;
                Self {
                    mtu: inner.max(LEAST_MTU),
                    mss: if inner < LEAST_MTU {
                        whole.saturating_sub(TCP_V6)
                    } else {
                        0
                    },
                }
            }
        }
    }

    /// The path that this was made for; IPv6 may say up to 15 bytes less.
    #[must_use]
    pub fn inner(self) -> u16 {
        let inner = if self.mss > 0 {
            self.mss + TCP_V6
        } else {
            self.mtu
        };
        u16::try_from(inner).unwrap_or(u16::MAX)
    }
}

/// A route of the host that is not ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
    pub routes: BTreeMap<Prefix, RouteMtu>,
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
    /// device; `inner`: the longest packet inside the tunnel that the path to a peer takes.
    #[must_use]
    pub fn choose(
        netmap: &VerifiedNetmap,
        live: &BTreeSet<LiveRoute>,
        installed: &BTreeMap<Prefix, RouteMtu>,
        inner: impl Fn(&NodeKey) -> Option<u16>,
    ) -> Self {
        let mut routing = Self::default();
        let network = netmap.network();
        for prefix in [network.v4, network.v6] {
            let used = netmap.me().addrs.iter().any(|addr| prefix.contains(*addr));
            if used {
                routing.consider(prefix, None, None, (live, installed));
            }
        }
        let networks = routing.routes.clone();
        let ours = |route: &&LiveRoute| networks.keys().any(|it| it.overlaps(&route.prefix));
        let beside: Vec<&LiveRoute> = live
            .iter()
            .filter(|route| route.prefix.len() > 0)
            .filter(ours)
            .collect();
        for peer in netmap.peers().values() {
            let inner = inner(&peer.key);
            for prefix in &peer.routes {
                routing.consider(*prefix, Some(peer.id), inner, (live, installed));
            }
            for host in peer.addrs.iter().map(|addr| Prefix::host(*addr)) {
                let mtu = RouteMtu::of(inner, Family::of(&host));
                let routed = networks.iter().find(|(it, _)| it.contains(host.addr()));
                let differs = routed.is_some_and(|(_, whole)| *whole != mtu);
                let foreign = beside.iter().any(|route| route.prefix.overlaps(&host));
                if inner.is_some() && differs && (!foreign || installed.contains_key(&host)) {
                    routing.routes.insert(host, mtu);
                }
            }
        }
        routing.serve(&netmap.me().routes, live);
        routing
    }

    fn consider(
        &mut self,
        prefix: Prefix,
        node: Option<NodeId>,
        inner: Option<u16>,
        (live, installed): (&BTreeSet<LiveRoute>, &BTreeMap<Prefix, RouteMtu>),
    ) {
        let collides = |route: &&LiveRoute| {
            let both_default = route.prefix.len() == 0 && prefix.len() == 0;
            route.prefix.overlaps(&prefix) && (route.prefix.len() > 0 || both_default)
        };
        match live.iter().find(collides) {
            Some(route) if !installed.contains_key(&prefix) => self.overlaps.push(Overlap {
                prefix,
                node,
                live: route.clone(),
            }),
            Some(_) | None => {
                let mtu = RouteMtu::of(inner, Family::of(&prefix));
                self.routes.insert(prefix, mtu);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_says_what_its_path_takes_and_which_path_that_is() {
        let said = |inner, family| {
            let RouteMtu { mtu, mss } = RouteMtu::of(inner, family);
            (mtu, mss)
        };
        for inner in [1_280, 1_412, 1_440, 8_940] {
            for family in [Family::V4, Family::V6] {
                assert_eq!(said(Some(inner), family), (inner.into(), 0));
                assert_eq!(RouteMtu::of(Some(inner), family).inner(), inner);
            }
        }
        assert_eq!(said(Some(1_220), Family::V4), (1_220, 0));
        // 1,216 is 76 sixteens: what is not padded beyond 1,220.
        assert_eq!(said(Some(1_220), Family::V6), (1_280, 1_216 - 60));
        assert_eq!(said(Some(1_200), Family::V6), (1_280, 1_200 - 60));
        assert_eq!(said(None, Family::V4), (1_280, 0));
        assert_eq!(said(None, Family::V6), (1_280, 1_200 - 60));
    }
}
