//! Floods leave flows alone that last, and one peer's flood what other peers open.
//!
//! Live flows of many peers are opened first; half of them then stay silent. Floods of more than
//! the table (four times it with `WEIR_FULL`) follow, by every peer and from this side too, and the
//! live flows are looked for, first in the table (which does not count as a use), and at last by
//! packets.

use super::bed::{self, Bed};
use super::craft::{ACK, Body, RST, SYN, Spec};
use super::generate::{me, peer};
use super::semantics::{KNOWN, OPEN, filter, rule};
use agent::kernel::bpf::{Acl, Options, RawMap};
use ebpf::abi::Direction::{self, Egress, Ingress};
use ebpf::abi::{ESTABLISHED_FLOWS, FlowKey, Share, maps, share_of};
use ebpf::flows::{PLACES, SPARED_NS, Seeds, hash, home, words};
use ebpf::tracks::{ALL_WORDS, HALF, WORDS};
use ebpf::verdict::Store;
use engine::acl::Acl as Lowered;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

const PEERS: u16 = 40;
const LIVE: usize = 10_000;
const US: &str = "100.64.0.1";

fn address(number: u16) -> String {
    format!("100.65.0.{}", number + 1)
}

/// Everyone may ask us anything, and we everyone.
fn open_to_all(bed: &Bed) -> Acl {
    let everything = [(None, 0, 65535)];
    let policy = filter(
        vec![rule("100.64.0.0/10", "100.64.0.1/32", &everything)],
        vec![rule("100.64.0.1/32", "100.64.0.0/10", &everything)],
    );
    let peers: BTreeMap<_, _> = (0..PEERS)
        .map(|number| {
            let id = u64::from(number) + 2;
            peer(id, &[&address(number)], &[], BTreeSet::new())
        })
        .map(|peer| (peer.id, peer))
        .collect();
    let mut acl = bed.open(Options::default());
    let mut lowered = Lowered::default();
    let change = lowered
        .lower(&policy, &me(BTreeSet::new()), &peers)
        .unwrap();
    acl.set(lowered.tables(), Some(&change)).unwrap();
    acl
}

/// A map of the programs.
fn pinned(bed: &Bed, name: &str) -> RawMap {
    let layout = format!("layout-{:08x}", ebpf::abi::layout());
    RawMap::from_pin(&bed.folder.join(layout).join(name)).unwrap()
}

/// A flow whose packets differ from each other's only in two ports.
#[derive(Clone, Copy)]
struct Talk {
    peer: u16,
    /// Who begins: a peer, or this side.
    begins: Direction,
    tcp: bool,
    port: u16,
    service: u16,
}

impl Talk {
    /// The packet that `from` sends, with these TCP flags.
    fn packet(self, from: Direction, flags: u8) -> Vec<u8> {
        let theirs = address(self.peer);
        let (src, dst) = if from == Ingress {
            (theirs.as_str(), US)
        } else {
            (US, theirs.as_str())
        };
        let (sport, dport) = if from == self.begins {
            (self.port, self.service)
        } else {
            (self.service, self.port)
        };
        let body = if self.tcp {
            Body::Tcp(sport, dport, flags)
        } else {
            Body::Udp(sport, dport)
        };
        Spec::new(src, dst, body).bytes()
    }

    fn key(self) -> FlowKey {
        let [local, remote] = [US.to_owned(), address(self.peer)]
            .map(|text| text.parse::<std::net::IpAddr>().unwrap().into());
        let (local_port, remote_port) = if self.begins == Egress {
            (self.port, self.service)
        } else {
            (self.service, self.port)
        };
        FlowKey {
            local,
            remote,
            local_port,
            remote_port,
            protocol: if self.tcp { 6 } else { 17 },
            zero: 0,
            zeros: 0,
        }
    }

