//! Which refusals are remembered, and as answers to what.
#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

use ebpf::abi::{Active, Direction, FlowKey};
use ebpf::memo::{self, Moment, Refused};
use ebpf::packet::{Packet, What, parse};
use std::collections::BTreeSet;
use std::net::IpAddr;

const NOW: Moment = Moment {
    active: Active {
        epoch: 3,
        revision: 9,
        slot: 1,
    }
    .word(),
    generation: 77,
    window: 12,
    zero: 0,
};

fn segment(src: u8, dst: u8, src_port: u16, dst_port: u16, flags: u8) -> Packet {
    let mut bytes = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
    bytes.extend([100, 64, 0, src, 100, 64, 0, dst]);
    bytes.extend(src_port.to_be_bytes());
    bytes.extend(dst_port.to_be_bytes());
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 4, 0, 0, 0, 0, 0]);
    let mut packet = Packet::NONE;
    assert!(parse(&bytes.as_slice(), &mut packet).passes());
    packet
}

/// What is remembered after this packet was refused on ingress.
fn refused(packet: &Packet) -> Refused {
    let mut refused = Refused::NONE;
    memo::keep(&mut refused, packet, Direction::Ingress, &NOW);
    refused
}

#[test]
fn a_refusal_answers_the_same_packet_and_no_other() {
    let packet = segment(2, 1, 40_000, 22, 2);
    let refused = refused(&packet);
    let answers =
        |packet: &Packet, direction, now: &Moment| memo::answers(&refused, packet, direction, now);
    assert!(answers(&packet, Direction::Ingress, &NOW));
    assert!(!answers(&packet, Direction::Egress, &NOW));
    let mut others = vec![
        segment(3, 1, 40_000, 22, 2),
        segment(2, 3, 40_000, 22, 2),
        segment(2, 1, 40_001, 22, 2),
        segment(2, 1, 40_000, 23, 2),
        segment(2, 1, 40_000, 22, 16),
        segment(1, 2, 22, 40_000, 2),
    ];
    let mut other = packet;
    other.tuple.protocol = 17;
    others.push(other);
    let mut other = packet;
    other.tuple.what = What::Datagram;
    others.push(other);
    for other in others {
        assert!(!answers(&other, Direction::Ingress, &NOW), "{other:?}");
    }
}

#[test]
fn a_refusal_ends_with_its_policy_its_flows_and_its_second() {
    let packet = segment(2, 1, 40_000, 22, 2);
    let kept = refused(&packet);
    let active = Active::from_word(NOW.active);
    let later = [
        Moment {
            active: active.revised().word(),
            ..NOW
        },
        Moment {
            active: Active { epoch: 4, ..active }.word(),
            ..NOW
        },
        Moment {
            active: Active { slot: 0, ..active }.word(),
            ..NOW
        },
        Moment {
            generation: 78,
            ..NOW
        },
        Moment { window: 13, ..NOW },
    ];
    for now in later {
        assert!(
            !memo::answers(&kept, &packet, Direction::Ingress, &now),
            "{now:?}"
        );
    }
    // A place that was never written, and a packet of zeros while no policy counts.
    let nothing = Moment {
        active: 0,
        generation: 0,
        window: 0,
        zero: 0,
    };
    let mut blank = Packet::NONE;
    blank.tuple.what = What::Datagram;
    assert!(!memo::answers(
        &Refused::NONE,
        &blank,
        Direction::Ingress,
        &nothing
    ));
}

#[test]
fn both_directions_of_a_flow_have_one_hash_which_spreads() {
    let mut hashes = BTreeSet::new();
    for port in 0..4_000 {
        let forth = segment(2, 1, 1_000 + port, 22, 2);
        let back = segment(1, 2, 22, 1_000 + port, 18);
        let hash = memo::hash_of_packet(&forth, Direction::Ingress);
        assert_eq!(hash, memo::hash_of_packet(&back, Direction::Egress));
        let addr = |text: &str| text.parse::<IpAddr>().unwrap().into();
        let key = FlowKey {
            local: addr("100.64.0.1"),
            remote: addr("100.64.0.2"),
            local_port: 22,
            remote_port: 1_000 + port,
            protocol: 6,
            zero: 0,
            zeros: 0,
        };
        assert_eq!(hash, memo::hash_of_key(&key));
        hashes.insert(memo::place(hash));
    }
    assert!(hashes.iter().all(|place| *place < memo::PLACES));
    // By chance alone, 4,000 flows meet 2,553 of 4,096 places.
    assert!(hashes.len() > 2_300, "{} places", hashes.len());
}

#[test]
fn what_has_no_ports_of_its_own_or_is_not_whole_is_not_remembered() {
    let mut packet = segment(2, 1, 40_000, 22, 2);
    assert!(memo::is_for(&packet));
    packet.part = ebpf::packet::Part::First;
    assert!(!memo::is_for(&packet));
    packet.part = ebpf::packet::Part::Whole;
    for what in [What::Request, What::Reply, What::Error, What::LaterFragment] {
        packet.tuple.what = what;
        assert!(!memo::is_for(&packet));
    }
    packet.tuple.what = What::Datagram;
    packet.tuple.protocol = 1;
    assert!(!memo::is_for(&packet));
}
