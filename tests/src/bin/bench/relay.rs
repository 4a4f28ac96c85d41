//! What one packet and one idle client cost a relay: a real `weir-relay` on the loopback address,
//! without TLS and with it, beside a process that only echoes datagrams. Processor time and memory
//! of all three are read from `/proc`.
//!
//! First each pair has a fixed number of packets under way, so that nothing is dropped and the
//! carrier is always busy: what one packet costs then is the least that it can cost. Then packets
//! come by a schedule, from a light load to twice what each can carry ([`load`]). At last come
//! clients that do nothing ([`idle`]). In everything the three take turns, so that what else the
//! machine does falls on all of them.
//!
//! The relay that is measured lies beside the bench; the document says whether both were built with
//! optimisation. Clients and carrier share the machine's processors, so a figure per second is the
//! machine's; processor time per packet is the carrier's own.

mod client;
pub mod echo;
mod idle;
mod load;
mod pair;

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use client::{Door, tls_of};
use echo::Echo;
use pair::{Batch, Carrier, Contender, Receiver, Sender};
use serde_json::{Value, json};
use tests::process::Process;

use super::spread::{Spread, late};

const READY: Duration = Duration::from_secs(20);
/// Length of a packet's number and time at its start.
const STAMP_BYTES: usize = 16;