    /// Its first packets: question, answer, and what goes on.
    fn packets(self, count: usize) -> impl Iterator<Item = (Direction, Vec<u8>)> {
        let (one, other) = (self.begins, self.begins.flip());
        let all = [(one, SYN), (other, SYN | ACK), (one, ACK)];
        let packets = all.into_iter().take(count);
        packets.map(move |(from, flags)| (from, self.packet(from, flags)))
    }
}

fn run(acl: &Acl, talk: Talk, packets: usize) {
    for (direction, packet) in talk.packets(packets) {
        assert!(acl.run(direction, &packet, 1).unwrap().passes);
    }
}

/// The live flows: of all peers, TCP and UDP, begun by either side.
fn live() -> Vec<Talk> {
    let talk = |number: usize| {
        let number = u16::try_from(number).unwrap();
        Talk {
            peer: number % PEERS,
            begins: if (number / PEERS).is_multiple_of(4) {
                Egress
            } else {
                Ingress
            },
            tcp: (number / PEERS).is_multiple_of(2),
            port: 20_000 + number,
            service: 443,
        }
    };
    (0..LIVE).map(talk).collect()
}

/// The live flows, all of peers after the first so many, who flood.
fn live_beside(flooders: u16) -> Vec<Talk> {
    let mut live = live();
    for (number, talk) in (0..).zip(&mut live) {
        talk.peer = flooders + number % (PEERS - flooders);
    }
    live
}

/// Flow number `number` of a flood, which is none of the live ones.
fn flood(number: u32, peer: u16) -> Talk {
    let low = u16::try_from(number & 0xffff).unwrap();
    Talk {
        peer,
        begins: if number.is_multiple_of(8) {
            Egress
        } else {
            Ingress
        },
        tcp: number.is_multiple_of(2),
        port: low,
        service: 1_000 + u16::try_from(number >> 16).unwrap(),
    }
}

/// Flows of one flood. In the short form, too, they would more than fill the table if they got in;
/// but not in User Mode Linux, where a system call takes ten times as long: there it is shown that
/// the programs do the same, and elsewhere what comes of it.
fn flows() -> u32 {
    let machine = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    if std::env::var_os("WEIR_FULL").is_some() {
        4 * ESTABLISHED_FLOWS
    } else if machine.contains("User Mode Linux") {
        ESTABLISHED_FLOWS / 16
    } else {
        ESTABLISHED_FLOWS + ESTABLISHED_FLOWS / 8
    }
}

/// How many of these flows are in the table of those that last. Looking does not use them.
fn kept(acl: &Acl, flows: &[Talk]) -> usize {
    let all = acl.flows(usize::MAX).unwrap();
    let lasting: BTreeSet<FlowKey> = all
        .into_iter()
        .filter(|(store, ..)| *store == Store::Established)
        .map(|(_, key, _)| key)
        .collect();
    flows
        .iter()
        .filter(|talk| lasting.contains(&talk.key()))
        .count()
}

/// How many packets, sent by `from`'s side of each flow, were known to belong to one.
fn hits(acl: &Acl, flows: &[Talk], from: impl Fn(&Talk) -> Direction) -> u64 {
    let known = |acl| {
        let counters = bed::counters(acl);
        counters[&(Ingress, KNOWN)] + counters[&(Egress, KNOWN)]
    };
    let before = known(acl);
    for talk in flows {
        let direction = from(talk);
        let packet = talk.packet(direction, ACK);
        acl.run(direction, &packet, 1).unwrap();
    }
    known(acl) - before
}

