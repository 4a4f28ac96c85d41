//! Which prefixes are routed into the device, and which are refused.
//!
//! weir never hijacks: a prefix that shares an address with a live route of the host is not
//! routed, and status says which and why. Default routes do not count as overlap (every host has
//! one), so a peer's *default* route is refused on any host that has its own; exit nodes come
//! later. A prefix that is already routed into our device stays, whatever appears beside it later:
//! cutting what works would help nobody.
//!
//! Nor does it swallow what it lives on. The coordinator or a relay may stand in a LAN that a peer
//! offers; such an address is left out, and all around it is routed in pieces: `10.0.0.0/30` without
//! `10.0.0.1` is `10.0.0.0/32` and `10.0.0.2/31`. Nothing but routes of ours takes part in that: no
//! mark, no rule and no table that somebody else may clear, and an answer comes in by the interface
//! that a strict reverse path filter expects.
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
use std::net::IpAddr;

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
    /// What is left out of prefixes that are routed.
    pub outside: BTreeSet<IpAddr>,
}

/// What is true of this host.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// Its own routes.
    pub live: &'a BTreeSet<LiveRoute>,
    /// Those that already lead to our device.
    pub installed: &'a BTreeMap<Prefix, RouteMtu>,
    /// Servers that must not be reached through it ([`crate::outside`]). As long as they are not
    /// known (`None`), subnets stay as they are installed.
    pub outside: Option<&'a BTreeSet<IpAddr>>,
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

    /// Decides. `inner`: the longest packet inside the tunnel that the path to a peer takes.
    #[must_use]
    pub fn choose(
        netmap: &VerifiedNetmap,
        host: Host<'_>,
        inner: impl Fn(&NodeKey) -> Option<u16>,
    ) -> Self {
        let mut routing = Self::default();
        let network = netmap.network();
        for prefix in [network.v4, network.v6] {
            let used = netmap.me().addrs.iter().any(|addr| prefix.contains(*addr));
            if used && routing.may(host, prefix, None, host.installed.contains_key(&prefix)) {
                let mtu = RouteMtu::of(None, Family::of(&prefix));
                routing.routes.insert(prefix, mtu);
            }
        }
        let networks = routing.routes.clone();
        routing.subnets(netmap, host, &inner);
        let ours = |route: &&LiveRoute| networks.keys().any(|it| it.overlaps(&route.prefix));
        let beside = host.live.iter().filter(|route| route.prefix.len() > 0);
        let beside: Vec<&LiveRoute> = beside.filter(ours).collect();
        for peer in netmap.peers().values() {
            let inner = inner(&peer.key);
            for addr in peer.addrs.iter().map(|addr| Prefix::host(*addr)) {
                let mtu = RouteMtu::of(inner, Family::of(&addr));
                let routed = networks.iter().find(|(it, _)| it.contains(addr.addr()));
                let differs = routed.is_some_and(|(_, whole)| *whole != mtu);
                let foreign = beside.iter().any(|route| route.prefix.overlaps(&addr));
                if inner.is_some() && differs && (!foreign || host.installed.contains_key(&addr)) {
                    routing.routes.insert(addr, mtu);
                }
            }
        }
        routing.serve(&netmap.me().routes, host.live);
        routing
    }

    /// Peers' subnets, the wider ones first: where a piece of one has the name of a piece of a
    /// narrower one, that is the narrower one's.
    fn subnets(
        &mut self,
        netmap: &VerifiedNetmap,
        host: Host<'_>,
        inner: &impl Fn(&NodeKey) -> Option<u16>,
    ) {
        let offered = netmap.peers().values();
        let offered =
            offered.flat_map(|peer| peer.routes.iter().map(move |it| (it.len(), it, peer)));
        let mut offered: Vec<_> = offered.collect();
        let networks = self.routes.clone();
        offered.sort_by_key(|(len, prefix, _)| (*len, **prefix));
        let named: BTreeSet<Prefix> = offered.iter().map(|(_, prefix, _)| **prefix).collect();
        for (_, prefix, peer) in offered {
            let of_another =
                |it: &Prefix| named.contains(it) || networks.keys().any(|net| net.covers(it));
            let part = |it: &&Prefix| *it == prefix || (prefix.covers(it) && !of_another(it));
            let parts: Vec<Prefix> = host.installed.keys().filter(part).copied().collect();
            if !self.may(host, *prefix, Some(peer.id), !parts.is_empty()) {
                continue;
            }
            let pieces = host.outside.map_or(parts, |outside| {
                let within = outside.iter().filter(|addr| prefix.contains(**addr));
                let within: Vec<IpAddr> = within.copied().collect();
                self.outside.extend(&within);
                without(*prefix, &within)
            });
            let mtu = RouteMtu::of(inner(&peer.key), Family::of(prefix));
            self.routes
                .extend(pieces.into_iter().map(|piece| (piece, mtu)));
        }
    }

    /// Whether a prefix may be routed: the host does not use it, or it already is.
    fn may(&mut self, host: Host<'_>, prefix: Prefix, node: Option<NodeId>, is: bool) -> bool {
        let collides = |route: &&LiveRoute| {
            let both_default = route.prefix.len() == 0 && prefix.len() == 0;
            route.prefix.overlaps(&prefix) && (route.prefix.len() > 0 || both_default)
        };
        match host.live.iter().find(collides) {
            Some(route) if !is => {
                let live = route.clone();
                self.overlaps.push(Overlap { prefix, node, live });
                false
            }
            Some(_) | None => true,
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

/// All of a prefix but these addresses in it.
fn without(prefix: Prefix, addrs: &[IpAddr]) -> Vec<Prefix> {
    let mut pieces = Vec::new();
    let mut whole = vec![prefix];
    while let Some(part) = whole.pop() {
        if !addrs.iter().any(|addr| part.contains(*addr)) {
            pieces.push(part);
        } else if !part.is_host() {
            let half = |addr| Prefix::containing(addr, part.len() + 1);
            let halves = [part.addr(), with_bit(part.addr(), part.len())].map(half);
            whole.extend(halves.into_iter().flatten());
        }
    }
    pieces
}

/// An address with this bit of it set, counted from the left.
fn with_bit(addr: IpAddr, bit: u8) -> IpAddr {
    match addr {
        IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() | (1 << 31) >> bit).into()),
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() | (1 << 127) >> bit).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_left_of_a_prefix_are_the_pieces_around_what_is_left_out() {
        let left = |prefix: &str, addrs: &[&str]| {
            let addrs: Vec<IpAddr> = addrs.iter().map(|addr| addr.parse().unwrap()).collect();
            let mut left = without(prefix.parse().unwrap(), &addrs);
            left.sort();
            let left: Vec<String> = left.iter().map(ToString::to_string).collect();
            left.join(" ")
        };
        assert_eq!(left("10.0.0.0/30", &[]), "10.0.0.0/30");
        assert_eq!(
            left("10.0.0.0/30", &["10.0.0.1"]),
            "10.0.0.0/32 10.0.0.2/31"
        );
        assert_eq!(left("10.0.0.0/31", &["10.0.0.0", "10.0.0.1"]), "");
        assert_eq!(left("10.0.0.7/32", &["10.0.0.7"]), "");
        let v6 = "2001:db8::/127 2001:db8::3/128";
        assert_eq!(left("2001:db8::/126", &["2001:db8::2"]), v6);
        let all: IpAddr = "203.0.113.9".parse().unwrap();
        assert_eq!(without(Prefix::ALL_V4, &[all]).len(), 32);
        let all: IpAddr = "2001:db8::1".parse().unwrap();
        assert_eq!(without(Prefix::ALL_V6, &[all]).len(), 128);
    }

    proptest! {
        #[test]
        fn each_address_is_in_one_piece_and_those_left_out_in_none(
            len in 0_u8..=32,
            base in any::<u32>(),
            addrs in prop::collection::vec(any::<u32>(), 0..5),
            asked in prop::collection::vec(any::<u32>(), 0..20),
        ) {
            let prefix = Prefix::containing(IpAddr::V4(base.into()), len).unwrap();
            // As often inside as outside.
            let inside = |bits: &u32| {
                let host = bits.checked_shr(u32::from(len)).unwrap_or(0);
                let IpAddr::V4(net) = prefix.addr() else { unreachable!() };
                IpAddr::V4((net.to_bits() | host).into())
            };
            let outs: Vec<IpAddr> = addrs.iter().map(inside).collect();
            let pieces = without(prefix, &outs);
            for addr in asked.iter().map(inside).chain(outs.iter().copied()) {
                let held = pieces.iter().filter(|piece| piece.contains(addr)).count();
                prop_assert_eq!(held, usize::from(!outs.contains(&addr)));
            }
            prop_assert!(pieces.iter().all(|piece| prefix.covers(piece)));
        }
    }

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
