//! How long packets may be, on paths that do not tell: a narrow link in the middle, routers there
//! that drop fragments and never say a word of it, and ends whose own links take more.
//!
//! ```text
//!  hub                 a                                      b
//!   │ .1               │ .11                                  │ .12
//!  ─┴── control ───────┴──────────────────────────────────────┴──   UDP is dropped by the ends
//!
//!           a ── left ── r1 ══ narrow ══ r2 ── right ── b           routed, IPv4 and IPv6
//! ```
//!
//! Coordinator and relay are reached by `control`, whose MTU is Ethernet's: what is narrow is the
//! direct path alone.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Coordinator, Join, Mesh, Node};
use tests::relay::{Relay, relays_section};
use tests::topology::Topology;
use tests::wait_until;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
/// From a device that comes up to a path whose MTU is known. Generous, for an emulator.
const KNOWN_BOUND: Duration = Duration::from_secs(20);
/// No byte for so long: a transfer hangs.
const HANG: Duration = Duration::from_secs(15);
/// What goes each way in one transfer.
const TRANSFER: u64 = 1 << 20;
/// The longest pause of a transfer whose path shrinks, if it is all that goes to that peer.
const RECOVERED: Duration = Duration::from_secs(8);

/// The family that WireGuard's packets take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Underlay {
    V4,
    V6,
}

/// A path: the family, what it takes, what the ends' own links take.
type Case = (Underlay, u32, u32);

/// One of each kind; the whole table with `WEIR_FULL`.
fn cases() -> Vec<Case> {
    use Underlay::{V4, V6};
    if std::env::var_os("WEIR_FULL").is_none() {
        return vec![
            (V6, 1_280, 9_000),
            (V4, 1_360, 1_500),
            (V6, 1_492, 1_500),
            (V4, 9_000, 9_000),
        ];
    }
    let mut cases = Vec::new();
    for underlay in [V4, V6] {
        for takes in [1_280, 1_360, 1_400, 1_492, 1_500, 9_000] {
            for ends in [1_500, 9_000] {
                if takes <= ends {
                    cases.push((underlay, takes, ends));
                }
            }
        }
    }
    cases
}

fn topology() -> Topology {
    let end = |topology: Topology, name: &str, switch: &str, net: u8, number: u8| {
        topology
            .host(
                name,
                &[
                    (switch, &format!("10.{net}.0.2/24 2001:db8:{net}::2/64")),
                    ("control", &format!("192.0.2.{number}/24")),
                ],
            )
            .route("10.0.0.0/8", &format!("10.{net}.0.1"))
            .route("2001:db8::/32", &format!("2001:db8:{net}::1"))
    };
    let topology = Topology::new()
        .switch("control")
        .switch("left")
        .mtu(9_000)
        .switch("narrow")
        .mtu(9_000)
        .switch("right")
        .mtu(9_000)
        .host("hub", &[("control", "192.0.2.1/24")])
        .host(
            "r1",
            &[
                ("left", "10.1.0.1/24 2001:db8:1::1/64"),
                ("narrow", "10.3.0.1/24 2001:db8:3::1/64"),
            ],
        )
        .route("10.2.0.0/24", "10.3.0.2")
        .route("2001:db8:2::/64", "2001:db8:3::2")
        .host(
            "r2",
            &[
                ("right", "10.2.0.1/24 2001:db8:2::1/64"),
                ("narrow", "10.3.0.2/24 2001:db8:3::2/64"),
            ],
        )
        .route("10.1.0.0/24", "10.3.0.1")
        .route("2001:db8:1::/64", "2001:db8:3::1");
    let topology = end(topology, "a", "left", 1, 11);
    end(topology, "b", "right", 2, 12)
}

/// Sets how long a packet the narrow link takes, and the ends' own.
fn narrow(lab: &Lab, takes: u32, ends: u32) -> anyhow::Result<()> {
    for (host, link, mtu) in [
        ("r1", "eth1", takes),
        ("r2", "eth1", takes),
        ("a", "eth0", ends),
        ("b", "eth0", ends),
    ] {
        lab.host(host).ip(&format!("link set {link} mtu {mtu}\n"))?;
    }
    Ok(())
}

/// Makes black holes of the routers, with WireGuard's packets in this family alone, and what they
/// count at nothing.
fn blacken(lab: &Lab, (underlay, takes, _): Case) -> anyhow::Result<()> {
    let other = match underlay {
        Underlay::V4 => "ipv6",
        Underlay::V6 => "ipv4",
    };
    let rules = format!(
        "table inet hole
delete table inet hole
table inet hole {{
 counter fragments {{ }}
 counter whole {{ }}
 counter longest {{ }}
 chain into {{ type filter hook prerouting priority -450; policy accept;
  ip frag-off & 0x3fff != 0 counter name fragments drop
  exthdr frag exists counter name fragments drop
 }}
 chain through {{ type filter hook forward priority filter; policy accept;
  meta nfproto {other} udp dport 51820 drop
  udp dport 51820 counter name whole
  udp dport 51820 meta length {takes} counter name longest
 }}
 chain say {{ type filter hook output priority filter; policy accept;
  icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} drop
  icmpv6 type {{ packet-too-big, destination-unreachable, time-exceeded, parameter-problem }} drop
 }}
}}
"
    );
    for router in ["r1", "r2"] {
        lab.host(router).run_with("nft -f -", &rules)?;
    }
    Ok(())
}

