//! How soon: the first packet, a direct path, and what comes after an end has moved. Each at every
//! moment of the seconds in which nodes and paths begin, because that is where things go wrong.

use std::time::Duration;

use tests::world::World;
use tests::world::nat::Kind;

use super::{MS, SECOND};

/// The first answer, from the moment that both nodes are connected to their relays.
const FIRST: Duration = Duration::from_millis(300);
/// A direct path, from the moment that the second of two agents starts, for 95 of 100.
const DIRECT: Duration = Duration::from_secs(2);
/// Longest pause when a router maps anew, or a node is elsewhere.
const FOLLOWED: Duration = Duration::from_secs(3);
/// How long a packet is under way between two nodes far from each other,
const CROSS: Duration = Duration::from_millis(80);
/// and how soon both have an answer although they began at once: after a look at the kernel, which is
/// read every two seconds where nobody spoke. The kernels alone take 5 s and more.
const CROSSED: Duration = Duration::from_secs(3);
/// An answer, from the moment that who slept is awake,
const AWAKE: Duration = Duration::from_secs(1);
/// and where it must connect to its relay before.
const CONNECTED: Duration = Duration::from_secs(2);
/// What things are waited for at most.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two questions.
const PACE: Duration = Duration::from_millis(20);

/// Moments from 0 to `end`, so many; with `WEIR_FULL` four times as many.
fn moments(end: Duration, count: u32) -> impl Iterator<Item = (u64, Duration)> {
    let full = std::env::var_os("WEIR_FULL").is_some();
    let count = count * if full { 4 } else { 1 };
    (0..count).map(move |number| (number.into(), end * number / count))
}

/// How long something took, each time, and the circumstances in which that was longer than it may be.
struct Took<T> {
    limit: Duration,
    last: Duration,
    late: Vec<(T, Duration)>,
}

impl<T: std::fmt::Debug> Took<T> {
    fn within(limit: Duration) -> Self {
        Self {
            limit,
            last: Duration::ZERO,
            late: Vec::new(),
        }
    }

    fn note(&mut self, when: T, took: Duration) {
        self.last = self.last.max(took);
        if took > self.limit {
            self.late.push((when, took));
        }
    }

    /// None was late.
    fn end(&self) {
        println!("{:?} at most", self.last);
        assert!(self.late.is_empty(), "{}: {:?}", self.late.len(), self.late);
    }
}

/// Lets time pass until something holds; returns when that was.
fn when(world: &mut World, what: &str, holds: impl Fn(&World) -> bool) -> Duration {
    let end = world.now() + PATIENCE;
    while !holds(world) {
        assert!(world.now() < end, "never {what}: {}", world.describe(0, 1));
        world.run(5 * MS);
    }
    world.now()
}

/// Nodes behind two routers, the second one starts `later`.
fn pair(seed: u64, regions: &[Duration], kinds: [Kind; 2], later: Duration) -> World {
    let mut world = World::new(seed, regions).unwrap();
    let realms = kinds.map(|kind| world.router(kind, 0));
    world.node(realms[0], 5 * MS).unwrap();
    world.run(later);
    world.node(realms[1], 15 * MS).unwrap();
    world
}

/// Both ways that policy permits.
fn ways(world: &World) -> Vec<(usize, usize)> {
    let ways = [(0, 1), (1, 0)].into_iter();
    ways.filter(|(from, to)| world.permits(*from, *to))
        .collect()
}

#[test]
fn the_first_packet_by_relay_is_there_at_once_whenever_the_nodes_started() {
    let mut all = Took::within(FIRST);
    for regions in [&[2 * MS][..], &[2 * MS, 4 * MS]] {
        for (seed, later) in moments(2 * SECOND, 16) {
            let mut world = pair(seed, regions, [Kind::SYMMETRIC; 2], later);
            let talks: Vec<usize> = ways(&world)
                .into_iter()
                .map(|(from, to)| world.talk(from, to, PACE, 60 * SECOND))
                .collect();
            let ready = when(&mut world, "connected", |world| world.meet(0, 1));
            when(&mut world, "answered", |world| {
                talks.iter().all(|talk| world.heard(*talk).first.is_some())
            });
            let first = talks
                .iter()
                .filter_map(|talk| world.heard(*talk).first)
                .max()
                .unwrap();
            let took = first.saturating_sub(ready);
            all.note((regions.len(), later), took);
        }
    }
    all.end();
}

