//! The agent's loop: the only owner of the engine, and the only place where modules meet.
//!
//! ```text
//! control ──events──►┌────────┐──Input──►┌────────┐
//! local ────calls───►│ daemon │          │ engine │      (no lock: one task, one owner)
//! watch ────links───►│        │◄─Output──└────────┘
//! port, relay ──────►│        │──► port, relay, shim
//! kernel ──answers──►└────────┘──jobs──► kernel's thread, ──commands──► control, ──► state folder
//! ```
//!
//! Each turn: ask the engine what to do until it has nothing more, answer whoever waits for a state
//! that has come about, then wait for the next event or the engine's deadline. Nothing in a turn
//! blocks: the kernel's jobs, the coordinator and the disk answer as events of their own.
//!
//! The end of the service (SIGTERM) ends the loop and touches nothing: programs, peers and routes
//! go on without us, and the next start adopts them. Only `weir down` takes anything away.

mod answer;
mod explain;
mod guard;
mod join;
mod monitor;
mod netcheck;
mod paths;
mod reach;
mod settings;
mod tap;

use crate::config::Config;
use crate::control;
use crate::identity::{Identity, IdentityError, Seals};
use crate::kernel::{self, Job, OpenError};
use crate::local::{BindError, Call, Refused, RefusedCode, Request, Response, Server};
use crate::port;
use crate::portmap;
use crate::proxy::Proxy;
use crate::relay;
use crate::state::{Settings, StateDir, StateError};
use engine::status::Failure;
use engine::trace::{self, Start};
use engine::{Input, Output, Router};
use guard::Guard;
use join::Link;
use monitor::{Look, Monitor};
use paths::{Port, Relayed};
use proto::id::RegionId;
use proto::netmap::Netmap;
use reach::Rates;
use sd_notify::NotifyState;
use settings::Setting;
use std::collections::VecDeque;
use std::error::Error;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tap::Tap;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

