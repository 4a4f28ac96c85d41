//! The conversation with the coordinator.
//!
//! One task ([`run`]) holds it: it takes [`Command`]s and gives [`Event`]s, and knows nothing of
//! netmaps but how to pass them on. What it is told to do it does until it is done: a registration
//! or report that meets a dead coordinator is sent again after a pause, a netmap stream that ends
//! or falls silent is opened again from the generation it had reached. Pauses double from one
//! second to a minute and are spread by a seed, so that a network's nodes do not all come back at
//! once.
//!
//! Only one thing is *not* tried again by itself: what the coordinator refused for good
//! ([`Event::Refused`]). Nothing here can delay a packet: the kernel needs no coordinator.
//!
//! The stream has a connection of its own, held as long as it lives. The other calls are rare; they
//! share one that is opened for them and closed after. Every connection is TLS 1.3 to exactly one
//! certificate, and shows the machine's own ([`channel`]).
//!
//! The daemon must never wait for room in the queue of commands: this task may be waiting for room
//! in the queue of events. It uses `try_send`; a queue of a few commands does not fill.

mod channel;
mod lines;

pub use channel::{ControlError, Credentials, Prove, tls_to};

use channel::{Client, Stream};
use futures_util::future::BoxFuture;
use proto::control::{
    self as wire, Hello, HelloRequest, PollMessage, PollRequest, Refusal, RefusalCode,
    RegisterRequest, Registered, Report, TokenSecret,
};
use proto::id::Generation;
use proto::key::Fingerprint;
use proto::netmap::Update;
use proto::permit::Permit;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// The pause after the first failure, before it is spread.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause, before it is spread.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Opens a stream to `HOST:PORT` through a proxy; `None` where one is to be reached directly.
pub type Detour =
    Arc<dyn Fn(&str) -> Option<BoxFuture<'static, io::Result<TcpStream>>> + Send + Sync>;

/// Whom to talk with.
#[derive(Clone)]
pub struct ControlConfig {
    /// `HOST:PORT`; an IPv6 address stands in brackets.
    pub address: String,
    /// The certificate to expect there.
    pub fingerprint: Fingerprint,
    /// See [`Detour`].
    pub detour: Detour,
    /// Spreads the pauses: another one for each process.
    pub seed: [u8; 32],
}

/// What the daemon wants said.
pub enum Command {
    /// Become a node, or change name and routes as the node this machine already is. Leads to
    /// [`Event::Registered`] or [`Event::Refused`]. A machine that is no node yet has nothing to
    /// poll for: poll when it has been registered.
    Register(Box<Register>),
    /// Tell where this node can be reached and what it offers.
    Report(Report),
    /// Open the stream of netmaps from this generation, or from nothing. If one is open, it is
    /// opened anew: this is also how to ask for a full netmap.
    Poll {
        /// The generation at hand.
        base: Option<Generation>,
    },
    /// Ask for a permit to use the network's relays. Leads to [`Event::Permit`].
    Permit,
    /// The host's links changed: a pause is over.
    Hurry,
    /// Leave the network. Leads to [`Event::LoggedOut`]; not tried again if it fails.
    Logout,
}

/// See [`Command::Register`].
pub struct Register {
    /// What admits this machine; not needed if it is a node already.
    pub token: Option<TokenSecret>,
    /// What it would like to be called.
    pub hostname: String,
    /// Where it can be reached and what it offers.
    pub about: Report,
}

/// What the coordinator said, and how the conversation goes.
#[derive(Debug)]
pub enum Event {
    /// This machine is a node.
    Registered(Registered),
    /// The stream of netmaps is open.
    Connected,
    /// A netmap, or a change of one. In order, each once.
    Update(Update),
    /// A permit to use the network's relays; `None` if it has none.
    Permit(Option<Permit>),
    /// The coordinator will not do it, now or later.
    Refused(Refusal),
    /// This machine is no node any more.
    LoggedOut,
    /// The conversation broke off.
    Disconnected {
        /// Why.
        why: ControlError,
        /// When it goes on.
        retry_in: Duration,
    },
}

