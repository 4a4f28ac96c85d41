//! Requests to an authority: HTTP/1.1 over TLS, a connection each. They are a dozen a month.

use http_body_util::{BodyExt, Limited};
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest answer: chains are a few kilobytes.
const MAX_ANSWER_BYTES: usize = 1 << 20;

type Body = BodyWrapper<bytes::Bytes>;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unanswered {
    #[error("`{0}` is no https:// address")]
    Address(Uri),
    #[error("{host} cannot be reached")]
    Unreachable { host: String, source: io::Error },
    #[error("no TLS with {host}")]
    Tls { host: String, source: io::Error },
    #[error("{host} speaks no HTTP")]
    Http { host: String, source: hyper::Error },
    #[error("the answer of {host} cannot be read")]
    Answer {
        host: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{0} does not answer")]
    Late(String),
}

/// Asks whoever TLS says is the authority.
pub(super) struct Authority {
    tls: TlsConnector,
}

impl Authority {
    pub(super) fn new(config: Arc<ClientConfig>) -> Self {
        let tls = TlsConnector::from(config);
        Self { tls }
    }
}

impl HttpClient for Authority {
    fn request(
        &self,
        request: Request<Body>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let tls = self.tls.clone();
        Box::pin(async move {
            let host = request.uri().host().unwrap_or_default().to_owned();
            let answer = timeout(ANSWER, ask(tls, &host, request)).await;
            let answer = answer.unwrap_or(Err(Unanswered::Late(host)));
            answer.map_err(|error| Error::Other(Box::new(error)))
        })
    }
}

async fn ask(
    tls: TlsConnector,
    host: &str,
    mut request: Request<Body>,
) -> Result<BytesResponse, Unanswered> {
    let uri = request.uri().clone();
    let wrong = || Unanswered::Address(uri.clone());
    let authority = uri.authority().ok_or_else(wrong)?;
    let header = HeaderValue::from_str(authority.as_str()).map_err(|_| wrong())?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(bare.to_owned()).map_err(|_| wrong())?;
    if uri.scheme_str() != Some("https") {
        return Err(wrong());
    }
    let at = |source| Unanswered::Unreachable {
        host: host.to_owned(),
        source,
    };
    let port = authority.port_u16().unwrap_or(443);
    let tcp = TcpStream::connect((bare, port)).await.map_err(at)?;
    let stream = tls.connect(name, tcp).await;
    let stream = stream.map_err(|source| Unanswered::Tls {
        host: host.to_owned(),
        source,
    })?;

    let http = |source| Unanswered::Http {
        host: host.to_owned(),
        source,
    };
    let opened = http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = opened.map_err(http)?;
    request.headers_mut().insert(HOST, header);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = path.parse().map_err(|_| wrong())?;
    let answer = async {
        let (parts, body) = sender
            .send_request(request)
            .await
            .map_err(http)?
            .into_parts();
        let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
        let body = body.map_err(|source| Unanswered::Answer {
            host: host.to_owned(),
            source,
        })?;
        let body = Body::from(body.to_bytes().to_vec());
        Ok(BytesResponse::from(Response::from_parts(parts, body)))
    };
    // The connection moves the bytes while we wait; how it ends, the answer says.
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        _ = connection => answer.await,
    }
}
