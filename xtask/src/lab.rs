//! `cargo xtask lab [TOPOLOGY]`: a network of namespaces to play with, in a kernel that has
//! WireGuard. The topology and the shell are the program `lab` of the package `tests`.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;

use crate::{build, setup, vm};

/// A shell's guest lives as long as its user likes, within reason.
const A_DAY: Duration = Duration::from_secs(24 * 3600);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    wish: vm::Wish,
    /// Only the namespaces: no coordinator, no agents
    #[arg(long)]
    bare: bool,
    /// Which topology; `list` shows all
    #[arg(value_name = "TOPOLOGY")]
    topology: Option<String>,
    /// Run this in it instead of a shell
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

pub fn run_verb(args: Args) -> anyhow::Result<u8> {
    let wants_shell = args.command.is_empty() && args.topology.as_deref() != Some("list");
    let terminal = match wants_shell {
        true => Some(vm::terminal().context(
            "a shell needs a terminal; or give a command: cargo xtask lab TOPOLOGY -- CMD",
        )?),
        false => None,
    };
    setup::ensure(&[setup::Purpose::Build, setup::Purpose::Lab])?;
    let programs = build::programs()?;
    let mut command = vec![programs.join("lab").display().to_string()];
    if args.bare {
        command.push("--bare".into());
    }
    command.extend(args.topology.clone());
    if args.topology.as_deref() == Some("list") {
        let status = std::process::Command::new(&command[0])
            .arg("list")
            .status()?;
        return Ok(if status.success() { 0 } else { 1 });
    }
    if !args.command.is_empty() {
        command.push("--".into());
        command.extend(args.command);
    }
    let mut job = vm::Job::new(vm::pick(&args.wish)?, command)?;
    job.env
        .insert("WEIR_BIN_DIR".into(), programs.display().to_string());
    job.timeout = A_DAY;
    job.tty = terminal;
    job.start(Stdio::inherit(), Stdio::inherit())?.wait()
}
