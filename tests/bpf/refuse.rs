//! Answers to refused packets: what is answered, with which bytes, and that a socket on a real
//! kernel understands them.

use super::bed::{self, Bed, ip};
use super::craft::{ACK, Body, FIN, PSH, RST, SYN, Spec};
use super::generate::{self, Random, me};
use super::semantics::{filter, peers, rule, set};
use super::twin::Twin;
use agent::kernel::bpf::Options;
use ebpf::abi::{Addr, Direction, FlowKey, Quota};
use ebpf::packet::{Packet, parse};
use ebpf::reason::Reason;
use ebpf::refuse::{
    self, ANSWERS_PER_PAIR, MAX_EMBEDDED, Outcome, REFUSAL_WORDS, Refusal, WINDOW_NS,
};
use ebpf::verdict::Verdict;
use engine::acl::Acl as Lowered;
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

const POLICY: Verdict = Verdict::deny(Reason::Policy);
const REVOKED: Verdict = Verdict::deny(Reason::Revoked);
const PAIRS: [(&str, &str); 2] = [("100.64.0.1", "100.64.0.2"), ("fd7a::1:1", "fd7a::1:2")];

fn read(bytes: &[u8]) -> Packet {
    let mut packet = Packet::NONE;
    assert!(parse(&bytes, &mut packet).passes(), "{bytes:02x?}");
    packet
}

/// The answer's bytes to a packet.
fn answer(bytes: &[u8]) -> Vec<u8> {
    let mut refusal = Refusal {
        len: 0,
        transport: 0,
        words: [0x5555_5555; REFUSAL_WORDS],
    };
    refuse::write(&bytes, &read(bytes), &mut refusal).unwrap();
    let bytes = refusal.words.iter().flat_map(|word| word.to_ne_bytes());
    bytes.take(refusal.len as usize).collect()
}

fn is_due(twin: &Twin<0>, bytes: &[u8], verdict: Verdict) -> bool {
    let nobody = Addr { words: [0; 4] };
    let mut key = FlowKey {
        local: nobody,
        remote: nobody,
        local_port: 0,
        remote_port: 0,
        protocol: 0,
        zero: 0,
        zeros: 0,
    };
    refuse::is_due(twin, &read(bytes), verdict, &mut key)
}

/// RFC 1071, byte by byte.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(sum).unwrap()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Checks lengths, addresses and checksums of an answer, and returns what follows its IP header.
fn opened<'a>(asked: &[u8], answer: &'a [u8]) -> &'a [u8] {
    if asked[0] >> 4 == 4 {
        assert_eq!(answer[0], 0x45);
        let total = u16::from_be_bytes([answer[2], answer[3]]);
        assert_eq!(usize::from(total), answer.len());
        assert_eq!(sum(&[&answer[..20]]), 0xffff, "IP checksum");
        assert_eq!(
            (&answer[12..16], &answer[16..20]),
            (&asked[16..20], &asked[12..16])
        );
        let body = &answer[20..];
        if answer[9] == 6 {
            let len = u16::try_from(body.len()).unwrap().to_be_bytes();
            let pseudo = [&answer[12..20], &[0, 6], &len].concat();
            assert_eq!(sum(&[&pseudo, body]), 0xffff, "TCP checksum");
        } else {
            assert_eq!(sum(&[body]), 0xffff, "ICMP checksum");
        }
        body
    } else {
        assert_eq!(answer[0], 0x60);
        let payload = u16::from_be_bytes([answer[4], answer[5]]);
        assert_eq!(usize::from(payload) + 40, answer.len());
        assert_eq!(
            (&answer[8..24], &answer[24..40]),
            (&asked[24..40], &asked[8..24])
        );
        let body = &answer[40..];
        let pseudo = [
            &answer[8..40],
            &[0, 0],
            &answer[4..6],
            &[0, 0, 0, answer[6]],
        ]
        .concat();
        assert_eq!(sum(&[&pseudo, body]), 0xffff, "checksum");
        body
    }
}

/// Checks an answer against what the RFCs say, from the refused packet's bytes.
fn check(asked: &[u8], packet: &Packet, answer: &[u8]) {
    let v4 = asked[0] >> 4 == 4;
    let body = opened(asked, answer);
    let number = if v4 { answer[9] } else { answer[6] };
    if packet.tuple.protocol != 6 {
        let total = if v4 {
            usize::from(u16::from_be_bytes([asked[2], asked[3]]))
        } else {
            usize::from(u16::from_be_bytes([asked[4], asked[5]])) + 40
        };
        let (kind, own) = if v4 { ([3, 13], 1) } else { ([1, 1], 58) };
        assert_eq!((number, &body[..2]), (own, &kind[..]));
        assert_eq!(body[4..8], [0; 4], "unused");
        let embedded = &body[8..];
        assert!(asked.starts_with(embedded));
        assert_eq!(embedded.len(), (total & !3).min(MAX_EMBEDDED as usize));
        return;
    }
    assert_eq!((number, body.len()), (6, 20));
    // No extension headers before TCP here, no IP options.
    let header = if v4 { 20 } else { 40 };
    let (segment, ports) = (&asked[header..], [&body[2..4], &body[..2]].concat());
    assert_eq!(ports, segment[..4]);
    if segment[13] & ACK != 0 {
        assert_eq!((word(body, 4), word(body, 8)), (word(segment, 8), 0));
        assert_eq!(body[13], RST);
    } else {
        let data = segment.len() - usize::from(segment[12] >> 4) * 4;
        let flags = u32::from(segment[13] & SYN != 0) + u32::from(segment[13] & FIN != 0);
        let length = u32::try_from(data).unwrap() + flags;
        assert_eq!(
            (word(body, 4), word(body, 8)),
            (0, word(segment, 4) + length)
        );
        assert_eq!(body[13], RST | ACK);
    }
}

