//! The guard before WireGuard's port: where it is to stand, and what became of that.
//!
//! It stands on the interfaces that have an address which others may reach, or a default route, for
//! as long as this node is to be up and nobody switched it off. The kernel's thread is told whenever
//! the host's links change, and makes it so, whatever was there; one word at a time. Nothing waits
//! for it but `weir down` and `weir set`.

use super::answer::failed;
use super::{Daemon, chain, send};
use crate::kernel::Job;
use crate::kernel::bpf::guard::{Outcome, Report};
use crate::kernel::underlay::Guarding;
use crate::local::Response;
use crate::local::report::{Counters, GuardCount, Guarded, Problem, Verdict};
use engine::{Input, Links};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// When it is tried again where it could not be attached.
const AGAIN: Duration = Duration::from_secs(30);

/// What the loop knows of the guard.
#[derive(Default)]
pub(super) struct Guard {
    /// Interfaces of the underlay and the host's addresses; `None` until the host was read.
    underlay: Option<(BTreeSet<String>, BTreeSet<IpAddr>)>,
    /// What the kernel's thread was told last; `None` until it was told anything.
    told: Option<Option<Guarding>>,
    /// Whether it has to be told again: interfaces of the same names may be others.
    stale: bool,
    /// What it will say to that.
    answer: Option<oneshot::Receiver<Result<Report, String>>>,
    report: Report,
    /// Why it could not do it.
    trouble: Option<String>,
    /// When it is told again because it could not do it.
    again: Option<Instant>,
}

impl Guard {
    /// One that leaves alone what there is, until somebody says what is to be.
    pub(super) fn idle() -> Self {
        Self {
            told: Some(None),
            ..Self::default()
        }
    }

    /// Takes the host's links in.
    pub(super) fn see(&mut self, links: &Links) {
        let addrs = links.addrs.iter();
        let defaults = links.routes.iter().filter(|route| {
            // Routes that lead nowhere have no interface.
            route.prefix.len() == 0 && !route.interface.is_empty()
        });
        let interfaces = addrs.clone().map(|addr| addr.interface.clone());
        let interfaces = interfaces.chain(defaults.map(|route| route.interface.clone()));
        self.underlay = Some((interfaces.collect(), addrs.map(|addr| addr.addr).collect()));
        self.stale = true;
    }

    /// Where it stands.
    pub(super) fn places(&self) -> Vec<Guarded> {
        let places = self.report.on.iter().map(|(interface, hook)| Guarded {
            interface: interface.clone(),
            hook: hook.name().to_owned(),
        });
        places.collect()
    }

    /// Why it does not stand where it should.
    pub(super) fn problem(&self) -> Option<Problem> {
        let places = self.report.failed.iter();
        let mut whys = places.map(|(interface, why)| format!("{interface}: {why}"));
        let why = self.trouble.clone().or_else(|| whys.next())?;
        Some(Problem {
            code: "guard_not_attached".to_owned(),
            message: format!("floods to WireGuard's port are not held off: {why}"),
            next: "Nothing is open that was not: policy is enforced all the same. If this host \
                   cannot have it, `weir set --guard=off` ends this remark."
                .to_owned(),
        })
    }
}

impl Daemon {
    fn guarding(&self) -> Option<Guarding> {
        let (interfaces, own) = self.guard.underlay.clone()?;
        let settings = &self.settings;
        (settings.up && !settings.unguarded).then_some(Guarding {
            port: self.config.listen_port,
            xdp: !settings.no_xdp,
            interfaces,
            own,
        })
    }

