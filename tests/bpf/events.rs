//! What the loaded programs tell of dropped packets.

use super::bed;
use super::craft::{ACK, Body, FIN, SYN, Spec};
use super::semantics::usual_bed;
use agent::kernel::bpf::Acl;
use ebpf::abi::Direction::{self, Egress, Ingress};
use ebpf::abi::{Dropped, EVENT_BYTES, known, side};
use ebpf::event::EVENTS_PER_WINDOW;
use ebpf::reason::Reason;
use ebpf::verdict::Verdict;
use std::net::IpAddr;
use std::time::{Duration, Instant};

const PEER: &str = "100.64.0.2";
const US: &str = "100.64.0.1";

fn reason(event: &Dropped) -> Option<Reason> {
    Verdict::from_code(u32::from(event.verdict)).reason()
}

fn ends(event: &Dropped) -> (IpAddr, IpAddr) {
    (event.src.into(), event.dst.into())
}

#[test]
fn kernel_programs_tell_who_was_dropped_and_why_and_nothing_of_what_passes() {
    let Some((_bed, mut acl, _)) = usual_bed("kernel_events") else {
        return;
    };
    assert!(acl.drops().unwrap().is_empty());
    let send = |acl: &_, direction, spec: &Spec| bed::send(acl, direction, &spec.bytes());
    let syn = Spec::new(PEER, US, Body::Tcp(900, 80, SYN));
    assert!(send(&acl, Ingress, &syn).passes());
    assert!(acl.drops().unwrap().is_empty(), "nothing of what passes");

    let denied = Spec::new(PEER, US, Body::Tcp(901, 81, SYN));
    for _ in 0..3 {
        assert!(!send(&acl, Ingress, &denied).passes());
    }
    let told = acl.drops().unwrap();
    // A window may end in between, on a slow machine.
    assert!((1..=3).contains(&told.len()), "{told:?}");
    let (age, event) = told[0];
    assert!(age.as_secs() < 60, "{age:?}");
    assert_eq!(ends(&event), (PEER.parse().unwrap(), US.parse().unwrap()));
    assert_eq!((event.src_port, event.dst_port), (901, 81));
    assert_eq!((event.protocol, event.tcp_flags), (6, SYN));
    assert_eq!(reason(&event), Some(Reason::Policy));
    assert_eq!(event.direction, Ingress as u8);
    assert_eq!(event.len as usize, denied.bytes().len());
    assert_eq!((event.known, event.icmp_type), (known::ALL, 0));
    assert_eq!(u32::from(event.src_side), side::PEER);
    assert_eq!(u32::from(event.dst_side), side::OWN);
    assert!(event.src_class > 0 && event.dst_class > 0);

    // An answer to nothing has a type; somebody unknown has no class.
    let reply = Spec::new(US, "100.64.0.77", Body::Echo(false, 5));
    assert!(!send(&acl, Egress, &reply).passes());
    let (_, event) = *acl.drops().unwrap().last().unwrap();
    assert_eq!((event.protocol, event.icmp_type), (1, 0));
    assert_eq!(
        (event.direction, event.dst_side, event.dst_class),
        (Egress as u8, 0, 0)
    );

    // What cannot be read tells no more than its addresses, whatever was there before.
    let mut short = denied.bytes();
    short.truncate(30);
    short[3] = 30;
    assert_eq!(
        bed::send(&acl, Ingress, &short),
        Verdict::deny(Reason::Truncated)
    );
    let (_, event) = *acl.drops().unwrap().last().unwrap();
    assert_eq!(reason(&event), Some(Reason::Truncated));
    assert_eq!(
        (event.known, event.src_port, event.dst_port),
        (known::ADDRESSES, 0, 0)
    );
    assert_eq!(ends(&event), (PEER.parse().unwrap(), US.parse().unwrap()));
    let mut odd = denied.bytes();
    odd[0] = 0x35;
    assert_eq!(
        bed::send(&acl, Ingress, &odd),
        Verdict::deny(Reason::IpVersion)
    );
    let (_, event) = *acl.drops().unwrap().last().unwrap();
    assert_eq!((event.known, event.protocol), (known::NOTHING, 0));
    let later = Spec::new(PEER, US, Body::Udp(1, 2)).part(9, 1480, false);
    assert!(!send(&acl, Ingress, &later).passes());
    let (_, event) = *acl.drops().unwrap().last().unwrap();
    assert_eq!((event.known, event.protocol), (known::LATER_FRAGMENT, 17));
}

