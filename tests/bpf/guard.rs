//! The guard before WireGuard's port: its three programs against what its words mean, its limits,
//! and where it is attached.

use super::bed::{self, Bed, ip};
use super::generate::Random;
use agent::kernel::bpf::guard::{Guard, Hook, Orders, Program, Underlay};
use agent::kernel::bpf::{Acl, How, Options, detach_and_unpin};
use agent::kernel::route::Routes;
use ebpf::abi::Addr;
use ebpf::guard::{
    Config, Outcome, PREFIX_BURST, TOTAL_BURST, Tables, judge_bare, judge_ethernet, prefix_of,
};
use ebpf::packet::MAX_EXTENSIONS;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::process::Command;
use std::time::Duration;

const PORT: u16 = 51820;
const OURS: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
/// Frames of one series, and where a processor is emulated.
const FRAMES: u64 = 300;
const FRAMES_EMULATED: u64 = 60;
/// Initiations of one prefix among many.
const EACH: u32 = 50;

/// A UDP datagram on the underlay.
#[derive(Clone, Debug)]
struct Wire {
    src: IpAddr,
    dst: IpAddr,
    port: u16,
    payload: Vec<u8>,
    /// VLAN numbers of its tags, the outer first.
    tags: Vec<u16>,
    /// Words of IPv4 options.
    options: u8,
    /// IPv6 extension headers.
    extensions: Vec<u8>,
    /// Offset of a fragment.
    fragment: Option<u16>,
    protocol: u8,
}

impl Wire {
    fn new(src: &str, dst: &str, payload: Vec<u8>) -> Self {
        Self {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            port: PORT,
            payload,
            tags: Vec::new(),
            options: 0,
            extensions: Vec::new(),
            fragment: None,
            protocol: 17,
        }
    }

    /// From the IP header on.
    fn bare(&self) -> Vec<u8> {
        let length = u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes();
        let port = self.port.to_be_bytes();
        let head = [0xc0, 1, port[0], port[1], length[0], length[1], 0, 0];
        let udp = [head.as_slice(), &self.payload].concat();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let header = 20 + 4 * usize::from(self.options);
                let total = u16::try_from(header + udp.len()).unwrap();
                let mut bytes = vec![0x45 + self.options, 0];
                bytes.extend(total.to_be_bytes());
                let field = self.fragment.map_or(0, |offset| 0x2000 | (offset / 8));
                bytes.extend([0, 7]);
                bytes.extend(field.to_be_bytes());
                bytes.extend([64, self.protocol, 0, 0]);
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
                bytes.resize(header, 1);
                [bytes, udp].concat()
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut kinds = self.extensions.clone();
                kinds.extend(self.fragment.map(|_| 44));
                kinds.push(self.protocol);
                let mut chain = Vec::new();
                for pair in kinds.windows(2) {
                    let field = self.fragment.unwrap_or(0) | 1;
                    let [high, low] = if pair[0] == 44 {
                        field.to_be_bytes()
                    } else {
                        [1, 4]
                    };
                    // Destination options come long now and then.
                    let longer = pair[0] == 60;
                    chain.extend([pair[1], u8::from(longer), high, low, 0, 0, 0, 0]);
                    chain.resize(chain.len() + if longer { 8 } else { 0 }, 0);
                }
                let body = [chain, udp].concat();
                let mut bytes = vec![0x60, 0, 0, 0];
                bytes.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
                bytes.extend([kinds[0], 64]);
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
                [bytes, body].concat()
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                panic!("one packet, two families")
            }
        }
    }

    fn ethernet(&self) -> Vec<u8> {
        let mut bytes = vec![2; 12];
        for tag in &self.tags {
            bytes.extend([0x81, 0, 0x20 | (tag >> 8) as u8, *tag as u8]);
        }
        let kind: u16 = if self.src.is_ipv4() { 0x0800 } else { 0x86dd };
        bytes.extend(kind.to_be_bytes());
        [bytes, self.bare()].concat()
    }

    /// What the guard's words mean for it, but for limits.
    fn meaning(&self, forwards: bool) -> Option<Outcome> {
        let ours = OURS.iter().any(|addr| addr.parse() == Ok(self.dst));
        let walked = |kind: &u8| [0, 43, 60].contains(kind);
        let headers = self.extensions.len() + usize::from(self.fragment.is_some());
        let read =
            self.src.is_ipv4() || self.extensions.iter().all(walked) && headers <= MAX_EXTENSIONS;
        let later = self.fragment.is_some_and(|offset| offset != 0);
        if self.port != PORT || self.protocol != 17 || later || !read {
            return None;
        }
        let kind = self.payload.first_chunk::<4>().copied();
        let class = match (kind, self.payload.len()) {
            (Some([1, 0, 0, 0]), 148) => Outcome::Initiation,
            (Some([2, 0, 0, 0]), 92) => Outcome::Response,
            (Some([3, 0, 0, 0]), 64) => Outcome::Cookie,
            (Some([4, 0, 0, 0]), length) if length >= 32 => Outcome::Data,
            (Some([b'T', b'S', 0xf0, 0x9f]), _) => Outcome::Disco,
            (Some([0, 1, 0, 0]), 20) => Outcome::Stun,
            _ if forwards => Outcome::Foreign,
            _ => Outcome::Other,
        };
        match class {
            Outcome::Initiation | Outcome::Foreign | Outcome::Other if !ours => None,
            class => Some(class),
        }
    }
}

