//! Dropped packets, for whoever follows them.
//!
//! While there is a follower, a task asks the kernel's thread ten times a second what the programs
//! told since the last time, and what their counters are; nobody looks while nobody follows. The
//! programs tell of some drops and count all of them ([`ebpf::event`]): the difference is said, a
//! line a second and reason at most, so that what is shown and what is left out add up to what the
//! counters say ([`Ledger`]).
//!
//! A follower that does not take its lines misses some, and is told how many.

use super::answer::not_attached;
use super::explain::{near, way, why};
use super::{Daemon, refused, send};
use crate::kernel::Job;
use crate::local::report::{Drop, LeftOut, Lost, NearMiss, Party, Seen, Side};
use crate::local::{Monitor as Request, RefusedCode, Response};
use ebpf::abi::{self, Dropped, known, side};
use ebpf::packet::{protocol, tcp};
use ebpf::reason::Reason;
use ebpf::verdict::Verdict;
use engine::acl::Flow;
use proto::filter::Direction;
use proto::net::Protocol;
use proto::netmap::Peer;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

/// How often somebody looks: often enough to seem at once.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often it is said what was left out.
const SUM_UP_EVERY: Duration = Duration::from_secs(1);
/// Most followers; each holds one of the socket's places.
const MAX_FOLLOWERS: usize = 16;

/// What a look at the maps shows: drops, counters, and how many events were lost; `None` while no
/// programs are attached.
pub(super) type Look = Option<(Vec<(Duration, Dropped)>, Counters, u64)>;
/// Packets by direction and verdict, since the programs were loaded.
type Counters = Vec<(abi::Direction, Verdict, u64)>;
/// Which way, and why.
type Cause = (abi::Direction, Verdict);

/// All followers.
pub(super) struct Monitor {
    followers: Vec<Follower>,
    /// Those that wait for the first look.
    waiting: Vec<(Follower, oneshot::Sender<Response>)>,
    ledger: Ledger,
    looks: mpsc::Sender<Look>,
    /// Dropped, it ends the task that looks.
    looking: Option<oneshot::Sender<Infallible>>,
}

/// Somebody who follows.
struct Follower {
    reason: Option<String>,
    peer: Option<(String, Vec<IpAddr>)>,
    lines: mpsc::Sender<Response>,
    /// Drops whose lines it did not take.
    missed: BTreeMap<Cause, u64>,
    /// Events whose loss it was not told of, likewise.
    lost: u64,
}

impl Monitor {
    /// Without followers. What is seen goes to `looks`.
    pub(super) fn new(looks: mpsc::Sender<Look>) -> Self {
        Self {
            followers: Vec::new(),
            waiting: Vec::new(),
            ledger: Ledger::default(),
            looks,
            looking: None,
        }
    }

    fn begin(&mut self, jobs: &mpsc::Sender<Job>) {
        if self.looking.is_none() {
            let (looking, ended) = oneshot::channel();
            self.looking = Some(looking);
            self.ledger = Ledger::default();
            tokio::spawn(look_on(jobs.clone(), self.looks.clone(), ended));
        }
    }
}

/// Looks again and again, until `ended`.
async fn look_on(
    jobs: mpsc::Sender<Job>,
    looks: mpsc::Sender<Look>,
    mut ended: oneshot::Receiver<Infallible>,
) {
    let mut interval = tokio::time::interval(LOOK_EVERY);
    loop {
        tokio::select! {
            _ = &mut ended => return,
            _ = interval.tick() => {}
        }
        let (tell, told) = oneshot::channel();
        let job = Job::Ask(Box::new(|acl| {
            let seen = acl.and_then(|acl| {
                // Counted before it is told: in this order nothing is told that was not counted.
                let drops = acl.drops();
                let counters = acl.counters();
                let lost = acl.lost();
                match (drops, counters, lost) {
                    (Ok(drops), Ok(counters), Ok(lost)) => Some((drops, counters, lost)),
                    (Err(error), _, _) | (_, Err(error), _) | (_, _, Err(error)) => {
                        tracing::debug!(%error, "drops cannot be read");
                        None
                    }
                }
            });
            // The loop may have ended.
            let _ = tell.send(seen);
        }));
        if jobs.send(job).await.is_err() {
            return;
        }
        let Ok(look) = told.await else { return };
        if looks.send(look).await.is_err() {
            return;
        }
    }
}

