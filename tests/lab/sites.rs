//! Subnet routers: two LANs joined through the tunnel, with the policy applied to their machines.

use std::net::{SocketAddr, TcpStream};

use anyhow::ensure;
use serde_json::Value;
use tests::lab::Lab;
use tests::mesh::{Join, Mesh, Node, SPREAD_BOUND};
use tests::probe::{PASS_BOUND, Question, Talk};
use tests::snapshot::Snapshot;
use tests::topology::Topology;
use tests::wait_until;

use crate::assert_answers;

pub const POLICY: &str = r#"{
  "tagOwners": {"tag:site": ["ana@example.com"]},
  "hosts": {
    "paris-v4": "10.1.0.0/24", "paris-v6": "fd01::/64",
    "oslo-v4": "10.2.0.2", "oslo-v6": "fd02::2",
  },
  "acls": [
    {"action": "accept", "src": ["paris-v4"], "dst": ["oslo-v4:443"]},
    {"action": "accept", "src": ["paris-v6"], "dst": ["oslo-v6:443"]},
  ],
}"#;

pub const SITES: &[Join<'static>] = &[
    Join {
        host: "paris",
        owner: "--tag tag:site",
        routes: "10.1.0.0/24,fd01::/64",
    },
    Join {
        host: "oslo",
        owner: "--tag tag:site",
        routes: "10.2.0.0/24,fd02::/64",
    },
];

/// A router whose host has rules, routes and a second network of its own.
///
/// ```text
///  hub            paris-desk  paris-guest           oslo-desk
///   │             10.1.0.2    10.3.0.2              10.2.0.2
///   │                │           │                     │
///   │             paris-lan   guests                oslo-lan
///   │                │ .1        │ .1                  │ .1
///   │                └── paris ──┘                    oslo
///   │                     │ 192.0.2.21                 │ 192.0.2.22
///  ─┴─────────────────────┴────────────────────────────┴── internet
/// ```
pub fn topology() -> Topology {
    Topology::star(&[])
        .switch("paris-lan")
        .switch("guests")
        .switch("oslo-lan")
        .host(
            "paris",
            &[
                ("internet", "192.0.2.21/24 2001:db8::21/64"),
                ("paris-lan", "10.1.0.1/24 fd01::1/64"),
                ("guests", "10.3.0.1/24 fd03::1/64"),
            ],
        )
        .host("paris-desk", &[("paris-lan", "10.1.0.2/24 fd01::2/64")])
        .route("default", "10.1.0.1")
        .route("default", "fd01::1")
        .host("paris-guest", &[("guests", "10.3.0.2/24 fd03::2/64")])
        .route("default", "10.3.0.1")
        .route("default", "fd03::1")
        .host(
            "oslo",
            &[
                ("internet", "192.0.2.22/24 2001:db8::22/64"),
                ("oslo-lan", "10.2.0.1/24 fd02::1/64"),
            ],
        )
        .host("oslo-desk", &[("oslo-lan", "10.2.0.2/24 fd02::2/64")])
        .route("default", "10.2.0.1")
        .route("default", "fd02::1")
}

/// Waits until the routers have each other's routes, and each knows of its own.
pub fn routed(mesh: &Mesh) -> anyhow::Result<()> {
    for (router, routes) in [
        ("paris", ["10.2.0.0/24", "fd02::/64"]),
        ("oslo", ["10.1.0.0/24", "fd01::/64"]),
    ] {
        let host = &mesh.node(router).host;
        for route in routes {
            let shown = || host.output(&format!("ip route get {}", within(route)));
            let ready = || shown().is_ok_and(|output| output.stdout.contains("dev weir0"));
            wait_until(&format!("{router} routes {route}"), SPREAD_BOUND, ready)?;
        }
    }
    // The way there does not say that anything passes: a router lets in what is for its own LAN only
    // once it has heard itself that the LAN's routes are approved, and what comes before is dropped.
    // It is up whether or not the machine forwards IPv6.
    let known = |router: &str| -> anyhow::Result<_> {
        let status = mesh.node(router).weir("status --json")?.json()?;
        let own = status["node"]["approved_routes"].as_array().map(Vec::len);
        let done = status["phase"] == "up" && own == Some(2);
        Ok(done.then(|| status["generation"].clone()))
    };
    wait_until("both routers know the same", SPREAD_BOUND, || {
        let [one, other] = ["paris", "oslo"].map(|router| known(router).ok().flatten());
        one.is_some() && one == other
    })
}

/// Some address in a prefix of these tests.
fn within(prefix: &str) -> String {
    let base = prefix.split('/').next().unwrap_or_default();
    base.strip_suffix(".0")
        .map_or_else(|| format!("{base}2"), |net| format!("{net}.2"))
}