#[test]
fn every_answer_is_a_whole_packet_that_says_what_the_rfcs_ask_for() {
    let mut random = Random(5);
    let mut kinds = BTreeSet::new();
    for _ in 0..20_000 {
        let (_, spec) = generate::packet(&mut random, &mut Vec::new());
        let bytes = spec.bytes();
        let mut packet = Packet::NONE;
        if !parse(&bytes.as_slice(), &mut packet).passes() || spec.fragment.is_some() {
            continue;
        }
        check(&bytes, &packet, &answer(&bytes));
        kinds.insert((spec.src.is_ipv4(), packet.tuple.protocol));
    }
    assert!(kinds.len() >= 10, "too few kinds met: {kinds:?}");
}

#[test]
fn an_answer_to_a_long_packet_is_short_and_one_behind_headers_is_right() {
    let mut long = Spec::new("100.64.0.1", "100.64.0.2", Body::Udp(1, 2)).bytes();
    long.resize(60_000, 3);
    long[2..4].copy_from_slice(&60_000_u16.to_be_bytes());
    let said = answer(&long);
    check(&long, &read(&long), &said);
    assert_eq!(said.len(), 28 + MAX_EMBEDDED as usize);

    // IPv4 options, and IPv6 destination options: the reset is the one of the plain packet.
    let plain = Spec::new("100.64.0.1", "100.64.0.2", Body::Tcp(5, 6, SYN)).bytes();
    let mut options = [&plain[..20], &[1, 1, 1, 0], &plain[20..]].concat();
    options[0] = 0x46;
    options[3] += 4;
    assert_eq!(answer(&options), answer(&plain));
    let plain = Spec::new("fd7a::1:1", "fd7a::1:2", Body::Tcp(5, 6, SYN)).bytes();
    let chained = [&[6, 1], &[0; 14][..]].concat();
    let mut behind = [&plain[..40], &chained, &plain[40..]].concat();
    behind[6] = 60;
    behind[5] += 16;
    assert_eq!(answer(&behind), answer(&plain));
}

#[test]
fn what_no_socket_waits_for_is_never_answered() {
    let twin = Twin::<0>::default();
    for (us, peer) in PAIRS {
        let of = |body| Spec::new(us, peer, body);
        let to = |dst: &str| Spec::new(us, dst, Body::Udp(1, 2));
        let udp = of(Body::Udp(1, 2));
        let v6 = us.contains(':');
        let mut silent = vec![
            udp.error_from(peer),
            of(Body::Udp(3, 4)).error_from(us),
            of(Body::Echo(false, 1)),
            of(Body::Icmp(5)),
            of(Body::Tcp(1, 2, RST)),
            of(Body::Tcp(1, 2, RST | ACK)),
            udp.clone().part(1, 0, true),
            udp.clone().part(1, 1480, true),
            udp.clone().part(1, 2960, false),
            of(Body::Other(if v6 { 1 } else { 58 })),
        ];
        if v6 {
            silent.extend([to("ff02::1"), to("ff05::2")]);
        } else {
            silent.extend(["224.0.0.1", "239.1.1.1", "255.255.255.255", "0.0.0.0"].map(to));
        }
        for spec in silent {
            for verdict in [POLICY, REVOKED] {
                assert!(
                    !is_due(&twin, &spec.bytes(), verdict),
                    "{verdict:?} {spec:?}"
                );
            }
        }
        for body in [
            Body::Udp(1, 2),
            Body::Tcp(1, 2, SYN),
            Body::Sctp(1, 2, 1),
            Body::Echo(true, 1),
            Body::Other(47),
        ] {
            let bytes = of(body).bytes();
            assert!(is_due(&twin, &bytes, POLICY) && is_due(&twin, &bytes, REVOKED));
            for reason in Reason::ALL {
                let verdict = Verdict::deny(*reason);
                let due = [POLICY, REVOKED].contains(&verdict);
                assert_eq!(is_due(&twin, &bytes, verdict), due, "{reason:?}");
            }
        }
    }
}

