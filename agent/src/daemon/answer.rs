//! What the agent answers: the documents of the local API, from the engine's view and the maps.

use super::explain::{same_family, way};
use super::{Daemon, guard, reach, refused, send};
use crate::kernel::{Job, bpf};
use crate::local::report::{
    Acl, Answers, Coordinator, Counter, Counters, Interface, Node, PeerStatus, Phase, PingTarget,
    Problem, Refuse, Status, Verdict, Way,
};
use crate::local::{RefusedCode, Response};
use ebpf::abi;
use ebpf::refuse::Outcome;
use engine::plan::{self, Family, RouteMtu};
use engine::status::{FailureKind, Problem as EngineProblem};
use proto::net::Protocol;
use proto::netmap::{Netmap, Peer};
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::oneshot;

impl Daemon {
    /// How the agent is, but for what only the maps know.
    pub(super) fn status(&self) -> Status {
        let engine = self.engine.status();
        let device = engine.observed.and_then(plan::Observed::present);
        let attached = engine
            .observed
            .is_some_and(|observed| matches!(observed.acl, plan::Acl::Attached(_)));
        let problems: Vec<Problem> = engine.problems.iter().map(problem).collect();
        let not_attached = engine.problems.iter().find_map(|problem| match problem {
            EngineProblem::Step {
                kind: FailureKind::Programs | FailureKind::Unsupported | FailureKind::Permission,
                detail,
                ..
            } => Some(detail.clone()),
            _ => None,
        });
        let mut status = Status {
            phase: Phase::NotJoined,
            interface: Interface {
                name: self.config.interface.to_string(),
                up: device.is_some_and(|device| device.up),
                listen_port: device.map(|device| device.listen_port),
                mtu: device.map(|device| device.mtu),
                addrs: device
                    .map(|device| device.addrs.iter().map(|(addr, _)| *addr).collect())
                    .unwrap_or_default(),
                outside: engine.outside.iter().copied().collect(),
            },
            node: engine.netmap.map(|netmap| self.node(netmap)),
            coordinator: self.coordinator(),
            generation: engine.netmap.map(|netmap| netmap.generation),
            epoch: None,
            acl: Acl {
                attached,
                hook: None,
                why: not_attached.filter(|_| !attached),
                shields_up: self.settings.shields_up,
                refuse: if self.settings.silent {
                    Refuse::Drop
                } else {
                    Refuse::Answer
                },
            },
            guard: self.guard.places(),
            peers: engine.netmap.map_or(0, |netmap| netmap.peers.len()),
            active: self.active(),
            problems: self
                .own_problems()
                .chain(problems)
                .chain(self.remarks())
                .collect(),
        };
        status.phase = match (&self.settings.coordinator, self.settings.up) {
            (None, _) => Phase::NotJoined,
            (Some(_), false) => Phase::Down,
            (Some(_), true) if status.is_ready() => Phase::Up,
            (Some(_), true) => Phase::Starting,
        };
        status
    }

    fn node(&self, netmap: &Netmap) -> Node {
        let me = &netmap.me;
        Node {
            id: me.id,
            name: me.name.clone(),
            key: me.key,
            owner: me.owner.clone(),
            addrs: me.addrs.clone(),
            network: netmap.network.name.clone(),
            v4: netmap.network.v4,
            v6: netmap.network.v6,
            advertised_routes: self.settings.routes.clone(),
            approved_routes: me.routes.clone(),
        }
    }

    fn coordinator(&self) -> Coordinator {
        let link = &self.link;
        let known = link
            .coordinator
            .as_ref()
            .or(self.settings.coordinator.as_ref());
        let refusal = link.refusal.as_ref().map(|refusal| refusal.message.clone());
        let proxy = known.and_then(|it| self.proxy_to(&it.address));
        Coordinator {
            address: known.map(|coordinator| coordinator.address.clone()),
            proxy,
            connected: link.connected,
            why: refusal.or_else(|| link.why.clone()),
            retry_in_seconds: link
                .retry_at
                .map(|at| at.saturating_duration_since(Instant::now()).as_secs()),
        }
    }

