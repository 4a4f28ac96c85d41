//! `weir`: argv in, exit code out. See `agent::cli` for the verbs.

use agent::cli;
use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os()) {
        Ok(arguments) => cli::run(arguments),
        Err(code) => code,
    }
}
