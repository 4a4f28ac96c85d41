//! Lab tests: whole networks of the real binaries, on real kernel WireGuard.
//!
//! Each test draws its topology at its head. All of them need root and a kernel with WireGuard:
//! `cargo xtask test --tier lab` finds one. Nothing is shared between tests, so they may run in
//! any number of guests at once. A test that fails leaves `results/NAME` with all logs, captures
//! and tables.

mod asleep;
mod bare;
mod control;
mod enforcement;
mod explain;
mod faults;
mod forged;
mod guard;
mod hardship;
mod kernel_model;
mod kernel_scenarios;
mod lifetime;
mod main_job;
mod monitor;
mod mtu;
mod nats;
mod outside;
mod portmap;
mod proxy;
mod refusal;
mod relays;
mod revocation;
mod roaming;
mod sites;
mod state;
mod traces;
mod units;
mod wire;

use std::net::IpAddr;

use tests::mesh::{Join, Mesh, Node};
use tests::probe::{Expectation, Question, Talk, disagreements};

/// A policy that three hosts use: `a` belongs to ana, `b` is a server, `c` is something else.
/// Each direction between any two of them has something that is permitted or nothing at all.
const POLICY: &str = r#"{
  "tagOwners": {"tag:server": ["ana@example.com"], "tag:other": ["ana@example.com"]},
  "acls": [
    {"action": "accept", "src": ["ana@example.com"], "dst": ["tag:server:80,81"]},
    {"action": "accept", "proto": "udp", "src": ["tag:server"], "dst": ["tag:other:53"]},
    {"action": "accept", "proto": "tcp", "src": ["tag:other"], "dst": ["ana@example.com:22"]},
  ],
}"#;

/// `a`, `b` and `c` as [`POLICY`] means them.
const TRIO: &[Join<'static>] = &[
    Join {
        host: "a",
        owner: "--user ana@example.com",
        routes: "",
    },
    Join {
        host: "b",
        owner: "--tag tag:server",
        routes: "",
    },
    Join {
        host: "c",
        owner: "--tag tag:other",
        routes: "",
    },
];

/// The question whether `from` can start a talk with `to` at one of its addresses in the network.
fn ask(from: &Node, to: &Node, dst: IpAddr, talk: Talk) -> Question {
    Question {
        from: from.host.clone(),
        to: to.host.clone(),
        dst,
        talk,
    }
}

/// Expectations for both address families of `to`.
fn expect(
    mesh: &Mesh,
    from: &str,
    to: &str,
    talks: &[(Talk, bool)],
) -> anyhow::Result<Vec<Expectation>> {
    let (from, to) = (mesh.node(from), mesh.node(to));
    let mut expectations = Vec::new();
    for dst in [to.v4()?, to.v6()?] {
        for &(talk, expected) in talks {
            expectations.push((ask(&from, &to, dst, talk), expected));
        }
    }
    Ok(expectations)
}

/// Asserts that every question is answered as expected.
#[track_caller]
fn assert_answers(expectations: &[Expectation]) {
    let wrong = disagreements(expectations).expect("probes can be set up");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
