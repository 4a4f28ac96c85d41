//! A node, as the coordinator sees it: a machine key, a WireGuard key and the calls.

use data_encoding::HEXLOWER;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use proto::control::{
    EXPORTER_LABEL, Hello, HelloRequest, JoinToken, KeyProof, PollMessage, PollRequest,
    ProofContext, Refusal, RefusalCode, RegisterRequest, Registered, Report, TokenSecret, VERSION,
    prove_node_key,
};
use proto::id::Generation;
use proto::key::{Fingerprint, MachineId, NodeSecret};
use proto::netmap::{Netmap, Update};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Nothing on a loopback connection takes this long unless it is broken.
pub const BOUND: Duration = Duration::from_secs(30);

/// A machine: what it is known by, and its WireGuard key.
pub struct Machine {
    pub certificate: CertificateDer<'static>,
    pub signer: Arc<dyn SigningKey>,
    pub secret: NodeSecret,
}

impl Machine {
    pub fn new() -> Self {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        Self::with_pair(&pair)
    }

    pub fn with_pair(pair: &rcgen::KeyPair) -> Self {
        let params = rcgen::CertificateParams::new(["node".to_owned()]).unwrap();
        let certificate = params.self_signed(pair).unwrap().der().clone();
        let key = PrivateKeyDer::try_from(pair.serialize_der()).unwrap();
        let signer = ring::sign::any_supported_type(&key).unwrap();
        Self {
            certificate,
            signer,
            secret: random_secret(),
        }
    }

    pub fn id(&self) -> MachineId {
        let parsed = rustls::server::ParsedCertificate::try_from(&self.certificate).unwrap();
        MachineId(Sha256::digest(parsed.subject_public_key_info()).into())
    }

    /// Connects, and shows `certificates` signed by the machine's signer.
    pub async fn connect_showing(
        &self,
        (addr, fingerprint): (SocketAddr, Fingerprint),
        certificates: Vec<CertificateDer<'static>>,
    ) -> io::Result<Client> {
        let provider = Arc::new(ring::default_provider());
        let certified = CertifiedKey::new(certificates, Arc::clone(&self.signer));
        let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pin {
                fingerprint,
                provider,
            }))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
        let stream = TcpStream::connect(addr).await?;
        let name = ServerName::try_from("coordinator").unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let tls = connector.connect(name, stream).await?;
        let connection = tls.get_ref().1;
        let exporter = connection
            .export_keying_material([0; 32], EXPORTER_LABEL, None)
            .map_err(io::Error::other)?;
        let (sender, driver) = handshake(TokioIo::new(tls))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(driver);
        Ok(Client {
            sender,
            exporter,
            machine: self.id(),
        })
    }

    pub async fn try_connect(&self, at: (SocketAddr, Fingerprint)) -> io::Result<Client> {
        self.connect_showing(at, vec![self.certificate.clone()])
            .await
    }

    pub async fn connect(&self, at: (SocketAddr, Fingerprint)) -> Client {
        self.try_connect(at).await.unwrap()
    }

    /// Joins with a token, as `hostname`.
    pub async fn join(&self, token: &JoinToken, hostname: &str) -> (Client, Registered) {
        let mut client = self.connect(token.at()).await;
        let secret = Some(token.secret.clone());
        let registered = client.register(self, secret, hostname).await.unwrap();
        (client, registered)
    }
}

/// Where a token leads.
pub trait At {
    fn at(&self) -> (SocketAddr, Fingerprint);
}

impl At for JoinToken {
    fn at(&self) -> (SocketAddr, Fingerprint) {
        (self.address.parse().unwrap(), self.fingerprint)
    }
}

pub fn random_secret() -> NodeSecret {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).unwrap();
    NodeSecret::from_bytes(bytes)
}

/// A connection of a machine.
pub struct Client {
    sender: SendRequest<Full<Bytes>>,
    pub exporter: [u8; 32],
    pub machine: MachineId,
}

