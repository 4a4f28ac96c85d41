//! What the policy costs a live packet, and who else would do it at what cost.
//!
//! Every contender has the same policy and a namespace of its own ([`ground`]); frames that the
//! kernel makes ([`frames`]) are forwarded through it. One system call sends a *slice*, some
//! milliseconds of packets, and the CPU time of this thread is all that is counted: the whole way
//! runs in it. The contenders take turns slice by slice; the least of a round's few slices is what
//! a contender needed in that round, because whatever else runs here only adds. Rows show the
//! median of the rounds with the quartiles, and *added* is what is left after taking away what the
//! same packets cost in a namespace where nobody decides (or where an empty chain drops them).

mod apply;
mod contender;
mod floor;
mod frames;
mod ground;
mod plot;
mod report;
mod rules;

use std::path::PathBuf;

use anyhow::Context;
use serde_json::{Value, json};

use contender::{Contender, Who, version};
use frames::{Frames, Mix};
use report::{Row, Table};
use rules::{Form, Hook};

/// CPU time of one slice, about.
const SLICE_NS: u64 = 8_000_000;
/// Packets of the shortest and of the longest slice.
const SLICE_PACKETS: (u64, u64) = (256, 16_384);
/// Packets of a slice that shows what a system call costs beside its packets.
const STUB: u32 = 64;
/// Times that weir with the fewest rules meets weir with the most.
const HOT_PAIRS: u32 = 4;
/// Peers met again and again.
const HOT: u32 = 10;
/// Flows of the large flow table: peers, and source ports to each.
const MANY_FLOWS: (u32, u32) = (1_000, 50);
/// Source ports of flows that are new with every packet.
const NEW_PORTS: u32 = 32_768;
/// More rules one after the other would measure patience.
const LINEAR: [u32; 2] = [10, 1_000];
/// Rules with which flows are measured.
const FLOW_RULES: u32 = 1_000;

#[derive(clap::Args)]
pub struct Args {
    /// Less of everything: at most 1,000 rules, few rounds, no policy applied
    #[arg(long)]
    quick: bool,
    /// Only enough to see that it works: weir, and a chain that is walked
    #[arg(long, hide = true)]
    smoke: bool,
    /// Rounds; every contender has its turns in each (10, and 5 with --quick)
    #[arg(long)]
    rounds: Option<usize>,
    /// Turns in one round, of which the least counts
    #[arg(long, default_value_t = 8)]
    turns: usize,
    /// Only contenders whose name has one of these in it, beside what is taken away from all
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    only: Vec<String>,
    /// Only packets whose name has this in it
    #[arg(long, value_name = "TEXT")]
    packets: Option<String>,
    /// Write a plot here, as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// One kind of packets at one contender.
struct Line {
    contender: usize,
    case: Case,
    frames: Frames,
    packets: u32,
    /// Nanoseconds a packet, by round.
    rounds: Vec<f64>,
}

/// What is special about the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Case {
    /// Allowed, of few flows, all known.
    Known,
    /// Allowed, of 50,000 flows, all known.
    KnownMany,
    /// Allowed, to any of the peers.
    Spread,
    /// Allowed, each of a flow of its own.
    New,
    /// Not allowed, to few peers.
    Refused,
    /// Not allowed, to any of the peers.
    RefusedSpread,
    /// Not allowed, to few peers, each from another port than the last.
    RefusedNew,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Known => "allowed, few flows",
            Self::KnownMany => "allowed, 50,000 flows",
            Self::Spread => "allowed, any peer",
            Self::New => "allowed, always new",
            Self::Refused => "refused, few peers",
            Self::RefusedSpread => "refused, any peer",
            Self::RefusedNew => "refused, always new",
        }
    }

    fn allowed(self) -> bool {
        !matches!(self, Self::Refused | Self::RefusedSpread | Self::RefusedNew)
    }

    /// The packets, for a policy of so many rules.
    fn mix(self, rules: u32) -> Mix {
        let (peers, source_ports) = match self {
            Self::Known | Self::Refused => (HOT, 1),
            Self::KnownMany => MANY_FLOWS,
            Self::Spread | Self::RefusedSpread => (rules, 1),
            Self::New => (FLOW_RULES, NEW_PORTS),
            Self::RefusedNew => (HOT, NEW_PORTS),
        };
        Mix {
            peers,
            stride: if peers == HOT { rules / HOT } else { 1 },
            source_ports,
            first_source: 0,
            allowed: self.allowed(),
            replies: false,
        }
    }
}

