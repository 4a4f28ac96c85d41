//! Random packets, read by three parsers: ours on the host, the loaded program's, and the oracle.
//!
//! ```text
//! packet ─┬─► packet::parse() ─┬─► the oracle's fields, or its reason to refuse     equal?
//!         │                    └─► the evaluator on plain maps: verdict and flow ─┐
//!         └─► the loaded program, by BPF_PROG_TEST_RUN: verdict and flow ─────────┴ equal?
//! ```
//!
//! Everyone may send everything, so that a packet that can be read leaves a flow in the program's
//! maps, under the addresses, protocol and ports that the program read. The flow is looked for by
//! what the host read, and taken away; now and then nothing may be left, and the counters must be
//! what the host counted. First come the packets of the corpus, then random ones; half of them are
//! changed in some place. `WEIR_FULL` makes it ten million.

use super::bed::{self, Bed};
use super::generate::{Random, me, peer};
use super::oracle;
use super::semantics::{filter, rule};
use super::twin::Twin;
use agent::kernel::bpf::{Acl, FlowTable, Options, RawMap};
use ebpf::abi::Direction::{self, Egress, Ingress};
use ebpf::abi::{Quota, maps};
use ebpf::packet::{Packet, parse};
use ebpf::verdict::{Store, Verdict};
use engine::acl::Acl as Lowered;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// One packet a line, in hexadecimal digits; what begins with `#` is for people.
const CORPUS: &str = include_str!("../../ebpf/tests/corpus/packets.hex");
/// Packets between two looks at the counters.
const BATCH: usize = 2_000;
/// Length of the header that a test run takes the first bytes for.
const ETHERNET: usize = 14;
/// When they all come.
const NOW: u64 = 1 << 40;

/// Packets that belong together: a fragment and its next, an error and what it is about.
type Story = Vec<(Direction, Vec<u8>)>;

fn corpus() -> Vec<Story> {
    let lines = CORPUS
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let bytes = |line: &str| data_encoding::HEXLOWER.decode(line.as_bytes()).unwrap();
    lines.map(|line| vec![(Ingress, bytes(line))]).collect()
}

const OUR_V4: [u8; 4] = [100, 64, 0, 1];
const THEIR_V4: [u8; 4] = [198, 51, 100, 7];
const OUR_V6: [u8; 16] = [0xfd, 0x7a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1];
const THEIR_V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];

fn byte(random: &mut Random) -> u8 {
    u8::try_from(random.below(256)).unwrap()
}

fn some_bytes(random: &mut Random, most: u64) -> Vec<u8> {
    let count = random.below(most + 1);
    (0..count).map(|_| byte(random)).collect()
}

/// A protocol, and an upper layer of it.
fn upper(random: &mut Random, v6: bool) -> (u8, Vec<u8>) {
    let mut bytes: Vec<u8> = (0..20).map(|_| byte(random)).collect();
    let protocol = match random.below(16) {
        0..=4 => {
            bytes[12] = *random.pick(&[0x50, 0x50, 0x50, 0x80, 0x40, 0xf0]);
            bytes[13] = *random.pick(&[2, 2, 2, 0xc2, 0x12, 0x11, 0x10, 4, 0x14, 0x29, 0, 3]);
            6
        }
        5..=8 => 17,
        9 => {
            bytes[12] = *random.pick(&[1, 1, 0, 2]);
            132
        }
        10..=12 => {
            let v4 = [8, 0, 13, 14, 3, 5, 11, 12];
            let v6_kinds = [128, 129, 1, 2, 3, 4, 133, 136];
            bytes[0] = *random.pick(if v6 { &v6_kinds } else { &v4 });
            if v6 { 58 } else { 1 }
        }
        13 => *random.pick(&[47, 50, 51, 4, 41]),
        14 => *random.pick(&[1, 58]),
        _ => byte(random),
    };
    bytes.extend(some_bytes(random, 30));
    (protocol, bytes)
}

