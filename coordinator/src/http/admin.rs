//! The administrators' door: one call, `POST /v1/admin`, on a socket in the state folder.
//!
//! The kernel says who is at the other end; only root and the coordinator's own user may ask
//! anything. The command line is the only client today; what an answer looks like is therefore
//! what `--json` prints.

use super::error::{Refused, decode};
use crate::config::Advertise;
use crate::network::{self, Actor, CommandError, CompareError, InForce, NewToken, owner_text};
use crate::snapshot::addrs;
use crate::store::{AuditRow, NetworkRow, NodeRow, Store, Timestamp};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use axum::{Extension, Json, Router};
use proto::control::{JoinToken, RefusalCode};
use proto::id::{NetworkId, NodeId, RegionId};
use proto::key::{Fingerprint, NodeKey, PermitKey};
use proto::net::Prefix;
use proto::netmap::Owner;
use proto::policy::Diff;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Longest request: the largest policy, escaped.
const MAX_ADMIN_BYTES: usize = 64 << 20;
/// Version of every document that `--json` prints.
pub const JSON_VERSION: u32 = 1;

/// Who is at the other end of the local socket.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// By the kernel's word.
    pub uid: u32,
}

/// What the command line asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The network meant; may be missing when there is one.
    pub network: Option<String>,
    /// What to do.
    pub verb: Verb,
}

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Verb {
    /// `network create`.
    NetworkCreate {
        /// Its name.
        name: String,
        /// Its IPv4 prefix.
        v4: Option<Prefix>,
        /// Its IPv6 prefix.
        v6: Option<Prefix>,
    },
    /// `network list`.
    NetworkList,
    /// `user create`.
    UserCreate {
        /// Login.
        login: String,
    },
    /// `token create`.
    TokenCreate {
        /// Whose the nodes will be.
        owner: Owner,
        /// Admits more than one.
        reusable: bool,
        /// Nodes are removed when they stay away.
        ephemeral: bool,
        /// For how long it admits.
        valid_ms: u64,
    },
    /// `policy set`.
    PolicySet {
        /// The file's text.
        text: String,
        /// What the file is called, for messages.
        file: String,
        /// Whether to tell who may reach more or less.
        compare: bool,
    },
    /// `policy diff`.
    PolicyDiff {
        /// The file's text.
        text: String,
        /// What the file is called, for messages.
        file: String,
    },
    /// `policy get`.
    PolicyGet,
    /// `node list`.
    NodeList,
    /// `node remove`.
    NodeRemove {
        /// Its name.
        node: String,
    },
    /// `route approve`.
    RouteApprove {
        /// The node's name.
        node: String,
        /// The route.
        route: Prefix,
    },
    /// `relay key`.
    RelayKey,
    /// `audit list`.
    AuditList,
}

/// What comes back.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done {
        /// What is done, in a sentence.
        message: String,
    },
    /// Networks.
    Networks(Vec<NetworkDocument>),
    /// A join token. The only time that it is told.
    Token {
        /// What it is good for, in a sentence.
        message: String,
        /// The token.
        token: String,
    },
    /// The policy as it was written.
    Policy {
        /// `None`: there is none.
        text: Option<String>,
    },
    /// The policy is set.
    PolicySet {
        /// What is done, in a sentence.
        message: String,
        /// Who may reach more or less; if it was asked, and can be told.
        reach: Option<Reach>,
    },
    /// Who may reach more or less once the policy is another.
    Reach(Reach),
    /// Nodes.
    Nodes(Vec<NodeDocument>),
    /// What a relay's configuration needs to serve the network.
    RelayKey {
        /// The network's id.
        network: NetworkId,
        /// Checks the permits of its nodes.
        key: PermitKey,
    },
    /// The audit log.
    Audit {
        /// Oldest first.
        entries: Vec<AuditDocument>,
        /// The first entry that is not as it was written, if any.
        broken_at: Option<u64>,
    },
}

/// What a change of policy opens and closes.
#[derive(Serialize, Deserialize)]
pub struct Reach {
    /// Nothing.
    pub same: bool,
    /// For people.
    pub text: String,
    /// For programs, as `weir policy diff --json` prints it.
    pub document: serde_json::Value,
}

impl From<Diff> for Reach {
    fn from(diff: Diff) -> Self {
        Self {
            same: diff.is_empty(),
            text: diff.to_string(),
            document: diff.document(),
        }
    }
}

/// A network, as `network list --json` prints it.
#[derive(Serialize, Deserialize)]
pub struct NetworkDocument {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: u64,
    /// Nodes' IPv4 addresses come from here.
    pub v4: Prefix,
    /// Nodes' IPv6 addresses come from here.
    pub v6: Prefix,
    /// Raised by every change.
    pub generation: u64,
}