#[derive(clap::Args)]
pub struct Args {
    /// Pairs of clients; one of each sends
    #[arg(long, default_value_t = 4)]
    pairs: usize,
    /// Packets of each pair in one round
    #[arg(long, default_value_t = 50_000)]
    packets: u64,
    /// Packets of a pair that are under way at once
    #[arg(long, default_value_t = 32)]
    window: usize,
    /// Bytes of a packet
    #[arg(long, default_value_t = 1_200)]
    size: usize,
    /// Clients that do nothing
    #[arg(long, default_value_t = 10_000)]
    idle: u64,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// One round of a full pipeline: packets a second, microseconds.
struct Round {
    per_second: f64,
    cpu_us: f64,
    p50_us: f64,
    p99_us: f64,
}

/// Measures, prints tables, and returns the document.
pub fn run(args: &Args) -> anyhow::Result<Value> {
    ensure!(args.rounds > 0 && args.pairs > 0 && args.packets > 0 && args.window > 0);
    ensure!(
        args.size >= STAMP_BYTES,
        "at least {STAMP_BYTES} bytes a packet"
    );
    let folder = tempfile::tempdir()?;
    let program = tests::binary("weir-relay")?;
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    let contenders = contenders(args, &program, folder.path())?;
    println!(
        "weir-relay, {profile} build, {} pairs, {} B",
        args.pairs, args.size
    );
    let (pipeline, carried) = pipelines(args, &contenders)?;
    let loads = load::run(args, &contenders, &carried)?;
    for contender in &contenders {
        contender.process().kill();
    }
    let idle = idle::run(args, &program)?;
    Ok(json!({
        "bench": "relay",
        "profile": profile,
        "pairs": args.pairs,
        "packet_bytes": args.size,
        "window": args.window,
        "pipeline": pipeline,
        "loads": loads,
        "idle": idle,
    }))
}

fn contenders(args: &Args, program: &Path, folder: &Path) -> anyhow::Result<[Contender; 3]> {
    /// Read at once by a client of the bench.
    const BUFFER: usize = 32 << 10;
    let relay = |with_tls: bool| -> anyhow::Result<Carrier> {
        let folder = folder.join(if with_tls { "tls" } else { "plain" });
        std::fs::create_dir(&folder)?;
        let (process, addr) = start(program, &folder, with_tls)?;
        let tls = with_tls
            .then(|| tls_of(&folder.join("state")))
            .transpose()?;
        let buffer = BUFFER;
        Ok(Carrier::Relay(process, Door { addr, tls, buffer }))
    };
    let echo = Echo::start(args.pairs, &folder.join("echo.log"))?;
    Ok([
        Contender {
            name: "relay",
            carrier: relay(false)?,
        },
        Contender {
            name: "relay with TLS",
            carrier: relay(true)?,
        },
        Contender {
            name: "UDP echo",
            carrier: Carrier::Echo(echo),
        },
    ])
}

/// Full pipelines, in turns: the document, and what each carried in a second.
fn pipelines(args: &Args, contenders: &[Contender]) -> anyhow::Result<(Value, Vec<f64>)> {
    println!(
        "\n  packets/s   CPU us   p50 us   p99 us   always {} under way",
        args.window
    );
    let mut rounds: Vec<Vec<Round>> = contenders.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.rounds {
        for (contender, rounds) in contenders.iter().zip(&mut rounds) {
            rounds.push(round(args, contender)?);
        }
    }
    let (mut rows, mut carried) = (Vec::new(), Vec::new());
    for (contender, rounds) in contenders.iter().zip(&rounds) {
        let spread = |of: fn(&Round) -> f64| Spread::of(rounds.iter().map(of));
        let (per_second, cpu) = (spread(|it| it.per_second), spread(|it| it.cpu_us));
        let (p50, p99) = (spread(|it| it.p50_us), spread(|it| it.p99_us));
        println!(
            "{:>11.0} {:>8.2} {:>8.0} {:>8.0}   {}",
            per_second.median, cpu.median, p50.median, p99.median, contender.name
        );
        carried.push(per_second.median);
        rows.push(json!({
            "contender": contender.name,
            "packets_per_second": per_second.json(),
            "cpu_us": cpu.json(),
            "p50_us": p50.json(),
            "p99_us": p99.json(),
        }));
    }
    Ok((rows.into(), carried))
}

/// A relay that lets anybody in, as fast as they can.
fn start(program: &Path, folder: &Path, tls: bool) -> anyhow::Result<(Process, SocketAddr)> {
    let config = folder.join("relay.toml");
    let tls = if tls { "own" } else { "off" };
    std::fs::write(
        &config,
        format!("admit = 'open'\ntls = '{tls}'\nclient-bytes-per-second = 0\n"),
    )?;
    let mut command = Command::new(program);
    command
        .arg("serve")
        .arg("--state-dir")
        .arg(folder.join("state"));
    command.arg("--config").arg(&config);
    for door in ["--listen", "--stun-listen", "--status-listen"] {
        command.args([door, "127.0.0.1:0"]);
    }
    let relay = Process::start("relay", &mut command, &folder.join("relay.log"))?;
    let told = || {
        let said = relay.said();
        let rest = said.split("listens on ").nth(1)?.to_owned();
        rest.split_once(',')?.0.parse().ok()
    };
    tests::wait_until("the relay listens", READY, || told().is_some())?;
    let addr = told().context("the relay does not say where it listens")?;
    Ok((relay, addr))
}

fn round(args: &Args, contender: &Contender) -> anyhow::Result<Round> {
    let (pairs, _) = contender.pairs(args.pairs)?;
    let (start, cpu) = (Instant::now(), cpu_ticks(contender.process())?);
    let threads: Vec<_> = pairs
        .into_iter()
        .map(|(sender, receiver)| {
            let (packets, window, size) = (args.packets, args.window, args.size);
            thread::spawn(move || transfer(sender, receiver, packets, window, size))
        })
        .collect();
    let mut times = Vec::new();
    for thread in threads {
        let Ok(pair) = thread.join() else {
            bail!("a pair's thread died");
        };
        times.extend(pair?);
    }
    let (took, used) = (start.elapsed(), cpu_ticks(contender.process())? - cpu);
    let packets = times.len() as f64;
    Ok(Round {
        per_second: packets / took.as_secs_f64(),
        cpu_us: used as f64 * tick_us() / packets,
        p50_us: late(&mut times, 0.5),
        p99_us: late(&mut times, 0.99),
    })
}

/// Sends all packets with `window` under way, and returns how long each took.
fn transfer(
    mut sender: Sender,
    mut receiver: Receiver,
    packets: u64,
    window: usize,
    size: usize,
) -> anyhow::Result<Vec<Duration>> {
    let (leave, arrive) = sync_channel::<()>(window);
    let begin = Instant::now();
    let sending = thread::spawn(move || -> anyhow::Result<()> {
        let mut batch = Batch::new(size, begin);
        for number in 0..packets {
            leave.send(()).context("the receiver is gone")?;
            batch.send(&mut sender, number..number + 1)?;
        }
        // Its leaving must not be told before all has arrived.
        let _ = leave.send(());
        Ok(())
    });
    let (mut times, mut buffer) = (Vec::new(), Vec::new());
    for number in 0..packets {
        let (seen, took) = receiver.next(begin, &mut buffer)?;
        ensure!(seen == number, "a packet was lost");
        times.push(took);
        arrive.recv().context("the sender is gone")?;
    }
    match sending.join() {
        Ok(done) => done.map(|()| times),
        Err(_) => bail!("a sender died"),
    }
}

/// User and system time of a process, in clock ticks (proc(5), fields 14 and 15).
pub fn cpu_ticks(process: &Process) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()))?;
    let (_, fields) = stat.rsplit_once(')').context("no process status")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let field = |number: usize| -> anyhow::Result<u64> {
        let text = fields.get(number - 3).context("a short process status")?;
        Ok(text.parse()?)
    };
    Ok(field(14)? + field(15)?)
}

/// Length of such a tick.
pub fn tick_us() -> f64 {
    1e6 / rustix::param::clock_ticks_per_second() as f64
}

/// Bytes of the relay's memory.
fn resident(relay: &Process) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line
        .context("no memory size")?
        .trim()
        .trim_end_matches(" kB");
    Ok(kilobytes.parse::<u64>()? * 1024)
}
