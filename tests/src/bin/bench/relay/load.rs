//! What arrives, and how late, when packets come by a schedule: half of what the carrier can take,
//! all of it, and twice as much.
//!
//! Each pair's sender writes when it is due and does not wait for what arrives; where TCP holds it
//! back it falls behind, and the document says by how much. Goodput is what receivers get.

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::pair::{Batch, Contender, Receiver, Sender};
use super::{Args, Spread, cpu_ticks, late, tick_us};

/// How long a load is kept up before it is measured, and how long it is measured.
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURED: Duration = Duration::from_secs(1);
/// By how much senders stand back (nice(2), of their threads): on a small machine they would take
/// the processors from the carrier and from those who receive, and it is the carrier that is to be
/// overloaded.
const POLITE: i32 = 10;
/// Most packets that are written at once when they are due, and their share of a second's.
const BATCH: u64 = 16;
const BATCH_OF: f64 = 2_000.0;
/// While its limit is sought, each load is so many times the one before.
const STEP: f64 = 1.5;
/// Whoever delivers less of what it is offered, the better of some tries, can carry no more.
const TAKEN: f64 = 0.9;
const TRIES: usize = 2;
/// No machine carries so many times what a full pipeline does.
const MAX_STEPS: usize = 8;
/// Packets a second that all carry alike.
const LIGHT: f64 = 4_000.0;
/// Shares of the capacity that are offered, after the light load.
const SHARES: [f64; 3] = [0.5, 1.0, 2.0];

/// What is sent and what arrives, of all pairs.
#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    arrived: AtomicU64,
    measuring: AtomicBool,
    over: AtomicBool,
}

/// What was measured in one turn: packets a second, microseconds.
struct Load {
    taken: f64,
    goodput: f64,
    cpu_us: f64,
    p50_us: f64,
    p99_us: f64,
}

/// Offers each contender the light load and shares of its own capacity, in turns. `pipeline` is
/// what each carried when it was never idle. Prints a table and returns the document.
pub fn run(args: &Args, contenders: &[Contender], pipeline: &[f64]) -> anyhow::Result<Value> {
    let mut capacities = Vec::new();
    for (contender, carried) in contenders.iter().zip(pipeline) {
        capacities.push(capacity(args, contender, *carried)?);
    }
    println!("\n  offered/s    taken/s   goodput/s  CPU us   p50 us   p99 us");
    let mut loads = vec![Vec::new(); contenders.len()];
    let mut peaks = vec![Vec::new(); contenders.len()];
    for share in [None].into_iter().chain(SHARES.map(Some)) {
        let mut turns: Vec<Vec<Load>> = contenders.iter().map(|_| Vec::new()).collect();
        let offered = |at: usize| share.map_or(LIGHT, |share| share * capacities[at]);
        for _ in 0..args.rounds {
            for (at, contender) in contenders.iter().enumerate() {
                turns[at].push(load(args, contender, offered(at))?);
            }
        }
        for (at, contender) in contenders.iter().enumerate() {
            let row = row(contender.name, share, offered(at), &turns[at]);
            peaks[at].push(row["goodput_per_second"]["median"].as_f64().unwrap_or(0.0));
            loads[at].push(row);
        }
    }
    let mut document = Vec::new();
    for ((contender, loads), (goodputs, capacity)) in contenders
        .iter()
        .zip(loads)
        .zip(peaks.iter().zip(&capacities))
    {
        let best = goodputs.iter().copied().fold(0.0, f64::max);
        let kept = goodputs.last().copied().unwrap_or(0.0) / best;
        println!(
            "{}: of its best it keeps {:.0} % at twice its capacity",
            contender.name,
            kept * 100.0
        );
        document.push(json!({
            "contender": contender.name,
            "capacity_per_second": capacity,
            "loads": loads,
            "kept": kept,
        }));
    }
    Ok(document.into())
}

/// Prints and returns what the turns of one load show.
fn row(name: &str, share: Option<f64>, offered: f64, turns: &[Load]) -> Value {
    let spread = |of: fn(&Load) -> f64| Spread::of(turns.iter().map(of));
    let (taken, goodput) = (spread(|turn| turn.taken), spread(|turn| turn.goodput));
    let cpu = spread(|turn| turn.cpu_us);
    let (p50, p99) = (spread(|turn| turn.p50_us), spread(|turn| turn.p99_us));
    println!(
        "{offered:>11.0} {:>10.0} {:>11.0} {:>7.2} {:>8.0} {:>8.0}  {name}, {}",
        taken.median,
        goodput.median,
        cpu.median,
        p50.median,
        p99.median,
        share.map_or("light".to_owned(), |share| format!("{share} of capacity")),
    );
    json!({
        "share_of_capacity": share,
        "offered_per_second": offered,
        "taken_per_second": taken.json(),
        "goodput_per_second": goodput.json(),
        "cpu_us": cpu.json(),
        "p50_us": p50.json(),
        "p99_us": p99.json(),
    })
}

