//! Random policies and packets, all from one seed, in a world so small that they meet.

use super::craft::{ACK, Body, FIN, PSH, RST, SYN, Spec, URG};
use super::model::World;
use proto::filter::{Direction, Filter, Label, Rule, Selector, Service};
use proto::id::NodeId;
use proto::key::NodeKey;
use proto::net::{PortRange, Prefix, Protocol};
use proto::netmap::{Me, Owner, Peer};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Numbers from a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

pub const OUR_ADDRS: [&str; 2] = ["100.64.0.1", "fd7a::1:1"];
const OUR_ROUTES: [&str; 2] = ["192.168.7.0/24", "fd01:7::/64"];
const LABELS: u32 = 4;
const SELECTORS: [&str; 12] = [
    "0.0.0.0/0",
    "::/0",
    "100.64.0.0/10",
    "100.64.0.2/32",
    "fd7a::/64",
    "fd7a::1:3/128",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.5/32",
    "192.168.7.128/25",
    "192.168.0.0/16",
    "fd01:7::8000/113",
];
/// Ours and behind us.
const LOCAL_V4: [&str; 4] = ["100.64.0.1", "192.168.7.5", "192.168.7.200", "100.64.0.1"];
const LOCAL_V6: [&str; 3] = ["fd7a::1:1", "fd01:7::5", "fd01:7::9000"];
/// Peers, behind peers, nobody, never.
const REMOTE_V4: [&str; 14] = [
    "100.64.0.2",
    "100.64.0.2",
    "100.64.0.3",
    "100.64.0.3",
    "100.64.0.4",
    "100.64.0.4",
    "10.1.2.70",
    "10.1.2.5",
    "10.1.2.77",
    "10.1.9.9",
    "100.64.0.99",
    "127.0.0.1",
    "224.0.0.5",
    "169.254.1.1",
];
const REMOTE_V6: [&str; 7] = [
    "fd7a::1:2",
    "fd7a::1:2",
    "fd7a::1:3",
    "fd01:9::9",
    "fd7a::1:99",
    "ff02::1",
    "fe80::1",
];
const PORTS: [u16; 8] = [22, 80, 443, 8000, 8001, 40000, 40001, 65535];
const FLAGS: [u8; 18] = [
    SYN,
    SYN,
    SYN,
    SYN,
    SYN | ACK,
    SYN | ACK,
    ACK,
    ACK,
    ACK | PSH,
    FIN | ACK,
    FIN | ACK,
    FIN | ACK | PSH,
    RST | ACK,
    RST,
    0,
    FIN | PSH | URG,
    SYN | FIN,
    ACK | URG,
];

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn labels(random: &mut Random) -> BTreeSet<Label> {
    let all = (0..LABELS).map(Label);
    all.filter(|_| random.one_in(2)).collect()
}

pub fn peer(id: u64, addrs: &[&str], routes: &[&str], labels: BTreeSet<Label>) -> Peer {
    Peer {
        id: NodeId(id),
        name: format!("n{id}"),
        key: NodeKey([u8::try_from(id & 0xff).unwrap(); 32]),
        addrs: addrs.iter().map(|text| addr(text)).collect(),
        routes: routes.iter().map(|text| prefix(text)).collect(),
        endpoints: Vec::new(),
        owner: Owner::User("ana@example.com".to_owned()),
        labels,
        online: true,
        disco: None,
        home: None,
    }
}

pub fn me(labels: BTreeSet<Label>) -> Me {
    Me {
        id: NodeId(1),
        name: "me".to_owned(),
        key: NodeKey([1; 32]),
        addrs: OUR_ADDRS.iter().map(|text| addr(text)).collect(),
        routes: OUR_ROUTES.iter().map(|text| prefix(text)).collect(),
        owner: Owner::User("ana@example.com".to_owned()),
        labels,
    }
}

/// Some peers, some rules.
pub fn world(random: &mut Random) -> World {
    let mut peers = BTreeMap::new();
    for (id, addrs, routes) in [
        (2, &["100.64.0.2", "fd7a::1:2"][..], &[][..]),
        (3, &["100.64.0.3", "fd7a::1:3"], &["10.1.0.0/16"]),
        (4, &["100.64.0.4"], &["10.1.2.64/26", "fd01:9::/64"]),
    ] {
        if !random.one_in(6) {
            let labels = labels(random);
            peers.insert(NodeId(id), peer(id, addrs, routes, labels));
        }
    }
    World {
        filter: filter(random),
        me: me(labels(random)),
        peers,
    }
}

