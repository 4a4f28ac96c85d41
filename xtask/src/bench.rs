//! `cargo xtask bench NAME`: measures in a kernel with WireGuard. The measurements are the program
//! `bench` of the package `tests`. It and the programs that it starts are built as they are shipped,
//! with optimisation, which takes minutes the first time.
//!
//! `bench acl` needs no WireGuard and is about the kernel's BPF compiler, so it runs on this
//! machine, as root; what it finds goes to `acl.json` and `acl.svg` in the results folder. So does
//! `bench relay`, which needs sockets alone (`relay.json`).
//!
//! With `--icount` the guest is emulated and its clock counts instructions: figures are then the
//! same on a busy machine as on an idle one, and say nothing about wall time.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use crate::{build, house, setup, vm};

/// Counting instructions is slow, and so are gigabytes through an emulated processor.
const LONGEST: Duration = Duration::from_secs(3 * 3600);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    wish: vm::Wish,
    /// Write the figures to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What to measure, and its own options (`cargo xtask bench -- --help` lists what there is,
    /// `cargo xtask bench NAME --help` the options)
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "NAME"
    )]
    what: Vec<String>,
}

pub fn run_verb(args: Args) -> anyhow::Result<u8> {
    setup::ensure(&[setup::Purpose::Build, setup::Purpose::Lab])?;
    let asks_for_help = args
        .what
        .iter()
        .any(|word| word == "--help" || word == "-h");
    if args.what.is_empty() || asks_for_help {
        // Nothing is measured: the build that is there already will do.
        let program = build::programs()?.join("bench");
        let help = std::process::Command::new(program)
            .args(&args.what)
            .arg("--help")
            .status()?;
        return Ok(if help.success() && asks_for_help {
            0
        } else {
            2
        });
    }
    let programs = build::optimised()?;
    let program = programs.join("bench").display().to_string();
    if let Some(name @ ("acl" | "relay")) = args.what.first().map(String::as_str) {
        return on_this_machine(&program, name, &args);
    }
    let mut job = vm::Job::new(vm::pick(&args.wish)?, vec![program])?;
    job.command.extend(args.what);
    if args.wish.icount {
        job.command.push("--icount".into());
    }
    job.env
        .insert("WEIR_BIN_DIR".into(), programs.display().to_string());
    job.timeout = LONGEST;
    let Some(file) = args.json else {
        return job.start(Stdio::inherit(), Stdio::inherit())?.wait();
    };
    job.written_for(&file, "bench.json", |job, rows| {
        job.command.extend(["--json".into(), rows]);
        job.start(Stdio::inherit(), Stdio::inherit())?.wait()
    })
}

fn on_this_machine(program: &str, name: &str, args: &Args) -> anyhow::Result<u8> {
    let results = house::results()?;
    let json = args
        .json
        .clone()
        .unwrap_or_else(|| results.join(format!("{name}.json")));
    let mut command = std::process::Command::new(program);
    command.args(&args.what).arg("--json").arg(&json);
    if name == "acl" && !args.what.iter().any(|word| word.starts_with("--svg")) {
        command.arg("--svg").arg(results.join("acl.svg"));
    }
    let ended = command.status()?;
    // What ended by a signal has no code.
    Ok(ended
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}
