//! From a relay's name to a stream of frames on which it knows us.
//!
//! Name, TCP (the families race) or a tunnel through a proxy, TLS 1.3 to the pinned certificate or one that the system's
//! authorities signed, the upgrade, the login. A relay that shows its key in its certificate chain
//! is not waited for: upgrade and login leave in one write, and the first bytes that come back
//! admit us.
//!
//! A middlebox may refuse an upgrade that it does not know, and pass a WebSocket. So when the answer is
//! not the relay's, the same is tried once more inside one. Nothing is remembered of that: the next
//! connection begins with the plain upgrade again, which costs less.

use super::frames::Frames;
use super::{Detour, Login, Pinned, Transport, websocket};
use bytes::BytesMut;
use proto::derp::login::NONCE_BYTES;
use proto::derp::{
    ClientInfo, FAST_START_HEADER, Frame, FrameError, META_CERTIFICATE_PREFIX, Sealed, UPGRADE,
    VERSION,
};
use proto::key::{KEY_BYTES, NodeKey, RelayKey};
use proto::netmap::RelayHost;
use proto::permit::Permit;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, RootCertStore};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

/// Longest wait for a name's addresses; those of the last time are used instead.
const RESOLVE: Duration = Duration::from_secs(2);
/// Longest wait for one address to take a connection.
const DIAL: Duration = Duration::from_millis(1_500);
/// Head start of each address over the next.
const HEAD_START: Duration = Duration::from_millis(200);
/// Longest way from the name to the end of the login.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection whose bytes nobody acknowledges for this long is dead.
const UNACKNOWLEDGED: Duration = Duration::from_secs(15);
/// Bytes that wait in the kernel: more would only be late, and hide that the way is full.
const UNSENT_BYTES: u32 = 64 << 10;
/// Most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Longest head of the answer to an upgrade.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Longest frame of a login.
const MAX_LOGIN_BYTES: usize = 8 << 10;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("no address is known for `{0}`")]
    Resolve(String),
    #[error("{host} cannot be reached: {source}")]
    Connect { host: String, source: io::Error },
    #[error("{0} shows another certificate than the coordinator named")]
    WrongCertificate(String),
    #[error("no TLS with {host}: {source}")]
    Tls { host: String, source: io::Error },
    #[error("{host} is no relay: it answers `{answer}`")]
    NoRelay { host: String, answer: String },
    #[error("{host} ends the connection when asked for an upgrade: {source}")]
    NoUpgrade { host: String, source: io::Error },
    #[error("the connection to {host} broke: {source}")]
    Broken { host: String, source: io::Error },
    #[error("{host} speaks no DERP: {source}")]
    Frame { host: String, source: FrameError },
    #[error("{0} does not hold the key that it shows")]
    Key(String),
    #[error("{host} does not admit this node: {text}")]
    Refused { host: String, text: String },
    #[error("{0} takes too long")]
    Late(String),
}

impl DialError {
    /// Whether somebody in between may not have let the upgrade through.
    fn is_refusal(&self) -> bool {
        matches!(self, Self::NoRelay { .. } | Self::NoUpgrade { .. })
    }
}

/// Anything that bytes go through.
pub(super) trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

/// A stream on which the relay knows us.
pub(super) struct Connected {
    pub(super) wire: Box<dyn Wire>,
    /// What it has already sent beyond the login.
    pub(super) frames: Frames,
    pub(super) transport: Transport,
}

/// Opens connections to the hosts of one region.
pub(super) struct Dialer {
    pub(super) me: NodeKey,
    pub(super) login: Login,
    pub(super) pinned: Pinned,
    pub(super) detour: Detour,
    /// Where names led the last time: a resolver may be down when a relay is not.
    pub(super) known: BTreeMap<String, Vec<SocketAddr>>,
}

impl Dialer {
    /// A connection to this host.
    pub(super) async fn connect(
        &mut self,
        host: &RelayHost,
        permit: Option<Permit>,
    ) -> Result<Connected, DialError> {
        let late = |_| DialError::Late(host.addr.clone());
        timeout(CONNECT, self.reach(host, permit))
            .await
            .map_err(late)?
    }

