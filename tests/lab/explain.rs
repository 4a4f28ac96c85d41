//! `weir explain` and the wire agree: random questions under a random policy, answered by both
//! ends' explanations and by real connections.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use agent::local::report::{Explanation, Verdict};
use agent::local::{Explain, Request, Response, ask};
use anyhow::bail;
use proto::net::Protocol;
use tests::lab::Lab;
use tests::mesh::{Mesh, Node};
use tests::probe::{Expectation, Talk, disagreements};
use tests::topology::Topology;

use crate::TRIO;

/// Connections that are tried.
const ATTEMPTS: usize = 200;
/// How many at a time.
const BATCH: usize = 100;
/// Ports that policy and questions are about.
const PORTS: std::ops::Range<u64> = 7000..7024;
/// Rules of the policy.
const RULES: usize = 12;
const PATIENCE: Duration = Duration::from_secs(20);

/// Numbers from a seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[usize::try_from(self.below(from.len() as u64)).unwrap_or_default()]
    }

    fn port(&mut self) -> u64 {
        PORTS.start + self.below(PORTS.end - PORTS.start)
    }
}

/// Who a, b and c belong to.
const OWNERS: [&str; 3] = ["ana@example.com", "tag:server", "tag:other"];

/// Random rules, each on a line of its own, and how many peers they give to each of the three.
fn policy(random: &mut Random) -> (String, [usize; 3]) {
    let (mut rules, mut pairs) = (String::new(), BTreeSet::new());
    for _ in 0..RULES {
        let proto = random.pick(&["\"proto\": \"tcp\", ", "\"proto\": \"udp\", ", ""]);
        let src = *random.pick(&[OWNERS[0], OWNERS[1], OWNERS[2], "*"]);
        let dst = *random.pick(&OWNERS);
        for one in OWNERS.into_iter().filter(|one| src == "*" || src == *one) {
            pairs.extend([(one, dst), (dst, one)]);
        }
        let first = random.port();
        let ports = format!("{first}-{},{}", first + random.below(16), random.port());
        rules += &format!(
            "    {{\"action\": \"accept\", {proto}\"src\": [\"{src}\"], \"dst\": [\"{dst}:{ports}\"]}},\n"
        );
    }
    let policy = format!(
        "{{\n  \"tagOwners\": {{\"tag:server\": [], \"tag:other\": []}},\n  \"acls\": [\n{rules}  ],\n}}"
    );
    let peers = OWNERS.map(|one| {
        let others = OWNERS.into_iter().filter(|other| *other != one);
        others
            .filter(|other| pairs.contains(&(one, *other)))
            .count()
    });
    (policy, peers)
}

fn explain(at: &Node, src: IpAddr, dst: IpAddr, talk: Talk) -> anyhow::Result<Explanation> {
    let (protocol, port) = match talk {
        Talk::Tcp(port) => (Protocol::TCP, port),
        Talk::Udp(port) => (Protocol::UDP, port),
        other => bail!("{other:?} is not asked here"),
    };
    let request = Request::Explain(Explain {
        src: src.to_string(),
        dst: dst.to_string(),
        port: Some(port),
        protocol,
    });
    match ask(&at.host.folder.join("run/weir.sock"), request, PATIENCE)? {
        Response::Explanation(explanation) => Ok(*explanation),
        other => bail!("{other:?}"),
    }
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn what_both_ends_explain_is_what_a_connection_meets() -> anyhow::Result<()> {
    let lab = Lab::new("explain", &Topology::star(&["a", "b", "c"]))?;
    let mut random = Random(0x7765_6972);
    let (policy, [a, b, c]) = policy(&mut random);
    let mesh = Mesh::start(&lab, &policy, TRIO)?;
    mesh.settled(&[("a", a), ("b", b), ("c", c)])?;
    let nodes = ["a", "b", "c"].map(|name| mesh.node(name));
    let mut addrs = Vec::new();
    for node in &nodes {
        addrs.push([node.v4()?, node.v6()?]);
    }
    let mut met = [0_usize; 2];
    for _ in 0..ATTEMPTS / BATCH {
        // One listener a port and address.
        let (mut taken, mut expectations) = (BTreeSet::new(), Vec::<Expectation>::new());
        while expectations.len() < BATCH {
            let (from, to) = (random.below(3) as usize, random.below(3) as usize);
            let family = random.below(2) as usize;
            let port = u16::try_from(random.port())?;
            let talk = *random.pick(&[Talk::Tcp(port), Talk::Udp(port)]);
            if from == to || !taken.insert((to, family, talk)) {
                continue;
            }
            let (src, dst) = (addrs[from][family], addrs[to][family]);
            let sender = explain(&nodes[from], src, dst, talk)?;
            let receiver = explain(&nodes[to], src, dst, talk)?;
            let allowed = [&sender, &receiver].map(|said| said.verdict == Verdict::Accept);
            assert_eq!(allowed[0], allowed[1], "{policy}\n{sender:?}\n{receiver:?}");
            assert_eq!(sender.rule, receiver.rule, "{policy}");
            assert_eq!(sender.matched, receiver.matched, "{policy}");
            met[usize::from(allowed[0])] += 1;
            let question = crate::ask(&nodes[from], &nodes[to], dst, talk);
            expectations.push((question, allowed[0]));
        }
        let wrong = disagreements(&expectations)?;
        assert!(wrong.is_empty(), "{policy}\n{}", wrong.join("\n"));
    }
    println!("{} denied and {} allowed, as explained", met[0], met[1]);
    assert!(
        met.iter().all(|count| *count > ATTEMPTS / 10),
        "{met:?} proves little"
    );
    lab.passed();
    Ok(())
}
