//! From slices to figures: medians, quartiles, what is added, and the aims.

use serde_json::{Value, json};

use super::apply::{self, Applied};
use super::{Case, FLOW_RULES};

/// Nobody decides.
pub const NOBODY: &str = "nothing attached";
/// An empty chain drops.
pub const WALL: &str = "bare drop";
/// A program that decides nothing, where weir's is.
pub const EMPTY: &str = "empty program";
/// weir's programs.
pub const WEIR: &str = "weir";
/// weir's programs with a large flow table.
pub const WEIR_FLOWS: &str = "weir, 50,000 flows";
/// weir's programs, flows only begin.
pub const WEIR_NEW: &str = "weir, new flows";
/// weir's programs with few rules and with many, more than once each.
pub const WEIR_HOT: &str = "weir, hot keys";
/// What reads one line of memory and nothing else.
pub const ONE_LINE: &str = "one line";
/// The least that a filter with state could do with the kernel's tables, and a large flow table.
pub const FLOOR_FLOWS: &str = "floor, 50,000 flows";
/// The same, flows only begin.
pub const FLOOR_NEW: &str = "floor, new flows";
/// One look-up in a set of concatenations.
pub const SET: &str = "nft set";
/// One rule after the other.
pub const LINEAR: &str = "nft linear";
/// Connection tracking, and the rule that lets known flows pass.
pub const CONNTRACK: &str = "nf_conntrack";
/// Connection tracking, flows only begin.
pub const CONNTRACK_NEW: &str = "nf_conntrack, new flows";

/// Median and quartiles.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Spread {
    /// Of these figures; all are NaN if there are none.
    pub fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let at = |quarter: usize| {
            let index = figures.len().saturating_sub(1) * quarter;
            figures.get((index + 2) / 4).copied().unwrap_or(f64::NAN)
        };
        Self {
            low: at(1),
            median: at(2),
            high: at(3),
        }
    }

    pub fn json(&self) -> Value {
        json!({"median": self.median, "q1": self.low, "q3": self.high})
    }
}

/// What one kind of packets cost at one contender, in nanoseconds a packet by round.
pub struct Row {
    pub contender: String,
    pub rules: u32,
    pub case: Case,
    pub rounds: Vec<f64>,
}

/// All rows of a run.
pub struct Table {
    pub rows: Vec<Row>,
}

impl Table {
    pub fn new(rows: Vec<Row>) -> Self {
        Self { rows }
    }

    fn find(&self, contender: &str, rules: Option<u32>, case: Case) -> Option<&Row> {
        self.rows.iter().find(|row| {
            row.contender == contender
                && row.case == case
                && rules.is_none_or(|rules| row.rules == rules)
        })
    }

    /// What a row costs beyond the way to where it is decided, by round.
    pub fn added(&self, row: &Row) -> Vec<f64> {
        self.beyond(if row.case.allowed() { NOBODY } else { WALL }, row)
    }

    /// What a row of weir's costs beyond a program that decides nothing. How it grows with the
    /// rules is told from that: beyond an empty chain, few rules may cost nothing at all.
    fn decided(&self, row: &Row) -> Vec<f64> {
        self.beyond(EMPTY, row)
    }

    fn beyond(&self, base: &str, row: &Row) -> Vec<f64> {
        let Some(base) = self.find(base, None, row.case) else {
            return Vec::new();
        };
        let rounds = row.rounds.iter().zip(&base.rounds);
        rounds.map(|(row, base)| row - base).collect()
    }

    /// Added cost of the first row in that of the second, by round.
    fn ratio(&self, over: &Row, under: &Row) -> Spread {
        ratio(self.added(over), self.added(under))
    }

