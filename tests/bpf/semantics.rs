//! What passes and what does not, case by case, through the loaded programs, with the counter that
//! says why.

use super::bed::{Bed, send};
use super::craft::{ACK, Body, FIN, PSH, RST, SYN, Spec, URG};
use super::generate::{me, peer};
use agent::kernel::bpf::{Acl, Options, RawMap};
use ebpf::abi::Direction::{self, Egress, Ingress};
use ebpf::abi::maps;
use ebpf::addresses::SLABS;
use ebpf::lines::Shape;
use ebpf::reason::{Accepted, Reason};
use ebpf::verdict::Verdict;
use engine::acl::Acl as Lowered;
use proto::filter::{Filter, Rule, Selector, Service};
use proto::id::NodeId;
use proto::net::{PortRange, Protocol};
use proto::netmap::Peer;
use std::collections::{BTreeMap, BTreeSet};

pub const OPEN: Verdict = Verdict::accept(Accepted::New);
pub const KNOWN: Verdict = Verdict::accept(Accepted::Established);

pub fn rule(src: &str, dst: &str, services: &[(Option<u8>, u16, u16)]) -> Rule {
    let service = |(protocol, first, last): &(Option<u8>, u16, u16)| Service {
        protocol: protocol.map(Protocol),
        ports: PortRange::new(*first, *last).unwrap(),
    };
    Rule {
        index: 0,
        line: 1,
        srcs: vec![Selector::Prefix(src.parse().unwrap())],
        dsts: vec![Selector::Prefix(dst.parse().unwrap())],
        services: services.iter().map(service).collect(),
    }
}

pub fn filter(ingress: Vec<Rule>, egress: Vec<Rule>) -> Filter {
    Filter {
        labels: Vec::new(),
        ingress,
        egress,
    }
}

pub fn peers() -> BTreeMap<NodeId, Peer> {
    let none = BTreeSet::new;
    [
        peer(2, &["100.64.0.2", "fd7a::1:2"], &[], none()),
        peer(3, &["100.64.0.3", "fd7a::1:3"], &["10.1.0.0/16"], none()),
    ]
    .map(|peer| (peer.id, peer))
    .into()
}

/// Peers may reach our port 80 and 443, ask us by UDP 53, ping us, and send GRE; we may reach
/// port 22 of peers and of what is behind peer 3, by IPv4 and IPv6.
fn usual() -> Filter {
    let inbound = [(Some(6), 80, 80), (Some(6), 443, 443), (Some(17), 53, 53)];
    let pings = [
        (Some(1), 0, 65535),
        (Some(58), 0, 65535),
        (Some(47), 0, 65535),
    ];
    let sctp = [(Some(132), 5000, 5000)];
    let outbound = [(Some(6), 22, 22), (Some(17), 53, 53)];
    filter(
        vec![
            rule("100.64.0.0/10", "100.64.0.1/32", &inbound),
            rule("100.64.0.0/10", "100.64.0.1/32", &pings),
            rule("100.64.0.0/10", "100.64.0.1/32", &sctp),
            rule("fd7a::/64", "fd7a::1:1/128", &inbound),
            rule("fd7a::/64", "fd7a::1:1/128", &pings),
            rule("10.1.2.0/24", "192.168.7.0/24", &inbound),
        ],
        vec![
            rule("100.64.0.1/32", "100.64.0.0/10", &outbound),
            rule("fd7a::1:1/128", "fd7a::/64", &outbound),
            rule("192.168.7.0/24", "10.1.0.0/16", &outbound),
        ],
    )
}

pub fn set(acl: &mut Acl, lowered: &mut Lowered, filter: &Filter) {
    let change = lowered
        .lower(filter, &me(BTreeSet::new()), &peers())
        .unwrap();
    acl.set(lowered.tables(), Some(&change)).unwrap();
}

/// A device under the usual policy.
pub fn usual_bed(name: &str) -> Option<(Bed, Acl, Lowered)> {
    let bed = Bed::make(name)?;
    let (mut acl, mut lowered) = (bed.open(Options::default()), Lowered::default());
    set(&mut acl, &mut lowered, &usual());
    Some((bed, acl, lowered))
}