impl Daemon {
    /// Takes a follower in. It is answered at the next look: what is dropped later is told.
    pub(super) fn follow(
        &mut self,
        request: Request,
        lines: Option<mpsc::Sender<Response>>,
        reply: oneshot::Sender<Response>,
    ) {
        let Some(lines) = lines else {
            let message = "a stream was asked for where none can be sent";
            return send(reply, refused(RefusedCode::BadRequest, message, ""));
        };
        let known = request.reason.as_deref().is_none_or(|wanted| {
            let mut all = Reason::ALL.iter();
            all.any(|reason| reason.name() == wanted)
        });
        if !known {
            let message = "there is no such reason to drop a packet";
            let next = "`weir monitor --help` lists them.";
            return send(reply, refused(RefusedCode::BadRequest, message, next));
        }
        let monitor = &self.monitor;
        if monitor.followers.len() + monitor.waiting.len() >= MAX_FOLLOWERS {
            let message = "too many follow already";
            let next = "End one of them, and try again.";
            return send(reply, refused(RefusedCode::Unavailable, message, next));
        }
        let peer = match request.peer.map(|peer| (self.find(&peer), peer)) {
            Some((Err(response), _)) => return send(reply, response),
            Some((Ok(addrs), name)) => Some((name, addrs)),
            None => None,
        };
        let follower = Follower {
            reason: request.reason,
            peer,
            lines,
            missed: BTreeMap::new(),
            lost: 0,
        };
        self.monitor.begin(&self.jobs);
        self.monitor.waiting.push((follower, reply));
    }

    /// Tells the followers what was seen.
    pub(super) fn looked(&mut self, look: Look) {
        let none = Monitor::new(self.monitor.looks.clone());
        let mut monitor = std::mem::replace(&mut self.monitor, none);
        if let Some((drops, counters, lost)) = &look {
            for (age, event) in drops {
                if let Some(cause) = monitor.ledger.told(event)
                    && !monitor.followers.is_empty()
                {
                    let line = self.told(*age, event);
                    monitor
                        .followers
                        .iter_mut()
                        .for_each(|one| one.tell(cause, &line));
                }
            }
            let now = Instant::now();
            for (cause, packets) in monitor.ledger.counted(counters, now) {
                monitor
                    .followers
                    .iter_mut()
                    .for_each(|one| one.sum_up(cause, packets));
            }
            let events = monitor.ledger.lost(*lost, now);
            if events > 0 {
                monitor
                    .followers
                    .iter_mut()
                    .for_each(|one| one.lose(events));
            }
        }
        for (follower, reply) in monitor.waiting.drain(..) {
            if look.is_some() {
                send(reply, Response::Seen(Seen::Begun));
                monitor.followers.push(follower);
            } else {
                send(reply, not_attached());
            }
        }
        monitor
            .followers
            .retain(|follower| !follower.lines.is_closed());
        if monitor.followers.is_empty() {
            monitor.looking = None;
        }
        self.monitor = monitor;
    }

    /// The document about one drop.
    fn told(&self, age: Duration, event: &Dropped) -> Drop {
        let verdict = Verdict::from_code(u32::from(event.verdict));
        let direction = direction(event);
        let read = matches!(event.known, known::ALL | known::LATER_FRAGMENT);
        let addressed = event.known != known::NOTHING;
        let (src, dst) = (IpAddr::from(event.src), IpAddr::from(event.dst));
        let number = Protocol(event.protocol);
        let ports = event.known == known::ALL && number.has_ports();
        let party = |addr, port, side, class| Party {
            addr,
            port: ports.then_some(port),
            node: self.behind(addr),
            side: match u32::from(side) {
                side::PEER => Side::Peer,
                side::OWN => Side::Own,
                _ => Side::Nobody,
            },
            class,
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let time = now.unwrap_or_default().saturating_sub(age);
        let icmp = matches!(event.protocol, protocol::ICMP | protocol::ICMPV6);
        let flow = Flow {
            src,
            dst,
            protocol: number,
            port: if ports { event.dst_port } else { 0 },
        };
        let close = self.closest(verdict, direction, &flow);
        Drop {
            time_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
            direction,
            reason: verdict.name().to_owned(),
            src: addressed.then(|| party(src, event.src_port, event.src_side, event.src_class)),
            dst: addressed.then(|| party(dst, event.dst_port, event.dst_side, event.dst_class)),
            protocol: addressed.then_some(number),
            tcp_flags: (event.known == known::ALL && number == Protocol::TCP)
                .then(|| letters(event.tcp_flags)),
            icmp_type: (event.known == known::ALL && icmp).then_some(event.icmp_type),
            later_fragment: event.known == known::LATER_FRAGMENT,
            length_bytes: event.len,
            near: close,
            why: verdict.reason().map_or_else(String::new, |reason| {
                why(reason, read.then_some((src, dst)))
            }),
        }
    }

    fn closest(&self, verdict: Verdict, direction: Direction, flow: &Flow) -> Option<NearMiss> {
        if verdict.reason() != Some(Reason::Policy) {
            return None;
        }
        let lowered = self.engine.status().lowered;
        near(lowered, direction, flow, 1).into_iter().next()
    }

    /// The node that has an address, or serves the longest route to it.
    fn behind(&self, addr: IpAddr) -> Option<String> {
        if let Some(name) = self.end(addr).node {
            return Some(name);
        }
        let netmap = self.engine.status().netmap?;
        let own = (&netmap.me.name, &netmap.me.routes);
        let peers = netmap.peers.values();
        let all = std::iter::once(own).chain(peers.map(|peer: &Peer| (&peer.name, &peer.routes)));
        let routes = all.flat_map(|(name, routes)| routes.iter().map(move |route| (route, name)));
        let around = routes.filter(|(route, _)| route.contains(addr));
        around
            .max_by_key(|(route, _)| route.len())
            .map(|(_, name)| name.clone())
    }
}

impl Follower {
    fn tell(&mut self, cause: Cause, drop: &Drop) {
        let reason = self
            .reason
            .as_ref()
            .is_none_or(|wanted| *wanted == drop.reason);
        let is_peer = |party: &Option<Party>| {
            let (Some((name, addrs)), Some(party)) = (&self.peer, party) else {
                return self.peer.is_none();
            };
            addrs.contains(&party.addr) || party.node.as_ref() == Some(name)
        };
        if reason && (is_peer(&drop.src) || is_peer(&drop.dst)) {
            let line = Response::Seen(Seen::Drop(Box::new(drop.clone())));
            if let Err(TrySendError::Full(_)) = self.lines.try_send(line) {
                *self.missed.entry(cause).or_default() += 1;
            }
        }
    }

