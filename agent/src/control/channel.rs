//! One TLS connection to the coordinator: opened to one certificate, used for calls or a stream.
//!
//! The coordinator's certificate is known by its SHA-256, from the join token; names, dates and
//! issuers in it mean nothing here. The handshake signature is still checked, or the certificate
//! would prove nothing. Sessions are not resumed: each connection shows both certificates, and its
//! exporter is its own.

use super::Detour;
use super::lines::{LineBuffer, TooLong};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use proto::control::{
    EXPORTER_BYTES, EXPORTER_LABEL, KeyProof, MAX_MESSAGE_BYTES, PollMessage, PollRequest, Refusal,
    RefusalCode, STREAM_DEAD_SECONDS,
};
use proto::key::{ChallengeKey, Fingerprint, NodeKey};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

/// Longest wait for a name's addresses.
const RESOLVE: Duration = Duration::from_secs(10);
/// Longest wait for one address to take a connection and finish the TLS handshake.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for the answer to a call, and for a stream to begin.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest silence of a stream.
const SILENCE: Duration = Duration::from_secs(STREAM_DEAD_SECONDS);
/// Most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Longest answer to a call, in bytes.
const MAX_ANSWER_BYTES: usize = 256 << 10;

/// Proves the node key for a challenge and a connection's exporter.
pub type Prove = Arc<dyn Fn(ChallengeKey, &[u8; EXPORTER_BYTES]) -> Option<KeyProof> + Send + Sync>;

/// Who this machine is to the coordinator.
#[derive(Clone)]
pub struct Credentials {
    /// The WireGuard public key.
    pub node_key: NodeKey,
    /// The machine key's certificate, and what signs for it.
    pub certificate: Arc<CertifiedKey>,
    /// Proves the WireGuard private key.
    pub prove: Prove,
}

/// Why the conversation broke off.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The address names no host, or no such host is known.
    #[error("no address is known for the coordinator `{address}`")]
    Resolve {
        /// `HOST:PORT`.
        address: String,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// No connection to any of its addresses; this is the last one tried.
    #[error("the coordinator cannot be reached at {addr}")]
    Connect {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No connection through the proxy.
    #[error("the coordinator `{address}` cannot be reached through a proxy")]
    Proxy {
        /// `HOST:PORT`.
        address: String,
        /// What the proxy said, or why it could not be asked.
        #[source]
        source: io::Error,
    },
    /// The certificate there is not the pinned one.
    #[error(
        "another certificate than the join token named answers at {place}: this is another \
         coordinator, or somebody in between"
    )]
    WrongCertificate {
        /// The address; the coordinator's name if a proxy leads there.
        place: String,
    },
    /// Something else than TLS is spoken there.
    #[error("what answers at {place} does not speak TLS: is that the coordinator's port?")]
    NotTls {
        /// The address; the coordinator's name if a proxy leads there.
        place: String,
    },
    /// The TLS handshake failed.
    #[error("no TLS connection to the coordinator at {place}")]
    Tls {
        /// The address; the coordinator's name if a proxy leads there.
        place: String,
        /// What rustls said.
        #[source]
        source: io::Error,
    },
    /// The connection broke in the middle.
    #[error("the connection to the coordinator broke")]
    Http(#[source] hyper::Error),
    /// The other side closed the stream.
    #[error("the coordinator closed the connection")]
    Closed,
    /// Nothing came for too long.
    #[error("the coordinator fell silent")]
    Silent,
    /// The answer is longer than any that is meant.
    #[error("the coordinator's answer is too long")]
    TooLong,
    /// The answer is not what it should be.
    #[error("the coordinator's answer cannot be read: is it a newer or older weir?")]
    Unreadable(#[source] serde_json::Error),
    /// The status says no, and the body does not say why.
    #[error("the coordinator answered with HTTP status {0}")]
    Status(u16),
    /// It said no.
    #[error(transparent)]
    Refused(Refusal),
    /// The coordinator's challenge is no key.
    #[error("the coordinator's challenge is not a valid key")]
    Challenge,
    /// The daemon stopped listening.
    #[error("the agent is stopping")]
    Stopped,
}

impl From<hyper::Error> for ControlError {
    /// A coordinator that ends takes its connections along, with or without a farewell.
    fn from(error: hyper::Error) -> Self {
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            let kind = inner.downcast_ref().map(io::Error::kind);
            if let Some(io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) = kind {
                return Self::Closed;
            }
            cause = inner.source();
        }
        if error.is_incomplete_message() || error.is_canceled() {
            return Self::Closed;
        }
        Self::Http(error)
    }
}

