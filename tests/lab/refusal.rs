//! What an application learns when its own side refuses: at once, over real WireGuard, whether it
//! runs on the node or behind it; and that nobody else can speak with the mark of such answers.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Counters, Mesh, Node, SPREAD_BOUND};
use tests::packet;
use tests::probe::{DENY_BOUND, PASS_BOUND, Talk};
use tests::topology::Topology;
use tests::wait_until;

use crate::sites::{POLICY as SITES_POLICY, SITES, routed, topology};
use crate::{POLICY, TRIO, assert_answers, expect};

/// A refused connection attempt has failed after this long.
const AT_ONCE: Duration = Duration::from_millis(50);

/// How connecting fails, and after how long.
fn connect(from: &Host, dst: IpAddr, port: u16) -> (Option<i32>, Duration) {
    let (target, begun) = (SocketAddr::new(dst, port), Instant::now());
    let made = from.enter(|| {
        let begun = Instant::now();
        let error = TcpStream::connect_timeout(&target, DENY_BOUND).expect_err("policy denies it");
        (error.raw_os_error(), begun.elapsed())
    });
    assert!(begun.elapsed() >= made.1);
    made
}

/// The error that a datagram brings back to its socket.
fn ask(from: &Host, dst: IpAddr, port: u16) -> anyhow::Result<Option<i32>> {
    let socket = from.udp(packet::unspecified(dst), 0)?;
    socket.connect((dst, port))?;
    socket.set_read_timeout(Some(DENY_BOUND))?;
    socket.send(b"may I?")?;
    let error = socket.recv(&mut [0; 8]).expect_err("policy denies it");
    let silent = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    Ok(error.raw_os_error().filter(|_| !silent))
}

/// What Linux makes of "administratively prohibited" (net/ipv4/icmp.c, net/ipv6/icmp.c).
fn prohibited(dst: IpAddr) -> i32 {
    if dst.is_ipv4() {
        libc::EHOSTUNREACH
    } else {
        libc::EACCES
    }
}

fn assert_refused_at_once(from: &Host, dst: IpAddr, port: u16) -> anyhow::Result<()> {
    // The first one may find the code cold; every one after it counts, and it too must be refused.
    let (error, _) = connect(from, dst, port);
    assert_eq!(error, Some(libc::ECONNREFUSED), "{dst}");
    for _ in 0..5 {
        let (error, took) = connect(from, dst, port);
        assert_eq!(error, Some(libc::ECONNREFUSED), "{dst}");
        assert!(took <= AT_ONCE, "{dst} took {took:?}");
    }
    assert_eq!(ask(from, dst, port)?, Some(prohibited(dst)), "{dst}");
    Ok(())
}

fn denied(counters: &Counters, direction: &str) -> u64 {
    let prefix = format!("{direction}/deny/");
    let denied = counters.iter().filter(|(key, _)| key.starts_with(&prefix));
    denied.map(|(_, packets)| packets).sum()
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn a_refused_connection_fails_within_50_ms_with_the_agent_dead_too() -> anyhow::Result<()> {
    let lab = Lab::new("refusal", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let there = [b.v4()?, b.v6()?];
    let before = denied(&b.counters()?, "ingress");
    for dst in there {
        let dropped = denied(&a.counters()?, "egress");
        let answered = a.answers()?["sent"];
        assert_refused_at_once(&a.host, dst, 22)?;
        assert_eq!(denied(&a.counters()?, "egress"), dropped + 7, "{dst}");
        assert_eq!(a.answers()?["sent"], answered + 7, "{dst}");
    }
    a.kill();
    for dst in there {
        assert_refused_at_once(&a.host, dst, 22)?;
    }
    a.restart()?;
    a.until("it is up again", |status| status["phase"] == "up")?;

    // Off: silence, and it stays so through a restart.
    a.weir("set --refuse=drop")?;
    a.kill();
    a.restart()?;
    let again = a.until("it is up once more", |status| status["phase"] == "up")?;
    assert_eq!(again["acl"]["refuse"], "drop");
    let answered = a.answers()?["sent"];
    for dst in there {
        let (error, took) = connect(&a.host, dst, 22);
        assert!(error.is_none() && took >= DENY_BOUND, "{error:?} {took:?}");
        assert_eq!(ask(&a.host, dst, 22)?, None);
    }
    assert_eq!(a.answers()?["sent"], answered);
    a.weir("set --refuse=answer")?;
    assert_refused_at_once(&a.host, there[0], 22)?;
    assert_eq!(
        denied(&b.counters()?, "ingress"),
        before,
        "b saw none of it"
    );
    assert_eq!(a.answers()?["failed"], 0);
    assert_answers(&expect(&mesh, "a", "b", &[(Talk::Tcp(80), true)])?);
    lab.passed();
    Ok(())
}

/// A connection that is written to as fast as it takes it: the kernel makes packets of many
/// segments. Returns when the writer learns that it is over, and how.
fn bulk(from: &Host, to: &Host, dst: IpAddr) -> anyhow::Result<Bulk> {
    let listener = to.listen(dst, 80)?;
    let target = SocketAddr::new(dst, 80);
    let mut near = from.enter(|| TcpStream::connect_timeout(&target, PASS_BOUND))?;
    let (mut far, _) = listener.accept()?;
    std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 20];
        while matches!(far.read(&mut bytes), Ok(1..)) {}
    });
    Ok(std::thread::spawn(move || {
        let bytes = vec![7; 1 << 20];
        let error = loop {
            if let Err(error) = near.write_all(&bytes) {
                break error.kind();
            }
        };
        (error, Instant::now())
    }))
}

