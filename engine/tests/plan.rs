//! The laws of plans, on random states; and plans of the usual situations, as text.
//!
//! `UPDATE=1 cargo test -p engine --test plan` rewrites the text.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::disallowed_methods, reason = "a test brings time and files")]

use engine::acl::{Change, Tables};
use engine::plan::{
    Acl, Desired, Device, Family, Forwarding, Observed, PeerState, Policy, Present, RouteMtu, Side,
    Stats, Step, Wanted, WantedPeer, diff,
};
use proptest::prelude::*;
use proto::key::NodeKey;
use proto::net::Prefix;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;

const OLD: u64 = 6;
const NEW: u64 = 7;

fn key(n: u8) -> NodeKey {
    NodeKey([n; 32])
}

/// Addresses of peers in both families, and a subnet behind one.
fn remote(n: u8) -> Prefix {
    match n {
        0..3 => Prefix::host(IpAddr::from([100, 64, 0, n])),
        3 => Prefix::containing(IpAddr::from([10, n, 0, 0]), 16).unwrap(),
        _ => format!("fd00:0:0:{n}::/64").parse().unwrap(),
    }
}

fn mtu(n: u32) -> RouteMtu {
    RouteMtu {
        mtu: 1280 + 20 * n,
        mss: 0,
    }
}

fn local(n: u8) -> IpAddr {
    match n {
        0..2 => IpAddr::from([100, 64, 1, n]),
        _ => "fd00::1".parse().unwrap(),
    }
}

fn policy(serial: u64) -> Arc<Policy> {
    Arc::new(Policy {
        serial,
        change: Change::Swap { narrows: true },
        tables: Arc::new(Tables::default()),
    })
}

/// Who owns which prefix, which local addresses there are, and which pairs policy allows. As in
/// life, policy knows only prefixes that somebody owns and addresses that this node has, and no
/// flow has one end in IPv4 and the other in IPv6.
#[derive(Clone, Debug, PartialEq)]
struct World {
    owners: BTreeMap<u8, u8>,
    locals: BTreeSet<u8>,
    allowed: BTreeSet<(u8, u8)>,
    routes: BTreeMap<u8, u32>,
    peers: BTreeSet<u8>,
    port: u16,
}

fn world() -> impl Strategy<Value = World> {
    (
        prop::collection::btree_map(0u8..6, 0u8..4, 0..6),
        prop::collection::btree_set(0u8..3, 0..4),
        prop::collection::btree_set((0u8..6, 0u8..3), 0..18),
        prop::collection::btree_map(0u8..6, 0u32..3, 0..6),
        prop::collection::btree_set(0u8..4, 0..4),
        1u16..3,
    )
        .prop_map(|(owners, locals, allowed, routes, mut peers, port)| {
            peers.extend(owners.values());
            let known = |(from, to): &(u8, u8)| {
                owners.contains_key(from)
                    && locals.contains(to)
                    && remote(*from).is_v4() == local(*to).is_ipv4()
            };
            World {
                allowed: allowed.into_iter().filter(known).collect(),
                routes,
                peers,
                port,
                owners,
                locals,
            }
        })
}

impl World {
    fn prefixes_of(&self, peer: u8) -> BTreeSet<Prefix> {
        let mine = self.owners.iter().filter(|(_, owner)| **owner == peer);
        mine.map(|(prefix, _)| remote(*prefix)).collect()
    }

    fn desired(&self) -> Wanted {
        Wanted {
            key: key(99),
            listen_port: self.port,
            mtu: 1420,
            addrs: self.locals.iter().map(|n| local(*n)).collect(),
            peers: self
                .peers
                .iter()
                .map(|peer| {
                    let wanted = WantedPeer {
                        allowed_ips: self.prefixes_of(*peer),
                        endpoint: None,
                        keepalive: 0,
                        mute: false,
                    };
                    (key(*peer), wanted)
                })
                .collect(),
            routes: self
                .routes
                .iter()
                .map(|n| (remote(*n.0), mtu(*n.1)))
                .collect(),
            forwarding: BTreeSet::new(),
            policy: policy(NEW),
        }
    }