/// An IPv4 packet around an upper layer.
fn v4(
    random: &mut Random,
    ours: bool,
    (protocol, upper): &(u8, Vec<u8>),
    part: Option<Part>,
) -> Vec<u8> {
    let options = if random.one_in(4) {
        random.below(11)
    } else {
        0
    };
    let options: Vec<u8> = (0..options * 4).map(|_| byte(random)).collect();
    let total = u16::try_from(20 + options.len() + upper.len())
        .unwrap()
        .to_be_bytes();
    let (id, field) = part.map_or((0, 0), |part| {
        (
            part.id,
            part.offset / 8 + if part.more { 0x2000 } else { 0 },
        )
    });
    let field = field | if random.one_in(3) { 0x4000 } else { 0 };
    let first = 0x45 + u8::try_from(options.len() / 4).unwrap();
    let mut bytes = vec![first, byte(random), total[0], total[1]];
    bytes.extend(id.to_be_bytes());
    bytes.extend(field.to_be_bytes());
    bytes.extend([64, *protocol, byte(random), byte(random)]);
    let (src, dst) = if ours {
        (OUR_V4, THEIR_V4)
    } else {
        (THEIR_V4, OUR_V4)
    };
    [bytes, src.to_vec(), dst.to_vec(), options, upper.clone()].concat()
}

/// An IPv6 packet around an upper layer, with extension headers now and then.
fn v6(
    random: &mut Random,
    ours: bool,
    (protocol, upper): &(u8, Vec<u8>),
    part: Option<Part>,
) -> Vec<u8> {
    let count = if random.one_in(2) { 0 } else { random.below(8) };
    let mut kinds: Vec<u8> = (0..count)
        .map(|_| *random.pick(&[60, 60, 60, 43, 0, 44, 51, 59, 135, 139, 140]))
        .collect();
    if count > 0 && random.one_in(2) {
        kinds.fill(60);
        kinds[0] = *random.pick(&[0, 43, 60]);
    }
    if part.is_some() {
        let at = usize::try_from(random.below(kinds.len() as u64 + 1)).unwrap();
        kinds.insert(at, 44);
    }
    let mut rest = Vec::new();
    let nexts = kinds.iter().skip(1).copied().chain([*protocol]);
    for (kind, next) in kinds.iter().zip(nexts) {
        let units = if random.one_in(4) { random.below(3) } else { 0 };
        let mut header: Vec<u8> = (0..(units + 1) * 8).map(|_| byte(random)).collect();
        header[0] = next;
        header[1] = u8::try_from(units).unwrap();
        match (kind, part) {
            (43, _) if !random.one_in(4) => header[3] = 0,
            (44, Some(part)) => {
                header.truncate(8);
                let field = part.offset | u16::from(part.more);
                header[2..4].copy_from_slice(&field.to_be_bytes());
                header[4..].copy_from_slice(&u32::from(part.id).to_be_bytes());
            }
            (44, None) => {
                header.truncate(8);
                if random.one_in(2) {
                    header[2..4].fill(0);
                }
            }
            _ => {}
        }
        rest.extend(header);
    }
    rest.extend(upper);
    let payload = u16::try_from(rest.len()).unwrap().to_be_bytes();
    let next = kinds.first().copied().unwrap_or(*protocol);
    let head = vec![
        0x60 | (byte(random) & 0x0f),
        byte(random),
        byte(random),
        byte(random),
    ];
    let (src, dst) = if ours {
        (OUR_V6, THEIR_V6)
    } else {
        (THEIR_V6, OUR_V6)
    };
    [
        head,
        payload.to_vec(),
        vec![next, 64],
        src.to_vec(),
        dst.to_vec(),
        rest,
    ]
    .concat()
}

/// Its place in a fragmented datagram.
#[derive(Clone, Copy)]
struct Part {
    id: u16,
    offset: u16,
    more: bool,
}

/// Changes a packet somewhere.
fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..=random.below(3) {
        if bytes.is_empty() {
            return;
        }
        // Mostly in the headers.
        let most = if random.one_in(3) {
            bytes.len()
        } else {
            bytes.len().min(48)
        };
        let at = usize::try_from(random.below(most as u64)).unwrap();
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.extend(some_bytes(random, 40)),
            2 => bytes[at] ^= 1 << random.below(8),
            3 => bytes[at] = *random.pick(&[0, 1, 6, 17, 43, 44, 51, 58, 59, 60, 255]),
            4 => {
                bytes.remove(at);
            }
            _ => bytes[at] = byte(random),
        }
    }
}

