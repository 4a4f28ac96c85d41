//! A coordinator that says what a test tells it to, behind real TLS on the loopback interface.

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use proto::control::{EXPORTER_BYTES, EXPORTER_LABEL};
use proto::key::{Fingerprint, MachineId};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use sha2::{Digest, Sha256};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;

/// A request as it arrived, and how to answer it.
pub(super) struct Asked {
    pub(super) path: String,
    pub(super) body: Bytes,
    pub(super) machine: MachineId,
    pub(super) exporter: [u8; EXPORTER_BYTES],
    reply: oneshot::Sender<Reply>,
}

enum Reply {
    Whole(StatusCode, Bytes),
    Stream(mpsc::Receiver<Bytes>),
}

impl Asked {
    pub(super) fn read<T: serde::de::DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub(super) fn answer(self, status: u16, value: &impl serde::Serialize) {
        let status = StatusCode::from_u16(status).unwrap();
        let body = serde_json::to_vec(value).unwrap().into();
        let _ = self.reply.send(Reply::Whole(status, body));
    }

    /// Answers with a stream; it ends when what is returned is dropped.
    pub(super) fn stream(self) -> Lines {
        let (lines, receiver) = mpsc::channel(8);
        let _ = self.reply.send(Reply::Stream(receiver));
        Lines(lines)
    }
}

/// The server's end of a stream.
pub(super) struct Lines(mpsc::Sender<Bytes>);

impl Lines {
    pub(super) async fn send(&self, value: &impl serde::Serialize) {
        let mut line = serde_json::to_vec(value).unwrap();
        line.push(b'\n');
        self.0.send(line.into()).await.unwrap();
    }

    /// Waits until the client has hung up.
    pub(super) async fn closed(self) {
        self.0.closed().await;
    }
}

pub(super) struct Server {
    pub(super) address: String,
    pub(super) fingerprint: Fingerprint,
    asked: mpsc::Receiver<Asked>,
}

impl Server {
    pub(super) async fn start() -> Self {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let params = rcgen::CertificateParams::default();
        let certificate = params.self_signed(&pair).unwrap().der().clone();
        let fingerprint = Fingerprint(Sha256::digest(&certificate).into());
        let key = PrivatePkcs8KeyDer::from(pair.serialize_der()).into();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(Arc::new(AnyMachine))
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, asked) = mpsc::channel(8);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                tokio::spawn(serve(acceptor.clone(), tcp, sender.clone()));
            }
        });
        Self {
            address,
            fingerprint,
            asked,
        }
    }

    /// The next request, which must be for `path`.
    pub(super) async fn expect(&mut self, path: &str) -> Asked {
        let asked = self.asked.recv().await.unwrap();
        assert_eq!(asked.path, path);
        asked
    }

    /// Whether nobody has asked anything.
    pub(super) fn is_unasked(&mut self) -> bool {
        self.asked.try_recv().is_err()
    }
}

async fn serve(acceptor: TlsAcceptor, tcp: TcpStream, sender: mpsc::Sender<Asked>) {
    let Ok(tls) = acceptor.accept(tcp).await else {
        return;
    };
    let (_, connection) = tls.get_ref();
    let certificate = &connection.peer_certificates().unwrap()[0];
    let parsed = ParsedCertificate::try_from(certificate).unwrap();
    let machine = MachineId(Sha256::digest(parsed.subject_public_key_info()).into());
    let exporter = connection
        .export_keying_material([0; EXPORTER_BYTES], EXPORTER_LABEL, None)
        .unwrap();
    let service = service_fn(|request: Request<Incoming>| {
        let sender = sender.clone();
        async move { Ok::<_, Infallible>(handle(request, machine, exporter, sender).await) }
    });
    let http = hyper::server::conn::http1::Builder::new();
    let _ = http.serve_connection(TokioIo::new(tls), service).await;
}

async fn handle(
    request: Request<Incoming>,
    machine: MachineId,
    exporter: [u8; EXPORTER_BYTES],
    sender: mpsc::Sender<Asked>,
) -> Response<BoxBody<Bytes, Infallible>> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let (reply, answer) = oneshot::channel();
    let asked = Asked {
        path,
        body,
        machine,
        exporter,
        reply,
    };
    let _ = sender.send(asked).await;
    let (status, body) = match answer.await {
        Ok(Reply::Whole(status, body)) => (status, Full::new(body).boxed()),
        Ok(Reply::Stream(lines)) => {
            let frames = stream::unfold(lines, |mut lines| async move {
                let line = lines.recv().await?;
                Some((Ok(Frame::data(line)), lines))
            });
            (StatusCode::OK, StreamBody::new(frames).boxed())
        }
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, Full::default().boxed()),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

/// Takes any client certificate whose key signed the handshake.
#[derive(Debug)]
struct AnyMachine;

impl ClientCertVerifier for AnyMachine {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("no".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let provider = rustls::crypto::ring::default_provider();
        provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
