//! Attaching, adopting, upgrading, swapping: what happens around the packets.

use super::bed::{self, Bed, DEVICE, ip, send};
use super::craft::{ACK, Body, PSH, SYN, Spec};
use super::generate::{me, peer};
use super::semantics::{KNOWN, OPEN, filter, peers, rule, set};
use super::twin::Twin;
use agent::kernel::bpf::{Acl, AclError, How, Options, detach_and_unpin, is_pinned};
use ebpf::abi::Direction::{Egress, Ingress};
use ebpf::reason::Reason;
use ebpf::verdict::Verdict;
use engine::acl::{Acl as Lowered, Change, MAX_PREFIXES, Tables};
use proto::filter::Filter;
use proto::id::NodeId;
use proto::netmap::Peer;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn web() -> Filter {
    let services = [(Some(6), 80, 80), (Some(17), 53, 53)];
    filter(vec![rule("0.0.0.0/0", "100.64.0.1/32", &services)], vec![])
}

fn syn(port: u16) -> Vec<u8> {
    Spec::new("100.64.0.2", "100.64.0.1", Body::Tcp(port, 80, SYN)).bytes()
}

fn answer(port: u16) -> Vec<u8> {
    Spec::new("100.64.0.1", "100.64.0.2", Body::Tcp(80, port, SYN | ACK)).bytes()
}

fn data(port: u16) -> Vec<u8> {
    Spec::new("100.64.0.2", "100.64.0.1", Body::Tcp(port, 80, ACK | PSH)).bytes()
}

/// How this kernel attaches, and clsact, which every kernel has.
fn ways() -> Vec<How> {
    let usual = Options::default().how;
    let mut ways = vec![usual, How::Clsact];
    ways.dedup();
    ways
}

#[test]
fn kernels_are_content_with_the_units_capabilities() {
    let Some(bed) = Bed::make("kernels_are_content_with_the_units_capabilities") else {
        return;
    };
    let four = CapabilitySet::NET_ADMIN
        | CapabilitySet::BPF
        | CapabilitySet::PERFMON
        | CapabilitySet::NET_RAW;
    let all = rustix::thread::capabilities(None).unwrap();
    for how in ways() {
        let sets = |effective| CapabilitySets {
            effective,
            permitted: all.permitted,
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, sets(four)).unwrap();
        // What holds the WireGuard port for STUN, and needs CAP_NET_RAW alone of these.
        let (answers, _none) = tokio::sync::mpsc::channel(1);
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime
            .block_on(async { agent::port::spawn(51820, answers) })
            .unwrap();
        let options = Options {
            how,
            ..Options::default()
        };
        let opened = Acl::open(DEVICE, bed.index(), &bed.folder, options);
        let mut acl = opened.unwrap_or_else(|error| panic!("{how:?}: {error}"));
        set(&mut acl, &mut Lowered::default(), &web());
        assert!(acl.counters().is_ok() && acl.dump().is_ok());
        drop(acl);
        let adopted = Acl::open(DEVICE, bed.index(), &bed.folder, options);
        drop(adopted.unwrap_or_else(|error| panic!("adopting, {how:?}: {error}")));
        detach_and_unpin(DEVICE, &bed.folder).unwrap();
        set_capabilities(None, sets(all.effective)).unwrap();
    }
}