/// The most that arrives in a second, sought upwards from half of `first`.
fn capacity(args: &Args, contender: &Contender, first: f64) -> anyhow::Result<f64> {
    let (mut offered, mut best) = (first / 2.0, 0.0_f64);
    for _ in 0..MAX_STEPS {
        let mut carried = 0.0_f64;
        for _ in 0..TRIES {
            carried = carried.max(load(args, contender, offered)?.goodput);
        }
        best = best.max(carried);
        if carried < offered * TAKEN {
            break;
        }
        offered *= STEP;
    }
    Ok(best)
}

fn load(args: &Args, contender: &Contender, offered: f64) -> anyhow::Result<Load> {
    let counts = Arc::new(Counts::default());
    let begin = Instant::now();
    let (pairs, connections) = contender.pairs(args.pairs)?;
    let (size, rate) = (args.size, offered / args.pairs as f64);
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for (sender, receiver) in pairs {
        let both = (Arc::clone(&counts), Arc::clone(&counts));
        let batch = Batch::new(size, begin);
        senders.push(thread::spawn(move || send(sender, batch, rate, &both.0)));
        receivers.push(thread::spawn(move || receive(receiver, begin, &both.1)));
    }
    let read = || {
        let sent = counts.sent.load(Ordering::Relaxed);
        (sent, counts.arrived.load(Ordering::Relaxed))
    };
    thread::sleep(WARM_UP);
    counts.measuring.store(true, Ordering::Relaxed);
    let (before, cpu, start) = (read(), cpu_ticks(contender.process())?, Instant::now());
    thread::sleep(MEASURED);
    let (after, cpu) = (read(), cpu_ticks(contender.process())? - cpu);
    let seconds = start.elapsed().as_secs_f64();
    counts.measuring.store(false, Ordering::Relaxed);
    counts.over.store(true, Ordering::Relaxed);
    // Senders still send, so receivers of datagrams wake once more and see that it is over.
    for connection in connections {
        let _ = connection.shutdown(Shutdown::Both);
    }
    let mut times = Vec::new();
    for receiver in receivers {
        // A thread that died counted nothing, which shows.
        times.extend(receiver.join().unwrap_or_default());
    }
    for sender in senders {
        let _ = sender.join();
    }
    let (sent, arrived) = ((after.0 - before.0) as f64, (after.1 - before.1) as f64);
    Ok(Load {
        taken: sent / seconds,
        goodput: arrived / seconds,
        cpu_us: cpu as f64 * tick_us() / arrived.max(1.0),
        p50_us: late(&mut times, 0.5),
        p99_us: late(&mut times, 0.99),
    })
}

fn send(mut sender: Sender, mut packets: Batch, rate: f64, counts: &Counts) {
    // An impolite sender only makes the load greater.
    let _ = rustix::process::nice(POLITE);
    let batch = ((rate / BATCH_OF) as u64).clamp(1, BATCH);
    let start = Instant::now();
    let mut sent = 0;
    loop {
        let due = (start.elapsed().as_secs_f64() * rate) as u64;
        if due < sent + batch {
            // Until the next batch is due; a little late is made up for.
            thread::sleep(Duration::from_secs_f64(batch as f64 / rate / 4.0));
            continue;
        }
        if packets.send(&mut sender, sent..sent + batch).is_err() {
            return;
        }
        sent += batch;
        counts.sent.fetch_add(batch, Ordering::Relaxed);
        if counts.over.load(Ordering::Relaxed) {
            return;
        }
    }
}

fn receive(mut receiver: Receiver, begin: Instant, counts: &Counts) -> Vec<Duration> {
    let (mut times, mut buffer) = (Vec::new(), Vec::new());
    while let Ok((_, took)) = receiver.next(begin, &mut buffer) {
        counts.arrived.fetch_add(1, Ordering::Relaxed);
        if counts.measuring.load(Ordering::Relaxed) {
            times.push(took);
        }
        if counts.over.load(Ordering::Relaxed) {
            break;
        }
    }
    times
}
