//! Whole networks on virtual time: those of which something is known beforehand are here.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod chance;
mod hard;
mod mtu;
mod timing;
mod traces;

use std::time::Duration;

use tests::world::World;
use tests::world::nat::{Depends, Kind};

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
const KINDS: [Kind; 4] = [
    Kind::FULL_CONE,
    Kind::RESTRICTED,
    Kind::PORT_RESTRICTED,
    Kind::SYMMETRIC,
];

#[test]
fn every_pair_of_routers_meets_as_it_can() {
    for a in KINDS {
        for b in KINDS {
            let mut world = World::new(1, &[10 * MS]).unwrap();
            let realms = [world.router(a, 0), world.router(b, 0)];
            let nodes = realms.map(|realm| world.node(realm, 5 * MS).unwrap());
            world.run(5 * SECOND);
            let talk = world.talk(nodes[0], nodes[1], 20 * MS, 30 * SECOND);
            world.run(31 * SECOND);
            let heard = world.heard(talk);
            let lost = heard.asked - heard.answered.len() as u64;
            assert!(lost <= 2, "{a:?} {b:?}: {lost} lost of {}", heard.asked);
            let direct = world.is_direct(nodes[0], nodes[1]);
            assert_eq!(direct, a.can_meet(b), "{a:?} {b:?}");
            assert!(world.handshakes(nodes[0], nodes[1]) <= 2, "{a:?} {b:?}");
        }
    }
}

#[test]
fn where_udp_is_blocked_talk_goes_through_the_relay_and_comes_back() {
    let mut world = World::new(3, &[10 * MS]).unwrap();
    let realms = [
        world.router(Kind::PORT_RESTRICTED, 0),
        world.router(Kind::FULL_CONE, 0),
    ];
    let nodes = realms.map(|realm| world.node(realm, 5 * MS).unwrap());
    world.run(5 * SECOND);
    let talk = world.talk(nodes[0], nodes[1], 20 * MS, 300 * SECOND);
    assert!(world.run_until(10 * SECOND, |world| world.is_direct(nodes[0], nodes[1])));
    world.set_kind(realms[0], Kind::BLOCKED);
    assert!(world.run_until(10 * SECOND, |world| !world.is_direct(nodes[0], nodes[1])));
    let before = world.heard(talk).answered.len();
    world.run(5 * SECOND);
    assert!(world.heard(talk).answered.len() > before + 200);
    world.set_kind(realms[0], Kind::PORT_RESTRICTED);
    assert!(world.run_until(60 * SECOND, |world| world.is_direct(nodes[0], nodes[1])));
}

#[test]
fn a_quiet_pair_is_there_when_it_is_asked() {
    let mut world = World::new(8, &[10 * MS]).unwrap();
    let kind = Kind::PORT_RESTRICTED;
    let realms = [world.router(kind, 0), world.router(kind, 0)];
    let nodes = realms.map(|realm| world.node(realm, 5 * MS).unwrap());
    world.run(5 * SECOND);
    let _talk = world.talk(nodes[0], nodes[1], 50 * MS, 20 * SECOND);
    assert!(world.run_until(20 * SECOND, |world| world.is_direct(nodes[0], nodes[1])));
    // Routers forget after 30 s what they are not reminded of, and sessions end after 180 s.
    world.run(300 * SECOND);
    let talk = world.talk(nodes[0], nodes[1], 50 * MS, 2 * SECOND);
    world.run(3 * SECOND);
    let heard = world.heard(talk);
    let lost = heard.asked - heard.answered.len() as u64;
    assert_eq!(lost, 0, "of {}", heard.asked);
    assert!(world.is_direct(nodes[0], nodes[1]));
}

#[test]
fn known_peers_talk_on_without_the_coordinator() {
    let mut world = World::new(4, &[10 * MS, 30 * MS]).unwrap();
    let realm = world.router(Kind::SYMMETRIC, 0);
    let other = world.router(Kind::SYMMETRIC, 0);
    let nodes = [realm, other].map(|realm| world.node(realm, 5 * MS).unwrap());
    world.run(5 * SECOND);
    world.set_coordinator(false);
    let talk = world.talk(nodes[0], nodes[1], 50 * MS, 300 * SECOND);
    assert!(world.run_until(2 * SECOND, |world| world.heard(talk).first.is_some()));
    // The region dies, and nobody is there to tell of new homes.
    world.set_relay(0, false);
    world.run(6 * SECOND);
    let before = world.heard(talk).answered.len();
    world.run(2 * SECOND);
    assert!(world.heard(talk).answered.len() > before, "no way round");
    // And an agent starts anew, from its disk.
    world.kill_agent(nodes[0]);
    world.run(SECOND);
    world.start_agent(nodes[0]);
    world.run(5 * SECOND);
    let before = world.heard(talk).answered.len();
    world.run(2 * SECOND);
    assert!(
        world.heard(talk).answered.len() > before,
        "not after a restart"
    );
}

#[test]
fn double_nat_and_hairpin() {
    let mut world = World::new(5, &[10 * MS]).unwrap();
    let mut carrier = Kind::FULL_CONE;
    carrier.hairpin = true;
    let outer = world.router(carrier, 0);
    let inner = [
        world.router(Kind::PORT_RESTRICTED, outer),
        world.router(Kind::PORT_RESTRICTED, outer),
    ];
    let nodes = inner.map(|realm| world.node(realm, 5 * MS).unwrap());
    assert_eq!(carrier.mapping, Depends::Nothing);
    world.run(5 * SECOND);
    let _talk = world.talk(nodes[0], nodes[1], 50 * MS, 30 * SECOND);
    assert!(world.run_until(20 * SECOND, |world| world.is_direct(nodes[0], nodes[1])));
}

#[test]
fn a_router_that_maps_anew_is_noticed_in_seconds() {
    for regions in [&[][..], &[10 * MS]] {
        let mut world = World::new(6, regions).unwrap();
        let realm = world.router(Kind::PORT_RESTRICTED, 0);
        let hidden = world.node(realm, 5 * MS).unwrap();
        let public = world.node(0, 5 * MS).unwrap();
        // Ana's node asks; the one behind the router has nothing to say by itself.
        let (from, to) = if world.permits(public, hidden) {
            (public, hidden)
        } else {
            (hidden, public)
        };
        world.run(5 * SECOND);
        let talk = world.talk(from, to, 20 * MS, 120 * SECOND);
        world.run(30 * SECOND);
        let before = world.heard(talk).longest_pause;
        world.restart_router(realm);
        world.run(30 * SECOND);
        let pause = world.heard(talk).longest_pause;
        assert!(
            pause <= 3 * SECOND,
            "{from} -> {to}: {before:?}, then {pause:?}"
        );
    }
}
