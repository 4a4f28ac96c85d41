//! The command line: what can be said, and the conversation with the running coordinator.
//!
//! Every verb but `serve` is a call on the local socket of the coordinator that runs on the same
//! state folder. Standard output carries the result and nothing else.

mod print;

use crate::config::{Advertise, Flags};
use crate::http::admin::{Answer, Request, Verb};
use crate::server::ADMIN_SOCKET;
use clap::{ArgGroup, Args, Parser, Subcommand};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
pub use print::print;
use proto::control::Refusal;
use proto::net::Prefix;
use proto::netmap::Owner;
use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// Largest policy file: what the parser takes, and what keeps a wrong file name from filling memory.
const MAX_POLICY_BYTES: u64 = 16 << 20;
/// Where help lists what every command takes: after the command's own.
const EVERYWHERE: &str = "Options of every command";

/// weir's coordinator: tells the nodes of a network about each other. It holds public keys,
/// policy and addresses; traffic never passes through it.
#[derive(Debug, Parser)]
#[command(name = "weir-coordinator", version, propagate_version = true)]
pub struct Cli {
    /// Folder of the coordinator's state
    #[arg(
        long,
        global = true,
        help_heading = EVERYWHERE,
        value_name = "DIR",
        default_value = "/var/lib/weir-coordinator"
    )]
    pub state_dir: PathBuf,
    /// Print one JSON document
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub json: bool,
    /// The network meant; may be left out when there is one
    #[arg(
        long,
        global = true,
        help_heading = EVERYWHERE,
        value_name = "NAME"
    )]
    pub network: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the coordinator
    Serve(Serve),
    /// Make and list networks
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Make users
    #[command(subcommand)]
    User(UserCommand),
    /// Make join tokens
    #[command(subcommand)]
    Token(TokenCommand),
    /// Set and show the policy
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// List and remove nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// Approve routes that nodes offer
    #[command(subcommand)]
    Route(RouteCommand),
    /// Show what relays need to serve the network
    #[command(subcommand)]
    Relay(RelayCommand),
    /// Show who changed what
    #[command(subcommand)]
    Audit(AuditCommand),
}

/// Flags of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// Where nodes connect to [default: 0.0.0.0:8443]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// What join tokens call this coordinator [default: the listen address, if it is concrete]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<Advertise>,
    /// sqlite:PATH or postgres://USER@HOST/NAME [default: SQLite in the state folder].
    /// A URL with a password belongs into the configuration file.
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// A TOML file; flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl From<Serve> for Flags {
    fn from(serve: Serve) -> Self {
        let Serve {
            listen,
            advertise,
            database,
            config,
        } = serve;
        Self {
            listen,
            advertise,
            database,
            file: config,
        }
    }
}

/// `network …`
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Make a network
    Create {
        /// Lower-case letters, digits and hyphens
        name: String,
        /// Nodes' IPv4 addresses come from here [default: 100.64.0.0/10]
        #[arg(long, value_name = "CIDR")]
        v4: Option<Prefix>,
        /// Nodes' IPv6 addresses come from here [default: a random fd…/48]
        #[arg(long, value_name = "CIDR")]
        v6: Option<Prefix>,
    },
    /// List the networks
    List,
}

/// `user …`
#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Make a user
    Create {
        /// The login, as policy names it
        #[arg(value_name = "NAME@DOMAIN")]
        login: String,
    },
}

/// `token …`
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a join token; it alone is the last line printed
    #[command(group(ArgGroup::new("owner").required(true).args(["user", "tag"])))]
    Create {
        /// Nodes that join belong to this user
        #[arg(long, value_name = "NAME@DOMAIN")]
        user: Option<String>,
        /// Nodes that join carry this tag; may be given more than once
        #[arg(long, value_name = "tag:NAME", value_delimiter = ',')]
        tag: Vec<String>,
        /// Admit any number of nodes, not one
        #[arg(long)]
        reusable: bool,
        /// Remove the nodes when they stay away
        #[arg(long)]
        ephemeral: bool,
        /// For how long it admits
        #[arg(long, value_name = "TIME", default_value = "24h",
              value_parser = humantime::parse_duration)]
        expires: Duration,
    },
}

/// `policy …`
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Replace the policy, if the file is right
    Set {
        /// HuJSON; `-` is standard input
        file: PathBuf,
    },
    /// Tell who may reach more or less if this became the policy; exits with 0 if nobody, with 1
    /// if somebody
    Diff {
        /// HuJSON; `-` is standard input
        file: PathBuf,
    },
    /// Print the policy as it was written
    Get,
}

/// `node …`
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the network's nodes
    List,
    /// Take a node out of the network
    Remove {
        /// Its name
        node: String,
    },
}

/// `route …`
#[derive(Debug, Subcommand)]
pub enum RouteCommand {
    /// Let a node serve a route that it offers
    Approve {
        /// The node's name
        node: String,
        /// The route
        #[arg(value_name = "CIDR")]
        route: Prefix,
    },
}

