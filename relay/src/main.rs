//! `weir-relay`: argv → serve → exit code (0 stopped as asked, 1 failed, 2 wrong use).

use anyhow::Context;
use clap::Parser;
use relay::config::{Certificate, Cli, Command, Config, ConfigError};
use relay::server::Server;
use sd_notify::NotifyState;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = tokio::runtime::Runtime::new()
        .context("cannot start")
        .and_then(|runtime| runtime.block_on(run(cli)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir-relay: {error:#}");
            // A wrong configuration does not get better by trying again.
            let wrong_use = error.downcast_ref::<ConfigError>().is_some();
            ExitCode::from(if wrong_use { 2 } else { 1 })
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let Cli { state_dir, command } = cli;
    let Command::Serve(flags) = command;
    let filter = EnvFilter::try_from_env("WEIR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let config = Config::load(state_dir, flags)?;
    let names = match &config.certificate {
        Certificate::Acme(acme) => Some(acme.domains.join(", ")),
        Certificate::Own | Certificate::Given { .. } | Certificate::Off => None,
    };
    let server = Server::start(config)?;
    let certificate = match (server.fingerprint, names) {
        (Some(fingerprint), _) => format!("certificate {fingerprint}"),
        (None, Some(names)) => format!("certificate by ACME for {names}"),
        (None, None) => "without TLS".to_owned(),
    };
    println!(
        "weir-relay listens on {}, {certificate}, key {}; STUN on {}, status on {}",
        server.addr, server.key, server.stun_addr, server.status_addr
    );
    // Not run by systemd, or not listening: nobody to tell.
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = feed_watchdog() => {}
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    server.stop().await;
    Ok(())
}

/// Tells systemd's watchdog, if there is one, that this program still runs its tasks.
async fn feed_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    let mut beat = tokio::time::interval(limit / 3);
    loop {
        beat.tick().await;
        let _ = sd_notify::notify(&[NotifyState::Watchdog]);
    }
}