    fn observed(&self, up: bool, acl: Acl) -> Observed {
        let wanted = self.desired();
        let peers = wanted.peers.into_iter().map(|(key, peer)| {
            let state = PeerState {
                allowed_ips: peer.allowed_ips,
                ..PeerState::default()
            };
            (key, state)
        });
        Observed {
            device: Device::Present(Present {
                key: Some(key(99)),
                listen_port: self.port,
                mtu: 1420,
                up,
                addrs: wanted
                    .addrs
                    .iter()
                    .map(|addr| (*addr, Prefix::host(*addr).len()))
                    .collect(),
                peers: peers.collect(),
                routes: if up { wanted.routes } else { BTreeMap::new() },
                without_v6: false,
            }),
            acl,
            forwarding: BTreeSet::new(),
        }
    }
}

/// Which policy decides in fact.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Force<'a> {
    /// No programs: everything passes.
    Open,
    /// Programs without tables: nothing passes.
    Shut,
    Policy(&'a World),
}

/// Whether packets of `peer` from `remote` reach `local` and packets back find the peer.
fn carries(state: &Observed, force: Force<'_>, peer: u8, from: u8, to: u8) -> bool {
    let Some(device) = state.present() else {
        return false;
    };
    let owns = device
        .peers
        .get(&key(peer))
        .is_some_and(|peer| peer.allowed_ips.contains(&remote(from)));
    let has = device.addrs.iter().any(|(addr, _)| *addr == local(to));
    let allowed = match force {
        Force::Open => true,
        Force::Shut => false,
        Force::Policy(world) => world.allowed.contains(&(from, to)),
    };
    device.up && owns && has && allowed
}

fn routed(state: &Observed, from: u8) -> bool {
    let device = state.present();
    device.is_some_and(|device| device.routes.contains_key(&remote(from)))
}

fn flows() -> impl Iterator<Item = (u8, u8, u8)> {
    (0..4).flat_map(|peer| (0..6).flat_map(move |from| (0..3).map(move |to| (peer, from, to))))
}

/// The states that a plan goes through, single peers apart, each with the policy that decides.
fn states<'a>(
    observed: &Observed,
    steps: &[Step],
    old: Force<'a>,
    new: &'a World,
) -> Vec<(Observed, Force<'a>)> {
    let (mut state, mut force) = (observed.clone(), old);
    let mut states = vec![(state.clone(), force)];
    for step in steps.iter().flat_map(single) {
        let was_attached = matches!(state.acl, Acl::Attached(_));
        state.apply(&step);
        force = match step {
            Step::AttachAcl if !was_attached => Force::Shut,
            Step::SetAcl(_) => Force::Policy(new),
            _ => force,
        };
        states.push((state.clone(), force));
    }
    states
}

/// A step over many peers is carried out in pieces.
fn single(step: &Step) -> Vec<Step> {
    match step {
        Step::SetPeers(changes) => {
            let one = |change| Step::SetPeers(vec![change]);
            changes.iter().cloned().map(one).collect()
        }
        Step::RemovePeers(keys) => keys
            .iter()
            .map(|key| Step::RemovePeers(vec![*key]))
            .collect(),
        other => vec![other.clone()],
    }
}

/// Compared field by field, without `diff`.
fn is_reached(wanted: &Wanted, observed: &Observed) -> bool {
    let Some(device) = observed.present() else {
        return false;
    };
    let addrs: BTreeSet<IpAddr> = device.addrs.iter().map(|(addr, _)| *addr).collect();
    let hosts = device.addrs.iter();
    let hosts_only = hosts
        .into_iter()
        .all(|(addr, len)| Prefix::host(*addr).len() == *len);
    let peers: BTreeMap<_, _> = device
        .peers
        .iter()
        .map(|(key, peer)| (*key, (peer.allowed_ips.clone(), peer.keepalive)))
        .collect();
    let wanted_peers: BTreeMap<_, _> = wanted
        .peers
        .iter()
        .map(|(key, peer)| (*key, (peer.allowed_ips.clone(), peer.keepalive)))
        .collect();
    let endpoints = wanted.peers.iter().all(|(key, peer)| {
        peer.endpoint.is_none()
            || device.peers.get(key).map(|peer| peer.stats.endpoint) == Some(peer.endpoint)
    });
    device.up
        && device.key == Some(wanted.key)
        && device.listen_port == wanted.listen_port
        && device.mtu == wanted.mtu
        && device.routes == wanted.routes
        && addrs == wanted.addrs
        && hosts_only
        && peers == wanted_peers
        && endpoints
        && observed.forwarding == wanted.forwarding
        && observed.acl == Acl::Attached(Some(wanted.policy.serial))
}