fn story(random: &mut Random) -> Story {
    let is_v6 = random.one_in(2);
    let build = if is_v6 { v6 } else { v4 };
    let direction = if random.one_in(3) { Egress } else { Ingress };
    let ours = direction == Egress;
    let upper_layer = upper(random, is_v6);
    let id = u16::try_from(random.below(0x1_0000)).unwrap();
    let mut story = match random.below(8) {
        0 => {
            // A first fragment and its next, which may reach into it.
            let offset = *random.pick(&[8, 16, 24, 1480]);
            let (first, next) = (
                Part {
                    id,
                    offset: 0,
                    more: true,
                },
                Part {
                    id,
                    offset,
                    more: random.one_in(2),
                },
            );
            vec![
                (direction, build(random, ours, &upper_layer, Some(first))),
                (direction, build(random, ours, &upper_layer, Some(next))),
            ]
        }
        1 | 2 => {
            // A packet, and an error about it.
            let inner = build(random, ours, &upper_layer, None);
            let v4_kinds = [3, 11, 12];
            let kinds: &[u8] = if is_v6 { &[1, 2, 3, 4] } else { &v4_kinds };
            let mut message = vec![*random.pick(kinds), byte(random), 0, 0, 0, 0, 0, 0];
            let mut embedded = inner.clone();
            if random.one_in(3) {
                mutate(random, &mut embedded);
            }
            message.extend(embedded);
            let error = build(random, !ours, &(if is_v6 { 58 } else { 1 }, message), None);
            vec![(direction, inner), (direction.flip(), error)]
        }
        _ => vec![(direction, build(random, ours, &upper_layer, None))],
    };
    for (_, packet) in &mut story {
        if random.one_in(2) {
            mutate(random, packet);
        }
    }
    story
}

/// Why ours and the oracle do not agree, if so.
fn disagreement(bytes: &[u8]) -> Option<String> {
    let mut packet = Packet::NONE;
    let verdict = parse(&bytes, &mut packet);
    let v6 = bytes.first().is_some_and(|first| first >> 4 == 6);
    let ours = match verdict.reason() {
        Some(reason) => Err(reason),
        None => Ok(oracle::ours(&packet, v6)),
    };
    let theirs = oracle::read(bytes);
    (ours != theirs).then(|| format!("ours {ours:?}\nother {theirs:?}"))
}

/// Whether the kernel makes a test run of these bytes. It takes the first fourteen for an Ethernet
/// header, and if they look like one, wants an IP header behind it (`bpf_prog_test_run_skb` in
/// net/bpf/test_run.c).
fn can_run(bytes: &[u8]) -> bool {
    let behind = match bytes.get(12..ETHERNET) {
        Some([0x08, 0x00]) => 20,
        Some([0x86, 0xdd]) => 40,
        _ => 1,
    };
    bytes.len() >= ETHERNET + behind
}

/// The loaded program and the evaluator on the host, with one policy.
struct Both {
    acl: Acl,
    twin: Twin<0>,
    flows: FlowTable,
    fragments: RawMap,
    quota: RawMap,
    counted: BTreeMap<(Direction, Verdict), u64>,
}

impl Both {
    fn make(bed: &Bed) -> Self {
        let everything = [(None, 0, 65535)];
        let rules = || {
            vec![
                rule("0.0.0.0/0", "0.0.0.0/0", &everything),
                rule("::/0", "::/0", &everything),
            ]
        };
        let policy = filter(rules(), rules());
        let gateway = peer(2, &["100.64.0.2"], &["0.0.0.0/0", "::/0"], BTreeSet::new());
        let (mut acl, mut lowered) = (bed.open(Options::default()), Lowered::default());
        let me = me(BTreeSet::new());
        let change = lowered
            .lower(&policy, &me, &[(gateway.id, gateway)].into())
            .unwrap();
        acl.set(lowered.tables(), Some(&change)).unwrap();
        let twin = Twin::<0>::default();
        twin.set(lowered.tables(), &change);
        let folder = bed
            .folder
            .join(format!("layout-{:08x}", ebpf::abi::layout()));
        let pinned = |name: &str| RawMap::from_pin(&folder.join(name)).unwrap();
        let counted = bed::counters(&acl);
        Self {
            twin,
            flows: acl.table().unwrap(),
            acl,
            fragments: pinned(maps::FRAGMENTS),
            quota: pinned(maps::QUOTA),
            counted,
        }
    }

