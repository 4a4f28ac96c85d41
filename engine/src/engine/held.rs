//! [`Held`]: steps that failed, each with the pause before it is tried again.
//!
//! Some steps fail for as long as a machine is as it is: a switch that this kernel does not have, a
//! route that it refuses. They must not keep the rest from being done, least of all a withdrawal. So
//! while such a step rests, plans are carried out without it. Routes and forwarding stand alone, and
//! only they themselves are left out; everything else is what the steps after it are built on (no
//! peer without programs), and there the plan ends.

use crate::plan::Step;
use crate::status::Problem;
use std::mem::discriminant;
use std::time::{Duration, Instant};

/// The pause after the first failure; doubled with each further one.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How many steps rest at once. With more of them something else is wrong, and all of them wait.
pub(super) const MAX_HELD: usize = 32;

/// The pause after so many failures before this one.
pub(super) fn pause(failures: u32) -> Duration {
    (FIRST_PAUSE * (1 << failures.min(8))).min(LONGEST_PAUSE)
}

/// Steps that failed and rest.
#[derive(Default)]
pub(super) struct Held(Vec<Rest>);

struct Rest {
    step: Step,
    problem: Problem,
    /// Failures before the last.
    failures: u32,
    /// `None`: it is to be tried at once.
    until: Option<Instant>,
}

impl Rest {
    fn is(&self, step: &Step) -> bool {
        match is_one_of_many(step) {
            true => self.step == *step,
            false => discriminant(&self.step) == discriminant(step),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }
}

/// Whether this step may fail where another of its kind does not.
fn is_one_of_many(step: &Step) -> bool {
    matches!(
        step,
        Step::AddRoute(..)
            | Step::ChangeRoute(..)
            | Step::RemoveRoute(_)
            | Step::Forward(_)
            | Step::RestoreForwarding(_)
    )
}

/// Whether no other step is built on this one.
fn stands_alone(step: &Step) -> bool {
    is_one_of_many(step) || matches!(step, Step::Greet(_))
}

impl Held {
    /// `step` failed. Whether that is news. `None` if there is no room: then nothing is held.
    pub(super) fn hold(&mut self, now: Instant, step: Step, problem: Problem) -> Option<bool> {
        if let Some(rest) = self.0.iter_mut().find(|rest| rest.is(&step)) {
            let news = rest.problem != problem;
            let failures = rest.failures.saturating_add(1);
            *rest = Rest {
                until: Some(now + pause(failures)),
                step,
                problem,
                failures,
            };
            return Some(news);
        }
        if self.0.len() >= MAX_HELD {
            return None;
        }
        self.0.push(Rest {
            until: Some(now + pause(0)),
            step,
            problem,
            failures: 0,
        });
        Some(true)
    }

    /// These were done.
    pub(super) fn done(&mut self, steps: &[Step]) {
        let is_done = |rest: &Rest| steps.iter().any(|step| rest.is(step));
        self.0.retain(|rest| !is_done(rest));
    }

    /// What of a plan can be done now, and what cannot. Whoever is not in it any more is forgotten.
    pub(super) fn admit(&mut self, now: Instant, steps: Vec<Step>) -> (Vec<Step>, Vec<Step>) {
        let is_wanted = |rest: &Rest| steps.iter().any(|step| rest.is(step));
        self.0.retain(is_wanted);
        if self.0.is_empty() {
            return (steps, Vec::new());
        }
        let mut end = None;
        let (held, admitted): (Vec<Step>, Vec<Step>) = steps.into_iter().partition(|step| {
            let rest = self.0.iter().find(|rest| rest.is(step));
            let until = rest.and_then(|rest| rest.until.filter(|until| now < *until));
            if !stands_alone(step) {
                end = end.or(until);
            }
            end.or(until).is_some()
        });
        // Who waits for another has nothing to be woken for before.
        if let Some(until) = end {
            let waits =
                |rest: &&mut Rest| rest.is_due(now) && held.iter().any(|step| rest.is(step));
            let waiting = self.0.iter_mut().filter(waits);
            waiting.for_each(|rest| rest.until = Some(until));
        }
        (admitted, held)
    }

    /// Whether one is to be tried again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.0.iter().any(|rest| rest.is_due(now))
    }

    /// All are to be tried at once.
    pub(super) fn release(&mut self) {
        self.0.iter_mut().for_each(|rest| rest.until = None);
    }

    /// When the next is to be tried again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.0.iter().filter_map(|rest| rest.until).min()
    }

    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter().map(|rest| &rest.problem)
    }
}