/// Events that may wait for the loop, from each side.
const QUEUE: usize = 64;
/// How long `up` waits for the device before it answers with what there is. Less than the client's
/// patience, so that the client has something to explain.
const UP_PATIENCE: Duration = Duration::from_secs(25);
/// How long `down` tries before it answers with what is in the way.
const DOWN_PATIENCE: Duration = Duration::from_secs(20);
/// How long `down --purge` waits for the coordinator to hear of it.
const LOGOUT_PATIENCE: Duration = Duration::from_secs(5);
/// How long the service manager waits for a node with a cached netmap to be up, at most.
const READY_PATIENCE: Duration = Duration::from_secs(15);
/// How long the end of the service waits for the router.
const GIVE_BACK: Duration = Duration::from_secs(1);
/// The pause before a watch of the host that failed is started again.
const WATCH_PAUSE: Duration = Duration::from_secs(5);

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The state folder.
    #[error("the state folder cannot be used")]
    State(#[from] StateError),
    /// The node's secrets.
    #[error("the node's identity cannot be used")]
    Identity(#[from] IdentityError),
    /// The unix socket.
    #[error("the local API cannot be offered")]
    Local(#[from] BindError),
    /// The kernel.
    #[error("this kernel cannot be used")]
    Kernel(#[from] OpenError),
    /// Signals or random numbers.
    #[error("the system gives no {what}")]
    System {
        /// What it does not give.
        what: &'static str,
    },
}

/// Something that woke the loop.
enum Event {
    Input(Input),
    Port(port::Event),
    Relay(RegionId, relay::Event),
    Control(control::Event),
    Call(Call),
    /// What the programs told of dropped packets, while somebody follows.
    Looked(Look),
    /// The netmap could, or could not, be kept on disk.
    Kept(Result<(), StateError>),
    Tick,
    Stop,
}

/// A client that waits for a state to come about.
struct Waiter {
    reply: oneshot::Sender<Response>,
    deadline: Instant,
}

/// `weir down` under way.
struct Leaving {
    waiter: Waiter,
    /// For `--purge`: what became of telling the coordinator, and until when to wait for it.
    logout: Option<(Instant, Logout)>,
}

/// What the coordinator said to our leaving.
enum Logout {
    Waiting,
    Told,
    Failed(String),
}

struct Daemon {
    config: Config,
    state: StateDir,
    settings: Settings,
    /// What is wrong with the state folder, until it is right again.
    trouble: Vec<(&'static str, String)>,
    /// When it is written to again.
    keep_at: Option<Instant>,
    identity: watch::Sender<Arc<Identity>>,
    engine: Tap,
    jobs: mpsc::Sender<Job>,
    inputs: mpsc::Sender<Input>,
    link: Link,
    going_up: VecDeque<Waiter>,
    leaving: Option<Leaving>,
    setting: VecDeque<Setting>,
    monitor: Monitor,
    /// The newest netmap on its way to the disk.
    netmaps: watch::Sender<Option<Arc<Netmap>>>,
    /// To the sockets beside WireGuard's; or why there are none.
    port: Port,
    seals: Seals,
    relayed: Relayed,
    proxy: Arc<Proxy>,
    /// The router before us, and the one that is asked for a port.
    router: Option<Router>,
    routers: watch::Sender<Option<Router>>,
    /// What it opened.
    opened: watch::Receiver<Option<portmap::Opened>>,
    guard: Guard,
    rates: Rates,
    /// Not ready before this, as long as the node is not up.
    ready_by: Option<Instant>,
}

/// All that can wake the loop.
struct Sources {
    calls: mpsc::Receiver<Call>,
    inputs: mpsc::Receiver<Input>,
    control: mpsc::Receiver<control::Event>,
    relays: mpsc::Receiver<(RegionId, relay::Event)>,
    port: mpsc::Receiver<port::Event>,
    looks: mpsc::Receiver<Look>,
    kept: mpsc::Receiver<Result<(), StateError>>,
    watchdog: Option<tokio::time::Interval>,
    terminate: Signal,
    interrupt: Signal,
}

impl Sources {
    /// What comes next, at the deadline at the latest.
    async fn next(&mut self, deadline: Instant) -> Event {
        tokio::select! {
            () = tokio::time::sleep_until(deadline.into()) => Event::Input(Input::Timeout),
            Some(input) = self.inputs.recv() => Event::Input(input),
            Some(event) = self.control.recv() => Event::Control(event),
            Some(call) = self.calls.recv() => Event::Call(call),
            Some(look) = self.looks.recv() => Event::Looked(look),
            Some(event) = self.port.recv() => Event::Port(event),
            Some((region, event)) = self.relays.recv() => Event::Relay(region, event),
            Some(result) = self.kept.recv() => Event::Kept(result),
            () = tick(&mut self.watchdog) => Event::Tick,
            _ = self.terminate.recv() => Event::Stop,
            _ = self.interrupt.recv() => Event::Stop,
        }
    }
}

/// Runs the agent until it is told to stop.
///
/// # Errors
/// [`DaemonError`] if it cannot start.
pub async fn run(config: Config) -> Result<(), DaemonError> {
    let (routers, router) = watch::channel(None);
    let (mut daemon, mut sources) = assemble(config, routers).await?;
    let port = daemon.config.listen_port;
    let asking = portmap::spawn(port, router, daemon.inputs.clone());
    daemon.opened = asking.opened;
    daemon.start();
    loop {
        let deadline = daemon.settle();
        let event = sources.next(deadline).await;
        if daemon.handle(event).is_break() {
            break;
        }
    }
    tracing::info!("stopping; what is in the kernel stays as it is");
    notify(&[NotifyState::Stopping]);
    // Whatever is on its way to the disk arrives before the process ends.
    drop(daemon);
    // Likewise a port of the router is given back, if the router takes it at once.
    let _ = tokio::time::timeout(GIVE_BACK, asking.task).await;
    while sources.kept.recv().await.is_some() {}
    Ok(())
}

/// Starts everything that the loop is about, and joins it by channels.
async fn assemble(
    config: Config,
    routers: watch::Sender<Option<Router>>,
) -> Result<(Daemon, Sources), DaemonError> {
    let state = StateDir::open(&config.state_dir)?;
    let identity = Arc::new(Identity::load_or_create(&config.state_dir)?);
    let (calls_in, calls) = mpsc::channel(QUEUE);
    tokio::spawn(Server::bind(&config.socket)?.serve(calls_in));
    let (identity, lent) = watch::channel(identity);
    let jobs = kernel::spawn(kernel::Config {
        interface: config.interface.to_string(),
        bpf_dir: config.bpf_dir.clone(),
        switches: state.switches(),
        lend_secret: Box::new(move |tell| lent.borrow().with_node_secret(tell)),
    })
    .await?;
    let (inputs_in, inputs) = mpsc::channel(QUEUE);
    spawn_watch(&config, inputs_in.clone());
    spawn_sleeper(inputs_in.clone());
    let (control_in, control) = mpsc::channel(QUEUE);
    let (kept_in, kept) = mpsc::channel(QUEUE);
    let (looks_in, looks) = mpsc::channel(QUEUE);
    let (relays_in, relays) = mpsc::channel(QUEUE);
    let seals = Seals::new(Arc::clone(&identity.borrow()));
    let proxy = Arc::new(Proxy::of_environment());
    let relayed = Relayed::new(&config, &identity.borrow(), detour(&proxy), relays_in);
    let (port, port_events) = paths::share_port(&config);
    let signals = |_| DaemonError::System { what: "signals" };
    let sources = Sources {
        calls,
        inputs,
        control,
        relays,
        port: port_events,
        looks,
        kept,
        watchdog: sd_notify::watchdog_enabled().map(|period| tokio::time::interval(period / 2)),
        terminate: signal(SignalKind::terminate()).map_err(signals)?,
        interrupt: signal(SignalKind::interrupt()).map_err(signals)?,
    };
    let engine = new_engine(&config, &identity.borrow(), relayed.shim_port())?;
    let daemon = Daemon {
        engine,
        netmaps: spawn_keeper(state.clone(), kept_in),
        seals,
        state,
        settings: Settings::default(),
        trouble: Vec::new(),
        keep_at: None,
        identity,
        jobs,
        inputs: inputs_in,
        link: Link::new(control_in)?,
        going_up: VecDeque::new(),
        leaving: None,
        setting: VecDeque::new(),
        monitor: Monitor::new(looks_in),
        port,
        relayed,
        proxy,
        router: None,
        routers,
        opened: watch::channel(None).1,
        guard: Guard::idle(),
        rates: Rates::default(),
        ready_by: Some(Instant::now() + READY_PATIENCE),
        config,
    };
    Ok((daemon, sources))
}

impl Daemon {
    /// What an earlier run left: settings, the netmap, the way to the coordinator.
    fn start(&mut self) {
        let now = Instant::now();
        let settings = self.state.settings();
        self.note("settings_damaged", settings.problem);
        let netmap = self.state.netmap();
        // After damage all of it is asked for, so that it is written anew.
        let known = netmap.value.as_ref().filter(|_| netmap.problem.is_none());
        let generation = known.map(|netmap| netmap.generation);
        self.note("netmap_damaged", netmap.problem);
        let nobody_said = settings.value.is_none();
        self.settings = settings.value.unwrap_or_default();
        self.switch_answers();
        if nobody_said {
            // What is to be: nothing is touched.
            return;
        }
        self.recall_permit();
        self.guard = Guard::default();
        self.engine
            .handle(now, Input::ShieldsUp(self.settings.shields_up));
        self.engine
            .handle(now, Input::Advertise(self.settings.routes.clone()));
        if let Some(netmap) = netmap.value {
            self.engine.handle(now, Input::Cached(Box::new(netmap)));
        }
        self.engine.handle(now, Input::Up(self.settings.up));
        if let Some(coordinator) = self
            .settings
            .coordinator
            .clone()
            .filter(|_| self.settings.up)
        {
            self.connect(&coordinator);
            self.link.send(control::Command::Poll { base: generation });
        }
    }

    /// Takes in what woke the loop, which may be its end.
    fn handle(&mut self, event: Event) -> ControlFlow<()> {
        match event {
            Event::Input(input) => {
                if let Input::Observed(observed) = &input {
                    self.rates.note(Instant::now(), observed);
                }
                if let Input::Links(links) = &input {
                    self.guard.see(links);
                    if self.relayed.see(links) {
                        self.link.send(control::Command::Hurry);
                    }
                }
                if matches!(input, Input::Woke) {
                    self.woke();
                }
                self.engine.handle(Instant::now(), input);
            }
            Event::Port(event) => self.seen(event),
            Event::Relay(region, event) => self.told_by(region, event),
            Event::Control(event) => self.handle_control(event),
            Event::Call(call) => self.handle_call(call),
            Event::Looked(look) => self.looked(look),
            Event::Kept(result) => self.kept(result),
            Event::Tick => notify(&[NotifyState::Watchdog]),
            Event::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    /// Nobody outside may remember the host any more, which slept: connections are tried, and the
    /// router is asked anew for what it opened.
    fn woke(&mut self) {
        self.relayed.shaken();
        self.link.send(control::Command::Hurry);
        self.routers.send_modify(|_| ());
    }

    /// Lets the engine do all that it wants now; returns when to wake it.
    fn settle(&mut self) -> Instant {
        let now = Instant::now();
        let deadline = loop {
            match self.engine.poll(now) {
                Output::Apply(steps) => self.ask_kernel(
                    |reply| Job::Apply(steps, reply),
                    |done| match done {
                        Ok(Ok(())) => Input::Applied,
                        Ok(Err(error)) => Input::Failed(Failure {
                            done: error.done,
                            kind: error.kind(),
                            detail: chain(&error.source),
                        }),
                        Err(gone) => Input::Failed(gone),
                    },
                ),
                Output::Observe => self.ask_kernel(Job::Observe, |seen| match seen {
                    Ok(Ok(observed)) => Input::Observed(observed),
                    Ok(Err(error)) => Input::Unreadable(chain(&error)),
                    Err(gone) => Input::Unreadable(gone.detail),
                }),
                Output::NeedFull => self.link.send(control::Command::Poll { base: None }),
                Output::Report(about) => self.link.send(control::Command::Report(about)),
                Output::Persist(netmap) => {
                    self.netmaps.send_replace(Some(Arc::from(netmap)));
                }
                Output::Resolve(names) => self.resolve(names),
                Output::Ask(servers) => self.ask_servers(&servers),
                Output::Transmit { via, to, message } => self.transmit(via, to, &message),
                Output::Relays(table) => {
                    self.set_relays(&table);
                    for input in self.engine.stood(&table) {
                        self.engine.handle(now, input);
                    }
                }
                Output::Router(router) => {
                    self.router = router;
                    self.ask_router();
                }
                Output::Timeout(at) => break at,
            }
        };
        let now = Instant::now();
        let guard = self.keep_guard(now);
        let waiting = self.answer_waiters(now);
        let permit = self.keep_permitted(now);
        let kept = self.keep_again(now);
        waiting
            .into_iter()
            .chain(permit)
            .chain(guard)
            .chain(kept)
            .fold(deadline, Instant::min)
    }

    /// Gives the kernel's thread a job; the answer comes back as an input.
    fn ask_kernel<T: Send + 'static>(
        &self,
        job: impl FnOnce(oneshot::Sender<T>) -> Job,
        input: impl FnOnce(Result<T, Failure>) -> Input + Send + 'static,
    ) {
        let (reply, answer) = oneshot::channel();
        let (job, jobs, inputs) = (job(reply), self.jobs.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let sent = jobs.send(job).await.is_ok();
            let answer = if sent { answer.await.ok() } else { None };
            let answer = answer.ok_or_else(|| Failure {
                done: 0,
                kind: engine::status::FailureKind::Kernel,
                detail: "the kernel's thread has ended: restart the agent".to_owned(),
            });
            // The loop may have ended; then nobody waits.
            let _ = inputs.send(input(answer)).await;
        });
    }

    fn handle_call(&mut self, call: Call) {
        let Call {
            request,
            reply,
            more,
        } = call;
        match request {
            Request::Up(up) => self.up(up, reply),
            Request::Down { purge } => self.down(purge, reply),
            Request::Set(set) => self.set(set, reply),
            Request::Status => self.answer_status(reply),
            Request::Peers => send(reply, Response::Peers(self.peers())),
            Request::Ping { peer } => self.answer_ping(&peer, reply),
            Request::Path { peer } => send(reply, self.path(&peer)),
            Request::Explain(explain) => self.answer_explain(&explain, reply),
            Request::Counters => self.answer_counters(reply),
            Request::Netcheck => send(reply, Response::Netcheck(Box::new(self.netcheck()))),
            Request::Monitor(monitor) => self.follow(monitor, more, reply),
            Request::Record { anew } => self.record(anew, more, reply),
        }
    }

    /// Takes everything out of the kernel, and for `purge` out of the state folder too.
    fn down(&mut self, purge: bool, reply: oneshot::Sender<Response>) {
        let now = Instant::now();
        self.settings.up = false;
        self.keep_settings();
        for waiter in self.going_up.drain(..) {
            send(
                waiter.reply,
                refused(RefusedCode::Unavailable, "it was told to go down", ""),
            );
        }
        self.engine.handle(now, Input::Up(false));
        let logout = purge.then(|| (now + LOGOUT_PATIENCE, self.log_out()));
        if !purge {
            self.link.close();
        }
        let deadline = now + DOWN_PATIENCE;
        self.leaving = Some(Leaving {
            waiter: Waiter { reply, deadline },
            logout,
        });
    }

    /// Tells the coordinator that this node leaves, if there is one to tell.
    fn log_out(&mut self) -> Logout {
        let Some(coordinator) = self.settings.coordinator.clone() else {
            return Logout::Told;
        };
        self.connect(&coordinator);
        self.link.send(control::Command::Logout);
        Logout::Waiting
    }

    /// Answers whoever waits for what is so now; returns when to look again at the latest.
    fn answer_waiters(&mut self, now: Instant) -> Option<Instant> {
        if !self.going_up.is_empty() || self.ready_by.is_some() {
            self.answer_going_up(now);
        }
        if self.leaving.is_some() {
            self.answer_leaving(now);
        }
        let setting = match self.setting.is_empty() {
            true => None,
            false => self.answer_setting(now),
        };
        let leaving = self.leaving.iter().flat_map(|leaving| {
            let logout = leaving.logout.as_ref().map(|(until, _)| *until);
            logout.into_iter().chain([leaving.waiter.deadline])
        });
        let going_up = self.going_up.iter().map(|waiter| waiter.deadline);
        let all = leaving.chain(going_up).chain(setting).chain(self.ready_by);
        all.filter(|at| *at > now).min()
    }

    fn answer_going_up(&mut self, now: Instant) {
        let status = self.status();
        let engine = self.engine.status();
        let settled = engine.converged || !engine.problems.is_empty();
        let up = status.is_ready() && settled;
        if self
            .ready_by
            .is_some_and(|by| up || now >= by || !self.comes_up_alone())
        {
            self.ready_by = None;
            notify(&[NotifyState::Ready]);
        }
        let due = |waiter: &Waiter| up || now >= waiter.deadline;
        for waiter in std::mem::take(&mut self.going_up) {
            if due(&waiter) {
                send(waiter.reply, Response::Status(Box::new(status.clone())));
            } else {
                self.going_up.push_back(waiter);
            }
        }
    }

    /// Whether this node is on its way up without anybody's help: it has a netmap to serve.
    fn comes_up_alone(&self) -> bool {
        self.settings.up && self.state.has_netmap()
    }

    fn answer_leaving(&mut self, now: Instant) {
        let Some(mut leaving) = self.leaving.take() else {
            return;
        };
        if let Some((until, state @ Logout::Waiting)) = &mut leaving.logout
            && now >= *until
        {
            *state = Logout::Failed("it did not answer in time".to_owned());
        }
        let told = !matches!(leaving.logout, Some((_, Logout::Waiting)));
        let gone = self.engine.status().converged && self.guard_is_settled();
        if gone && told {
            let remarks = match leaving.logout {
                None => Ok(Vec::new()),
                Some((_, Logout::Failed(why))) => self.purge().map(|()| {
                    vec![format!(
                        "The coordinator could not be told ({why}): remove this node there with \
                         `weir-coordinator node remove`."
                    )]
                }),
                Some((_, Logout::Told | Logout::Waiting)) => self.purge().map(|()| Vec::new()),
            };
            let response = remarks.map_or_else(
                |error| refused(RefusedCode::Failed, &chain(&*error), "Remove it by hand."),
                Response::Done,
            );
            send(leaving.waiter.reply, response);
        } else if now >= leaving.waiter.deadline {
            let problem = self.engine.status().problems.into_iter().next();
            let (message, next) = problem.map_or(("it takes too long".to_owned(), ""), |problem| {
                (problem.to_string(), problem.next())
            });
            send(
                leaving.waiter.reply,
                refused(RefusedCode::Failed, &message, next),
            );
        } else {
            self.leaving = Some(leaving);
        }
    }

    /// Forgets network, settings and identity. A new identity takes its place, in memory until this
    /// machine joins again.
    fn purge(&mut self) -> Result<(), Box<dyn Error>> {
        self.link.close();
        self.netmaps.send_replace(None);
        self.state.wipe()?;
        self.settings = Settings::default();
        self.trouble.clear();
        self.identity.borrow().wipe()?;
        let identity = Arc::new(Identity::fresh(&self.config.state_dir)?);
        self.identity.send_replace(Arc::clone(&identity));
        self.relayed.change_identity(&identity);
        self.seals = Seals::new(Arc::clone(&identity));
        self.engine = new_engine(&self.config, &identity, self.relayed.shim_port())?;
        self.switch_answers();
        Ok(())
    }

    fn keep_settings(&mut self) {
        let kept = self.state.keep_settings(&self.settings);
        if kept.is_ok() {
            self.note("settings_damaged", None);
        }
        self.note("settings_not_kept", kept.err());
    }

    /// A netmap was written, or was not. Only those that the coordinator sent are: one on the disk
    /// makes good for a damaged one.
    fn kept(&mut self, result: Result<(), StateError>) {
        if result.is_ok() {
            self.note("netmap_damaged", None);
        }
        self.note("netmap_not_kept", result.err());
    }

    /// Remembers what is wrong with the state folder, or that it is right again.
    fn note(&mut self, code: &'static str, error: Option<StateError>) {
        let text = error.map(|error| chain(&error));
        let same = |(other, last): &(&str, String)| *other == code && Some(last) == text.as_ref();
        if self.trouble.iter().any(same) {
            return;
        }
        self.trouble.retain(|(other, _)| *other != code);
        if let Some(text) = text {
            tracing::warn!(code, text, "state folder");
            self.trouble.push((code, text));
        }
    }
}

fn new_engine(config: &Config, identity: &Identity, shim_port: u16) -> Result<Tap, DaemonError> {
    let config = engine::Config {
        interface: config.interface.to_string(),
        listen_port: config.listen_port,
        shim_port,
    };
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|_| DaemonError::System { what: "randomness" })?;
    let start = Start {
        version: trace::VERSION,
        weir: env!("CARGO_PKG_VERSION").to_owned(),
        config,
        me: identity.node_key(),
        disco: identity.disco_key(),
        seed,
    };
    Ok(Tap::new(&start, Instant::now()))
}

/// The proxy, as it is lent to whoever connects.
fn detour(proxy: &Arc<Proxy>) -> relay::Detour {
    let proxy = Arc::clone(proxy);
    Arc::new(move |target| proxy.open(target))
}

/// Watches the host's addresses and routes for as long as the loop lives.
fn spawn_watch(config: &Config, inputs: mpsc::Sender<Input>) {
    let interface = config.interface.to_string();
    let (links_in, mut links) = mpsc::channel(1);
    tokio::spawn(async move {
        while !links_in.is_closed() {
            if let Err(error) = kernel::watch::run(&interface, links_in.clone()).await {
                tracing::warn!(%error, "the host's addresses and routes cannot be watched");
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        }
    });
    tokio::spawn(async move {
        while let Some(now) = links.recv().await {
            if inputs.send(Input::Links(now)).await.is_err() {
                return;
            }
        }
    });
}

/// Watches for the machine to sleep and wake, for as long as the loop lives.
fn spawn_sleeper(inputs: mpsc::Sender<Input>) {
    let woke = move |long: Duration| {
        tracing::info!(
            seconds = long.as_secs(),
            "the machine slept: paths are looked at anew"
        );
        inputs.blocking_send(Input::Woke).is_ok()
    };
    let watch = move || {
        if let Err(error) = kernel::wake::watch(woke) {
            tracing::warn!(%error, "it will not be seen when this machine sleeps");
        }
    };
    let thread = std::thread::Builder::new().name("sleeper".to_owned());
    if let Err(error) = thread.spawn(watch) {
        tracing::warn!(%error, "it will not be seen when this machine sleeps");
    }
}

/// Keeps the newest netmap on disk. Writing takes its time; netmaps that come meanwhile are
/// skipped but for the last.
fn spawn_keeper(
    state: StateDir,
    kept: mpsc::Sender<Result<(), StateError>>,
) -> watch::Sender<Option<Arc<Netmap>>> {
    let (newest, mut netmaps) = watch::channel(None::<Arc<Netmap>>);
    tokio::spawn(async move {
        while netmaps.changed().await.is_ok() {
            let Some(netmap) = netmaps.borrow_and_update().clone() else {
                continue;
            };
            let state = state.clone();
            let written = tokio::task::spawn_blocking(move || state.keep_netmap(&netmap)).await;
            // A panic in there is a bug, and has been printed.
            if let Ok(result) = written
                && kept.send(result).await.is_err()
            {
                return;
            }
        }
    });
    newest
}

async fn tick(watchdog: &mut Option<tokio::time::Interval>) {
    match watchdog {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager could not be told");
    }
}

/// Answers a client. One that hung up misses nothing that it still wants.
fn send(reply: oneshot::Sender<Response>, response: Response) {
    let _ = reply.send(response);
}

fn refused(code: RefusedCode, message: &str, next: &str) -> Response {
    Response::Refused(Refused {
        code,
        message: message.to_owned(),
        next: next.to_owned(),
    })
}

/// An error and all its causes in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