impl Client {
    async fn send(
        &mut self,
        path: &str,
        body: Vec<u8>,
    ) -> Result<hyper::Response<Incoming>, Refusal> {
        let request = hyper::Request::post(path)
            .header(hyper::header::HOST, "coordinator")
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let gone = |why: &dyn std::fmt::Display| Refusal {
            code: RefusalCode::Unavailable,
            message: format!("the connection ended: {why}"),
        };
        self.sender.ready().await.map_err(|error| gone(&error))?;
        let response = self
            .sender
            .send_request(request)
            .await
            .map_err(|error| gone(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(|error| gone(&error))?;
        Err(serde_json::from_slice(&body.to_bytes()).unwrap())
    }

    /// One call with one answer.
    pub async fn call<T: DeserializeOwned>(
        &mut self,
        path: &str,
        request: &impl Serialize,
    ) -> Result<T, Refusal> {
        self.call_raw(path, serde_json::to_vec(request).unwrap())
            .await
    }

    pub async fn call_raw<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, Refusal> {
        let response = timeout(BOUND, self.send(path, body)).await.unwrap()?;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        Ok(serde_json::from_slice(&body).unwrap())
    }

    pub async fn hello(&mut self) -> Result<Hello, Refusal> {
        self.call("/v1/hello", &HelloRequest { version: VERSION })
            .await
    }

    pub async fn proof(&mut self, secret: &NodeSecret) -> Result<KeyProof, Refusal> {
        let challenge = self.hello().await?.challenge;
        let context = ProofContext {
            exporter: &self.exporter,
            machine: self.machine,
        };
        Ok(prove_node_key(secret, challenge, context).unwrap())
    }

    /// A registration, ready to be sent on this connection.
    pub async fn registration(
        &mut self,
        machine: &Machine,
        token: Option<TokenSecret>,
        hostname: &str,
    ) -> Result<RegisterRequest, Refusal> {
        Ok(RegisterRequest {
            token,
            key: machine.secret.public(),
            proof: self.proof(&machine.secret).await?,
            hostname: hostname.to_owned(),
            routes: BTreeSet::new(),
            endpoints: vec!["192.0.2.7:51820".parse().unwrap()],
            listen_port: 51820,
            disco: None,
        })
    }

    pub async fn register(
        &mut self,
        machine: &Machine,
        token: Option<TokenSecret>,
        hostname: &str,
    ) -> Result<Registered, Refusal> {
        let request = self.registration(machine, token, hostname).await?;
        self.call("/v1/register", &request).await
    }

    pub async fn report(&mut self, report: &Report) -> Result<serde_json::Value, Refusal> {
        self.call("/v1/report", report).await
    }

    pub async fn logout(&mut self) -> Result<serde_json::Value, Refusal> {
        self.call("/v1/logout", &serde_json::json!({})).await
    }

    /// Opens the poll stream; the connection is then used up.
    pub async fn poll(mut self, base: Option<Generation>) -> Result<Stream, Refusal> {
        let body = serde_json::to_vec(&PollRequest { base }).unwrap();
        let response = timeout(BOUND, self.send("/v1/poll", body)).await.unwrap()?;
        Ok(Stream {
            body: response.into_body(),
            read: Vec::new(),
            bytes: 0,
            _sender: self.sender,
        })
    }
}

/// A poll stream.
pub struct Stream {
    body: Incoming,
    read: Vec<u8>,
    /// Bytes that came so far.
    pub bytes: usize,
    _sender: SendRequest<Full<Bytes>>,
}

impl Stream {
    /// The next message; `None` when the stream ended.
    pub async fn next(&mut self) -> Option<PollMessage> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame = timeout(BOUND, self.body.frame())
                .await
                .expect("a message in time")?;
            let data = frame.ok()?.into_data().ok()?;
            self.bytes += data.len();
            self.read.extend_from_slice(&data);
        }
    }

    /// The next update, past signs of life.
    pub async fn update(&mut self) -> Option<Update> {
        loop {
            match self.next().await? {
                PollMessage::Update(update) => return Some(update),
                PollMessage::KeepAlive => {}
            }
        }
    }

    /// The first update, which must be a whole netmap.
    pub async fn full(&mut self) -> Netmap {
        match self.update().await {
            Some(Update::Full(netmap)) => *netmap,
            other => panic!("expected a whole netmap, got {other:?}"),
        }
    }

    /// Applies updates until the netmap is as wanted.
    pub async fn until(&mut self, netmap: &mut Netmap, wanted: impl Fn(&Netmap) -> bool) {
        while !wanted(netmap) {
            match self.update().await.expect("the stream goes on") {
                Update::Full(full) => *netmap = *full,
                Update::Delta(delta) => netmap.apply(*delta).unwrap(),
            }
        }
    }
}

/// The names of a netmap's peers.
pub fn names(netmap: &Netmap) -> Vec<&str> {
    netmap
        .peers
        .values()
        .map(|peer| peer.name.as_str())
        .collect()
}

/// Takes the one certificate that a token names.
#[derive(Debug)]
struct Pin {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if HEXLOWER.encode(&Sha256::digest(end_entity)) == HEXLOWER.encode(&self.fingerprint.0) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("only TLS 1.3".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
