//! `weir doctor`: what weir needs of a machine, checked one by one.
//!
//! Looks at files that anyone may read where it can, so that it works without an agent and, mostly,
//! without root; what it may not see it says it could not see. What only the agent knows it asks
//! the agent. The judgements are functions of text, apart from where the text comes from.

mod host;

use super::{Agent, Console, Failure, PATIENCE, path};
use crate::local::report::{Acl, Coordinator, PeerStatus, Phase, Problem, Status};
use crate::local::{Request, Response};
use proto::net::Prefix;
use serde::Serialize;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

/// What helps a path that takes only short packets.
const WIDEN: &str = "Give the links and tunnels that it goes by an MTU of 1360 or more.";
/// How long the coordinator may take to take a connection.
const REACH: Duration = Duration::from_secs(5);

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// What, stable.
    name: &'static str,
    state: State,
    /// What was seen.
    message: String,
    /// What to do; empty where there is nothing.
    next: String,
}

/// How one thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// As it should be.
    Ok,
    /// Not known, or not as good as it could be.
    Warn,
    /// weir cannot do its work so.
    Fail,
}

impl Check {
    fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            message: message.into(),
            next: String::new(),
        }
    }

    fn warn(name: &'static str, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Warn,
            message: message.into(),
            next: next.into(),
        }
    }

    fn fail(name: &'static str, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            state: State::Fail,
            ..Self::warn(name, message, next)
        }
    }
}

pub(super) fn doctor(agent: &Agent, console: &Console, state_dir: &Path) -> Result<(), Failure> {
    let status = match agent.ask(Request::Status, PATIENCE) {
        Ok(Response::Status(status)) => Ok(*status),
        Ok(_) => Err(super::astray()),
        Err(failure) => Err(failure),
    };
    let mut checks = vec![
        host::kernel(),
        host::wireguard(),
        host::btf(),
        host::bpffs(status.as_ref().is_ok_and(|status| status.acl.attached)),
        host::clock(state_dir),
        host::state_folder(state_dir),
    ];
    match &status {
        Ok(status) => checks.extend(of_agent(status)),
        Err(failure) => checks.push(no_agent(failure)),
    }
    let failed = checks
        .iter()
        .filter(|check| check.state == State::Fail)
        .count();
    if console.json {
        #[derive(Serialize)]
        struct Checks {
            checks: Vec<Check>,
        }
        console.document(Checks { checks })?;
    } else {
        console.say(&text(&checks))?;
    }
    if failed > 0 {
        return Err(Failure::Told);
    }
    Ok(())
}

fn no_agent(failure: &Failure) -> Check {
    match failure {
        Failure::Failed(complaint) | Failure::Trouble(complaint) => {
            Check::fail("agent", complaint.message.clone(), complaint.next.clone())
        }
        Failure::Use(_) | Failure::Unheard | Failure::Told => Check::fail("agent", "no answer", ""),
    }
}

/// What the agent's status tells.
fn of_agent(status: &Status) -> Vec<Check> {
    let Status {
        phase,
        interface,
        acl,
        coordinator,
        problems,
        node,
        ..
    } = status;
    let device = &interface.name;
    let mut checks = vec![match phase {
        Phase::NotJoined => Check::warn(
            "agent",
            "it runs; this machine is in no network",
            "Join one with `weir up --token-file FILE`.",
        ),
        Phase::Down => Check::warn(
            "agent",
            "it runs and was told to stay down",
            "Run `weir up`.",
        ),
        Phase::Starting => Check::warn("agent", "it is on its way up", "See the problems below."),
        Phase::Up => Check::ok("agent", format!("it runs and {device} is up")),
    }];
    let wanted = matches!(phase, Phase::Starting | Phase::Up);
    checks.push(acl_check(acl, wanted));
    checks.push(coordinator_check(coordinator));
    if interface.up {
        checks.push(host::threaded(device));
    }
    checks.extend(narrow(&status.active));
    // A route that leads nowhere from here is not forwarded: that problem comes below.
    let unserved = problems
        .iter()
        .any(|problem| problem.code == "route_unserved");
    if let Some(node) = node.as_ref().filter(|_| interface.up && !unserved) {
        let routes = &node.approved_routes;
        checks.extend(host::forwarding(device, routes.iter().map(Prefix::is_v4)));
    }
    checks.extend(problems.iter().map(problem_check));
    checks
}

