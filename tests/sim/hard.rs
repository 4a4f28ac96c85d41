//! Hard NATs whose ports can be foreseen: a direct path is found by guessing, within limits, and no
//! packet is spent where there is nothing to see.

use std::time::Duration;

use tests::world::World;
use tests::world::nat::{Kind, Ports};

use super::{MS, SECOND};

/// How soon a counter is foreseen. The first call may be lost: the next comes two seconds later.
const SOON: Duration = Duration::from_secs(3);
/// How soon a block is searched.
const BY_AND_BY: Duration = Duration::from_secs(15);

/// Kinds of hard NATs that can be foreseen.
fn foreseen() -> [Kind; 4] {
    let steps = |step| Kind {
        ports: Ports::Steps(step),
        ..Kind::SYMMETRIC
    };
    [
        Kind::SYMMETRIC_IN_TURN,
        steps(2),
        steps(5),
        Kind::SYMMETRIC_OF_FEW,
    ]
}

/// Two nodes behind routers of these kinds, in a network with two relays, which have STUN servers.
fn pair(seed: u64, kinds: [Kind; 2]) -> (World, [usize; 2]) {
    let mut world = World::new(seed, &[10 * MS, 30 * MS]).unwrap();
    let realms = kinds.map(|kind| world.router(kind, 0));
    for realm in realms {
        world.node(realm, 5 * MS).unwrap();
    }
    (world, realms)
}

fn both_ways(world: &World) -> bool {
    world.is_direct(0, 1) && world.is_direct(1, 0)
}

#[test]
fn a_hard_nat_that_can_be_foreseen_is_met_from_behind_any_other_and_the_path_is_kept() {
    for (seed, hard) in (0..).zip(foreseen()) {
        for kinds in [[hard, Kind::PORT_RESTRICTED], [Kind::PORT_RESTRICTED, hard]] {
            let (mut world, _) = pair(seed, kinds);
            world.run(5 * SECOND);
            let talk = world.talk(0, 1, 20 * MS, 400 * SECOND);
            let back = world.talk(1, 0, 20 * MS, 400 * SECOND);
            let soon = if matches!(hard.ports, Ports::Steps(_)) {
                SOON
            } else {
                BY_AND_BY
            };
            assert!(
                world.run_until(soon, both_ways),
                "{kinds:?}: {}",
                world.describe(0, 1)
            );
            let before = world.handshakes(0, 1);
            world.run(100 * SECOND);
            assert!(both_ways(&world), "{kinds:?}: {}", world.describe(0, 1));
            assert_eq!(world.handshakes(0, 1), before, "one session goes on");
            let pauses = [talk, back].map(|talk| world.heard(talk).longest_pause);
            assert!(pauses.iter().all(|pause| *pause < SECOND), "{pauses:?}");
        }
    }
}

/// What servers said at the start is long outdated when somebody wants to talk, as other hosts
/// behind the router go on talking all the time.
#[test]
fn a_hard_nat_is_foreseen_also_when_it_has_done_much_since_the_last_look() {
    for (seed, hard) in (0..).zip(foreseen()) {
        for idle in [140, 250, 600] {
            let (mut world, [realm, _]) = pair(seed, [hard, Kind::PORT_RESTRICTED]);
            for _ in 0..idle {
                world.busy(realm, 3);
                world.run(SECOND);
            }
            let _talks = [
                world.talk(0, 1, 20 * MS, 60 * SECOND),
                world.talk(1, 0, 20 * MS, 60 * SECOND),
            ];
            assert!(
                world.run_until(BY_AND_BY, both_ways),
                "{hard:?} after {idle} s: {}",
                world.describe(0, 1)
            );
        }
    }
}

#[test]
fn where_chance_draws_the_ports_nobody_guesses_and_relays_carry() {
    for kinds in [
        [Kind::SYMMETRIC, Kind::PORT_RESTRICTED],
        [Kind::SYMMETRIC_IN_TURN, Kind::SYMMETRIC],
    ] {
        let (mut world, _) = pair(3, kinds);
        world.run(5 * SECOND);
        let talk = world.talk(0, 1, 20 * MS, 60 * SECOND);
        let back = world.talk(1, 0, 20 * MS, 60 * SECOND);
        world.run(60 * SECOND);
        assert!(!world.is_direct(0, 1) && !world.is_direct(1, 0));
        let heard = [talk, back].map(|talk| world.heard(talk).answered.len());
        assert!(heard.iter().any(|count| *count > 2_000), "{heard:?}");
    }
}