    /// What is wrong outside the engine: the state folder, the coordinator's refusal.
    fn own_problems(&self) -> impl Iterator<Item = Problem> {
        let refusal = self.link.refusal.iter().map(|refusal| Problem {
            code: "coordinator_refused".to_owned(),
            message: format!("the coordinator refuses this node: {}", refusal.message),
            next: "Join again with a new token: weir up --token-file FILE.".to_owned(),
        });
        let trouble = self.trouble.iter().map(|(code, text)| Problem {
            code: (*code).to_owned(),
            message: format!("the state folder: {text}"),
            next: match *code {
                "settings_damaged" | "netmap_damaged" => {
                    "The last good copy is used, if there is one; the coordinator sends the rest."
                }
                _ => "Make room on the disk, or mend its permissions; weir writes again by itself.",
            }
            .to_owned(),
        });
        refusal.chain(trouble)
    }

    /// What does not keep the node from being up, and so comes last.
    fn remarks(&self) -> impl Iterator<Item = Problem> {
        let guard = self.guard.problem().into_iter();
        guard
            .chain(self.port_problem())
            .chain(self.relay_problem())
            .chain(self.proxy_problem())
    }

    pub(super) fn answer_status(&self, reply: oneshot::Sender<Response>) {
        let mut status = self.status();
        self.ask_maps(
            |acl| acl.map(|acl| (acl.epoch(), acl.hook())),
            move |maps| {
                if let Some((epoch, hook)) = maps {
                    status.epoch = epoch;
                    status.acl.hook = Some(hook.to_owned());
                }
                send(reply, Response::Status(Box::new(status)));
            },
        );
    }

    pub(super) fn answer_counters(&self, reply: oneshot::Sender<Response>) {
        let jobs = self.jobs.clone();
        self.ask_maps(
            |acl| acl.map(|acl| Ok((acl.counters()?, acl.answers()?, acl.lost()?))),
            move |counters| {
                let response = match counters {
                    Some(Ok((counters, answers, events_lost))) => {
                        let counters = Counters {
                            counters: counters.into_iter().map(counter).collect(),
                            answers: answers.into_iter().map(answered).collect(),
                            guard: Vec::new(),
                            events_lost,
                        };
                        return guard::answer_with_counts(jobs, counters, reply);
                    }
                    Some(Err(error)) => failed(&error),
                    None => not_attached(),
                };
                send(reply, response);
            },
        );
    }