#[test]
fn floods_leave_flows_alone_that_last() {
    let Some(bed) = Bed::make("floods_leave_flows_alone_that_last") else {
        return;
    };
    let acl = open_to_all(&bed);
    let live = live();
    for talk in &live {
        run(&acl, *talk, 3);
    }
    assert_eq!(kept(&acl, &live), LIVE);
    let (quiet, talking) = live.split_at(LIVE / 2);
    let flows = flows();
    for (name, packets, peers) in [
        ("one packet each, by all peers", 1, PEERS),
        ("two packets each, by all peers", 2, PEERS),
        ("three packets each, by one peer", 3, 1),
    ] {
        let start = Instant::now();
        for number in 0..flows {
            run(
                &acl,
                flood(number, u16::try_from(number % u32::from(peers)).unwrap()),
                packets,
            );
            if number.is_multiple_of(16_384) {
                hits(&acl, talking, |talk| talk.begins);
            }
        }
        let left = kept(&acl, &live);
        println!(
            "{flows} flows, {name}: {left} of {LIVE} left, {:?}",
            start.elapsed()
        );
        assert!(left * 100 >= LIVE * 99, "{name}: {left} of {LIVE} left");
    }
    let answered = hits(&acl, quiet, |talk| talk.begins.flip())
        + hits(&acl, talking, |talk| talk.begins.flip());
    println!("{answered} of {LIVE} answers are known to belong to them");
    assert!(answered * 100 >= LIVE as u64 * 99);
}

/// Peers that flood at once, each as much as it gets.
const FLOODERS: [u16; 3] = [1, 4, 16];

/// A flow of a flood is closed so many flows later: until then the table fills, and from then on it
/// is full and flows come and go.
const LATER: u32 = ESTABLISHED_FLOWS;

#[test]
fn peers_that_flood_with_flows_that_last_displace_nobody_elses() {
    for flooders in FLOODERS {
        let Some(bed) = Bed::make("peers_that_flood_with_flows_that_last") else {
            return;
        };
        let acl = open_to_all(&bed);
        let live = live_beside(flooders);
        for talk in &live {
            run(&acl, *talk, 3);
        }
        assert_eq!(kept(&acl, &live), LIVE);
        // The quiet ones are the oldest of all that there are, from here to the end.
        let (quiet, busy) = live.split_at(LIVE / 2);
        let by = |number: u32| flood(number, u16::try_from(number % u32::from(flooders)).unwrap());
        let (flows, start) = (flows(), Instant::now());
        for number in 0..flows {
            run(&acl, by(number), 3);
            if let Some(former) = number.checked_sub(LATER) {
                let former = by(former);
                acl.run(former.begins, &former.packet(former.begins, RST), 1)
                    .unwrap();
            }
            if number.is_multiple_of(16_384) {
                hits(&acl, busy, |talk| talk.begins);
            }
        }
        let (quiet, busy) = (kept(&acl, quiet), kept(&acl, busy));
        println!(
            "{flows} flows that last, by {flooders}: of {} each, {busy} busy and {quiet} quiet \
             ones left, {:?}",
            LIVE / 2,
            start.elapsed()
        );
        assert!(busy.min(quiet) * 100 >= LIVE / 2 * 99, "{busy}, {quiet}");
        let answered = hits(&acl, &live, |talk| talk.begins.flip());
        assert!(answered * 100 >= LIVE as u64 * 99, "{answered} answers");
        // Newcomers get among those that last, however many flood.
        let newcomers: Vec<Talk> = (0..100)
            .map(|number| flood(2 * (flows + number), 20 + (number % 20) as u16))
            .collect();
        for talk in &newcomers {
            run(&acl, *talk, 3);
        }
        let let_in = kept(&acl, &newcomers);
        assert!(let_in >= 95, "{let_in} of 100 newcomers last");
    }
}

#[test]
fn peers_that_flood_leave_alone_what_others_open() {
    for flooders in FLOODERS {
        let Some(bed) = Bed::make("peers_that_flood_leave_alone_what_others_open") else {
            return;
        };
        let acl = open_to_all(&bed);
        let others = u32::from(PEERS - flooders);
        let by = |number: u32| flooders + u16::try_from(number % others).unwrap();
        let asked: Vec<Talk> = (0..1_000)
            .map(|number| flood(number * 2 + 1, by(number)))
            .collect();
        for talk in &asked {
            run(&acl, *talk, 1);
        }
        let flows = flows();
        for number in 0..flows {
            let flooder = u16::try_from(number % u32::from(flooders)).unwrap();
            run(&acl, flood(number, flooder), 1);
        }
        // Who floods is refused nothing either.
        let counters = bed::counters(&acl);
        assert_eq!(
            counters[&(Ingress, OPEN)] + counters[&(Egress, OPEN)],
            u64::from(flows) + 1_000
        );
        let answered = hits(&acl, &asked, |talk| talk.begins.flip());
        println!("{answered} of 1000 answers pass after {flows} flows of {flooders} others");
        assert!(answered >= 990, "{answered}");
        run(&acl, flood(flows, 0), 3);
    }
}

