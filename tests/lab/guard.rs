//! The guard before WireGuard's port, under a flood of forged handshakes.
//!
//! ```text
//!  hub  caller  talker  server                storm
//!   │     │       │      │  │ eth1              │
//!  ─┴─────┴───────┴──────┴─ internet      far ──┴───────────
//!                           └───────────────────┘
//! ```
//!
//! `storm` sends the server initiations that are right in all but their secrets; `caller` starts
//! one handshake after another, and `talker` has a conversation through its tunnel meanwhile.

mod forge;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use agent::kernel::wireguard::WireGuard;
use anyhow::{Context, ensure};
use engine::plan::PeerChange;
use proto::key::NodeKey;
use serde_json::Value;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Counters, Join, Mesh, Node};
use tests::stream::Numbered;
use tests::topology::Topology;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
const PORT: u16 = 51820;
/// Handshakes of one series: so many that one in a hundred is not the slowest of them.
const HANDSHAKES: usize = 101;
/// WireGuard takes fifty initiations of a peer in a second (`INITIATIONS_PER_SECOND` in
/// drivers/net/wireguard/messages.h).
const BETWEEN: Duration = Duration::from_millis(30);
/// What is shorter is told by who gets the processor when.
const FLOOR: Duration = Duration::from_millis(5);
/// How long one handshake may take, so that a broken one does not take for ever.
const PATIENCE: Duration = Duration::from_secs(20);
/// Forged initiations at once.
const BURST: u64 = 64;
/// Datagrams that are nothing.
const NOISE: u64 = 1_000;

/// Handshakes without the guard, with `WEIR_FULL`.
const UNGUARDED: usize = 3;
/// Forged initiations that are sent in turn: to make one costs more than to send it.
const FORGED: u64 = 256;

/// Sends what looks like handshakes, and what looks like nothing.
struct Storm {
    socket: UdpSocket,
    initiations: Vec<[u8; forge::BYTES]>,
    sent: u64,
}

impl Storm {
    fn new(from: &Host, to: &Host, receiver: NodeKey) -> anyhow::Result<Self> {
        let far = |host: &Host| host.addrs.last().copied().context("an address");
        let socket = from.udp(far(from)?, 0)?;
        socket.connect((far(to)?, PORT))?;
        let forge = |number| forge::initiation(&receiver.0, number);
        Ok(Self {
            socket,
            initiations: (0..FORGED).map(forge).collect(),
            sent: 0,
        })
    }

    fn forge(&mut self, count: u64) -> anyhow::Result<()> {
        let turn = self.initiations.iter().cycle();
        for initiation in turn
            .skip((self.sent % FORGED) as usize)
            .take(count as usize)
        {
            self.socket.send(initiation)?;
        }
        self.sent += count;
        Ok(())
    }
}

/// How long each handshake of a series took, shortest first: the peer is made anew for each, which
/// is what the kernel does of itself after minutes of silence.
fn series(
    host: &Host,
    peer: NodeKey,
    count: usize,
    mut storm: Option<&mut Storm>,
) -> anyhow::Result<Vec<Duration>> {
    let mut burst = |number| {
        storm
            .as_deref_mut()
            .map_or(Ok(()), |storm| storm.forge(number))
    };
    host.enter(|| {
        let any = UdpSocket::bind("127.0.0.1:0")?;
        let index = rustix::net::netdevice::name_to_index(&any, "weir0")?;
        let mut wireguard = WireGuard::open()?;
        let mut took = Vec::new();
        for _ in 0..count {
            let pause = Instant::now();
            while pause.elapsed() < BETWEEN {
                burst(BURST)?;
                std::thread::yield_now();
            }
            let dump = wireguard.dump(index)?;
            let known = dump.peers.get(&peer).context("a peer")?.clone();
            wireguard.remove_peers(index, &[peer])?;
            burst(BURST)?;
            let start = Instant::now();
            let again = PeerChange {
                key: peer,
                create: true,
                replace_allowed_ips: true,
                allowed_ips: known.allowed_ips,
                endpoint: known.stats.endpoint,
                // Which is sent at once, and needs a session.
                keepalive: Some(25),
            };
            wireguard.set_peers(index, &[again])?;
            while wireguard.dump(index)?.peers[&peer]
                .stats
                .last_handshake
                .is_none()
            {
                ensure!(start.elapsed() < PATIENCE, "no handshake after {took:?}");
                burst(4)?;
            }
            took.push(start.elapsed());
        }
        took.sort();
        Ok(took)
    })
}

/// The time that 99 of a hundred do not exceed.
fn p99(sorted: &[Duration]) -> Duration {
    sorted[sorted.len() * 99 / 100]
}