fn padded(head: &[u8], bytes: usize) -> Vec<u8> {
    let mut payload = head.to_vec();
    payload.resize(bytes, 0x77);
    payload
}

fn initiation() -> Vec<u8> {
    padded(&[1, 0, 0, 0], 148)
}

fn payload(random: &mut Random) -> Vec<u8> {
    let sixteens = 16 * random.below(90) as usize;
    match random.below(13) {
        0 | 1 => initiation(),
        2 => padded(&[2, 0, 0, 0], 92),
        3 => padded(&[3, 0, 0, 0], 64),
        4 => padded(&[4, 0, 0, 0], 32 + sixteens),
        5 => padded("TS💬".as_bytes(), 70 + sixteens),
        6 => padded(&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42], 20),
        7 => padded(&[1, 0, 0, 0], 147),
        8 => padded(&[4, 0, 0, 0], 33 + sixteens),
        11 => padded(&[4, 0, 0, 0], 31),
        9 => padded(&[1, 0, 0, 1], 148),
        10 => padded(&[], random.below(10) as usize),
        _ => padded(b"\xff\xff\xff\xffgetstatus", 60),
    }
}

fn wire(random: &mut Random) -> Wire {
    let [near, far] = if random.one_in(2) {
        [
            OURS[0].to_owned(),
            format!("198.51.{}.9", random.below(200)),
        ]
    } else {
        let place = random.below(200);
        [OURS[1].to_owned(), format!("2001:db8:{place:x}::9")]
    };
    let elsewhere = if far.contains(':') {
        "2001:db8::2"
    } else {
        "192.0.2.2"
    };
    let dst = if random.one_in(8) { elsewhere } else { &near };
    let mut wire = Wire::new(&far, dst, payload(random));
    if random.one_in(8) {
        wire.port = 51821;
    }
    if random.one_in(12) {
        wire.protocol = 6;
    }
    if random.one_in(4) {
        let tags = [vec![0], vec![0], vec![7], vec![0, 0], vec![0, 7]];
        wire.tags.clone_from(random.pick(&tags));
    }
    if random.one_in(6) {
        wire.fragment = Some(*random.pick(&[0, 0, 8, 1_480]));
    }
    if wire.src.is_ipv4() {
        wire.options = *random.pick(&[0, 0, 0, 1, 3, 10]);
    } else if random.one_in(2) {
        let count = random.below(8);
        let kind = |random: &mut Random| *random.pick(&[0, 43, 60, 60, 0, 43, 60, 51]);
        wire.extensions = (0..count).map(|_| kind(random)).collect();
    }
    wire
}

