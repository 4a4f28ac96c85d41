//! The engine and the kernel: when it is read, what it is told, and what comes of that.
//!
//! One look or one plan is under way at a time. A plan is made from what was last seen and from what
//! was done since; after a failure, and once a tick, the kernel is looked at again.

use super::{CLOSE_TICK, Engine, FIRST_LOOK, FIRST_LOOKS, TICK, held, longer};
use crate::Output;
use crate::plan::{MAX_GREETED, Observed, RouteMtu, Step, Wanted, diff};
use crate::status::{Failure, Problem};
use proto::key::NodeKey;
use proto::net::Prefix;
use std::collections::BTreeMap;
use std::time::Instant;

impl Engine {
    /// What the kernel is to be asked or told now.
    pub(super) fn poll_kernel(&mut self, now: Instant) -> Option<Output> {
        let resting = self.retry_at.is_some_and(|at| now < at);
        let busy = self.in_flight.is_some() || self.observing;
        if self.up.is_none() || resting || busy {
            return None;
        }
        if self.observed.is_none() || self.observe_at.is_some_and(|at| now >= at) {
            self.observing = true;
            return Some(Output::Observe);
        }
        self.dirty |= self.held.is_due(now);
        let steps = self.plan(now)?;
        self.in_flight = Some(steps.clone());
        // A table of relays that this plan counts on goes first.
        self.outbox.push_back(Output::Apply(steps));
        self.outbox.pop_front()
    }

    /// The kernel is to be looked at now, whatever failed before.
    pub(super) fn hurry(&mut self) {
        self.held.release();
        self.retry_at = None;
        self.failures = 0;
        self.dirty = true;
    }

    pub(super) fn pause(&mut self, now: Instant) {
        self.retry_at = Some(now + held::pause(self.failures));
        self.failures = self.failures.saturating_add(1);
    }

    pub(super) fn handle_observed(&mut self, now: Instant, observed: Observed) {
        if self.in_flight.is_some() {
            return;
        }
        self.observing = false;
        if matches!(self.failed, Some(Problem::Unreadable(_))) {
            self.failed = None;
        }
        let peers = observed.present().map(|present| &present.peers);
        if let Some(peers) = peers {
            self.paths.observe(now, peers);
        }
        let count = peers.map_or(0, BTreeMap::len);
        self.looks = self.looks.saturating_sub(1);
        let tick = match self.looks {
            1.. => FIRST_LOOK,
            0 if self.paths.are_watched(now) => CLOSE_TICK,
            0 => TICK,
        };
        self.observe_at = Some(now + longer(tick, count));
        self.observed = Some(observed);
        self.dirty = true;
    }

    pub(super) fn handle_applied(&mut self, now: Instant) {
        let Some(steps) = self.in_flight.take() else {
            return;
        };
        self.took(now, &steps);
        self.failed = None;
        self.failures = 0;
        self.dirty = true;
    }

    /// The kernel has these steps behind it.
    fn took(&mut self, now: Instant, steps: &[Step]) {
        self.held.done(steps);
        if let Some(observed) = &mut self.observed {
            for step in steps {
                observed.apply(step);
            }
        }
        if steps.iter().any(|it| matches!(it, Step::SetPeers(_))) {
            let peers = self.observed.as_ref().and_then(Observed::present);
            if let Some(present) = peers {
                self.paths.made(now, &present.peers);
            }
        }
        if steps
            .iter()
            .any(|it| matches!(it, Step::Greet(_) | Step::SetPeers(_)))
        {
            self.look_soon(now);
        }
    }

    /// What a plan began, and what a peer's first packets by relay begin, is a session in a moment.
    pub(super) fn look_soon(&mut self, now: Instant) {
        let present = self.observed.as_ref().and_then(Observed::present);
        let soon = now + longer(FIRST_LOOK, present.map_or(0, |present| present.peers.len()));
        self.observe_at = self.observe_at.map(|at| at.min(soon));
        self.looks = FIRST_LOOKS;
    }

    pub(super) fn handle_failed(&mut self, now: Instant, failure: Failure) {
        let steps = self.in_flight.take().unwrap_or_default();
        let (done, left) = steps.split_at(failure.done.min(steps.len()));
        self.took(now, done);
        self.owe_again(left);
        let name = left.first().map(ToString::to_string);
        let name = name.unwrap_or_else(|| "carry out a plan".to_owned());
        let detail = failure.detail;
        let problem = Problem::Step {
            step: name.clone(),
            kind: failure.kind,
            detail: detail.clone(),
        };
        let step = left.first().cloned();
        let news = step.map(|step| self.held.hold(now, step, problem.clone()));
        match news.flatten() {
            Some(false) => tracing::debug!(step = name, detail, "step failed again"),
            Some(true) => tracing::warn!(step = name, detail, "step failed"),
            None => {
                tracing::warn!(step = name, detail, "step failed");
                self.failed = Some(problem);
                self.pause(now);
            }
        }
        self.observe_at = Some(now);
    }

    /// The steps to take, if there are any.
    fn plan(&mut self, now: Instant) -> Option<Vec<Step>> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        self.put_in_force(now);
        self.refresh_routing();
        let desired = self.desired()?;
        let mut wanted = self.renew();
        wanted.extend(diff(&desired, self.observed.as_ref()?));
        wanted.extend(desired.as_ref().and_then(|wanted| self.greet(wanted)));
        let (steps, held) = self.held.admit(now, wanted);
        if steps.contains(&Step::SetUp(true)) {
            self.paths.owe_greetings();
        }
        self.owe_again(&held);
        (!steps.is_empty()).then_some(steps)
    }

    /// What stays routed while this host uses the network's own prefix. A device that is down stays
    /// down then. One that is up serves on, or nothing could be withdrawn from anybody any more.
    pub(super) fn routes_left(&self) -> Option<BTreeMap<Prefix, RouteMtu>> {
        let present = self.observed.as_ref().and_then(Observed::present);
        let device = present.filter(|device| device.up)?;
        let overlaps = &self.routing.overlaps;
        let refused = || overlaps.iter().filter(|overlap| overlap.node.is_none());
        let is_left = |prefix: &Prefix| refused().any(|it| it.prefix.covers(prefix));
        let left = device.routes.iter().filter(|(prefix, _)| is_left(prefix));
        let left = left.map(|(prefix, mtu)| (*prefix, *mtu));
        Some(
            self.routing
                .routes
                .clone()
                .into_iter()
                .chain(left)
                .collect(),
        )
    }

    /// Takes peers away that are to be made anew.
    fn renew(&mut self) -> Vec<Step> {
        let keys = self.paths.take_renewals();
        if keys.is_empty() {
            return Vec::new();
        }
        let step = Step::RemovePeers(keys);
        if let Some(observed) = &mut self.observed {
            observed.apply(&step);
        }
        vec![step]
    }

    /// Whom these steps were to greet is greeted by a later one.
    fn owe_again(&mut self, steps: &[Step]) {
        for step in steps {
            if let Step::Greet(peers) = step {
                self.paths.owe_again(peers.iter().map(|(key, _)| *key));
            }
        }
    }

    /// Greets whom there was no way to when the device came up, and whom a new path leads to.
    fn greet(&mut self, wanted: &Wanted) -> Option<Step> {
        let mut due = self.paths.take_greetings();
        due.truncate(MAX_GREETED);
        let keepalive = |key| Some((key, wanted.peers.get(&key)?.keepalive));
        let due: Vec<(NodeKey, u16)> = due.into_iter().filter_map(keepalive).collect();
        (!due.is_empty()).then_some(Step::Greet(due))
    }
}