#[test]
fn kernels_show_programs_live_packets_however_they_are_attached_until_told() {
    for how in ways() {
        let Some(bed) = Bed::make("kernels_show_live_packets") else {
            return;
        };
        // A pair of which one end has the programs; both talk IPv6 by themselves once up.
        ip(&["link", "add", "near", "type", "veth", "peer", "name", "far"]);
        ip(&["link", "set", "near", "up"]);
        let index = bed::index_of("near");
        let options = Options {
            how,
            ..Options::default()
        };
        let acl = Acl::open("near", index, &bed.folder, options).unwrap();
        assert!(acl.is_attached(index) && !acl.is_attached(index + 1));
        ip(&["link", "set", "far", "up"]);
        for direction in [Ingress, Egress] {
            tests::wait_until("a live packet", Duration::from_secs(20), || {
                let counters = bed::counters(&acl);
                counters
                    .iter()
                    .any(|((way, _), count)| *way == direction && *count > 0)
            })
            .unwrap_or_else(|error| panic!("{how:?} {direction:?}: {error}"));
        }
        drop(acl);
        assert!(is_pinned(&bed.folder), "pins outlive the agent");
        detach_and_unpin("near", &bed.folder).unwrap();
        assert!(!bed.folder.exists());
        for direction in ["ingress", "egress"] {
            let shown = std::process::Command::new("tc")
                .args(["filter", "show", "dev", "near", direction])
                .output()
                .unwrap();
            assert!(
                shown.stdout.is_empty(),
                "{}",
                String::from_utf8_lossy(&shown.stdout)
            );
        }
    }
}

#[test]
fn the_next_agent_adopts_flows_policy_and_counters() {
    for how in ways() {
        let Some(bed) = Bed::make("the_next_agent_adopts") else {
            return;
        };
        let options = Options {
            how,
            ..Options::default()
        };
        let mut acl = bed.open(options);
        set(&mut acl, &mut Lowered::default(), &web());
        assert_eq!(send(&acl, Ingress, &syn(1)), OPEN);
        assert_eq!(send(&acl, Egress, &answer(1)), KNOWN);
        let counters = bed::counters(&acl);
        drop(acl);
        let mut acl = bed.open(options);
        assert_eq!(bed::counters(&acl), counters);
        assert_eq!(
            send(&acl, Ingress, &data(1)),
            KNOWN,
            "before any policy is written again"
        );
        // Nobody knows what the policy was, so everything is decided again, and still passes.
        acl.set(&lowered(&web()).0, None).unwrap();
        assert_eq!(send(&acl, Ingress, &data(1)), KNOWN);
        acl.set(&Tables::default(), None).unwrap();
        assert_eq!(
            send(&acl, Ingress, &data(1)),
            Verdict::deny(Reason::Revoked)
        );
    }
}

#[test]
fn kernel_a_new_layout_takes_over_with_the_flows_and_only_with_a_policy() {
    for how in ways() {
        let Some(bed) = Bed::make("kernel_a_new_layout_takes_over") else {
            return;
        };
        let old = Options { how, layout: 1 };
        let new = Options { how, layout: 2 };
        let mut acl = bed.open(old);
        set(&mut acl, &mut Lowered::default(), &web());
        for port in 1..100 {
            assert_eq!(send(&acl, Ingress, &syn(port)), OPEN);
            assert_eq!(send(&acl, Egress, &answer(port)), KNOWN);
        }
        let (former, next) = (
            bed.folder.join("layout-00000001"),
            bed.folder.join("layout-00000002"),
        );
        let mut upgraded = bed.open(new);
        assert!(
            former.exists() && next.exists(),
            "the old programs decide until then"
        );
        assert!(upgraded.is_attached(bed.index()));
        upgraded.set(&lowered(&web()).0, None).unwrap();
        assert!(!former.exists(), "nobody needs the old maps any more");
        for port in 1..100 {
            assert_eq!(
                send(&upgraded, Ingress, &data(port)),
                KNOWN,
                "a copied flow, not a new one"
            );
        }
    }
}

#[test]
fn a_device_that_was_made_again_is_protected_again() {
    let Some(bed) = Bed::make("a_device_that_was_made_again") else {
        return;
    };
    for how in ways() {
        let options = Options {
            how,
            ..Options::default()
        };
        let acl = bed.open(options);
        let before = bed.index();
        ip(&["link", "del", DEVICE]);
        ip(&["tuntap", "add", DEVICE, "mode", "tun"]);
        assert!(!acl.is_attached(bed.index()));
        drop(acl);
        let acl = bed.open(options);
        assert_ne!(before, bed.index());
        assert!(acl.is_attached(bed.index()));
        drop(acl);
        detach_and_unpin(DEVICE, &bed.folder).unwrap();
    }
}

