//! Joining, coming up, and the conversation with the coordinator.

use super::{
    Daemon, DaemonError, Leaving, Logout, UP_PATIENCE, Waiter, chain, detour, refused, send,
};
use crate::control::{self, Command, ControlConfig, ControlError, Credentials, Event, Register};
use crate::local::{RefusedCode, Response, Up};
use crate::state::Coordinator;
use engine::Input;
use proto::control::{Refusal, RefusalCode, TokenSecret};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Commands that may wait for the conversation's task. More than a turn of the loop can produce.
const COMMANDS: usize = 64;
/// A node without a name takes this one.
const NAMELESS: &str = "node";

/// The task that talks with the coordinator, and how it goes.
pub(super) struct Link {
    events: mpsc::Sender<Event>,
    commands: Option<mpsc::Sender<Command>>,
    /// Whom it talks with.
    pub(super) coordinator: Option<Coordinator>,
    /// Whether the stream of netmaps is open.
    pub(super) connected: bool,
    /// Why it is not.
    pub(super) why: Option<String>,
    /// When the next attempt comes.
    pub(super) retry_at: Option<Instant>,
    /// What it refused for good.
    pub(super) refusal: Option<Refusal>,
    /// A registration is under way: with this coordinator, if it is not the present one's.
    joining: Option<Coordinator>,
    seed: [u8; 32],
}

impl Link {
    pub(super) fn new(events: mpsc::Sender<Event>) -> Result<Self, DaemonError> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|_| DaemonError::System {
            what: "random bytes",
        })?;
        Ok(Self {
            events,
            commands: None,
            coordinator: None,
            connected: false,
            why: None,
            retry_at: None,
            refusal: None,
            joining: None,
            seed,
        })
    }

    pub(super) fn is_open(&self) -> bool {
        self.commands.is_some()
    }

    /// Says something to the conversation, if there is one.
    pub(super) fn send(&mut self, command: Command) {
        let Some(commands) = &self.commands else {
            return;
        };
        // Never waits: the other side may be waiting for us.
        if commands.try_send(command).is_err() {
            tracing::error!("the conversation with the coordinator does not listen");
        }
    }

    /// Ends the conversation.
    pub(super) fn close(&mut self) {
        self.commands = None;
        self.coordinator = None;
        self.joining = None;
        self.refusal = None;
        self.broken(None, None);
    }

    fn broken(&mut self, why: Option<String>, retry_in: Option<Duration>) {
        self.connected = false;
        self.why = why;
        self.retry_at = retry_in.map(|pause| Instant::now() + pause);
    }
}

impl Daemon {
    /// Opens a conversation with a coordinator, in place of any other.
    pub(super) fn connect(&mut self, coordinator: &Coordinator) {
        if self.link.is_open() && self.link.coordinator.as_ref() == Some(coordinator) {
            return;
        }
        self.link.close();
        self.relayed.unasked();
        let identity = Arc::clone(&self.identity.borrow());
        let config = ControlConfig {
            address: coordinator.address.clone(),
            fingerprint: coordinator.fingerprint,
            detour: detour(&self.proxy),
            seed: self.link.seed,
        };
        let credentials = Credentials {
            node_key: identity.node_key(),
            certificate: identity.client_certificate(),
            prove: Arc::new(move |challenge, exporter| identity.prove(challenge, exporter)),
        };
        let (commands, queue) = mpsc::channel(COMMANDS);
        // Events of a conversation that was closed must not be taken for the new one's: each has
        // its own channel, and what passes on to the loop ends with it.
        let (own, mut mine) = mpsc::channel(1);
        let events = self.link.events.clone();
        let open = commands.downgrade();
        tokio::spawn(control::run(config, credentials, queue, own));
        tokio::spawn(async move {
            while let Some(event) = mine.recv().await {
                if open.upgrade().is_none() || events.send(event).await.is_err() {
                    return;
                }
            }
        });
        self.link.commands = Some(commands);
        self.link.coordinator = Some(coordinator.clone());
        for input in self.needed(coordinator) {
            self.engine.handle(Instant::now(), input);
        }
    }