#[test]
fn a_set_full_of_lasting_flows_lets_no_other_in_and_cuts_none() {
    let Some(bed) = Bed::make("a_set_full_of_lasting_flows") else {
        return;
    };
    let acl = open_to_all(&bed);
    let seeds: Seeds = pinned(&bed, maps::SEEDS).get(&0_u32).unwrap().unwrap();
    let set = |talk: &Talk| home(Store::Established, hash(&words(&talk.key()), &seeds)).set;
    let together: Vec<Talk> = (0..)
        .map(|number| flood(number, 0))
        .filter(|talk| set(talk) == 0)
        .take(PLACES + 4)
        .collect();
    for talk in &together {
        run(&acl, *talk, 3);
    }
    let (first, later) = together.split_at(PLACES);
    assert_eq!((kept(&acl, first), kept(&acl, later)), (PLACES, 0));
    // They are known all the same, and get in where one has gone.
    let all = together.len() as u64;
    assert_eq!(hits(&acl, &together, |talk| talk.begins.flip()), all);
    let gone = acl
        .table()
        .unwrap()
        .remove(Store::Established, &first[0].key());
    assert!(gone);
    run(&acl, later[0], 3);
    assert_eq!((kept(&acl, first), kept(&acl, later)), (PLACES - 1, 1));
}

#[test]
fn what_nobody_uses_for_two_hours_makes_room_if_many_last() {
    let Some(bed) = Bed::make("what_nobody_uses_makes_room") else {
        return;
    };
    let mut acl = open_to_all(&bed);
    let idle: Vec<Talk> = (0..20).map(|number| flood(2 * number, 0)).collect();
    for talk in &idle {
        run(&acl, *talk, 3);
    }
    let shares = pinned(&bed, maps::SHARES);
    let say = |established: u32| {
        let share: Share = shares.get(&0_u32).unwrap().unwrap();
        let share = Share {
            established,
            ..share
        };
        shares.put(&0_u32, &share, 0).unwrap();
    };
    let used_ns = acl.flows(usize::MAX).unwrap()[0].2.last_seen_ns;
    say(ESTABLISHED_FLOWS / 2);
    acl.recount_at(used_ns + 2 * SPARED_NS).unwrap();
    assert_eq!(kept(&acl, &idle), 20, "half is not many");
    say(ESTABLISHED_FLOWS / 2 + 1);
    acl.recount_at(used_ns + 3 * SPARED_NS).unwrap();
    assert_eq!(kept(&acl, &idle), 0);
}

#[test]
fn the_agent_puts_right_what_the_programs_counted() {
    let Some(bed) = Bed::make("the_agent_puts_right_what_the_programs_counted") else {
        return;
    };
    let acl = open_to_all(&bed);
    for number in 0..30 {
        run(&acl, flood(number, 0), 3);
        run(&acl, flood(number, 1), if number < 10 { 3 } else { 2 });
    }
    let shares = pinned(&bed, maps::SHARES);
    let count = |number: u32| {
        shares
            .get::<_, Share>(&number)
            .unwrap()
            .unwrap()
            .established
    };
    let counts = || [0, share_of(2), share_of(3), share_of(4)].map(count);
    assert_eq!(counts(), [40, 30, 10, 0], "as the programs count");
    for number in [0, share_of(2), share_of(4)] {
        let wrong = Share {
            established: 60_000,
            ..shares.get(&number).unwrap().unwrap()
        };
        shares.put(&number, &wrong, 0).unwrap();
    }
    drop(acl);
    bed.open(Options::default()).recount().unwrap();
    assert_eq!(counts(), [40, 30, 10, 0], "as the next agent counts");
}

