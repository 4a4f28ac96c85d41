//! What a path by relay carries, from application to application: through kernel WireGuard, the
//! agents and a real relay with TLS; beside a direct path between the same machines.
//!
//! ```text
//!  hub   a   b   c   near       between a and b no UDP passes, between a and c it does
//!   │    │   │   │    │
//!  ─┴────┴───┴───┴────┴── internet
//! ```
//!
//! Direct and relayed take turns. All hosts and the relay share the machine's processors, which is
//! why the time that agents and relay spend on a packet is told too.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Join, Mesh, Node};
use tests::packet;
use tests::process::Process;
use tests::topology::Topology;
use tests::wait_until;

use super::nodes::{POLICY, PORT};
use super::relay::{cpu_ticks, tick_us};
use super::spread::{Spread, late};

/// No transfer stands still for so long.
const STALL_BOUND: Duration = Duration::from_secs(60);
/// How long the paths may take to become what they are to be.
const PATH_BOUND: Duration = Duration::from_secs(60);
/// What one packet of a transfer carries: a full one of the tunnel's MTU.
const PAYLOAD: f64 = 1_368.0;
/// Not counted: it brings the session up.
const WARM_UP: u64 = 1_000_000;

#[derive(clap::Args)]
pub struct Args {
    /// Rounds by relay and directly; they alternate
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Size of one transfer, in megabytes
    #[arg(long, default_value_t = 32)]
    megabytes: u64,
    /// Small datagrams there and back in one round
    #[arg(long, default_value_t = 500)]
    exchanges: u32,
}

/// A way from a to another host.
struct Way {
    name: &'static str,
    to: Arc<Node>,
    dst: IpAddr,
    /// Whose processor time is counted: agents, and the relay.
    hands: [Vec<Arc<Process>>; 2],
    rounds: Vec<Round>,
}

/// What one round showed: bytes a second, microseconds.
struct Round {
    rate: f64,
    agents_us: f64,
    relay_us: f64,
    p50_us: f64,
    p99_us: f64,
}

/// Measures, prints a table, and returns the document.
pub fn run(args: &Args) -> anyhow::Result<Value> {
    ensure!(args.rounds > 0 && args.megabytes > 0 && args.exchanges > 0);
    let lab = Lab::without_captures("relayed", &Topology::star(&["a", "b", "c", "near"]))?;
    cut(&lab.host("a"), &lab.host("b"))?;
    let join = |host| Join {
        host,
        owner: "--tag tag:bench",
        routes: "",
    };
    let mesh = Mesh::with_relays(&lab, POLICY, &["near"], &["a", "b", "c"].map(join))?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;

    let a = mesh.node("a");
    let way = |name, to: &str, relays: Vec<Arc<Process>>| -> anyhow::Result<Way> {
        let to = mesh.node(to);
        Ok(Way {
            name,
            dst: to.v4()?,
            hands: [vec![a.process(), to.process()], relays],
            to,
            rounds: Vec::new(),
        })
    };
    let mut ways = [
        way("by relay", "b", vec![mesh.relays[0].process()])?,
        way("direct", "c", Vec::new())?,
    ];
    for way in &ways {
        bulk(&a.host, way, WARM_UP)?;
        let relayed = way.name == "by relay";
        let key = way.to.public_key()?;
        wait_until(&format!("{} it is", way.name), PATH_BOUND, || {
            let shown = a.host.run("wg show weir0 endpoints");
            let shown = shown.map(|shown| shown.stdout).unwrap_or_default();
            let line = shown.lines().find_map(|line| line.strip_prefix(&key));
            line.is_some_and(|line| line.trim().starts_with("127.") == relayed)
        })?;
    }
    for _ in 0..args.rounds {
        for way in &mut ways {
            let round = round(args, &a.host, way)?;
            way.rounds.push(round);
        }
    }
    lab.passed();
    Ok(json!({
        "bench": "relayed",
        "megabytes": args.megabytes,
        "rows": ways.iter().map(summary).collect::<Vec<_>>(),
    }))
}

/// No UDP passes between these two.
fn cut(a: &Host, b: &Host) -> anyhow::Result<()> {
    let chain = |hook: &str, side: &str| {
        let (v4, v6) = (b.v4(), b.v6());
        format!(
            " chain {hook} {{ type filter hook {hook} priority -200;\n  \
             ip {side} {v4} meta l4proto udp drop\n  ip6 {side} {v6} meta l4proto udp drop\n }}\n"
        )
    };
    let (into, out) = (chain("input", "saddr"), chain("output", "daddr"));
    let table = format!("table inet cut {{\n{into}{out}}}\n");
    a.run_with("nft -f -", &table).map(drop)
}