/// Sends packets in order and compares each verdict.
#[track_caller]
fn check(acl: &Acl, story: &[(Direction, Spec, Verdict)]) {
    for (number, (direction, spec, wanted)) in story.iter().enumerate() {
        let verdict = send(acl, *direction, &spec.bytes());
        assert_eq!(verdict, *wanted, "packet {number}: {direction:?} {spec:?}");
    }
}

fn deny(reason: Reason) -> Verdict {
    Verdict::deny(reason)
}

fn tcp(src: &str, sport: u16, dst: &str, dport: u16, flags: u8) -> Spec {
    Spec::new(src, dst, Body::Tcp(sport, dport, flags))
}

#[test]
fn kernel_nothing_passes_before_the_first_policy() {
    let Some(bed) = Bed::make("kernel_nothing_passes_before_the_first_policy") else {
        return;
    };
    let acl = bed.open(Options::default());
    let syn = tcp("100.64.0.2", 1000, "100.64.0.1", 80, SYN);
    for direction in [Ingress, Egress] {
        check(&acl, &[(direction, syn.clone(), deny(Reason::NoPolicy))]);
    }
}

#[test]
fn replies_pass_and_the_reverse_initiation_does_not() {
    let Some((_bed, acl, _)) = usual_bed("replies_pass") else {
        return;
    };
    for (us, peer) in [("100.64.0.1", "100.64.0.2"), ("fd7a::1:1", "fd7a::1:2")] {
        let policy = deny(Reason::Policy);
        check(
            &acl,
            &[
                (Ingress, tcp(peer, 1000, us, 80, SYN), OPEN),
                (Egress, tcp(us, 80, peer, 1000, SYN | ACK), KNOWN),
                (Ingress, tcp(peer, 1000, us, 80, ACK | PSH), KNOWN),
                // The same ports the other way round are another connection, and not allowed.
                (Egress, tcp(us, 80, peer, 1000, SYN), policy),
                (Egress, tcp(us, 81, peer, 1000, SYN), policy),
                (Ingress, tcp(peer, 1000, us, 81, SYN), policy),
                (Egress, tcp(us, 3000, peer, 22, SYN), OPEN),
                (Ingress, tcp(peer, 22, us, 3000, SYN | ACK), KNOWN),
                (
                    Ingress,
                    tcp(peer, 22, us, 3001, SYN | ACK),
                    deny(Reason::TcpNoFlow),
                ),
                (Ingress, Spec::new(peer, us, Body::Udp(9, 53)), OPEN),
                (Egress, Spec::new(us, peer, Body::Udp(53, 9)), KNOWN),
                (Egress, Spec::new(us, peer, Body::Udp(53, 10)), policy),
                (Ingress, Spec::new(peer, us, Body::Echo(true, 7)), OPEN),
                (Egress, Spec::new(us, peer, Body::Echo(false, 7)), KNOWN),
                (Egress, Spec::new(us, peer, Body::Echo(true, 7)), policy),
                (
                    Ingress,
                    Spec::new(peer, us, Body::Echo(false, 8)),
                    deny(Reason::IcmpNoFlow),
                ),
                (Ingress, Spec::new(peer, us, Body::Other(47)), OPEN),
                (Egress, Spec::new(us, peer, Body::Other(47)), KNOWN),
                (Ingress, Spec::new(peer, us, Body::Other(50)), policy),
                (Ingress, Spec::new(peer, us, Body::Icmp(5)), {
                    // 5 is a redirect in IPv4, and not assigned in IPv6.
                    deny(Reason::IcmpType)
                }),
            ],
        );
    }
    let sctp = |sport, dport, chunk| {
        Spec::new("100.64.0.2", "100.64.0.1", Body::Sctp(sport, dport, chunk))
    };
    check(
        &acl,
        &[
            (Ingress, sctp(1, 5000, 0), deny(Reason::SctpNoFlow)),
            (Ingress, sctp(1, 5000, 1), OPEN),
            (Ingress, sctp(1, 5000, 0), KNOWN),
        ],
    );
}