/// A problem is a failure, unless weir does its work all the same.
fn problem_check(problem: &Problem) -> Check {
    let Problem {
        code,
        message,
        next,
    } = problem;
    match code.as_str() {
        "guard_not_attached" | "ipv6_off" => Check::warn("problem", message, next),
        _ => Check::fail("problem", message, next),
    }
}

/// Peers in use whose path takes less than IPv6 needs.
fn narrow(active: &[PeerStatus]) -> Option<Check> {
    let narrow = active.iter().filter(|peer| path::is_narrow(peer));
    let peers: Vec<String> = narrow
        .map(|peer| {
            format!(
                "{} ({} bytes)",
                peer.name,
                peer.path_mtu.unwrap_or_default()
            )
        })
        .collect();
    (!peers.is_empty()).then(|| {
        let message = format!("the path takes only short packets to {}", peers.join(", "));
        Check::warn("mtu", format!("{message}. {}", path::NARROW), WIDEN)
    })
}

fn acl_check(acl: &Acl, wanted: bool) -> Check {
    let Acl {
        attached,
        hook,
        why,
        shields_up: _,
        refuse: _,
    } = acl;
    match (attached, why) {
        (true, _) => {
            let hook = hook.as_deref().unwrap_or("tc");
            Check::ok(
                "acl",
                format!("the programs are attached by {hook}, both ways"),
            )
        }
        (false, Some(why)) => Check::fail(
            "acl",
            format!("the programs are not attached: {why}"),
            "The device stays down until they are: nothing passes unchecked.",
        ),
        (false, None) if wanted => Check::warn("acl", "the programs are not attached yet", ""),
        (false, None) => Check::ok("acl", "nothing to enforce: there is no device"),
    }
}

fn coordinator_check(coordinator: &Coordinator) -> Check {
    let name = "coordinator";
    let Coordinator {
        address,
        proxy,
        connected,
        why,
        ..
    } = coordinator;
    let Some(address) = address else {
        return Check::ok(name, "none named yet; the join token names one");
    };
    let by = proxy.as_ref().map(|proxy| format!(" by proxy {proxy}"));
    let by = by.unwrap_or_default();
    if *connected {
        return Check::ok(name, format!("connected to {address}{by}"));
    }
    let why = why.as_deref().unwrap_or("not connected yet");
    let reachable = takes_connections(proxy.as_ref().unwrap_or(address));
    let next = if proxy.is_some() {
        through_proxy(reachable)
    } else if reachable {
        "It takes TCP connections from here, so it is the conversation that fails: compare the \
         certificate's fingerprint with the one that `weir-coordinator serve` prints."
    } else {
        "It takes no TCP connection from here: check its address, its firewall, and whether it \
         runs. What is connected stays connected meanwhile."
    };
    let message = format!("not connected to {address}{by}: {why}");
    Check::warn(name, message, next)
}

/// Whether somebody at `HOST:PORT` takes a TCP connection from here.
fn takes_connections(address: &str) -> bool {
    address.to_socket_addrs().is_ok_and(|addrs| {
        addrs
            .into_iter()
            .any(|addr| TcpStream::connect_timeout(&addr, REACH).is_ok())
    })
}

/// What to do where the coordinator is not reached through a proxy that is, or is not, reachable.
fn through_proxy(reachable: bool) -> &'static str {
    if reachable {
        "The proxy takes TCP connections from here: ask whoever runs it to let CONNECT through to \
         the coordinator, or name the coordinator in NO_PROXY of the service if it is reached \
         directly."
    } else {
        "The proxy takes no TCP connection from here: check HTTPS_PROXY of the service, and \
         whether the proxy runs. What is connected stays connected meanwhile."
    }
}

fn text(checks: &[Check]) -> String {
    let width = checks
        .iter()
        .map(|check| check.name.len())
        .max()
        .unwrap_or_default();
    let mut text = String::new();
    for Check {
        name,
        state,
        message,
        next,
    } in checks
    {
        let state = match state {
            State::Ok => "ok  ",
            State::Warn => "warn",
            State::Fail => "FAIL",
        };
        text.push_str(&format!("{state}  {name:<width$}  {message}\n"));
        if !next.is_empty() {
            text.push_str(&format!("      {:<width$}  {next}\n", ""));
        }
    }
    text
}