    /// Why the two do not agree about a story, if so.
    fn disagree(&mut self, story: &Story) -> Option<String> {
        let mut found = None;
        for (direction, bytes) in story {
            if !can_run(bytes) {
                continue;
            }
            let verdict = self.twin.send(*direction, bytes, NOW);
            *self.counted.entry((*direction, verdict)).or_default() += 1;
            let passes = self.acl.run(*direction, bytes, 1).unwrap().passes;
            if passes != verdict.passes() {
                found = Some(format!("the program: {passes}, the host: {verdict:?}"));
            }
        }
        for ((_, key), _) in std::mem::take(&mut *self.twin.flows.borrow_mut()) {
            let stores = [Store::Opening, Store::Surplus, Store::Established];
            let there = stores
                .iter()
                .filter(|store| self.flows.remove(**store, &key))
                .count();
            if there != 1 {
                found = Some(format!("the host's flow {key:?} is in {there} tables"));
            }
        }
        for (key, _) in std::mem::take(&mut *self.twin.fragments.borrow_mut()) {
            if !self.fragments.remove(&key).unwrap() {
                found = Some(format!("the host's fragment {key:?} is not there"));
            }
        }
        found
    }

    /// What is left to say at the end of a batch: flows that only the program saw, and counters.
    fn settle(&mut self) -> Option<String> {
        let left = self.acl.flows(4).unwrap();
        if !left.is_empty() {
            return Some(format!("flows that only the program saw: {left:?}"));
        }
        let counters = bed::counters(&self.acl);
        if counters != self.counted {
            let other = counters
                .iter()
                .filter(|(key, count)| self.counted[key] != **count);
            return Some(format!(
                "the program counted otherwise: {:?}",
                other.collect::<Vec<_>>()
            ));
        }
        // As after ten quiet seconds, which the host's clock here never lets pass.
        self.quota.put(&0_u32, &Quota::default(), 0).unwrap();
        self.twin.quota.set(Quota::default());
        None
    }
}

fn hex(story: &Story) -> String {
    let lines = story.iter().map(|(direction, bytes)| {
        format!("{direction:?} {}", data_encoding::HEXLOWER.encode(bytes))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// How many packets were looked at, and by what many of them passed.
#[derive(Default)]
struct Tally {
    packets: u64,
    readable: u64,
    passed: u64,
}

fn look(stories: &[Story], both: Option<&mut Both>, tally: &mut Tally) {
    for (_, bytes) in stories.iter().flatten() {
        if let Some(difference) = disagreement(bytes) {
            panic!("{}\n{difference}", data_encoding::HEXLOWER.encode(bytes));
        }
        tally.packets += 1;
        tally.readable += u64::from(parse(&&bytes[..], &mut Packet::NONE.clone()).passes());
    }
    let Some(both) = both else {
        return;
    };
    for story in stories {
        if let Some(difference) = both.disagree(story) {
            panic!("{difference}:\n{}", hex(story));
        }
    }
    let passed = |both: &Both| {
        let passing = both
            .counted
            .iter()
            .filter(|((_, verdict), _)| verdict.passes());
        passing.map(|(_, count)| count).sum()
    };
    if let Some(difference) = both.settle() {
        // Which one was it?
        for story in stories {
            assert_eq!(both.disagree(story), None, "{difference}:\n{}", hex(story));
            assert_eq!(both.settle(), None, "{difference}:\n{}", hex(story));
        }
        panic!("{difference}");
    }
    tally.passed = passed(both);
}

fn run(name: &str, both: Option<&mut Both>, packets: u64) {
    let mut random = Random(0x77ee_1234);
    let (start, mut tally, mut both) = (Instant::now(), Tally::default(), both);
    look(&corpus(), both.as_deref_mut(), &mut tally);
    while tally.packets < packets {
        let stories: Vec<Story> = (0..BATCH).map(|_| story(&mut random)).collect();
        look(&stories, both.as_deref_mut(), &mut tally);
    }
    let Tally {
        packets,
        readable,
        passed,
    } = tally;
    println!(
        "{name}: {packets} packets, {readable} of them readable, {passed} passed, no mismatch, {:?}",
        start.elapsed()
    );
    assert!(readable * 4 > packets, "too few can be read to prove much");
    assert!(
        both.is_none() || passed * 5 > packets,
        "too few pass to prove much"
    );
}

#[test]
fn no_packet_is_read_otherwise_than_by_another_parser() {
    run("host and oracle", None, 50_000);
}

#[test]
fn no_packet_is_read_otherwise_by_the_loaded_program() {
    let Some(bed) = Bed::make("no_packet_is_read_otherwise_by_the_loaded_program") else {
        return;
    };
    let full = std::env::var_os("WEIR_FULL").is_some();
    let packets = if full { 10_000_000 } else { 30_000 };
    let mut both = Both::make(&bed);
    run("host, oracle and program", Some(&mut both), packets);
}