#[test]
fn a_folder_that_is_no_bpffs_is_refused() {
    let Some(bed) = Bed::make("a_folder_that_is_no_bpffs") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir0");
    let opened = Acl::attach_or_adopt(DEVICE, bed.index(), &path);
    assert!(matches!(opened.err(), Some(AclError::NoBpffs { .. })));
    assert!(!path.exists());
}

fn lowered(filter: &Filter) -> (Tables, Lowered) {
    let mut lowered = Lowered::default();
    lowered
        .lower(filter, &me(BTreeSet::new()), &peers())
        .unwrap();
    (lowered.tables().clone(), lowered)
}

#[test]
fn a_flip_under_a_storm_never_mixes_two_policies() {
    let Some(bed) = Bed::make("a_flip_under_a_storm") else {
        return;
    };
    // Peer 2 may reach 80 and nothing else; then peer 3 may reach 443 and nothing else. Nobody
    // ever allows peer 2 to reach 443, but the classes of one with the ports of the other would.
    let udp = |port| [(Some(17), port, port)];
    let first = lowered(&filter(
        vec![rule("100.64.0.2/32", "100.64.0.1/32", &udp(80))],
        vec![],
    ))
    .0;
    let second = lowered(&filter(
        vec![rule("100.64.0.3/32", "100.64.0.1/32", &udp(443))],
        vec![],
    ))
    .0;
    let packet = Spec::new("100.64.0.2", "100.64.0.1", Body::Udp(7, 443)).bytes();
    let mixture = Tables {
        identities: first.identities.clone(),
        ..second.clone()
    };
    for (tables, passes) in [(&first, false), (&second, false), (&mixture, true)] {
        let twin = Twin::<0>::default();
        twin.set(tables, &Change::Swap { narrows: true });
        assert_eq!(twin.send(Ingress, &packet, 1 << 40).passes(), passes);
    }
    let flips = if std::env::var_os("WEIR_FULL").is_some() {
        200
    } else {
        24
    };
    let mut acl = bed.open(Options::default());
    acl.set(&first, None).unwrap();
    let runner = bed.open(Options::default());
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let run = runner.run(Ingress, &packet, 500).unwrap();
                    assert!(!run.passes);
                    sent.fetch_add(500, Ordering::Relaxed);
                }
            });
        }
        for flip in 0..flips {
            let tables = if flip % 2 == 0 { &second } else { &first };
            acl.set(tables, Some(&Change::Swap { narrows: true }))
                .unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let counters = bed::counters(&acl);
    assert_eq!(
        counters[&(Ingress, OPEN)],
        0,
        "a mixture of two policies let a packet through"
    );
    let denied = counters[&(Ingress, Verdict::deny(Reason::Policy))];
    println!("{flips} flips under {denied} packets");
    assert_eq!(
        denied,
        sent.load(Ordering::Relaxed),
        "every packet met a whole policy"
    );
}

/// A network of `count` peers with one address each.
fn crowd(count: u32) -> BTreeMap<NodeId, Peer> {
    let one = |number: u32| {
        let addr = Ipv4Addr::from_bits(0x6441_0000 + number).to_string();
        let peer = peer(u64::from(number), &[&addr], &[], BTreeSet::new());
        (peer.id, peer)
    };
    (0..count).map(one).collect()
}

