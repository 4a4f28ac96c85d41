//! The bench of the figures still runs, and its orders of magnitude hold.
#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

/// A few seconds where nothing else runs.
const BOUND: Duration = Duration::from_secs(120);

/// What one kind of packets costs at a contender, with the way there.
fn total_ns(document: &Value, contender: &str, rules: u64, packets: &str) -> f64 {
    let rows = document["rows"].as_array().unwrap().iter();
    let mut found = rows.filter(|row| {
        row["contender"] == contender && row["rules"] == rules && row["packets"] == packets
    });
    let row = found.next();
    let row = row.unwrap_or_else(|| panic!("no row of {contender}, {rules} rules: {document}"));
    row["total_ns"]["median"].as_f64().unwrap()
}

#[test]
fn a_policy_costs_the_same_with_a_thousand_rules_as_with_ten() {
    if let Err(reason) = can_measure() {
        tests::skip("a_policy_costs_the_same", reason);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (json, svg) = (
        folder.path().join("acl.json"),
        folder.path().join("acl.svg"),
    );
    let mut bench = Command::new(tests::binary("bench").unwrap());
    bench.args(["acl", "--smoke", "--rounds", "1", "--turns", "2"]);
    bench.arg("--json").arg(&json).arg("--svg").arg(&svg);
    let output = tests::process::run(&mut bench, "", BOUND).unwrap();
    output.success().unwrap();
    let document: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let total = |contender, rules, packets| total_ns(&document, contender, rules, packets);
    for packets in ["allowed, few flows", "refused, few peers"] {
        let (ten, thousand) = (total("weir", 10, packets), total("weir", 1_000, packets));
        assert!(
            thousand < 1.5 * ten,
            "{packets}: {ten:.0} ns with 10 rules, {thousand:.0} with 1,000"
        );
        // A chain that is walked shows that the bench would see it.
        let linear = total("nft linear", 1_000, packets);
        assert!(
            linear > 3.0 * thousand,
            "{packets}: nft needs {linear:.0} ns for 1,000 rules, weir {thousand:.0}"
        );
    }
    let plot = std::fs::read_to_string(&svg).unwrap();
    assert!(plot.contains("nft linear, refused"), "{plot}");
}

fn can_measure() -> Result<(), &'static str> {
    if !rustix::process::geteuid().is_root() {
        return Err("needs root");
    }
    let nft = Command::new("nft").arg("--version").output();
    if nft.is_err() {
        return Err("needs nft");
    }
    Ok(())
}
