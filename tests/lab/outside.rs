//! A subnet route that contains what the tunnel itself needs: coordinator, relay, STUN server.
//!
//! ```text
//!                       near relay   desk   hub   b
//!  a 192.0.2.11            │          │      │    │
//!  └──┬── internet ── gate ┴──────────┴──────┴────┴── site 203.0.113.0/24
//! ```
//!
//! b offers all of its site, and a takes it. No UDP passes between a and b, so the tunnel hangs on
//! the very relay that the route contains. Every host has strict `rp_filter`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Join, Mesh, Node, SPREAD_BOUND};
use tests::probe::{PASS_BOUND, Question, Talk, passes};
use tests::stream::Numbered;
use tests::topology::Topology;
use tests::wait_until;

const POLICY: &str = r#"{"acls": [
  {"action": "accept", "src": ["*"], "dst": ["*:*", "203.0.113.0/24:*", "2001:db8:5::/64:*"]},
]}"#;
/// Longest outage of traffic that nothing happened to.
const UNTOUCHED: Duration = Duration::from_millis(500);
/// Longest outage when the agent is killed and restarted: as in `relays.rs`.
const RESTARTED: Duration = Duration::from_secs(9);

fn topology() -> Topology {
    let gate = [
        ("internet", "192.0.2.1/24 2001:db8::1/64"),
        ("site", "203.0.113.1/24 2001:db8:5::1/64"),
    ];
    let mut topology = Topology::new()
        .switch("internet")
        .switch("site")
        .host("gate", &gate)
        .host("a", &[("internet", "192.0.2.11/24 2001:db8::11/64")])
        .route("default", "192.0.2.1")
        .route("default", "2001:db8::1");
    for (name, last) in [("hub", 5), ("near", 6), ("b", 12), ("desk", 20)] {
        let addrs = format!("203.0.113.{last}/24 2001:db8:5::{last}/64");
        topology = topology
            .host(name, &[("site", &addrs)])
            .route("default", "203.0.113.1")
            .route("default", "2001:db8:5::1");
    }
    topology
}

fn join(host: &'static str) -> Join<'static> {
    Join {
        host,
        owner: "--user ana@example.com",
        routes: "",
    }
}

/// By which device a host reaches an address.
fn device(host: &Host, dst: IpAddr) -> anyhow::Result<String> {
    let route = host.run(&format!("ip route get {dst}"))?.stdout;
    let device = route.split_once(" dev ").map(|(_, rest)| rest);
    let device = device.and_then(|rest| rest.split_whitespace().next());
    Ok(device.unwrap_or_default().to_owned())
}

/// See the module. And when desk is a node too, it meets b directly in their LAN, which b offers.
#[test]
fn a_route_around_coordinator_and_relay_cuts_nobody_off() -> anyhow::Result<()> {
    let lab = Lab::new("outside", &topology())?;
    for host in lab.hosts().values() {
        host.run("sysctl -q -w net.ipv4.conf.all.rp_filter=1")?;
    }
    for family in ["ipv4.ip_forward", "ipv6.conf.all.forwarding"] {
        let on = format!("sysctl -q -w net.{family}=1");
        lab.host("gate").run(&on)?;
        lab.host("b").run(&on)?;
    }
    let cut = "table inet cut { chain over { type filter hook forward priority 0;
      ip saddr { 192.0.2.11, 203.0.113.12 } ip daddr { 192.0.2.11, 203.0.113.12 } meta l4proto udp drop
      ip6 saddr { 2001:db8::11, 2001:db8:5::12 } ip6 daddr { 2001:db8::11, 2001:db8:5::12 } meta l4proto udp drop
    }; }\n";
    lab.host("gate").run_with("nft -f -", cut)?;
    let mut mesh = Mesh::with_relays(&lab, POLICY, &["near"], &["a", "b"].map(join))?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let stream = || Numbered::start(&a.host, &b.host, b.v4()?, 7);
    let talk = stream()?;
    talk.flows(20)?;

    b.weir("up --advertise-routes 203.0.113.0/24,2001:db8:5::/64")?;
    for route in ["203.0.113.0/24", "2001:db8:5::/64"] {
        mesh.coordinator
            .admin(&format!("route approve b {route}"))?;
    }
    let desk = lab.host("desk");
    for dst in [desk.v4(), desk.v6()] {
        let leads = || device(&a.host, dst).is_ok_and(|device| device == "weir0");
        wait_until("a has the route", SPREAD_BOUND, leads)?;
    }
    talk.flows(200)?;
    let losses = talk.end()?;
    println!("the route came: {losses:?}");
    ensure!(losses.outage() <= UNTOUCHED, "the route came: {losses:?}");
    parted(&lab, &a)?;
    for (addr, router) in [(a.v4()?, "203.0.113.12"), (a.v6()?, "2001:db8:5::12")] {
        let back = format!("{addr} via {router}\n");
        desk.ip(&format!("route add {back}"))?;
        let dst = if addr.is_ipv4() { desk.v4() } else { desk.v6() };
        ensure!(ping(&a, &desk, dst)?, "{dst} does not answer");
        desk.ip(&format!("route del {back}"))?;
    }

    // What the coordinator says still comes, and the agent comes again.
    mesh.join(&lab, &[join("desk")])?;
    mesh.settled(&[("a", 2), ("b", 2), ("desk", 2)])?;
    let talk = stream()?;
    talk.flows(20)?;
    a.kill();
    a.restart()?;
    talk.flows(200)?;
    let losses = talk.end()?;
    println!("the agent is killed and restarted: {losses:?}");
    ensure!(losses.outage() <= RESTARTED, "{losses:?}");
    a.until("a is connected again", |status| {
        status["coordinator"]["connected"] == true
    })?;
    parted(&lab, &a)?;

    meet(&mesh.node("desk"), &b)?;
    lab.passed();
    Ok(())
}

/// Waits until desk reaches b in their LAN.
fn meet(desk: &Node, b: &Node) -> anyhow::Result<()> {
    ensure!(ping(desk, &b.host, b.v4()?)?, "b does not answer desk");
    let key = b.public_key()?;
    wait_until("desk meets b in their LAN", SPREAD_BOUND, || {
        let shown = desk.host.run("wg show weir0 endpoints");
        shown.is_ok_and(|shown| {
            let mut rows = shown.stdout.lines();
            rows.any(|row| {
                row.starts_with(&key)
                    && (row.contains("203.0.113.12:") || row.contains("[2001:db8:5::12]:"))
            })
        })
    })
}

fn ping(from: &Node, to: &Arc<Host>, dst: IpAddr) -> anyhow::Result<bool> {
    let question = Question {
        from: Arc::clone(&from.host),
        to: Arc::clone(to),
        dst,
        talk: Talk::Ping,
    };
    passes(&question, PASS_BOUND)
}

/// What the site's machines are reached by, and the servers among them.
fn parted(lab: &Lab, a: &Node) -> anyhow::Result<()> {
    // Nobody named the servers' IPv6 addresses.
    for (name, by) in [("hub", "eth0"), ("near", "eth0"), ("desk", "weir0")] {
        let server = lab.host(name);
        for (dst, by) in [(server.v4(), by), (server.v6(), "weir0")] {
            let device = device(&a.host, dst)?;
            ensure!(device == by, "{dst} by {device}");
        }
    }
    let status = a.status()?;
    let outside = &status["interface"]["outside"];
    let named = serde_json::json!(["203.0.113.5", "203.0.113.6"]);
    ensure!(*outside == named, "{outside}");
    Ok(())
}
