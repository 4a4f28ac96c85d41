//! Whole networks on virtual time, many of them, each from a seed.
//!
//! A failing seed is one line: `SEED=17 cargo xtask test --tier sim a_network_of_chance`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use tests::world::nat::{Depends, Kind};
use tests::world::{Quality, World};

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
/// Seeds of a usual run, and with `--full`.
const SEEDS: u64 = 40;
const SEEDS_FULL: u64 = 3_000;
/// How soon a node that just joined reaches a peer, through a relay if need be.
const REACHED: Duration = Duration::from_secs(8);
/// How soon a pair that can be direct is, while it talks.
const DIRECT: Duration = Duration::from_secs(20);
/// How soon talk goes on after something broke.
const HEALED: Duration = Duration::from_secs(12);

const KINDS: [Kind; 4] = [
    Kind::FULL_CONE,
    Kind::RESTRICTED,
    Kind::PORT_RESTRICTED,
    Kind::SYMMETRIC,
];

/// A node of a network of chance: where it is, and behind what.
#[derive(Clone, Copy, Debug)]
struct Home {
    realm: usize,
    kind: Option<Kind>,
}

fn pick(world: &mut World, below: u64) -> u64 {
    world.chance() % below
}

/// Networks behind routers of any kind, some with two nodes, and nodes without a router.
fn populate(world: &mut World) -> Vec<Home> {
    let mut homes = Vec::new();
    let networks = 2 + pick(world, 3);
    for _ in 0..networks {
        let behind = pick(world, 6) > 0;
        let kind = behind.then(|| {
            let mut kind = KINDS[pick(world, 4) as usize];
            kind.hairpin = pick(world, 2) == 0;
            kind.udp = pick(world, 8) > 0;
            kind
        });
        let realm = kind.map_or(0, |kind| world.router(kind, 0));
        for _ in 0..=pick(world, 2) {
            let delay = MS * u32::try_from(1 + pick(world, 40)).unwrap();
            world.node(realm, delay).unwrap();
            homes.push(Home { realm, kind });
        }
    }
    homes
}

/// Whether two nodes can reach each other without a relay and without guessing.
fn can_be_direct(a: Home, b: Home) -> bool {
    if a.realm == b.realm && a.realm != 0 {
        return true;
    }
    match (a.kind, b.kind) {
        (Some(a), Some(b)) => a.can_meet(b),
        (Some(one), None) | (None, Some(one)) => one.udp,
        (None, None) => true,
    }
}

/// A network whose chances all come from one seed: everybody reaches whom policy permits, straight
/// where that is possible, and goes on whatever breaks.
fn network_of_chance(seed: u64) -> u64 {
    let mut world = World::new(seed, &[20 * MS, 50 * MS]).unwrap();
    world.quality = Quality {
        loss: pick(&mut world, 3) * 10,
        jitter: MS * u32::try_from(1 + pick(&mut world, 20)).unwrap(),
    };
    let homes = populate(&mut world);
    world.run(5 * SECOND);
    let mut talks = Vec::new();
    for from in 0..homes.len() {
        for to in (0..homes.len()).filter(|to| *to != from) {
            let talk = world.talk(from, to, 200 * MS, 600 * SECOND);
            talks.push((from, to, talk));
        }
    }
    let permitted: Vec<(usize, usize, usize)> = talks
        .into_iter()
        .filter(|(from, to, _)| world.permits(*from, *to))
        .collect();
    let said = |what: &str, world: &World, (from, to, _): (usize, usize, usize)| {
        format!(
            "SEED={seed}: {what}: {from} -> {to} ({:?} -> {:?}), {}",
            homes[from],
            homes[to],
            world.describe(from, to)
        )
    };
    for pair in &permitted {
        let reached = world.run_until(REACHED, |world| world.heard(pair.2).first.is_some());
        assert!(reached, "{}", said("not reached", &world, *pair));
    }
    for pair in &permitted {
        if can_be_direct(homes[pair.0], homes[pair.1]) {
            let direct = world.run_until(DIRECT, |world| world.is_direct(pair.0, pair.1));
            assert!(direct, "{}", said("not direct", &world, *pair));
        }
    }
    for _ in 0..4 {
        let what = misfortune(&mut world, &homes);
        let before: Vec<usize> = permitted
            .iter()
            .map(|pair| world.heard(pair.2).answered.len())
            .collect();
        for (pair, before) in permitted.iter().zip(before) {
            let again =
                world.run_until(HEALED, |world| world.heard(pair.2).answered.len() > before);
            assert!(
                again,
                "{}",
                said(&format!("silent after {what}"), &world, *pair)
            );
        }
    }
    world.fingerprint()
}

/// Something breaks, for a while or for good. What comes back is waited for.
fn misfortune(world: &mut World, homes: &[Home]) -> &'static str {
    let node = pick(world, homes.len() as u64) as usize;
    match pick(world, 6) {
        0 => {
            world.set_coordinator(false);
            world.run(20 * SECOND);
            "the coordinator's death"
        }
        1 => {
            world.set_coordinator(true);
            world.kill_agent(node);
            world.run(3 * SECOND);
            world.start_agent(node);
            world.run(5 * SECOND);
            "an agent's restart"
        }
        2 => {
            world.set_relay(0, false);
            world.run(5 * SECOND);
            "the end of a relay region"
        }
        3 => {
            world.set_relay(0, true);
            world.restart_router(homes[node].realm);
            world.run(5 * SECOND);
            "a router's restart"
        }
        4 => {
            world.set_link(node, false);
            world.run(10 * SECOND);
            world.set_link(node, true);
            world.run(5 * SECOND);
            "a pulled cable"
        }
        _ => {
            world.quality = Quality {
                loss: 50,
                jitter: 60 * MS,
            };
            world.run(5 * SECOND);
            "bad weather"
        }
    }
}

#[test]
fn a_network_of_chance_holds_its_promises() {
    if let Some(seed) = std::env::var("SEED").ok().and_then(|it| it.parse().ok()) {
        network_of_chance(seed);
        return;
    }
    let full = std::env::var_os("WEIR_FULL").is_some();
    let seeds = if full { SEEDS_FULL } else { SEEDS };
    for seed in 0..seeds {
        network_of_chance(seed);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    assert_eq!(network_of_chance(7), network_of_chance(7));
    assert_ne!(network_of_chance(7), network_of_chance(8));
}

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
