//! What the agent answers: the documents of the local API, from the engine's view and the maps.

use super::{Daemon, refused, send};
use crate::kernel::{Job, bpf};
use crate::local::report::{
    Acl, Coordinator, Counter, End, Explanation, Interface, Node, PeerStatus, Phase, PingTarget,
    Problem, RuleRef, Status, Verdict,
};
use crate::local::{Explain, RefusedCode, Response};
use ebpf::abi;
use ebpf::verdict::Question;
use engine::plan;
use engine::status::{FailureKind, Problem as EngineProblem};
use proto::filter::Direction;
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
            },
            node: engine.netmap.map(|netmap| self.node(netmap)),
            coordinator: self.coordinator(),
            generation: engine.netmap.map(|netmap| netmap.generation),
            epoch: None,
            acl: Acl {
                attached,
                hook: None,
                why: not_attached.filter(|_| !attached),
            },
            peers: engine.netmap.map_or(0, |netmap| netmap.peers.len()),
            problems: self.own_problems().chain(problems).collect(),
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
        Coordinator {
            address: known.map(|coordinator| coordinator.address.clone()),
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
        self.ask_maps(
            |acl| acl.map(bpf::Acl::counters),
            move |counters| {
                let response = match counters {
                    Some(Ok(counters)) => {
                        Response::Counters(counters.into_iter().map(counter).collect())
                    }
                    Some(Err(error)) => refused(
                        RefusedCode::Failed,
                        &super::chain(&error),
                        "Run weir doctor.",
                    ),
                    None => not_attached(),
                };
                send(reply, response);
            },
        );
    }

    /// Asks the kernel's thread about the maps, and goes on with the answer.
    fn ask_maps<T: Send + 'static>(
        &self,
        question: impl FnOnce(Option<&bpf::Acl>) -> Option<T> + Send + 'static,
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

    fn peer(&self, peer: &Peer) -> PeerStatus {
        let engine = self.engine.status_of(&peer.key);
        let stats = engine.cloned().unwrap_or_default();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or(Duration::ZERO);
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
        }
    }

    pub(super) fn answer_explain(&self, explain: &Explain, reply: oneshot::Sender<Response>) {
        let (src, dst) = match (self.find(&explain.src), self.find(&explain.dst)) {
            (Ok(src), Ok(dst)) => same_family(src, dst),
            (Err(response), _) | (_, Err(response)) => return send(reply, response),
        };
        let Some((src, dst)) = src.zip(dst) else {
            let message = "the two have no addresses of the same family";
            return send(reply, refused(RefusedCode::BadRequest, message, ""));
        };
        let port = explain
            .protocol
            .has_ports()
            .then_some(explain.port)
            .flatten();
        self.explain(src, dst, explain.protocol, port, move |explanation| {
            let response = explanation.map(|found| Response::Explanation(Box::new(found)));
            send(reply, response.unwrap_or_else(not_attached));
        });
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
    fn find(&self, text: &str) -> Result<Vec<IpAddr>, Response> {
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

    /// Which way a first packet would cross the device: whichever end is ours says it.
    fn direction(&self, src: IpAddr, dst: IpAddr) -> Option<Direction> {
        let me = &self.engine.status().netmap?.me;
        let ours = |addr: IpAddr| {
            me.addrs.contains(&addr) || me.routes.iter().any(|route| route.contains(addr))
        };
        match (ours(src), ours(dst)) {
            (true, false) => Some(Direction::Egress),
            (false, true) => Some(Direction::Ingress),
            (true, true) | (false, false) => None,
        }
    }

    fn end(&self, addr: IpAddr) -> End {
        let node = self.engine.status().netmap.and_then(|netmap| {
            if netmap.me.addrs.contains(&addr) {
                return Some(netmap.me.name.clone());
            }
            let has = |peer: &&Peer| peer.addrs.contains(&addr);
            netmap
                .peers
                .values()
                .find(has)
                .map(|peer| peer.name.clone())
        });
        End { addr, node }
    }

    /// What the loaded tables say of a first packet; `None` if none are loaded.
    fn explain(
        &self,
        src: IpAddr,
        dst: IpAddr,
        protocol: Protocol,
        port: Option<u16>,
        with: impl FnOnce(Option<Explanation>) + Send + 'static,
    ) {
        let mut explanation = Explanation {
            src: self.end(src),
            dst: self.end(dst),
            protocol,
            port,
            direction: self.direction(src, dst),
            verdict: Verdict::Deny,
            reason: "not_here".to_owned(),
            rule: None,
            sentences: Vec::new(),
        };
        let Some(direction) = explanation.direction else {
            explanation.sentences = vec![
                "Such a packet does not cross this node's device: neither end (or both) is this \
                 node or a subnet that it serves. Ask on the node of either end."
                    .to_owned(),
            ];
            return with(Some(explanation));
        };
        let rules = self.engine.status().lowered.allowing(
            direction,
            src,
            dst,
            protocol,
            port.unwrap_or_default(),
        );
        let rule = rules.first().map(|rule| RuleRef {
            index: rule.index,
            line: rule.line,
        });
        let question = Question {
            src: src.into(),
            dst: dst.into(),
            port: u32::from(port.unwrap_or_default()),
            protocol: u32::from(protocol.0),
            direction: match direction {
                Direction::Ingress => abi::Direction::Ingress,
                Direction::Egress => abi::Direction::Egress,
            } as u32,
            slot: 0,
        };
        self.ask_maps(
            move |acl| acl.map(|acl| acl.explain(&question)),
            move |verdict| {
                with(verdict.map(|verdict| {
                    explanation.reason = verdict.name().to_owned();
                    explanation.sentences = sentences(verdict, rule, direction);
                    if verdict.passes() {
                        explanation.verdict = Verdict::Accept;
                        explanation.rule = rule;
                    }
                    explanation
                }));
            },
        );
    }
}

fn sentences(
    verdict: ebpf::verdict::Verdict,
    rule: Option<RuleRef>,
    direction: Direction,
) -> Vec<String> {
    let here = match (verdict.passes(), rule) {
        (true, Some(RuleRef { index, line })) => {
            format!("Entry {index} of the policy, at line {line}, allows it.")
        }
        (true, None) => "The tables that are loaded allow it.".to_owned(),
        (false, _) => verdict.reason().map_or_else(
            || "It is denied.".to_owned(),
            |reason| match reason {
                ebpf::reason::Reason::Policy => "No rule of the policy allows it.".to_owned(),
                ebpf::reason::Reason::NoPolicy => "No policy is loaded: all is denied.".to_owned(),
                other => format!("It is denied before any rule is asked: {}.", other.name()),
            },
        ),
    };
    let there = match direction {
        Direction::Egress => "The receiver decides too: ask there with the same words.",
        Direction::Ingress => "The sender decides too: ask there with the same words.",
    };
    vec![here, there.to_owned()]
}

/// One address of each, of a family that both have; IPv4 first.
fn same_family(src: Vec<IpAddr>, dst: Vec<IpAddr>) -> (Option<IpAddr>, Option<IpAddr>) {
    let pair = [true, false].into_iter().find_map(|v4| {
        let of = |addrs: &[IpAddr]| addrs.iter().copied().find(|addr| addr.is_ipv4() == v4);
        of(&src).zip(of(&dst))
    });
    pair.unzip()
}

fn counter(
    (direction, verdict, packets): (abi::Direction, ebpf::verdict::Verdict, u64),
) -> Counter {
    Counter {
        direction: match direction {
            abi::Direction::Ingress => Direction::Ingress,
            abi::Direction::Egress => Direction::Egress,
        },
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

fn unknown(name: &str) -> Response {
    refused(
        RefusedCode::UnknownPeer,
        &format!("no node called {name} is known here"),
        "`weir peers` lists the nodes that policy lets this one talk with.",
    )
}

fn not_attached() -> Response {
    refused(
        RefusedCode::Failed,
        "the ACL programs are not attached",
        "`weir status` says why.",
    )
}
