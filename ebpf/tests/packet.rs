//! The parser on the host: what it reads, and that no bytes at all can confuse it.
#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

use ebpf::packet::{Bytes, Packet, Part, Tuple, What, general, parse};
use ebpf::reason::Reason;
use ebpf::verdict::Verdict;

/// Numbers from a seed (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn byte(&mut self) -> u8 {
        (self.next() >> 32) as u8
    }
}

fn read(bytes: &[u8]) -> (Verdict, Packet) {
    let mut packet = Packet::NONE;
    (parse(&bytes, &mut packet), packet)
}

fn v4(protocol: u8, transport: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + transport.len()).unwrap().to_be_bytes();
    let head = [0x45, 0, total[0], total[1], 0, 9, 0, 0, 64, protocol, 0, 0];
    let addrs = [100, 64, 0, 2, 100, 64, 0, 1];
    [&head[..], &addrs, transport].concat()
}

fn v6(next: u8, rest: &[u8]) -> Vec<u8> {
    let payload = u16::try_from(rest.len()).unwrap().to_be_bytes();
    let head = [0x60, 0, 0, 0, payload[0], payload[1], next, 64];
    let mut addrs = [0_u8; 32];
    (addrs[0], addrs[15], addrs[16], addrs[31]) = (0xfd, 2, 0xfd, 1);
    [&head[..], &addrs, rest].concat()
}

/// One packet of every shape that the parser tells apart.
fn shapes() -> Vec<Vec<u8>> {
    let tcp = [
        0, 80, 1, 187, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x12, 4, 0, 0, 0, 0, 0,
    ];
    let udp = [0, 53, 4, 0, 0, 8, 0, 0];
    let sctp = [0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 4];
    let echo4 = [8, 0, 0, 0, 0, 5, 0, 1];
    let echo6 = [129, 0, 0, 0, 0, 5, 0, 1];
    let error4 = [&[3, 1, 0, 0, 0, 0, 0, 0][..], &v4(17, &udp)].concat();
    let error6 = [&[1, 4, 0, 0, 0, 0, 0, 0][..], &v6(6, &tcp)].concat();
    let hops = [&[60, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0][..], &tcp].concat();
    let first = [&[17, 0, 0, 1, 0, 0, 0, 7][..], &udp].concat();
    let later = [17, 0, 0x05, 0xc8, 0, 0, 0, 7, 1, 2, 3, 4];
    let mut options = v4(6, &tcp);
    options[0] = 0x46;
    options.splice(20..20, [1, 1, 1, 0]);
    options[3] += 4;
    let mut fragment = v4(17, &udp);
    fragment[6] = 0x20;
    vec![
        v4(6, &tcp),
        v4(17, &udp),
        v4(132, &sctp),
        v4(1, &echo4),
        v4(1, &error4),
        v4(47, &[1; 8]),
        options,
        fragment,
        v6(6, &tcp),
        v6(17, &udp),
        v6(58, &echo6),
        v6(58, &error6),
        v6(0, &hops),
        v6(44, &first),
        v6(44, &later),
        v6(50, &[1; 8]),
    ]
}

/// What the fast reader accepts, the general one reads in the same way.
#[track_caller]
fn both_readers_agree(bytes: &[u8]) {
    let (verdict, packet) = read(bytes);
    let mut other = Packet::NONE;
    let by_general = general(&bytes, &mut other);
    assert_eq!(verdict, by_general, "{bytes:x?}");
    if verdict.passes() {
        assert_eq!(packet, other, "{bytes:x?}");
    }
}

#[test]
fn every_shape_is_read_for_what_it_is() {
    let whats: Vec<(What, Part)> = shapes()
        .iter()
        .map(|bytes| {
            let (verdict, packet) = read(bytes);
            assert!(verdict.passes(), "{verdict:?}: {bytes:x?}");
            (packet.tuple.what, packet.part)
        })
        .collect();
    let whole = |what| (what, Part::Whole);
    assert_eq!(
        whats,
        [
            whole(What::Segment),
            whole(What::Datagram),
            whole(What::SctpInit),
            whole(What::Request),
            whole(What::Error),
            whole(What::Datagram),
            whole(What::Segment),
            (What::Datagram, Part::First),
            whole(What::Segment),
            whole(What::Datagram),
            whole(What::Reply),
            whole(What::Error),
            whole(What::Segment),
            (What::Datagram, Part::First),
            (What::LaterFragment, Part::Later),
            whole(What::Datagram),
        ]
    );
    let (_, error) = read(&shapes()[11]);
    let Tuple {
        src_port,
        dst_port,
        protocol,
        what,
        ..
    } = error.inner;
    assert_eq!(
        (src_port, dst_port, protocol, what),
        (80, 443, 6, What::Datagram)
    );
}

#[test]
fn an_error_about_a_packet_with_extension_headers_names_its_flow() {
    let udp = [0, 53, 4, 0, 0, 8, 0, 0];
    let options = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    let [first, later] = [[17, 0, 0, 1, 0, 0, 0, 7], [17, 0, 0, 9, 0, 0, 0, 7]];
    let about = |next, headers: &[[u8; 8]]| {
        let inner = v6(next, &[headers.concat(), udp.to_vec()].concat());
        read(&v6(58, &[&[1, 4, 0, 0, 0, 0, 0, 0][..], &inner].concat()))
            .1
            .inner
    };
    for inner in [
        about(0, &[options(60), options(17)]),
        about(60, &[options(44), first]),
        about(
            60,
            &[
                options(60),
                options(60),
                options(60),
                options(60),
                options(60),
                options(17),
            ],
        ),
    ] {
        let Tuple {
            src_port,
            dst_port,
            protocol,
            what,
            ..
        } = inner;
        assert_eq!(
            (src_port, dst_port, protocol, what),
            (53, 1024, 17, What::Datagram)
        );
    }
    for unreadable in [
        about(44, &[later]),
        about(60, &[options(0), options(17)]),
        about(135, &[options(17)]),
        about(60, &[options(60); 7]),
    ] {
        assert_eq!(unreadable.what, What::Error);
    }
}

#[test]
fn a_packet_cut_anywhere_is_refused_and_never_read_past_its_end() {
    for shape in shapes() {
        for cut in 0..shape.len() {
            let (verdict, _) = read(&shape[..cut]);
            assert_eq!(
                verdict.reason(),
                Some(Reason::Truncated),
                "{cut} of {shape:x?}"
            );
            both_readers_agree(&shape[..cut]);
        }
    }
}

#[test]
fn no_bytes_at_all_confuse_the_readers() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let rounds = if std::env::var_os("WEIR_FULL").is_some() {
        400_000
    } else {
        20_000
    };
    let shapes = shapes();
    for round in 0..rounds {
        let mut bytes = shapes[round % shapes.len()].clone();
        for _ in 0..=random.next() % 4 {
            let at = usize::try_from(random.next()).unwrap() % bytes.len();
            bytes[at] = random.byte();
        }
        both_readers_agree(&bytes);
        let length = usize::try_from(random.next() % 120).unwrap();
        let noise: Vec<u8> = (0..length).map(|_| random.byte()).collect();
        both_readers_agree(&noise);
    }
}

#[test]
fn a_longer_buffer_than_the_packet_claims_is_no_part_of_it() {
    let mut bytes = v4(17, &[0, 53, 4, 0, 0, 8, 0, 0]);
    bytes[3] = 24;
    assert_eq!(read(&bytes).0.reason(), Some(Reason::Truncated));
    assert_eq!(Bytes::len(&bytes.as_slice()), 28);
}