    /// Whom the tunnel needs besides the relays.
    pub(super) fn needed(&self, coordinator: &Coordinator) -> Vec<Input> {
        let proxy = self.proxy.address();
        let proxy = proxy.map(|address| Input::Proxy(address.to_owned()));
        let coordinator = Input::Coordinator(coordinator.address.clone());
        proxy.into_iter().chain([coordinator]).collect()
    }

    /// Joins with a token, or comes up again as the node that this machine is.
    pub(super) fn up(&mut self, up: Up, reply: oneshot::Sender<Response>) {
        if self.leaving.is_some() {
            let message = "it is still going down";
            return send(
                reply,
                refused(RefusedCode::Unavailable, message, "Try again."),
            );
        }
        let Up {
            token,
            hostname,
            routes,
        } = up;
        let (coordinator, secret) = match token.map(|text| text.parse()) {
            Some(Err(error)) => {
                return send(
                    reply,
                    refused(RefusedCode::BadRequest, &error.to_string(), ""),
                );
            }
            Some(Ok(token)) => {
                let coordinator = Coordinator {
                    address: token.address,
                    fingerprint: token.fingerprint,
                };
                (coordinator, Some(token.secret))
            }
            None => match self.settings.coordinator.clone() {
                Some(coordinator) => (coordinator, None),
                None => {
                    return send(
                        reply,
                        refused(
                            RefusedCode::NotJoined,
                            "this machine is no node of any network yet",
                            "Join with a token: weir up --token-file FILE. \
                             `weir-coordinator token create` prints one.",
                        ),
                    );
                }
            },
        };
        if let Err(error) = self.identity.borrow().keep() {
            let next = "Make room or access for the state folder, then try again.";
            return send(reply, refused(RefusedCode::Failed, &chain(&error), next));
        }
        let renamed = hostname.is_some() || routes.is_some();
        if let Some(hostname) = hostname {
            self.settings.hostname = Some(hostname);
        }
        if let Some(routes) = routes {
            self.settings.routes = routes.clone();
            self.engine.handle(Instant::now(), Input::Advertise(routes));
        }
        self.come_up(&coordinator, secret, renamed);
        self.going_up.push_back(Waiter {
            reply,
            deadline: Instant::now() + UP_PATIENCE,
        });
    }

    fn come_up(&mut self, coordinator: &Coordinator, token: Option<TokenSecret>, renamed: bool) {
        let was_open = self.link.is_open();
        self.connect(coordinator);
        if token.is_some() || renamed {
            // With a token nothing is changed before the coordinator took it.
            let joins = token.is_some();
            self.link.joining = joins.then(|| coordinator.clone());
            let register = Register {
                token,
                hostname: self.hostname(),
                about: self.engine.about(),
            };
            self.link.send(Command::Register(Box::new(register)));
            if joins {
                return;
            }
        }
        self.settings.up = true;
        self.keep_settings();
        self.engine.handle(Instant::now(), Input::Up(true));
        if !was_open {
            let base = self.engine.status().netmap.map(|netmap| netmap.generation);
            self.link.send(Command::Poll { base });
            self.link.send(Command::Report(self.engine.about()));
        }
    }

    fn hostname(&self) -> String {
        let machine = || {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
            let name = name.trim();
            (!name.is_empty()).then(|| name.to_owned())
        };
        let given = self.settings.hostname.clone();
        given
            .or_else(machine)
            .unwrap_or_else(|| NAMELESS.to_owned())
    }

