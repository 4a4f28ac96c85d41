use super::*;
use crate::local::report::{Acl, Counter, GuardCount, Interface, Matched, RuleRef, Way};
use proto::id::{Generation, NodeId};
use proto::key::NodeKey;
use proto::net::Protocol;
use std::collections::BTreeSet;

fn up() -> Status {
    Status {
        phase: Phase::Up,
        interface: Interface {
            name: "weir0".to_owned(),
            up: true,
            listen_port: Some(51820),
            mtu: Some(1420),
            addrs: vec!["100.64.0.3".parse().unwrap(), "fd7a::3".parse().unwrap()],
            outside: vec!["192.0.2.1".parse().unwrap()],
        },
        node: Some(Node {
            id: NodeId(3),
            name: "web-1".to_owned(),
            key: NodeKey([7; 32]),
            owner: Owner::Tags(BTreeSet::from(["tag:web".to_owned()])),
            addrs: vec!["100.64.0.3".parse().unwrap(), "fd7a::3".parse().unwrap()],
            network: "home".to_owned(),
            v4: "100.64.0.0/10".parse().unwrap(),
            v6: "fd7a::/48".parse().unwrap(),
            advertised_routes: [
                "10.1.0.0/24".parse().unwrap(),
                "10.2.0.0/24".parse().unwrap(),
            ]
            .into(),
            approved_routes: ["10.1.0.0/24".parse().unwrap()].into(),
        }),
        coordinator: Coordinator {
            address: Some("192.0.2.1:8443".to_owned()),
            connected: false,
            why: Some("the coordinator fell silent".to_owned()),
            retry_in_seconds: Some(4),
            proxy: None,
        },
        generation: Some(Generation(17)),
        epoch: Some(2),
        acl: Acl {
            attached: true,
            hook: Some("tcx".to_owned()),
            why: None,
            shields_up: false,
            refuse: Refuse::Answer,
        },
        guard: vec![Guarded {
            interface: "eth0".to_owned(),
            hook: "xdp".to_owned(),
        }],
        peers: 1,
        active: vec![PeerStatus {
            way: Way::Relayed,
            relay: Some("near".to_owned()),
            ..peer()
        }],
        problems: vec![Problem {
            code: "route_overlap".to_owned(),
            message: "10.9.0.0/24 of lab-r overlaps a route of this machine".to_owned(),
            next: "Remove one of the two.".to_owned(),
        }],
    }
}

fn peer() -> PeerStatus {
    PeerStatus {
        id: NodeId(4),
        name: "db".to_owned(),
        addrs: vec!["100.64.0.4".parse().unwrap()],
        key: NodeKey([8; 32]),
        owner: Owner::User("ana@example.com".to_owned()),
        routes: BTreeSet::new(),
        online: true,
        endpoint: Some("[2001:db8::4]:51820".parse().unwrap()),
        handshake_seconds: Some(65),
        rx_bytes: 1536,
        tx_bytes: 12,
        rx_bytes_per_second: 2_048,
        tx_bytes_per_second: 0,
        way: Way::Direct,
        relay: None,
        rtt_us: Some(1_240),
        path_mtu: Some(1_500),
        mtu: 1_440,
    }
}

#[test]
fn a_status_reads_like_this() {
    let want = "\
web-1 is up in network home.
  device       weir0 is up, UDP port 51820, MTU 1420
  addresses    100.64.0.3, fd7a::3
  outside      192.0.2.1: coordinator or relay in a peer's subnet, reached beside the tunnel
  owner        tag:web
  routes       10.1.0.0/24, 10.2.0.0/24 (waits for `weir-coordinator route approve web-1 10.2.0.0/24`)
  policy       enforced by tcx programs, epoch 2
  guard        on eth0 (xdp)
  netmap       generation 17, 1 peer
  coordinator  192.0.2.1:8443, not connected: the coordinator fell silent (again in 4 s)
  IN USE  PATH                         RX/S     TX/S
  db      by relay near, 1.24 ms away  2.0 KiB  0 B

Problems:
  - 10.9.0.0/24 of lab-r overlaps a route of this machine
    Remove one of the two.
";
    assert_eq!(status_text(&up()), want);
}

