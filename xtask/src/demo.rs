//! `cargo xtask demo`: builds everything, picks a kernel with WireGuard, and shows the main job
//! done in it. The show itself is the program `demo` of the package `tests`.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::{build, house, setup, vm};

/// An emulated guest takes ten times as long as the show does elsewhere.
const SHOW: Duration = Duration::from_secs(45 * 60);
const A_DAY: Duration = Duration::from_secs(24 * 3600);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    wish: vm::Wish,
    /// Write one row a scene to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave a shell in the network when the show is over
    #[arg(long)]
    keep: bool,
}

pub fn run_verb(args: Args) -> anyhow::Result<u8> {
    let terminal = if args.keep {
        Some(vm::terminal().context("--keep")?)
    } else {
        None
    };
    setup::ensure(&[setup::Purpose::Build, setup::Purpose::Lab])?;
    let start = Instant::now();
    eprintln!("xtask demo: building (the first time takes minutes)");
    let programs = build::programs()?;
    eprintln!("xtask demo: built in {} s", start.elapsed().as_secs());
    let machine = vm::pick(&args.wish)?;

    let mut job = vm::Job::new(machine, vec![programs.join("demo").display().to_string()])?;
    job.env
        .insert("WEIR_BIN_DIR".into(), programs.display().to_string());
    // The policy it applies is named from there.
    job.cwd = house::root().to_owned();
    job.timeout = if args.keep { A_DAY } else { SHOW };
    job.tty = terminal;
    if args.keep {
        job.command.push("--keep".into());
    }
    let Some(file) = args.json else {
        return job.start(Stdio::inherit(), Stdio::inherit())?.wait();
    };
    job.written_for(&file, "demo.json", |job, rows| {
        job.command.extend(["--json".into(), rows]);
        job.start(Stdio::inherit(), Stdio::inherit())?.wait()
    })
}
