//! How often dropped packets are told of, and what is told.
#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

use ebpf::abi::{Allowance, Told};
use ebpf::event::{self, EVENTS_PER_WINDOW, KINDS, WINDOW_SHIFT};
use ebpf::packet::{Packet, parse};

const WINDOW_NS: u64 = 1 << WINDOW_SHIFT;

/// A TCP segment over IPv4.
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

#[test]
fn packets_of_a_kind_differ_in_nothing_but_their_source_port() {
    let kind = |packet: &Packet| event::kind(3, Some(packet));
    let one = kind(&segment(1, 2, 40_000, 22, 2));
    assert_eq!(one, kind(&segment(1, 2, 40_001, 22, 2)));
    for other in [
        segment(3, 2, 40_000, 22, 2),
        segment(1, 3, 40_000, 22, 2),
        segment(2, 1, 40_000, 22, 2),
        segment(1, 2, 40_000, 23, 2),
        segment(1, 2, 40_000, 22, 16),
    ] {
        assert_ne!(one, kind(&other), "{other:?}");
    }
    let packet = segment(1, 2, 40_000, 22, 2);
    assert_ne!(one, event::kind(4, Some(&packet)), "another reason");
    assert_ne!(event::kind(3, None), event::kind(4, None));
}

#[test]
fn kinds_spread_over_their_places() {
    let place = |port| event::kind(3, Some(&segment(1, 2, 1, port, 2))) % KINDS;
    let places: std::collections::BTreeSet<u32> = (0..KINDS as u16).map(place).collect();
    // Thrown at random, as many kinds as places hit 63 of a hundred places.
    assert!(places.len() as u32 > KINDS / 2, "{}", places.len());
}

#[test]
fn a_kind_is_told_once_a_window_and_an_outcome_so_many_times() {
    let mut told = Told::default();
    let window = event::window(5 * WINDOW_NS + 1);
    assert_eq!(window, 5);
    assert!(event::is_news(&mut told, 7, window));
    assert!(!event::is_news(
        &mut told,
        7,
        event::window(6 * WINDOW_NS - 1)
    ));
    assert!(
        event::is_news(&mut told, 8, window),
        "another kind takes the place"
    );
    assert!(event::is_news(&mut told, 7, window));
    assert!(event::is_news(&mut told, 7, window + 1));

    let mut allowance = Allowance::default();
    let taken = |allowance: &mut Allowance, window| {
        (0..10 * EVENTS_PER_WINDOW)
            .filter(|_| event::take(allowance, window))
            .count()
    };
    for window in [5, 6, 9, 0] {
        assert_eq!(taken(&mut allowance, window), EVENTS_PER_WINDOW as usize);
    }
}
