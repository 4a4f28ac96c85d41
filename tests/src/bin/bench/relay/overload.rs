//! What a relay delivers when it is offered more than it can carry.
//!
//! Each pair's sender writes by a schedule and does not wait for what arrives; where TCP holds it
//! back it falls behind, and the document says by how much. Goodput is what receivers get.

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proto::derp::{Frame, kind};
use proto::key::NodeKey;
use serde_json::{Value, json};
use tests::process::Process;

use super::client::{Client, Door};
use super::{Args, cpu_ticks, tick_us};

/// How long a load is kept up before it is measured, and how long it is measured.
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURED: Duration = Duration::from_secs(1);
/// By how much senders stand back (nice(2), of their threads): on a small machine they would take
/// the processors from the relay and from those who receive, and it is the relay that is to be
/// overloaded.
const POLITE: i32 = 10;
/// Turns of each load; the middle one counts, because others use the machine too.
const TURNS: usize = 3;
/// Frames that are written at once when they are due.
const BATCH: u64 = 16;
/// Each load is so many times the one before.
const STEP: f64 = 1.5;
/// A relay that takes less of what it is offered can carry no more.
const TAKEN: f64 = 0.9;
/// No machine carries so many times what a full pipeline does.
const MAX_STEPS: usize = 8;

/// What is sent and what arrives, of all pairs.
#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    arrived: AtomicU64,
    over: AtomicBool,
}

/// Offers more and more, from half of `first` frames a second on, until the relay does not take it
/// all; then twice the best that arrived. Prints a table and returns the document: `kept` is what is
/// left of the best then.
pub fn run(args: &Args, relay: &Process, door: &Door, first: f64) -> anyhow::Result<Value> {
    println!("  offered/s    taken/s   goodput/s   CPU us/frame");
    let mut rows = Vec::new();
    let mut measure = |offered: f64| -> anyhow::Result<Load> {
        let turns = (0..TURNS).map(|_| load(args, relay, door, offered));
        let mut turns = turns.collect::<anyhow::Result<Vec<_>>>()?;
        turns.sort_by(|a, b| a.goodput.total_cmp(&b.goodput));
        let middle = turns.swap_remove(TURNS / 2);
        let Load {
            taken,
            goodput,
            relay_us,
        } = middle;
        println!("{offered:>11.0} {taken:>10.0} {goodput:>11.0} {relay_us:>14.2}");
        rows.push(json!({
            "offered_per_second": offered,
            "taken_per_second": taken,
            "goodput_per_second": goodput,
            "relay_cpu_us_per_frame": relay_us,
        }));
        Ok(middle)
    };
    let (mut offered, mut best) = (first / 2.0, 0.0_f64);
    for _ in 0..MAX_STEPS {
        let load = measure(offered)?;
        best = best.max(load.goodput);
        if load.taken < offered * TAKEN {
            break;
        }
        offered *= STEP;
    }
    let kept = measure(2.0 * best)?.goodput / best;
    println!("at twice its capacity it keeps {:.0} %", kept * 100.0);
    Ok(json!({ "loads": rows, "capacity_per_second": best, "kept": kept }))
}

/// What was measured in one turn, in frames a second.
struct Load {
    taken: f64,
    goodput: f64,
    relay_us: f64,
}

fn load(args: &Args, relay: &Process, door: &Door, offered: f64) -> anyhow::Result<Load> {
    let counts = Arc::new(Counts::default());
    let (mut threads, mut connections) = (Vec::new(), Vec::new());
    for pair in 0..args.pairs as u64 {
        let sender = Client::join(door, 2 * pair + 1)?;
        let receiver = Client::join(door, 2 * pair + 2)?;
        connections.extend([sender.connection()?, receiver.connection()?]);
        let (dst, size, rate) = (receiver.key, args.size, offered / args.pairs as f64);
        let both = (Arc::clone(&counts), Arc::clone(&counts));
        threads.push(thread::spawn(move || {
            send(sender, dst, size, rate, &both.0)
        }));
        threads.push(thread::spawn(move || receive(receiver, &both.1)));
    }
    let read = || {
        let sent = counts.sent.load(Ordering::Relaxed);
        (sent, counts.arrived.load(Ordering::Relaxed))
    };
    thread::sleep(WARM_UP);
    let (before, cpu, start) = (read(), cpu_ticks(relay)?, Instant::now());
    thread::sleep(MEASURED);
    let (after, cpu, took) = (read(), cpu_ticks(relay)? - cpu, start.elapsed());
    counts.over.store(true, Ordering::Relaxed);
    for connection in connections {
        // Whoever reads or writes just now stops.
        let _ = connection.shutdown(Shutdown::Both);
    }
    for thread in threads {
        // A thread that died counted nothing, which shows.
        let _ = thread.join();
    }
    let (sent, arrived) = ((after.0 - before.0) as f64, (after.1 - before.1) as f64);
    let seconds = took.as_secs_f64();
    Ok(Load {
        taken: sent / seconds,
        goodput: arrived / seconds,
        relay_us: cpu as f64 * tick_us() / arrived.max(1.0),
    })
}

fn send(mut sender: Client, dst: NodeKey, size: usize, rate: f64, counts: &Counts) {
    // An impolite sender only makes the load greater.
    let _ = rustix::process::nice(POLITE);
    let packet = &vec![0; size];
    let frame = Frame::SendPacket { dst, packet }.to_vec();
    let frames = frame.repeat(BATCH as usize);
    let start = Instant::now();
    let mut sent = 0;
    while !counts.over.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_secs_f64() * rate) as u64;
        if due < sent + BATCH {
            // Until the next batch is due; a little late is made up for.
            thread::sleep(Duration::from_secs_f64(BATCH as f64 / rate / 4.0));
            continue;
        }
        if sender.send(&frames).is_err() {
            return;
        }
        sent += BATCH;
        counts.sent.fetch_add(BATCH, Ordering::Relaxed);
    }
}

fn receive(mut receiver: Client, counts: &Counts) {
    while receiver.next(kind::RECV_PACKET).is_ok() {
        counts.arrived.fetch_add(1, Ordering::Relaxed);
    }
}
