//! Connections to relays: one task for each region that is wanted.
//!
//! ```text
//! shim ──packets──► Outboxes ──┐                                    ┌──► Deliver (the shim)
//! daemon ─discovery─►          ├─► task of a region ◄═ DERP ═► relay │
//! daemon ── set() ─────────────┘            └──events──► daemon     ─┘
//! ```
//!
//! A task connects, logs in, carries packets both ways and connects again when that ends, for as
//! long as its region is wanted ([`Relays::set`]). Relayed packets of WireGuard never meet the
//! daemon: they come from the shim by [`Outboxes`] and go to it by [`Deliver`]. What the daemon
//! hears is discovery, and how the connection is. Nothing here decides which regions are wanted.
//!
//! The login needs the node's private key; an *operation* with it is lent ([`Login`]), never the
//! key. Which relay it is, TLS says: the certificate that the coordinator named, or one that the
//! system's authorities vouch for.
//!
//! A middlebox that refuses DERP's own upgrade is passed by a WebSocket ([`Transport`]), a network
//! whose only way out is a proxy by a tunnel through it ([`Detour`]).
//!
//! A connection that says nothing is asked every two seconds ([`stream`]), so that a region that
//! went without a farewell is told within four.

mod dial;
mod frames;
mod outbox;
mod stream;
mod websocket;

pub use outbox::{Outboxes, Packet};

use bytes::Bytes;
use dial::Dialer;
use engine::RelayEvent;
use futures_util::future::BoxFuture;
use outbox::Outbox;
use proto::derp::{Frame, LoginBox};
use proto::id::RegionId;
use proto::key::{Fingerprint, NodeKey, RelayKey};
use proto::netmap::Region;
use proto::permit::Permit;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use stream::End;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// The pause after the first failure; doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// A connection that lived for this long was a good one: the next failure is a first one.
const PROVEN: Duration = Duration::from_secs(10);
/// Longest pause that a relay may ask for when it restarts.
const LONGEST_RESTART: Duration = Duration::from_secs(5);

/// Seals and opens logins at a relay with the node's private key; `None` if its key is none.
pub type Login = Arc<dyn Fn(RelayKey) -> Option<LoginBox> + Send + Sync>;
/// How TLS takes one certificate and no other.
pub type Pinned = Arc<dyn Fn(Fingerprint) -> rustls::ClientConfig + Send + Sync>;
/// Opens a stream to `HOST:PORT` through a proxy; `None` where one is to be reached directly.
pub type Detour =
    Arc<dyn Fn(&str) -> Option<BoxFuture<'static, io::Result<TcpStream>>> + Send + Sync>;
/// Takes what peers sent, and says whose packets were the first of their kind.
pub type Deliver = Arc<dyn Fn(&[Packet]) -> Vec<NodeKey> + Send + Sync>;

/// What a connection goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// DERP's own upgrade.
    Derp,
    /// A WebSocket, because something in between refused the upgrade.
    WebSocket,
}

/// What is told of a region's connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// As the engine is to know it.
    Said(RelayEvent),
    /// A discovery packet came by it, sealed as it came.
    Disco {
        /// Who sent it, in the relay's words.
        from: NodeKey,
        /// All of it.
        bytes: Vec<u8>,
    },
}

/// What every connection needs.
#[derive(Clone)]
pub struct Config {
    /// Our key: our address on relays.
    pub me: NodeKey,
    /// See [`Login`].
    pub login: Login,
    /// See [`Pinned`].
    pub pinned: Pinned,
    /// See [`Detour`].
    pub detour: Detour,
    /// See [`Deliver`].
    pub deliver: Deliver,
    /// Where events go.
    pub events: mpsc::Sender<(RegionId, Event)>,
}

/// All connections to relays. They end when it is dropped.
pub struct Relays {
    config: Config,
    outboxes: Outboxes,
    permit: watch::Sender<Option<Permit>>,
    /// Sends when the host's links change.
    shaken: watch::Sender<()>,
    regions: BTreeMap<RegionId, Place>,
}

/// A region that is wanted.
struct Place {
    region: Region,
    outbox: Arc<Outbox>,
    home: Arc<AtomicBool>,
    transport: watch::Receiver<Option<Transport>>,
    /// The task; it ends with the place.
    _task: JoinSet<()>,
}

impl Relays {
    /// No connections yet. Packets for them go into `outboxes`.
    #[must_use]
    pub fn new(config: Config, outboxes: Outboxes) -> Self {
        Self {
            config,
            outboxes,
            permit: watch::Sender::new(None),
            shaken: watch::Sender::new(()),
            regions: BTreeMap::new(),
        }
    }

    /// Our permit, from now on. Connections that stand keep standing; one that was refused is
    /// tried again at once.
    pub fn set_permit(&self, permit: Option<Permit>) {
        let changed = |held: &mut Option<Permit>| {
            let news = *held != permit;
            *held = permit;
            news
        };
        self.permit.send_if_modified(changed);
    }

    /// The host's links changed: connections are asked whether they still stand, and whoever pauses
    /// tries again.
    pub fn shaken(&self) {
        self.shaken.send_replace(());
    }

