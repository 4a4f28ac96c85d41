//! `weir set`: what the operator of this machine decides, whatever the coordinator says.
//!
//! A setting is written to the disk first and counts then: an agent that starts again, or a machine
//! that boots without its coordinator, has it in force from the first policy on. Nothing that comes
//! from the coordinator is ever written there.

use super::{Daemon, Waiter, chain, refused, send};
use crate::kernel::{Job, bpf::AclError};
use crate::local::report::{GuardMode, Refuse};
use crate::local::{RefusedCode, Response, Set};
use engine::Input;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long `set` waits for the kernel to hold what was set.
const SET_PATIENCE: Duration = Duration::from_secs(20);

/// When what could not be kept is written again.
const KEEP_AGAIN: Duration = Duration::from_secs(5);

/// How long at most where something is wrong already, which may be in its way or not.
const SET_PATIENCE_IN_TROUBLE: Duration = Duration::from_secs(3);

/// A client of `set` that waits.
pub(super) struct Setting {
    waiter: Waiter,
    /// What the kernel's thread will say to the switch of answers; `None` once it is switched.
    switched: Option<oneshot::Receiver<Result<(), String>>>,
}

impl Daemon {
    /// Writes again what the state folder did not take; returns when to think of it next.
    pub(super) fn keep_again(&mut self, now: Instant) -> Option<Instant> {
        let missing = |code| self.trouble.iter().any(|(other, _)| *other == code);
        let [settings, netmap, permit] =
            ["settings_not_kept", "netmap_not_kept", "permit_not_kept"].map(missing);
        if !(settings || netmap || permit) {
            self.keep_at = None;
            return None;
        }
        let at = *self.keep_at.get_or_insert(now + KEEP_AGAIN);
        if now < at {
            return Some(at);
        }
        self.keep_at = Some(now + KEEP_AGAIN);
        if settings {
            self.keep_settings();
        }
        if netmap {
            self.netmaps.send_modify(|_| {});
        }
        if permit {
            self.keep_permit();
        }
        self.keep_at
    }

    /// Keeps settings and puts them in force.
    pub(super) fn set(&mut self, set: Set, reply: oneshot::Sender<Response>) {
        let mut settings = self.settings.clone();
        if let Some(up) = set.shields_up {
            settings.shields_up = up;
        }
        if let Some(refuse) = set.refuse {
            settings.silent = refuse == Refuse::Drop;
        }
        if let Some(guard) = set.guard {
            settings.unguarded = guard == GuardMode::Off;
            settings.no_xdp = guard == GuardMode::Tc;
        }
        if let Some(on) = set.port_mapping {
            settings.unmapped = !on;
        }
        if let Err(error) = self.state.keep_settings(&settings) {
            let next = "Nothing has changed. Make room or access for the state folder, then try \
                        again.";
            return send(reply, refused(RefusedCode::Failed, &chain(&error), next));
        }
        self.note("settings_damaged", None);
        self.note("settings_not_kept", None);
        self.settings = settings;
        self.ask_router();
        let now = Instant::now();
        self.engine
            .handle(now, Input::ShieldsUp(self.settings.shields_up));
        let switched = Some(self.switch_answers());
        self.setting.push_back(Setting {
            waiter: Waiter {
                reply,
                deadline: now + SET_PATIENCE,
            },
            switched,
        });
    }

    /// Names the router that is asked for a port, if one is to be.
    pub(super) fn ask_router(&self) {
        let router = self.router.filter(|_| !self.settings.unmapped);
        self.routers.send_if_modified(|told| {
            let is_news = *told != router;
            *told = router;
            is_news
        });
    }

    /// Tells the kernel's thread whether refused packets are answered.
    pub(super) fn switch_answers(&self) -> oneshot::Receiver<Result<(), String>> {
        let (tell, told) = oneshot::channel();
        let (answer, jobs) = (!self.settings.silent, self.jobs.clone());
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let (reply, done) = oneshot::channel::<Result<(), AclError>>();
            let sent = jobs.send(Job::AnswerRefusals(answer, reply)).await.is_ok();
            let result = match done.await {
                Ok(result) if sent => result.map_err(|error| chain(&error)),
                Ok(_) | Err(_) => Err("the kernel's thread has ended".to_owned()),
            };
            if let Err(error) = &result {
                tracing::warn!(error, "answers to refused packets are not as set");
            }
            // Whoever waits may be gone. The loop is woken to look.
            let _ = tell.send(result);
            let _ = inputs.send(Input::Timeout).await;
        });
        told
    }

    /// Answers whoever set something that is in force now; returns when to look again.
    pub(super) fn answer_setting(&mut self, now: Instant) -> Option<Instant> {
        let serves = self.settings.up && self.state.has_netmap();
        let status = self.engine.status();
        let settled = status.converged || !serves;
        let in_trouble = !status.problems.is_empty();
        let until = |setting: &Setting| match in_trouble {
            true => setting.waiter.deadline - (SET_PATIENCE - SET_PATIENCE_IN_TROUBLE),
            false => setting.waiter.deadline,
        };
        let remarks = if !serves {
            vec!["It is kept, and counts as soon as this machine is up.".to_owned()]
        } else if !status.converged {
            vec!["It is kept, but not in force yet: `weir status` says why.".to_owned()]
        } else {
            Vec::new()
        };
        for mut setting in std::mem::take(&mut self.setting) {
            match setting.switched.as_mut().map(oneshot::Receiver::try_recv) {
                Some(Ok(Err(error))) => {
                    let next = "It is kept. Run weir doctor.";
                    let answer = refused(RefusedCode::Failed, &error, next);
                    send(setting.waiter.reply, answer);
                    continue;
                }
                Some(Ok(Ok(()))) => setting.switched = None,
                Some(Err(_)) | None => {}
            }
            let done = settled && setting.switched.is_none() && self.guard_is_settled();
            if done || now >= until(&setting) {
                send(setting.waiter.reply, Response::Done(remarks.clone()));
            } else {
                self.setting.push_back(setting);
            }
        }
        self.setting.iter().map(until).min()
    }
}
