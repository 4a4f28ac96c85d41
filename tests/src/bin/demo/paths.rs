//! The scene of paths: two servers behind routers, and what happens between them when UDP is
//! blocked, a relay's region is lost, and UDP is back.

use std::time::Duration;

use anyhow::Context;
use tests::lab::Lab;
use tests::mesh::{Join, Mesh, Node};
use tests::nat::{Nat, two_lans};
use tests::stream::Numbered;
use tests::wait_until;

use crate::narrator::Stage;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
/// How long a path may take to come about, on slow machines.
const BOUND: Duration = Duration::from_secs(60);
const BLOCK: &str = "table ip blocked {
 chain through { type filter hook forward priority -200; meta l4proto udp drop; }
}
";

/// A network of its own: two servers, two relays, a coordinator.
struct World {
    lab: Lab,
    mesh: Mesh,
}

impl World {
    fn build() -> anyhow::Result<Self> {
        let lab = Lab::without_captures("demo-paths", &two_lans(&["near", "far"]))?;
        for name in ["a", "b"] {
            let router = lab.host(&format!("router-{name}"));
            Nat::PortRestricted.install(&router, lab.host(name).v4())?;
        }
        let join = |host| Join {
            host,
            owner: "--user ana@example.com",
            routes: "",
        };
        let mesh = Mesh::with_relays(&lab, POLICY, &["near", "far"], &["a", "b"].map(join))?;
        Ok(Self { lab, mesh })
    }
}

/// The way that a node's packets to its one peer take.
fn way(node: &Node) -> anyhow::Result<(String, String)> {
    let document = node.weir("peers --json")?.json()?;
    let peer = &document["peers"][0];
    let word = |field: &str| peer[field].as_str().unwrap_or_default().to_owned();
    Ok((word("way"), word("relay")))
}

/// Waits until both ends' packets go this way.
fn until(nodes: [&Node; 2], wanted: &str, not: &str) -> anyhow::Result<()> {
    let all = || {
        nodes.iter().all(|node| {
            way(node).is_ok_and(|(way, relay)| way == wanted && (relay != not || not.is_empty()))
        })
    };
    wait_until(&format!("both are {wanted}"), BOUND, all)
}

/// What was lost while `change` came about and two hundred datagrams after it.
fn count(
    stage: &mut Stage,
    nodes: [&Node; 2],
    what: &str,
    change: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<usize> {
    let [a, b] = nodes;
    let stream = Numbered::start(&a.host, &b.host, b.v4()?, 80)?;
    stream.flows(100)?;
    change()?;
    stream.flows(200)?;
    let losses = stream.end()?;
    let lost = losses.lost.len();
    let pause = losses.outage().as_secs_f64();
    stage.note(&format!(
        "{what}: {} datagrams, {lost} lost, longest pause {pause:.1} s",
        losses.sent
    ));
    Ok(lost)
}

pub fn play(stage: &mut Stage) -> anyhow::Result<String> {
    let world = World::build()?;
    let (a, b) = (world.mesh.node("a"), world.mesh.node("b"));
    let ends = [&*a, &*b];
    let output = a.weir_with("ping --until-direct b")?;
    stage.command("a", "weir ping --until-direct b", &output);
    stage.check("two routers, and a direct path", output.code == 0);
    until(ends, "direct", "")?;
    let none = count(stage, ends, "direct", || Ok(()))?;
    stage.check("nothing is lost on the direct path", none == 0);

    let router = world.lab.host("router-b");
    let blocked = count(stage, ends, "UDP is blocked, the relay takes over", || {
        router.run_with("nft -f -", BLOCK)?;
        until(ends, "relayed", "")
    })?;
    let output = a.weir("path b")?;
    stage.command("a", "weir path b", &output);
    let (_, region) = way(&a)?;
    stage.check(&format!("packets go by relay {region}"), !region.is_empty());

    let moved = count(stage, ends, &format!("region {region} is lost"), || {
        let relay = world.mesh.relays.iter().find(|relay| relay.name == region);
        relay.context("a relay of that name")?.kill();
        until(ends, "relayed", &region)
    })?;
    let (_, other) = way(&a)?;
    stage.check(&format!("they go by relay {other} now"), other != region);

    let unblocked = count(stage, ends, "UDP passes again, the path is direct", || {
        router.run("nft delete table ip blocked")?;
        until(ends, "direct", "")
    })?;
    stage.check("and nothing is lost on the way back", unblocked == 0);
    world.lab.passed();
    Ok(format!(
        "lost: {blocked} when blocked, {moved} with a region, {unblocked} back to direct"
    ))
}
