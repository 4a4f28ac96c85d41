//! [`Tap`]: the engine, and a record of all that it is told.
//!
//! Nothing reaches the engine but through here, so what is written down is all of it, in order, with
//! the very times that it got ([`engine::trace`]). It is kept from the engine's start on for as long
//! as it is short ([`KEPT_BYTES`]: about a day of a small network): trouble is recorded best before
//! anybody knows of it. `weir debug record` gets what was kept, and all that comes, until it hangs up.
//!
//! A trace that lacks its beginning cannot be replayed. Where that is no longer kept the engine can
//! be made to begin anew: another one takes its place and is told what still holds (settings, netmap,
//! links, connections), as after a restart of the agent; the kernel is left as it is meanwhile.

use super::{Daemon, refused, send};
use crate::local::{RefusedCode, Response};
use engine::trace::{Line, Recorder, Start};
use engine::{Engine, Input, Links, Output, RelayEvent, RelayTable};
use proto::id::RegionId;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::time::Instant;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;

/// Most that is kept of a trace that nobody asked for, in bytes.
pub(super) const KEPT_BYTES: usize = 4 << 20;
/// Most that waits for whoever records, in bytes; then the recording ends.
const LAG_BYTES: usize = 16 << 20;

/// The engine, which is told things through here alone.
pub(super) struct Tap {
    engine: Engine,
    recorder: Recorder,
    sink: Sink,
    standing: Standing,
    /// What stood when this engine took another's place, and is told when it asks for it.
    again: BTreeMap<RegionId, Vec<RelayEvent>>,
}

/// Where lines go.
#[derive(Default)]
struct Sink {
    /// Since the engine's start; `None` if that was too much.
    kept: Option<String>,
    follower: Option<Follower>,
}

/// Whoever records.
struct Follower {
    lines: mpsc::Sender<Response>,
    waiting: String,
}

/// What another engine is to be told before all else, besides settings and netmap.
#[derive(Clone, Default)]
struct Standing {
    up: Option<bool>,
    links: Option<Links>,
    mapped: Option<SocketAddr>,
    relays: BTreeMap<RegionId, Vec<RelayEvent>>,
}

impl Tap {
    /// An engine that starts so at `now`, and nothing recorded.
    pub(super) fn new(start: &Start, now: Instant) -> Self {
        let mut sink = Sink {
            kept: Some(String::new()),
            follower: None,
        };
        sink.take(&Line::Start(Cow::Borrowed(start)));
        Self {
            engine: start.engine(),
            recorder: Recorder::new(now),
            sink,
            standing: Standing::default(),
            again: BTreeMap::new(),
        }
    }

    /// See [`Engine::handle`].
    pub(super) fn handle(&mut self, now: Instant, input: Input) {
        self.standing.note(&input);
        let Self {
            engine,
            recorder,
            sink,
            ..
        } = self;
        if sink.is_open() {
            recorder.input(now, engine, &input, |line| sink.take(&line));
        }
        engine.handle(now, input);
    }

    /// See [`Engine::poll`].
    pub(super) fn poll(&mut self, now: Instant) -> Output {
        let output = self.engine.poll(now);
        let sink = &mut self.sink;
        if sink.is_open() {
            self.recorder.output(now, &output, |line| sink.take(&line));
            sink.flush();
        }
        output
    }

    /// Connections that stood when the engine began anew, and that it now asks for.
    pub(super) fn stood(&mut self, table: &RelayTable) -> Vec<Input> {
        let mut inputs = Vec::new();
        for region in table.regions.keys() {
            let events = self.again.remove(region).unwrap_or_default();
            inputs.extend(events.into_iter().map(|event| Input::Relay(*region, event)));
        }
        inputs
    }
}

impl Deref for Tap {
    type Target = Engine;

    /// To be looked at.
    fn deref(&self) -> &Engine {
        &self.engine
    }
}

impl Sink {
    fn is_open(&self) -> bool {
        self.kept.is_some() || self.follower.is_some()
    }