#[test]
fn each_combination_of_tcp_flags_has_its_answer() {
    let Some((_bed, acl, _)) = usual_bed("tcp_flags") else {
        return;
    };
    for flags in 0..64_u8 {
        let bare = flags & !(PSH | URG);
        let wanted = if flags & (SYN | ACK | RST | FIN) == SYN {
            OPEN
        } else if flags & !PSH == ACK {
            Verdict::accept(Accepted::PickedUp)
        } else if [SYN | ACK, RST, RST | ACK, ACK, ACK | FIN].contains(&bare) {
            deny(Reason::TcpNoFlow)
        } else {
            deny(Reason::TcpFlags)
        };
        let port = 2000 + u16::from(flags);
        let first = tcp("100.64.0.2", port, "100.64.0.1", 80, flags);
        check(&acl, &[(Ingress, first, wanted)]);
        // Policy allows nothing in the other direction: no flags make a difference there.
        let out = tcp(
            "100.64.0.1",
            80,
            "100.64.0.2",
            3000 + u16::from(flags),
            flags,
        );
        assert!(!send(&acl, Egress, &out.bytes()).passes(), "{flags:#x}");
    }
}

#[test]
fn an_address_that_is_not_the_senders_is_refused() {
    let Some((_bed, acl, _)) = usual_bed("spoofing") else {
        return;
    };
    let to = |src: &str, dst: &str| tcp(src, 1, dst, 80, SYN);
    let us = "100.64.0.1";
    check(
        &acl,
        &[
            (Ingress, to("100.64.0.9", us), deny(Reason::SourceUnknown)),
            (Ingress, to("8.8.8.8", us), deny(Reason::SourceUnknown)),
            (Ingress, to(us, us), deny(Reason::SourceForged)),
            (Ingress, to("192.168.7.9", us), deny(Reason::SourceForged)),
            (
                Ingress,
                to("100.64.0.2", "100.64.0.3"),
                deny(Reason::DestinationNotOurs),
            ),
            (
                Ingress,
                to("100.64.0.2", "8.8.8.8"),
                deny(Reason::DestinationNotOurs),
            ),
            (Ingress, to("127.0.0.1", us), deny(Reason::Martian)),
            (Ingress, to("0.0.0.0", us), deny(Reason::Martian)),
            (
                Ingress,
                to("100.64.0.2", "127.0.0.1"),
                deny(Reason::Martian),
            ),
            (
                Ingress,
                to("100.64.0.2", "224.0.0.1"),
                deny(Reason::Multicast),
            ),
            (
                Ingress,
                to("100.64.0.2", "255.255.255.255"),
                deny(Reason::Multicast),
            ),
            (Ingress, to("169.254.3.4", us), deny(Reason::LinkLocal)),
            (Ingress, to("fe80::1", "fd7a::1:1"), deny(Reason::LinkLocal)),
            (Ingress, to("fd7a::1:2", "ff02::1"), deny(Reason::Multicast)),
            (Ingress, to("::1", "fd7a::1:1"), deny(Reason::Martian)),
            (
                Ingress,
                to("::ffff:100.64.0.2", "::ffff:100.64.0.1"),
                deny(Reason::Martian),
            ),
            (
                Egress,
                to("100.64.0.2", "100.64.0.3"),
                deny(Reason::SourceForged),
            ),
            (
                Egress,
                to("8.8.8.8", "100.64.0.2"),
                deny(Reason::SourceForged),
            ),
            (Egress, to(us, "8.8.8.8"), deny(Reason::DestinationUnknown)),
            (
                Egress,
                to(us, "192.168.7.5"),
                deny(Reason::DestinationUnknown),
            ),
            // A subnet behind a peer, and ours, by the prefixes that rules name inside them.
            (Ingress, to("10.1.2.9", "192.168.7.5"), OPEN),
            (Ingress, to("10.1.3.9", "192.168.7.5"), deny(Reason::Policy)),
            (Egress, tcp("192.168.7.5", 2, "10.1.3.9", 22, SYN), OPEN),
        ],
    );
}