#[test]
fn tracks_of_flows_that_are_gone_are_forgotten_and_no_flow_is() {
    let Some(bed) = Bed::make("tracks_of_flows_that_are_gone") else {
        return;
    };
    let mut acl = open_to_all(&bed);
    let tracks = pinned(&bed, maps::TRACKS);
    let track = |index: u32| tracks.get::<_, u64>(&index).unwrap().unwrap();
    let half = || track(HALF) as u32;
    let count = || {
        let words = half() * WORDS..(half() + 1) * WORDS;
        words.map(|index| track(index).count_ones()).sum::<u32>()
    };
    // Known, in each table; then flows of which nothing is left but tracks.
    let lasting: Vec<Talk> = (0..20).map(|number| flood(number, 0)).collect();
    for talk in &lasting {
        run(&acl, *talk, 3);
    }
    for number in 100..9_100 {
        run(&acl, flood(number, 2), 1);
    }
    let keep = acl.flows(usize::MAX).unwrap().len() - 8_500;
    let table = acl.table().unwrap();
    let begun = acl.flows(usize::MAX).unwrap().into_iter();
    let begun = begun.filter(|(store, ..)| *store != Store::Established);
    for (store, key, _) in begun.take(8_500) {
        assert!(table.remove(store, &key));
    }
    let (left, before) = (acl.flows(usize::MAX).unwrap(), (half(), count()));
    assert_eq!(left.len(), keep);
    assert!(before.1 > 8_500 && ALL_WORDS == HALF + 1);
    acl.recount().unwrap();
    assert_ne!(half(), before.0, "the other half is read");
    assert!(count() as usize <= keep, "{} tracks", count());
    // Answers pass by their flow alone, and packets of flows that are gone are first ones again.
    for talk in &lasting {
        let known = bed::send(
            &acl,
            talk.begins.flip(),
            &talk.packet(talk.begins.flip(), ACK),
        );
        assert_eq!(known, KNOWN);
    }
    assert_eq!(acl.flows(usize::MAX).unwrap().len(), keep);
}

/// Rounds in which two threads begin the same flows.
const ROUNDS: u32 = 8;

#[test]
fn two_processors_that_begin_the_same_flows_at_once_make_one_of_each() {
    let Some(bed) = Bed::make("two_processors_that_begin_the_same_flows") else {
        return;
    };
    let acl = open_to_all(&bed);
    let lasting: Vec<Talk> = (0..500)
        .map(|number| flood(50_000 + number, u16::try_from(number % 40).unwrap()))
        .collect();
    for talk in &lasting {
        run(&acl, *talk, 3);
    }
    for round in 0..ROUNDS {
        // The same question from both, then an answer from one while the other asks again.
        let same = |number: u32| flood(round * 1_000 + number, 5);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for number in 0..500 {
                        run(&acl, same(number), 1);
                    }
                    for number in 0..500 {
                        run(&acl, same(number), 3);
                    }
                });
            }
            scope.spawn(|| {
                let known = |talk: &&Talk| {
                    let packet = talk.packet(talk.begins.flip(), ACK);
                    acl.run(talk.begins.flip(), &packet, 1).unwrap().passes
                };
                assert_eq!(lasting.iter().filter(known).count(), lasting.len());
            });
        });
    }
    let mut places: BTreeMap<(Store, FlowKey), u32> = BTreeMap::new();
    for (store, key, _) in acl.flows(usize::MAX).unwrap() {
        *places.entry((store, key)).or_default() += 1;
    }
    let twice = places.iter().filter(|(_, count)| **count > 1);
    assert_eq!(twice.count(), 0, "flows that are in two places of a store");
    let lasting = places
        .keys()
        .filter(|(store, _)| *store == Store::Established);
    assert_eq!(lasting.count(), 500 + 500 * ROUNDS as usize);
}