/// What the programs remember, in plain maps.
#[derive(Default)]
struct Twin {
    forwards: bool,
    paid: RefCell<BTreeMap<Addr, u64>>,
    all: Cell<u64>,
}

impl Tables for Twin {
    fn now_ns(&self) -> u64 {
        1 << 40
    }

    fn config(&self) -> Option<Config> {
        Some(Config {
            port: u32::from(PORT),
            forwards: u32::from(self.forwards),
        })
    }

    fn is_own(&self, addr: &Addr) -> bool {
        OURS.iter()
            .any(|own| Addr::from(own.parse::<IpAddr>().unwrap()) == *addr)
    }

    fn has_peer(&self, _prefix: &Addr) -> bool {
        false
    }

    fn paid(&self, prefix: &Addr) -> Option<u64> {
        self.paid.borrow().get(prefix).copied()
    }

    fn pay(&self, prefix: &Addr, until_ns: u64) {
        self.paid.borrow_mut().insert(*prefix, until_ns);
    }

    fn all_paid(&self) -> Option<u64> {
        Some(self.all.get())
    }

    fn pay_all(&self, until_ns: u64) {
        self.all.set(until_ns);
    }
}

fn orders(underlays: Vec<Underlay>, forwards: bool) -> Orders {
    Orders {
        port: PORT,
        xdp: true,
        underlays,
        own: OURS.iter().map(|addr| addr.parse().unwrap()).collect(),
        forwards,
    }
}

fn guard(bed: &Bed) -> Guard {
    Guard::at(bed.folder.join("guard"), Options::default().how)
}

/// What the guard did with a frame: the counter that it raised, if any.
fn send(guard: &Guard, program: Program, frame: &[u8]) -> Option<Outcome> {
    let before = guard.counters().unwrap();
    let run = guard.run(program, frame, 1).unwrap();
    let after = guard.counters().unwrap();
    let raised = before.iter().zip(&after).filter(|(was, is)| was != is);
    let raised: Vec<Outcome> = raised.map(|((outcome, _), _)| *outcome).collect();
    assert!(raised.len() <= 1, "one packet, one counter: {raised:?}");
    let passes = raised.first().is_none_or(|outcome| outcome.passes());
    assert_eq!(run.passes, passes, "{raised:?}");
    raised.first().copied()
}

fn count(guard: &Guard, outcome: Outcome) -> u64 {
    let counters: BTreeMap<_, _> = guard.counters().unwrap().into_iter().collect();
    counters[&outcome]
}

#[test]
fn the_guard_on_the_host_means_what_its_words_say() {
    let mut random = Random(4);
    let mut seen = BTreeSet::new();
    for number in 0..20_000 {
        let twin = Twin {
            forwards: random.one_in(3),
            ..Twin::default()
        };
        let wire = wire(&mut random);
        let meaning = wire.meaning(twin.forwards);
        let frame = wire.bare();
        assert_eq!(
            judge_bare(&twin, &frame.as_slice()),
            meaning,
            "{number}: {wire:?}"
        );
        let frame = wire.ethernet();
        let judged = judge_ethernet(&twin, &frame.as_slice());
        let ours = matches!(wire.tags.as_slice(), [] | [0]);
        assert_eq!(judged, meaning.filter(|_| ours), "{number}: {wire:?}");
        seen.insert(meaning);
        // Cut anywhere, it is judged or passes, and nothing worse.
        let cut = random.below(frame.len() as u64) as usize;
        let _ = judge_ethernet(&twin, &&frame[..cut]);
    }
    assert_eq!(seen.len(), 9, "all but the limits were seen: {seen:?}");
}

