//! The node API: the calls of [`proto::control`], each acting for the channel's machine alone.

use super::error::{Refused, decode};
use super::pace::Pace;
use super::{Shutdown, ended};
use crate::network::CommandError;
use crate::network::node::{self, Machine};
use crate::presence::{Held, Presence};
use crate::store::{Store, Timestamp};
use crate::tls::Channel;
use crate::watch::{Updates, Watch};
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use proto::control::{
    Hello, HelloRequest, MAX_REQUEST_BYTES, PollMessage, PollRequest, ProofContext, RefusalCode,
    RegisterRequest, Registered, Report, VERSION, check_node_key,
};
use proto::key::{ChallengeKey, NodeSecret};
use proto::permit::{Permit, PermitSecret};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// What the calls need.
pub struct Nodes {
    /// The networks.
    pub store: Store,
    /// Their live state.
    pub watch: Arc<Watch>,
    /// Who is connected.
    pub presence: Arc<Presence>,
    /// How often each machine may call.
    pub pace: Pace,
    /// Node keys are proven against this; new with each process.
    pub challenge: NodeSecret,
    /// Signs permits to use relays.
    pub permits: PermitSecret,
    /// Ends the streams.
    pub shutdown: Shutdown,
}

type Shared = State<Arc<Nodes>>;

/// The calls.
pub fn router(nodes: Arc<Nodes>) -> Router {
    Router::new()
        .route("/v1/hello", post(hello))
        .route("/v1/register", post(register))
        .route("/v1/poll", post(poll))
        .route("/v1/report", post(report))
        .route("/v1/permit", post(permit))
        .route("/v1/logout", post(logout))
        .fallback(async || Refused::new(RefusalCode::BadRequest, "there is no such call"))
        .layer(DefaultBodyLimit::max(MAX_REQUEST_BYTES))
        .with_state(nodes)
}

/// The machine that calls for something that may change its network, if it does not too often.
fn caller(nodes: &Nodes, channel: &Channel) -> Result<Machine, Refused> {
    if !nodes.pace.allows(channel.machine, Instant::now()) {
        let message = "this machine asks for changes too often; wait a moment";
        return Err(Refused::new(RefusalCode::Unavailable, message));
    }
    Ok(Machine {
        id: channel.machine,
        addr: channel.remote.ip().to_canonical(),
    })
}

async fn hello(
    State(nodes): Shared,
    Extension(channel): Extension<Channel>,
    body: Bytes,
) -> Result<Json<Hello>, Refused> {
    let request: HelloRequest = decode(&body)?;
    if request.version != VERSION {
        let message = format!("this coordinator speaks version {VERSION}; update the older side");
        return Err(Refused::new(RefusalCode::Version, message));
    }
    let known = node::known(&nodes.store, channel.machine).await?;
    Ok(Json(Hello {
        version: VERSION,
        challenge: ChallengeKey(nodes.challenge.public().0),
        known: known.map(|row| row.id),
    }))
}

async fn register(
    State(nodes): Shared,
    Extension(channel): Extension<Channel>,
    body: Bytes,
) -> Result<Json<Registered>, Refused> {
    let request: RegisterRequest = decode(&body)?;
    let context = ProofContext {
        exporter: &channel.exporter,
        machine: channel.machine,
    };
    if !check_node_key(&nodes.challenge, request.key, context, &request.proof) {
        let message = "the proof of the WireGuard key does not hold on this connection";
        return Err(Refused::new(RefusalCode::Proof, message));
    }
    let machine = caller(&nodes, &channel)?;
    let done = node::register(&nodes.store, Timestamp::now(), machine, &request);
    Ok(Json(done.await?))
}

async fn report(
    State(nodes): Shared,
    Extension(channel): Extension<Channel>,
    body: Bytes,
) -> Result<Json<Value>, Refused> {
    let report: Report = decode(&body)?;
    let machine = caller(&nodes, &channel)?;
    let done = node::report(&nodes.store, Timestamp::now(), machine, &report);
    done.await?;
    Ok(Json(json!({})))
}

async fn permit(
    State(nodes): Shared,
    Extension(channel): Extension<Channel>,
    body: Bytes,
) -> Result<Json<Permit>, Refused> {
    let serde_json::Map { .. } = decode(&body)?;
    let machine = caller(&nodes, &channel)?;
    let row = node::known(&nodes.store, machine.id).await?;
    let row = row.ok_or(CommandError::NotANode)?;
    if !nodes.watch.has_relays(row.network).await? {
        return Err(CommandError::NoRelays.into());
    }
    Ok(Json(node::permit(&row, Timestamp::now(), &nodes.permits)))
}

async fn logout(
    State(nodes): Shared,
    Extension(channel): Extension<Channel>,
    body: Bytes,
) -> Result<Json<Value>, Refused> {
    let serde_json::Map { .. } = decode(&body)?;
    let done = node::logout(&nodes.store, Timestamp::now(), channel.machine);
    done.await?;
    Ok(Json(json!({})))
}

async fn poll(
    State(nodes): Shared,
    Extension(channel): Extension<Channel>,
    body: Bytes,
) -> Result<Response, Refused> {
    let PollRequest { base } = decode(&body)?;
    let machine = caller(&nodes, &channel)?;
    let connected = node::connect(&nodes.store, Timestamp::now(), machine);
    let (network, node, generation) = connected.await?;
    let updates = nodes
        .watch
        .subscribe(network, node, generation, base)
        .await?;
    let (held, replaced) = nodes.presence.enter(network, node);
    let shutdown = nodes.shutdown.clone();
    let stream = Stream {
        updates,
        replaced,
        shutdown,
        _held: held,
    };
    let lines = futures_util::stream::unfold(stream, async |mut stream| {
        let line = stream.line().await?;
        Some((Ok::<_, std::convert::Infallible>(line), stream))
    });
    let kind = HeaderValue::from_static("application/x-ndjson");
    Ok(([(header::CONTENT_TYPE, kind)], Body::from_stream(lines)).into_response())
}

/// One node's poll stream. It reads no faster than its node does: what it does not say at once
/// becomes part of the next delta.
struct Stream {
    updates: Updates,
    replaced: oneshot::Receiver<()>,
    shutdown: Shutdown,
    _held: Held,
}

impl Stream {
    /// The next line, or `None` when the stream ends: the node is gone, a newer stream of it came,
    /// or the coordinator stops.
    async fn line(&mut self) -> Option<Bytes> {
        let message = tokio::select! {
            message = self.updates.next() => message?,
            _ = &mut self.replaced => return None,
            () = ended(&mut self.shutdown) => return None,
        };
        encode(&message)
    }
}

fn encode(message: &PollMessage) -> Option<Bytes> {
    let mut line = serde_json::to_vec(message).ok()?;
    line.push(b'\n');
    Some(Bytes::from(line))
}
