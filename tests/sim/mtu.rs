//! Paths that take less than their ends' links, and do not say so. What is sent is always as long as
//! its route lets it be.

use std::time::Duration;

use tests::world::World;

use super::{MS, SECOND};

/// Longest pause of a talk whose path comes to take less.
const FITTED: Duration = Duration::from_secs(4);

/// What WireGuard adds over IPv4.
const OVERHEAD: u32 = 60;

fn pair(seed: u64) -> World {
    let mut world = World::new(seed, &[10 * MS]).unwrap();
    world.node(0, 5 * MS).unwrap();
    world.node(0, 15 * MS).unwrap();
    world
}

#[test]
fn a_path_is_fitted_and_not_left_for_the_relay() {
    for (seed, takes) in [(1, 1_500), (2, 1_492), (3, 1_400), (4, 1_360), (5, 1_280)] {
        let mut world = pair(seed);
        world.set_path_mtu(0, 1, takes);
        world.run(10 * SECOND);
        let fits = |world: &World, takes: u32| {
            let inner = [world.inner_mtu(0, 1), world.inner_mtu(1, 0)];
            inner == [takes - OVERHEAD; 2] && world.is_direct(0, 1)
        };
        assert!(fits(&world, takes), "{takes}: {}", world.inner_mtu(0, 1));
        let talk = world.talk(0, 1, 50 * MS, 60 * SECOND);
        world.run(20 * SECOND);
        let heard = world.heard(talk);
        assert!(heard.asked - heard.answered.len() as u64 <= 1, "{takes}");
        // It comes to take less, under way.
        let less = (takes - 60).max(1_280);
        world.set_path_mtu(0, 1, less);
        world.run(20 * SECOND);
        let rung = [1_280, 1_340, 1_420, 1_440].into_iter().rev();
        let rung = rung.clone().find(|rung| *rung <= less).unwrap();
        assert!(fits(&world, rung), "{less}: {}", world.inner_mtu(0, 1));
        let pause = world.heard(talk).longest_pause;
        assert!(pause <= FITTED, "{less}: {pause:?}");
    }
}

/// Under loss a figure may be too low for a while, and is never too high.
#[test]
fn loss_makes_no_figure_too_high_nor_one_too_low_for_long() {
    for seed in 0..10 {
        let mut world = pair(seed);
        world.set_path_mtu(0, 1, 1_400);
        world.quality.loss = 50;
        world.talk(0, 1, 100 * MS, 400 * SECOND);
        let (mut fitting, mut looks) = (0, 0);
        for _ in 0..380 {
            world.run(SECOND);
            let inner = world.inner_mtu(0, 1);
            assert!(inner <= 1_400 - OVERHEAD, "seed {seed}: {inner}");
            looks += 1;
            fitting += u32::from(inner == 1_400 - OVERHEAD);
        }
        assert!(
            fitting * 10 > looks * 8,
            "seed {seed}: {fitting} of {looks}"
        );
    }
}