    /// What the coordinator said, or how the conversation goes.
    pub(super) fn handle_control(&mut self, event: Event) {
        match event {
            Event::Registered(registered) => self.registered(registered.network),
            Event::Connected => {
                self.link.connected = true;
                self.link.why = None;
                self.link.retry_at = None;
                self.link.refusal = None;
            }
            Event::Update(update) => self.engine.handle(Instant::now(), Input::Netmap(update)),
            Event::Permit(permit) => self.permitted(permit),
            Event::Refused(refusal) => self.refused(refusal),
            Event::LoggedOut => self.logged_out(Logout::Told),
            Event::Disconnected { why, retry_in } => {
                let stranger = matches!(why, ControlError::WrongCertificate { .. });
                let why = chain(&why);
                tracing::info!(why, "no connection to the coordinator");
                if matches!(
                    &self.leaving,
                    Some(Leaving {
                        logout: Some(_),
                        ..
                    })
                ) {
                    self.logged_out(Logout::Failed(why.clone()));
                }
                self.link.broken(Some(why.clone()), Some(retry_in));
                if stranger && self.link.joining.is_some() {
                    // Trying again would meet the same stranger.
                    self.turn_back(
                        &why,
                        "Compare the token's fingerprint with the one that `weir-coordinator serve` \
                         prints. If the coordinator was set up anew, ask for a new token.",
                    );
                }
            }
        }
    }

    fn registered(&mut self, network: proto::id::NetworkId) {
        let now = Instant::now();
        self.link.refusal = None;
        let Some(coordinator) = self.link.joining.take() else {
            return;
        };
        let known = self.engine.status().netmap.map(|netmap| netmap.network.id);
        let elsewhere = known.is_some_and(|known| known != network)
            || self
                .settings
                .coordinator
                .as_ref()
                .is_some_and(|before| before.fingerprint != coordinator.fingerprint);
        if elsewhere {
            self.engine.handle(now, Input::Forget);
            self.netmaps.send_replace(None);
            let forgotten = self.state.forget_netmap();
            self.note("netmap_not_forgotten", forgotten.err());
            self.forget_permit();
        }
        self.settings.coordinator = Some(coordinator);
        self.settings.up = true;
        self.keep_settings();
        self.engine.handle(now, Input::Up(true));
        let base = self.engine.status().netmap.map(|netmap| netmap.generation);
        self.link.send(Command::Poll { base });
    }

    fn refused(&mut self, refusal: Refusal) {
        if matches!(
            &self.leaving,
            Some(Leaving {
                logout: Some(_),
                ..
            })
        ) {
            return self.logged_out(Logout::Failed(refusal.message));
        }
        let next = match refusal.code {
            RefusalCode::Token | RefusalCode::UnknownNode => {
                "Ask for a new token (`weir-coordinator token create`) and join with it: \
                 weir up --token-file FILE."
            }
            RefusalCode::Version => "Upgrade the older of the two.",
            RefusalCode::BadRequest
            | RefusalCode::Proof
            | RefusalCode::KeyTaken
            | RefusalCode::Limit
            | RefusalCode::NoRelays
            | RefusalCode::Unavailable => "The coordinator's log says more.",
        };
        let message = refusal.message.clone();
        self.link.refusal = Some(refusal);
        self.turn_back(&message, next);
    }

    /// The coordinator did not take us: tells whoever waits, and goes back to the coordinator that
    /// we had, if any.
    fn turn_back(&mut self, message: &str, next: &str) {
        for waiter in self.going_up.drain(..) {
            send(
                waiter.reply,
                refused(RefusedCode::Coordinator, message, next),
            );
        }
        if self.link.joining.take().is_some() {
            match self
                .settings
                .coordinator
                .clone()
                .filter(|_| self.settings.up)
            {
                Some(before) if self.link.coordinator.as_ref() != Some(&before) => {
                    self.come_up(&before, None, false);
                }
                Some(_) => {}
                None => self.link.close(),
            }
        }
    }

    fn logged_out(&mut self, outcome: Logout) {
        if let Some(Leaving {
            logout: Some((_, state @ Logout::Waiting)),
            ..
        }) = &mut self.leaving
        {
            *state = outcome;
        }
    }
}