fn acl() -> impl Strategy<Value = Acl> {
    prop_oneof![
        Just(Acl::Absent),
        Just(Acl::Pinned),
        Just(Acl::Attached(None)),
        Just(Acl::Attached(Some(OLD))),
        Just(Acl::Attached(Some(OLD))),
        Just(Acl::Attached(Some(NEW))),
    ]
}

fn force_of<'a>(acl: &Acl, old: &'a World, new: &'a World) -> Force<'a> {
    match acl {
        Acl::Absent | Acl::Pinned => Force::Open,
        Acl::Attached(Some(NEW)) => Force::Policy(new),
        Acl::Attached(_) => Force::Policy(old),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn plans_reach_what_is_desired_and_then_end(
        old in world(),
        new in world(),
        up: bool,
        acl in acl(),
        absent: bool,
    ) {
        let mut observed = old.observed(up, acl);
        if absent {
            observed.device = Device::Absent;
            if observed.acl != Acl::Absent {
                observed.acl = Acl::Pinned;
            }
        }
        let wanted = new.desired();
        let desired: Desired = Some(wanted.clone());
        let mut state = observed.clone();
        for step in diff(&desired, &observed) {
            state.apply(&step);
        }
        prop_assert!(is_reached(&wanted, &state), "{state:?}");
        prop_assert_eq!(diff(&desired, &state), vec![]);

        for step in diff(&None, &observed) {
            observed.apply(&step);
        }
        prop_assert_eq!(&observed, &Observed::default());
        prop_assert_eq!(diff(&None, &observed), vec![]);
    }

    #[test]
    fn no_prefix_of_a_plan_opens_or_cuts_what_it_should_not(
        old in world(),
        new in world(),
        up: bool,
        acl in acl(),
    ) {
        let observed = old.observed(up, acl);
        let before = force_of(&observed.acl, &old, &new);
        let steps = diff(&Some(new.desired()), &observed);
        let states = states(&observed, &steps, before, &new);
        let (end, end_force) = states.last().unwrap();
        for (number, (state, force)) in states.iter().enumerate() {
            let attached = matches!(state.acl, Acl::Attached(_));
            let is_up = state.present().is_some_and(|device| device.up);
            prop_assert!(attached || !is_up || number == 0, "up without programs: {:?}", steps);
            for (peer, from, to) in flows() {
                let at_start = carries(&observed, before, peer, from, to);
                let at_end = carries(end, *end_force, peer, from, to);
                let now = carries(state, *force, peer, from, to);
                prop_assert!(
                    !now || at_start || at_end,
                    "step {number} opens {peer} {from}->{to}: {steps:?}"
                );
                // What was found unprotected may be cut: it is taken down first.
                if before != Force::Open && at_start && at_end {
                    prop_assert!(now, "step {number} cuts {peer} {from}->{to}: {steps:?}");
                    if routed(&observed, from) && routed(end, from) {
                        prop_assert!(routed(state, from), "step {number} unroutes {from}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_foreign_device_is_never_touched(new in world(), acl in acl()) {
        let observed = Observed { device: Device::Foreign, acl, forwarding: BTreeSet::new() };
        prop_assert_eq!(diff(&Some(new.desired()), &observed), vec![]);
        prop_assert!(!diff(&None, &observed).contains(&Step::DeleteLink));
    }
}

#[test]
fn one_changed_peer_is_one_change_among_ten_thousand() {
    let prefix = |n: u32| Prefix::host(IpAddr::from((0x6440_0000 + n).to_be_bytes()));
    let name = |n: u32| {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        NodeKey(key)
    };
    let peer = |n: u32| WantedPeer {
        allowed_ips: [prefix(n)].into(),
        ..WantedPeer::default()
    };
    let all: BTreeMap<_, _> = (1..=10_000).map(|n| (name(n), peer(n))).collect();
    let mut wanted = Wanted {
        peers: all,
        ..small()
    };
    let mut observed = Observed::default();
    for step in diff(&Some(wanted.clone()), &observed) {
        observed.apply(&step);
    }
    assert!(diff(&Some(wanted.clone()), &observed).is_empty());
    let route: Prefix = "10.9.0.0/16".parse().unwrap();
    let changed = wanted.peers.get_mut(&name(5_000)).unwrap();
    changed.allowed_ips.insert(route);
    let steps = diff(&Some(wanted), &observed);
    let [Step::SetPeers(changes)] = steps.as_slice() else {
        panic!("{steps:?}");
    };
    let [change] = changes.as_slice() else {
        panic!("{} changes", changes.len());
    };
    assert_eq!(change.key, name(5_000));
    assert_eq!(change.allowed_ips, [route].into(), "only what is new");
    assert!(!change.replace_allowed_ips && !change.create);
}

/// Somebody set an MTU below IPv6's least, or switched IPv6 off: neither keeps the rest waiting.
#[test]
fn a_device_that_lost_its_ipv6_is_mended_or_used_without_it() {
    let mut whole = Observed::default();
    for step in diff(&Some(small()), &whole) {
        whole.apply(&step);
    }
    let lost = |change: fn(&mut Present)| {
        let mut observed = whole.clone();
        if let Device::Present(device) = &mut observed.device {
            device.addrs.retain(|(addr, _)| addr.is_ipv4());
            device.routes.retain(|route, _| route.is_v4());
            change(device);
        }
        diff(&Some(small()), &observed)
    };
    let steps = lost(|device| device.mtu = 1_200);
    assert_eq!(steps.first(), Some(&Step::SetMtu(1420)), "{steps:?}");
    assert_eq!(lost(|device| device.without_v6 = true), vec![]);
    let steps = lost(|device| (device.up, device.without_v6) = (false, true));
    assert_eq!(steps.first(), Some(&Step::SetUp(true)), "{steps:?}");
    assert_eq!(lost(|_| {}).len(), 2, "its address and the route");
}

fn small() -> Wanted {
    Wanted {
        key: key(99),
        listen_port: 51820,
        mtu: 1420,
        addrs: ["100.64.0.1".parse().unwrap(), "fd00::1".parse().unwrap()].into(),
        peers: BTreeMap::from([
            (key(2), peer(&["100.64.0.2/32", "fd00::2/128"])),
            (key(3), peer(&["100.64.0.3/32", "10.3.0.0/16"])),
        ]),
        routes: ["100.64.0.0/10", "fd00::/48", "10.3.0.0/16"]
            .map(|route| (route.parse().unwrap(), mtu(0)))
            .into(),
        forwarding: BTreeSet::new(),
        policy: policy(1),
    }
}

fn peer(allowed_ips: &[&str]) -> WantedPeer {
    WantedPeer {
        allowed_ips: allowed_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        endpoint: Some("192.0.2.7:51820".parse().unwrap()),
        keepalive: 0,
        mute: false,
    }
}

fn converged(wanted: &Wanted) -> Observed {
    let mut observed = Observed::default();
    for step in diff(&Some(wanted.clone()), &observed) {
        observed.apply(&step);
    }
    observed
}

/// Compares the plan with the committed text.
#[track_caller]
fn check(name: &str, desired: &Desired, observed: &Observed) {
    let mut text = String::new();
    for step in diff(desired, observed) {
        writeln!(text, "{step}").unwrap();
        match step {
            Step::SetPeers(changes) => {
                for change in changes {
                    let verb = if change.create { "make" } else { "update" };
                    let how = if change.replace_allowed_ips {
                        "="
                    } else {
                        "+="
                    };
                    write!(
                        text,
                        "  {verb} {:02x}…: ips {how} {:?}",
                        change.key.0[0], change.allowed_ips
                    )
                    .unwrap();
                    if let Some(endpoint) = change.endpoint {
                        write!(text, ", endpoint {endpoint}").unwrap();
                    }
                    if let Some(keepalive) = change.keepalive {
                        write!(text, ", keepalive {keepalive}").unwrap();
                    }
                    text.push('\n');
                }
            }
            Step::RemovePeers(keys) => {
                for key in keys {
                    writeln!(text, "  {:02x}…", key.0[0]).unwrap();
                }
            }
            Step::Greet(peers) => {
                for (key, keepalive) in peers {
                    writeln!(text, "  {:02x}…, keepalive {keepalive}", key.0[0]).unwrap();
                }
            }
            Step::SetAcl(policy) => writeln!(text, "  number {}", policy.serial).unwrap(),
            _ => {}
        }
    }
    let file = format!(
        "{}/tests/golden/plan/{name}.txt",
        env!("CARGO_MANIFEST_DIR")
    );
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(text, golden, "{file}: UPDATE=1 rewrites it");
}

#[test]
fn first_start() {
    check("first-start", &Some(small()), &Observed::default());
}

#[test]
fn a_peer_joins_and_another_leaves() {
    let before = converged(&small());
    let mut wanted = small();
    wanted.peers.remove(&key(2));
    wanted.peers.insert(key(4), peer(&["100.64.0.4/32"]));
    wanted.policy = policy(2);
    check("join-and-leave", &Some(wanted), &before);
}

#[test]
fn a_path_takes_other_lengths() {
    let before = converged(&small());
    let mut wanted = small();
    for (route, inner) in [
        ("100.64.0.2/32", 1440),
        ("fd00::2/128", 1440),
        ("10.3.0.0/16", 1220),
    ] {
        let route: Prefix = route.parse().unwrap();
        let mtu = RouteMtu::of(Some(inner), Family::of(&route));
        wanted.routes.insert(route, mtu);
    }
    check("path-mtu", &Some(wanted.clone()), &before);
    // Another link: IPv6 routes that follow the device's MTU are set right in the same plan.
    wanted.mtu = 1440;
    let before = converged(&wanted);
    wanted.mtu = 8940;
    check("device-mtu", &Some(wanted), &before);
}

#[test]
fn a_prefix_moves_to_another_peer() {
    let before = converged(&small());
    let mut wanted = small();
    let route = "10.3.0.0/16".parse().unwrap();
    wanted
        .peers
        .get_mut(&key(3))
        .unwrap()
        .allowed_ips
        .remove(&route);
    wanted
        .peers
        .get_mut(&key(2))
        .unwrap()
        .allowed_ips
        .insert(route);
    wanted.policy = policy(2);
    check("prefix-moves", &Some(wanted), &before);
}

#[test]
fn a_peer_gets_a_new_key() {
    let before = converged(&small());
    let mut wanted = small();
    let two = wanted.peers.remove(&key(2)).unwrap();
    wanted.peers.insert(key(5), two);
    wanted.policy = policy(2);
    check("new-key", &Some(wanted), &before);
}

#[test]
fn an_agent_that_restarts_finds_everything() {
    let mut found = converged(&small());
    found.acl = Acl::Attached(None);
    check("restart", &Some(small()), &found);
}

#[test]
fn a_device_found_up_without_programs() {
    let mut found = converged(&small());
    found.acl = Acl::Absent;
    check("unprotected", &Some(small()), &found);
}

#[test]
fn a_path_changes() {
    let before = converged(&small());
    let mut wanted = small();
    for peer in wanted.peers.values_mut() {
        peer.endpoint = None;
    }
    let three = wanted.peers.get_mut(&key(3)).unwrap();
    three.endpoint = Some("[2001:db8::3]:4500".parse().unwrap());
    check("path-changes", &Some(wanted), &before);
}

#[test]
fn a_subnet_router_starts_and_stops_forwarding() {
    let lan = |family| Forwarding {
        side: Side::Lan("lan0".to_owned()),
        family,
    };
    let before = Observed {
        forwarding: [lan(Family::V6)].into(),
        ..converged(&small())
    };
    let mut wanted = small();
    let tunnel = Forwarding {
        side: Side::Tunnel,
        family: Family::V4,
    };
    wanted.forwarding = [lan(Family::V4), tunnel].into();
    check("forwarding", &Some(wanted), &before);
}

#[test]
fn leaving() {
    let lan = Forwarding {
        side: Side::Lan("lan0".to_owned()),
        family: Family::V4,
    };
    let before = Observed {
        forwarding: [lan].into(),
        ..converged(&small())
    };
    check("leaving", &None, &before);
}

#[test]
fn what_the_kernel_did_by_itself_is_left_alone() {
    let mut observed = converged(&small());
    let Device::Present(device) = &mut observed.device else {
        panic!("it is there");
    };
    for peer in device.peers.values_mut() {
        peer.stats = Stats {
            endpoint: Some("203.0.113.9:9".parse().unwrap()),
            last_handshake: Some(std::time::Duration::from_secs(5)),
            rx_bytes: 5,
            tx_bytes: 5,
        };
    }
    let mut wanted = small();
    for peer in wanted.peers.values_mut() {
        peer.endpoint = None;
    }
    assert!(diff(&Some(wanted), &observed).is_empty());
}