    fn take(&mut self, line: &Line<'_>) {
        let Ok(mut text) = serde_json::to_string(line) else {
            // Every input has a form in JSON; one without would be a hole in the trace.
            *self = Self::default();
            return;
        };
        text.push('\n');
        if let Some(follower) = &mut self.follower {
            follower.waiting.push_str(&text);
        }
        if let Some(kept) = &mut self.kept {
            if kept.len() + text.len() <= KEPT_BYTES {
                kept.push_str(&text);
            } else {
                self.kept = None;
            }
        }
    }

    /// Hands on what waits, if it can be taken.
    fn flush(&mut self) {
        let Some(follower) = &mut self.follower else {
            return;
        };
        let gone = match follower.lines.try_reserve() {
            Ok(place) => {
                if !follower.waiting.is_empty() {
                    place.send(Response::Trace(std::mem::take(&mut follower.waiting)));
                }
                false
            }
            Err(TrySendError::Full(())) => follower.waiting.len() > LAG_BYTES,
            Err(TrySendError::Closed(())) => true,
        };
        if gone {
            self.follower = None;
        }
    }
}

impl Standing {
    fn note(&mut self, input: &Input) {
        match input {
            Input::Up(up) => self.up = Some(*up),
            Input::Links(links) => self.links = Some(links.clone()),
            Input::PortMapped(addr) => self.mapped = *addr,
            Input::Relay(region, event) => {
                let known = self.relays.entry(*region).or_default();
                match event {
                    RelayEvent::Up => *known = vec![event.clone()],
                    RelayEvent::Down(_) => known.clear(),
                    RelayEvent::Latency(_) if !known.is_empty() => {
                        known.truncate(1);
                        known.push(event.clone());
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

impl Daemon {
    /// Gives a trace from the engine's start on, and what is added to it.
    pub(super) fn record(
        &mut self,
        anew: bool,
        lines: Option<mpsc::Sender<Response>>,
        reply: oneshot::Sender<Response>,
    ) {
        let Some(lines) = lines else {
            let message = "a stream was asked for where none can be sent";
            return send(reply, refused(RefusedCode::BadRequest, message, ""));
        };
        let follower = self.engine.sink.follower.as_ref();
        if follower.is_some_and(|it| !it.lines.is_closed()) {
            let message = "somebody records already";
            let next = "Wait until that ends.";
            return send(reply, refused(RefusedCode::Unavailable, message, next));
        }
        if anew && let Err(error) = self.begin_anew() {
            let message = super::chain(&error);
            return send(reply, refused(RefusedCode::Failed, &message, ""));
        }
        let Some(kept) = self.engine.sink.kept.clone() else {
            let message = "the beginning of the trace is no longer kept, and without it nothing can \
                           be replayed";
            let next = "`weir debug record --anew` lets the agent decide everything anew, as after a \
                        restart, and records that; packets go on meanwhile.";
            return send(reply, refused(RefusedCode::Unavailable, message, next));
        };
        self.engine.sink.follower = Some(Follower {
            lines,
            waiting: String::new(),
        });
        send(reply, Response::Trace(kept));
    }

    /// Another engine takes the place of this one.
    fn begin_anew(&mut self) -> Result<(), super::DaemonError> {
        let now = Instant::now();
        let netmap = self.engine.status().netmap.cloned();
        let standing = self.engine.standing.clone();
        let identity = std::sync::Arc::clone(&self.identity.borrow());
        self.engine = super::new_engine(&self.config, &identity, self.relayed.shim_port())?;
        self.engine.again = standing.relays;
        tracing::info!("the agent decides everything anew, to be recorded");
        let settings = &self.settings;
        let mut inputs = vec![
            Input::ShieldsUp(settings.shields_up),
            Input::Advertise(settings.routes.clone()),
        ];
        inputs.extend(netmap.map(|netmap| Input::Cached(Box::new(netmap))));
        inputs.extend(standing.up.map(Input::Up));
        inputs.extend(standing.links.map(Input::Links));
        inputs.push(Input::PortMapped(standing.mapped));
        let coordinator = self.link.coordinator.as_ref();
        inputs.extend(coordinator.into_iter().flat_map(|it| self.needed(it)));
        for input in inputs {
            self.engine.handle(now, input);
        }
        Ok(())
    }
}
