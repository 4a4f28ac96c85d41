//! The ACL's tax: what one gigabyte through kernel WireGuard costs with our programs on the device
//! and without them.
//!
//! One pair of hosts, `a` and `b`; the programs come off their devices and go on again, in turns,
//! and the agents are dead whenever something is counted: the programs are the only difference.
//! Throughput does not resolve a few per cent on shared machines, so the cost is counted in the
//! time that the processor was busy; under QEMU's `-icount shift=0` a nanosecond of that clock *is*
//! one guest instruction.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Value, json};
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Join, Mesh};
use tests::packet;
use tests::topology::Topology;

use super::nodes::{POLICY, PORT};

/// No transfer stands still for so long.
const STALL_BOUND: Duration = Duration::from_secs(120);
/// The scheduler's ticks in which the kernel tells idle time (`getconf CLK_TCK`).
const TICK_NS: u64 = 10_000_000;

#[derive(clap::Args)]
pub struct Args {
    /// Rounds with the programs and without them; they alternate
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Size of one transfer, in megabytes
    #[arg(long, default_value_t = 32)]
    megabytes: u64,
    /// Datagrams of 64 bytes in one round of small packets
    #[arg(long, default_value_t = 20_000)]
    datagrams: u64,
    /// The clock counts instructions (QEMU -icount shift=0)
    #[arg(long)]
    icount: bool,
}

/// What one round cost, in nanoseconds of a busy processor.
#[derive(Clone, Copy)]
struct Round {
    bare: u64,
    acl: u64,
}

/// Measures, prints a table, and returns the document.
pub fn run(args: &Args) -> anyhow::Result<Value> {
    let lab = Lab::without_captures("acl-tax", &Topology::star(&["a", "b"]))?;
    let join = |host| Join {
        host,
        owner: "--tag tag:bench",
        routes: "",
    };
    let mesh = Mesh::start(&lab, POLICY, &[join("a"), join("b")])?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    let pair = Pair {
        from: lab.host("a"),
        to: lab.host("b"),
        dst: mesh.node("b").v4()?,
    };
    let nodes = [mesh.node("a"), mesh.node("b")];

    let bytes = args.megabytes * 1_000_000;
    let (mut large, mut little) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        for node in &nodes {
            if round > 1 {
                node.restart()?;
            }
            node.until("it is up", |status| status["phase"] == "up")?;
        }
        nodes.iter().for_each(|node| node.kill());
        let acl = pair.costs(bytes, args.datagrams)?;
        nodes.iter().try_for_each(|node| node.disarm())?;
        let bare = pair.costs(bytes, args.datagrams)?;
        large.push(Round {
            bare: bare.0,
            acl: acl.0,
        });
        little.push(Round {
            bare: bare.1,
            acl: acl.1,
        });
        eprintln!("round {round} of {}", args.rounds);
    }
    lab.passed();
    let unit = if args.icount {
        "instructions"
    } else {
        "busy nanoseconds"
    };
    let per_gb = |cost: u64| cost as f64 * 1e9 / bytes as f64;
    let per_datagram = |cost: u64| cost as f64 / args.datagrams as f64;
    let rows = [
        summary("bulk TCP, per GB", unit, &large, per_gb),
        summary("64-byte UDP, per datagram", unit, &little, per_datagram),
    ];
    Ok(json!({ "bench": "acl-tax", "unit": unit, "rows": rows }))
}

/// Two hosts and the receiver's address in the tunnel.
struct Pair {
    from: Arc<Host>,
    to: Arc<Host>,
    dst: IpAddr,
}

impl Pair {
    /// What a bulk transfer and a round of small datagrams cost, after a little of each that is
    /// not counted: it brings the session up and fills the caches.
    fn costs(&self, bytes: u64, datagrams: u64) -> anyhow::Result<(u64, u64)> {
        /// Not counted, of both kinds.
        const WARM_UP: (u64, u64) = (1_000_000, 200);
        bulk(self, WARM_UP.0)?;
        small(self, WARM_UP.1)?;
        Ok((bulk(self, bytes)?, small(self, datagrams)?))
    }
}