    /// Be connected to these regions, and to no others; `home` is where peers find us.
    pub fn set(&mut self, home: Option<RegionId>, regions: &BTreeMap<RegionId, Region>) {
        let stays = |id: &RegionId, place: &Place| regions.get(id) == Some(&place.region);
        let outboxes = &self.outboxes;
        self.regions.retain(|id, place| {
            let stays = stays(id, place);
            if !stays {
                outboxes.set(*id, None);
            }
            stays
        });
        for (id, region) in regions {
            let is_home = home == Some(*id);
            match self.regions.get(id) {
                Some(place) => {
                    if place.home.swap(is_home, Ordering::Relaxed) != is_home {
                        place.outbox.note(&Frame::NotePreferred(is_home));
                    }
                }
                None => {
                    let place = self.place(*id, region, is_home);
                    self.outboxes.set(*id, Some(Arc::clone(&place.outbox)));
                    self.regions.insert(*id, place);
                }
            }
        }
    }

    /// What the connection to a region goes through, while it stands.
    #[must_use]
    pub fn transport(&self, region: RegionId) -> Option<Transport> {
        let place = self.regions.get(&region)?;
        *place.transport.borrow()
    }

    /// Sends a discovery packet to a peer by a region's relay.
    pub fn send(&self, region: RegionId, to: NodeKey, bytes: Vec<u8>) {
        self.outboxes.push(region, &[(to, Bytes::from(bytes))]);
    }

    fn place(&self, id: RegionId, region: &Region, home: bool) -> Place {
        let outbox = Arc::new(Outbox::default());
        let home = Arc::new(AtomicBool::new(home));
        let (through, transport) = watch::channel(None);
        let link = Link {
            id,
            region: region.clone(),
            config: self.config.clone(),
            permit: self.permit.subscribe(),
            shaken: self.shaken.subscribe(),
            outbox: Arc::clone(&outbox),
            home: Arc::clone(&home),
            transport: through,
        };
        let mut task = JoinSet::new();
        task.spawn(link.run());
        Place {
            region: region.clone(),
            outbox,
            home,
            transport,
            _task: task,
        }
    }
}

/// What the task of one region holds.
struct Link {
    id: RegionId,
    region: Region,
    config: Config,
    permit: watch::Receiver<Option<Permit>>,
    shaken: watch::Receiver<()>,
    outbox: Arc<Outbox>,
    home: Arc<AtomicBool>,
    transport: watch::Sender<Option<Transport>>,
}

/// The daemon is gone.
struct Gone;

impl Link {
    async fn run(mut self) {
        let mut dialer = Dialer {
            me: self.config.me,
            login: Arc::clone(&self.config.login),
            pinned: Arc::clone(&self.config.pinned),
            detour: Arc::clone(&self.config.detour),
            known: BTreeMap::new(),
        };
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let (why, asked) = match self.attempt(&mut dialer).await {
                Ok(end) => (end.to_string(), end.pause()),
                Err(why) => (why, None),
            };
            self.transport.send_replace(None);
            self.outbox.clear();
            if began.elapsed() >= PROVEN {
                failures = 0;
            }
            tracing::debug!(region = %self.id, why, "no connection to the relay");
            if self.tell(RelayEvent::Down(why)).await.is_err() {
                return;
            }
            let pause = asked.unwrap_or_else(|| pause(failures));
            failures = failures.saturating_add(1);
            tokio::select! {
                () = sleep(pause) => {}
                shaken = self.shaken.changed() => match shaken {
                    Ok(()) => failures = 0,
                    Err(_) => return,
                },
                changed = self.permit.changed() => if changed.is_err() {
                    return;
                },
            }
        }
    }

    /// A connection to the first host that gives one, and how it ended; or why none does.
    async fn attempt(&mut self, dialer: &mut Dialer) -> Result<End, String> {
        let permit = *self.permit.borrow_and_update();
        self.shaken.borrow_and_update();
        let mut whys: Vec<String> = Vec::new();
        for host in &self.region.hosts {
            // A packet that is said again ever later would come late on links that are new.
            let mut shaken = self.shaken.clone();
            let connected = tokio::select! {
                connected = dialer.connect(host, permit) => connected,
                Ok(()) = shaken.changed() => return Err("the host's links changed".to_owned()),
            };
            match connected {
                Ok(connected) => {
                    let transport = connected.transport;
                    self.transport.send_replace(Some(transport));
                    tracing::info!(
                        region = %self.id, host = host.addr, ?transport, "connected to a relay"
                    );
                    self.outbox.clear_notes();
                    if self.home.load(Ordering::Relaxed) {
                        self.outbox.note(&Frame::NotePreferred(true));
                    }
                    if self.tell(RelayEvent::Up).await.is_err() {
                        return Ok(End::Stopped);
                    }
                    return Ok(stream::carry(connected, self).await);
                }
                Err(error) => whys.push(error.to_string()),
            }
        }
        Err(whys.join("; "))
    }

    async fn tell(&self, event: RelayEvent) -> Result<(), Gone> {
        let event = (self.id, Event::Said(event));
        self.config.events.send(event).await.map_err(|_| Gone)
    }

    /// Tells what may be lost when the daemon is behind.
    fn mention(&self, event: Event) {
        let _ = self.config.events.try_send((self.id, event));
    }
}

/// The pause after so many failures in a row, spread so that a relay's clients do not all come back
/// at once.
fn pause(failures: u32) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures.min(16)));
    let longest = doubled.min(LONGEST_PAUSE);
    let mut byte = [0];
    // Without random bytes it is the longest.
    let share = getrandom::fill(&mut byte).map_or(u8::MAX, |()| byte[0]);
    longest / 2 + (longest / 2).mul_f64(f64::from(share) / f64::from(u8::MAX))
}