/// Holds the conversation until `commands` or `events` closes.
pub async fn run(
    config: ControlConfig,
    credentials: Credentials,
    mut commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
) {
    let seed = config.seed;
    let mut session = Session::new(Client::new(config, credentials), events);
    let mut failures = 0;
    loop {
        let why = match session.work().await {
            Err(why) => why,
            Ok(()) => tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => {
                        session.note(command);
                        continue;
                    }
                    None => return,
                },
                why = session.stream_ended() => why,
            },
        };
        if session.break_off() {
            failures = 0;
        }
        let retry_in = match &why {
            ControlError::Refused(refusal) if refusal.code != RefusalCode::Unavailable => {
                if session.tell(Event::Refused(refusal.clone())).await.is_err() {
                    return;
                }
                spread(seed, failures, LONGEST_PAUSE)
            }
            _ => pause(seed, failures),
        };
        failures = failures.saturating_add(1);
        if session
            .tell(Event::Disconnected { why, retry_in })
            .await
            .is_err()
        {
            return;
        }
        if wait(&mut session, &mut commands, retry_in).await.is_err() {
            return;
        }
    }
}

/// The daemon is gone.
struct Gone;

/// Waits out a pause. What somebody waits for (a registration, a logout) ends it early, and so do
/// new links.
async fn wait(
    session: &mut Session,
    commands: &mut mpsc::Receiver<Command>,
    retry_in: Duration,
) -> Result<(), Gone> {
    let deadline = tokio::time::sleep(retry_in);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            () = &mut deadline => return Ok(()),
            command = commands.recv() => {
                let command = command.ok_or(Gone)?;
                let urgent = match command {
                    Command::Register(_) | Command::Logout | Command::Hurry => true,
                    Command::Report(_) | Command::Poll { .. } | Command::Permit => false,
                };
                session.note(command);
                if urgent {
                    return Ok(());
                }
            }
        }
    }
}

/// What is still to be said, and the stream if it is open.
struct Session {
    client: Client,
    events: mpsc::Sender<Event>,
    register: Option<Box<Register>>,
    report: Option<Report>,
    permit: bool,
    logout: bool,
    /// Whether the daemon wants the stream.
    polling: bool,
    /// How far the stream has come.
    progress: watch::Sender<Progress>,
    /// The task that reads the stream: one, or none.
    stream: JoinSet<ControlError>,
}

#[derive(Clone, Copy, Default)]
struct Progress {
    /// The generation that the daemon has been given.
    generation: Option<Generation>,
    /// Whether the present stream has carried a message.
    heard: bool,
}

/// An empty JSON object: the body of calls that say nothing and of answers that say nothing.
#[derive(Serialize, Deserialize)]
struct Nothing {}

impl Session {
    fn new(client: Client, events: mpsc::Sender<Event>) -> Self {
        Self {
            client,
            events,
            register: None,
            report: None,
            permit: false,
            logout: false,
            polling: false,
            progress: watch::Sender::new(Progress::default()),
            stream: JoinSet::new(),
        }
    }

    async fn tell(&self, event: Event) -> Result<(), Gone> {
        self.events.send(event).await.map_err(|_| Gone)
    }

    fn note(&mut self, command: Command) {
        match command {
            Command::Register(register) => self.register = Some(register),
            Command::Report(report) => self.report = Some(report),
            Command::Permit => self.permit = true,
            Command::Hurry => {}
            Command::Logout => self.logout = true,
            Command::Poll { base } => {
                self.stream = JoinSet::new();
                self.polling = true;
                self.progress.send_replace(Progress {
                    generation: base,
                    heard: false,
                });
            }
        }
    }

    /// Says all that is to be said, then opens the stream if it is wanted and not open.
    async fn work(&mut self) -> Result<(), ControlError> {
        if self.register.is_some() || self.report.is_some() || self.permit || self.logout {
            self.call().await?;
        }
        if self.polling && self.stream.is_empty() {
            let base = self.progress.borrow().generation;
            let stream = self.client.poll(&PollRequest { base }).await?;
            let (events, progress) = (self.events.clone(), self.progress.clone());
            self.stream.spawn(follow(stream, events, progress));
        }
        Ok(())
    }