/// Bytes of a packet between hosts, at most.
const WIRE_MTU: u64 = 1_500;

type Bulk = std::thread::JoinHandle<(ErrorKind, Instant)>;

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn a_sender_of_bulk_data_learns_at_once_that_its_rule_is_gone() -> anyhow::Result<()> {
    const BOUND: Duration = Duration::from_secs(2);
    let lab = Lab::new("refusal_bulk", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let writers = [b.v4()?, b.v6()?].map(|dst| bulk(&a.host, &b.host, dst));
    // Until data really flows.
    let bytes = || -> anyhow::Result<u64> {
        let peers = a.weir("peers --json")?.json()?;
        let rows = peers["peers"].as_array().context("a list")?;
        Ok(rows.iter().filter_map(|row| row["tx_bytes"].as_u64()).sum())
    };
    wait_until("megabytes have gone", SPREAD_BOUND, || {
        bytes().is_ok_and(|bytes| bytes > 8 << 20)
    })?;
    // What is to be reset are packets of many segments: the programs count each as one.
    let sent = bytes()?;
    let seen = a.counters()?["egress/accept/established"];
    let each = sent / seen.max(1);
    assert!(each > 4 * WIRE_MTU, "{seen} packets of {each} bytes");
    mesh.coordinator
        .set_policy(&POLICY.replace("tag:server:80,81", "tag:server:81"))?;
    let at = Instant::now();
    for writer in writers {
        let ended = writer?.join();
        let (error, when) = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let late = when.saturating_duration_since(at);
        let reset = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error);
        assert!(reset && late < BOUND, "{error:?} after {late:?}");
    }
    let answers = a.answers()?;
    assert!(
        answers["sent"] >= 2 && answers["failed"] == 0,
        "{answers:?}"
    );
    lab.passed();
    Ok(())
}

/// See [`topology`]: paris-desk knows nothing of weir, and is told by its router.
#[test]
fn a_machine_behind_a_router_is_told_too() -> anyhow::Result<()> {
    let lab = Lab::new("refusal_forwarded", &topology())?;
    for router in ["paris", "oslo"] {
        lab.host(router)
            .run("sysctl -q -w net.ipv6.conf.all.forwarding=1")?;
    }
    let mesh = Mesh::start(&lab, SITES_POLICY, SITES)?;
    routed(&mesh)?;
    let (desk, files) = (lab.host("paris-desk"), lab.host("oslo-desk"));
    let paris = mesh.node("paris");
    for dst in [files.v4(), files.v6()] {
        assert_refused_at_once(&desk, dst, 22)?;
    }
    assert_answers_are_whole(&paris, &desk, files.v4())?;
    assert_eq!(paris.answers()?["failed"], 0);
    lab.passed();
    Ok(())
}