/// See [`topology`].
#[test]
fn lan_to_lan_passes_as_policy_says_with_real_sources() -> anyhow::Result<()> {
    let lab = Lab::new("sites", &topology())?;
    // IPv6 has no forwarding of one interface before Linux 6.17: the switch for all is the
    // administrator's to turn, and the agent only says that it is off.
    for router in ["paris", "oslo"] {
        lab.host(router)
            .run("sysctl -q -w net.ipv6.conf.all.forwarding=1")?;
    }
    let mesh = Mesh::start(&lab, POLICY, SITES)?;
    routed(&mesh)?;
    let (desk, guest, files) = (
        lab.host("paris-desk"),
        lab.host("paris-guest"),
        lab.host("oslo-desk"),
    );
    let question =
        |from: &std::sync::Arc<_>, to: &std::sync::Arc<tests::host::Host>, dst, talk| Question {
            from: std::sync::Arc::clone(from),
            to: std::sync::Arc::clone(to),
            dst,
            talk,
        };
    let mut all = Vec::new();
    for (there, here) in [(files.v4(), desk.v4()), (files.v6(), desk.v6())] {
        all.push((question(&desk, &files, there, Talk::Tcp(443)), true));
        all.push((question(&desk, &files, there, Talk::Udp(443)), true));
        all.push((question(&desk, &files, there, Talk::Tcp(22)), false));
        all.push((question(&files, &desk, here, Talk::Tcp(443)), false));
        all.push((question(&files, &desk, here, Talk::Ping), false));
        // A third network behind the same router, which nobody offered.
        all.push((question(&guest, &files, there, Talk::Tcp(444)), false));
    }
    assert_answers(&all);
    for there in [files.v4(), files.v6()] {
        let listener = files.listen(there, 443)?;
        let target = SocketAddr::new(there, 443);
        let stream = desk.enter(|| TcpStream::connect_timeout(&target, PASS_BOUND))?;
        let (_, source) = listener.accept()?;
        assert_eq!(source, stream.local_addr()?);
    }
    lab.passed();
    Ok(())
}

/// See [`topology`]. The host has a firewall, routes and rules of its own; after `down` it is as
/// before, and while the agent runs only what is ours has changed.
#[test]
fn a_router_changes_only_its_own_and_leaves_the_host_as_it_was() -> anyhow::Result<()> {
    let lab = Lab::new("router_host", &topology())?;
    let host = lab.host("paris");
    host.run_with(
        "nft -f -",
        "table inet mine { chain input { type filter hook input priority 0; tcp dport 9 drop; }; }\n",
    )?;
    host.ip(
        "route add 198.51.100.0/24 via 192.0.2.22\nrule add from 203.0.113.7 lookup 77\n\
         route add default via 192.0.2.22 table 77",
    )?;
    host.run("ip link add wg-mine type wireguard")?;
    let before = foreign(&Snapshot::of(&host)?.changes(&Snapshot::of(&host)?));
    assert_eq!(
        before,
        Vec::<String>::new(),
        "a snapshot is equal to the next"
    );
    let before = Snapshot::of(&host)?;

    let mesh = Mesh::start(&lab, POLICY, SITES)?;
    routed(&mesh)?;
    let during = Snapshot::of(&host)?;
    let changes = foreign(&before.changes(&during));
    // Forwarding on the LAN's interface is what routing needs; nothing on the guests' network.
    // That redirects are off everywhere is WireGuard's own doing: wg_open in the kernel's
    // drivers/net/wireguard/device.c.
    let allowed = |line: &String| {
        line.contains("forwarding") && line.contains(".eth1.")
            || line.contains("net.ipv4.conf.all.send_redirects")
    };
    let others: Vec<_> = changes.iter().filter(|line| !allowed(line)).collect();
    assert!(others.is_empty(), "{others:#?}");
    for family in ["ipv4", "ipv6"] {
        let global = host.run(&format!("sysctl -n net.{family}.conf.eth2.forwarding"))?;
        assert_eq!(
            global.stdout.trim(),
            "0",
            "{family} forwarding on the guests' network"
        );
    }

    up_in_spite_of_ipv6(&mesh.node("paris"))?;

    mesh.node("paris").weir("down")?;
    let after = Snapshot::of(&host)?;
    let changes: Vec<_> = before
        .changes(&after)
        .into_iter()
        .filter(|line| !line.contains("bpf "))
        .collect();
    assert_eq!(changes, Vec::<String>::new());
    lab.passed();
    Ok(())
}

/// Nobody turned IPv6 forwarding on: the router is up all the same, and names each side that does
/// not forward, once.
fn up_in_spite_of_ipv6(router: &Node) -> anyhow::Result<()> {
    let own_switch = "test -e /proc/sys/net/ipv6/conf/eth1/force_forwarding";
    let sides: &[&str] = match router.host.output(own_switch)?.code {
        0 => &[],
        _ => &["eth1", "the tunnel"],
    };
    let problems = |status: &Value| status["problems"].as_array().cloned().unwrap_or_default();
    let status = router.until("every side is named", |status| {
        problems(status).len() >= sides.len()
    })?;
    ensure!(status["phase"] == "up", "{status:#}");
    ensure!(status["interface"]["up"] == true, "{status:#}");
    ensure!(status["acl"]["attached"] == true, "{status:#}");
    let name = |problem: &Value| {
        let [code, message] =
            ["code", "message"].map(|field| problem[field].as_str().unwrap_or_default());
        let what = message.split(": ").next().unwrap_or_default();
        format!("{code}: {what}")
    };
    let mut named: Vec<String> = problems(&status).iter().map(name).collect();
    named.sort();
    let wanted = sides
        .iter()
        .map(|side| format!("forwarding_v6: could not forward IPv6 from {side}"));
    let wanted: Vec<String> = wanted.collect();
    ensure!(named == wanted, "{named:?}");
    Ok(())
}

/// Changes that do not name our device, our pins, or the kernel's list of BPF objects.
fn foreign(changes: &[String]) -> Vec<String> {
    let ours = |line: &&String| line.contains("weir") || line.contains(" bpf ");
    changes.iter().filter(|line| !ours(line)).cloned().collect()
}