/// What a router counted.
fn counted(lab: &Lab, router: &str, counter: &str) -> anyhow::Result<u64> {
    let said = lab
        .host(router)
        .run(&format!("nft list counter inet hole {counter}"))?
        .stdout;
    let packets = said.split_once("packets ").context("no counter")?.1;
    let packets = packets.split_whitespace().next().unwrap_or_default();
    packets.parse().with_context(|| said.clone())
}

fn build(name: &str, relayed: bool) -> anyhow::Result<(Lab, Mesh, Option<Relay>)> {
    let lab = Lab::without_captures(name, &topology())?;
    for router in ["r1", "r2"] {
        let forward = "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1";
        lab.host(router).run(forward)?;
    }
    for end in ["a", "b"] {
        let rules = "table inet control {
 chain into { type filter hook input priority filter; policy accept;
  iifname eth1 meta l4proto udp drop
 }
}
";
        lab.host(end).run_with("nft -f -", rules)?;
    }
    let coordinator = Coordinator::start(&lab.host("hub"))?;
    coordinator.admin("network create home")?;
    coordinator.admin("user create ana@example.com --network home")?;
    coordinator.set_policy(POLICY)?;
    let mut relay = None;
    if relayed {
        let started = Relay::start(&lab.host("hub"), "hub", &coordinator)?;
        coordinator.configure(&relays_section(&[&started]))?;
        relay = Some(started);
    }
    let mut mesh = Mesh::new(coordinator);
    let join = |host| Join {
        host,
        owner: "--user ana@example.com",
        routes: "",
    };
    mesh.join(&lab, &[join("a"), join("b")])?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    Ok((lab, mesh, relay))
}

/// What `weir path` of the other end says: the way, and the path's MTU.
fn path(node: &Node, other: &str) -> anyhow::Result<(String, u64)> {
    let said = node.weir(&format!("path {other} --json"))?.json()?;
    let way = said["peer"]["way"].as_str().unwrap_or_default().to_owned();
    Ok((way, said["peer"]["path_mtu"].as_u64().unwrap_or_default()))
}

fn until_known(mesh: &Mesh, takes: u32) -> anyhow::Result<()> {
    for (name, other) in [("a", "b"), ("b", "a")] {
        let node = mesh.node(name);
        let expected = ("direct".to_owned(), u64::from(takes));
        let what = format!("{name} knows that {takes} bytes pass to {other}");
        let known = || path(&node, other).is_ok_and(|path| path == expected);
        wait_until(&what, KNOWN_BOUND, known)?;
    }
    Ok(())
}

/// What the kernel takes a route's MTU for, and the longest segment that it asks for, if a route
/// says.
fn route(host: &Host, to: IpAddr) -> anyhow::Result<(u32, Option<u32>)> {
    let said = host.run(&format!("ip route get {to}"))?.stdout;
    let number = |name: &str| {
        let mut words = said.split_whitespace().skip_while(|word| *word != name);
        words.nth(1).and_then(|word| word.parse().ok())
    };
    Ok((number("mtu").context("no mtu")?, number("advmss")))
}

/// Sends so many bytes there and back on one connection. Its end proves that all have arrived.
fn transfer(from: &Host, to: &Host, dst: IpAddr) -> anyhow::Result<()> {
    let listener = to.listen(dst, 81)?;
    let connect = || TcpStream::connect_timeout(&(dst, 81).into(), HANG);
    std::thread::scope(|scope| {
        let served = scope.spawn(move || -> anyhow::Result<()> {
            let (mut stream, _) = listener.accept()?;
            swallow(&mut stream)?;
            gush(&mut stream)
        });
        let mut stream = from.enter(connect)?;
        gush(&mut stream)?;
        swallow(&mut stream)?;
        served.join().expect("it does not panic")
    })
    .with_context(|| format!("{TRANSFER} bytes each way from {} to {dst}", from.name))
}

fn gush(stream: &mut TcpStream) -> anyhow::Result<()> {
    stream.set_write_timeout(Some(HANG))?;
    let bytes = vec![7; 1 << 16];
    for _ in 0..TRANSFER / bytes.len() as u64 {
        stream.write_all(&bytes)?;
    }
    Ok(stream.shutdown(Shutdown::Write)?)
}

fn swallow(stream: &mut TcpStream) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(HANG))?;
    let (mut bytes, mut all) = (vec![0; 1 << 16], 0);
    loop {
        match stream.read(&mut bytes)? {
            0 => break,
            length => all += length as u64,
        }
    }
    ensure!(all == TRANSFER, "{all} bytes arrived");
    Ok(())
}