/// What the guard made of datagrams.
fn guarded(node: &Node) -> anyhow::Result<Counters> {
    let document = node.weir("counters --json")?.json()?;
    let rows = document["guard"].as_array().context("a list")?;
    let row = |row: &Value| {
        let outcome = row["outcome"].as_str().context("a word")?;
        Ok((
            outcome.to_owned(),
            row["packets"].as_u64().context("a number")?,
        ))
    };
    rows.iter().map(row).collect()
}

#[test]
fn handshakes_and_data_get_through_a_flood_of_forged_handshakes() -> anyhow::Result<()> {
    let topology = Topology::new()
        .switch("internet")
        .switch("far")
        .host("hub", &[("internet", "192.0.2.1/24")])
        .host("caller", &[("internet", "192.0.2.11/24")])
        .host("talker", &[("internet", "192.0.2.12/24")])
        .host(
            "server",
            &[("internet", "192.0.2.13/24"), ("far", "198.51.100.1/24")],
        )
        .host("storm", &[("far", "198.51.100.66/24")]);
    let lab = Lab::without_captures("guard_flood", &topology)?;
    let join = |host| Join {
        host,
        owner: "--user ana@example.com",
        routes: "",
    };
    let joins = ["caller", "talker", "server"].map(join);
    let mesh = Mesh::start(&lab, POLICY, &joins)?;
    mesh.settled(&[("caller", 2), ("talker", 2), ("server", 2)])?;
    let (caller, server) = (mesh.node("caller"), mesh.node("server"));
    let status = server.until("the guard stands on both", |status| {
        status["guard"]
            .as_array()
            .is_some_and(|places| places.len() == 2)
    })?;
    assert_eq!(status["problems"], Value::Array(Vec::new()), "{status:#}");

    // From here on the caller's handshakes are ours to start: its agent sleeps, its device works.
    caller.kill();
    let key = server.status()?["node"]["key"].clone();
    let peer: NodeKey = key.as_str().context("a key")?.parse()?;
    let quiet = series(&caller.host, peer, HANDSHAKES, None)?;
    let before = guarded(&server)?;

    let talker = mesh.node("talker");
    let talk = Numbered::start(&talker.host, &server.host, server.v4()?, 7)?;
    let mut storm = Storm::new(&lab.host("storm"), &server.host, peer)?;
    let start = Instant::now();
    let flooded = series(&caller.host, peer, HANDSHAKES, Some(&mut storm))?;
    let lasted = start.elapsed();
    let losses = talk.end()?;
    for _ in 0..NOISE {
        storm.socket.send(b"\xff\xff\xff\xffgetstatus")?;
    }
    let after = guarded(&server)?;

    let rate = storm.sent as f64 / lasted.as_secs_f64();
    let more = |outcome: &str| after[outcome] - before[outcome];
    println!(
        "p99 of a handshake: {:?} quiet, {:?} with {rate:.0} forged ones a second; {losses:?}; {after:?}",
        p99(&quiet),
        p99(&flooded),
    );
    assert!(losses.lost.is_empty(), "{losses:?}");
    assert!(
        p99(&flooded) < 2 * p99(&quiet).max(FLOOR),
        "quiet {quiet:?}\nflooded {flooded:?}"
    );
    let earned = ebpf::guard::PREFIX_BURST + ebpf::guard::PREFIX_RATE * (lasted.as_secs() + 2);
    assert!(storm.sent > 10 * earned, "a flood is more: {}", storm.sent);
    assert!(more("prefix_limit") >= storm.sent - earned, "{after:?}");
    assert!(
        more("handshake_initiation") >= HANDSHAKES as u64,
        "{after:?}"
    );
    assert!(more("data") > 0 && more("total_limit") == 0, "{after:?}");
    assert_eq!(more("other"), NOISE, "{after:?}");

    // Switched off, it is gone; and so is all that it counted.
    server.weir("set --guard=off")?;
    assert_eq!(server.status()?["guard"], Value::Array(Vec::new()));
    assert_eq!(guarded(&server)?, Counters::new());
    let attached = server.host.run("bpftool net show dev eth1")?.stdout;
    assert!(!attached.contains("ethernet"), "{attached}");
    if std::env::var_os("WEIR_FULL").is_some() {
        // Each may take as long as anybody has patience for.
        let bare = series(&caller.host, peer, UNGUARDED, Some(&mut storm));
        println!("handshakes without the guard: {bare:?}");
    }
    server.weir("set --guard=on")?;
    server.weir("down")?;
    let pins = server.host.folder.join("bpf/weir");
    ensure!(!pins.exists(), "pins stay: {}", pins.display());
    lab.passed();
    Ok(())
}