pub fn filter(random: &mut Random) -> Filter {
    let mut list = || {
        (0..2 + random.below(8))
            .map(|_| rule(random))
            .collect::<Vec<_>>()
    };
    let (ingress, egress) = (list(), list());
    Filter {
        labels: (0..LABELS).map(|label| format!("tag:l{label}")).collect(),
        ingress,
        egress,
    }
}

fn rule(random: &mut Random) -> Rule {
    let selectors = |random: &mut Random| {
        let count = 1 + random.below(2);
        let selectors = (0..count).map(|_| {
            if random.one_in(3) {
                Selector::Prefix(*random.pick(&[Prefix::ALL_V4, Prefix::ALL_V6]))
            } else if random.one_in(2) {
                Selector::Label(Label(u32::try_from(random.below(LABELS.into())).unwrap()))
            } else {
                Selector::Prefix(prefix(random.pick::<&str>(&SELECTORS)))
            }
        });
        selectors.collect()
    };
    let (srcs, dsts) = (selectors(random), selectors(random));
    let mut services: Vec<Service> = (0..1 + random.below(4)).map(|_| service(random)).collect();
    if random.one_in(4) {
        // More ranges than fit inline.
        let protocol = services[0].protocol;
        services.extend((0..9).map(|step| Service {
            protocol,
            ports: PortRange::single(PORTS[5] + 3 * step),
        }));
    }
    Rule {
        index: 0,
        line: 1,
        srcs,
        dsts,
        services,
    }
}

fn service(random: &mut Random) -> Service {
    let protocols = [6, 6, 6, 17, 17, 132, 1, 58, 47];
    let protocol = (!random.one_in(8)).then(|| Protocol(*random.pick(&protocols)));
    let first = *random.pick(&PORTS);
    let ports = match random.below(8) {
        0 => PortRange::ALL,
        1 => PortRange::new(first, first.saturating_add(2000)).unwrap(),
        2 => PortRange::new(u16::try_from(random.below(60000)).unwrap(), 65000).unwrap(),
        _ => PortRange::single(first),
    };
    Service { protocol, ports }
}

/// Makes what follows a packet that passed more likely: most others end a story at once.
pub fn passed(sent: &mut Vec<(Direction, Spec)>, direction: Direction, spec: &Spec) {
    sent.extend(std::iter::repeat_n((direction, spec.clone()), 6));
}

/// A packet and the way it goes. Most repeat or answer what came before.
pub fn packet(random: &mut Random, sent: &mut Vec<(Direction, Spec)>) -> (Direction, Spec) {
    let recent = sent.len().saturating_sub(*random.pick(&[4, 12, 40]));
    if !sent.is_empty() && !random.one_in(5) {
        let (direction, before) = random.pick(&sent[recent..]).clone();
        let follow = follow(random, direction, before);
        sent.push(follow.clone());
        return follow;
    }
    let v4 = random.one_in(2);
    let (local, remote) = if v4 {
        (*random.pick(&LOCAL_V4), *random.pick(&REMOTE_V4))
    } else {
        (*random.pick(&LOCAL_V6), *random.pick(&REMOTE_V6))
    };
    let (mut src, mut dst) = if random.one_in(2) {
        (local, remote)
    } else {
        (remote, local)
    };
    let direction = if src == local {
        Direction::Egress
    } else {
        Direction::Ingress
    };
    if random.one_in(30) {
        // A lie about one end.
        let other = if v4 {
            *random.pick(&LOCAL_V4)
        } else {
            *random.pick(&LOCAL_V6)
        };
        if random.one_in(2) {
            src = other
        } else {
            dst = other
        }
    } else if random.one_in(30) {
        let other = if v4 {
            *random.pick(&REMOTE_V4)
        } else {
            *random.pick(&REMOTE_V6)
        };
        if random.one_in(2) {
            src = other
        } else {
            dst = other
        }
    }
    let mut spec = Spec::new(src, dst, body(random));
    if random.one_in(12) {
        spec = spec.part(u16::try_from(random.below(4)).unwrap(), 0, true);
    }
    sent.push((direction, spec.clone()));
    (direction, spec)
}

