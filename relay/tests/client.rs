//! A node as the relay sees it.

use proto::derp::login::NONCE_BYTES;
use proto::derp::{ClientInfo, Frame, LoginBox, Sealed, ServerInfo, VERSION};
use proto::key::{NodeKey, NodeSecret, RelayKey};
use proto::permit::Permit;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// Longest wait for a frame that must come.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Client<S> {
    pub key: NodeKey,
    pub relay: RelayKey,
    pub info: ServerInfo,
    stream: S,
    buffer: Vec<u8>,
}

/// How a login is done.
#[derive(Clone, Default)]
pub struct Login {
    pub permit: Option<Permit>,
    /// Ask for no answer to the upgrade.
    pub fast: bool,
    /// Say that this is our key.
    pub claim: Option<NodeKey>,
    /// Receive buffer of the socket; small ones make slow readers.
    pub receive_buffer: Option<u32>,
}

pub fn secret(seed: u8) -> NodeSecret {
    NodeSecret::from_bytes([seed; 32])
}

pub fn key(seed: u8) -> NodeKey {
    secret(seed).public()
}

/// A client on an open relay.
pub async fn join(addr: SocketAddr, seed: u8) -> Client<TcpStream> {
    join_with(addr, seed, Login::default()).await.unwrap()
}

/// A client, or the last thing that the relay said.
pub async fn join_with(
    addr: SocketAddr,
    seed: u8,
    login: Login,
) -> Result<Client<TcpStream>, String> {
    let socket = TcpSocket::new_v4().unwrap();
    if let Some(bytes) = login.receive_buffer {
        socket.set_recv_buffer_size(bytes).unwrap();
    }
    let stream = socket.connect(addr).await.unwrap();
    Client::login(stream, seed, login).await
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub async fn login(stream: S, seed: u8, login: Login) -> Result<Self, String> {
        Self::login_as(stream, &secret(seed), login).await
    }

    /// The same with any secret.
    pub async fn login_as(
        mut stream: S,
        secret: &NodeSecret,
        login: Login,
    ) -> Result<Self, String> {
        let fast = if login.fast {
            "Derp-Fast-Start: 1\r\n"
        } else {
            ""
        };
        let request = format!(
            "GET /derp HTTP/1.1\r\nHost: relay\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n{fast}\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        if !login.fast {
            skip_head(&mut stream).await;
        }
        Self::greet(stream, secret, login).await
    }

    /// The login on a stream that was upgraded.
    pub async fn greet(stream: S, secret: &NodeSecret, login: Login) -> Result<Self, String> {
        let mut client = Self {
            key: secret.public(),
            relay: RelayKey([0; 32]),
            info: ServerInfo::default(),
            stream,
            buffer: Vec::new(),
        };
        let hello = client.next().await.unwrap();
        let Frame::ServerKey(relay) = parse(&hello) else {
            return Err(format!("{:?}", parse(&hello)));
        };
        client.relay = relay;
        let seal = LoginBox::new(&secret.agree(relay.0).unwrap());
        let info = ClientInfo {
            version: VERSION,
            can_ack_pings: true,
            is_prober: false,
            weir_permit: login.permit,
        };
        let nonce = [7; NONCE_BYTES];
        let bytes = &seal.seal(nonce, &serde_json::to_vec(&info).unwrap());
        let sealed = Sealed { nonce, bytes };
        let key = login.claim.unwrap_or(client.key);
        client.send(Frame::ClientInfo { key, sealed }).await;
        let answer = client.next().await.ok_or("the end")?;
        match parse(&answer) {
            Frame::ServerInfo(sealed) => {
                let json = seal.open(sealed).unwrap();
                client.info = serde_json::from_slice(&json).unwrap();
                Ok(client)
            }
            Frame::Health(text) => Err(text.to_owned()),
            other => Err(format!("{other:?}")),
        }
    }

    /// What is left for those who speak for themselves.
    pub fn into_stream(self) -> S {
        assert!(self.buffer.is_empty(), "the relay has said more");
        self.stream
    }

    pub async fn send(&mut self, frame: Frame<'_>) {
        self.stream.write_all(&frame.to_vec()).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// Sends bytes that need not be a frame, hangs up, and waits until the relay has too.
    pub async fn say_last(mut self, bytes: &[u8]) {
        // The relay may have ended it by now.
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.shutdown().await;
        let _ = timeout(PATIENCE, self.stream.read_to_end(&mut self.buffer)).await;
    }

    pub async fn send_packet(&mut self, dst: NodeKey, packet: &[u8]) {
        self.send(Frame::SendPacket { dst, packet }).await;
    }

    /// The next frame's bytes, or `None` at the end.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some((_, length)) = Frame::split(&self.buffer).unwrap() {
                return Some(self.buffer.drain(..length).collect());
            }
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await;
            match read.expect("the relay says nothing") {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Where the next packet comes from, and the packet; anything else is a failure.
    pub async fn packet(&mut self) -> (NodeKey, Vec<u8>) {
        let bytes = self.next().await.expect("the relay ended the session");
        match parse(&bytes) {
            Frame::RecvPacket { src, packet } => (src, packet.to_vec()),
            other => panic!("expected a packet, got {other:?}"),
        }
    }

    /// Sends a ping and returns what came before the pong.
    pub async fn until_pong(&mut self) -> Vec<String> {
        self.send(Frame::Ping(*b"untilnow")).await;
        let mut before = Vec::new();
        loop {
            let bytes = self.next().await.expect("the relay ended the session");
            match parse(&bytes) {
                Frame::Pong(data) if data == *b"untilnow" => return before,
                other => before.push(format!("{other:?}")),
            }
        }
    }
}

/// Reads the answer to an upgrade.
async fn skip_head<S: AsyncRead + Unpin>(stream: &mut S) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
}

pub fn parse(bytes: &[u8]) -> Frame<'_> {
    Frame::split(bytes).unwrap().unwrap().0
}

/// TLS to `addr`, and the chain that the relay showed.
pub async fn tls(
    addr: SocketAddr,
) -> (
    tokio_rustls::client::TlsStream<TcpStream>,
    Vec<CertificateDer<'static>>,
) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from("weir-relay").unwrap();
    let stream = connector.connect(name, stream).await.unwrap();
    let chain = stream.get_ref().1.peer_certificates().unwrap().to_vec();
    let chain = chain.into_iter().map(CertificateDer::into_owned).collect();
    (stream, chain)
}

/// Takes any certificate: the test looks at it itself.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