/// `relay …`
#[derive(Debug, Subcommand)]
pub enum RelayCommand {
    /// Print the section that a relay's configuration needs to serve the network: its id, and the
    /// public key of the permits that its nodes show
    Key,
}

/// `audit …`
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// List who changed what, oldest first
    List,
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens on the socket.
    #[error(
        "no coordinator runs on {0}; start it with `weir-coordinator serve --state-dir {0}`, or \
         name its folder with --state-dir"
    )]
    NotRunning(String),
    /// The socket is not for us.
    #[error("only root and the coordinator's own user may ask it; use sudo")]
    NotAllowed,
    /// The conversation broke off.
    #[error("the coordinator did not answer; look into its log")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The coordinator said no.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// A file of ours cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// See [`MAX_POLICY_BYTES`].
    #[error("{0} is no policy: it is larger than 16 MiB")]
    FileSize(PathBuf),
}

impl Command {
    /// Whether exit code 1 is an answer, so that 2 tells of trouble, as diff(1) has it.
    #[must_use]
    pub fn compares(&self) -> bool {
        matches!(self, Self::Policy(PolicyCommand::Diff { .. }))
    }

    /// What to ask the running coordinator; `None` for `serve`, which is not a question. With
    /// `compare`, a new policy comes back with who may reach more or less.
    ///
    /// # Errors
    /// If a file that the command names cannot be read.
    pub fn verb(self, compare: bool) -> Result<Option<Verb>, CallError> {
        Ok(Some(match self {
            Self::Serve(_) => return Ok(None),
            Self::Network(NetworkCommand::Create { name, v4, v6 }) => {
                Verb::NetworkCreate { name, v4, v6 }
            }
            Self::Network(NetworkCommand::List) => Verb::NetworkList,
            Self::User(UserCommand::Create { login }) => Verb::UserCreate { login },
            Self::Token(TokenCommand::Create {
                user,
                tag,
                reusable,
                ephemeral,
                expires,
            }) => {
                let owner = match user {
                    Some(login) => Owner::User(login),
                    None => Owner::Tags(BTreeSet::from_iter(tag)),
                };
                let valid_ms = u64::try_from(expires.as_millis()).unwrap_or(u64::MAX);
                Verb::TokenCreate {
                    owner,
                    reusable,
                    ephemeral,
                    valid_ms,
                }
            }
            Self::Policy(PolicyCommand::Set { file }) => Verb::PolicySet {
                text: read_policy(&file)?,
                file: file.display().to_string(),
                compare,
            },
            Self::Policy(PolicyCommand::Diff { file }) => Verb::PolicyDiff {
                text: read_policy(&file)?,
                file: file.display().to_string(),
            },
            Self::Policy(PolicyCommand::Get) => Verb::PolicyGet,
            Self::Node(NodeCommand::List) => Verb::NodeList,
            Self::Node(NodeCommand::Remove { node }) => Verb::NodeRemove { node },
            Self::Route(RouteCommand::Approve { node, route }) => {
                Verb::RouteApprove { node, route }
            }
            Self::Relay(RelayCommand::Key) => Verb::RelayKey,
            Self::Audit(AuditCommand::List) => Verb::AuditList,
        }))
    }
}

fn read_policy(path: &Path) -> Result<String, CallError> {
    let failed = |source| CallError::File {
        path: path.to_owned(),
        source,
    };
    let reader: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(std::fs::File::open(path).map_err(failed)?)
    };
    let mut text = String::new();
    reader
        .take(MAX_POLICY_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_POLICY_BYTES {
        return Err(CallError::FileSize(path.to_owned()));
    }
    Ok(text)
}

/// Asks the coordinator that runs on this state folder.
///
/// # Errors
/// If none runs there, it does not answer, or it says no.
pub async fn call(state_dir: &Path, request: &Request) -> Result<Answer, CallError> {
    let stream = UnixStream::connect(state_dir.join(ADMIN_SOCKET))
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => CallError::NotAllowed,
            _ => CallError::NotRunning(state_dir.display().to_string()),
        })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let driver = tokio::spawn(connection);
    let body = serde_json::to_vec(request).map_err(broken)?;
    let request = hyper::Request::post("/v1/admin")
        .header(hyper::header::HOST, "coordinator")
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(broken)?;
    let response = sender.send_request(request).await.map_err(broken)?;
    let refused = !response.status().is_success();
    let body = response
        .into_body()
        .collect()
        .await
        .map_err(broken)?
        .to_bytes();
    driver.abort();
    if refused {
        return Err(CallError::Refused(
            serde_json::from_slice(&body).map_err(broken)?,
        ));
    }
    serde_json::from_slice(&body).map_err(broken)
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> CallError {
    CallError::Broken(Box::new(error))
}