    fn sum_up(&mut self, cause: Cause, packets: u64) {
        let (direction, verdict) = cause;
        if self
            .reason
            .as_ref()
            .is_some_and(|wanted| *wanted != verdict.name())
        {
            return;
        }
        let packets = packets + self.missed.remove(&cause).unwrap_or_default();
        let line = Response::Seen(Seen::LeftOut(LeftOut {
            direction: way(direction),
            reason: verdict.name().to_owned(),
            packets,
        }));
        if let Err(TrySendError::Full(_)) = self.lines.try_send(line) {
            *self.missed.entry(cause).or_default() += packets;
        }
    }

    fn lose(&mut self, events: u64) {
        self.lost += events;
        let line = Response::Seen(Seen::Lost(Lost { events: self.lost }));
        if !matches!(self.lines.try_send(line), Err(TrySendError::Full(_))) {
            self.lost = 0;
        }
    }
}

fn direction(event: &Dropped) -> Direction {
    if event.direction == abi::Direction::Ingress as u8 {
        Direction::Ingress
    } else {
        Direction::Egress
    }
}

/// The flags of a segment, as tcpdump's readers know them.
fn letters(flags: u8) -> String {
    let all = [
        (tcp::SYN, 'S'),
        (tcp::FIN, 'F'),
        (tcp::RST, 'R'),
        (tcp::PSH, 'P'),
        (tcp::ACK, 'A'),
        (tcp::URG, 'U'),
    ];
    let set = all.into_iter().filter(|(bit, _)| flags & bit != 0);
    set.map(|(_, letter)| letter).collect()
}

/// What was counted, what was told, and what is owed.
#[derive(Default)]
struct Ledger {
    accounts: BTreeMap<Cause, Account>,
    summed_up: Option<Instant>,
    /// Events lost, as last said.
    lost: Option<u64>,
}

/// The drops of one cause.
#[derive(Clone, Copy, Default)]
struct Account {
    /// The counter when following began, and one look ago.
    began: u64,
    counted: u64,
    /// Since following began.
    told: u64,
    left_out: u64,
}

impl Ledger {
    /// Books an event; `None` if it is of no cause that is counted.
    fn told(&mut self, event: &Dropped) -> Option<Cause> {
        let direction = match event.direction {
            0 => abi::Direction::Ingress,
            _ => abi::Direction::Egress,
        };
        let cause = (direction, Verdict::from_code(u32::from(event.verdict)));
        // Before the first look at the counters: from a time when nobody followed.
        let account = self.accounts.get_mut(&cause)?;
        account.told += 1;
        Some(cause)
    }

    /// Books the counters, and says now and then what was left out.
    ///
    /// A packet is counted before it is told. So what was counted one look ago has been told by now,
    /// or never will be.
    fn counted(&mut self, counters: &Counters, now: Instant) -> Vec<(Cause, u64)> {
        let due = self
            .summed_up
            .is_some_and(|last| now.saturating_duration_since(last) >= SUM_UP_EVERY);
        if due || self.summed_up.is_none() {
            self.summed_up = Some(now);
        }
        let mut left_out = Vec::new();
        for (direction, verdict, packets) in counters.iter().filter(|(_, one, _)| !one.passes()) {
            let cause = (*direction, *verdict);
            let fresh = Account {
                began: *packets,
                counted: *packets,
                ..Account::default()
            };
            let account = self.accounts.entry(cause).or_insert(fresh);
            if *packets < account.counted {
                // Other maps: the programs were taken off and attached again.
                *account = fresh;
            }
            let counted = account.counted - account.began;
            let owed = counted.saturating_sub(account.told + account.left_out);
            if due && owed > 0 {
                account.left_out += owed;
                left_out.push((cause, owed));
            }
            account.counted = *packets;
        }
        left_out
    }

