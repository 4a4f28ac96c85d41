//! Relays in a lab: `weir-relay` on a host, for the networks of a lab's coordinator.
//!
//! As an operator does it: the coordinator runs, the relay is given what `relay key` prints and
//! prints its certificate's fingerprint, and the coordinator is restarted with a list of relays.
//! [`Mesh::with_relays`](crate::mesh::Mesh::with_relays) does all of it; by hand it is this.
//!
//! ```no_run
//! # fn example(lab: &tests::lab::Lab, coordinator: &tests::mesh::Coordinator) -> anyhow::Result<()> {
//! use tests::relay::{Relay, relays_section};
//! let near = Relay::start(&lab.host("relay-1"), "near", coordinator)?;
//! let far = Relay::start(&lab.host("relay-2"), "far", coordinator)?;
//! coordinator.configure(&relays_section(&[&near, &far]))?;
//! # Ok(())
//! # }
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::host::Host;
use crate::mesh::Coordinator;
use crate::process::Process;
use crate::wait_until;

/// The port of every lab relay's DERP door.
pub const DERP_PORT: u16 = 443;
/// The port of every lab relay's STUN.
pub const STUN_PORT: u16 = 3478;
/// Where it shows its health, on its own host.
const STATUS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9180);
/// How long a relay may take to start. Generous, for slow machines.
const START_BOUND: Duration = Duration::from_secs(30);

/// A running `weir-relay` with its state, on one host.
pub struct Relay {
    /// Where it runs.
    pub host: Arc<Host>,
    /// What its region is called.
    pub name: String,
    /// Its certificate, as `sha256:…`.
    pub certificate: String,
    process: Mutex<Arc<Process>>,
}

impl Relay {
    /// Starts it on all of the host's addresses, for the nodes of the coordinator's one network,
    /// with a certificate of its own. When this returns, it answers.
    ///
    /// # Errors
    /// If it does not come up, or the coordinator has not exactly one network.
    pub fn start(host: &Arc<Host>, name: &str, coordinator: &Coordinator) -> anyhow::Result<Self> {
        let network = coordinator.admin("relay key")?.stdout;
        std::fs::write(host.folder.join("relay.toml"), network)?;
        let process = serve(host)?;
        let said = process.said();
        let certificate = said
            .split_once("certificate ")
            .and_then(|(_, rest)| rest.split_once(','))
            .map(|(fingerprint, _)| fingerprint.to_owned())
            .with_context(|| format!("the relay names no certificate: {said}"))?;
        Ok(Self {
            host: Arc::clone(host),
            name: name.to_owned(),
            certificate,
            process: Mutex::new(process),
        })
    }

    /// Ends it as a crash would.
    pub fn kill(&self) {
        self.process().kill();
    }

    /// Tells it to end, and waits until it has: its clients hear of it.
    ///
    /// # Errors
    /// If it does not end well.
    pub fn stop(&self) -> anyhow::Result<()> {
        let code = self.process().stop()?;
        ensure!(code == 0, "the relay ended with {code}");
        Ok(())
    }

    /// Starts it again on the same state.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn restart(&self) -> anyhow::Result<()> {
        let process = serve(&self.host)?;
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = process;
        Ok(())
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> Arc<Process> {
        Arc::clone(&self.process.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many nodes are connected to it.
    ///
    /// # Errors
    /// If its page of health does not answer.
    pub fn clients(&self) -> anyhow::Result<u64> {
        let page = self.page("health")?;
        let document: serde_json::Value = serde_json::from_str(&page)?;
        document["clients"].as_u64().context("no number of clients")
    }

    /// One of its counters, by its name without `weir_relay_`; of counters by reason the sum.
    ///
    /// # Errors
    /// If its page of counters does not answer.
    pub fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let name = format!("weir_relay_{name}");
        let page = self.page("metrics")?;
        let value = |line: &str| {
            let rest = line.strip_prefix(&name)?;
            let counts = rest.starts_with([' ', '{']);
            let number = rest.rsplit(' ').next()?;
            counts.then(|| number.parse::<u64>().ok())?
        };
        Ok(page.lines().filter_map(value).sum())
    }

    fn page(&self, name: &str) -> anyhow::Result<String> {
        use std::io::{Read, Write};
        self.host.enter(|| {
            let mut stream = TcpStream::connect_timeout(&STATUS, START_BOUND)?;
            stream.set_read_timeout(Some(START_BOUND))?;
            write!(stream, "GET /{name} HTTP/1.1\r\nHost: relay\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
            ensure!(head.contains(" 200 "), "{head}");
            Ok(body.to_owned())
        })
    }
}

fn serve(host: &Arc<Host>) -> anyhow::Result<Arc<Process>> {
    let folder = host.folder.display();
    let line = format!(
        "weir-relay serve --state-dir {folder}/state/relay --config {folder}/relay.toml \
         --listen [::]:{DERP_PORT} --stun-listen [::]:{STUN_PORT} --status-listen {STATUS}"
    );
    let process = host.start("relay", &line)?;
    // The log may hold the words of an earlier start; the page of this one alone answers.
    let open = || TcpStream::connect_timeout(&STATUS, Duration::from_secs(1)).is_ok();
    let listens = || host.enter(open) && process.said().contains("weir-relay listens on ");
    let answers = || !process.runs() || listens();
    wait_until("the relay listens", START_BOUND, answers)?;
    ensure!(process.runs(), "the relay ended: {}", process.said());
    Ok(process)
}

/// The part of the coordinator's configuration that lists these relays: each is a region of its
/// own, numbered from 1, and is called by its host's first IPv4 address.
#[must_use]
pub fn relays_section(relays: &[&Relay]) -> String {
    let mut text = String::new();
    for (relay, id) in relays.iter().zip(1..) {
        text += &region(id, &relay.name, &[(relay, relay.host.v4())]);
    }
    text
}

/// One region of the coordinator's configuration, with these relays at these of their addresses.
#[must_use]
pub fn region(id: u16, name: &str, hosts: &[(&Relay, IpAddr)]) -> String {
    let host = |(relay, addr): &(&Relay, IpAddr)| {
        let addr = SocketAddr::new(*addr, DERP_PORT);
        let pin = &relay.certificate;
        format!("{{ addr = '{addr}', stun = {STUN_PORT}, certificate = '{pin}' }}")
    };
    let hosts: Vec<String> = hosts.iter().map(host).collect();
    let hosts = hosts.join(", ");
    format!("[[relays.region]]\nid = {id}\nname = '{name}'\nhosts = [{hosts}]\n")
}