#[test]
fn icmp_errors_pass_only_about_live_flows() {
    let Some((_bed, acl, _)) = usual_bed("icmp_errors") else {
        return;
    };
    let unrelated = deny(Reason::IcmpUnrelated);
    let related = Verdict::accept(Accepted::Related);
    for (us, peer, other) in [
        ("100.64.0.1", "100.64.0.2", "100.64.0.3"),
        ("fd7a::1:1", "fd7a::1:2", "fd7a::1:3"),
    ] {
        let asked = Spec::new(us, peer, Body::Udp(4000, 53));
        let answer = Spec::new(peer, us, Body::Udp(53, 4000));
        let stranger = if us.contains(':') {
            "fd7a::1:9"
        } else {
            "100.64.0.9"
        };
        let mut elsewhere = asked.error_from(peer);
        elsewhere.dst = other.parse().unwrap();
        check(
            &acl,
            &[
                (Ingress, asked.error_from(peer), unrelated),
                (Egress, asked.clone(), OPEN),
                (Ingress, asked.error_from(peer), related),
                // A router on the way is another peer; nobody else may say so.
                (Ingress, asked.error_from(other), related),
                (
                    Ingress,
                    asked.error_from(stranger),
                    deny(Reason::SourceUnknown),
                ),
                // Nobody has answered yet, so we cannot have an answer to complain of.
                (Egress, answer.error_from(us), unrelated),
                (Ingress, answer.clone(), KNOWN),
                (Egress, answer.error_from(us), related),
                (
                    Ingress,
                    Spec::new(us, peer, Body::Udp(4001, 53)).error_from(peer),
                    unrelated,
                ),
                (Ingress, elsewhere, unrelated),
                (Ingress, asked.error_from(peer).error_from(peer), unrelated),
            ],
        );
    }
}

#[test]
fn fragments_pass_with_their_first_one_and_not_without() {
    let Some((_bed, acl, _)) = usual_bed("fragments") else {
        return;
    };
    let no_state = deny(Reason::FragmentNoState);
    let fragment = Verdict::accept(Accepted::Fragment);
    for (us, peer) in [("100.64.0.1", "100.64.0.2"), ("fd7a::1:1", "fd7a::1:2")] {
        let udp = Spec::new(peer, us, Body::Udp(5, 53));
        let syn = tcp(peer, 6, us, 80, SYN);
        let denied = Spec::new(peer, us, Body::Udp(5, 54));
        check(
            &acl,
            &[
                (Ingress, udp.clone().part(1, 1480, true), no_state),
                (Ingress, udp.clone().part(1, 0, true), OPEN),
                (Ingress, udp.clone().part(1, 1480, true), fragment),
                (Ingress, udp.clone().part(1, 2960, false), fragment),
                (Ingress, udp.clone().part(2, 1480, false), no_state),
                (
                    Ingress,
                    denied.clone().part(3, 0, true),
                    deny(Reason::Policy),
                ),
                (Ingress, denied.clone().part(3, 1480, false), no_state),
                // What would rewrite the header that decided.
                (Ingress, syn.clone().part(4, 0, true), OPEN),
                (
                    Ingress,
                    syn.clone().part(4, 8, true),
                    deny(Reason::FragmentOverlap),
                ),
                (
                    Ingress,
                    syn.clone().part(4, 16, true),
                    deny(Reason::FragmentOverlap),
                ),
                (Ingress, syn.clone().part(4, 24, true), fragment),
            ],
        );
        let mut tiny = syn.part(5, 0, true).bytes();
        let keep = tiny.len() - 16;
        tiny.truncate(keep);
        if us.contains(':') {
            tiny[4..6].copy_from_slice(&u16::try_from(keep - 40).unwrap().to_be_bytes());
        } else {
            tiny[2..4].copy_from_slice(&u16::try_from(keep).unwrap().to_be_bytes());
        }
        assert_eq!(send(&acl, Ingress, &tiny), deny(Reason::FragmentTiny));
    }
}

