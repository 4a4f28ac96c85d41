//! Labs: small networks of network namespaces in which the real binaries run.
//!
//! A [`topology::Topology`] says which switches and hosts there are; a [`lab::Lab`] makes them of
//! network namespaces, bridges and veth pairs, and takes all of it away again. A [`host::Host`]
//! runs commands and opens sockets in its namespace. A [`mesh::Mesh`] puts a coordinator and
//! agents into a lab, and drives them only by their command lines. [`probe`] asks whether a
//! connection is possible, [`stream`] counts what is lost while something else happens,
//! [`packet`] forges what no honest host would send. A lab that did not end well leaves a folder
//! of evidence ([`evidence`]). [`nat`] makes routers that translate addresses, [`relay`] runs
//! relays.
//!
//! Nothing here waits by the clock: [`wait_until`] polls a condition with a bound.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

pub mod evidence;
pub mod host;
pub mod lab;
pub mod mesh;
pub mod nat;
pub mod packet;
pub mod probe;
pub mod process;
pub mod relay;
pub mod snapshot;
pub mod stream;
pub mod topology;
pub mod world;

/// Says that a test could not run here, and why: to stderr, and to the file that the variable
/// `WEIR_SKIPS` names, from which the runner prints its list.
pub fn skip(name: &str, reason: &str) {
    eprintln!("skipped: {name}: {reason}");
    let Some(path) = std::env::var_os("WEIR_SKIPS") else {
        return;
    };
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(&path);
    let written = file.and_then(|mut file| writeln!(file, "{name}\t{reason}"));
    if let Err(error) = written {
        // A skip that nobody counts would pass for a success.
        panic!("cannot note a skipped test in {}: {error}", path.display());
    }
}

/// Polls `condition` until it holds, and spends no more time with looking than with waiting: what is
/// waited for may need the one processor that a guest has.
///
/// # Errors
/// If it does not within `bound`: says what was waited for.
pub fn wait_until(
    what: &str,
    bound: Duration,
    mut condition: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    /// Between two looks at least: short against what people notice.
    const PAUSE: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + bound;
    loop {
        let look = Instant::now();
        if condition() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("waited {bound:?} in vain until {what}");
        }
        std::thread::sleep(PAUSE.max(look.elapsed()));
    }
}

/// Where one of the binaries is: in the folder that `WEIR_BIN_DIR` names, else beside this one.
///
/// # Errors
/// If it is not there.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let folders = match std::env::var_os("WEIR_BIN_DIR") {
        Some(given) => vec![PathBuf::from(given)],
        None => {
            let me = std::env::current_exe().context("cannot tell where this program is")?;
            // A test lies in target/debug/deps, a program of this package in target/debug.
            me.ancestors().skip(1).take(2).map(PathBuf::from).collect()
        }
    };
    let found = folders
        .iter()
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    found.with_context(|| {
        format!("no `{name}` in {folders:?}: build it first (`cargo build --workspace`)")
    })
}

/// Whether the kernel can make a WireGuard device.
#[must_use]
pub fn kernel_has_wireguard() -> bool {
    // In a namespace of its own that goes at once, so that nothing is left behind.
    let mut command = std::process::Command::new("unshare");
    command.args([
        "--net",
        "ip",
        "link",
        "add",
        "wg-probe",
        "type",
        "wireguard",
    ]);
    process::run(&mut command, "", Duration::from_secs(10)).is_ok_and(|output| output.code == 0)
}
