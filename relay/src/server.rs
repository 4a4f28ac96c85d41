//! A running relay: its state folder, its three doors and its tasks, started and stopped as one.
//!
//! Doors: DERP over TCP (with TLS or without), STUN over UDP, and a page of health and counters that
//! is shown on this machine alone unless asked otherwise.

use crate::acme::{Condition, Keeper};
use crate::admit::Admission;
use crate::config::{Certificate, Config};
use crate::http::{self, Request};
use crate::metrics::Metrics;
use crate::region;
use crate::session::{End, Session, Shared};
use crate::stun;
use crate::switch::Switch;
use crate::tls::{self, CHALLENGE_PROTOCOL, Identity, Shown, TlsError};
use crate::websocket;
use bytes::BytesMut;
use proto::derp::LOGIN_TIMEOUT;
use proto::key::{Fingerprint, NodeKey, RelayKey};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use socket2::SockRef;
use std::fs::{DirBuilder, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Connections that the kernel completes before they are accepted: many come back at once when a
/// relay starts again.
const BACKLOG: i32 = 4_096;
const LOCK_FILE: &str = "lock";
/// Most connections at once; one more waits in the kernel's queue.
const MAX_CONNECTIONS: u32 = 65_536;
/// Most connections at once to the page of health and counters.
const MAX_STATUS_CONNECTIONS: u32 = 16;
/// A connection is dead when it leaves packets unanswered for this long (RFC 5482).
const DEAD_PEER_MILLIS: u32 = 15_000;
/// Bytes for one client that wait in the kernel: more would only be late, and keep discovery and the
/// fresh behind the old.
const UNSENT_BYTES: u32 = 128 << 10;
/// Pause when the kernel has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for clients to take the word that the relay stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the relay does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state folder cannot be used.
    #[error("cannot use the state folder {path}")]
    StateDir {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Two relays cannot share a state folder.
    #[error("a relay runs on {0} already; give this one another --state-dir")]
    Running(PathBuf),
    /// The address is not ours, or taken.
    #[error("cannot listen on {addr}{}", advice(source))]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// See [`TlsError`].
    #[error("there is no key or certificate to show")]
    Tls(#[from] TlsError),
}

/// What to do about an address that cannot be had.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            " (another program has this port: stop it, or name another port)"
        }
        io::ErrorKind::AddrNotAvailable => {
            " (this machine has no such address: `ip addr` shows those that it has)"
        }
        io::ErrorKind::PermissionDenied => {
            " (ports below 1024 need root or CAP_NET_BIND_SERVICE, which the unit has)"
        }
        _ => "",
    }
}

/// A running relay.
pub struct Server {
    /// Where nodes connect to.
    pub addr: SocketAddr,
    /// Where STUN is answered.
    pub stun_addr: SocketAddr,
    /// Where health and counters are shown.
    pub status_addr: SocketAddr,
    /// The relay's key.
    pub key: RelayKey,
    /// Its certificate, if it speaks TLS.
    pub fingerprint: Option<Fingerprint>,
    shared: Arc<Shared>,
    shutdown: watch::Sender<bool>,
    /// The connections to the region's other relays.
    region: JoinSet<()>,
    derp: JoinHandle<()>,
    others: Vec<JoinHandle<()>>,
    _lock: File,
}

impl Server {
    /// Starts it, in the tokio runtime that this is called in. When this returns, it answers.
    ///
    /// # Errors
    /// If the state folder, the certificate or an address cannot be used.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let dir = &config.state_dir;
        let lock = take_state_dir(dir)?;
        let secret = tls::relay_secret(dir)?;
        let key = RelayKey(secret.public().0);
        let metrics = Arc::new(Metrics::default());
        let secured = Secured::new(config.certificate, dir, key, &metrics)?;
        if matches!(config.admission, Admission::Open) {
            tracing::warn!(
                "--admit open: ANYBODY may use this relay, and all who do see each other; \
                 this is for tests alone"
            );
        }
        let (listener, addr) = listen(config.listen)?;
        let (status, status_addr) = listen(config.status_listen)?;
        let (udp, stun_addr) = listen_udp(config.stun_listen)?;