/// One TCP stream.
fn bulk(Pair { from, to, dst }: &Pair, bytes: u64) -> anyhow::Result<u64> {
    let listener = to.listen(*dst, PORT)?;
    let target = SocketAddr::new(*dst, PORT);
    let mut sender = from.enter(|| TcpStream::connect_timeout(&target, STALL_BOUND))?;
    let (mut receiver, _) = listener.accept()?;
    receiver.set_read_timeout(Some(STALL_BOUND))?;
    let start = Busy::now()?;
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
        anyhow::ensure!(length > 0, "the stream ended early");
        arrived += length;
    }
    let cost = start.elapsed()?;
    sending.join().ok().context("the sender died")??;
    Ok(cost)
}

/// Small datagrams there and back, one at a time: nothing is queued, nothing is lost.
fn small(Pair { from, to, dst }: &Pair, datagrams: u64) -> anyhow::Result<u64> {
    let far = to.udp(*dst, PORT)?;
    let near: UdpSocket = from.udp(packet::unspecified(*dst), 0)?;
    near.connect((*dst, PORT))?;
    for socket in [&far, &near] {
        socket.set_read_timeout(Some(STALL_BOUND))?;
    }
    let mut bytes = [0x5a; 64];
    let start = Busy::now()?;
    for _ in 0..datagrams / 2 {
        near.send(&bytes)?;
        let (length, source) = far.recv_from(&mut bytes)?;
        far.send_to(&bytes[..length], source)?;
        near.recv(&mut bytes)?;
    }
    start.elapsed()
}

/// A point in the time that the processor spent on work.
struct Busy {
    at: Instant,
    idle_ns: u64,
}

impl Busy {
    fn now() -> anyhow::Result<Self> {
        let stat = std::fs::read_to_string("/proc/stat")?;
        // proc_stat(5): cpu user nice system idle iowait …
        let mut fields = stat.lines().next().unwrap_or_default().split_whitespace();
        let idle: u64 = fields
            .nth(4)
            .context("/proc/stat has no idle time")?
            .parse()?;
        let iowait: u64 = fields.next().unwrap_or("0").parse()?;
        let processors = std::thread::available_parallelism()?.get();
        anyhow::ensure!(
            processors == 1,
            "measured on one processor only: use --cpus 1"
        );
        Ok(Self {
            at: Instant::now(),
            idle_ns: (idle + iowait) * TICK_NS,
        })
    }

    /// Busy nanoseconds since then.
    fn elapsed(&self) -> anyhow::Result<u64> {
        let now = Self::now()?;
        let wall = u64::try_from(now.at.duration_since(self.at).as_nanos())?;
        Ok(wall.saturating_sub(now.idle_ns - self.idle_ns))
    }
}

/// Prints one row, and returns it.
fn summary(what: &str, unit: &str, rounds: &[Round], scale: impl Fn(u64) -> f64) -> Value {
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let ratios: Vec<f64> = rounds
        .iter()
        .map(|round| round.acl as f64 / round.bare as f64)
        .collect();
    let bare = median(rounds.iter().map(|round| scale(round.bare)).collect());
    let acl = median(rounds.iter().map(|round| scale(round.acl)).collect());
    let (low, high) = ratios
        .iter()
        .fold((f64::MAX, f64::MIN), |(low, high), &ratio| {
            (low.min(ratio), high.max(ratio))
        });
    let ratio = median(ratios);
    println!(
        "{what:28} {bare:14.0} bare  {acl:14.0} with ACL  {ratio:.3} ({low:.3} to {high:.3})  {unit}"
    );
    json!({
        "what": what, "rounds": rounds.len(), "bare": bare, "acl": acl,
        "ratio": { "median": ratio, "min": low, "max": high },
    })
}