/// A node, as `node list --json` prints it.
#[derive(Serialize, Deserialize)]
pub struct NodeDocument {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: NodeId,
    /// Its addresses.
    pub addrs: Vec<IpAddr>,
    /// A user's login, or tags with commas between them.
    pub owner: String,
    /// Whether it holds a stream.
    pub online: bool,
    /// When it was last online, in RFC 3339.
    pub last_seen: String,
    /// When it joined, in RFC 3339.
    pub created: String,
    /// Whether it is removed when it stays away.
    pub ephemeral: bool,
    /// Its WireGuard public key.
    pub key: NodeKey,
    /// Where it says it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// Where the coordinator saw it.
    pub seen: Option<IpAddr>,
    /// Routes that it offers and that were approved.
    pub routes: BTreeSet<Prefix>,
    /// Routes that it offers and that wait for approval.
    pub routes_waiting: BTreeSet<Prefix>,
    /// The region whose relay it is connected to.
    pub home: Option<RegionId>,
}

/// An entry, as `audit list --json` prints it.
#[derive(Serialize, Deserialize)]
pub struct AuditDocument {
    /// Its place, from 1.
    pub number: u64,
    /// When, in RFC 3339.
    pub at: String,
    /// Who.
    pub actor: String,
    /// What, as `noun.verb`.
    pub action: String,
    /// To what.
    pub subject: String,
    /// The state before.
    pub before: String,
    /// The state after.
    pub after: String,
    /// Hash of this entry and of all before it.
    pub hash: String,
}

/// What the call needs.
pub struct Admin {
    /// The networks.
    pub store: Store,
    /// What join tokens call this coordinator; `None`: it does not know.
    pub advertise: Option<Advertise>,
    /// What join tokens pin.
    pub fingerprint: Fingerprint,
    /// Checks relay permits.
    pub permit_key: PermitKey,
    /// Who may ask, besides root.
    pub uid: u32,
}

/// The call.
pub fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/v1/admin", post(call))
        .fallback(async || Refused::new(RefusalCode::BadRequest, "there is no such call"))
        .layer(DefaultBodyLimit::max(MAX_ADMIN_BYTES))
        .with_state(admin)
}