        let keys = config.region.iter().map(|relay| NodeKey(relay.key.0));
        let shared = Arc::new(Shared {
            relays: keys.filter(|relay| relay.0 != key.0).collect(),
            switch: Switch::new(Arc::clone(&metrics)),
            admission: config.admission,
            secret,
            rate: config.rate,
            metrics: Arc::clone(&metrics),
        });
        let (shutdown, ends) = watch::channel(false);
        let door = Door {
            shared: Arc::clone(&shared),
            tls: secured.tls,
            condition: secured.condition.clone(),
            most: MAX_CONNECTIONS,
            page: false,
        };
        let page = Door {
            shared: Arc::clone(&shared),
            tls: None,
            condition: secured.condition,
            most: MAX_STATUS_CONNECTIONS,
            page: true,
        };
        let derp = tokio::spawn(door.serve(listener, ends.clone()));
        let mut others = vec![
            tokio::spawn(page.serve(status, ends)),
            tokio::spawn(stun::serve(udp, metrics)),
        ];
        // Now that the door is open, an authority may come and look.
        others.extend(secured.keeper.map(|keeper| tokio::spawn(keeper.keep())));
        Ok(Self {
            addr,
            stun_addr,
            status_addr,
            key,
            fingerprint: secured.fingerprint,
            shutdown,
            region: region::join(config.region, &shared),
            shared,
            derp,
            others,
            _lock: lock,
        })
    }

    /// Tells every client that the relay ends, and waits until they have heard it, for a while.
    pub async fn stop(mut self) {
        // No new connections, then the word to those there are.
        let _ = self.shutdown.send(true);
        self.shared.switch.stop();
        self.region.abort_all();
        let _ = timeout(STOP_TIMEOUT, self.derp).await;
        for task in self.others {
            task.abort();
        }
    }
}

/// How the DERP door speaks TLS.
struct Secured {
    tls: Option<TlsAcceptor>,
    /// Of a certificate that stays.
    fingerprint: Option<Fingerprint>,
    /// With an authority: who asks it, and how that goes.
    keeper: Option<Keeper>,
    condition: Option<watch::Receiver<Condition>>,
}

impl Secured {
    fn new(
        certificate: Certificate,
        dir: &Path,
        relay: RelayKey,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, TlsError> {
        let shown = Arc::new(Shown::default());
        let mut secured = Self {
            tls: None,
            fingerprint: None,
            keeper: None,
            condition: None,
        };
        let identity = match certificate {
            Certificate::Off => return Ok(secured),
            Certificate::Own => Some(Identity::load_or_create(dir)?),
            Certificate::Given { certificate, key } => Some(Identity::read(&certificate, &key)?),
            Certificate::Acme(acme) => {
                let (shown, metrics) = (Arc::clone(&shown), Arc::clone(metrics));
                let (keeper, heard) = Keeper::start(acme, dir, relay, shown, metrics)?;
                secured.keeper = Some(keeper);
                secured.condition = Some(heard);
                None
            }
        };
        if let Some(identity) = identity {
            secured.fingerprint = Some(identity.fingerprint());
            shown.show(identity.certified(relay)?);
        }
        let config = tls::server_config(shown, secured.keeper.is_some())?;
        secured.tls = Some(TlsAcceptor::from(Arc::new(config)));
        Ok(secured)
    }
}

/// A client that has logged in, on the bare stream or inside a WebSocket.
enum Opened<S> {
    Plain(Session<S>),
    WebSocket(Pin<Box<dyn Future<Output = End> + Send>>),
}

/// One listening address and what is offered there.
struct Door {
    shared: Arc<Shared>,
    tls: Option<TlsAcceptor>,
    /// With an authority, how its certificate is.
    condition: Option<watch::Receiver<Condition>>,
    most: u32,
    /// Whether this is the page of health and counters, and not DERP.
    page: bool,
}

impl Door {
    async fn serve(self, listener: TcpListener, mut ends: watch::Receiver<bool>) {
        let door = Arc::new(self);
        let places = Arc::new(Semaphore::new(door.most as usize));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = ends.wait_for(|end| *end) => break,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let (door, mut ends) = (Arc::clone(&door), ends.clone());
            tokio::spawn(async move {
                let _place = place;
                door.connection(stream, &mut ends).await;
            });
        }
        drop(listener);
        // When every place is free, every connection has ended.
        let _ = places.acquire_many(door.most).await;
    }