    /// Books how many events were lost altogether, after the counters of the same look, and says how
    /// many more it is, as often as what was left out.
    fn lost(&mut self, events: u64, now: Instant) -> u64 {
        let said = self.lost.get_or_insert(events);
        if self.summed_up != Some(now) {
            return 0;
        }
        // Fewer than before: other maps.
        let more = events.saturating_sub(*said);
        *said = events;
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAUSE: Cause = (abi::Direction::Ingress, Verdict::deny(Reason::Policy));

    fn counters(packets: u64) -> Counters {
        vec![
            (CAUSE.0, CAUSE.1, packets),
            (
                CAUSE.0,
                Verdict::accept(ebpf::reason::Accepted::New),
                7 * packets,
            ),
        ]
    }

    fn event() -> Dropped {
        Dropped {
            time_ns: 1,
            src: IpAddr::from([100, 64, 0, 1]).into(),
            dst: IpAddr::from([100, 64, 0, 2]).into(),
            src_class: 0,
            dst_class: 0,
            len: 40,
            src_port: 1,
            dst_port: 2,
            verdict: CAUSE.1.code() as u8,
            direction: CAUSE.0 as u8,
            known: known::ALL,
            protocol: 6,
            tcp_flags: tcp::SYN,
            icmp_type: 0,
            src_side: 0,
            dst_side: 0,
        }
    }

    #[test]
    fn what_is_told_and_what_is_left_out_add_up_to_what_is_counted() {
        let (mut ledger, begin) = (Ledger::default(), Instant::now());
        let at = |tenths: u64| begin + Duration::from_millis(100 * tenths);
        assert_eq!(ledger.told(&event()), None, "an old event, of no account");
        assert_eq!(ledger.counted(&counters(50), at(0)), []);
        assert_eq!(ledger.told(&event()), Some(CAUSE));
        assert_eq!(ledger.counted(&counters(463), at(1)), []);
        // Told late: it was counted in the look before.
        assert_eq!(ledger.told(&event()), Some(CAUSE));
        assert_eq!(ledger.counted(&counters(463), at(11)), [(CAUSE, 411)]);
        assert_eq!(ledger.counted(&counters(463), at(22)), [], "said once");
        // What comes just now may be told at the next look.
        assert_eq!(ledger.counted(&counters(464), at(33)), []);
        assert_eq!(ledger.counted(&counters(464), at(44)), [(CAUSE, 1)]);
        // New maps count from nothing.
        assert_eq!(ledger.counted(&counters(3), at(55)), []);
        assert_eq!(ledger.counted(&counters(5), at(66)), []);
        assert_eq!(ledger.counted(&counters(5), at(77)), [(CAUSE, 2)]);
    }

    #[test]
    fn a_follower_that_takes_nothing_is_told_how_much_it_missed() {
        let (lines, mut taken) = mpsc::channel(1);
        let mut follower = Follower {
            reason: None,
            peer: None,
            lines,
            missed: BTreeMap::new(),
            lost: 0,
        };
        for _ in 0..5 {
            follower.sum_up(CAUSE, 10);
        }
        let packets = |response| match response {
            Some(Response::Seen(Seen::LeftOut(left_out))) => left_out.packets,
            other => panic!("{other:?}"),
        };
        assert_eq!(packets(taken.try_recv().ok()), 10);
        follower.sum_up(CAUSE, 10);
        follower.lose(3);
        assert_eq!(packets(taken.try_recv().ok()), 50);
        follower.lose(4);
        match taken.try_recv().ok() {
            Some(Response::Seen(Seen::Lost(lost))) => assert_eq!(lost.events, 7),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lost_events_are_those_since_somebody_follows() {
        let (mut ledger, begin) = (Ledger::default(), Instant::now());
        let mut look = |lost, tenths: u64| {
            let now = begin + Duration::from_millis(100 * tenths);
            ledger.counted(&counters(1), now);
            ledger.lost(lost, now)
        };
        assert_eq!(look(1_000, 0), 0, "from a time when nobody followed");
        assert_eq!(look(1_005, 1), 0, "said with the sums");
        assert_eq!(look(1_009, 11), 9);
        assert_eq!(look(1_009, 22), 0, "said once");
        assert_eq!(look(2, 33), 0, "new maps count from nothing");
        assert_eq!(look(5, 44), 3);
    }
}
