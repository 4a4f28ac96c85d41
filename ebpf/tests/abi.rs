//! Layouts and names that others rely on.

use ebpf::abi::{self, Active, Addr, Direction};
use ebpf::reason::{Accepted, OUTCOMES, Reason};
use ebpf::verdict::Verdict;
use std::collections::BTreeSet;
use std::net::IpAddr;

#[test]
fn addresses_survive_both_ways_and_sort_as_people_expect() {
    for text in ["100.64.0.1", "0.0.0.0", "fd7a::1", "2001:db8::ff00:1"] {
        let addr: IpAddr = text.parse().unwrap();
        assert_eq!(IpAddr::from(Addr::from(addr)), addr);
        assert_eq!(Addr::from(addr).is_v4(), addr.is_ipv4());
    }
    let [one, two] =
        ["10.0.0.1", "10.0.0.2"].map(|text| Addr::from(text.parse::<IpAddr>().unwrap()));
    assert!(one < two && one != two);
}

#[test]
fn the_active_word_holds_epoch_and_slot_and_zero_means_nothing() {
    for (epoch, slot) in [(0, 0), (1, 1), (u32::MAX, 0), (9, 1)] {
        let active = Active { epoch, slot };
        assert_eq!(Active::from_word(active.word()), active);
    }
    assert_eq!(Active::from_word(0).epoch, 0);
}

#[test]
fn every_outcome_has_a_counter_and_a_name_of_its_own() {
    let mut indices = BTreeSet::new();
    let mut names = BTreeSet::new();
    for verdict in Verdict::all() {
        names.insert(verdict.name());
        for direction in Direction::ALL {
            indices.insert(verdict.counter(direction));
        }
    }
    assert_eq!(indices, (0..2 * OUTCOMES).collect());
    assert_eq!(names.len(), OUTCOMES as usize);
    assert_eq!(Accepted::ALL.len() + Reason::ALL.len(), OUTCOMES as usize);
    for why in Reason::ALL {
        assert_eq!(Verdict::deny(*why).reason(), Some(*why));
        assert!(!Verdict::deny(*why).passes());
    }
    for how in Accepted::ALL {
        assert_eq!(Verdict::accept(*how).accepted(), Some(*how));
        assert!(Verdict::accept(*how).passes());
    }
}

#[test]
fn a_number_that_is_no_verdict_does_not_pass() {
    let odd = Verdict::from_code(OUTCOMES + 3);
    assert!(!odd.passes());
    assert_eq!(odd.name(), "?");
}

#[test]
fn the_layout_number_changes_only_on_purpose() {
    // Raise ABI_VERSION, or change a size, and upgrades copy flows instead of sharing maps.
    assert_eq!(abi::layout(), 0xe3f5_3f4f);
}