/// The first packet of a new flow and the way it goes, between any two addresses. Its source port
/// is `fresh`, from a range that no packet goes to: nothing can be an answer to anything.
pub fn first(random: &mut Random, fresh: u16) -> (Direction, Spec) {
    let v4 = random.one_in(2);
    let (local, remote) = if v4 {
        (*random.pick(&LOCAL_V4), *random.pick(&REMOTE_V4))
    } else {
        (*random.pick(&LOCAL_V6), *random.pick(&REMOTE_V6))
    };
    let port = if random.one_in(8) {
        u16::try_from(random.below(20_000)).unwrap()
    } else {
        *random.pick(&PORTS)
    };
    let body = match random.below(8) {
        0..=3 => Body::Tcp(fresh, port, SYN),
        4 | 5 => Body::Udp(fresh, port),
        6 => Body::Sctp(fresh, port, 1),
        _ => Body::Echo(true, fresh),
    };
    let (mut src, mut dst) = (local, remote);
    if random.one_in(20) {
        // An address that has no business at that end.
        src = if v4 { REMOTE_V4[0] } else { REMOTE_V6[0] };
    }
    let direction = if random.one_in(2) {
        Direction::Egress
    } else {
        (src, dst) = (dst, src);
        Direction::Ingress
    };
    (direction, Spec::new(src, dst, body))
}

fn body(random: &mut Random) -> Body {
    let (one, two) = (*random.pick(&PORTS), *random.pick(&PORTS));
    match random.below(12) {
        0..=4 => Body::Tcp(one, two, *random.pick(&FLAGS)),
        5 | 6 => Body::Udp(one, two),
        7 => Body::Sctp(one, two, u8::try_from(random.below(3)).unwrap()),
        8 | 9 => Body::Echo(!random.one_in(3), one),
        10 => Body::Icmp(*random.pick(&[5, 9, 10, 17, 133, 136])),
        _ => Body::Other(*random.pick(&[47, 50, 51, 136])),
    }
}

fn flip(direction: Direction) -> Direction {
    match direction {
        Direction::Ingress => Direction::Egress,
        Direction::Egress => Direction::Ingress,
    }
}

/// What may come after a packet.
fn follow(random: &mut Random, direction: Direction, mut spec: Spec) -> (Direction, Spec) {
    let later = spec.fragment.filter(|part| part.more && part.offset == 0);
    if let Some(part) = later
        && !random.one_in(3)
    {
        let offset = *random.pick(&[8, 16, 24, 1480]);
        return (direction, spec.part(part.id, offset, random.one_in(2)));
    }
    if random.one_in(6) && !matches!(spec.body, Body::Error(_)) {
        let remote: &[&str] = if spec.src.is_ipv4() {
            &REMOTE_V4
        } else {
            &REMOTE_V6
        };
        let local: &[&str] = if spec.src.is_ipv4() {
            &LOCAL_V4
        } else {
            &LOCAL_V6
        };
        let from = match direction {
            // What went out meets an error out there.
            Direction::Egress => random.pick(remote),
            Direction::Ingress => random.pick(local),
        };
        let mut error = spec.error_from(from);
        if random.one_in(10) {
            error.dst = addr(if error.dst.is_ipv4() {
                "100.64.0.1"
            } else {
                "fd7a::1:1"
            });
        }
        if random.one_in(12) {
            error = error.part(9, 0, true);
        }
        return (flip(direction), error);
    }
    if random.one_in(2) {
        // The answer.
        (spec.src, spec.dst) = (spec.dst, spec.src);
        spec.body = match spec.body {
            Body::Tcp(src, dst, SYN) if !random.one_in(4) => Body::Tcp(dst, src, SYN | ACK),
            Body::Tcp(src, dst, _) => Body::Tcp(dst, src, *random.pick(&FLAGS)),
            Body::Udp(src, dst) => Body::Udp(dst, src),
            Body::Sctp(src, dst, _) => Body::Sctp(dst, src, *random.pick(&[0, 1, 2])),
            Body::Echo(request, id) => Body::Echo(request == random.one_in(5), id),
            other => other,
        };
        return (flip(direction), spec);
    }
    if let Body::Tcp(_, _, flags) = &mut spec.body {
        *flags = *random.pick(&FLAGS);
    }
    (direction, spec)
}

/// How much time goes by before the next packet.
pub fn pause_ns(random: &mut Random) -> u64 {
    const SECOND: u64 = 1_000_000_000;
    match random.below(60) {
        0..=35 => random.below(SECOND / 2),
        36..=47 => random.below(5 * SECOND),
        48..=54 => 11 * SECOND,
        55 | 56 => 31 * SECOND,
        57 => 61 * SECOND,
        58 => *random.pick(&[181, 605, 125]) * SECOND,
        _ if random.one_in(20) => 6 * 24 * 3600 * SECOND,
        _ => 29 * SECOND,
    }
}
