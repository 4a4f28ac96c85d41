//! The table of flows: where flows are, and how many a set has to turn away.

use ebpf::abi::{Addr, ESTABLISHED_FLOWS, FlowKey, OPENING_FLOWS};
use ebpf::flows::{
    BUSY, FREE, PLACES, SETS, SPARED_NS, Seeds, hash, home, is_settled, may_evict, store_of,
    unsettled, words,
};
use ebpf::verdict::Store;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use zerocopy::IntoBytes as _;

const STORES: [Store; 3] = [Store::Opening, Store::Established, Store::Surplus];

fn seeds(number: u64) -> Seeds {
    let mut state = number;
    let factors = [(); 6].map(|()| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) | 1
    });
    Seeds { factors }
}

/// Flows of a busy node: few services, many peers, ports one after the other.
fn key(number: u32) -> FlowKey {
    let v4 = |bits: u32| Addr::from(IpAddr::from(Ipv4Addr::from_bits(bits)));
    FlowKey {
        local: v4(0x6440_0001),
        remote: v4(0x6441_0000 + number % 1_000),
        local_port: 443,
        remote_port: (20_000 + number / 1_000) as u16,
        protocol: 6,
        zero: 0,
        zeros: 0,
    }
}

/// Of so many flows, how many find their set full.
fn turned_away(store: Store, flows: u32, seeds: &Seeds) -> u32 {
    let mut sets: BTreeMap<u32, u32> = BTreeMap::new();
    let mut away = 0;
    for number in 0..flows {
        let home = home(store, hash(&words(&key(number)), seeds));
        let used = sets.entry(home.set).or_default();
        if *used == home.end - home.first {
            away += 1;
        } else {
            *used += 1;
        }
    }
    away
}

#[test]
fn words_of_a_key_are_its_bytes() {
    let key = FlowKey {
        local_port: 0x1234,
        remote_port: 0x5678,
        protocol: 17,
        ..key(77)
    };
    assert_eq!(words(&key).as_bytes(), key.as_bytes());
}

#[test]
fn every_place_belongs_to_the_store_whose_flows_go_there() {
    for store in STORES {
        for number in 0..20_000 {
            let home = home(store, hash(&words(&key(number)), &seeds(3)));
            assert!(home.set < SETS && home.end as usize <= PLACES);
            assert!((home.first..home.end).contains(&home.place));
            assert!(home.mark != FREE && home.mark != BUSY);
            for place in home.first..home.end {
                assert_eq!(store_of(home.set, place), store);
            }
        }
    }
}

#[test]
fn sets_turn_hardly_any_flow_away_before_the_table_has_what_it_promises() {
    for number in 0..4 {
        let seeds = seeds(number);
        let away = turned_away(Store::Established, ESTABLISHED_FLOWS, &seeds);
        assert!(away * 1_000 <= ESTABLISHED_FLOWS * 3, "{away} lasting");
        let away = turned_away(Store::Established, ESTABLISHED_FLOWS / 2, &seeds);
        assert!(away <= 2, "{away} of half as many");
        let away = turned_away(Store::Opening, OPENING_FLOWS / 2, &seeds);
        assert!(away * 50 <= OPENING_FLOWS / 2, "{away} opening");
    }
}

#[test]
fn which_flows_share_a_set_depends_on_the_seeds() {
    let set = |number, seeds: &Seeds| home(Store::Opening, hash(&words(&key(number)), seeds)).set;
    let (one, other) = (seeds(1), seeds(2));
    let first = set(0, &one);
    let together: Vec<u32> = (0..60_000).filter(|n| set(*n, &one) == first).collect();
    assert!(together.len() > 10, "{}", together.len());
    let still = set(0, &other);
    let still = together.iter().filter(|n| set(**n, &other) == still);
    assert!(still.count() <= 3);
}

#[test]
fn only_lasting_flows_are_spared_and_only_for_two_hours() {
    let set = |store| home(store, hash(&words(&key(5)), &seeds(3))).set;
    assert!(!may_evict(set(Store::Established), SPARED_NS));
    assert!(may_evict(set(Store::Established), SPARED_NS + 1));
    assert!(may_evict(set(Store::Opening), 0) && may_evict(set(Store::Surplus), 0));
}

#[test]
fn a_version_is_odd_once_written_and_never_the_same_again() {
    for version in [0, 1, 2, 3, u64::MAX - 1, u64::MAX] {
        let between = unsettled(version);
        assert!(!is_settled(between));
        let after = between.wrapping_add(1);
        assert!(is_settled(after) && after != version);
    }
}