impl ControlError {
    /// The refusal, if that is what this is and trying again would not help; else the error.
    pub(super) fn final_refusal(self) -> Result<Refusal, Self> {
        match self {
            Self::Refused(refusal) if refusal.code != RefusalCode::Unavailable => Ok(refusal),
            error => Err(error),
        }
    }
}

/// How connections to one coordinator are opened.
pub(super) struct Client {
    address: String,
    detour: Detour,
    tls: TlsConnector,
    credentials: Credentials,
}

impl Client {
    pub(super) fn new(config: super::ControlConfig, credentials: Credentials) -> Self {
        let tls = tls_config(config.fingerprint, Arc::clone(&credentials.certificate));
        Self {
            address: config.address,
            detour: config.detour,
            tls: TlsConnector::from(Arc::new(tls)),
            credentials,
        }
    }

    pub(super) fn node_key(&self) -> NodeKey {
        self.credentials.node_key
    }

    /// The proof of the node key for one connection.
    pub(super) fn prove(
        &self,
        challenge: ChallengeKey,
        channel: &Channel,
    ) -> Result<KeyProof, ControlError> {
        (self.credentials.prove)(challenge, &channel.exporter).ok_or(ControlError::Challenge)
    }

    /// A connection to the first address that gives one, or through the proxy.
    pub(super) async fn connect(&self) -> Result<Channel, ControlError> {
        if let Some(opened) = (self.detour)(&self.address) {
            return self.connect_through(opened).await;
        }
        let unresolved = |source| ControlError::Resolve {
            address: self.address.clone(),
            source,
        };
        let addrs = timeout(RESOLVE, lookup_host(&self.address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(unresolved)?;
        let mut failure = unresolved(io::ErrorKind::NotFound.into());
        for addr in addrs.take(MAX_ADDRESSES) {
            match timeout(CONNECT, self.connect_to(addr)).await {
                Ok(Ok(channel)) => return Ok(channel),
                Ok(Err(error)) => failure = error,
                Err(_) => {
                    let source = io::ErrorKind::TimedOut.into();
                    failure = ControlError::Connect { addr, source };
                }
            }
        }
        Err(failure)
    }

    async fn connect_through(
        &self,
        opened: BoxFuture<'static, io::Result<TcpStream>>,
    ) -> Result<Channel, ControlError> {
        let unreachable = |source| ControlError::Proxy {
            address: self.address.clone(),
            source,
        };
        let connected = async {
            let tcp = opened.await.map_err(unreachable)?;
            // Whom the greeting is for, if the coordinator has no name: nobody looks.
            let peer = tcp.peer_addr().map_err(unreachable)?;
            self.converse(tcp, self.server_name(peer), &self.address)
                .await
        };
        timeout(CONNECT, connected)
            .await
            .unwrap_or_else(|_| Err(unreachable(io::ErrorKind::TimedOut.into())))
    }

    async fn connect_to(&self, addr: SocketAddr) -> Result<Channel, ControlError> {
        let unreachable = |source| ControlError::Connect { addr, source };
        let tcp = TcpStream::connect(addr).await.map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        self.converse(tcp, self.server_name(addr), &addr.to_string())
            .await
    }

    /// TLS and HTTP on a stream to the coordinator at `place`.
    async fn converse(
        &self,
        tcp: TcpStream,
        name: ServerName<'static>,
        place: &str,
    ) -> Result<Channel, ControlError> {
        let failed = |source| tls_failed(place, source);
        let tls = self.tls.connect(name, tcp).await.map_err(failed)?;
        let mut exporter = [0; EXPORTER_BYTES];
        let (_, connection) = tls.get_ref();
        connection
            .export_keying_material(&mut exporter, EXPORTER_LABEL, None)
            .map_err(|error| failed(io::Error::other(error)))?;
        let (send, connection) = http1::handshake(TokioIo::new(tls)).await?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // Its error also reaches the request that is under way.
            let _ = connection.await;
        });
        Ok(Channel {
            send,
            exporter,
            host: self.address.clone(),
            _driver: driver,
        })
    }