    /// Tells the kernel's thread what is wanted, if it does not know or could not do it; returns
    /// when to think of that again.
    pub(super) fn keep_guard(&mut self, now: Instant) -> Option<Instant> {
        if let Some(answer) = &mut self.guard.answer {
            let result = match answer.try_recv() {
                Ok(result) => result,
                Err(oneshot::error::TryRecvError::Empty) => return None,
                Err(oneshot::error::TryRecvError::Closed) => {
                    Err("the kernel's thread has ended: restart the agent".to_owned())
                }
            };
            self.guard.answer = None;
            (self.guard.report, self.guard.trouble) = match result {
                Ok(report) => (report, None),
                Err(error) => (Report::default(), Some(error)),
            };
            self.guard.again = self.guard.problem().map(|_| now + AGAIN);
        }
        self.guard.stale |= self.guard.again.is_some_and(|at| now >= at);
        let wanted = self.guarding();
        let unread = self.guard.underlay.is_none() && self.settings.up;
        let known = self.guard.told.as_ref() == Some(&wanted);
        if unread || known && !(self.guard.stale && wanted.is_some()) {
            return self.guard.again.filter(|at| *at > now);
        }
        self.guard.stale = false;
        self.guard.again = None;
        self.guard.told = Some(wanted.clone());
        let (tell, told) = oneshot::channel();
        self.guard.answer = Some(told);
        let (jobs, inputs) = (self.jobs.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let (reply, done) = oneshot::channel();
            let sent = jobs.send(Job::Guard(wanted, reply)).await.is_ok();
            let result = match done.await {
                Ok(result) if sent => result.map_err(|error| chain(&error)),
                Ok(_) | Err(_) => Err("the kernel's thread has ended".to_owned()),
            };
            // The loop may have ended. If not, it is woken to look.
            let _ = tell.send(result);
            let _ = inputs.send(Input::Timeout).await;
        });
        None
    }

    /// Whether the guard stands as it is to stand, or cannot.
    pub(super) fn guard_is_settled(&self) -> bool {
        let unread = self.guard.underlay.is_none() && self.settings.up;
        unread || self.guard.answer.is_none() && self.guard.told.as_ref() == Some(&self.guarding())
    }
}

/// Answers with these counters and the guard's.
pub(super) fn answer_with_counts(
    jobs: mpsc::Sender<Job>,
    mut counters: Counters,
    reply: oneshot::Sender<Response>,
) {
    tokio::spawn(async move {
        let (tell, told) = oneshot::channel();
        let sent = jobs.send(Job::CountGuarded(tell)).await.is_ok();
        let counts = match told.await {
            Ok(counts) if sent => counts,
            Ok(_) | Err(_) => Ok(Vec::new()),
        };
        let response = match counts {
            Ok(counts) => {
                counters.guard = counts.into_iter().map(counted).collect();
                Response::Counters(counters)
            }
            Err(error) => failed(&error),
        };
        send(reply, response);
    });
}

fn counted((outcome, packets): (Outcome, u64)) -> GuardCount {
    GuardCount {
        verdict: if outcome.passes() {
            Verdict::Accept
        } else {
            Verdict::Deny
        },
        outcome: outcome.name().to_owned(),
        packets,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::LinkAddr;
    use engine::plan::LiveRoute;

    #[test]
    fn it_stands_where_addresses_and_default_routes_are() {
        let mut links = Links::default();
        for (interface, addr) in [("eth0", "192.0.2.1"), ("eth0", "2001:db8::1")] {
            links.addrs.insert(LinkAddr {
                interface: interface.to_owned(),
                addr: addr.parse().unwrap(),
                prefix_len: 24,
            });
        }
        for (prefix, interface) in [("0.0.0.0/0", "ppp0"), ("10.0.0.0/8", "lan0"), ("::/0", "")] {
            links.routes.insert(LiveRoute {
                prefix: prefix.parse().unwrap(),
                interface: interface.to_owned(),
            });
        }
        let mut guard = Guard::idle();
        guard.see(&links);
        let (interfaces, own) = guard.underlay.unwrap();
        assert_eq!(interfaces, ["eth0", "ppp0"].map(str::to_owned).into());
        let addrs = ["192.0.2.1", "2001:db8::1"].map(|addr| addr.parse().unwrap());
        assert_eq!(own, addrs.into());
    }

    #[test]
    fn what_it_cannot_do_is_a_remark_that_says_how_to_end_it() {
        let mut guard = Guard::idle();
        assert!(guard.problem().is_none());
        let failed = ("eth0".to_owned(), "no room".to_owned());
        guard.report.failed.extend([failed]);
        let problem = guard.problem().unwrap();
        assert_eq!(problem.code, "guard_not_attached");
        assert!(problem.message.ends_with("eth0: no room"), "{problem:?}");
        assert!(problem.next.contains("--guard=off"), "{problem:?}");
    }
}
