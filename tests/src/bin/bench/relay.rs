//! What one packet and one idle client cost a relay: a real `weir-relay` on the loopback address,
//! with plain TCP, its processor time and memory read from `/proc`.
//!
//! Each pair has a fixed number of packets under way, so nothing is dropped and the relay is always
//! busy. Latency is then that of a full pipeline. The same number of datagrams through a UDP echo in
//! this process shows what the kernel alone takes for the two hops. What the pipeline carried is
//! taken for the capacity, and then more than that is offered ([`overload`]). At last come clients
//! that do nothing ([`idle`]).
//!
//! Build the relay with `--release` first: a debug build is measured only when there is no other, and
//! the document says which it was. Clients and relay share the machine's processors, so a figure per
//! second is the machine's; processor time per frame is the relay's own.

mod client;
mod idle;
mod overload;

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use client::{Client, Door};
use proto::derp::{Frame, kind};
use serde_json::{Value, json};
use tests::process::Process;

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

/// One round.
struct Row {
    frames_per_second: f64,
    relay_us: f64,
    echo_us: f64,
    p50_us: f64,
    p99_us: f64,
}

/// Measures, prints a table, and returns the document.
pub fn run(args: &Args) -> anyhow::Result<Value> {
    ensure!(args.rounds > 0 && args.pairs > 0 && args.packets > 0 && args.window > 0);
    ensure!(
        args.size >= STAMP_BYTES,
        "at least {STAMP_BYTES} bytes a packet"
    );
    let folder = tempfile::tempdir()?;
    let (program, profile) = match tests::binary("../release/weir-relay") {
        Ok(program) => (program, "release"),
        Err(_) => (tests::binary("weir-relay")?, "debug"),
    };
    let (relay, addr) = start(&program, folder.path(), false)?;
    let door = Door {
        addr,
        tls: None,
        buffer: 32 << 10,
    };
    println!(
        "weir-relay, {profile} build, {} pairs, {} B",
        args.pairs, args.size
    );
    println!("  frames/s   CPU us/frame   UDP echo us   p50 us   p99 us");
    let mut rows = Vec::new();
    let mut capacity = 0.0_f64;
    for _ in 0..args.rounds {
        let row = round(args, &relay, &door)?;
        capacity = capacity.max(row.frames_per_second);
        println!(
            "{:>10.0} {:>14.2} {:>13.2} {:>8.0} {:>8.0}",
            row.frames_per_second, row.relay_us, row.echo_us, row.p50_us, row.p99_us
        );
        rows.push(json!({
            "frames_per_second": row.frames_per_second,
            "relay_cpu_us_per_frame": row.relay_us,
            "udp_echo_cpu_us": row.echo_us,
            "ratio": row.relay_us / row.echo_us,
            "p50_us": row.p50_us,
            "p99_us": row.p99_us,
        }));
    }
    let overload = overload::run(args, &relay, &door, capacity)?;
    relay.kill();
    let idle = idle::run(args, &program)?;
    Ok(json!({
        "bench": "relay",
        "profile": profile,
        "pairs": args.pairs,
        "packet_bytes": args.size,
        "window": args.window,
        "rounds": rows,
        "overload": overload,
        "idle": idle,
    }))
}

