//! `weir`: argv in, exit code out. See `agent::cli` for the verbs.

use agent::config::Config;
use agent::{cli, daemon};
use anyhow::Context;
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Says what is logged, in the syntax of `tracing_subscriber::EnvFilter`.
const LOG_VARIABLE: &str = "WEIR_LOG";
/// What is logged otherwise: a netlink answer that nobody waits for any more is no news.
const LOG_DEFAULT: &str = "info,netlink_proto=error";
/// What systemd sets when stderr is the journal, which has its own times.
const JOURNAL_VARIABLE: &str = "JOURNAL_STREAM";

fn main() -> ExitCode {
    let arguments = match cli::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let Some(config) = cli::daemon_config(&arguments) else {
        return cli::run(arguments);
    };
    log_to_stderr();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        interface = %config.interface,
        state_dir = %config.state_dir.display(),
        socket = %config.socket.display(),
        "the agent starts"
    );
    // The loop is one task; a second thread is for the coordinator's TLS and the local API.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the system gives no threads")?;
    Ok(runtime.block_on(daemon::run(config))?)
}

fn log_to_stderr() {
    let filter =
        EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(LOG_DEFAULT));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    if std::env::var_os(JOURNAL_VARIABLE).is_some() {
        log.without_time().init();
    } else {
        log.init();
    }
}
