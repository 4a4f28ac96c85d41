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
//!
//! Handshakes with and without the flood take turns, because what a busy machine does to the one it
//! does to the other, and it is the median that is compared: on a shared processor the slowest tell
//! of the neighbours. `WEIR_FULL` compares the slowest of a hundred, for machines that are quiet.

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
/// Handshakes of each kind, quiet and under the flood in turn. For the long form so many that one
/// in a hundred is not the slowest of them.
const PAIRS: usize = 20;
const PAIRS_FULL: usize = 202;
/// Handshakes without the guard, and how long each is watched.
const UNGUARDED: usize = 2;
const GLANCE: Duration = Duration::from_secs(1);
/// WireGuard takes fifty initiations of a peer in a second (`INITIATIONS_PER_SECOND` in
/// drivers/net/wireguard/messages.h).
const BETWEEN: Duration = Duration::from_millis(30);
/// What is shorter is told by who gets the processor when.
const FLOOR: Duration = Duration::from_millis(5);
/// A handshake that takes so long had to be repeated: the kernel does so after five seconds.
const REPEATED: Duration = Duration::from_secs(4);
/// How long one handshake may take, so that a broken one does not take for ever.
const PATIENCE: Duration = Duration::from_secs(20);
/// Forged initiations at once, and how often before each handshake: more than WireGuard's queue
/// takes before it asks for cookies (an eighth of `MAX_QUEUED_INCOMING_HANDSHAKES`).
const BURST: u64 = 64;
const BURSTS: u64 = 16;
/// Datagrams that are nothing.
const NOISE: u64 = 1_000;
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

/// Starts handshakes in the kernel of a host whose agent sleeps.
struct Caller {
    wireguard: WireGuard,
    index: u32,
    peer: NodeKey,
}

impl Caller {
    /// For the device of the namespace that we are in.
    fn open(peer: NodeKey) -> anyhow::Result<Self> {
        let any = UdpSocket::bind("127.0.0.1:0")?;
        Ok(Self {
            index: rustix::net::netdevice::name_to_index(&any, "weir0")?,
            wireguard: WireGuard::open()?,
            peer,
        })
    }

    /// How long a handshake takes, if no longer than `patience`. The peer is made anew for it,
    /// which is what the kernel does of itself after minutes of silence.
    fn shakes(
        &mut self,
        mut storm: Option<&mut Storm>,
        patience: Duration,
    ) -> anyhow::Result<Option<Duration>> {
        let mut burst = |count| match storm.as_deref_mut() {
            Some(storm) => storm.forge(count),
            None => Ok(()),
        };
        let pause = Instant::now();
        let mut bursts = 0;
        while pause.elapsed() < BETWEEN || bursts < BURSTS {
            burst(BURST)?;
            bursts += 1;
            std::thread::yield_now();
        }
        let dump = self.wireguard.dump(self.index)?;
        let known = dump.peers.get(&self.peer).context("a peer")?.clone();
        self.wireguard.remove_peers(self.index, &[self.peer])?;
        burst(BURST)?;
        let start = Instant::now();
        let again = PeerChange {
            key: self.peer,
            create: true,
            replace_allowed_ips: true,
            allowed_ips: known.allowed_ips,
            endpoint: known.stats.endpoint,
            // Which is sent at once, and needs a session.
            keepalive: Some(25),
        };
        self.wireguard.set_peers(self.index, &[again])?;
        loop {
            let peers = self.wireguard.dump(self.index)?.peers;
            if peers[&self.peer].stats.last_handshake.is_some() {
                return Ok(Some(start.elapsed()));
            }
            if start.elapsed() > patience {
                return Ok(None);
            }
            burst(4)?;
        }
    }

    /// How long handshakes took, shortest first: quiet ones, and those under a flood. They take
    /// turns, so that both meet the same machine.
    fn pairs(&mut self, count: usize, storm: &mut Storm) -> anyhow::Result<[Vec<Duration>; 2]> {
        let mut took = [Vec::new(), Vec::new()];
        for number in 0..2 * count {
            let flooded = number % 2 == 1;
            let storm = flooded.then_some(&mut *storm);
            let time = self.shakes(storm, PATIENCE)?;
            let time = time.with_context(|| format!("no handshake after {took:?}"))?;
            took[usize::from(flooded)].push(time);
        }
        took.iter_mut().for_each(|times| times.sort());
        Ok(took)
    }
}

/// The time that so many of a hundred do not exceed.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[sorted.len() * percent / 100]
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
    let mut storm = Storm::new(&lab.host("storm"), &server.host, peer)?;
    let mut calls = caller.host.enter(|| Caller::open(peer))?;
    let before = guarded(&server)?;
    let talker = mesh.node("talker");
    let talk = Numbered::start(&talker.host, &server.host, server.v4()?, 7)?;
    let start = Instant::now();
    // What a prefix may send at once is gone before the first one.
    storm.forge(2 * ebpf::guard::PREFIX_BURST)?;
    let full = std::env::var_os("WEIR_FULL").is_some();
    let count = if full { PAIRS_FULL } else { PAIRS };
    let [quiet, flooded] = calls.pairs(count, &mut storm)?;
    let lasted = start.elapsed();
    let losses = talk.end()?;
    for _ in 0..NOISE {
        storm.socket.send(b"\xff\xff\xff\xffgetstatus")?;
    }
    let after = guarded(&server)?;

    let more = |outcome: &str| after[outcome] - before[outcome];
    for percent in [50, 90, 99] {
        let [calm, storm] = [&quiet, &flooded].map(|times| percentile(times, percent));
        println!("{percent} of 100 handshakes took {calm:.1?} at most, under a flood {storm:.1?}");
    }
    println!(
        "{} forged in {lasted:.1?}; {losses:?}; {after:?}",
        storm.sent
    );
    let judged = if full { 99 } else { 50 };
    let [calm, stormy] = [&quiet, &flooded].map(|times| percentile(times, judged));
    assert!(
        stormy < 2 * calm.max(FLOOR),
        "quiet {quiet:?}\nflooded {flooded:?}"
    );
    let repeated = flooded.iter().filter(|time| **time >= REPEATED);
    assert_eq!(repeated.count(), 0, "{flooded:?}");
    assert!(losses.lost.is_empty(), "{losses:?}");
    let earned = ebpf::guard::PREFIX_BURST + ebpf::guard::PREFIX_RATE * (lasted.as_secs() + 2);
    assert!(storm.sent > 5 * earned, "a flood is more: {}", storm.sent);
    assert!(more("prefix_limit") >= storm.sent - earned, "{after:?}");
    assert!(
        more("handshake_initiation") >= 2 * count as u64,
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
    // And so is what it did: WireGuard itself asks for cookies under such a load, which costs five
    // seconds, or drops what its queue has no room for.
    let watch = if full { PATIENCE } else { GLANCE };
    let bare = (0..UNGUARDED).map(|_| calls.shakes(Some(&mut storm), watch));
    let bare = bare.collect::<Result<Vec<_>, _>>()?;
    println!("handshakes without the guard: {bare:.1?}");
    let waits = |took: &Option<Duration>| took.is_none_or(|took| took > GLANCE);
    assert!(bare.iter().all(waits), "it is no flood: {bare:?}");
    server.weir("set --guard=on")?;
    server.weir("down")?;
    let pins = server.host.folder.join("bpf/weir");
    ensure!(!pins.exists(), "pins stay: {}", pins.display());
    lab.passed();
    Ok(())
}