#[test]
fn the_first_packet_by_relay_after_an_hour_of_silence() {
    let mut world = pair(1, &[10 * MS, 40 * MS], [Kind::SYMMETRIC; 2], Duration::ZERO);
    world.run(3_600 * SECOND);
    let (from, to) = ways(&world)[0];
    let (start, talk) = (world.now(), world.talk(from, to, PACE, 60 * SECOND));
    let first = when(&mut world, "answered", |world| {
        world.heard(talk).first.is_some()
    }) - start;
    assert!(first <= FIRST, "{first:?}");
}

/// No relay is there that could decide who goes first, and each begins before the other's first
/// packet has come.
#[test]
fn handshakes_that_cross_cost_a_second_or_two_whenever_both_begin() {
    let mut last = Duration::ZERO;
    for (seed, later) in moments(2 * CROSS, 16) {
        let mut world = World::new(seed, &[]).unwrap();
        let nodes: Vec<usize> = (0..4).map(|_| world.node(0, CROSS / 2).unwrap()).collect();
        let both = |from, to| from != to && world.permits(from, to) && world.permits(to, from);
        let pairs = nodes
            .iter()
            .flat_map(|from| nodes.iter().map(move |to| (*from, *to)));
        let (one, other) = pairs
            .into_iter()
            .find(|(from, to)| both(*from, *to))
            .unwrap();
        world.run(300 * SECOND + 13 * later);
        let start = world.now();
        let first = world.talk(one, other, PACE, 60 * SECOND);
        world.run(later);
        let second = world.talk(other, one, PACE, 60 * SECOND);
        when(&mut world, "answered", |world| {
            [first, second]
                .iter()
                .all(|talk| world.heard(*talk).first.is_some())
        });
        last = last.max(world.now() - start);
    }
    println!("first answers when both begin at once: {last:?} at most");
    assert!(last <= CROSSED, "{last:?}");
}

#[test]
fn pairs_that_can_meet_do_so_in_two_seconds() {
    let mut times = Vec::new();
    for (number, a) in super::KINDS.into_iter().enumerate() {
        for b in super::KINDS.into_iter().skip(number) {
            for (seed, later) in moments(2 * SECOND, 8).filter(|_| a.can_meet(b)) {
                let mut world = pair(seed, &[10 * MS, 40 * MS], [a, b], later);
                for (from, to) in ways(&world) {
                    world.talk(from, to, PACE, 60 * SECOND);
                }
                let up = world.now();
                let direct = when(&mut world, "direct", |world| {
                    world.is_direct(0, 1) && world.is_direct(1, 0)
                });
                times.push((direct.saturating_sub(up), later));
            }
        }
    }
    times.sort_unstable();
    let (p95, last) = (times[times.len() * 95 / 100].0, times.last());
    println!("direct after the second agent started: p95 {p95:?}, last {last:?}");
    assert!(p95 <= DIRECT, "{p95:?}, {last:?} of {}", times.len());
}

/// The longest pause when `happens` this long after the first answer.
fn pause(mut world: World, after: Duration, happens: impl Fn(&mut World)) -> Duration {
    let (from, to) = ways(&world)[0];
    let talk = world.talk(from, to, PACE, 60 * SECOND);
    when(&mut world, "answered", |world| {
        world.heard(talk).first.is_some()
    });
    world.run(after);
    let before = world.heard(talk).answered.len();
    happens(&mut world);
    world.run(8 * SECOND);
    let heard = world.heard(talk);
    assert!(heard.answered.len() > before, "{}", world.describe(0, 1));
    heard.longest_pause
}