#[test]
fn a_status_before_joining_reads_like_this() {
    let status = Status {
        phase: Phase::NotJoined,
        interface: Interface {
            up: false,
            listen_port: None,
            mtu: None,
            addrs: Vec::new(),
            outside: Vec::new(),
            ..up().interface
        },
        node: None,
        coordinator: Coordinator {
            address: None,
            connected: false,
            why: None,
            retry_in_seconds: None,
            proxy: None,
        },
        generation: None,
        epoch: None,
        acl: Acl {
            attached: false,
            hook: None,
            why: None,
            shields_up: true,
            refuse: Refuse::Drop,
        },
        guard: Vec::new(),
        peers: 0,
        active: Vec::new(),
        problems: Vec::new(),
    };
    let want = "\
This machine is not in a network. `weir up --token-file FILE` joins one.
  device       weir0 is not up
  policy       nothing to enforce while the device is not up
  shields      up: nothing that others begin is let in (`weir set --shields-up=false`)
  refusals     silent (`weir set --refuse=answer`)
  coordinator  none yet
";
    assert_eq!(status_text(&status), want);
    assert!(!status.is_ready());
    assert!(up().is_ready());
}

#[test]
fn peers_line_up() {
    let other = PeerStatus {
        name: "a-long-name".to_owned(),
        endpoint: None,
        handshake_seconds: None,
        online: false,
        ..peer()
    };
    let want = "\
NAME         ADDRESSES   OWNER            ENDPOINT             HANDSHAKE  RX       TX    ROUTES
db           100.64.0.4  ana@example.com  [2001:db8::4]:51820  65 s ago   1.5 KiB  12 B  -
a-long-name  100.64.0.4  ana@example.com  -                    offline    1.5 KiB  12 B  -
";
    assert_eq!(peers_text(&[peer(), other]), want);
}

#[test]
fn an_explanation_reads_like_this() {
    let end = |addr: &str, node: Option<&str>| End {
        addr: addr.parse().unwrap(),
        node: node.map(str::to_owned),
    };
    let explanation = Explanation {
        src: end("fd7a::3", Some("web-1")),
        dst: end("fd7a::4", None),
        protocol: Protocol::TCP,
        port: Some(443),
        direction: Some(Direction::Egress),
        verdict: Verdict::Accept,
        reason: "new".to_owned(),
        rule: Some(RuleRef { index: 2, line: 17 }),
        matched: Some(Matched {
            src: "tag:web".to_owned(),
            dst: "*".to_owned(),
        }),
        near: Vec::new(),
        sentences: vec!["Entry 2 of the policy, at line 17, allows it.".to_owned()],
    };
    let want = "\
ACCEPT tcp fd7a::3 (web-1) -> [fd7a::4]:443, going out: new
  Entry 2 of the policy, at line 17, allows it.
";
    assert_eq!(explanation_text(&explanation), want);
}

#[test]
fn counters_that_never_counted_are_left_out() {
    let counter = |reason: &str, packets| Counter {
        direction: Direction::Ingress,
        verdict: Verdict::Deny,
        reason: reason.to_owned(),
        packets,
    };
    let want = "\
DIRECTION  VERDICT  REASON  PACKETS
ingress    deny     policy  5
";
    let of = |counters: &[Counter], sent, guarded, events_lost| {
        let answers = [("sent", sent), ("limited", 0)].map(|(outcome, packets)| Answers {
            outcome: outcome.to_owned(),
            packets,
        });
        counters_text(&Counters {
            counters: counters.to_vec(),
            answers: answers.to_vec(),
            guard: vec![GuardCount {
                verdict: Verdict::Deny,
                outcome: "prefix_limit".to_owned(),
                packets: guarded,
            }],
            events_lost,
        })
    };
    let some = |counters: &[Counter], sent, guarded| of(counters, sent, guarded, 0);
    let both = [counter("policy", 5), counter("spoofed", 0)];
    assert_eq!(some(&both, 0, 0), want);
    assert!(some(&both, 7, 0).ends_with("egress     answer   sent    7\n"));
    assert!(some(&both, 0, 9).ends_with("guard      deny     prefix_limit  9\n"));
    assert!(some(&[counter("policy", 0)], 0, 0).starts_with("No packet"));
    let lost = "Events of 3 dropped packets found no reader (`weir monitor`); the packets are \
                counted above.\n";
    assert_eq!(of(&both, 0, 0, 3), format!("{want}{lost}"));
}

#[test]
fn sizes_and_ages_are_short() {
    for (size, text) in [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_572_864, "1.5 MiB"),
        (u64::MAX, "15.9 EiB"),
    ] {
        assert_eq!(bytes(size), text);
    }
    for (seconds, text) in [
        (0, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7200, "2 h"),
        (u64::MAX, "213503982334601 d"),
    ] {
        assert_eq!(age(seconds), text);
    }
}
