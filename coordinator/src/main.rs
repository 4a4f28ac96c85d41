//! `weir-coordinator`: argv → verb → exit code (0 done, 1 refused or failed, 2 wrong use; of
//! `policy diff`: 0 the same, 1 different, 2 trouble).

use anyhow::Context;
use clap::Parser;
use coordinator::cli::{self, Cli, Command, Serve};
use coordinator::config::Config;
use coordinator::http::admin::Request;
use coordinator::server::Server;
use sd_notify::NotifyState;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let trouble = if cli.command.compares() { 2 } else { 1 };
    let done = tokio::runtime::Runtime::new()
        .context("cannot start")
        .and_then(|runtime| runtime.block_on(run(cli)));
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("weir-coordinator: {error:#}");
            ExitCode::from(trouble)
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<bool> {
    let Cli {
        state_dir,
        json,
        network,
        command,
    } = cli;
    if let Command::Serve(flags) = command {
        return serve(state_dir, flags).await.map(|()| true);
    }
    // What a new policy changes is for whoever looks at it, and for programs that ask.
    let compare = json || io::stdout().is_terminal();
    let Some(verb) = command.verb(compare)? else {
        return Ok(true);
    };
    let answer = cli::call(&state_dir, &Request { network, verb }).await?;
    Ok(cli::print(&mut io::stdout().lock(), &answer, json)?)
}

async fn serve(state_dir: PathBuf, flags: Serve) -> anyhow::Result<()> {
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
    let server = Server::start(Config::load(state_dir, flags.into())?).await?;
    println!(
        "weir-coordinator listens on {}, certificate {}",
        server.addr, server.fingerprint
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
