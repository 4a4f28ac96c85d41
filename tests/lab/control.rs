//! The coordinator as the nodes see it: gone, back, and changing its mind.

use std::time::Duration;

use tests::lab::Lab;
use tests::mesh::{Coordinator, Mesh, Node};
use tests::probe::Talk;
use tests::stream::Numbered;
use tests::topology::Topology;
use tests::wait_until;

use crate::lifetime::{forget_session, handshake};
use crate::{POLICY, TRIO, assert_answers, expect};

/// How soon a removed node is out of its peers' kernels.
const REMOVAL_BOUND: Duration = Duration::from_secs(5);

/// Two nodes forget the session that they have, agree on a new one, as two do that never spoke, and
/// go on speaking.
fn open_anew(from: &Node, to: &Node) -> anyhow::Result<Numbered> {
    let (near, far) = (from.public_key()?, to.public_key()?);
    forget_session(from, &far)?;
    forget_session(to, &near)?;
    let stream = Numbered::start(&from.host, &to.host, to.v4()?, 53)?;
    assert_ne!(handshake(from, &far)?, 0, "a new session");
    Ok(stream)
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn with_the_coordinator_gone_flows_go_on_and_new_sessions_open() -> anyhow::Result<()> {
    let lab = Lab::new("coordinator_gone", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let fresh = expect(
        &mesh,
        "b",
        "c",
        &[(Talk::Udp(53), true), (Talk::Tcp(53), false)],
    )?;
    let stream = Numbered::start(&a.host, &b.host, b.v4()?, 80)?;
    stream.flows(20)?;
    mesh.coordinator.kill();
    a.until("the agent notices", |status| {
        status["coordinator"]["connected"] == false
    })?;
    let why = a.status()?["coordinator"]["why"].clone();
    assert!(why.as_str().is_some_and(|why| !why.is_empty()), "{why}");
    assert_answers(&fresh);
    let opened = open_anew(&b, &mesh.node("c"))?;
    opened.flows(400)?;
    // Reading still works; changing is refused with a sentence.
    for verb in ["status", "peers", "counters", "explain a b:80"] {
        a.weir(verb)?;
    }
    let refused = mesh
        .coordinator
        .admin_with("token create --network home --tag tag:server")?;
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(!refused.stderr.is_empty());
    assert_eq!(refused.stdout, "");

    mesh.coordinator.restart()?;
    a.until("the agent is back", |status| {
        status["coordinator"]["connected"] == true
    })?;
    // It catches up with what changes now.
    mesh.coordinator
        .set_policy(&POLICY.replace("80,81", "80,81,82"))?;
    let more = expect(&mesh, "a", "b", &[(Talk::Tcp(82), true)])?;
    let generation = mesh.node("b").status()?["generation"].as_u64();
    assert!(generation.is_some());
    wait_until(
        "the new port is open at both ends",
        tests::mesh::SPREAD_BOUND,
        || {
            let explained = |node: &Node| node.weir_with("explain a b:82 --json");
            [&a, &b].into_iter().all(|node| {
                let document = explained(node).and_then(|output| output.json());
                document.is_ok_and(|document| document["verdict"] == "accept")
            })
        },
    )?;
    assert_answers(&more);
    for (which, stream) in [("old", stream), ("new", opened)] {
        let losses = stream.end()?;
        println!("the coordinator is killed, the {which} session: {losses:?}");
        assert!(losses.lost.is_empty(), "{losses:?}");
    }
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn a_removed_node_is_out_of_every_kernel_in_seconds() -> anyhow::Result<()> {
    let lab = Lab::new("node_removed", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let c = mesh.node("c").public_key()?;
    let removed = std::time::Instant::now();
    mesh.coordinator.admin("node remove c")?;
    for name in ["a", "b"] {
        let gone = || {
            mesh.node(name)
                .kernel_peers()
                .is_ok_and(|peers| !peers.contains(&c))
        };
        let left = REMOVAL_BOUND.saturating_sub(removed.elapsed());
        wait_until(&format!("{name} has forgotten c"), left, gone)?;
    }
    let told = mesh
        .node("c")
        .until("c knows that it is no node any more", |status| {
            status["problems"]
                .as_array()
                .is_some_and(|problems| !problems.is_empty())
                || status["phase"] != "up"
        })?;
    assert_eq!(told["coordinator"]["connected"], false, "{told:#}");
    lab.passed();
    Ok(())
}

/// The host has a route of its own within the network's prefix.
///
/// ```text
///  hub   a
///   │    │ 10.50.7.0/24 over eth0
///  ─┴────┴── internet
/// ```
#[test]
fn a_network_that_overlaps_a_live_route_is_refused_with_words() -> anyhow::Result<()> {
    let lab = Lab::new("overlap", &Topology::star(&["a", "b"]))?;
    let coordinator = Coordinator::start(&lab.host("hub"))?;
    coordinator.admin("network create home --v4 10.50.0.0/16 --v6 fd50::/64")?;
    coordinator.admin("user create ana@example.com --network home")?;
    coordinator.set_policy(POLICY)?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.run("ip route add 10.50.7.0/24 via 192.0.2.12")?;
    let token = "--network home --user ana@example.com";

    // The prefixes are the ones that were asked for.
    let free = Node::start(&b)?;
    free.join(&coordinator.token(token)?, "")?;
    assert!(
        free.v4()?.to_string().starts_with("10.50."),
        "{}",
        free.v4()?
    );
    assert!(
        free.v6()?.to_string().starts_with("fd50:"),
        "{}",
        free.v6()?
    );

    let node = Node::start(&a)?;
    let refused = node.host.output_with(
        &format!(
            "weir --socket {}/run/weir.sock up - --timeout 8",
            a.folder.display()
        ),
        &coordinator.token(token)?,
        Duration::from_secs(60),
    )?;
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(
        refused.stderr.contains("10.50.7.0/24"),
        "{}",
        refused.stderr
    );
    let routes = a.run("ip route")?.stdout;
    assert!(
        routes.contains("10.50.7.0/24 via 192.0.2.12 dev eth0"),
        "{routes}"
    );
    assert!(!routes.contains("weir0"), "{routes}");

    // The way out that the message offers: when the route goes, the node comes up by itself.
    a.run("ip route del 10.50.7.0/24")?;
    node.until("the node is up", |status| status["phase"] == "up")?;
    lab.passed();
    Ok(())
}