async fn call(
    State(admin): State<Arc<Admin>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Answer>, Refused> {
    if caller.uid != 0 && caller.uid != admin.uid {
        let message = "only root and the coordinator's own user administrate it; use sudo";
        return Err(Refused::new(RefusalCode::BadRequest, message));
    }
    let request = decode(&body)?;
    let actor = Actor::Local { uid: caller.uid };
    admin
        .answer(request, &actor, Timestamp::now())
        .await
        .map(Json)
}

impl Admin {
    async fn answer(
        &self,
        request: Request,
        actor: &Actor,
        now: Timestamp,
    ) -> Result<Answer, Refused> {
        let store = &self.store;
        match request.verb {
            Verb::NetworkCreate { name, v4, v6 } => {
                let row = network::create(store, now, actor, (&name, v4, v6)).await?;
                Ok(done(format!(
                    "made the network `{}` with {} and {}",
                    row.name, row.v4, row.v6
                )))
            }
            Verb::NetworkList => {
                let rows = network::list(store).await?;
                Ok(Answer::Networks(
                    rows.iter().map(network_document).collect(),
                ))
            }
            Verb::TokenCreate { .. } if self.advertise.is_none() => {
                let message = "the coordinator listens on every address, so a token cannot say \
                               where it is; start it with `--advertise HOST:PORT`, as nodes \
                               reach it";
                Err(Refused::new(RefusalCode::BadRequest, message))
            }
            verb => {
                let network = network::find(store, request.network.as_deref()).await?;
                self.answer_in(&network, verb, actor, now).await
            }
        }
    }

    /// Answers what is asked of one network.
    async fn answer_in(
        &self,
        network: &NetworkRow,
        verb: Verb,
        actor: &Actor,
        now: Timestamp,
    ) -> Result<Answer, Refused> {
        let (store, id, name) = (&self.store, network.id, &network.name);
        Ok(match verb {
            Verb::NetworkCreate { .. } | Verb::NetworkList => {
                return Err(Refused::new(
                    RefusalCode::BadRequest,
                    "this is not about one network",
                ));
            }
            Verb::UserCreate { login } => {
                let login = network::create_user(store, now, actor, id, &login).await?;
                done(format!("made the user `{login}` in `{name}`"))
            }
            Verb::TokenCreate {
                owner,
                reusable,
                ephemeral,
                valid_ms,
            } => {
                let valid = Duration::from_millis(valid_ms);
                let new = NewToken {
                    owner,
                    reusable,
                    ephemeral,
                    valid,
                };
                self.token(network, new, actor, now).await?
            }
            Verb::PolicySet {
                text,
                file,
                compare,
            } => {
                let set = network::set_policy(store, now, actor, id, &text).await;
                let before = set.map_err(|error| policy_fault(error, &file))?;
                let message = format!("the policy of `{name}` is set");
                policy_set(message, before, compare.then_some(text)).await?
            }
            Verb::PolicyDiff { text, file } => {
                let before = network::in_force(store, id).await?;
                let compared = compare(before, text).await?;
                Answer::Reach(compared.map_err(|error| incomparable(error, &file))?)
            }
            Verb::PolicyGet => Answer::Policy {
                text: network::policy(store, id).await?,
            },
            Verb::NodeList => {
                let rows = network::nodes(store, id).await?;
                Answer::Nodes(
                    rows.into_iter()
                        .map(|row| node_document(network, row))
                        .collect(),
                )
            }
            Verb::NodeRemove { node } => {
                network::remove_node(store, now, actor, id, &node).await?;
                done(format!("removed `{node}` from `{name}`"))
            }
            Verb::RouteApprove { node, route } => {
                network::approve_route(store, now, actor, id, (&node, route)).await?;
                done(format!("`{node}` now serves {route}"))
            }
            Verb::RelayKey => Answer::RelayKey {
                network: id,
                key: self.permit_key,
            },
            Verb::AuditList => {
                let (rows, chain) = network::audit(store, id).await?;
                let broken_at = chain.broken_at();
                Answer::Audit {
                    entries: rows.into_iter().map(audit_document).collect(),
                    broken_at,
                }
            }
        })
    }

    async fn token(
        &self,
        network: &NetworkRow,
        new: NewToken,
        actor: &Actor,
        now: Timestamp,
    ) -> Result<Answer, Refused> {
        // Asked before anything was looked up.
        let advertise = self.advertise.as_ref().ok_or_else(Refused::unavailable)?;
        let made = network::create_token(&self.store, now, actor, network.id, new).await?;
        let (secret, row) = made;
        let token = JoinToken {
            address: advertise.as_str().to_owned(),
            fingerprint: self.fingerprint,
            secret,
        };
        let nodes = if row.reusable {
            "any number of nodes"
        } else {
            "one node"
        };
        let life = if row.ephemeral {
            " that are removed when they stay away"
        } else {
            ""
        };
        let (owner, name) = (owner_text(&row.owner), &network.name);
        let message = format!(
            "this token admits {nodes}{life} to `{name}` as {owner}, until {}",
            row.expires
        );
        Ok(Answer::Token {
            message,
            token: token.expose(),
        })
    }
}

/// The answer to `policy set`, with what has changed if the new text is there to compare with.
async fn policy_set(
    mut message: String,
    before: InForce,
    text: Option<String>,
) -> Result<Answer, Refused> {
    let mut reach = None;
    if let Some(text) = text {
        match compare(before, text).await? {
            Ok(compared) => reach = Some(compared),
            // It is set all the same.
            Err(error) => message += &format!("; what that changes cannot be told: {error}"),
        }
    }
    Ok(Answer::PolicySet { message, reach })
}

/// Why there is no answer to `policy diff`.
fn incomparable(error: CompareError, file: &str) -> Refused {
    match error {
        CompareError::New(faults) => {
            let message = format!("the policy would be refused\n{}", faults.render(file));
            Refused::new(RefusalCode::BadRequest, message)
        }
        CompareError::Old(_) | CompareError::TooLarge(_) => {
            Refused::new(RefusalCode::BadRequest, error.to_string())
        }
    }
}

/// Who may reach more or less than `before`, on a thread of its own.
async fn compare(before: InForce, text: String) -> Result<Result<Reach, CompareError>, Refused> {
    let compared = tokio::task::spawn_blocking(move || before.diff(&text).map(Reach::from)).await;
    compared.map_err(|_| Refused::unavailable())
}

/// A fault of the policy, with the name of the file that it was read from.
fn policy_fault(error: CommandError, file: &str) -> Refused {
    match error {
        CommandError::Policy(faults) => {
            let message = format!(
                "the policy is refused, nothing changed\n{}",
                faults.render(file)
            );
            Refused::new(RefusalCode::BadRequest, message)
        }
        other => other.into(),
    }
}

fn done(message: String) -> Answer {
    Answer::Done { message }
}

fn network_document(row: &NetworkRow) -> NetworkDocument {
    NetworkDocument {
        name: row.name.clone(),
        id: row.id.0,
        v4: row.v4,
        v6: row.v6,
        generation: row.generation.0,
    }
}

fn node_document(network: &NetworkRow, row: NodeRow) -> NodeDocument {
    NodeDocument {
        addrs: addrs((network.v4, network.v6), row.host).to_vec(),
        name: row.name,
        id: row.id,
        owner: owner_text(&row.owner),
        online: row.online,
        last_seen: row.last_seen.to_string(),
        created: row.created.to_string(),
        ephemeral: row.ephemeral,
        key: row.key,
        endpoints: row.endpoints,
        seen: row.seen_addr,
        routes: &row.advertised & &row.approved,
        routes_waiting: &row.advertised - &row.approved,
        home: row.home,
    }
}

fn audit_document(row: AuditRow) -> AuditDocument {
    AuditDocument {
        number: row.number,
        at: row.at.to_string(),
        actor: row.actor,
        action: row.action,
        subject: row.subject,
        before: row.before,
        after: row.after,
        hash: data_encoding::HEXLOWER.encode(&row.hash),
    }
}
