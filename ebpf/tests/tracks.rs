//! Tracks: packets of both directions and the key of their flow name one place.

use ebpf::abi::Direction;
use ebpf::packet::{Packet, Part, Tuple, What, protocol};
use ebpf::tracks;
use ebpf::verdict::key_of;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

fn datagram(src: IpAddr, dst: IpAddr, src_port: u16, dst_port: u16) -> Packet {
    Packet {
        tuple: Tuple {
            src: src.into(),
            dst: dst.into(),
            src_port,
            dst_port,
            protocol: protocol::UDP,
            what: What::Datagram,
        },
        part: Part::Whole,
        ..Packet::NONE
    }
}

#[test]
fn a_packet_its_answer_and_their_flow_have_one_place_and_other_flows_have_others() {
    let us: IpAddr = "100.64.0.1".parse().unwrap();
    let mut places = BTreeSet::new();
    for number in 0..2_000_u32 {
        let peer = IpAddr::V4(Ipv4Addr::from_bits(0x6441_0000 + number / 4));
        let ports = (20_000 + number as u16, 53);
        let forth = datagram(us, peer, ports.0, ports.1);
        let back = datagram(peer, us, ports.1, ports.0);
        let place = tracks::of_packet(&forth, Direction::Egress);
        assert_eq!(place, tracks::of_packet(&back, Direction::Ingress));
        assert_eq!(place, tracks::of_key(&key_of(&forth, Direction::Egress)));
        assert_eq!(place, tracks::of_key(&key_of(&back, Direction::Ingress)));
        assert!(tracks::word_of(1, place) < tracks::HALF && tracks::bit(place) != 0);
        places.insert(place);
    }
    // By chance 8 of them share one.
    assert!(
        places.len() > 1_970,
        "{} places of 2,000 flows",
        places.len()
    );
}

#[test]
fn packets_whose_flow_has_other_ports_are_looked_for() {
    let (us, peer) = ("fd7a::1".parse().unwrap(), "fd7a::2".parse().unwrap());
    let whole = datagram(us, peer, 1, 2);
    assert!(tracks::is_for(&whole));
    let mut first = whole;
    first.part = Part::First;
    assert!(tracks::is_for(&first));
    let mut later = whole;
    later.part = Part::Later;
    later.tuple.what = What::LaterFragment;
    let mut echo = whole;
    echo.tuple.protocol = protocol::ICMPV6;
    echo.tuple.what = What::Request;
    let mut error = whole;
    error.tuple.what = What::Error;
    for packet in [later, echo, error] {
        assert!(!tracks::is_for(&packet));
    }
}