#[test]
fn routers_that_map_anew_are_noticed_whenever_they_do() {
    let mut all = Took::within(FOLLOWED);
    let regions = [10 * MS, 40 * MS];
    for (seed, after) in moments(6 * SECOND, 15) {
        for relays in [&[][..], &regions] {
            for side in 0..2 {
                let mut world = World::new(seed, relays).unwrap();
                let realm = world.router(Kind::PORT_RESTRICTED, 0);
                let realms = if side == 0 { [realm, 0] } else { [0, realm] };
                for realm in realms {
                    world.node(realm, 10 * MS).unwrap();
                }
                let pause = pause(world, after, |world| world.restart_router(realm));
                all.note(("one router", relays.len(), side, after), pause);
            }
        }
        for side in 0..2 {
            let world = pair(seed, &regions, [Kind::PORT_RESTRICTED; 2], Duration::ZERO);
            let pause = pause(world, after, |world| world.restart_router(1 + side));
            all.note(("two routers", 2, side, after), pause);
        }
    }
    all.end();
}

#[test]
fn nodes_that_move_are_followed_whenever_they_do() {
    let mut all = Took::within(FOLLOWED);
    for (seed, after) in moments(6 * SECOND, 12) {
        for side in 0..2 {
            let kinds = [Kind::PORT_RESTRICTED, Kind::FULL_CONE];
            let mut world = pair(seed, &[10 * MS], kinds, Duration::ZERO);
            let third = world.router(Kind::PORT_RESTRICTED, 0);
            let pause = pause(world, after, |world| world.roam(side, third));
            all.note((side, after), pause);
        }
    }
    all.end();
}

/// How soon there is an answer after one or both of two that talk slept so long.
fn pause_of_sleep(
    mut world: World,
    asleep: &[usize],
    long: Duration,
    meanwhile: impl FnOnce(&mut World),
) -> Duration {
    let (from, to) = ways(&world)[0];
    let talk = world.talk(from, to, PACE, 600 * SECOND);
    world.run(8 * SECOND);
    for node in asleep {
        world.sleep(*node);
    }
    meanwhile(&mut world);
    world.run(SECOND + long);
    let answered = world.heard(talk).answered.len();
    let woke = world.now();
    for node in asleep {
        world.wake(*node);
    }
    let answers = |world: &World| world.heard(talk).answered.len() > answered;
    when(&mut world, "answered", answers) - woke
}

/// A node behind a router sleeps, or both nodes do, and the router forgets them meanwhile or does not.
/// There is no relay whose loss would tell.
#[test]
fn who_slept_asks_its_paths_as_soon_as_it_wakes() {
    let mut all = Took::within(AWAKE);
    for (seed, long) in moments(170 * SECOND, 8) {
        let sides = [[0].as_slice(), &[1], &[0, 1], &[1, 0]];
        for (asleep, forgets) in sides.into_iter().flat_map(|it| [(it, false), (it, true)]) {
            let mut world = World::new(seed, &[]).unwrap();
            let realm = world.router(Kind::PORT_RESTRICTED, 0);
            // The first of them is the one behind the router.
            let realms = if asleep[0] == 0 {
                [realm, 0]
            } else {
                [0, realm]
            };
            for realm in realms {
                world.node(realm, 10 * MS).unwrap();
            }
            let took = pause_of_sleep(world, asleep, long, |world| {
                if forgets {
                    world.restart_router(realm);
                }
            });
            all.note((asleep, forgets, long), took);
        }
    }
    all.end();
}

/// Two that talk by relay, whose keys are wiped while they sleep.
#[test]
fn who_slept_talks_by_relay_as_soon_as_it_wakes() {
    let mut all = Took::within(CONNECTED);
    for (seed, long) in moments(170 * SECOND, 8) {
        for asleep in [&[0][..], &[1], &[0, 1]] {
            let world = pair(seed, &[10 * MS], [Kind::SYMMETRIC; 2], Duration::ZERO);
            let took = pause_of_sleep(world, asleep, long, |_| ());
            all.note((asleep, long), took);
        }
    }
    all.end();
}
