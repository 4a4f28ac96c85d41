//! Discovery, relays and permits: what the engine wants of them, and what comes of it.

use super::{Daemon, QUEUE, chain};
use crate::config::Config;
use crate::control::{self, Command};
use crate::identity::Identity;
use crate::local::report::Problem;
use crate::port;
use crate::relay::{self, Outboxes, Relays, Transport};
use crate::shim::Shim;
use engine::relays::RelayTable;
use engine::{Input, LinkAddr, Links, RelayEvent, Via};
use proto::disco::Message;
use proto::id::RegionId;
use proto::key::DiscoKey;
use proto::permit::{Permit, VALIDITY};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// A network that has no relays for us may have some later.
const NO_PERMIT_PAUSE: Duration = Duration::from_secs(600);

/// Where words for the port go, or why nothing can be sent from it.
pub(super) type Port = Result<mpsc::Sender<port::Word>, String>;

/// Relayed paths.
pub(super) struct Relayed {
    relays: Relays,
    shim: Result<Arc<Shim>, String>,
    outboxes: Outboxes,
    events: mpsc::Sender<(RegionId, relay::Event)>,
    detour: relay::Detour,
    permit: Option<Permit>,
    /// The coordinator was asked for a permit and has not answered.
    asked: bool,
    /// It is not asked again before this.
    ask_after: Option<Instant>,
    /// Where this host can be reached, as far as connections depend on it.
    ground: Option<(BTreeSet<LinkAddr>, Option<Ipv4Addr>)>,
}

/// Opens the sockets beside WireGuard's, or says why not.
pub(super) fn share_port(config: &Config) -> (Port, mpsc::Receiver<port::Event>) {
    let (events, seen) = mpsc::channel(QUEUE);
    let port = port::spawn(config.listen_port, events).map_err(|error| chain(&error));
    (port, seen)
}

impl Relayed {
    /// No connections yet, and a shim that carries nothing.
    pub(super) fn new(
        config: &Config,
        identity: &Arc<Identity>,
        detour: relay::Detour,
        events: mpsc::Sender<(RegionId, relay::Event)>,
    ) -> Self {
        let outboxes = Outboxes::default();
        let shim = Shim::open(config.listen_port).map_err(|error| chain(&error));
        if let Ok(shim) = &shim {
            let outboxes = outboxes.clone();
            let forward: crate::shim::Forward =
                Arc::new(move |region, packets| outboxes.push(region, packets));
            tokio::spawn(Arc::clone(shim).run(forward));
        }
        let relays = connections(identity, &shim, &outboxes, &detour, &events);
        Self {
            relays,
            shim,
            outboxes,
            events,
            detour,
            permit: None,
            asked: false,
            ask_after: None,
            ground: None,
        }
    }

    /// The node is somebody else from now on.
    pub(super) fn change_identity(&mut self, identity: &Arc<Identity>) {
        let Self {
            shim,
            outboxes,
            detour,
            events,
            ..
        } = &*self;
        self.relays = connections(identity, shim, outboxes, detour, events);
        self.hold(None);
    }

    /// The port of relayed peers' addresses on `lo`; 0 if none can be relayed.
    pub(super) fn shim_port(&self) -> u16 {
        self.shim.as_ref().map_or(0, |shim| shim.port())
    }

    /// Shows this permit from now on.
    pub(super) fn hold(&mut self, permit: Option<Permit>) {
        self.permit = permit;
        self.asked = false;
        self.ask_after = None;
        self.relays.set_permit(permit);
    }

    /// Whoever was asked for a permit will not answer.
    pub(super) fn unasked(&mut self) {
        self.asked = false;
    }

    /// The host's links may have changed. Returns whether connections may have broken, or may be
    /// possible again.
    pub(super) fn see(&mut self, links: &Links) -> bool {
        let ground = Some((links.addrs.clone(), links.gateway));
        let shaken = self.ground != ground;
        if shaken {
            self.ground = ground;
            self.shaken();
        }
        shaken
    }

    /// Connections may have broken without a word.
    pub(super) fn shaken(&self) {
        self.relays.shaken();
    }

    /// What the connection to a region goes through, while it stands.
    pub(super) fn transport(&self, region: RegionId) -> Option<Transport> {
        self.relays.transport(region)
    }

    fn set(&mut self, table: &RelayTable) {
        if let Ok(shim) = &self.shim {
            shim.set(table);
            self.relays.set(table.home, &table.regions);
        }
    }

    /// When a permit is to be asked for; `None` while there is nothing to wait for.
    fn permit_due(&self, now: Instant) -> Option<Instant> {
        if self.asked {
            return None;
        }
        let due = match &self.permit {
            None => now,
            Some(permit) => {
                let left = Duration::from_secs(permit.expires.saturating_sub(unix_time()));
                now + left.saturating_sub(VALIDITY / 2)
            }
        };
        Some(self.ask_after.map_or(due, |after| due.max(after)))
    }
}

