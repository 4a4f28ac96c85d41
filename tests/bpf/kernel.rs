//! The loaded programs decide as the evaluator on the host does: verdict and reason.

use super::bed::{self, Bed};
use super::craft::Spec;
use super::generate::{self, Random};
use super::property::abi_direction;
use super::twin::Twin;
use agent::kernel::bpf::Options;
use ebpf::abi::{Flow, FlowKey};
use engine::acl::Acl as Lowered;
use proto::filter::Direction;
use std::collections::BTreeMap;

/// Packets of one story, under three policies.
const PACKETS: u64 = 300;
/// Refused packets that may come again.
const REFUSED: usize = 16;

#[test]
fn kernels_decide_every_packet_as_the_evaluator_on_the_host() {
    let Some(bed) = Bed::make("kernels_decide_as_the_host") else {
        return;
    };
    let full = std::env::var_os("WEIR_FULL").is_some();
    let emulated = std::env::var("WEIR_VM").is_ok_and(|machine| machine == "tcg");
    let stories = match (full, emulated) {
        (true, _) => 100,
        (false, false) => 12,
        // Loading the programs anew for each takes ten seconds there.
        (false, true) => 1,
    };
    let mut passed = 0_u64;
    for seed in 0..stories {
        let mut random = Random(1_000 + seed);
        let mut acl = bed.open(Options::default());
        let (twin, mut lowered) = (Twin::<0>::default(), Lowered::default());
        let mut sent = Vec::new();
        let mut refused: Vec<(Direction, Spec)> = Vec::new();
        for step in 0..PACKETS {
            if step % 100 == 20 {
                let world = generate::world(&mut random);
                let change = lowered
                    .lower(&world.filter, &world.me, &world.peers)
                    .unwrap();
                twin.set(lowered.tables(), &change);
                acl.set(lowered.tables(), Some(&change)).unwrap();
            }
            // Some come again, soon and late: what the programs remember must still be right.
            let (way, spec) = match refused.len() {
                0 => generate::packet(&mut random, &mut sent),
                _ if random.one_in(3) => random.pick(&refused).clone(),
                _ => generate::packet(&mut random, &mut sent),
            };
            let (direction, bytes) = (abi_direction(way), spec.bytes());
            let on_host = twin.send(direction, &bytes, 1 << 40);
            let in_kernel = bed::send(&acl, direction, &bytes);
            assert_eq!(
                on_host, in_kernel,
                "seed {seed}, packet {step}: {direction:?} {spec:?}"
            );
            if in_kernel.passes() {
                passed += 1;
                generate::passed(&mut sent, way, &spec);
            } else {
                refused.insert(0, (way, spec));
                refused.truncate(REFUSED);
            }
        }
        // Where flows are kept depends on the limits, which the twin has smaller.
        let about = |flow: &Flow| (flow.flags, flow.initiator, flow.share, flow.epoch);
        let loaded = acl.flows(usize::MAX).unwrap();
        let loaded: BTreeMap<FlowKey, _> = loaded
            .iter()
            .map(|(_, key, flow)| (*key, about(flow)))
            .collect();
        let flows = twin.flows.borrow();
        let host: BTreeMap<FlowKey, _> = flows
            .iter()
            .map(|((_, key), flow)| (*key, about(flow)))
            .collect();
        assert_eq!(host, loaded, "seed {seed}: the flows that are left");
        drop(acl);
        agent::kernel::bpf::detach_and_unpin(bed::DEVICE, &bed.folder).unwrap();
    }
    assert!(
        passed * 10 > stories * PACKETS,
        "too few packets passed to prove much: {passed}"
    );
}