#[test]
fn kernel_guard_judges_every_frame_as_its_words_say() {
    let Some(bed) = Bed::make("kernel_guard_judges_every_frame") else {
        return;
    };
    let mut guard = guard(&bed);
    let emulated = std::env::var("WEIR_VM").is_ok_and(|machine| machine == "tcg");
    let frames = if emulated { FRAMES_EMULATED } else { FRAMES };
    let mut random = Random(11);
    let mut seen = BTreeSet::new();
    for forwards in [false, true] {
        guard.set(&orders(Vec::new(), forwards)).unwrap();
        guard.load_all().unwrap();
        for number in 0..frames {
            let wire = wire(&mut random);
            let meaning = wire.meaning(forwards);
            let tagged = wire.tags.as_slice();
            let frame = wire.ethernet();
            // The driver sees tags; the stack gets them as fields, but not in a test run.
            let ours = meaning.filter(|_| matches!(tagged, [] | [0]));
            for program in [Program::Driver, Program::Ethernet] {
                let judged = send(&guard, program, &frame);
                assert_eq!(judged, ours, "{number}, {program:?}: {wire:?}");
            }
            let judged = send(&guard, Program::Bare, &wire.bare());
            assert_eq!(judged, meaning, "{number}, bare: {wire:?}");
            seen.insert(meaning);
        }
    }
    let all = emulated || seen.len() == 9;
    assert!(all, "all but the limits were seen: {seen:?}");
    guard.remove().unwrap();
}

#[test]
fn a_prefix_that_floods_is_held_off_and_no_other() {
    let Some(bed) = Bed::make("a_prefix_that_floods_is_held_off") else {
        return;
    };
    let mut guard = guard(&bed);
    guard.set(&orders(Vec::new(), false)).unwrap();
    guard.load_all().unwrap();
    for (flood, neighbour, other) in [
        ("203.0.113.5", "203.0.113.99", "203.0.114.5"),
        ("2001:db8:5::1", "2001:db8:5:ffff::2", "2001:db8:6::1"),
    ] {
        let dst = if flood.contains(':') {
            OURS[1]
        } else {
            OURS[0]
        };
        let from = |src: &str, payload| Wire::new(src, dst, payload).ethernet();
        let (passed, held) = (
            count(&guard, Outcome::Initiation),
            count(&guard, Outcome::PrefixLimit),
        );
        let flooding = from(flood, initiation());
        for _ in 0..4 {
            guard.run(Program::Driver, &flooding, 500).unwrap();
        }
        let passed = count(&guard, Outcome::Initiation) - passed;
        let held = count(&guard, Outcome::PrefixLimit) - held;
        assert_eq!(passed + held, 2_000);
        // What was earned meanwhile comes on top, and this took no ten seconds.
        assert!(
            (PREFIX_BURST..PREFIX_BURST + 1_000).contains(&passed),
            "{passed}"
        );
        guard.run(Program::Driver, &flooding, 200).unwrap();
        let sent = |src, payload| send(&guard, Program::Driver, &from(src, payload));
        let shared = sent(neighbour, initiation());
        assert!(matches!(
            shared,
            Some(Outcome::PrefixLimit | Outcome::Initiation)
        ));
        assert_eq!(sent(other, initiation()), Some(Outcome::Initiation));
        assert_eq!(sent(flood, padded(&[4, 0, 0, 0], 64)), Some(Outcome::Data));
        assert_eq!(
            sent(flood, padded(&[2, 0, 0, 0], 92)),
            Some(Outcome::Response)
        );
        let disco = padded("TS💬".as_bytes(), 124);
        assert_eq!(sent(flood, disco), Some(Outcome::Disco));
    }
    guard.remove().unwrap();
}

#[test]
fn a_forger_of_any_address_is_held_off_and_peers_still_get_through() {
    let Some(bed) = Bed::make("a_forger_of_any_address_is_held_off") else {
        return;
    };
    let mut guard = guard(&bed);
    guard.set(&orders(Vec::new(), false)).unwrap();
    guard.load_all().unwrap();
    let peer: IpAddr = "198.18.200.7".parse().unwrap();
    guard.exempt([peer].into_iter()).unwrap();
    let from = |src: &str| Wire::new(src, OURS[0], initiation()).ethernet();
    // Of each prefix less than it may send, from many of them.
    let flood = |guard: &Guard, first: u64| {
        for number in 0..TOTAL_BURST * 3 / u64::from(EACH) {
            let src = format!("{first}.{}.{}.1", number / 256, number % 256);
            guard.run(Program::Ethernet, &from(&src), EACH).unwrap();
        }
    };
    flood(&guard, 196);
    let held = count(&guard, Outcome::TotalLimit);
    assert!(held > TOTAL_BURST / 2, "{held}");
    let own = from("198.18.200.99");
    for _ in 0..20 {
        assert_eq!(
            send(&guard, Program::Ethernet, &own),
            Some(Outcome::Initiation)
        );
    }
    // Once it is no peer's any more, it is one of all.
    guard.exempt(std::iter::empty()).unwrap();
    flood(&guard, 197);
    let before = count(&guard, Outcome::TotalLimit);
    guard.run(Program::Ethernet, &own, 300).unwrap();
    assert!(count(&guard, Outcome::TotalLimit) > before);
    guard.remove().unwrap();
}