/// Forwarded packets may still have a checksum that a device is to complete. WireGuard completes it
/// itself, so answers that go home through a bare tunnel show whether that promise was taken back:
/// if not, two bytes are written where the checksum of the *refused* packet would be.
fn assert_answers_are_whole(paris: &Node, desk: &Host, dst: IpAddr) -> anyhow::Result<()> {
    let keys = [&*paris.host, desk].map(|host| -> anyhow::Result<(String, String)> {
        let key = host.run("wg genkey")?.stdout;
        let public = host.run_with("wg pubkey", &key)?.stdout.trim().to_owned();
        Ok((key, public))
    });
    let [paris_key, desk_key] = keys;
    let ((paris_key, paris_public), (desk_key, desk_public)) = (paris_key?, desk_key?);
    for (host, key, peer) in [
        (
            &*paris.host,
            &paris_key,
            format!("peer {desk_public} endpoint 10.1.0.9:5182 allowed-ips 10.1.0.2/32"),
        ),
        (
            desk,
            &desk_key,
            format!("peer {paris_public} endpoint 10.1.0.1:5182 allowed-ips 0.0.0.0/0"),
        ),
    ] {
        host.run("ip link add home type wireguard")?;
        host.run_with(
            &format!("wg set home listen-port 5182 private-key /dev/stdin {peer}"),
            key,
        )?;
        host.run("ip link set home up")?;
        for device in ["all", "default", "eth0", "eth1", "home"] {
            // Not every host has every device.
            host.output(&format!("sysctl -q -w net.ipv4.conf.{device}.rp_filter=0"))?;
        }
    }
    desk.run("ip addr add 10.1.0.9/24 dev eth0")?;
    paris.host.run("ip route add 10.1.0.2/32 dev home")?;
    for (number, attempt) in [(packet::ICMP, false), (packet::TCP, true)] {
        let ears = desk.enter(|| packet::raw_socket(dst, number))?;
        ears.set_read_timeout(Some(PASS_BOUND))?;
        if attempt {
            connect(desk, dst, 22);
        } else {
            ask(desk, dst, 22)?;
        }
        let mut bytes = [0; 256];
        let (length, from) = ears.recv_from(&mut bytes)?;
        assert_eq!(from.ip(), dst);
        let body = &bytes[20..length];
        if !attempt {
            assert_eq!((body[0], body[1], &body[4..8]), (3, 13, &[0; 4][..]));
        }
        assert!(
            packet::is_whole(&bytes[..length]),
            "{:02x?}",
            &bytes[..length]
        );
    }
    Ok(())
}

