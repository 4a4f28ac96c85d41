//! The ACL's tax: what one gigabyte through kernel WireGuard costs with our programs on the device
//! and without them.
//!
//! Two pairs of hosts in one lab, the same in all else: `a` and `b` run agents, `c` and `d` have a
//! WireGuard device made by hand. The transfers alternate. Throughput does not resolve a few per
//! cent on shared machines, so the cost is counted in the time that the processor was busy; under
//! QEMU's `-icount shift=0` a nanosecond of that clock *is* one guest instruction.

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
use tests::process;
use tests::topology::Topology;

/// The port that everything crosses.
const PORT: u16 = 5201;
/// No transfer stands still for so long.
const STALL_BOUND: Duration = Duration::from_secs(120);
/// The scheduler's ticks in which the kernel tells idle time (`getconf CLK_TCK`).
const TICK_NS: u64 = 10_000_000;

const POLICY: &str = r#"{
  "tagOwners": {"tag:bench": []},
  "acls": [{"action": "accept", "src": ["tag:bench"], "dst": ["tag:bench:5201"]}],
}"#;

#[derive(clap::Args)]
pub struct Args {
    /// Transfers of each kind; they alternate
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
    let lab = Lab::without_captures("acl-tax", &Topology::star(&["a", "b", "c", "d"]))?;
    let join = |host| Join {
        host,
        owner: "--tag tag:bench",
        routes: "",
    };
    let mesh = Mesh::start(&lab, POLICY, &[join("a"), join("b")])?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    let acl = (lab.host("a"), lab.host("b"), mesh.node("b").v4()?);
    let bare = bare_pair(lab.host("c"), lab.host("d"))?;

    let bytes = args.megabytes * 1_000_000;
    let bulk = |pair: &Pair| bulk(pair, bytes);
    let small = |pair: &Pair| small(pair, args.datagrams);
    let unit = if args.icount {
        "instructions"
    } else {
        "busy nanoseconds"
    };
    let per_gb = |cost: u64| cost as f64 * 1e9 / bytes as f64;
    let per_datagram = |cost: u64| cost as f64 / args.datagrams as f64;
    let rows = [
        summary(
            "bulk TCP, per GB",
            unit,
            &rounds(args.rounds, &bare, &acl, bulk)?,
            per_gb,
        ),
        summary(
            "64-byte UDP, per datagram",
            unit,
            &rounds(args.rounds, &bare, &acl, small)?,
            per_datagram,
        ),
    ];
    lab.passed();
    Ok(json!({ "bench": "acl-tax", "unit": unit, "rows": rows }))
}

/// Sender, receiver, and the receiver's address in the tunnel.
type Pair = (Arc<Host>, Arc<Host>, IpAddr);

/// Two hosts with WireGuard made by hand, as the agent makes it.
fn bare_pair(c: Arc<Host>, d: Arc<Host>) -> anyhow::Result<Pair> {
    let mut keys = Vec::new();
    for host in [&c, &d] {
        let private = host.run("wg genkey")?.stdout;
        let public = host
            .run_with("wg pubkey", &private)?
            .stdout
            .trim()
            .to_owned();
        host.run("ip link add weir0 mtu 1420 type wireguard")?;
        host.run_with(
            "wg set weir0 listen-port 51820 private-key /dev/stdin",
            &private,
        )?;
        keys.push(public);
    }
    for (number, (host, other, key)) in [(1, (&c, &d, &keys[1])), (2, (&d, &c, &keys[0]))] {
        let (endpoint, theirs) = (other.v4(), 3 - number);
        let allowed = format!("100.127.0.{theirs}/32");
        host.run(&format!(
            "wg set weir0 peer {key} endpoint {endpoint}:51820 allowed-ips {allowed}"
        ))?;
        host.ip(&format!(
            "addr add 100.127.0.{number}/24 dev weir0\nlink set weir0 up"
        ))?;
        // As the agent does once there is a peer: it moves work from softirqs to a thread, which
        // alone changes the cost by a quarter.
        let mut threaded = host.whole("tee /sys/class/net/weir0/threaded")?;
        let output = host.enter(|| process::run(&mut threaded, "1", STALL_BOUND));
        output?.success()?;
    }
    Ok((c, d, "100.127.0.2".parse()?))
}

/// Alternates the two kinds, after one transfer of each that is not counted.
fn rounds(
    count: usize,
    bare: &Pair,
    acl: &Pair,
    measure: impl Fn(&Pair) -> anyhow::Result<u64>,
) -> anyhow::Result<Vec<Round>> {
    measure(bare)?;
    measure(acl)?;
    let round = |_| {
        Ok(Round {
            bare: measure(bare)?,
            acl: measure(acl)?,
        })
    };
    (0..count).map(round).collect()
}

/// One TCP stream.
fn bulk((from, to, dst): &Pair, bytes: u64) -> anyhow::Result<u64> {
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
fn small((from, to, dst): &Pair, datagrams: u64) -> anyhow::Result<u64> {
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
