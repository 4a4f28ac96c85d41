//! The two doors: nodes over TLS ([`node`]), administrators over the local socket ([`admin`]).
//!
//! A door decodes, calls `network` or `watch`, and encodes. Here is what both share: the accept
//! loops, their limits, and an end that does not wait for streams.

pub mod admin;
pub mod error;
pub mod node;
pub mod pace;

use crate::tls::Channel;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use error::Refused;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Most connections at once, of nodes; one more waits in the kernel's queue.
const MAX_CONNECTIONS: u32 = 65_536;
/// Most connections at once on the local socket.
const MAX_ADMIN_CONNECTIONS: usize = 64;
/// Longest TLS handshake, and longest wait for a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest time from a request's head to its answer's, the request's body included. Streams go on
/// after that.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A node's connection is dead when it leaves packets unanswered for this long (RFC 5482).
const DEAD_PEER: Duration = Duration::from_secs(proto::control::STREAM_DEAD_SECONDS);
/// Pause when the kernel has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Becomes `true` when everything is to end.
pub type Shutdown = watch::Receiver<bool>;

/// Returns when everything is to end.
pub async fn ended(shutdown: &mut Shutdown) {
    // An error means that the server itself is gone.
    let _ = shutdown.wait_for(|end| *end).await;
}

/// Serves nodes until the shutdown.
pub async fn serve_nodes(
    listener: TcpListener,
    tls: TlsAcceptor,
    router: Router,
    mut shutdown: Shutdown,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ended(&mut shutdown) => break,
        };
        let Ok((stream, remote)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (tls, router, shutdown) = (tls.clone(), router.clone(), shutdown.clone());
        tokio::spawn(async move {
            let _place = place;
            watch_for_dead_peer(&stream);
            let Ok(Ok(stream)) = timeout(HEAD_TIMEOUT, tls.accept(stream)).await else {
                tracing::debug!("a connection ended in its handshake");
                return;
            };
            if let Some(channel) = Channel::of(stream.get_ref().1, remote) {
                serve_connection(stream, router, channel, shutdown).await;
            }
        });
    }
    // When every place is free, every connection has ended.
    let _ = places.acquire_many(MAX_CONNECTIONS).await;
}

/// Serves the local socket until the shutdown.
pub async fn serve_admin(listener: UnixListener, router: Router, mut shutdown: Shutdown) {
    let places = Arc::new(Semaphore::new(MAX_ADMIN_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ended(&mut shutdown) => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(peer) = stream.peer_cred() else {
            continue;
        };
        let caller = admin::Caller { uid: peer.uid() };
        let (router, shutdown) = (router.clone(), shutdown.clone());
        tokio::spawn(async move {
            let _place = place;
            serve_connection(stream, router, caller, shutdown).await;
        });
    }
}

fn watch_for_dead_peer(stream: &TcpStream) {
    let millis = u32::try_from(DEAD_PEER.as_millis()).unwrap_or(u32::MAX);
    // Without these a dead peer is only noticed later.
    let _ = rustix::net::sockopt::set_tcp_user_timeout(stream, millis);
    let _ = stream.set_nodelay(true);
}

/// Serves one connection whose requests all carry `who`.
async fn serve_connection<S, W>(stream: S, router: Router, who: W, mut shutdown: Shutdown)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    W: Clone + Send + Sync + 'static,
{
    let inner = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(who.clone());
        let answer = hyper::service::Service::call(&inner, request.map(Body::new));
        async move {
            Ok::<Response, Infallible>(match timeout(ANSWER_TIMEOUT, answer).await {
                Ok(Ok(response)) => response,
                Ok(Err(never)) => match never {},
                Err(_) => Refused::unavailable().into_response(),
            })
        }
    });
    let mut connection = pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
    );
    tokio::select! {
        // How a connection ends is its peer's business.
        _ = connection.as_mut() => {}
        () = ended(&mut shutdown) => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}
