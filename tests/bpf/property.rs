//! Random policies × packets × time: the model and the evaluator agree, every branch is met, and a
//! wrong evaluator would be noticed.

use super::craft::{ACK, Body, Spec};
use super::generate::{self, Random};
use super::model::{Model, World};
use super::twin::{Fault, Twin};
use ebpf::abi;
use ebpf::reason::{Accepted, Reason};
use ebpf::verdict::{Branch, PICKED_UP_QUOTA, PICKED_UP_WINDOW_NS, Verdict};
use engine::acl::Acl;
use proto::filter::{Direction, Filter, Rule, Selector, Service};
use proto::id::NodeId;
use proto::net::PortRange;
use std::collections::BTreeSet;

/// Packets of one story, in which policy changes now and then.
const STORY: u64 = 400;

/// Of the evaluator's branches, so many of a hundred must be met.
const COVERAGE_PERCENT: usize = 95;

pub fn abi_direction(direction: Direction) -> abi::Direction {
    match direction {
        Direction::Ingress => abi::Direction::Ingress,
        Direction::Egress => abi::Direction::Egress,
    }
}

fn stories() -> u64 {
    if std::env::var_os("WEIR_FULL").is_some() {
        4_000
    } else {
        250
    }
}

/// One story; the first packet about which model and evaluator disagree, if there is one.
fn disagreement<const M: u32>(
    seed: u64,
    taken: &mut BTreeSet<Branch>,
    passed: &mut u64,
) -> Option<String> {
    let mut random = Random(seed);
    let mut world = generate::world(&mut random);
    let (mut model, twin, mut lowered) = (Model::default(), Twin::<M>::default(), Acl::default());
    let lower = |lowered: &mut Acl, world: &World, twin: &Twin<M>| {
        let change = lowered
            .lower(&world.filter, &world.me, &world.peers)
            .unwrap();
        twin.set(lowered.tables(), &change);
    };
    lower(&mut lowered, &world, &twin);
    let (mut now, mut sent) = (1 << 40, Vec::new());
    let mut found = None;
    for step in 0..STORY {
        if random.one_in(50) {
            let next = generate::world(&mut random);
            match random.below(3) {
                0 => world.filter = next.filter,
                1 => world.peers = next.peers,
                _ => world = next,
            }
            lower(&mut lowered, &world, &twin);
        }
        now += generate::pause_ns(&mut random);
        let (direction, spec) = generate::packet(&mut random, &mut sent);
        let wanted = model.passes(&world, now, direction, &spec);
        let verdict = twin.send(abi_direction(direction), &spec.bytes(), now);
        if wanted {
            *passed += 1;
            generate::passed(&mut sent, direction, &spec);
        }
        if wanted != verdict.passes() {
            found = Some(format!(
                "seed {seed}, packet {step}: {verdict:?}, but by the words of the policy \
                 {wanted}: {direction:?} {spec:?}"
            ));
            break;
        }
        let (places, kept) = (model.places(), twin.places());
        if places != kept {
            found = Some(format!(
                "seed {seed}, packet {step}: {direction:?} {spec:?}: flows are at {kept:?}, but \
                 should be at {places:?}"
            ));
            break;
        }
    }
    taken.append(&mut twin.taken.borrow_mut());
    found
}

#[test]
fn the_evaluator_means_what_the_policy_says_and_every_branch_of_it_is_met() {
    let (mut taken, mut passed) = (BTreeSet::new(), 0);
    for seed in 0..stories() {
        if let Some(difference) = disagreement::<0>(seed, &mut taken, &mut passed) {
            panic!("{difference}");
        }
    }
    let share = passed * 100 / (stories() * STORY);
    assert!(
        (10..80).contains(&share),
        "{share} of a hundred pass: that proves little"
    );
    faults(&mut taken);
    quota(&mut taken);
    let missed: Vec<_> = Branch::ALL
        .iter()
        .filter(|branch| !taken.contains(branch))
        .collect();
    println!(
        "met {} of {} branches; not: {missed:?}",
        taken.len(),
        Branch::ALL.len()
    );
    assert!(
        taken.len() * 100 >= Branch::ALL.len() * COVERAGE_PERCENT,
        "too few branches met; not {missed:?}"
    );
}

