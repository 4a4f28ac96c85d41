//! What a client costs that is connected and silent.

use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use super::client::{Client, Door, tls_of};
use super::{Args, resident, start};

/// Connected before the first look, so that what is made once is not counted.
const WARM: u64 = 32;
/// File descriptors that are none of a client's.
const OTHER_FILES: u64 = 200;
/// Threads that connect.
const DIALLERS: u64 = 4;
/// Bytes that a silent client of the bench reads at once.
const BUFFER: usize = 512;

/// Measures without TLS and with it, prints a line for each, and returns the document.
pub fn run(args: &Args, program: &Path) -> anyhow::Result<Value> {
    let count = raise_limit(args.idle)?;
    let plain = measure(program, count, false)?;
    let tls = measure(program, count, true)?;
    Ok(json!({ "clients": count, "plain": plain, "tls": tls }))
}

/// Lets this process and the relay have a file for each client, as many as the system allows.
fn raise_limit(wanted: u64) -> anyhow::Result<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let needed = wanted + OTHER_FILES;
    if current.is_some_and(|current| current < needed) {
        let current = maximum.map_or(needed, |maximum| maximum.min(needed));
        let current = Some(current);
        setrlimit(Resource::Nofile, Rlimit { current, maximum })?;
    }
    let have = getrlimit(Resource::Nofile).current.unwrap_or(needed);
    Ok(wanted.min(have.saturating_sub(OTHER_FILES)))
}

fn measure(program: &Path, count: u64, with_tls: bool) -> anyhow::Result<Value> {
    let folder = tempfile::tempdir()?;
    let (relay, addr) = start(program, folder.path(), with_tls)?;
    let tls = match with_tls {
        true => Some(tls_of(&folder.path().join("state"))?),
        false => None,
    };
    let buffer = BUFFER;
    let door = Door { addr, tls, buffer };
    let mut clients = dial(&door, 0..WARM)?;
    let before = resident(&relay)?;
    let begin = Instant::now();
    clients.extend(dial(&door, WARM..WARM + count)?);
    let rate = count as f64 / begin.elapsed().as_secs_f64();
    let bytes = resident(&relay)?.saturating_sub(before) as f64 / count.max(1) as f64;
    let how = if with_tls { "with TLS" } else { "plain" };
    println!("{count} idle clients, {how}: {bytes:.0} bytes each, {rate:.0} logins a second");
    drop(clients);
    Ok(json!({ "bytes_each": bytes, "logins_per_second": rate }))
}

fn dial(door: &Door, numbers: std::ops::Range<u64>) -> anyhow::Result<Vec<Client>> {
    let dialler = |first: u64| {
        let (door, end) = (door.clone(), numbers.end);
        thread::spawn(move || -> anyhow::Result<Vec<Client>> {
            (first..end)
                .step_by(DIALLERS as usize)
                .map(|number| Client::join(&door, 1_000_000 + number))
                .collect()
        })
    };
    let diallers: Vec<_> = (numbers.start..numbers.start + DIALLERS)
        .map(dialler)
        .collect();
    let mut clients = Vec::new();
    for dialler in diallers {
        let Ok(joined) = dialler.join() else {
            bail!("a thread that connects died");
        };
        clients.extend(joined.context("a client is not let in")?);
    }
    Ok(clients)
}