    async fn reach(
        &mut self,
        host: &RelayHost,
        permit: Option<Permit>,
    ) -> Result<Connected, DialError> {
        let plainly = self.attempt(host, permit, Transport::Derp).await;
        let Err(refusal) = plainly else {
            return plainly;
        };
        if !refusal.is_refusal() {
            return Err(refusal);
        }
        let inside = self.attempt(host, permit, Transport::WebSocket);
        match inside.await {
            // Neither: what was said first says more.
            Err(error) if error.is_refusal() => Err(refusal),
            other => other,
        }
    }

    async fn attempt(
        &mut self,
        host: &RelayHost,
        permit: Option<Permit>,
        transport: Transport,
    ) -> Result<Connected, DialError> {
        let unreachable = |source| DialError::Connect {
            host: host.addr.clone(),
            source,
        };
        let tcp = match (self.detour)(&host.addr) {
            Some(opened) => opened.await,
            None => race(self.resolve(&host.addr).await?).await,
        };
        let tcp = tcp.and_then(prepared).map_err(unreachable)?;
        let (wire, key) = match host.plain {
            true => (Box::new(tcp) as Box<dyn Wire>, None),
            false => self.tls(host, tcp).await?,
        };
        self.log_in(host, wire, key, permit, transport).await
    }

    async fn resolve(&mut self, name: &str) -> Result<Vec<SocketAddr>, DialError> {
        if let Ok(Ok(found)) = timeout(RESOLVE, lookup_host(name)).await {
            let found: Vec<SocketAddr> = found.take(MAX_ADDRESSES).collect();
            if !found.is_empty() {
                self.known.insert(name.to_owned(), alternate(found));
            }
        }
        let known = self.known.get(name).cloned();
        known.ok_or_else(|| DialError::Resolve(name.to_owned()))
    }