    pub fn print(&self) {
        println!(
            "{:<26} {:>7}  {:<24} {:>9}  {:>9}  {:>17}",
            "who decides", "rules", "packets", "ns each", "added ns", "quartiles"
        );
        for row in &self.rows {
            let total = Spread::of(row.rounds.clone()).median;
            let Spread { low, median, high } = Spread::of(self.added(row));
            let (name, case) = (&row.contender, row.case.name());
            let rules = row.rules;
            println!(
                "{name:<26} {rules:>7}  {case:<24} {total:>9.0}  {median:>9.1}  \
                 {low:>8.1}-{high:.1}"
            );
        }
    }

    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "contender": row.contender, "rules": row.rules, "packets": row.case.name(),
                "total_ns": Spread::of(row.rounds.clone()).json(),
                "added_ns": Spread::of(self.added(row)).json(),
            })
        });
        rows.collect()
    }
}

/// What cannot be told from nothing, in nanoseconds.
const NOTHING: f64 = 1.0;

/// The first in the second, by round. A cost that is next to nothing, or less, counts as
/// [`NOTHING`] where something is divided by it.
fn ratio(over: Vec<f64>, under: Vec<f64>) -> Spread {
    let rounds = over.into_iter().zip(under);
    Spread::of(
        rounds
            .map(|(over, under)| over / under.max(NOTHING))
            .collect(),
    )
}

/// A ratio, and what it should be.
pub struct Aim {
    what: String,
    ratio: Spread,
    limit: f64,
    at_most: bool,
}

impl Aim {
    fn met(&self) -> bool {
        if self.at_most {
            self.ratio.median <= self.limit
        } else {
            self.ratio.median >= self.limit
        }
    }
}

/// The aims as far as this run has figures for them.
pub fn aims(table: &Table, applied: &[Applied]) -> Vec<Aim> {
    let mut found = Found {
        table,
        aims: Vec::new(),
    };
    found.rules();
    found.hot_keys();
    found.peers();
    found.floors();
    found.aims.extend(applied.iter().map(|applied| Aim {
        what: format!(
            "{} / {}, {} rules",
            apply::OURS,
            applied.peer,
            applied.rules
        ),
        ratio: applied.ratio(),
        limit: 0.25,
        at_most: true,
    }));
    found.aims
}

/// Aims about the rows of a table.
struct Found<'a> {
    table: &'a Table,
    aims: Vec<Aim>,
}