/// An IPv6 packet with these extension headers (each with its own number) before a SYN.
fn chained(headers: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = tcp("fd7a::1:2", 77, "fd7a::1:1", 80, SYN).bytes();
    let transport = bytes.split_off(40);
    let numbers: Vec<u8> = headers
        .iter()
        .map(|(number, _)| *number)
        .chain([6])
        .collect();
    bytes[6] = numbers[0];
    for ((_, header), next) in headers.iter().zip(&numbers[1..]) {
        let mut header = header.clone();
        header[0] = *next;
        bytes.extend(header);
    }
    bytes.extend(transport);
    let payload = u16::try_from(bytes.len() - 40).unwrap();
    bytes[4..6].copy_from_slice(&payload.to_be_bytes());
    bytes
}

/// IPv4 packets that are wrong somewhere.
fn odd_v4(syn: &[u8]) -> Vec<(&'static str, Vec<u8>, Verdict)> {
    let with = |at: usize, byte: u8| {
        let mut bytes = syn.to_vec();
        bytes[at] = byte;
        bytes
    };
    let options = |after: usize| {
        let mut bytes = syn[..20].to_vec();
        bytes[0] = 0x46;
        bytes[3] += 4;
        bytes.extend([1, 1, 1, 0]);
        bytes.extend(&syn[20..]);
        bytes.truncate(after);
        bytes
    };
    let truncated = deny(Reason::Truncated);
    vec![
        ("version 5", with(0, 0x55), deny(Reason::IpVersion)),
        (
            "a header of 16 bytes",
            with(0, 0x44),
            deny(Reason::IpHeader),
        ),
        ("longer than it is", with(3, 200), truncated),
        (
            "shorter than its header",
            with(3, 19),
            deny(Reason::IpHeader),
        ),
        ("total length without transport", with(3, 30), truncated),
        ("options", options(100), OPEN),
        ("options, cut", options(40), truncated),
    ]
}

/// IPv6 packets with chains of extension headers, good and bad.
fn odd_v6() -> Vec<(&'static str, Vec<u8>, Verdict)> {
    let header = |length: u8| vec![0, length, 0, 0, 0, 0, 0, 0];
    let routing = |left: u8| vec![0, 0, 4, left, 0, 0, 0, 0];
    let extension = deny(Reason::ExtensionHeader);
    let truncated = deny(Reason::Truncated);
    vec![
        ("hop-by-hop first", chained(&[(0, header(0))]), OPEN),
        (
            "hop-by-hop second",
            chained(&[(60, header(0)), (0, header(0))]),
            extension,
        ),
        ("six headers", chained(&vec![(60, header(0)); 6]), KNOWN),
        (
            "seven headers",
            chained(&vec![(60, header(0)); 7]),
            extension,
        ),
        ("segments left", chained(&[(43, routing(1))]), extension),
        ("no segments left", chained(&[(43, routing(0))]), KNOWN),
        (
            "an unknown length",
            chained(&[(60, header(200))]),
            truncated,
        ),
        ("nothing follows", chained(&[(59, header(0))]), extension),
        ("mobility", chained(&[(135, header(0))]), extension),
        (
            "AH, which nobody allowed",
            chained(&[(51, header(0))]),
            deny(Reason::Policy),
        ),
        (
            "two fragment headers",
            chained(&[(44, header(0)), (44, header(0))]),
            extension,
        ),
        ("an atomic fragment", chained(&[(44, header(0))]), KNOWN),
    ]
}

