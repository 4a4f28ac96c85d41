//! The local API: how the command line talks with the agent.
//!
//! A unix socket carries one JSON value a line. The client writes a [`RequestLine`], the agent
//! answers with a [`ResponseLine`], in order, as often as the client likes:
//!
//! ```text
//! → {"version":1,"request":"status"}
//! ← {"version":1,"response":{"status":{"interface":{"name":"weir0", …}, …}}}
//! ```
//!
//! Only [`Request::Monitor`] and [`Request::Record`] are answered with more than one line: after the
//! first one the agent goes on, a line whenever there is something to tell, until the client hangs up.
//!
//! Anyone on the machine may connect and read ([`Access::Read`]); verbs that change something
//! ([`Access::Change`]) or show other users' traffic ([`Access::Watch`]) are for root and for the
//! user that the agent runs as, told by the kernel (`SO_PEERCRED`), each time, per verb. No answer carries a secret; a join token is the only
//! secret that a request may carry, and it does not print.
//!
//! This module knows the types, the server ([`Server`]) and the client ([`ask`]). It decides
//! nothing: a permitted request goes as a [`Call`] to the daemon, which answers it in its own time.
//!
//! Version 1 is stable: fields are only ever added. [`report`] documents every document.

mod client;
pub mod report;
mod server;

pub use client::{AskError, ask, follow};
pub use server::{BindError, Server};

use proto::control::{JoinToken, ParseTokenError};
use proto::net::{Prefix, Protocol};
use report::{
    Counters, Explanation, GuardMode, Netcheck, PeerPath, PeerStatus, PingTarget, Refuse, Seen,
    Status,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

/// The version of this API and of the documents that `--json` prints.
pub const VERSION: u32 = 1;

/// Longest request, in bytes: the most routes that a node may serve, and the rest.
pub const MAX_REQUEST_BYTES: usize = 128 << 10;
/// Longest answer that the client takes, in bytes: the status of the most peers.
pub const MAX_RESPONSE_BYTES: u64 = 256 << 20;

/// One request, as it stands on the socket.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLine {
    /// [`VERSION`].
    pub version: u32,
    /// What is asked.
    pub request: Request,
}

/// One answer, as it stands on the socket.
#[derive(Serialize, Deserialize)]
pub struct ResponseLine {
    /// [`VERSION`].
    pub version: u32,
    /// The answer.
    pub response: Response,
}

/// What the command line asks of the agent.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Join, or come up again as the node that this machine already is. Answered with
    /// [`Response::Status`] when the device has an address and the ACL is attached, or with
    /// [`Response::Refused`]; the client stops waiting after its own time.
    Up(Up),
    /// Take the device and everything that belongs to it away.
    Down {
        /// Also leave the network and forget identity and state.
        purge: bool,
    },
    /// Change settings of this node. Answered with [`Response::Done`] when they are in force.
    Set(Set),
    /// How the agent is.
    Status,
    /// All peers and how they are.
    Peers,
    /// Who `peer` is, how it is reached, and whether policy lets an echo request out to it. The
    /// client sends the echo requests.
    Ping {
        /// A peer's name or one of its addresses.
        peer: String,
    },
    /// How a peer is reached, and why so.
    Path {
        /// A peer's name or one of its addresses.
        peer: String,
    },
    /// What the loaded tables say of a first packet.
    Explain(Explain),
    /// The programs' counters.
    Counters,
    /// How the world sees this node.
    Netcheck,
    /// Dropped packets, as they are dropped.
    Monitor(Monitor),
    /// What the agent's decisions came from since its start, and what comes.
    Record {
        /// Let it decide everything anew first.
        anew: bool,
    },
}

/// See [`Request::Monitor`]. What is `None` does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Monitor {
    /// Only packets that were dropped for this reason.
    pub reason: Option<String>,
    /// Only packets from or to this node or address.
    pub peer: Option<String>,
}

/// See [`Request::Up`]. What is `None` stays as it was.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Up {
    /// Admits this machine to a network. Not needed by a machine that is already a node.
    pub token: Option<TokenText>,
    /// What to be called in the network.
    pub hostname: Option<String>,
    /// Subnets to offer.
    pub routes: Option<BTreeSet<Prefix>>,
}

