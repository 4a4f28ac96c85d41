//! The plot: added cost of a packet by number of rules, both axes logarithmic.

use std::fmt::Write as _;

use super::Case;
use super::report::{LINEAR, SET, Spread, Table, WEIR};

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 500.0;
/// Left, top, right and bottom of where the lines are.
const FRAME: (f64, f64, f64, f64) = (80.0, 60.0, 590.0, 440.0);
/// Rules and nanoseconds at the edges of the frame.
const RULES: (f64, f64) = (6.0, 160_000.0);
const NANOSECONDS: (f64, f64) = (30.0, 60_000.0);
/// Labels are at least so far apart.
const LABEL: f64 = 16.0;
/// Contender and colour (Okabe and Ito's, which most eyes tell apart).
const SERIES: [(&str, &str); 5] = [
    (WEIR, "#0072b2"),
    (SET, "#e69f00"),
    (LINEAR, "#d55e00"),
    ("iptables-legacy", "#009e73"),
    ("iptables-nft", "#cc79a7"),
];
/// Cases, what labels say of them, and their dashes.
const CASES: [(Case, &str, &str); 2] = [
    (Case::Known, "allowed", ""),
    (Case::Refused, "refused", "6 4"),
];

/// The plot of the rows with few peers, as SVG.
pub fn svg(table: &Table) -> String {
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"80\" y=\"28\" font-size=\"17\">What a policy adds to a live packet</text>\n\
         <text x=\"80\" y=\"47\" fill=\"#555\">median of the rounds, bars: quartiles; \
         both axes logarithmic</text>\n"
    );
    axes(&mut text);
    let mut labels = Vec::new();
    for (contender, colour) in SERIES {
        for (case, said, dashes) in CASES {
            let points = points(table, contender, case);
            if let Some((_, _, last)) = points.last() {
                labels.push((last.median, format!("{contender}, {said}"), colour));
                line(&mut text, &points, colour, dashes);
            }
        }
    }
    // From below, each at least a line above the one before.
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut floor = f64::INFINITY;
    for (value, label, colour) in labels {
        let y = down(value).min(floor - LABEL);
        floor = y;
        let x = FRAME.2 + 12.0;
        let y = y + 4.0;
        let _ = writeln!(
            text,
            "<text x=\"{x}\" y=\"{y:.1}\" fill=\"{colour}\">{label}</text>"
        );
    }
    text + "</svg>\n"
}

/// Place of a number of rules and what it costs, in the order of the rules.
fn points(table: &Table, contender: &str, case: Case) -> Vec<(u32, f64, Spread)> {
    let rows = table.rows.iter();
    rows.filter(|row| row.contender == contender && row.case == case)
        .map(|row| {
            (
                row.rules,
                across(f64::from(row.rules)),
                Spread::of(table.added(row)),
            )
        })
        .collect()
}

fn line(text: &mut String, points: &[(u32, f64, Spread)], colour: &str, dashes: &str) {
    let path: Vec<String> = points
        .iter()
        .map(|(_, x, cost)| format!("{x:.1},{:.1}", down(cost.median)))
        .collect();
    let _ = writeln!(
        text,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
         stroke-dasharray=\"{dashes}\"/>",
        path.join(" ")
    );
    for (_, x, cost) in points {
        let (low, middle, high) = (down(cost.low), down(cost.median), down(cost.high));
        let _ = writeln!(
            text,
            "<path d=\"M{x:.1},{low:.1}V{high:.1}\" stroke=\"{colour}\"/>\
             <circle cx=\"{x:.1}\" cy=\"{middle:.1}\" r=\"3.5\" fill=\"{colour}\"/>"
        );
    }
}

fn axes(text: &mut String) {
    let (left, top, right, bottom) = FRAME;
    for power in 1..=5 {
        let rules = 10_f64.powi(power);
        let x = across(rules);
        let _ = writeln!(
            text,
            "<path d=\"M{x:.1},{top}V{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{x:.1}\" y=\"460\" text-anchor=\"middle\">{}</text>",
            grouped(rules)
        );
    }
    for nanoseconds in [50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4] {
        let (y, beside) = (down(nanoseconds), left - 8.0);
        let _ = writeln!(
            text,
            "<path d=\"M{left},{y:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{beside}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            y + 4.0,
            grouped(nanoseconds)
        );
    }
    let _ = writeln!(
        text,
        "<path d=\"M{left},{top}V{bottom}H{right}\" fill=\"none\" stroke=\"#333\"/>\
         <text x=\"335\" y=\"485\" text-anchor=\"middle\">rules</text>\
         <text x=\"18\" y=\"250\" text-anchor=\"middle\" transform=\"rotate(-90 18 250)\">\
         added nanoseconds a packet</text>"
    );
}

/// A number with a comma before every three digits.
fn grouped(number: f64) -> String {
    let (thousands, rest) = (number as u64 / 1_000, number as u64 % 1_000);
    if thousands == 0 {
        rest.to_string()
    } else {
        format!("{thousands},{rest:03}")
    }
}

fn across(rules: f64) -> f64 {
    FRAME.0 + share(rules, RULES) * (FRAME.2 - FRAME.0)
}

fn down(nanoseconds: f64) -> f64 {
    FRAME.3 - share(nanoseconds, NANOSECONDS) * (FRAME.3 - FRAME.1)
}

/// How far between the ends, as logarithms; what is beyond stays at the end.
fn share(value: f64, (low, high): (f64, f64)) -> f64 {
    (value.max(low) / low).ln() / (high / low).ln()
}