    async fn connection(&self, stream: TcpStream, ends: &mut watch::Receiver<bool>) {
        // Without these a dead peer is only noticed later.
        let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, DEAD_PEER_MILLIS);
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
        let metrics = &self.shared.metrics;
        Metrics::add(&metrics.accepted, 1);
        Metrics::add(&metrics.connections, 1);
        self.secured(stream, ends).await;
        Metrics::take(&metrics.connections, 1);
    }

    async fn secured(&self, stream: TcpStream, ends: &mut watch::Receiver<bool>) {
        let Some(tls) = &self.tls else {
            return self.stream(stream, ends).await;
        };
        let accepted = tokio::select! {
            accepted = timeout(LOGIN_TIMEOUT, tls.accept(stream)) => accepted,
            _ = ends.wait_for(|end| *end) => return,
        };
        match accepted {
            // An authority has seen what it wanted to see, and says nothing (RFC 8737 3).
            Ok(Ok(stream)) if stream.get_ref().1.alpn_protocol() == Some(CHALLENGE_PROTOCOL) => {}
            Ok(Ok(stream)) => self.stream(stream, ends).await,
            Ok(Err(_)) | Err(_) => tracing::debug!("a TLS handshake failed"),
        }
    }

    async fn stream<S>(&self, stream: S, ends: &mut watch::Receiver<bool>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let opened = tokio::select! {
            opened = timeout(LOGIN_TIMEOUT, self.open(stream)) => match opened {
                Ok(Some(opened)) => opened,
                Ok(None) => return,
                Err(_) => {
                    tracing::debug!("a login took too long");
                    return;
                }
            },
            _ = ends.wait_for(|end| *end) => return,
        };
        // A session ends itself when the switch stops: it has a last word to say.
        let end = match opened {
            Opened::Plain(session) => session.run().await,
            Opened::WebSocket(end) => end.await,
        };
        tracing::debug!(reason = %end, "a client left");
    }

    /// Answers the request, and logs the client in if that is what it wants.
    async fn open<S>(&self, mut stream: S) -> Option<Opened<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut buffer = BytesMut::new();
        let request = http::read(&mut stream, &mut buffer).await.ok()?;
        let shared = Arc::clone(&self.shared);
        match request {
            Request::Derp { fast } if !self.page => {
                let greeting = if fast {
                    String::new()
                } else {
                    http::switching(shared.key())
                };
                let login = Session::login(stream, greeting, buffer, shared).await;
                self.logged_in(login).map(Opened::Plain)
            }
            Request::WebSocket { accept } if !self.page => {
                // On the heap, all of it: clients without one do not pay for its size.
                let login = Box::pin(async move {
                    let answer = http::switching_to_websocket(&accept);
                    stream.write_all(answer.as_bytes()).await?;
                    let stream = websocket::Stream::accepted(stream, buffer).await;
                    let (greeting, buffer) = (String::new(), BytesMut::new());
                    Session::login(stream, greeting, buffer, shared).await
                });
                let session = self.logged_in(login.await)?;
                Some(Opened::WebSocket(Box::pin(session.run())))
            }
            other => {
                let answer = self.answer(&other);
                // How it ends is the other side's business.
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
                None
            }
        }
    }

    /// The session, or why there is none, counted.
    fn logged_in<S>(&self, login: Result<Session<S>, End>) -> Option<Session<S>> {
        let metrics = &self.shared.metrics;
        let end = match login {
            Ok(session) => return Some(session),
            Err(end) => end,
        };
        let counter = match end {
            End::Refused(_) => &metrics.refused,
            _ => &metrics.broken,
        };
        Metrics::add(counter, 1);
        tracing::debug!(reason = &end as &dyn std::error::Error, "a login failed");
        None
    }

    fn health(&self, clients: usize) -> String {
        let condition = self.condition.as_ref().map(|heard| heard.borrow().clone());
        let shown = condition.as_ref().is_none_or(|it| it.until.is_some());
        let (code, status) = match shown {
            true => ("200 OK", "ok"),
            // Nobody but the authority can connect.
            false => ("503 Service Unavailable", "no certificate"),
        };
        let mut body = serde_json::json!({
            "version": 1,
            "status": status,
            "clients": clients,
            "program": env!("CARGO_PKG_VERSION"),
        });
        if let Some(Condition { until, trouble }) = condition {
            body["certificate"] = serde_json::json!({ "until": until, "trouble": trouble });
        }
        http::page(code, "application/json", &format!("{body}\n"))
    }

    fn answer(&self, request: &Request) -> String {
        let text = "text/plain; charset=utf-8";
        let clients = self.shared.switch.len();
        match request {
            Request::Health => self.health(clients),
            Request::Metrics if self.page => {
                let body = self.shared.metrics.page(clients);
                http::page("200 OK", "text/plain; version=0.0.4", &body)
            }
            Request::Probe => http::probed(),
            Request::Portal { challenge } => http::no_content(challenge.as_deref()),
            Request::NotUpgraded => {
                let body = "DERP wants a connection upgrade (Upgrade: DERP, or websocket with the \
                            subprotocol derp)\n";
                http::page("426 Upgrade Required", text, body)
            }
            Request::Derp { .. }
            | Request::WebSocket { .. }
            | Request::Metrics
            | Request::NotFound => http::page("404 Not Found", text, "there is no such page\n"),
            Request::Bad => http::page("400 Bad Request", text, "this is no request\n"),
        }
    }
}