/// See [`Request::Set`]. What is `None` stays as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Set {
    /// Whether no new flow from others is let in, whatever policy says.
    pub shields_up: Option<bool>,
    /// What becomes of packets that this node refuses to send.
    pub refuse: Option<Refuse>,
    /// Whether and how WireGuard's port is guarded.
    pub guard: Option<GuardMode>,
    /// Whether the router is asked for a port.
    #[serde(default)]
    pub port_mapping: Option<bool>,
}

/// See [`Request::Explain`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Explain {
    /// Who initiates: an address, or the name of a node that this one knows.
    pub src: String,
    /// To whom: likewise.
    pub dst: String,
    /// The destination port, where the protocol has one.
    pub port: Option<u16>,
    /// The protocol.
    pub protocol: Protocol,
}

/// A join token as text, on its way from the command line to the agent. Does not print.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenText(Zeroizing<String>);

impl TokenText {
    /// The text of `token`.
    #[must_use]
    pub fn new(token: &JoinToken) -> Self {
        Self(Zeroizing::new(token.expose()))
    }

    /// The token.
    ///
    /// # Errors
    /// [`ParseTokenError`] if a client sent something else.
    pub fn parse(&self) -> Result<JoinToken, ParseTokenError> {
        self.0.parse()
    }
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// To [`Request::Down`] and [`Request::Set`]: it is done. The sentences tell what else there is
    /// to know (the coordinator could not be told, say); most often there are none.
    Done(Vec<String>),
    /// To [`Request::Status`] and, when it is up, to [`Request::Up`].
    Status(Box<Status>),
    /// To [`Request::Peers`], by name.
    Peers(Vec<PeerStatus>),
    /// To [`Request::Ping`].
    Ping(Box<PingTarget>),
    /// To [`Request::Path`].
    Path(Box<PeerPath>),
    /// To [`Request::Explain`].
    Explanation(Box<Explanation>),
    /// To [`Request::Counters`], by direction, verdict and reason.
    Counters(Counters),
    /// To [`Request::Netcheck`].
    Netcheck(Box<Netcheck>),
    /// To [`Request::Monitor`], again and again.
    Seen(Seen),
    /// To [`Request::Record`], again and again: lines of a trace (`engine/src/trace.rs`).
    Trace(String),
    /// To anything: it is not done.
    Refused(Refused),
}

/// Why the agent did not do what was asked. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// What a program branches on.
    pub code: RefusedCode,
    /// What is wrong, as a sentence.
    pub message: String,
    /// What to do next, as a sentence; empty where there is nothing.
    pub next: String,
}

/// Kinds of refusal. Stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusedCode {
    /// The request cannot be read, or its version is unknown.
    BadRequest,
    /// This user may not do that.
    NotPermitted,
    /// This machine is not a node of any network yet: a token is needed.
    NotJoined,
    /// The coordinator refused: its sentence is the message.
    Coordinator,
    /// No node of this name or address is known here.
    UnknownPeer,
    /// The kernel or the state folder refused.
    Failed,
    /// The agent is stopping or busy.
    Unavailable,
}

/// What a request needs of whoever sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Any user of this machine.
    Read,
    /// Root, or the user that the agent runs as: it shows what other users send and receive.
    Watch,
    /// Root, or the user that the agent runs as.
    Change,
}

impl Request {
    /// What this request needs of its sender.
    #[must_use]
    pub fn access(&self) -> Access {
        match self {
            Self::Up(_) | Self::Down { .. } | Self::Set(_) | Self::Record { .. } => Access::Change,
            Self::Monitor(_) => Access::Watch,
            Self::Status
            | Self::Peers
            | Self::Ping { .. }
            | Self::Path { .. }
            | Self::Explain(_)
            | Self::Counters
            | Self::Netcheck => Access::Read,
        }
    }
}

/// A permitted request on its way to the daemon. Dropping `reply` tells the client that the agent
/// is stopping.
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Response>,
    /// Where more goes after it, for a request that is answered with a stream. Closed when the
    /// client hangs up; dropping it ends the stream.
    pub more: Option<mpsc::Sender<Response>>,
}