#[test]
fn full_transfers_pass_black_holes_of_every_size() -> anyhow::Result<()> {
    let (lab, mesh, _) = build("mtu", false)?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let mut table = String::from(
        "underlay  takes  ends  v4 route  v6 route (mss)  known after  transfers  fragments\n",
    );
    for case in cases() {
        let (underlay, takes, ends) = case;
        a.weir("down")?;
        b.weir("down")?;
        narrow(&lab, takes, ends)?;
        blacken(&lab, case)?;
        a.weir("up")?;
        b.weir("up")?;
        let start = Instant::now();
        until_known(&mesh, takes)?;
        let known = start.elapsed();
        let overhead = if underlay == Underlay::V4 { 60 } else { 80 };
        let inner = takes - overhead;
        let mut routes = Vec::new();
        for (one, other) in [(&a, &b), (&b, &a)] {
            let v4 = route(&one.host, other.v4()?)?;
            let v6 = route(&one.host, other.v6()?)?;
            ensure!(v4.0 == inner, "{case:?}: {v4:?}");
            ensure!(v6.0 == inner.max(1_280), "{case:?}: {v6:?}");
            let mss = (inner < 1_280).then_some(inner / 16 * 16 - 60);
            ensure!(v6.1 == mss, "{case:?}: {v6:?}");
            routes = vec![v4, v6];
        }
        let start = Instant::now();
        for dst in [b.v4()?, b.v6()?] {
            transfer(&a.host, &b.host, dst).with_context(|| format!("{case:?}"))?;
        }
        let took = start.elapsed();
        let mut fragments = 0;
        for router in ["r1", "r2"] {
            fragments += counted(&lab, router, "fragments")?;
            let whole = counted(&lab, router, "whole")?;
            ensure!(whole > TRANSFER / 9_000, "{case:?}: {whole} at {router}");
            let longest = counted(&lab, router, "longest")?;
            ensure!(
                longest > 20,
                "{case:?}: {longest} of {takes} bytes at {router}"
            );
        }
        ensure!(fragments == 0, "{case:?}: {fragments} fragments");
        let v6 = match routes[1] {
            (mtu, Some(mss)) => format!("{mtu} ({mss})"),
            (mtu, None) => mtu.to_string(),
        };
        writeln!(
            table,
            "{underlay:?}        {takes:>5} {ends:>5} {:>9} {v6:>15}  {known:>11.2?} {took:>10.2?} \
             {fragments:>10}",
            routes[0].0
        )?;
    }
    println!("{table}");
    lab.passed();
    Ok(())
}

/// A transfer under way, in one direction; nothing else goes to that peer.
#[test]
fn a_path_that_shrinks_under_a_transfer_is_found_out() -> anyhow::Result<()> {
    let (lab, mesh, _relay) = build("shrinking", true)?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let case = (Underlay::V6, 1_500, 1_500);
    narrow(&lab, 1_500, 1_500)?;
    blacken(&lab, case)?;
    until_known(&mesh, 1_500)?;
    let listener = b.host.listen(b.v4()?, 81)?;
    let mut stream = a.host.enter(|| {
        TcpStream::connect_timeout(&(b.v4()?, 81).into(), HANG).map_err(anyhow::Error::from)
    })?;
    stream.set_write_timeout(Some(HANG))?;
    let (over, arrived) = (AtomicBool::new(false), AtomicU64::new(0));
    let longest = std::thread::scope(|scope| -> anyhow::Result<Duration> {
        let sender = scope.spawn(|| -> anyhow::Result<()> {
            while !over.load(Ordering::Relaxed) {
                stream.write_all(&[7; 1 << 14])?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(stream.shutdown(Shutdown::Write)?)
        });
        let receiver = scope.spawn(|| -> anyhow::Result<Duration> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(HANG))?;
            let (mut bytes, mut last) = (vec![0; 1 << 16], Instant::now());
            let mut longest = Duration::ZERO;
            loop {
                let length = stream.read(&mut bytes)?;
                (longest, last) = (longest.max(last.elapsed()), Instant::now());
                if length == 0 {
                    return Ok(longest);
                }
                arrived.fetch_add(length as u64, Ordering::Relaxed);
            }
        });
        let more = |what: &str| {
            let from = arrived.load(Ordering::Relaxed);
            wait_until(what, HANG, || {
                arrived.load(Ordering::Relaxed) > from + (1 << 20)
            })
        };
        let went = more("the transfer is under way").and_then(|()| {
            narrow(&lab, 1_400, 1_500)?;
            more("it goes on through the narrow path")?;
            until_known(&mesh, 1_400)
        });
        over.store(true, Ordering::Relaxed);
        went?;
        sender.join().expect("it does not panic")?;
        receiver.join().expect("it does not panic")
    })?;
    println!("the path takes 1,400 bytes, no longer 1,500: a pause of {longest:.2?}");
    ensure!(longest <= RECOVERED, "{longest:?}");
    lab.passed();
    Ok(())
}
