//! `cargo xtask demo`: the main job, done before your eyes.
//!
//! A small office in network namespaces: a coordinator, three servers, a client and two sites whose
//! routers join their LANs. Real binaries, real kernel WireGuard, real eBPF. Every scene says in a
//! sentence what it shows, shows the commands and what came back, and checks it.

mod http;
mod narrator;
mod office;
mod paths;
mod scenes;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use narrator::Narrator;
use office::Office;

#[derive(Parser)]
#[command(
    name = "demo",
    about = "Shows the main job on a small office in network namespaces"
)]
struct Cli {
    /// Write one row a scene to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave a shell in the office at the end
    #[arg(long)]
    keep: bool,
    /// The policy to apply
    #[arg(
        long,
        value_name = "FILE",
        default_value = "packaging/examples/small-office.hujson"
    )]
    policy: PathBuf,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<bool> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "network namespaces are made by root: run `cargo xtask demo`, which sees to that"
    );
    anyhow::ensure!(
        tests::kernel_has_wireguard(),
        "this kernel has no WireGuard: run `cargo xtask demo`, which finds one that has"
    );
    let policy = std::fs::read_to_string(&cli.policy)
        .with_context(|| format!("cannot read the policy {}", cli.policy.display()))?;

    let mut narrator = Narrator::new();
    narrator.say(PROLOGUE);
    let mut office = Office::build(policy)?;
    scenes::play(&mut narrator, &mut office);
    let passed = narrator.finish();

    if let Some(file) = &cli.json {
        let document = serde_json::json!({ "version": 1, "scenes": narrator.scenes() });
        let text = serde_json::to_string_pretty(&document)? + "\n";
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if cli.keep {
        office.lab.shell()?;
    }
    if passed {
        office.lab.passed();
    }
    Ok(passed)
}

const PROLOGUE: &str = "\
weir demo: a small office

  Each machine is a network namespace with a real agent, in-kernel WireGuard and eBPF programs on
  it. Nothing is simulated, and nothing is left behind.

     hub          web     db    build    laptop       paris-desk          oslo-desk
  coordinator   server  server  server   client        10.1.0.2            10.2.0.2
      │            │       │      │        │               │                  │
  ────┴────────────┴───────┴──┬───┴────────┴──┬──     paris-lan           oslo-lan
        192.0.2.0/24          │               │            │                  │
                            paris           oslo         paris              oslo
                            router         router       10.1.0.1           10.2.0.1";