/// A segment without flow, of a connection that the peer may have begun, may be one whose flow was
/// forgotten: a reset would end what the peer's next segment brings back.
#[test]
fn a_segment_in_the_middle_is_reset_only_where_policy_allows_neither_direction() {
    let twin = Twin::<0>::default();
    let inbound = [rule("100.64.0.0/10", "100.64.0.1/32", &[(Some(6), 80, 80)])];
    let policy = filter(inbound.to_vec(), Vec::new());
    let mut lowered = Lowered::default();
    let change = lowered.lower(&policy, &me(BTreeSet::new()), &peers());
    twin.set(lowered.tables(), &change.unwrap());
    let from =
        |port, flags| Spec::new("100.64.0.1", "100.64.0.2", Body::Tcp(port, 4000, flags)).bytes();
    assert!(
        !is_due(&twin, &from(80, ACK | PSH), POLICY),
        "it may come back"
    );
    assert!(is_due(&twin, &from(81, ACK | PSH), POLICY), "nobody may");
    assert!(
        is_due(&twin, &from(80, ACK | PSH), REVOKED),
        "it was taken back"
    );
    assert!(is_due(&twin, &from(80, SYN), POLICY), "it begins here");
}

#[test]
fn a_window_has_so_many_answers_and_the_next_one_again() {
    let mut window = Quota::default();
    let start = 7 * WINDOW_NS;
    let taken = |window: &mut Quota, now| {
        let tries = 0..2 * ANSWERS_PER_PAIR;
        let taken = tries.filter(|_| refuse::take(window, ANSWERS_PER_PAIR, now));
        u64::try_from(taken.count()).unwrap()
    };
    assert_eq!(taken(&mut window, start), ANSWERS_PER_PAIR);
    assert_eq!(taken(&mut window, start + WINDOW_NS - 1), 0);
    assert_eq!(taken(&mut window, start + WINDOW_NS), ANSWERS_PER_PAIR);
}

/// A device that is up, with addresses and a route to the peers.
fn bring_up() {
    for line in [
        "link set lo up",
        "addr add 100.64.0.1/32 dev weirtest0",
        "-6 addr add fd7a::1:1/128 dev weirtest0 nodad",
        "link set weirtest0 up",
        "route add 100.64.0.0/10 dev weirtest0",
        "-6 route add fd7a::/64 dev weirtest0",
    ] {
        ip(&line.split(' ').collect::<Vec<_>>());
    }
}

/// How an attempt to connect ends, if it ends at once.
fn connect(peer: IpAddr) -> ErrorKind {
    /// A SYN is sent again after a second; a slow guest needs some of that.
    const AT_ONCE: Duration = Duration::from_millis(900);
    let target = SocketAddr::new(peer, 81);
    TcpStream::connect_timeout(&target, AT_ONCE)
        .unwrap_err()
        .kind()
}

/// The error that a datagram brings back, if it does.
fn ask(peer: IpAddr) -> Option<i32> {
    let own = if peer.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(own).unwrap();
    socket.connect((peer, 81)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    socket.send(b"may I?").unwrap();
    let error = socket.recv(&mut [0; 8]).unwrap_err();
    let silence = [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind());
    error.raw_os_error().filter(|_| !silence)
}

#[test]
fn kernels_refuse_a_connection_at_once_and_in_silence_if_told_so() {
    let Some(bed) = Bed::make("kernel_refused") else {
        return;
    };
    let (mut acl, mut lowered) = (bed.open(Options::default()), Lowered::default());
    let nothing = rule("100.64.0.1/32", "100.64.0.0/10", &[(Some(6), 22, 22)]);
    set(&mut acl, &mut lowered, &filter(Vec::new(), vec![nothing]));
    bring_up();
    let sent = |acl: &agent::kernel::bpf::Acl| {
        let answers = acl.answers().unwrap();
        assert_eq!(answers[Outcome::Failed as usize], (Outcome::Failed, 0));
        answers[Outcome::Sent as usize].1
    };
    for (_, peer) in PAIRS {
        let peer: IpAddr = peer.parse().unwrap();
        acl.answer_refusals(true).unwrap();
        let (before, begun) = (sent(&acl), Instant::now());
        assert_eq!(connect(peer), ErrorKind::ConnectionRefused, "{peer}");
        let took = begun.elapsed();
        // icmp_err_convert in net/ipv4/icmp.c, tab_unreach in net/ipv6/icmp.c.
        let error = if peer.is_ipv4() {
            libc::EHOSTUNREACH
        } else {
            libc::EACCES
        };
        assert_eq!(ask(peer), Some(error), "{peer}");
        assert!(sent(&acl) >= before + 2, "{peer}, {took:?}");
        // Off and on again: the switch is a word in a map.
        acl.answer_refusals(false).unwrap();
        let before = sent(&acl);
        assert_eq!(connect(peer), ErrorKind::TimedOut, "{peer}");
        assert_eq!(ask(peer), None, "{peer}");
        assert_eq!(sent(&acl), before);
    }
    let counters = bed::counters(&acl);
    assert!(
        counters[&(Direction::Egress, POLICY)] >= 8,
        "each is counted as dropped"
    );
}