#[test]
fn what_cannot_be_read_is_dropped_with_its_reason() {
    let Some((_bed, acl, _)) = usual_bed("unreadable") else {
        return;
    };
    let syn = tcp("100.64.0.2", 70, "100.64.0.1", 80, SYN).bytes();
    for (what, bytes, wanted) in odd_v4(&syn).into_iter().chain(odd_v6()) {
        assert_eq!(send(&acl, Ingress, &bytes), wanted, "{what}");
    }
    let whole = tcp("fd7a::1:2", 77, "fd7a::1:1", 81, SYN).bytes();
    for packet in [&syn, &whole] {
        for cut in 14..packet.len() {
            let verdict = send(&acl, Ingress, &packet[..cut]);
            assert_eq!(verdict, deny(Reason::Truncated), "cut at {cut}");
        }
    }
}

#[test]
fn kernel_a_revoked_flow_is_cut_in_both_directions_and_the_one_beside_it_is_not() {
    let Some((_bed, mut acl, mut lowered)) = usual_bed("revocation") else {
        return;
    };
    let (us, peer) = ("100.64.0.1", "100.64.0.2");
    let open = |port: u16, dport| {
        [
            (Ingress, tcp(peer, port, us, dport, SYN), OPEN),
            (Egress, tcp(us, dport, peer, port, SYN | ACK), KNOWN),
        ]
    };
    check(&acl, &[open(1, 80), open(2, 80), open(3, 443)].concat());
    let before = acl.epoch();
    let mut narrower = usual();
    narrower.ingress[0]
        .services
        .retain(|service| service.ports.first() != 80);
    set(&mut acl, &mut lowered, &narrower);
    assert_ne!(acl.epoch(), before, "what narrows raises the epoch");
    let revoked = deny(Reason::Revoked);
    check(
        &acl,
        &[
            (Ingress, tcp(peer, 1, us, 80, ACK | PSH), revoked),
            (Egress, tcp(us, 80, peer, 2, ACK | PSH), revoked),
            (Egress, tcp(us, 443, peer, 3, ACK | PSH), KNOWN),
            (Ingress, tcp(peer, 3, us, 443, ACK), KNOWN),
            // Forgotten by now, and nothing brings them back.
            (
                Ingress,
                tcp(peer, 1, us, 80, ACK | PSH),
                deny(Reason::Policy),
            ),
            (Egress, tcp(us, 80, peer, 2, RST), deny(Reason::TcpNoFlow)),
        ],
    );
    let between = acl.epoch();
    let mut wider = narrower;
    wider
        .ingress
        .push(rule("100.64.0.0/10", "100.64.0.1/32", &[(Some(6), 80, 80)]));
    set(&mut acl, &mut lowered, &wider);
    assert_eq!(acl.epoch(), between, "what only widens does not");
    check(&acl, &[(Ingress, tcp(peer, 3, us, 443, ACK), KNOWN)]);
}

#[test]
fn a_refusal_lasts_no_longer_than_what_it_was_made_of() {
    let Some((_bed, mut acl, mut lowered)) = usual_bed("refused_again") else {
        return;
    };
    let (us, peer, refused) = ("100.64.0.1", "100.64.0.2", deny(Reason::Policy));
    let udp = |src: &str, sport, dst: &str, dport| Spec::new(src, dst, Body::Udp(sport, dport));
    let syn = |port| tcp(peer, 1, us, port, SYN);
    let again = |spec: Spec, verdict| vec![(Ingress, spec, verdict); 3];
    // A flow from the other side makes answers of them, and no other ones.
    let (answer, other) = (udp(peer, 53, us, 1000), udp(peer, 53, us, 1001));
    check(&acl, &again(answer.clone(), refused));
    check(&acl, &again(other.clone(), refused));
    check(&acl, &[(Egress, udp(us, 1000, peer, 53), OPEN)]);
    check(&acl, &again(answer.clone(), KNOWN));
    check(&acl, &again(other, refused));
    // Another segment with the same ports is another question; so is the other direction.
    check(&acl, &again(syn(22), refused));
    let bare = tcp(peer, 1, us, 22, FIN | ACK);
    check(&acl, &again(bare, deny(Reason::TcpNoFlow)));
    check(&acl, &again(tcp(peer, 1, us, 22, ACK), refused));
    check(&acl, &[(Egress, tcp(us, 22, peer, 1, SYN), refused)]);
    check(&acl, &again(syn(22), refused));
    // A policy that allows it counts at once, without a new epoch, and so does one that does not.
    let before = acl.active();
    let mut wider = usual();
    let more = rule("100.64.0.0/10", "100.64.0.1/32", &[(Some(6), 22, 22)]);
    wider.ingress.push(more);
    set(&mut acl, &mut lowered, &wider);
    assert_eq!(acl.active().epoch, before.epoch);
    check(&acl, &[(Ingress, syn(22), OPEN)]);
    set(&mut acl, &mut lowered, &usual());
    check(&acl, &[(Ingress, syn(22), deny(Reason::Revoked))]);
    check(&acl, &again(syn(22), refused));
    check(&acl, &again(answer, KNOWN));
}

