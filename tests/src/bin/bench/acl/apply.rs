//! How long it takes until a whole policy counts: weir's tables against `nft -f`.
//!
//! A policy of the same size is in force already, as on a host where it is edited. weir's time is
//! from lowered tables to the active word, and beside it the time to lower them; nft's is that of
//! the command, which reads, checks and commits its text.

use std::process::Command;
use std::time::{Duration, Instant};

use engine::acl::{Acl as Lowered, Change};
use serde_json::{Value, json};
use tests::process;

use super::ground::{Ground, Weir};
use super::report::Spread;
use super::rules::{self, Form, Hook};

/// What ours is called.
pub const OURS: &str = "weir, tables in force";
/// Each time.
const ROUNDS: usize = 5;
/// No command of a peer takes longer.
const BOUND: Duration = Duration::from_secs(300);
/// More rules one after the other would measure patience.
const MOST_LINEAR: u32 = 10_000;

/// Times to apply one policy, by round, in milliseconds.
pub struct Applied {
    pub rules: u32,
    /// How the peer was told.
    pub peer: &'static str,
    ours: Vec<f64>,
    lowering: Vec<f64>,
    theirs: Vec<f64>,
}

impl Applied {
    /// Ours in theirs.
    pub fn ratio(&self) -> Spread {
        let rounds = self.ours.iter().zip(&self.theirs);
        Spread::of(rounds.map(|(ours, theirs)| ours / theirs).collect())
    }
}

/// Applies policies of these sizes, in turns.
pub fn measure(sizes: &[u32]) -> anyhow::Result<Vec<Applied>> {
    let mut applied = Vec::new();
    for &size in sizes {
        eprintln!("applying {size} rules");
        applied.push(one(size, "nft -f, a set", Form::Set)?);
        if size <= MOST_LINEAR {
            applied.push(one(size, "nft -f, linear rules", Form::Linear)?);
        }
    }
    Ok(applied)
}

fn one(size: u32, peer: &'static str, form: Form) -> anyhow::Result<Applied> {
    let (mine, other) = (Ground::make()?, Ground::make()?);
    mine.enter()?;
    let mut weir: Weir = mine.weir()?;
    let (me, peers) = (rules::me(), rules::peers(size));
    // Two policies that differ in one rule, so that each replaces the other.
    let (all, mut fewer) = (rules::filter(size), rules::filter(size));
    fewer.egress.pop();
    let text = rules::nftables(Hook::Device, form, size, false);
    let mut applied = Applied {
        rules: size,
        peer,
        ours: Vec::new(),
        lowering: Vec::new(),
        theirs: Vec::new(),
    };
    for round in 0..=ROUNDS {
        mine.enter()?;
        let filter = if round % 2 == 0 { &all } else { &fewer };
        let start = Instant::now();
        let mut lowered = Lowered::default();
        lowered.lower(filter, &me, &peers)?;
        let lowering = milliseconds(start);
        let start = Instant::now();
        let swap = Change::Swap { narrows: true };
        weir.acl()?.set(lowered.tables(), Some(&swap))?;
        let ours = milliseconds(start);
        other.enter()?;
        let mut nft = Command::new("nft");
        nft.args(["-f", "-"]);
        let start = Instant::now();
        process::run(&mut nft, &text, BOUND)?.success()?;
        let theirs = milliseconds(start);
        // The first of each had nothing to replace.
        if round > 0 {
            applied.lowering.push(lowering);
            applied.ours.push(ours);
            applied.theirs.push(theirs);
        }
    }
    Ok(applied)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

pub fn print(applied: &[Applied]) {
    for Applied {
        rules,
        peer,
        ours,
        lowering,
        theirs,
    } in applied
    {
        let [ours, lowering, theirs] =
            [ours, lowering, theirs].map(|times| Spread::of(times.clone()).median);
        println!(
            "{rules} rules in force: weir {ours:.0} ms (and {lowering:.0} ms to lower them), \
             {peer} {theirs:.0} ms"
        );
    }
}

pub fn json(applied: &[Applied]) -> Value {
    let rows = applied.iter().map(|applied| {
        json!({
            "rules": applied.rules, "peer": applied.peer,
            "weir_ms": Spread::of(applied.ours.clone()).json(),
            "lowering_ms": Spread::of(applied.lowering.clone()).json(),
            "peer_ms": Spread::of(applied.theirs.clone()).json(),
        })
    });
    rows.collect()
}