#[test]
fn a_peer_that_joins_ten_thousand_adds_its_own_entries_in_place() {
    let Some(bed) = Bed::make("a_peer_that_joins") else {
        return;
    };
    let (mut acl, mut lowered) = (bed.open(Options::default()), Lowered::default());
    let mut peers = crowd(10_000);
    let me = me(BTreeSet::new());
    let change = lowered.lower(&web(), &me, &peers).unwrap();
    acl.set(lowered.tables(), Some(&change)).unwrap();
    let epoch = acl.epoch();
    let late = peer(20_000, &["100.66.0.1"], &[], BTreeSet::new());
    peers.insert(late.id, late);
    let change = lowered.lower(&web(), &me, &peers).unwrap();
    let Change::InPlace(patch) = &change else {
        panic!("a join is no swap: {change:?}");
    };
    // The address that it has; the rule that admits it is there.
    assert_eq!(patch.entries(), 1);
    let packet = Spec::new("100.66.0.1", "100.64.0.1", Body::Tcp(1, 80, SYN)).bytes();
    assert_eq!(
        send(&acl, Ingress, &packet),
        Verdict::deny(Reason::SourceUnknown)
    );
    let start = Instant::now();
    acl.set(lowered.tables(), Some(&change)).unwrap();
    println!(
        "one peer joined 10,000: {} entries, {:?}",
        patch.entries(),
        start.elapsed()
    );
    assert_eq!(acl.epoch(), epoch);
    assert_eq!(send(&acl, Ingress, &packet), OPEN);
}

#[test]
fn a_hundred_thousand_rules_are_swapped_in_at_once() {
    let Some(bed) = Bed::make("a_hundred_thousand_rules") else {
        return;
    };
    // The short form also runs in a kernel that interprets the programs.
    let full = std::env::var_os("WEIR_FULL").is_some();
    let (count, per_peer, bound) = if full {
        (1_000_u32, 100_u16, Duration::from_secs(1))
    } else {
        (500, 40, Duration::from_secs(10))
    };
    let peers = crowd(count);
    let mut rules = Vec::new();
    for (number, peer) in (0_u16..).zip(peers.values()) {
        for step in 0..per_peer {
            // Its own ports for each peer: no two share a class or a port set.
            let port = 1_000 + number + 600 * step % 60_000;
            let service = [(Some(6), port, port)];
            rules.push(rule(
                &format!("{}/32", peer.addrs[0]),
                "100.64.0.1/32",
                &service,
            ));
        }
    }
    let total = rules.len();
    let policy = filter(rules, vec![]);
    let (mut acl, mut lowered) = (bed.open(Options::default()), Lowered::default());
    let start = Instant::now();
    let change = lowered
        .lower(&policy, &me(BTreeSet::new()), &peers)
        .unwrap();
    let lowering = start.elapsed();
    let start = Instant::now();
    acl.set(lowered.tables(), Some(&change)).unwrap();
    let swap = start.elapsed();
    let entries = lowered.tables().entries();
    println!("{total} rules: lowered in {lowering:?} to {entries} entries, swapped in {swap:?}");
    assert!(swap < bound, "swapped in {swap:?}");
    let probe = Spec::new("100.65.0.0", "100.64.0.1", Body::Tcp(1, 1_600, SYN)).bytes();
    assert_eq!(send(&acl, Ingress, &probe), OPEN);
}

#[test]
fn a_policy_that_is_too_large_is_refused_and_the_old_one_stays() {
    let Some(bed) = Bed::make("a_policy_that_is_too_large") else {
        return;
    };
    let (mut acl, mut lowered) = (bed.open(Options::default()), Lowered::default());
    set(&mut acl, &mut lowered, &web());
    let (epoch, before) = (acl.epoch(), lowered.tables().clone());
    let mut large = peers();
    for (number, peer) in (0_u32..).zip(crowd(40).into_values()) {
        let routes = (0..1_000).map(|step| {
            let first = Ipv4Addr::from_bits(0x0a00_0000 + (number * 1_000 + step) * 256);
            format!("{first}/24").parse().unwrap()
        });
        let routes = routes.collect();
        large.insert(NodeId(peer.id.0 + 100), Peer { routes, ..peer });
    }
    let error = lowered
        .lower(&web(), &me(BTreeSet::new()), &large)
        .unwrap_err();
    assert_eq!(error.limit, MAX_PREFIXES);
    assert_eq!(*lowered.tables(), before);
    assert_eq!(acl.epoch(), epoch);
    assert_eq!(send(&acl, Ingress, &syn(1)), OPEN);
}