#[test]
fn prefixes_are_24_bits_of_ipv4_and_48_of_ipv6() {
    let prefix = |text: &str| prefix_of(&Addr::from(text.parse::<IpAddr>().unwrap()));
    let same = |a: &str, b: &str| prefix(a) == prefix(b);
    assert!(same("192.0.2.1", "192.0.2.255") && !same("192.0.2.1", "192.0.3.1"));
    assert!(same("2001:db8:7::1", "2001:db8:7:ffff::1"));
    assert!(!same("2001:db8:7::1", "2001:db8:8::1"));
    assert!(!same("0.0.0.0", "::"));
}

/// A pair of links in one namespace: what is sent out of `far` comes in at `near`.
fn pair() -> (Underlay, SocketAddrV6, UdpSocket) {
    ip(&["link", "add", "near", "type", "veth", "peer", "name", "far"]);
    for (link, addr) in [("near", "fe80::1/64"), ("far", "fe80::2/64")] {
        ip(&["link", "set", link, "addrgenmode", "none", "up"]);
        ip(&["addr", "add", addr, "dev", link, "nodad"]);
    }
    let far: Ipv6Addr = "fe80::2".parse().unwrap();
    let scope = bed::index_of("far");
    let from = UdpSocket::bind(SocketAddrV6::new(far, 0, 0, scope)).unwrap();
    let to = SocketAddrV6::new("fe80::1".parse().unwrap(), PORT, 0, scope);
    let underlay = Underlay {
        name: "near".to_owned(),
        index: bed::index_of("near"),
        ethernet: true,
        card: false,
    };
    (underlay, to, from)
}