#[test]
fn a_missing_table_is_a_drop_with_its_own_reason() {
    let Some((bed, mut acl, _)) = usual_bed("missing_table") else {
        return;
    };
    acl.settle().unwrap();
    let layout = format!("layout-{:08x}", ebpf::abi::layout());
    let slot = acl.active().slot;
    let shapes = RawMap::from_pin(&bed.folder.join(&layout).join(maps::SHAPES)).unwrap();
    let shape: Shape = shapes.get(&slot).unwrap().unwrap();
    let syn = tcp("100.64.0.2", 99, "100.64.0.1", 80, SYN);
    shapes.put(&slot, &Shape::NONE, 0).unwrap();
    check(&acl, &[(Ingress, syn.clone(), deny(Reason::TableMissing))]);
    shapes.put(&slot, &shape, 0).unwrap();
    check(&acl, &[(Ingress, syn, OPEN)]);
    // Each of them alone. The slabs are that of pilots and that of lines; without its pilot an address
    // is looked for where it is not.
    let needed = [
        (
            maps::IDENTITIES,
            slot * SLABS,
            "-0",
            tcp("100.64.0.2", 100, "100.64.0.1", 80, SYN),
            Reason::SourceUnknown,
        ),
        (
            maps::IDENTITIES,
            slot * SLABS + 1,
            "-1",
            tcp("100.64.0.2", 101, "100.64.0.1", 80, SYN),
            Reason::SourceUnknown,
        ),
        (
            maps::PAIRS,
            slot,
            "",
            tcp("10.1.2.3", 102, "192.168.7.1", 80, SYN),
            Reason::Policy,
        ),
    ];
    for (name, index, number, syn, why) in needed {
        let outer = RawMap::from_pin(&bed.folder.join(&layout).join(name)).unwrap();
        let inner = format!("{name}-{slot}{number}");
        let inner = RawMap::from_pin(&bed.folder.join(&layout).join(inner)).unwrap();
        outer.remove(&index).unwrap();
        check(&acl, &[(Ingress, syn.clone(), deny(why))]);
        outer.put(&index, &inner.number(), 0).unwrap();
        check(&acl, &[(Ingress, syn, OPEN)]);
    }
}

#[test]
fn kernel_explain_says_what_the_programs_do_and_leaves_nothing_behind() {
    let Some((_bed, acl, _)) = usual_bed("explain") else {
        return;
    };
    for (port, wanted) in [(80, true), (81, false)] {
        let spec = tcp("100.64.0.2", 900, "100.64.0.1", port, SYN);
        let mut packet = ebpf::packet::Packet::NONE;
        assert!(ebpf::packet::parse(&spec.bytes().as_slice(), &mut packet).passes());
        let before = acl.flows(10).unwrap();
        let said = acl.view().judge(&packet, Ingress);
        assert_eq!(said.passes(), wanted);
        let after = acl.flows(10).unwrap();
        assert_eq!(after, before, "explaining opens no flow");
        assert_eq!(send(&acl, Ingress, &spec.bytes()), said);
    }
    assert_eq!(acl.flows(10).unwrap().len(), 1);
    assert!(acl.dump().unwrap().contains("flow Opening"));
}