    /// The calls that are due, over one connection.
    async fn call(&mut self) -> Result<(), ControlError> {
        let mut channel = self.client.connect().await?;
        if let Some(register) = &self.register {
            let answer = Self::register(&self.client, &mut channel, register).await;
            let event = match answer {
                Ok(registered) => Event::Registered(registered),
                Err(error) => Event::Refused(error.final_refusal()?),
            };
            self.register = None;
            self.report = None;
            self.announce(event).await?;
        }
        if let Some(report) = &self.report {
            let answer: Result<Nothing, _> = channel.call("/v1/report", report).await;
            self.report = match answer {
                Ok(Nothing {}) => None,
                Err(error) => {
                    let refusal = error.final_refusal()?;
                    self.announce(Event::Refused(refusal)).await?;
                    None
                }
            };
        }
        if self.permit {
            let answer: Result<Permit, _> = channel.call("/v1/permit", &Nothing {}).await;
            let event = match answer.map_err(ControlError::final_refusal) {
                Ok(permit) => Event::Permit(Some(permit)),
                Err(Ok(refusal)) if refusal.code == RefusalCode::NoRelays => Event::Permit(None),
                Err(Ok(refusal)) => Event::Refused(refusal),
                Err(Err(error)) => return Err(error),
            };
            self.permit = false;
            self.announce(event).await?;
        }
        if std::mem::take(&mut self.logout) {
            let answer: Result<Nothing, _> = channel.call("/v1/logout", &Nothing {}).await;
            match answer.map_err(ControlError::final_refusal) {
                Ok(Nothing {}) => {}
                // It is no node any more: that is what was wanted.
                Err(Ok(refusal)) if refusal.code == RefusalCode::UnknownNode => {}
                Err(Ok(refusal)) => return self.announce(Event::Refused(refusal)).await,
                Err(Err(error)) => return Err(error),
            }
            self.polling = false;
            self.stream = JoinSet::new();
            self.announce(Event::LoggedOut).await?;
        }
        Ok(())
    }

    async fn register(
        client: &Client,
        channel: &mut channel::Channel,
        register: &Register,
    ) -> Result<Registered, ControlError> {
        let version = wire::VERSION;
        let hello: Hello = channel.call("/v1/hello", &HelloRequest { version }).await?;
        let Register {
            token,
            hostname,
            about,
        } = register;
        let request = RegisterRequest {
            token: token.clone(),
            key: client.node_key(),
            proof: client.prove(hello.challenge, channel)?,
            hostname: hostname.clone(),
            routes: about.routes.clone(),
            endpoints: about.endpoints.clone(),
            listen_port: about.listen_port,
            disco: about.disco,
        };
        channel.call("/v1/register", &request).await
    }

    async fn announce(&self, event: Event) -> Result<(), ControlError> {
        self.tell(event).await.map_err(|Gone| ControlError::Stopped)
    }

    /// Why the stream ended; never returns while none is open.
    async fn stream_ended(&mut self) -> ControlError {
        match self.stream.join_next().await {
            Some(Ok(why)) => why,
            Some(Err(_)) => ControlError::Closed,
            None => std::future::pending().await,
        }
    }

    /// Drops the stream. Returns whether it had carried a message.
    fn break_off(&mut self) -> bool {
        self.stream = JoinSet::new();
        let mut heard = false;
        self.progress
            .send_modify(|progress| heard = std::mem::take(&mut progress.heard));
        heard
    }
}

/// Passes on what the stream carries until it ends; returns why it did.
async fn follow(
    mut stream: Stream,
    events: mpsc::Sender<Event>,
    progress: watch::Sender<Progress>,
) -> ControlError {
    if events.send(Event::Connected).await.is_err() {
        return ControlError::Stopped;
    }
    loop {
        let message = match stream.next().await {
            Ok(message) => message,
            Err(why) => return why,
        };
        progress.send_modify(|progress| progress.heard = true);
        let update = match message {
            PollMessage::KeepAlive => continue,
            PollMessage::Update(update) => update,
        };
        let generation = match &update {
            Update::Full(netmap) => netmap.generation,
            Update::Delta(delta) => delta.next,
        };
        if events.send(Event::Update(update)).await.is_err() {
            return ControlError::Stopped;
        }
        progress.send_modify(|progress| progress.generation = Some(generation));
    }
}

/// The pause after this many failures in a row.
fn pause(seed: [u8; 32], failures: u32) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures.min(16)));
    spread(seed, failures, doubled.min(LONGEST_PAUSE))
}

/// A time between a quarter and the whole of `longest`, the same for the same arguments.
fn spread(seed: [u8; 32], failures: u32, longest: Duration) -> Duration {
    let digest = Sha256::new()
        .chain_update(seed)
        .chain_update(failures.to_be_bytes())
        .finalize();
    let sixteenth = longest / 16;
    let fraction = f64::from(u32::from_be_bytes([
        digest[0], digest[1], digest[2], digest[3],
    ])) / f64::from(u32::MAX);
    sixteenth * 4 + (sixteenth * 12).mul_f64(fraction)
}

#[cfg(test)]
mod tests;