impl Found<'_> {
    /// At most `limit`; at least, if it is negative.
    fn add(&mut self, what: String, over: Option<&Row>, under: Option<&Row>, limit: f64) {
        if let (Some(over), Some(under)) = (over, under) {
            self.aims.push(Aim {
                what,
                ratio: self.table.ratio(over, under),
                limit: limit.abs(),
                at_most: limit > 0.0,
            });
        }
    }

    /// What could be had at all, and how near weir is to it.
    fn floors(&mut self) {
        let table = self.table;
        for row in table.rows.iter().filter(|row| row.contender == ONE_LINE) {
            let (rules, case) = (row.rules, row.case);
            let set = table.find(SET, Some(rules), case);
            let what = format!("{ONE_LINE} / nft set, {rules} rules, {}", case.name());
            self.add(what, Some(row), set, 0.6);
        }
        let row = |contender, case| table.find(contender, Some(FLOW_RULES), case);
        for (case, floor, ours, theirs, limit) in [
            (Case::Known, FLOOR_FLOWS, WEIR_FLOWS, CONNTRACK, 0.5),
            (Case::KnownMany, FLOOR_FLOWS, WEIR_FLOWS, CONNTRACK, 0.5),
            (Case::New, FLOOR_NEW, WEIR_NEW, CONNTRACK_NEW, 0.7),
        ] {
            let what = format!("floor / nf_conntrack, {}", case.name());
            self.add(what, row(floor, case), row(theirs, case), limit);
            let what = format!("weir / floor, {}", case.name());
            self.add(what, row(ours, case), row(floor, case), 1.3);
        }
    }

    /// What many rules cost more than few, by the mean of several of each.
    fn hot_keys(&mut self) {
        let table = self.table;
        for case in [Case::Known, Case::Refused] {
            let hot = || {
                let rows = table.rows.iter();
                rows.filter(move |row| row.contender == WEIR_HOT && row.case == case)
            };
            let ends = [
                hot().map(|row| row.rules).min(),
                hot().map(|row| row.rules).max(),
            ];
            let [Some(first), Some(last)] = ends else {
                continue;
            };
            let sum = |rules| {
                let rows = hot().filter(|row| row.rules == rules);
                let costs = rows.map(|row| table.decided(row));
                let add = |sum: Vec<f64>, cost| sum.iter().zip(cost).map(|(a, b)| a + b).collect();
                costs.reduce(add).unwrap_or_default()
            };
            self.aims.push(Aim {
                what: format!("weir, {last} / {first} rules, {}", case.name()),
                ratio: ratio(sum(last), sum(first)),
                limit: 1.1,
                at_most: true,
            });
        }
    }

    /// Against the set at every number of rules, and how the cost grows with them.
    fn rules(&mut self) {
        let table = self.table;
        let ours = || table.rows.iter().filter(|row| row.contender == WEIR);
        for row in ours() {
            let set = table.find(SET, Some(row.rules), row.case);
            let what = format!("weir / nft set, {} rules, {}", row.rules, row.case.name());
            self.add(what, Some(row), set, 0.6);
        }
        let case = Case::RefusedSpread;
        let mut rows = ours().filter(|row| row.case == case);
        if let (Some(few), Some(many)) = (rows.next(), rows.next_back()) {
            let (first, last) = (few.rules, many.rules);
            self.aims.push(Aim {
                what: format!("weir, {last} / {first} rules, {}", case.name()),
                ratio: ratio(table.decided(many), table.decided(few)),
                limit: 6.0,
                at_most: true,
            });
        }
    }

    /// Against what looks through its rules, and what keeps state of flows, with 1,000 rules.
    fn peers(&mut self) {
        let table = self.table;
        let row = |contender, case| table.find(contender, Some(FLOW_RULES), case);
        for (peer, limit) in [
            (LINEAR, -50.0),
            ("iptables-legacy", -15.0),
            ("iptables-nft", -15.0),
        ] {
            for case in [Case::Known, Case::Refused] {
                let what = format!("{peer} / weir, {FLOW_RULES} rules, {}", case.name());
                self.add(what, row(peer, case), row(WEIR, case), limit);
            }
        }
        for (case, ours, theirs, limit) in [
            (Case::Known, WEIR_FLOWS, CONNTRACK, 0.5),
            (Case::KnownMany, WEIR_FLOWS, CONNTRACK, 0.5),
            (Case::New, WEIR_NEW, CONNTRACK_NEW, 0.7),
            (Case::Refused, WEIR, CONNTRACK_NEW, 1.0),
            (Case::RefusedNew, WEIR, CONNTRACK_NEW, 1.0),
        ] {
            let what = format!("weir / nf_conntrack, {}", case.name());
            self.add(what, row(ours, case), row(theirs, case), limit);
        }
    }
}

pub fn print_aims(aims: &[Aim]) {
    println!();
    for aim in aims {
        let Spread { low, median, high } = aim.ratio;
        let sign = if aim.at_most { "<=" } else { ">=" };
        let verdict = if aim.met() { "met" } else { "MISSED" };
        let (what, limit) = (&aim.what, aim.limit);
        println!("{what:<58} {median:>8.2} ({low:.2}-{high:.2})  aim {sign} {limit}  {verdict}");
    }
}

pub fn aims_json(aims: &[Aim]) -> Value {
    let aims = aims.iter().map(|aim| {
        json!({
            "what": aim.what, "ratio": aim.ratio.json(), "met": aim.met(),
            "aim": {"at_most": aim.at_most, "limit": aim.limit},
        })
    });
    aims.collect()
}
