//! The house's own tools: `cargo xtask VERB`, one file a verb.
//!
//! xtask depends on none of our crates. It builds them, picks a kernel that has what they need
//! (`vm`) and runs a binary of the package `tests` in it. Exit codes: 0 done, 1 failed,
//! 2 wrong use; `vm` passes on the code of the command it ran.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod build;
mod demo;
mod deps;
mod ebpf;
mod house;
mod lab;
mod setup;
mod test;
mod tidy;
mod vm;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "The house's own tools"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the eBPF programs and write the committed object
    Ebpf {
        /// Rebuild and compare with the committed object; change nothing
        #[arg(long)]
        check: bool,
    },
    /// Install what the other verbs need, after saying what (Debian, Ubuntu, Fedora)
    Setup,
    /// Run a command as root in a throw-away kernel that has WireGuard
    Vm(vm::Args),
    /// Build a topology of namespaces and give a shell in it
    Lab(lab::Args),
    /// Build everything and show the main job done on real kernel WireGuard
    Demo(demo::Args),
    /// Measure, in a kernel with WireGuard
    Bench(bench::Args),
    /// Run all tests, as CI does
    Test(test::Args),
    /// Check the house rules that a program can check
    Tidy(tidy::Args),
    /// Check who depends on whom, and licences and sources of everything else
    Deps,
    /// (internal) the process that starts a guest, watches it and cleans up after it
    #[command(name = "__guard", hide = true)]
    Guard,
    /// (internal) becomes the guest's process
    #[command(name = "__launch", hide = true)]
    Launch(vm::guard::LaunchArgs),
}

fn main() -> ExitCode {
    // clap itself leaves with 2 on wrong use and 0 on --help.
    let cli = Cli::parse();
    let outcome = match cli.verb {
        Verb::Ebpf { check } => ebpf::run(check).map(|()| 0),
        Verb::Setup => setup::run_verb(),
        Verb::Vm(args) => vm::run_verb(args),
        Verb::Lab(args) => lab::run_verb(args),
        Verb::Demo(args) => demo::run_verb(args),
        Verb::Bench(args) => bench::run_verb(args),
        Verb::Test(args) => test::run_verb(args),
        Verb::Tidy(args) => tidy::run_verb(&args),
        Verb::Deps => deps::run_verb(),
        Verb::Guard => vm::guard::guard(),
        Verb::Launch(args) => vm::guard::launch(&args),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