fn shown(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

/// Drops what is nothing, and lets data through, on live packets.
fn stands(guard: &Guard, to: SocketAddrV6, from: &UdpSocket) {
    let (dropped, passed) = (count(guard, Outcome::Other), count(guard, Outcome::Data));
    let mut live = || {
        from.send_to(&[0xff; 100], to).unwrap();
        from.send_to(&padded(&[4, 0, 0, 0], 96), to).unwrap();
        count(guard, Outcome::Other) > dropped && count(guard, Outcome::Data) > passed
    };
    tests::wait_until("live datagrams", Duration::from_secs(20), &mut live).unwrap();
}

#[test]
fn kernels_hold_the_guard_on_live_links_when_the_agent_dies_and_leave_nothing() {
    let Some(bed) = Bed::make("kernels_hold_the_guard_on_live_links") else {
        return;
    };
    let (underlay, to, from) = pair();
    // With what the unit gives to the agent.
    let four = CapabilitySet::NET_ADMIN
        | CapabilitySet::BPF
        | CapabilitySet::PERFMON
        | CapabilitySet::NET_RAW;
    let all = rustix::thread::capabilities(None).unwrap();
    let few = CapabilitySets {
        effective: four,
        ..all
    };
    let card = Underlay {
        card: true,
        ..underlay.clone()
    };
    let usual = Options::default().how;
    let at_ingress = |how| match how {
        How::Tcx => Hook::Tcx,
        How::Clsact => Hook::Clsact,
    };
    let mut ways = vec![
        (underlay.clone(), usual, at_ingress(usual)),
        (underlay.clone(), How::Clsact, Hook::Clsact),
        (card, usual, Hook::Xdp),
    ];
    ways.dedup_by_key(|(_, _, hook)| *hook);
    if std::env::var("WEIR_VM").is_ok_and(|machine| machine == "tcg") {
        // Loading takes seconds there, and the other kernel has the other way.
        ways.retain(|(_, _, hook)| *hook == Hook::Xdp || *hook == at_ingress(usual));
    }
    for (underlay, how, hook) in ways {
        let mut orders = orders(vec![underlay.clone()], false);
        orders.own.insert(IpAddr::V6(*to.ip()));
        let mut guard = Guard::at(bed.folder.join("guard"), how);
        set_capabilities(None, few).unwrap();
        let report = guard.set(&orders).unwrap();
        set_capabilities(None, all).unwrap();
        assert!(report.failed.is_empty(), "{report:?}");
        assert_eq!(report.on["near"], hook);
        let native = shown("ip link show near");
        assert!(!native.contains("xdpgeneric"), "{native}");
        assert_eq!(native.contains("xdp"), hook == Hook::Xdp, "{native}");
        stands(&guard, to, &from);
        let counted = count(&guard, Outcome::Other);
        drop(guard);

        // The next agent finds it at work, and replaces it in place.
        let mut guard = Guard::at(bed.folder.join("guard"), how);
        assert_eq!(guard.set(&orders).unwrap().on["near"], hook);
        assert!(count(&guard, Outcome::Other) >= counted);
        stands(&guard, to, &from);
        // An interface that is no part of the underlay any more is left.
        let elsewhere = Orders {
            underlays: Vec::new(),
            ..orders.clone()
        };
        let mut left = guard.set(&elsewhere).unwrap().left;
        assert_eq!(guard.set(&orders).unwrap().on["near"], hook);
        left.extend(guard.remove().unwrap().left);
        assert_eq!(left.is_empty(), hook != Hook::Clsact, "{left:?}");
        take_qdiscs(&left);
        assert!(!bed.folder.join("guard").exists());
        let rest = [
            "tc filter show dev near ingress",
            "tc qdisc show dev near",
            "ip link show near",
        ];
        for command in rest {
            let rest = shown(command);
            assert!(
                !["bpf", "clsact", "xdp"]
                    .iter()
                    .any(|word| rest.contains(word)),
                "{rest}"
            );
        }
    }
}

fn take_qdiscs(indices: &[u32]) {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    runtime.block_on(async {
        let routes = Routes::open().unwrap();
        for index in indices {
            routes.remove_clsact(*index).await.unwrap();
        }
    });
}

#[test]
fn the_qdisc_of_somebody_else_stays() {
    let Some(bed) = Bed::make("the_qdisc_of_somebody_else_stays") else {
        return;
    };
    let (underlay, ..) = pair();
    let orders = orders(vec![underlay.clone()], false);
    let theirs = ["tc", "qdisc", "add", "dev", "near", "clsact"];
    let made = Command::new(theirs[0]).args(&theirs[1..]).status();
    assert!(made.unwrap().success());
    let mut guard = Guard::at(bed.folder.join("guard"), How::Clsact);
    guard.set(&orders).unwrap();
    assert_eq!(guard.remove().unwrap().left, Vec::<u32>::new());
    assert!(shown("tc qdisc show dev near").contains("clsact"));
    // Ours, with a filter of theirs in it: it stays with them, too.
    take_qdiscs(&[underlay.index]);
    assert!(!shown("tc qdisc show dev near").contains("clsact"));
    guard.set(&orders).unwrap();
    let options = Options {
        how: How::Clsact,
        ..Options::default()
    };
    let folder = bed.folder.join("theirs");
    let acl = Acl::open("near", underlay.index, &folder, options).unwrap();
    let left = guard.remove().unwrap().left;
    assert_eq!(left, [underlay.index]);
    take_qdiscs(&left);
    let filters = shown("tc filter show dev near egress");
    assert!(filters.contains("bpf"), "{filters}");
    assert!(acl.is_attached(underlay.index));
    detach_and_unpin("near", &folder).unwrap();
    take_qdiscs(&left);
    assert!(!shown("tc qdisc show dev near").contains("clsact"));
}