fn connections(
    identity: &Arc<Identity>,
    shim: &Result<Arc<Shim>, String>,
    outboxes: &Outboxes,
    detour: &relay::Detour,
    events: &mpsc::Sender<(RegionId, relay::Event)>,
) -> Relays {
    let (lent, shim) = (Arc::clone(identity), shim.clone());
    if let Ok(shim) = &shim {
        shim.set_identity(identity.node_key());
    }
    let config = relay::Config {
        me: identity.node_key(),
        login: Arc::new(move |relay| lent.relay_login(relay)),
        pinned: Arc::new(control::tls_to),
        detour: Arc::clone(detour),
        deliver: Arc::new(move |packets| match &shim {
            Ok(shim) => shim.inject(packets),
            Err(_) => Vec::new(),
        }),
        events: events.clone(),
    };
    Relays::new(config, outboxes.clone())
}

fn unix_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

impl Daemon {
    /// Something came to WireGuard's port that is not WireGuard's.
    pub(super) fn seen(&mut self, event: port::Event) {
        let input = match event {
            port::Event::Answer(port::Answer { server, mapped }) => Some(Input::Mapped {
                server,
                addr: mapped,
            }),
            port::Event::Disco { from, bytes } => {
                self.open(&bytes).map(|(sender, message)| Input::Disco {
                    from,
                    sender,
                    message,
                })
            }
        };
        if let Some(input) = input {
            self.engine.handle(Instant::now(), input);
        }
    }

    /// Something happened at the connection to a region's relay.
    pub(super) fn told_by(&mut self, region: RegionId, event: relay::Event) {
        let event = match event {
            relay::Event::Said(event) => Some(event),
            relay::Event::Disco { from, bytes } => {
                self.open(&bytes)
                    .map(|(sender, message)| RelayEvent::Disco {
                        from,
                        sender,
                        message,
                    })
            }
        };
        if let Some(event) = event {
            let input = Input::Relay(region, event);
            self.engine.handle(Instant::now(), input);
        }
    }

    /// What a discovery packet says, and who says it, if that is a peer.
    fn open(&mut self, packet: &[u8]) -> Option<(DiscoKey, Message)> {
        let engine = &self.engine;
        let knows = |sender: &DiscoKey| engine.knows(sender);
        self.seals.open(Instant::now(), packet, knows)
    }

    /// Seals a message of discovery and sends it. What cannot be sent now is as good as lost on its
    /// way.
    pub(super) fn transmit(&mut self, via: Via, to: DiscoKey, message: &Message) {
        let Some(bytes) = self.seals.seal(to, message) else {
            return;
        };
        match via {
            Via::Direct(to) => {
                if let Ok(port) = &self.port {
                    let _ = port.try_send(port::Word::Send { to, bytes });
                }
            }
            Via::Relay(region, to) => self.relayed.relays.send(region, to, bytes),
        }
    }

    /// Relayed packets go by these rules from now on.
    pub(super) fn set_relays(&mut self, table: &RelayTable) {
        self.relayed.set(table);
    }

    /// Asks for a permit if it is time; returns when to think of it again.
    pub(super) fn keep_permitted(&mut self, now: Instant) -> Option<Instant> {
        let engine = self.engine.status();
        let network = engine.netmap.map(|netmap| &netmap.network);
        let has_relays = network.is_some_and(|network| !network.relays.is_empty());
        if !has_relays || !self.settings.up || !self.link.is_open() {
            return None;
        }
        let due = self.relayed.permit_due(now)?;
        if due > now {
            return Some(due);
        }
        self.relayed.asked = true;
        self.link.send(Command::Permit);
        None
    }

    /// The coordinator gave a permit, or has none for us.
    pub(super) fn permitted(&mut self, permit: Option<Permit>) {
        let Some(permit) = permit else {
            self.relayed.asked = false;
            self.relayed.ask_after = Some(Instant::now() + NO_PERMIT_PAUSE);
            return;
        };
        self.relayed.hold(Some(permit));
        self.keep_permit();
    }

    /// Writes the permit that is shown.
    pub(super) fn keep_permit(&mut self) {
        let kept = self.relayed.permit.map(|it| self.state.keep_permit(&it));
        self.note("permit_not_kept", kept.and_then(Result::err));
    }

    /// Takes up the permit of an earlier run.
    pub(super) fn recall_permit(&mut self) {
        // A damaged one is as good as none: it is asked for again.
        let permit = self.state.permit().value;
        let me = self.identity.borrow().node_key();
        let permit = permit.filter(|permit| permit.node == me);
        self.relayed.hold(permit);
    }

    /// The permit is another network's.
    pub(super) fn forget_permit(&mut self) {
        self.relayed.hold(None);
        let forgotten = self.state.forget_permit();
        self.note("permit_not_forgotten", forgotten.err());
    }

    /// What is wrong with the proxy that was named.
    pub(super) fn proxy_problem(&self) -> Option<Problem> {
        self.proxy.problem().map(|why| Problem {
            code: "proxy_not_used".to_owned(),
            message: format!(
                "{why}: it is not used, and of coordinator and relays only those in NO_PROXY are \
                 reached"
            ),
            next: why.next().to_owned(),
        })
    }

    /// What is wrong with carrying relayed packets, where the network has relays.
    pub(super) fn relay_problem(&self) -> Option<Problem> {
        let why = self.relayed.shim.as_ref().err()?;
        let engine = self.engine.status();
        let relays = &engine.netmap?.network.relays;
        (!relays.is_empty()).then(|| Problem {
            code: "relays_not_used".to_owned(),
            message: format!("packets cannot be carried to and from relays: {why}"),
            next: "The agent needs CAP_NET_RAW for that: run it as the unit does.".to_owned(),
        })
    }
}