#[test]
fn events_of_a_flood_are_few_and_leave_other_reasons_their_say() {
    let Some((_bed, mut acl, _)) = usual_bed("events_of_a_flood") else {
        return;
    };
    const PORTS: u16 = 3_000;
    let before = bed::counters(&acl)[&(Ingress, Verdict::deny(Reason::Policy))];
    for port in 0..PORTS {
        let spec = Spec::new(PEER, US, Body::Udp(7, 10_000 + port));
        assert!(!acl.run(Ingress, &spec.bytes(), 1).unwrap().passes);
    }
    let after = bed::counters(&acl)[&(Ingress, Verdict::deny(Reason::Policy))];
    assert_eq!(after - before, u64::from(PORTS), "all are counted");
    let told = acl.drops().unwrap();
    // So many a window and CPU, and one kind of packet no more than once in each.
    let mut windows: Vec<u32> = told
        .iter()
        .map(|(_, event)| ebpf::event::window(event.time_ns))
        .collect();
    windows.dedup();
    let cpus = std::thread::available_parallelism().unwrap().get();
    let most = windows.len() * cpus * EVENTS_PER_WINDOW as usize;
    assert!(
        (1..=most).contains(&told.len()),
        "{} of at most {most}",
        told.len()
    );
    // Another reason has its own say in the same window.
    let ack = Spec::new(PEER, US, Body::Tcp(3, 80, SYN | ACK));
    assert!(!acl.run(Ingress, &ack.bytes(), 1).unwrap().passes);
    let told = acl.drops().unwrap();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(reason(&told[0].1), Some(Reason::TcpNoFlow));
}

/// Bytes that the kernel puts before each entry of a ring buffer.
const HEADER: usize = 8;
/// Each CPU tells a few events of each outcome a second; this is many times what the rest takes.
const FILLED_WITHIN: Duration = Duration::from_secs(60);

/// Packets that are dropped for many outcomes, each of a kind by its port.
fn of_many_outcomes(port: u16) -> Vec<(Direction, Spec)> {
    let tcp = |src, dst, flags| Spec::new(src, dst, Body::Tcp(7, port, flags));
    let udp = |src, dst| Spec::new(src, dst, Body::Udp(7, port));
    let mut all = vec![
        (Ingress, udp(US, US)),
        (Ingress, udp("100.64.0.77", US)),
        (Ingress, udp(PEER, "100.64.0.77")),
        (Egress, udp(US, "100.64.0.77")),
    ];
    for (direction, src, dst) in [(Ingress, PEER, US), (Egress, US, PEER)] {
        all.extend([
            (direction, udp(src, dst)),
            (direction, tcp(src, dst, SYN | ACK)),
            (direction, tcp(src, dst, SYN | FIN)),
            (direction, Spec::new(src, dst, Body::Sctp(7, port, 0))),
        ]);
    }
    all
}

#[test]
fn events_that_find_the_buffer_full_are_counted() {
    let Some((_bed, mut acl, _)) = usual_bed("events_that_find_the_buffer_full") else {
        return;
    };
    assert_eq!(acl.lost().unwrap(), 0);
    let run = |acl: &Acl, direction, spec: &Spec| {
        assert!(
            !acl.run(direction, &spec.bytes(), 1).unwrap().passes,
            "{spec:?}"
        );
    };
    let begun = Instant::now();
    for port in (10_000..60_000).cycle() {
        for (direction, spec) in of_many_outcomes(port) {
            run(&acl, direction, &spec);
        }
        if acl.lost().unwrap() > 0 {
            break;
        }
        assert!(begun.elapsed() < FILLED_WITHIN, "the buffer is not full");
    }
    // Of an outcome that had no say yet, so that each of these is told of.
    const MORE: u16 = 10;
    let before = acl.lost().unwrap();
    for port in 1..=MORE {
        let forged = Spec::new(PEER, PEER, Body::Udp(7, port));
        run(&acl, Egress, &forged);
    }
    assert_eq!(acl.lost().unwrap() - before, u64::from(MORE));
    // What was there is kept, nothing in it is overwritten.
    let kept = acl.drops().unwrap();
    assert_eq!(
        kept.len(),
        EVENT_BYTES as usize / (size_of::<Dropped>() + HEADER)
    );
    assert!(
        kept.iter()
            .all(|(_, event)| reason(event) != Some(Reason::SourceForged)
                || event.direction == Ingress as u8)
    );
    run(&acl, Egress, &Spec::new(PEER, PEER, Body::Udp(7, MORE + 1)));
    assert_eq!(acl.drops().unwrap().len(), 1, "there is room again");
    assert_eq!(acl.lost().unwrap() - before, u64::from(MORE));
}
