//! What `explain` says is what the loaded program does: random policies × first packets.

use super::bed::Bed;
use super::craft::{Body, Spec};
use super::generate::{self, Random};
use super::property::abi_direction;
use agent::kernel::bpf::{First, Options};
use engine::acl::Acl as Lowered;
use proto::filter::Direction;
use proto::net::Protocol;
use std::time::Instant;

/// Packets under one policy: few enough that many policies are met, many enough that writing them
/// is not what takes the time.
const STORY: u64 = 400;
/// Source ports begin here; nothing is sent to them.
const FRESH: u16 = 20_000;
const FRESH_PORTS: u64 = 10_000;

fn packets() -> u64 {
    if std::env::var_os("WEIR_FULL").is_some() {
        1_000_000
    } else {
        10_000
    }
}

/// The question that `weir explain` puts for such a packet.
fn question(direction: Direction, spec: &Spec) -> First {
    let port = match spec.body {
        Body::Tcp(_, port, _) | Body::Udp(_, port) | Body::Sctp(_, port, _) => port,
        Body::Echo(..) | Body::Icmp(_) | Body::Error(_) | Body::Other(_) => 0,
    };
    First {
        src: spec.src,
        dst: spec.dst,
        protocol: spec.protocol(),
        port,
        direction: abi_direction(direction),
    }
}

#[test]
fn explain_says_of_every_first_packet_what_the_loaded_program_does() {
    let name = "explain_says_of_every_first_packet_what_the_loaded_program_does";
    let Some(bed) = Bed::make(name) else {
        return;
    };
    let (mut random, begun) = (Random(77), Instant::now());
    let (mut acl, mut lowered) = (bed.open(Options::default()), Lowered::default());
    let (mut allowed, mut named, total) = (0_u64, 0_u64, packets());
    for story in 0..total / STORY {
        let world = generate::world(&mut random);
        let change = lowered
            .lower(&world.filter, &world.me, &world.peers)
            .unwrap();
        acl.set(lowered.tables(), Some(&change)).unwrap();
        let view = acl.view();
        for step in story * STORY..(story + 1) * STORY {
            let fresh = FRESH + u16::try_from(step % FRESH_PORTS).unwrap();
            let (direction, spec) = generate::first(&mut random, fresh);
            let question = question(direction, &spec);
            let said = view.explain(&question);
            let run = acl.run(question.direction, &spec.bytes(), 1).unwrap();
            assert_eq!(
                said.passes(),
                run.passes,
                "packet {step}: {said:?}, but the program did otherwise: {direction:?} {spec:?}"
            );
            // A rule is named exactly for what passes.
            let First { src, dst, port, .. } = question;
            let protocol = Protocol(question.protocol);
            let rules = lowered.allowing(direction, src, dst, protocol, port);
            if said.passes() {
                allowed += 1;
                let rule = rules.first().expect("what passes is allowed by a rule");
                assert!(
                    lowered.matched(rule, src, dst).is_some(),
                    "{spec:?} by {rule:?}"
                );
            } else if said.reason() == Some(ebpf::reason::Reason::Policy) {
                assert!(rules.is_empty(), "{spec:?} by {rules:?}");
                let flow = engine::acl::Flow {
                    src,
                    dst,
                    protocol,
                    port,
                };
                named += u64::from(!lowered.near(direction, &flow, 1).is_empty());
            }
        }
    }
    let took = begun.elapsed();
    println!("{total} packets in {took:?}: {allowed} allowed, {named} denied with a near miss");
    assert!(
        allowed * 12 > total,
        "too few are allowed to prove much: {allowed}"
    );
    assert!(named * 20 > total, "too few come close: {named}");
}