/// More flows in the middle than may be picked up at once.
fn quota(taken: &mut BTreeSet<Branch>) {
    let all = |selector: &str| vec![Selector::Prefix(selector.parse().unwrap())];
    let anything = Rule {
        index: 0,
        line: 1,
        srcs: all("0.0.0.0/0"),
        dsts: all("0.0.0.0/0"),
        services: vec![Service {
            protocol: None,
            ports: PortRange::ALL,
        }],
    };
    let filter = Filter {
        labels: Vec::new(),
        ingress: vec![anything],
        egress: Vec::new(),
    };
    let peers = [(
        NodeId(2),
        generate::peer(2, &["100.64.0.2"], &[], BTreeSet::new()),
    )];
    let (twin, mut lowered) = (Twin::<0>::default(), Acl::default());
    let change = lowered
        .lower(&filter, &generate::me(BTreeSet::new()), &peers.into())
        .unwrap();
    twin.set(lowered.tables(), &change);
    let send = |port: u16, now| {
        let segment = Body::Tcp(port, 443, ACK);
        let bytes = Spec::new("100.64.0.2", "100.64.0.1", segment).bytes();
        twin.send(abi::Direction::Ingress, &bytes, now)
    };
    let quota = u16::try_from(PICKED_UP_QUOTA).unwrap();
    for port in 0..quota {
        assert_eq!(send(port, 1 << 40), Verdict::accept(Accepted::PickedUp));
    }
    assert_eq!(send(quota, 1 << 40), Verdict::deny(Reason::PickedUpQuota));
    assert_eq!(
        send(0, 1 << 40),
        Verdict::accept(Accepted::Established),
        "known by now"
    );
    let later = (1 << 40) + PICKED_UP_WINDOW_NS;
    assert_eq!(send(quota, later), Verdict::accept(Accepted::PickedUp));
    taken.append(&mut twin.taken.borrow_mut());
}

/// What random packets do not bring about: maps that fail, and no policy at all.
fn faults(taken: &mut BTreeSet<Branch>) {
    for fault in [
        Fault::None,
        Fault::Full,
        Fault::NoTable,
        Fault::OddPorts,
        Fault::NoPage,
    ] {
        let mut random = Random(7);
        let (twin, mut lowered) = (Twin::<0>::default(), Acl::default());
        let (mut sent, mut denied_all) = (Vec::new(), true);
        for step in 0..8_000 {
            // Nothing is active before the first policy; then every other stretch has the fault.
            let broken = step % 20 >= 10;
            if step >= 100 && step % 50 == 0 {
                let world = generate::world(&mut random);
                let change = lowered
                    .lower(&world.filter, &world.me, &world.peers)
                    .unwrap();
                twin.set(lowered.tables(), &change);
            }
            twin.fault.set(if broken { fault } else { Fault::None });
            let (direction, spec) = generate::packet(&mut random, &mut sent);
            let verdict = twin.send(abi_direction(direction), &spec.bytes(), 1 << 40);
            denied_all &= step >= 100 || !verdict.passes();
        }
        assert!(denied_all, "without a policy nothing passes");
        taken.append(&mut twin.taken.borrow_mut());
    }
}

type Story = fn(u64, &mut BTreeSet<Branch>, &mut u64) -> Option<String>;

macro_rules! mutants {
    ($($number:literal)*) => {
        [$(($number, disagreement::<$number> as Story)),*]
    };
}

#[test]
fn every_planted_mutant_of_the_evaluator_is_caught() {
    let mutants = mutants!(
        1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26
        27 28 29 30
    );
    assert!(mutants.len() >= 20);
    let survivors: Vec<u32> = mutants
        .into_iter()
        .filter(|(_, story)| {
            (0..stories()).all(|seed| story(seed, &mut BTreeSet::new(), &mut 0).is_none())
        })
        .map(|(number, _)| number)
        .collect();
    assert!(
        survivors.is_empty(),
        "mutants that nobody noticed: {survivors:?}"
    );
}
