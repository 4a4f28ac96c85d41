//! `cargo xtask bench NAME`: measurements, each a ratio within one run with its spread.
//!
//! A figure is never a claim about other machines: the JSON names the kernel and the processor.

mod acl;
mod acl_tax;
mod nodes;
mod relay;
mod relayed;
mod spread;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "bench", about = "Measures, and says against what")]
struct Cli {
    /// Write the result to this file too, as JSON
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// What the policy costs a live packet, against nftables, iptables and connection tracking
    Acl(acl::Args),
    /// What the programs cost on kernel WireGuard: the same transfer with and without them
    AclTax(acl_tax::Args),
    /// What one packet and one idle client cost a relay, against a UDP echo
    Relay(relay::Args),
    /// What a path by relay carries between two nodes, beside a direct one
    Relayed(relayed::Args),
    /// The echo's own process
    #[command(hide = true)]
    UdpEcho(relay::echo::Args),
    /// What one packet costs in the programs, with 10 and with 10,000 peers
    Verdict(verdict::Args),
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let mut result = match &cli.bench {
        Bench::Acl(args) => acl::run(args)?,
        Bench::AclTax(args) => acl_tax::run(args)?,
        Bench::Relay(args) => relay::run(args)?,
        Bench::Relayed(args) => relayed::run(args)?,
        Bench::UdpEcho(args) => return relay::echo::serve(args),
        Bench::Verdict(args) => verdict::run(args)?,
    };
    result["version"] = 1.into();
    result["kernel"] = read("/proc/sys/kernel/osrelease").into();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "));
    result["cpu"] = model.unwrap_or("unknown").into();
    if let Some(file) = &cli.json {
        let text = serde_json::to_string_pretty(&result)? + "\n";
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}