/// Measures, prints a table, and returns the document.
pub fn run(args: &Args) -> anyhow::Result<Value> {
    let (sizes, rounds): (&[u32], usize) = if args.quick || args.smoke {
        (&[10, 1_000], 5)
    } else {
        (&[10, 1_000, 10_000, 100_000], 10)
    };
    let rounds = args.rounds.unwrap_or(rounds);
    anyhow::ensure!(
        rounds > 0 && args.turns > 0,
        "at least one round and one turn"
    );
    // Others on this machine then disturb less; without the right to it, it is only noisier.
    let _ = rustix::process::setpriority_process(None, -20);
    let mut contenders = Vec::new();
    let mut lines = Vec::new();
    let mut programme = programme(sizes);
    if args.smoke {
        let few = [report::NOBODY, report::WALL, report::WEIR, report::LINEAR];
        programme.retain(|(name, ..)| few.contains(name));
    }
    if !args.only.is_empty() {
        let base = [report::NOBODY, report::WALL, report::EMPTY];
        let asked = |name: &str| args.only.iter().any(|text| name.contains(text));
        programme.retain(|(name, ..)| base.contains(name) || asked(name));
    }
    if let Some(text) = &args.packets {
        for (.., cases) in &mut programme {
            cases.retain(|case| case.name().contains(text.as_str()));
        }
        programme.retain(|(.., cases)| !cases.is_empty());
        anyhow::ensure!(
            !programme.is_empty(),
            "--packets {text}: no packets are named so; all names are in the table of a run \
             without --packets"
        );
    }
    for (name, who, rules, cases) in programme {
        eprintln!("preparing: {name}, {rules} rules");
        let contender = prepare(name, who, rules, cases, contenders.len(), &mut lines)
            .with_context(|| format!("{name} with {rules} rules"))?;
        contenders.push(contender);
    }
    for round in 1..=rounds {
        measure(&contenders, &mut lines, args.turns)?;
        eprintln!("round {round} of {rounds}");
    }
    let rows = lines.into_iter().map(|line| Row {
        contender: contenders[line.contender].name.clone(),
        rules: contenders[line.contender].rules,
        case: line.case,
        rounds: line.rounds,
    });
    let table = Table::new(rows.collect());
    drop(contenders);
    let applied = if args.quick || args.smoke || !args.only.is_empty() {
        Vec::new()
    } else {
        apply::measure(&[10_000, 100_000])?
    };
    table.print();
    apply::print(&applied);
    let aims = report::aims(&table, &applied);
    report::print_aims(&aims);
    if let Some(file) = &args.svg {
        let text = plot::svg(&table);
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(json!({
        "bench": "acl", "rounds": rounds, "turns": args.turns, "hot_peers": HOT,
        "peers": tools(), "rows": table.json(), "apply": apply::json(&applied),
        "aims": report::aims_json(&aims),
    }))
}

/// Who runs against whom, with how many rules, on which packets.
fn programme(sizes: &[u32]) -> Vec<(&'static str, Who, u32, Vec<Case>)> {
    use Case::{Known, KnownMany, New, Refused, RefusedNew, RefusedSpread, Spread};
    let largest = sizes.last().copied().unwrap_or(HOT);
    let all = vec![Known, KnownMany, Spread, New];
    let refused = vec![Refused, RefusedSpread, RefusedNew];
    let dropped = vec![Refused, RefusedSpread];
    let mut programme = vec![
        (report::NOBODY, Who::Nobody, largest, all),
        (report::WALL, Who::Wall, largest, refused),
        (report::EMPTY, Who::Empty(true), largest, vec![Known]),
        (report::EMPTY, Who::Empty(false), largest, dropped),
    ];
    for &rules in sizes {
        let set = Who::Nftables(Hook::Device, Form::Set);
        let mut cases = vec![Known, Refused, RefusedSpread];
        if rules == FLOW_RULES {
            cases.push(RefusedNew);
        }
        programme.push((report::WEIR, Who::Weir, rules, cases.clone()));
        if rules != HOT {
            let any = vec![RefusedSpread];
            programme.push((report::ONE_LINE, Who::OneLine, rules, any));
        }
        cases.push(Spread);
        programme.push((report::SET, set, rules, cases));
    }
    // Where a table lies in memory is chance: so more than one of each.
    for _ in 0..HOT_PAIRS {
        for rules in [HOT, largest] {
            programme.push((report::WEIR_HOT, Who::Weir, rules, vec![Known, Refused]));
        }
    }
    let flows = vec![Known, KnownMany];
    programme.push((report::FLOOR_FLOWS, Who::Floor, FLOW_RULES, flows));
    programme.push((report::FLOOR_NEW, Who::Floor, FLOW_RULES, vec![New]));
    programme.push((
        report::WEIR_FLOWS,
        Who::Weir,
        FLOW_RULES,
        vec![Known, KnownMany],
    ));
    programme.push((report::WEIR_NEW, Who::Weir, FLOW_RULES, vec![New]));
    let tracked = Who::Nftables(Hook::Tracked, Form::Nothing);
    programme.push((
        report::CONNTRACK,
        tracked,
        FLOW_RULES,
        vec![Known, KnownMany],
    ));
    let tracked = Who::Nftables(Hook::Tracked, Form::Set);
    programme.push((
        report::CONNTRACK_NEW,
        tracked,
        FLOW_RULES,
        vec![New, Refused, RefusedNew],
    ));
    for rules in LINEAR {
        let linear = Who::Nftables(Hook::Device, Form::Linear);
        programme.push((report::LINEAR, linear, rules, vec![Known, Refused]));
        for program in ["iptables-legacy", "iptables-nft"] {
            if version(program).is_some() {
                programme.push((program, Who::Iptables(program), rules, vec![Known, Refused]));
            }
        }
    }
    programme
}

/// Makes a contender, proves that it decides right, and plans its slices.
fn prepare(
    name: &str,
    who: Who,
    rules: u32,
    cases: Vec<Case>,
    index: usize,
    lines: &mut Vec<Line>,
) -> anyhow::Result<Contender> {
    let mut contender = Contender::make(name, who, rules)?;
    let knows_flows = matches!(
        who,
        Who::Weir | Who::Floor | Who::Nftables(Hook::Tracked, _)
    );
    let mut planned = Vec::new();
    for case in cases {
        let mix = case.mix(rules);
        frames::check(&mix)?;
        if knows_flows && matches!(case, Case::Known | Case::KnownMany) {
            for first_source in 0..mix.source_ports {
                // One port after the other: the table of flows that open is small.
                contender.establish(&Mix {
                    source_ports: 1,
                    first_source,
                    ..mix
                })?;
            }
        }
        let frames = Frames::of(&mix)?;
        contender.prove(&mix, &frames)?;
        if who == Who::OneLine {
            // It is measured by what it refuses alone, and each peer's line must be there.
            let twin = Case::Spread.mix(rules);
            contender.prove(&twin, &Frames::of(&twin)?)?;
        }
        planned.push((case, frames));
    }
    contender.ready()?;
    contender.ground.enter()?;
    for (case, frames) in planned {
        let (least, most) = SLICE_PACKETS;
        let stub = frames.send(contender.ground.arrival, STUB)?;
        let spent = frames.send(contender.ground.arrival, STUB + least as u32)?;
        let each = spent.saturating_sub(stub) / least;
        let packets = (SLICE_NS / each.max(1)).clamp(least, most) as u32;
        lines.push(Line {
            contender: index,
            case,
            frames,
            packets,
            rounds: Vec::new(),
        });
    }
    Ok(contender)
}

/// One round: the lines take turns, and the least of its turns is a line's figure.
fn measure(contenders: &[Contender], lines: &mut [Line], turns: usize) -> anyhow::Result<()> {
    let mut least = vec![u64::MAX; lines.len()];
    let mut stub = u64::MAX;
    for _ in 0..turns {
        for (line, least) in lines.iter().zip(&mut least) {
            let ground = &contenders[line.contender].ground;
            ground.enter()?;
            if line.contender == 0 {
                stub = stub.min(line.frames.send(ground.arrival, STUB)?);
            }
            // What is taken away from everything else deserves more turns.
            let who = contenders[line.contender].who;
            let sends = if matches!(who, Who::Nobody | Who::Wall) {
                3
            } else {
                1
            };
            for _ in 0..sends {
                *least = (*least).min(line.frames.send(ground.arrival, line.packets)?);
            }
        }
    }
    let fixed = fixed(stub, least[0], lines[0].packets);
    for (line, least) in lines.iter_mut().zip(least) {
        let spent = least as f64 - fixed;
        line.rounds.push(spent / f64::from(line.packets));
    }
    Ok(())
}

/// What a system call costs without its packets: the line through a stub and a slice, at 0.
fn fixed(stub: u64, slice: u64, packets: u32) -> f64 {
    let each = (slice as f64 - stub as f64) / f64::from(packets - STUB);
    stub as f64 - each * f64::from(STUB)
}

/// What the peers say of themselves.
fn tools() -> Value {
    let programs = ["nft", "iptables-legacy", "iptables-nft"];
    let said = programs.map(|program| {
        let version = version(program);
        (
            program.to_owned(),
            version.unwrap_or_else(|| "not here".to_owned()).into(),
        )
    });
    Value::Object(said.into_iter().collect())
}