fn round(args: &Args, from: &Host, way: &Way) -> anyhow::Result<Round> {
    let bytes = args.megabytes * 1_000_000;
    let used = |processes: &[Arc<Process>]| -> anyhow::Result<u64> {
        processes.iter().map(|process| cpu_ticks(process)).sum()
    };
    let before = [used(&way.hands[0])?, used(&way.hands[1])?];
    let took = bulk(from, way, bytes)?;
    let after = [used(&way.hands[0])?, used(&way.hands[1])?];
    let packets = bytes as f64 / PAYLOAD;
    let each = |at: usize| (after[at] - before[at]) as f64 * tick_us() / packets;
    let mut times = exchanges(from, way, args.exchanges)?;
    Ok(Round {
        rate: bytes as f64 / took.as_secs_f64(),
        agents_us: each(0),
        relay_us: each(1),
        p50_us: late(&mut times, 0.5),
        p99_us: late(&mut times, 0.99),
    })
}

/// One TCP stream, from the connection to its last byte.
fn bulk(from: &Host, way: &Way, bytes: u64) -> anyhow::Result<Duration> {
    let listener = way.to.host.listen(way.dst, PORT)?;
    let target = SocketAddr::new(way.dst, PORT);
    let mut sender = from.enter(|| TcpStream::connect_timeout(&target, STALL_BOUND))?;
    let (mut receiver, _) = listener.accept()?;
    receiver.set_read_timeout(Some(STALL_BOUND))?;
    let start = Instant::now();
    let sending = std::thread::spawn(move || -> std::io::Result<()> {
        let chunk = vec![0x5a; 1 << 16];
        let mut left = bytes;
        while left > 0 {
            let length = left.min(chunk.len() as u64) as usize;
            sender.write_all(&chunk[..length])?;
            left -= length as u64;
        }
        Ok(())
    });
    let (mut arrived, mut buffer) = (0, vec![0; 1 << 16]);
    while arrived < bytes {
        let length = receiver.read(&mut buffer)? as u64;
        ensure!(length > 0, "the stream ended early");
        arrived += length;
    }
    let took = start.elapsed();
    sending.join().ok().context("the sender died")??;
    Ok(took)
}

/// Datagrams there and back, one at a time.
fn exchanges(from: &Host, way: &Way, count: u32) -> anyhow::Result<Vec<Duration>> {
    let far = way.to.host.udp(way.dst, PORT)?;
    let near = from.udp(packet::unspecified(way.dst), 0)?;
    near.connect((way.dst, PORT))?;
    for socket in [&far, &near] {
        socket.set_read_timeout(Some(STALL_BOUND))?;
    }
    let (mut bytes, mut times) = ([0x5a; 64], Vec::new());
    for _ in 0..count {
        let start = Instant::now();
        near.send(&bytes)?;
        let (length, source) = far.recv_from(&mut bytes)?;
        far.send_to(&bytes[..length], source)?;
        near.recv(&mut bytes)?;
        times.push(start.elapsed());
    }
    Ok(times)
}

/// Prints one row, and returns it.
fn summary(way: &Way) -> Value {
    let spread = |of: fn(&Round) -> f64| Spread::of(way.rounds.iter().map(of));
    let rate = spread(|it| it.rate / 1e6);
    let (agents, relay) = (spread(|it| it.agents_us), spread(|it| it.relay_us));
    let (p50, p99) = (spread(|it| it.p50_us), spread(|it| it.p99_us));
    println!(
        "{:8} {:7.1} MB/s ({:.1} to {:.1}); a packet: agents {:.1} us, relay {:.1} us; \
         there and back: p50 {:.0} us, p99 {:.0} us",
        way.name,
        rate.median,
        rate.least,
        rate.most,
        agents.median,
        relay.median,
        p50.median,
        p99.median
    );
    json!({
        "way": way.name,
        "megabytes_per_second": rate.json(),
        "agents_cpu_us_per_packet": agents.json(),
        "relay_cpu_us_per_packet": relay.json(),
        "p50_us": p50.json(),
        "p99_us": p99.json(),
    })
}
