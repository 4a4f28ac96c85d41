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
use tests::mesh::{Join, Mesh, Node};
use tests::stream::{longest_pause, trickle};
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

/// Whether the whole table is asked for.
fn is_full() -> bool {
    std::env::var_os("WEIR_FULL").is_some()
}

/// One of each kind, of which each differs from the one before in what the ends' own links take;
/// or the whole table.
fn cases() -> Vec<Case> {
    use Underlay::{V4, V6};
    if !is_full() {
        return vec![(V6, 1_280, 9_000), (V6, 1_492, 1_500), (V4, 9_000, 9_000)];
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

/// Nodes a and b, with a relay, on a path as the first case has it.
fn build(first: Case) -> anyhow::Result<(Lab, Mesh)> {
    let lab = Lab::without_captures("mtu", &topology())?;
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
    narrow(&lab, first.1, first.2)?;
    blacken(&lab, first)?;
    let join = |host| Join {
        host,
        owner: "--user ana@example.com",
        routes: "",
    };
    let mesh = Mesh::with_relays(&lab, POLICY, &["hub"], &["a", "b"].map(join))?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    Ok((lab, mesh))
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
    let cases = cases();
    let (lab, mesh) = build(cases[0])?;
    let mut table = String::from(
        "underlay  takes  ends  v4 route  v6 route (mss)  known after  transfers  fragments\n",
    );
    for (number, case) in cases.into_iter().enumerate() {
        if number > 0 {
            become_one_of(&lab, &mesh, case)?;
        }
        let row = pass(&lab, &mesh, case).with_context(|| format!("{case:?}"))?;
        writeln!(table, "{row}")?;
    }
    println!("{table}");
    shrink(&lab, &mesh)?;
    lab.passed();
    Ok(())
}

/// Makes another path of it. Agents that are to know nothing of the one before begin anew; the
/// others see that their own links changed.
fn become_one_of(lab: &Lab, mesh: &Mesh, case: Case) -> anyhow::Result<()> {
    let nodes = ["a", "b"].map(|name| mesh.node(name));
    if is_full() {
        nodes
            .iter()
            .try_for_each(|node| node.weir("down").map(drop))?;
    }
    narrow(lab, case.1, case.2)?;
    blacken(lab, case)?;
    if is_full() {
        nodes
            .iter()
            .try_for_each(|node| node.weir("up").map(drop))?;
    }
    Ok(())
}

/// The figure is found, routes say it, and transfers pass at full length, uncut. Returns a row of
/// the table.
fn pass(lab: &Lab, mesh: &Mesh, (underlay, takes, ends): Case) -> anyhow::Result<String> {
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let start = Instant::now();
    until_known(mesh, takes)?;
    let known = start.elapsed();
    let overhead = if underlay == Underlay::V4 { 60 } else { 80 };
    let inner = takes - overhead;
    let mss = (inner < 1_280).then_some(inner / 16 * 16 - 60);
    for (one, other) in [(&a, &b), (&b, &a)] {
        let v4 = route(&one.host, other.v4()?)?;
        ensure!(v4 == (inner, None), "{v4:?}");
        let v6 = route(&one.host, other.v6()?)?;
        ensure!(v6 == (inner.max(1_280), mss), "{v6:?}");
    }
    let start = Instant::now();
    for dst in [b.v4()?, b.v6()?] {
        transfer(&a.host, &b.host, dst)?;
    }
    let took = start.elapsed();
    let mut fragments = 0;
    for router in ["r1", "r2"] {
        fragments += counted(lab, router, "fragments")?;
        let whole = counted(lab, router, "whole")?;
        ensure!(whole > TRANSFER / 9_000, "{whole} packets at {router}");
        let longest = counted(lab, router, "longest")?;
        ensure!(longest > 20, "{longest} of {takes} bytes at {router}");
    }
    ensure!(fragments == 0, "{fragments} fragments");
    let mss = mss.map_or(String::new(), |mss| format!(" ({mss})"));
    let v6 = format!("{}{mss}", inner.max(1_280));
    Ok(format!(
        "{underlay:?} {takes:>12} {ends:>5} {inner:>9} {v6:>15}  {known:>11.2?} {took:>10.2?} \
         {fragments:>10}"
    ))
}

/// A transfer is under way in one direction, and nothing else goes to that peer, when the path of
/// the last case comes to take less.
fn shrink(lab: &Lab, mesh: &Mesh) -> anyhow::Result<()> {
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let ends = cases().pop().context("there are some")?.2;
    let dst = b.v4()?;
    let listener = b.host.listen(dst, 81)?;
    let connect = || TcpStream::connect_timeout(&(dst, 81).into(), HANG);
    let mut stream = a.host.enter(connect)?;
    let (over, arrived) = (AtomicBool::new(false), AtomicU64::new(0));
    let longest = std::thread::scope(|scope| -> anyhow::Result<Duration> {
        let sender = scope.spawn(|| trickle(&mut stream, HANG, &over));
        let receiver = scope.spawn(|| {
            let (stream, _) = listener.accept()?;
            longest_pause(stream, HANG, &arrived)
        });
        let more = |what: &str| {
            let from = arrived.load(Ordering::Relaxed);
            let went = || arrived.load(Ordering::Relaxed) > from + (1 << 20);
            wait_until(what, HANG, went)
        };
        let went = more("the transfer is under way").and_then(|()| {
            narrow(lab, 1_400, ends)?;
            more("it goes on through the narrow path")?;
            until_known(mesh, 1_400)
        });
        over.store(true, Ordering::Relaxed);
        went?;
        sender.join().expect("it does not panic")?;
        receiver.join().expect("it does not panic")
    })?;
    println!("under a transfer the path comes to take 1,400 bytes: a pause of {longest:.2?}");
    ensure!(longest <= RECOVERED, "{longest:?}");
    Ok(())
}