    /// What the TLS greeting says whom it is for: proxies route by it, we check the certificate.
    fn server_name(&self, addr: SocketAddr) -> ServerName<'static> {
        let host = self.address.rsplit_once(':').map_or("", |(host, _)| host);
        ServerName::try_from(host.to_owned()).unwrap_or_else(|_| ServerName::from(addr.ip()))
    }

    /// A stream of netmaps, on a connection of its own.
    pub(super) async fn poll(&self, request: &PollRequest) -> Result<Stream, ControlError> {
        let mut channel = self.connect().await?;
        let response = timeout(ANSWER, channel.post("/v1/poll", request))
            .await
            .map_err(|_| ControlError::Silent)??;
        Ok(Stream {
            body: response.into_body(),
            lines: LineBuffer::new(MAX_MESSAGE_BYTES),
            _channel: channel,
        })
    }
}

fn tls_failed(place: &str, source: io::Error) -> ControlError {
    let place = place.to_owned();
    let inner = source.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(rustls::Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        )) => ControlError::WrongCertificate { place },
        Some(rustls::Error::InvalidMessage(_)) => ControlError::NotTls { place },
        _ => ControlError::Tls { place, source },
    }
}

/// An open connection. Closes when dropped.
pub(super) struct Channel {
    send: SendRequest<Full<Bytes>>,
    exporter: [u8; EXPORTER_BYTES],
    host: String,
    /// Drives the connection; ends with the channel.
    _driver: JoinSet<()>,
}

impl Channel {
    /// One request, one answer.
    pub(super) async fn call<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        path: &'static str,
        request: &Q,
    ) -> Result<A, ControlError> {
        let answer = async {
            let response = self.post(path, request).await?;
            let body = whole_body(response).await?;
            serde_json::from_slice(&body).map_err(ControlError::Unreadable)
        };
        timeout(ANSWER, answer)
            .await
            .map_err(|_| ControlError::Silent)?
    }

    /// Sends a request; its answer if that is no refusal.
    async fn post<Q: Serialize>(
        &mut self,
        path: &'static str,
        request: &Q,
    ) -> Result<Response<Incoming>, ControlError> {
        // The body may hold a token. hyper copies it into its own buffers, which we cannot wipe.
        let body = serde_json::to_vec(request).map_err(ControlError::Unreadable)?;
        let body = Zeroizing::new(body);
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::copy_from_slice(&body)))
            .map_err(|_| ControlError::Closed)?;
        let response = self.send.send_request(request).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = whole_body(response).await?;
        Err(match serde_json::from_slice(&body) {
            Ok(refusal) => ControlError::Refused(refusal),
            Err(_) => ControlError::Status(status.as_u16()),
        })
    }
}

async fn whole_body(response: Response<Incoming>) -> Result<Bytes, ControlError> {
    let limited = Limited::new(response.into_body(), MAX_ANSWER_BYTES);
    match limited.collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => match error.downcast::<hyper::Error>() {
            Ok(error) => Err(ControlError::from(*error)),
            Err(_) => Err(ControlError::TooLong),
        },
    }
}

/// An open stream of netmaps.
pub(super) struct Stream {
    body: Incoming,
    lines: LineBuffer,
    _channel: Channel,
}

impl Stream {
    /// The next message. Any byte is a sign of life: a large netmap may take its time.
    pub(super) async fn next(&mut self) -> Result<PollMessage, ControlError> {
        loop {
            let line = self.lines.line().map_err(|TooLong| ControlError::TooLong)?;
            if let Some(line) = line {
                return serde_json::from_slice(&line).map_err(ControlError::Unreadable);
            }
            let frame = timeout(SILENCE, self.body.frame())
                .await
                .map_err(|_| ControlError::Silent)?
                .ok_or(ControlError::Closed)??;
            if let Ok(data) = frame.into_data() {
                self.lines.push(&data);
            }
        }
    }
}

/// TLS 1.3 to exactly one certificate, without one of our own.
#[must_use]
pub fn tls_to(pin: Fingerprint) -> ClientConfig {
    let provider = ring::default_provider();
    let verifier = Pinned {
        pin,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring speaks TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config
}

fn tls_config(pin: Fingerprint, certificate: Arc<CertifiedKey>) -> ClientConfig {
    let mut config = tls_to(pin);
    config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certificate));
    config
}

/// Takes exactly one certificate, whatever it says.
#[derive(Debug)]
struct Pinned {
    pin: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if Fingerprint(Sha256::digest(end_entity).into()) == self.pin {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
