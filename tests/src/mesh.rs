//! A coordinator and agents in a lab, driven by nothing but their command lines.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::host::Host;
use crate::lab::Lab;
use crate::process::{Output, Process};
use crate::relay::{Relay, relays_section};
use crate::wait_until;

/// How long a server or an agent may take to start. Generous, for slow machines.
const START_BOUND: Duration = Duration::from_secs(30);
/// How long a change may take from the coordinator to every kernel.
pub const SPREAD_BOUND: Duration = Duration::from_secs(40);
/// The coordinator's configuration, in its host's folder, if it has one.
const CONFIG: &str = "coordinator.toml";
/// The port that a lab's coordinator listens on.
const PORT: u16 = 8443;

/// A running `weir-coordinator` with its state, on one host.
pub struct Coordinator {
    /// Where it runs.
    pub host: Arc<Host>,
    listen: SocketAddr,
    process: Mutex<Arc<Process>>,
}

impl Coordinator {
    /// Starts it on the host's first IPv4 address and waits until it listens.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(host: &Arc<Host>) -> anyhow::Result<Self> {
        Self::start_at(host, host.v4())
    }

    /// The same on this address of the host.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_at(host: &Arc<Host>, addr: IpAddr) -> anyhow::Result<Self> {
        let listen = SocketAddr::new(addr, PORT);
        let process = Self::serve(host, listen)?;
        Ok(Self {
            host: Arc::clone(host),
            listen,
            process: Mutex::new(process),
        })
    }

    /// The same with a configuration file of this text.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_with(host: &Arc<Host>, config: &str) -> anyhow::Result<Self> {
        std::fs::write(host.folder.join(CONFIG), config)?;
        Self::start(host)
    }

    fn serve(host: &Arc<Host>, listen: SocketAddr) -> anyhow::Result<Arc<Process>> {
        let state = Self::state(host);
        let mut line = format!(
            "weir-coordinator serve --state-dir {} --listen {listen}",
            state.display()
        );
        let config = host.folder.join(CONFIG);
        if config.exists() {
            line += &format!(" --config {}", config.display());
        }
        let process = host.start("coordinator", &line)?;
        let answers = || {
            let open = || TcpStream::connect_timeout(&listen, Duration::from_secs(1)).is_ok();
            !process.runs() || (host.enter(open) && state.join("admin.sock").exists())
        };
        wait_until("the coordinator listens", START_BOUND, answers)?;
        ensure!(process.runs(), "the coordinator ended: {}", process.said());
        Ok(process)
    }

    fn state(host: &Host) -> PathBuf {
        host.folder.join("state/coordinator")
    }

    /// Runs an administrator's command: `token create --network home …`.
    ///
    /// # Errors
    /// If it does not succeed.
    pub fn admin(&self, line: &str) -> anyhow::Result<Output> {
        self.admin_with(line)?.success()
    }

    /// The same, whatever comes of it.
    ///
    /// # Errors
    /// If it cannot be run at all.
    pub fn admin_with(&self, line: &str) -> anyhow::Result<Output> {
        let state = Self::state(&self.host);
        self.host.output(&format!(
            "weir-coordinator --state-dir {} {line}",
            state.display()
        ))
    }

    /// Makes a join token: the last line that the command prints.
    ///
    /// # Errors
    /// If the coordinator refuses.
    pub fn token(&self, options: &str) -> anyhow::Result<String> {
        let output = self.admin(&format!("token create {options}"))?;
        let token = output
            .stdout
            .lines()
            .last()
            .unwrap_or_default()
            .trim()
            .to_owned();
        ensure!(token.starts_with("weir1."), "not a token: {token}");
        Ok(token)
    }

    /// Puts a policy into force.
    ///
    /// # Errors
    /// If the coordinator refuses it.
    pub fn set_policy(&self, text: &str) -> anyhow::Result<Output> {
        let file = self.host.folder.join("policy.hujson");
        std::fs::write(&file, text)?;
        self.admin(&format!("policy set {}", file.display()))
    }

    /// Ends it as a crash would.
    pub fn kill(&self) {
        self.current().kill();
    }

    /// Starts it again after it ended.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn restart(&self) -> anyhow::Result<()> {
        let process = Self::serve(&self.host, self.listen)?;
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = process;
        Ok(())
    }

    /// Restarts it with a configuration file of this text.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn configure(&self, config: &str) -> anyhow::Result<()> {
        std::fs::write(self.host.folder.join(CONFIG), config)?;
        self.current().stop()?;
        self.restart()
    }

    fn current(&self) -> Arc<Process> {
        Arc::clone(&self.process.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A host with an agent on it.
pub struct Node {
    /// Where it runs.
    pub host: Arc<Host>,
    agent: Mutex<Arc<Process>>,
}

/// The packets that a node's programs counted, by direction, verdict and reason, as
/// `ingress/deny/no_rule`.
pub type Counters = BTreeMap<String, u64>;

impl Node {
    /// Starts an agent on a host.
    ///
    /// # Errors
    /// If it does not answer on its socket.
    pub fn start(host: &Arc<Host>) -> anyhow::Result<Self> {
        let agent = Self::agent(host, "", &[])?;
        Ok(Self {
            host: Arc::clone(host),
            agent: Mutex::new(agent),
        })
    }

    /// The same with more options on the agent's command line, for tests of failing starts: does
    /// not wait for an address.
    ///
    /// # Errors
    /// If it does not answer on its socket.
    pub fn start_with(host: &Arc<Host>, options: &str) -> anyhow::Result<Self> {
        let agent = Self::agent(host, options, &[])?;
        Ok(Self {
            host: Arc::clone(host),
            agent: Mutex::new(agent),
        })
    }

    /// The same with these variables in the agent's environment.
    ///
    /// # Errors
    /// If it does not answer on its socket.
    pub fn start_in(host: &Arc<Host>, environment: &[(&str, &str)]) -> anyhow::Result<Self> {
        let agent = Self::agent(host, "", environment)?;
        Ok(Self {
            host: Arc::clone(host),
            agent: Mutex::new(agent),
        })
    }

    fn agent(
        host: &Arc<Host>,
        options: &str,
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Arc<Process>> {
        let process = Self::begin(host, options, environment)?;
        let folder = host.folder.display();
        let status = format!("weir --socket {folder}/run/weir.sock status --json");
        let answers = || !process.runs() || host.output(&status).is_ok_and(|out| out.code == 0);
        wait_until("the agent answers", START_BOUND, answers)?;
        ensure!(
            process.runs(),
            "the agent on {} ended: {}",
            host.name,
            process.said()
        );
        Ok(process)
    }

    fn begin(
        host: &Arc<Host>,
        options: &str,
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Arc<Process>> {
        let folder = host.folder.display();
        let line = format!(
            "weir agent --state-dir {folder}/state/agent --socket {folder}/run/weir.sock {options}"
        );
        let mut command = host.whole(&line)?;
        command.envs(environment.iter().copied());
        host.start_command("agent", command)
    }

    /// Joins with a token on stdin; `options` go to `weir up`.
    ///
    /// # Errors
    /// If `weir up` does not succeed.
    pub fn join(&self, token: &str, options: &str) -> anyhow::Result<Output> {
        let name = &self.host.name;
        let socket = self.socket();
        let line = format!("weir --socket {socket} up - --hostname {name} {options}");
        self.host.run_with(&line, &format!("{token}\n"))
    }

    /// Runs `weir VERB …` against this node's agent, and it has to succeed.
    ///
    /// # Errors
    /// If it does not.
    pub fn weir(&self, line: &str) -> anyhow::Result<Output> {
        self.weir_with(line)?
            .success()
            .with_context(|| format!("on {}", self.host.name))
    }

    /// The same, whatever comes of it.
    ///
    /// # Errors
    /// If it cannot be run at all.
    pub fn weir_with(&self, line: &str) -> anyhow::Result<Output> {
        self.host
            .output(&format!("weir --socket {} {line}", self.socket()))
    }

    fn socket(&self) -> String {
        format!("{}/run/weir.sock", self.host.folder.display())
    }

    /// `weir status --json`.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn status(&self) -> anyhow::Result<Value> {
        self.weir("status --json")?.json()
    }

    /// Its IPv4 address in the network, as the device has it.
    ///
    /// # Errors
    /// If it has none.
    pub fn v4(&self) -> anyhow::Result<IpAddr> {
        self.addr(IpAddr::is_ipv4)
    }

    /// Its IPv6 address in the network, as the device has it.
    ///
    /// # Errors
    /// If it has none.
    pub fn v6(&self) -> anyhow::Result<IpAddr> {
        self.addr(IpAddr::is_ipv6)
    }

    fn addr(&self, family: fn(&IpAddr) -> bool) -> anyhow::Result<IpAddr> {
        let status = self.status()?;
        let addrs = status["interface"]["addrs"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let parsed = addrs.iter().filter_map(|addr| addr.as_str()?.parse().ok());
        let found = parsed.into_iter().find(family);
        found.with_context(|| format!("{} has no such address: {status}", self.host.name))
    }

    /// The programs' counters.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn counters(&self) -> anyhow::Result<Counters> {
        let document = self.weir("counters --json")?.json()?;
        let rows = document["counters"]
            .as_array()
            .context("no list of counters")?;
        let row = |row: &Value| {
            let word = |field: &str| row[field].as_str().map(str::to_owned).context("a word");
            let key = format!(
                "{}/{}/{}",
                word("direction")?,
                word("verdict")?,
                word("reason")?
            );
            Ok((key, row["packets"].as_u64().context("a number")?))
        };
        rows.iter().map(row).collect()
    }

    /// Answers to packets that it refused to send, by what became of them.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn answers(&self) -> anyhow::Result<Counters> {
        let document = self.weir("counters --json")?.json()?;
        let rows = document["answers"].as_array().context("no answers")?;
        let row = |row: &Value| {
            let outcome = row["outcome"].as_str().context("a word")?;
            let packets = row["packets"].as_u64().context("a number")?;
            Ok((outcome.to_owned(), packets))
        };
        rows.iter().map(row).collect()
    }

    /// The public keys of the peers in its kernel.
    ///
    /// # Errors
    /// If the device does not exist.
    pub fn kernel_peers(&self) -> anyhow::Result<Vec<String>> {
        let output = self.host.run("wg show weir0 peers")?;
        Ok(output
            .stdout
            .split_whitespace()
            .map(str::to_owned)
            .collect())
    }

    /// Its WireGuard public key.
    ///
    /// # Errors
    /// If the device does not exist.
    pub fn public_key(&self) -> anyhow::Result<String> {
        Ok(self
            .host
            .run("wg show weir0 public-key")?
            .stdout
            .trim()
            .to_owned())
    }

    /// Its WireGuard private key, as only root of that host can read it from the kernel: for a
    /// thief's bare peer.
    ///
    /// # Errors
    /// If the device does not exist.
    pub fn stolen_key(&self) -> anyhow::Result<String> {
        Ok(self
            .host
            .run("wg show weir0 private-key")?
            .stdout
            .trim()
            .to_owned())
    }

    /// The agent's process.
    #[must_use]
    pub fn process(&self) -> Arc<Process> {
        Arc::clone(&self.agent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the agent as a crash would.
    pub fn kill(&self) {
        self.process().kill();
    }

    /// Ends the agent and takes its programs off the device, as an attacker with root on that host
    /// could. The device stays as it is.
    ///
    /// # Errors
    /// If they stay on the device.
    pub fn disarm(&self) -> anyhow::Result<()> {
        self.kill();
        // A folder of a bpffs goes only when it is empty, and a link goes with its last pin.
        std::fs::remove_dir_all(self.host.folder.join("bpf/weir"))?;
        let detached = || {
            let shown = self.host.output("bpftool net show dev weir0");
            shown.is_ok_and(|output| !output.stdout.contains("weir0"))
        };
        wait_until("the programs are off the device", SPREAD_BOUND, detached)
    }

    /// Starts the agent again.
    ///
    /// # Errors
    /// If it does not answer on its socket.
    pub fn restart(&self) -> anyhow::Result<()> {
        let agent = Self::agent(&self.host, "", &[])?;
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner) = agent;
        Ok(())
    }

    /// The same, and ends it again as a crash would once it has run for so long, whatever it is
    /// doing.
    ///
    /// # Errors
    /// If it cannot be started, or ended before by itself.
    pub fn cut_short(&self, after: Duration) -> anyhow::Result<()> {
        let (agent, start) = (Self::begin(&self.host, "", &[])?, Instant::now());
        // The clock is the fault here: at whatever point of the start that is.
        while start.elapsed() < after {
            std::thread::yield_now();
        }
        ensure!(agent.runs(), "the agent ended: {}", agent.said());
        agent.kill();
        Ok(())
    }

    /// Waits until `weir status` says what is wanted of it.
    ///
    /// # Errors
    /// If it does not in time: with the last status.
    pub fn until(&self, what: &str, fits: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let mut last = Value::Null;
        let mut look = || match self.status() {
            Ok(status) => {
                last = status;
                fits(&last)
            }
            Err(_) => false,
        };
        let waited = wait_until(what, SPREAD_BOUND, &mut look);
        waited.with_context(|| format!("{}: last status {last:#}", self.host.name))?;
        Ok(last)
    }
}

/// A network in a lab: a coordinator on the host `hub`, relays, and a node on each host that has
/// joined.
pub struct Mesh {
    /// The coordinator.
    pub coordinator: Coordinator,
    /// The relays that it was started with.
    pub relays: Vec<Relay>,
    nodes: BTreeMap<String, Arc<Node>>,
}

/// Who joins, and how.
#[derive(Clone, Copy, Debug)]
pub struct Join<'a> {
    /// The host's name; the node gets the same.
    pub host: &'a str,
    /// `--user U` or `--tag tag:x`.
    pub owner: &'a str,
    /// Subnets to advertise and to have approved, separated by commas; empty for none.
    pub routes: &'a str,
}

impl Mesh {
    /// A network without nodes, of a coordinator that runs.
    #[must_use]
    pub fn new(coordinator: Coordinator) -> Self {
        Self {
            coordinator,
            relays: Vec::new(),
            nodes: BTreeMap::new(),
        }
    }

    /// A coordinator on `hub` with one network `home`, a policy, and nodes with their users.
    ///
    /// # Errors
    /// If anything of that fails.
    pub fn start(lab: &Lab, policy: &str, joins: &[Join<'_>]) -> anyhow::Result<Self> {
        Self::with_relays(lab, policy, &[], joins)
    }

    /// The same with a relay on each of these hosts, in a region of its own that is called as the
    /// host is.
    ///
    /// # Errors
    /// If anything of that fails.
    pub fn with_relays(
        lab: &Lab,
        policy: &str,
        relays: &[&str],
        joins: &[Join<'_>],
    ) -> anyhow::Result<Self> {
        let mut mesh = Self::new(Coordinator::start(&lab.host("hub"))?);
        mesh.coordinator.admin("network create home")?;
        let users = joins
            .iter()
            .filter_map(|join| join.owner.strip_prefix("--user "));
        for user in users.collect::<BTreeSet<_>>() {
            mesh.coordinator
                .admin(&format!("user create {user} --network home"))?;
        }
        mesh.coordinator.set_policy(policy)?;
        let start = |name: &&str| Relay::start(&lab.host(name), name, &mesh.coordinator);
        mesh.relays = relays.iter().map(start).collect::<Result<_, _>>()?;
        if !relays.is_empty() {
            let list: Vec<&Relay> = mesh.relays.iter().collect();
            mesh.coordinator.configure(&relays_section(&list))?;
        }
        mesh.join(lab, joins)?;
        Ok(mesh)
    }

    /// Starts agents on hosts and joins them, all at once, and approves their routes. Returns what
    /// each `weir up` said.
    ///
    /// # Errors
    /// If one of them does not come up.
    pub fn join(&mut self, lab: &Lab, joins: &[Join<'_>]) -> anyhow::Result<Vec<Output>> {
        let mut tokens = Vec::new();
        for join in joins {
            tokens.push(
                self.coordinator
                    .token(&format!("--network home {}", join.owner))?,
            );
        }
        let nodes: Vec<anyhow::Result<(Node, Output)>> = std::thread::scope(|scope| {
            let start = |(join, token): (&Join<'_>, String)| {
                let (host, routes) = (lab.host(join.host), join.routes.to_owned());
                scope.spawn(move || {
                    let node = Node::start(&host)?;
                    let options = match routes.as_str() {
                        "" => String::new(),
                        routes => format!("--advertise-routes {routes}"),
                    };
                    let output = node.join(&token, &options)?;
                    Ok((node, output))
                })
            };
            let threads: Vec<_> = joins.iter().zip(tokens).map(start).collect();
            let ended = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
            ended
                .map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let mut outputs = Vec::new();
        for (join, joined) in joins.iter().zip(nodes) {
            let (node, output) = joined?;
            outputs.push(output);
            self.nodes.insert(join.host.to_owned(), Arc::new(node));
            for route in join.routes.split(',').filter(|route| !route.is_empty()) {
                self.coordinator
                    .admin(&format!("route approve {} {route}", join.host))?;
            }
        }
        Ok(outputs)
    }

    /// The node on that host.
    ///
    /// # Panics
    /// If it has not joined.
    #[must_use]
    pub fn node(&self, name: &str) -> Arc<Node> {
        let found = self.nodes.get(name);
        Arc::clone(found.unwrap_or_else(|| panic!("{name} has not joined")))
    }

    /// All nodes by name.
    #[must_use]
    pub fn nodes(&self) -> &BTreeMap<String, Arc<Node>> {
        &self.nodes
    }

    /// Waits until every one of these nodes has exactly so many peers in its kernel.
    ///
    /// # Errors
    /// If one does not in time.
    pub fn settled(&self, peers: &[(&str, usize)]) -> anyhow::Result<()> {
        for (name, count) in peers {
            let node = self.node(name);
            let what = format!("{name} has {count} peers in its kernel");
            let fits = || node.kernel_peers().is_ok_and(|peers| peers.len() == *count);
            wait_until(&what, SPREAD_BOUND, fits)?;
        }
        Ok(())
    }
}