/// A relay that lets anybody in, as fast as they can.
fn start(program: &PathBuf, folder: &Path, tls: bool) -> anyhow::Result<(Process, SocketAddr)> {
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

fn round(args: &Args, relay: &Process, door: &Door) -> anyhow::Result<Row> {
    let mut pairs = Vec::new();
    for pair in 0..args.pairs as u64 {
        let sender = Client::join(door, 2 * pair + 1)?;
        let receiver = Client::join(door, 2 * pair + 2)?;
        pairs.push((sender, receiver));
    }
    let (start, cpu) = (Instant::now(), cpu_ticks(relay)?);
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
    let (took, used) = (start.elapsed(), cpu_ticks(relay)? - cpu);
    let frames = times.len() as f64;
    times.sort_unstable();
    let at = |share: f64| {
        let place = (frames * share) as usize;
        times
            .get(place)
            .map_or(0.0, |time| time.as_secs_f64() * 1e6)
    };
    Ok(Row {
        frames_per_second: frames / took.as_secs_f64(),
        relay_us: used as f64 * tick_us() / frames,
        echo_us: udp_echo(args)?,
        p50_us: at(0.5),
        p99_us: at(0.99),
    })
}

/// Sends all packets with `window` under way, and returns how long each took.
fn transfer(
    mut sender: Client,
    mut receiver: Client,
    packets: u64,
    window: usize,
    size: usize,
) -> anyhow::Result<Vec<Duration>> {
    let (leave, arrive) = sync_channel::<()>(window);
    let dst = receiver.key;
    let begin = Instant::now();
    let sending = thread::spawn(move || -> anyhow::Result<()> {
        let mut packet = vec![0; size];
        let mut frame = Vec::new();
        for number in 0..packets {
            leave.send(()).context("the receiver is gone")?;
            let stamp = u64::try_from(begin.elapsed().as_nanos())?;
            packet[..8].copy_from_slice(&number.to_be_bytes());
            packet[8..STAMP_BYTES].copy_from_slice(&stamp.to_be_bytes());
            frame.clear();
            let packet = &packet;
            Frame::SendPacket { dst, packet }.encode(&mut frame);
            sender.send(&frame)?;
        }
        // Its leaving must not be told before all has arrived.
        let _ = leave.send(());
        Ok(())
    });
    let mut times = Vec::new();
    for number in 0..packets {
        let body = receiver.next(kind::RECV_PACKET)?;
        let stamp = body.get(32..32 + STAMP_BYTES).context("a packet was cut")?;
        let (seen, sent) = stamp.split_at(8);
        ensure!(seen == number.to_be_bytes(), "a packet was lost");
        let sent = Duration::from_nanos(u64::from_be_bytes(sent.try_into()?));
        times.push(begin.elapsed().saturating_sub(sent));
        arrive.recv().context("the sender is gone")?;
    }
    match sending.join() {
        Ok(done) => done.map(|()| times),
        Err(_) => bail!("a sender died"),
    }
}

/// CPU microseconds that a process takes to receive a datagram and send it on.
fn udp_echo(args: &Args) -> anyhow::Result<f64> {
    let (echo, client) = (
        UdpSocket::bind("127.0.0.1:0")?,
        UdpSocket::bind("127.0.0.1:0")?,
    );
    client.connect(echo.local_addr()?)?;
    let packets = args.packets;
    let size = args.size;
    let echoing = thread::spawn(move || -> anyhow::Result<f64> {
        let mut packet = vec![0; size];
        let before = thread_cpu();
        for _ in 0..packets {
            let (length, from) = echo.recv_from(&mut packet)?;
            echo.send_to(packet.get(..length).unwrap_or_default(), from)?;
        }
        Ok((thread_cpu() - before).as_secs_f64() * 1e6 / packets as f64)
    });
    let mut packet = vec![0; args.size];
    for _ in 0..packets {
        client.send(&packet)?;
        client.recv(&mut packet)?;
    }
    match echoing.join() {
        Ok(cost) => cost,
        Err(_) => bail!("the echo died"),
    }
}

fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}

/// User and system time of the relay, in clock ticks (proc(5), fields 14 and 15).
fn cpu_ticks(relay: &Process) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", relay.pid()))?;
    let (_, fields) = stat.rsplit_once(')').context("no process status")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let field = |number: usize| -> anyhow::Result<u64> {
        let text = fields.get(number - 3).context("a short process status")?;
        Ok(text.parse()?)
    };
    Ok(field(14)? + field(15)?)
}

fn tick_us() -> f64 {
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