fn listen(addr: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let open = || {
        let socket = bind(addr, SocketType::STREAM)?;
        rustix::net::listen(&socket, BACKLOG)?;
        let listener = TcpListener::from_std(socket.into())?;
        let addr = listener.local_addr()?;
        Ok((listener, addr))
    };
    open().map_err(|source| StartError::Listen { addr, source })
}

fn listen_udp(addr: SocketAddr) -> Result<(UdpSocket, SocketAddr), StartError> {
    let open = || {
        let socket = UdpSocket::from_std(bind(addr, SocketType::DGRAM)?.into())?;
        stun::prepare(&socket)?;
        let addr = socket.local_addr()?;
        Ok((socket, addr))
    };
    open().map_err(|source| StartError::Listen { addr, source })
}

/// A socket at `addr`. `[::]` means both families, whatever the host's settings say, and IPv4 alone
/// where the kernel has no IPv6.
fn bind(addr: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let family = |addr: &SocketAddr| match addr {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let any = addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let without_v6 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, addr.port()));
    let made = socket_with(family(&addr), kind, flags, None);
    let (socket, addr) = match made {
        Err(Errno::AFNOSUPPORT) if any => {
            let made = socket_with(AddressFamily::INET, kind, flags, None);
            (made?, without_v6)
        }
        made => (made?, addr),
    };
    if addr.is_ipv6() {
        set_ipv6_v6only(&socket, !any)?;
    }
    if kind == SocketType::STREAM {
        // A restart need not wait for the old connections' last packets.
        set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &addr)?;
    Ok(socket)
}

/// Makes the folder if it is absent, and makes sure that no other relay uses it.
fn take_state_dir(dir: &Path) -> Result<File, StartError> {
    let failed = |source| StartError::StateDir {
        path: dir.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed)?;
    let lock = File::create(dir.join(LOCK_FILE)).map_err(failed)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
        if error == Errno::WOULDBLOCK {
            StartError::Running(dir.to_owned())
        } else {
            failed(error.into())
        }
    })?;
    Ok(lock)
}