    /// Asks the kernel's thread about the maps, and goes on with the answer.
    pub(super) fn ask_maps<T: Send + 'static>(
        &self,
        question: impl FnOnce(Option<&mut bpf::Acl>) -> Option<T> + Send + 'static,
        with: impl FnOnce(Option<T>) + Send + 'static,
    ) {
        let (tell, told) = oneshot::channel();
        let jobs = self.jobs.clone();
        tokio::spawn(async move {
            let job = Job::Ask(Box::new(|acl| {
                // Whoever asked may have hung up.
                let _ = tell.send(question(acl));
            }));
            let sent = jobs.send(job).await.is_ok();
            let answer = if sent {
                told.await.ok().flatten()
            } else {
                None
            };
            with(answer);
        });
    }

    /// All peers, by name.
    pub(super) fn peers(&self) -> Vec<PeerStatus> {
        let engine = self.engine.status();
        let Some(netmap) = engine.netmap else {
            return Vec::new();
        };
        let mut peers: Vec<PeerStatus> =
            netmap.peers.values().map(|peer| self.peer(peer)).collect();
        peers.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        peers
    }

    pub(super) fn peer(&self, peer: &Peer) -> PeerStatus {
        let engine = self.engine.status_of(&peer.key);
        let stats = engine.cloned().unwrap_or_default();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or(Duration::ZERO);
        let (rx_rate, tx_rate) = self.rates.of(Instant::now(), &peer.key);
        let path = self.engine.path_of(Instant::now(), &peer.key);
        let mtu = path
            .as_ref()
            .map(|path| (path.mtu, path.inner_mtu))
            .unwrap_or_default();
        let (way, region, rtt) = path.map_or((Way::None, None, None), |path| reach::way(&path.now));
        PeerStatus {
            id: peer.id,
            name: peer.name.clone(),
            addrs: peer.addrs.clone(),
            key: peer.key,
            owner: peer.owner.clone(),
            routes: peer.routes.clone(),
            online: peer.online,
            endpoint: stats.endpoint,
            handshake_seconds: stats
                .last_handshake
                .map(|at| now.saturating_sub(at).as_secs()),
            rx_bytes: stats.rx_bytes,
            tx_bytes: stats.tx_bytes,
            rx_bytes_per_second: rx_rate,
            tx_bytes_per_second: tx_rate,
            way,
            relay: region.map(|region| self.region_name(region)),
            rtt_us: rtt.map(reach::micros),
            path_mtu: mtu.0,
            mtu: RouteMtu::of(mtu.1, Family::V4).mtu,
        }
    }

    pub(super) fn answer_ping(&self, name: &str, reply: oneshot::Sender<Response>) {
        let netmap = self.engine.status().netmap;
        let addrs = match self.find(name) {
            Ok(addrs) => addrs,
            Err(response) => return send(reply, response),
        };
        let owner = netmap.and_then(|netmap| {
            let has = |peer: &&Peer| peer.addrs.iter().any(|addr| addrs.contains(addr));
            netmap.peers.values().find(has)
        });
        let Some((netmap, peer)) = netmap.zip(owner) else {
            return send(reply, unknown(name));
        };
        let target = self.peer(peer);
        let (own, theirs) = same_family(netmap.me.addrs.clone(), addrs);
        let Some((own, addr)) = own.zip(theirs) else {
            return send(reply, unknown(name));
        };
        let protocol = if addr.is_ipv4() {
            Protocol::ICMP
        } else {
            Protocol::ICMPV6
        };
        self.explain(own, addr, protocol, None, move |policy| {
            let response = policy.map(|policy| {
                Response::Ping(Box::new(PingTarget {
                    peer: target,
                    addr,
                    policy,
                }))
            });
            send(reply, response.unwrap_or_else(not_attached));
        });
    }

    /// The addresses that a name or an address stands for.
    pub(super) fn find(&self, text: &str) -> Result<Vec<IpAddr>, Response> {
        if let Ok(addr) = text.parse() {
            return Ok(vec![addr]);
        }
        let netmap = self.engine.status().netmap.ok_or_else(|| unknown(text))?;
        let me = &netmap.me;
        let peers = netmap.peers.values();
        let mut named = std::iter::once((&me.name, &me.addrs))
            .chain(peers.map(|peer| (&peer.name, &peer.addrs)));
        let found = named.find(|(name, _)| name.eq_ignore_ascii_case(text));
        found
            .map(|(_, addrs)| addrs.clone())
            .ok_or_else(|| unknown(text))
    }
}

pub(super) fn failed(error: &bpf::AclError) -> Response {
    let message = super::chain(error);
    refused(RefusedCode::Failed, &message, "Run weir doctor.")
}

fn answered((outcome, packets): (Outcome, u64)) -> Answers {
    Answers {
        outcome: outcome.name().to_owned(),
        packets,
    }
}

fn counter(
    (direction, verdict, packets): (abi::Direction, ebpf::verdict::Verdict, u64),
) -> Counter {
    Counter {
        direction: way(direction),
        verdict: if verdict.passes() {
            Verdict::Accept
        } else {
            Verdict::Deny
        },
        reason: verdict.name().to_owned(),
        packets,
    }
}

fn problem(problem: &EngineProblem) -> Problem {
    Problem {
        code: problem.code().to_owned(),
        message: problem.to_string(),
        next: problem.next().to_owned(),
    }
}

pub(super) fn unknown(name: &str) -> Response {
    refused(
        RefusedCode::UnknownPeer,
        &format!("no node called {name} is known here"),
        "`weir peers` lists the nodes that policy lets this one talk with.",
    )
}

pub(super) fn not_attached() -> Response {
    refused(
        RefusedCode::Failed,
        "the ACL programs are not attached",
        "`weir status` says why.",
    )
}