    async fn tls(
        &self,
        host: &RelayHost,
        tcp: TcpStream,
    ) -> Result<(Box<dyn Wire>, Option<RelayKey>), DialError> {
        let mut config = match host.certificate {
            Some(fingerprint) => (self.pinned)(fingerprint),
            None => by_authorities(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let failed = |source: io::Error| {
            let inner = source.get_ref().and_then(|inner| inner.downcast_ref());
            match inner {
                Some(rustls::Error::InvalidCertificate(
                    CertificateError::ApplicationVerificationFailure,
                )) => DialError::WrongCertificate(host.addr.clone()),
                _ => DialError::Tls {
                    host: host.addr.clone(),
                    source,
                },
            }
        };
        let name = server_name(&host.addr).map_err(|error| failed(io::Error::other(error)))?;
        let connector = TlsConnector::from(Arc::new(config));
        let tls = connector.connect(name, tcp).await.map_err(failed)?;
        let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let key = chain.last().and_then(key_in_certificate);
        Ok((Box::new(tls), key))
    }

    /// Upgrade and login. `key` is what the relay showed in its certificate.
    async fn log_in(
        &self,
        host: &RelayHost,
        mut wire: Box<dyn Wire>,
        key: Option<RelayKey>,
        permit: Option<Permit>,
        transport: Transport,
    ) -> Result<Connected, DialError> {
        let mut buffer = BytesMut::new();
        // Where the relay's key is known, nothing is waited for.
        let mut fast = false;
        match transport {
            Transport::WebSocket => wire = websocket::open(&host.addr, wire).await?,
            Transport::Derp => {
                fast = key.is_some();
                let mut opening = request(&host.addr, fast).into_bytes();
                if let Some(key) = key {
                    self.client_info(host, key, permit, &mut opening)?;
                }
                say(host, &mut wire, &opening).await?;
                if !fast {
                    upgraded(host, &mut wire, &mut buffer).await?;
                }
            }
        }
        let mut frames = Frames::new(buffer, MAX_LOGIN_BYTES);
        let shown = match next(host, &mut frames, &mut wire).await?.decode() {
            Ok(Frame::ServerKey(shown)) => shown,
            Ok(_) => return Err(DialError::Key(host.addr.clone())),
            Err(source) => return Err(frame_error(host, source)),
        };
        if key.is_some_and(|key| key != shown) {
            return Err(DialError::Key(host.addr.clone()));
        }
        if !fast {
            let mut info = Vec::new();
            self.client_info(host, shown, permit, &mut info)?;
            say(host, &mut wire, &info).await?;
        }
        let answer = next(host, &mut frames, &mut wire).await?;
        match answer
            .decode()
            .map_err(|source| frame_error(host, source))?
        {
            Frame::ServerInfo(sealed) => {
                // That the box opens is the relay's proof of its key.
                let seal = (self.login)(shown);
                let opened = seal.and_then(|seal| seal.open(sealed));
                opened.ok_or_else(|| DialError::Key(host.addr.clone()))?;
            }
            Frame::Health(text) => {
                return Err(DialError::Refused {
                    host: host.addr.clone(),
                    text: text.to_owned(),
                });
            }
            _ => return Err(DialError::Key(host.addr.clone())),
        }
        frames.logged_in();
        Ok(Connected {
            wire,
            frames,
            transport,
        })
    }

    fn client_info(
        &self,
        host: &RelayHost,
        relay: RelayKey,
        permit: Option<Permit>,
        out: &mut Vec<u8>,
    ) -> Result<(), DialError> {
        let info = ClientInfo {
            version: VERSION,
            can_ack_pings: true,
            is_prober: false,
            weir_permit: permit,
        };
        let mut nonce = [0; NONCE_BYTES];
        let random = getrandom::fill(&mut nonce).is_ok();
        let seal = (self.login)(relay).filter(|_| random);
        let seal = seal.ok_or_else(|| DialError::Key(host.addr.clone()))?;
        // Numbers and texts alone: it always is JSON.
        let json = serde_json::to_vec(&info).unwrap_or_default();
        let bytes = &seal.seal(nonce, &json);
        let (key, sealed) = (self.me, Sealed { nonce, bytes });
        Frame::ClientInfo { key, sealed }.encode(out);
        Ok(())
    }
}

async fn say(host: &RelayHost, wire: &mut Box<dyn Wire>, bytes: &[u8]) -> Result<(), DialError> {
    let said = async {
        wire.write_all(bytes).await?;
        wire.flush().await
    };
    said.await.map_err(|source| DialError::Broken {
        host: host.addr.clone(),
        source,
    })
}

async fn next(
    host: &RelayHost,
    frames: &mut Frames,
    wire: &mut Box<dyn Wire>,
) -> Result<super::frames::Raw, DialError> {
    loop {
        let whole = frames.next().map_err(|source| frame_error(host, source))?;
        if let Some(frame) = whole {
            return Ok(frame);
        }
        let broken = |source| DialError::Broken {
            host: host.addr.clone(),
            source,
        };
        frames.read(wire).await.map_err(broken)?;
    }
}

fn frame_error(host: &RelayHost, source: FrameError) -> DialError {
    DialError::Frame {
        host: host.addr.clone(),
        source,
    }
}

fn request(host: &str, fast: bool) -> String {
    let fast = match fast {
        true => format!("{FAST_START_HEADER}: 1\r\n"),
        false => String::new(),
    };
    format!(
        "GET /derp HTTP/1.1\r\nHost: {host}\r\nUpgrade: {UPGRADE}\r\nConnection: Upgrade\r\n\
         User-Agent: weir\r\n{fast}\r\n"
    )
}

/// Reads the answer to the upgrade; `buffer` keeps what follows it.
async fn upgraded(
    host: &RelayHost,
    wire: &mut Box<dyn Wire>,
    buffer: &mut BytesMut,
) -> Result<(), DialError> {
    const END: &[u8] = b"\r\n\r\n";
    let answer = |buffer: &[u8]| {
        let line = buffer.split(|byte| *byte == b'\r').next();
        let line = String::from_utf8_lossy(line.unwrap_or_default());
        line.chars().take(80).collect::<String>()
    };
    loop {
        let end = buffer.windows(END.len()).position(|bytes| bytes == END);
        if let Some(end) = end {
            if buffer.starts_with(b"HTTP/1.1 101 ") {
                let _ = buffer.split_to(end + END.len());
                return Ok(());
            }
            return Err(DialError::NoRelay {
                host: host.addr.clone(),
                answer: answer(buffer),
            });
        }
        let no_upgrade = |source| DialError::NoUpgrade {
            host: host.addr.clone(),
            source,
        };
        if buffer.len() >= MAX_HEAD_BYTES {
            return Err(no_upgrade(io::ErrorKind::InvalidData.into()));
        }
        buffer.reserve(1 << 10);
        if wire.read_buf(buffer).await.map_err(no_upgrade)? == 0 {
            return Err(no_upgrade(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// Both families in turn, IPv6 first.
fn alternate(addrs: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let (v6, v4): (Vec<_>, Vec<_>) = addrs.into_iter().partition(SocketAddr::is_ipv6);
    let (mut v6, mut v4) = (v6.into_iter(), v4.into_iter());
    let mut out = Vec::new();
    loop {
        let pair = [v6.next(), v4.next()];
        if pair == [None, None] {
            return out;
        }
        out.extend(pair.into_iter().flatten());
    }
}

/// The first address that takes a connection, each with a head start over the next.
async fn race(addrs: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::from(io::ErrorKind::NotFound);
    let mut waiting = addrs.into_iter();
    loop {
        let next = waiting.next();
        let more = next.is_some();
        if let Some(addr) = next {
            attempts.spawn(timeout(DIAL, TcpStream::connect(addr)));
        }
        let head_start = sleep(if more { HEAD_START } else { DIAL });
        tokio::select! {
            done = attempts.join_next() => match done {
                Some(Ok(Ok(Ok(stream)))) => return Ok(stream),
                Some(Ok(Ok(Err(error)))) => failure = error,
                Some(_) => failure = io::ErrorKind::TimedOut.into(),
                None => return Err(failure),
            },
            () = head_start => {}
        }
    }
}

fn prepared(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&stream);
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    socket.set_tcp_notsent_lowat(UNSENT_BYTES)?;
    Ok(stream)
}

fn server_name(addr: &str) -> Result<ServerName<'static>, rustls::pki_types::InvalidDnsNameError> {
    let host = addr.rsplit_once(':').map_or(addr, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned())
}

/// TLS 1.3 to whatever the system's certificate authorities vouch for.
fn by_authorities() -> ClientConfig {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    let provider = rustls::crypto::ring::default_provider();
    ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring speaks TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// The relay's key in the name of the certificate that ends its chain. TLS 1.3 proves the whole
/// chain to come from whoever holds its first certificate, and the login proves the key besides.
fn key_in_certificate(certificate: &CertificateDer<'_>) -> Option<RelayKey> {
    let prefix = META_CERTIFICATE_PREFIX.as_bytes();
    let bytes = certificate.as_ref();
    let at = bytes
        .windows(prefix.len())
        .position(|bytes| bytes == prefix)?;
    let hex = bytes.get(at + prefix.len()..at + prefix.len() + 2 * KEY_BYTES)?;
    let key = data_encoding::HEXLOWER.decode(hex).ok()?;
    key.try_into().map(RelayKey).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_found_in_a_certificates_name_and_nowhere_else() {
        let named = |name: &str| {
            let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params
                .distinguished_name
                .push(rcgen::DnType::CommonName, name);
            params.self_signed(&pair).unwrap().der().clone()
        };
        let key = RelayKey([0xab; 32]);
        let hex = "ab".repeat(32);
        let found = |name: &str| key_in_certificate(&named(name));
        assert_eq!(found(&format!("derpkey{hex}")), Some(key));
        assert_eq!(found(&format!("derpkey{}", &hex[..62])), None);
        assert_eq!(found("relay.example.com"), None);
    }

    #[test]
    fn families_take_turns() {
        let addrs = ["192.0.2.1:1", "192.0.2.2:1", "[2001:db8::1]:1"];
        let addrs = addrs.map(|addr| addr.parse().unwrap()).to_vec();
        let turns: Vec<String> = alternate(addrs).iter().map(ToString::to_string).collect();
        assert_eq!(turns, ["[2001:db8::1]:1", "192.0.2.1:1", "192.0.2.2:1"]);
    }

    #[tokio::test]
    async fn an_address_that_refuses_costs_nothing_but_its_head_start() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let bad = closed.local_addr().unwrap();
        drop(closed);
        let stream = race(vec![bad, good]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good);
        assert!(race(vec![bad]).await.is_err());
        assert!(race(Vec::new()).await.is_err());
    }
}