/// The mark by which a node's programs know their own answers: only root there can read it.
fn mark(node: &Node) -> anyhow::Result<u32> {
    let layouts = std::fs::read_dir(node.host.folder.join("bpf/weir/weir0"))?;
    let mut maps = layouts.filter_map(|entry| Some(entry.ok()?.path().join("MARK")));
    let map = maps
        .find(|path| path.exists())
        .context("a map of the mark")?;
    let line = format!("bpftool -j map dump pinned {}", map.display());
    let dump = node.host.run(&line)?.json()?;
    let bytes = dump[0]["value"].as_array().context("a value")?;
    let byte = |value: &serde_json::Value| {
        let text = value.as_str()?.trim_start_matches("0x");
        u8::from_str_radix(text, 16).ok()
    };
    let bytes: Vec<u8> = bytes.iter().filter_map(byte).collect();
    Ok(u32::from_ne_bytes(bytes.as_slice().try_into()?))
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
///
/// a has no programs any more, knows b's mark, and puts it on all that it sends, inside the tunnel
/// and out; b's own firewall puts it on every packet that carries a tunnelled one.
#[test]
fn the_mark_of_answers_cannot_come_from_the_network() -> anyhow::Result<()> {
    const EACH: u64 = 20;
    let lab = Lab::new("refusal_mark", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2)])?;
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    assert_answers(&expect(&mesh, "a", "b", &[(Talk::Tcp(80), true)])?);
    let secret = mark(&b)?;
    assert!(secret != 0 && secret != mark(&a)?, "each draws its own");
    let sources = [a.v4()?, a.v6()?];
    a.disarm()?;
    a.host.run(&format!("wg set weir0 fwmark {secret}"))?;
    a.host.run_with(
        "nft -f -",
        &format!(
            "table inet t {{ chain c {{ type route hook output priority 0; \
             oifname weir0 meta mark set {secret}; }}; }}\n"
        ),
    )?;
    b.host.run_with(
        "nft -f -",
        &format!(
            "table inet t {{ chain c {{ type filter hook prerouting priority -300; \
             udp dport 51820 meta mark set {secret}; }}; \
             chain d {{ type filter hook input priority 0; \
             udp dport 51820 meta mark {secret} counter; \
             iifname weir0 meta mark {secret} counter; }}; }}\n"
        ),
    )?;
    for (src, dst) in sources.into_iter().zip([b.v4()?, b.v6()?]) {
        let ears = b.host.udp(dst, 53)?;
        ears.set_nonblocking(true)?;
        let before = denied(&b.counters()?, "ingress");
        for _ in 0..EACH {
            let datagram = packet::udp((src, 4000), (dst, 53), b"let me in");
            assert!(packet::send(&a.host, dst, &datagram)?);
        }
        let counted = || {
            b.counters()
                .is_ok_and(|now| denied(&now, "ingress") >= before + EACH)
        };
        wait_until("b has dropped them", SPREAD_BOUND, counted)?;
        assert_eq!(denied(&b.counters()?, "ingress"), before + EACH);
        assert!(ears.recv_from(&mut [0; 16]).is_err(), "{src}");
    }
    // The outer packets did carry the mark, and nothing inside ever did.
    let rules = b.host.run("nft -j list chain inet t d")?.json()?;
    let counts: Vec<u64> = rules["nftables"]
        .as_array()
        .context("rules")?
        .iter()
        .filter_map(|entry| entry["rule"]["expr"].as_array())
        .flatten()
        .filter_map(|expression| expression["counter"]["packets"].as_u64())
        .collect();
    assert!(counts.len() == 2 && counts[0] >= 2 * EACH, "{rules:#}");
    assert_eq!(counts[1], 0, "{rules:#}");
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
///
/// a may begin talks with b, b with c, and c with a: shields of a concern c alone.
#[test]
fn shields_keep_out_what_others_begin_until_they_are_lowered_here() -> anyhow::Result<()> {
    let lab = Lab::new("shields", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let a = mesh.node("a");
    let may = |mine: bool, others: bool| -> anyhow::Result<()> {
        let mut all = expect(&mesh, "a", "b", &[(Talk::Tcp(80), mine)])?;
        all.extend(expect(&mesh, "c", "a", &[(Talk::Tcp(22), others)])?);
        assert_answers(&all);
        Ok(())
    };
    may(true, true)?;
    let (busy, cut) = (
        tests::stream::Conversation::start(
            &a.host,
            &mesh.node("b").host,
            mesh.node("b").v4()?,
            80,
        )?,
        tests::stream::Conversation::start(&mesh.node("c").host, &a.host, a.v4()?, 22)?,
    );
    busy.flows()?;
    cut.flows()?;

    let said = a.weir("set --shields-up")?;
    assert!(said.stdout.contains("Shields are up"), "{}", said.stdout);
    let at = Instant::now();
    assert_eq!(a.status()?["acl"]["shields_up"], true);
    may(true, false)?;
    busy.flows()?;
    let late = cut.last_arrival().saturating_duration_since(at);
    assert!(
        late < Duration::from_secs(1),
        "what c had opened is cut: {late:?}"
    );

    // Not by a policy that permits more, not by joining again, not by restarting, not by rebooting
    // without a coordinator.
    let wider = POLICY.replace(
        r#""dst": ["ana@example.com:22"]"#,
        r#""dst": ["ana@example.com:*"]"#,
    );
    assert_ne!(wider, POLICY);
    mesh.coordinator.set_policy(&wider)?;
    let newest = |status: &serde_json::Value| status["generation"].as_u64();
    let generation = newest(&mesh.node("c").status()?);
    a.until("it has the new policy", |status| {
        newest(status) >= generation
    })?;
    may(true, false)?;
    let token = mesh
        .coordinator
        .token("--network home --user ana@example.com")?;
    a.join(&token, "")?;
    a.kill();
    a.restart()?;
    a.until("it is up again", |status| status["phase"] == "up")?;
    may(true, false)?;
    mesh.coordinator.kill();
    crate::state::power_cut(&a)?;
    a.restart()?;
    a.until("it is up from its cache", |status| status["phase"] == "up")?;
    assert_eq!(a.status()?["acl"]["shields_up"], true);
    may(true, false)?;

    a.weir("set --shields-up=false")?;
    may(true, true)?;
    lab.passed();
    Ok(())
}
