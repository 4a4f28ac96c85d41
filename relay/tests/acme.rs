//! Certificates from an authority, over the relay's own port.

use crate::client::{Client, Login, tls};
use crate::pebble::{LOOK, PATIENCE, Pebble};
use crate::place::{any, get, own_address};
use relay::admit::Admission;
use relay::config::{Acme, Certificate, Config};
use relay::server::Server;
use relay::tls::{CHALLENGE_PROTOCOL, authority_client};
use rustls::pki_types::{CertificateDer, ServerName};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::sleep;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const NAMES: [&str; 2] = ["fra1.example.com", "relay.example.com"];
/// Longer than any test takes, in seconds.
const LONG: u64 = 90 * 24 * 3_600;

/// A relay that is known by name, and where it keeps what it has.
struct Relay {
    dir: TempDir,
    config: Config,
    /// Who vouches for its certificate, as a node would know.
    root: PathBuf,
}

impl Relay {
    fn of(pebble: &Pebble) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let acme = Acme {
            domains: NAMES.map(str::to_owned).to_vec(),
            contact: vec!["mailto:ops@example.com".to_owned()],
            directory: pebble.directory(),
            directory_roots: Some(pebble.roots()),
        };
        let config = Config {
            state_dir: dir.path().join("state"),
            listen: SocketAddr::from((own_address(), 4_430)),
            stun_listen: any(),
            status_listen: any(),
            certificate: Certificate::Acme(acme),
            admission: Admission::Open,
            rate: 0,
            region: Vec::new(),
        };
        let root = dir.path().join("root.pem");
        Self { dir, config, root }
    }

    fn addr(&self) -> SocketAddr {
        self.config.listen
    }

    fn start(&self) -> Server {
        Server::start(self.config.clone()).unwrap()
    }

    /// TLS as a node does it, to a relay of this name.
    async fn connect(
        &self,
        name: &str,
        protocols: &[&[u8]],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut config = authority_client(Some(&self.root)).unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let stream = TcpStream::connect(self.addr()).await.unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
    }

    /// Waits for a certificate that holds, and returns it.
    async fn certified(&self, server: &Server, pebble: &Pebble) -> CertificateDer<'static> {
        let start = Instant::now();
        loop {
            match self.connect(NAMES[0], &[]).await {
                Ok(stream) => return leaf(&stream),
                Err(error) => {
                    if start.elapsed() > PATIENCE {
                        let (_, health) = health(server).await;
                        panic!("{error}\n{health}\n{}", pebble.log());
                    }
                    sleep(LOOK).await;
                }
            }
        }
    }
}

fn leaf(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    let chain = stream.get_ref().1.peer_certificates().unwrap();
    chain[0].clone().into_owned()
}

async fn metric(server: &Server, name: &str) -> u64 {
    let page = get(server.status_addr, "/metrics").await;
    let line = page.lines().find_map(|line| line.strip_prefix(name));
    let value = line.unwrap_or_else(|| panic!("{name}: {page}"));
    value.trim().parse().unwrap()
}

/// The status line and the health page.
async fn health(server: &Server) -> (String, serde_json::Value) {
    let page = get(server.status_addr, "/health").await;
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    let status = head.lines().next().unwrap().to_owned();
    (status, serde_json::from_str(body).unwrap())
}

/// Waits until the relay says that it was not given a certificate, and why.
async fn trouble(server: &Server) -> String {
    let start = Instant::now();
    loop {
        let (_, health) = health(server).await;
        if let Some(trouble) = health["certificate"]["trouble"].as_str() {
            return trouble.to_owned();
        }
        assert!(start.elapsed() < PATIENCE, "no trouble is told of");
        sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_certifies_the_relay_and_a_restart_asks_for_nothing() {
    let Some(mut pebble) = Pebble::new("an_authority_certifies_the_relay") else {
        return;
    };
    let relay = Relay::of(&pebble);
    pebble.start(relay.addr(), LONG).await;
    pebble.root_into(&relay.root).await;
    let server = relay.start();
    let first = relay.certified(&server, &pebble).await;
    // Each name is in it, no other, and it is a relay that speaks.
    let stream = relay.connect(NAMES[1], &[]).await.unwrap();
    let mut a = Client::login(stream, 1, Login::default()).await.unwrap();
    let stream = relay.connect(NAMES[0], &[b"http/1.1"]).await.unwrap();
    let fast = Login {
        fast: true,
        ..Login::default()
    };
    let mut b = Client::login(stream, 2, fast).await.unwrap();
    a.send_packet(b.key, b"to a certified relay").await;
    assert_eq!(b.packet().await.1, b"to a certified relay");
    assert!(relay.connect("else.example.com", &[]).await.is_err());
    // The authority's protocol is for authorities: alone, and while one has to see something.
    assert!(
        relay
            .connect(NAMES[0], &[CHALLENGE_PROTOCOL])
            .await
            .is_err()
    );
    let both = relay
        .connect(NAMES[0], &[CHALLENGE_PROTOCOL, b"http/1.1"])
        .await;
    assert_eq!(
        both.unwrap().get_ref().1.alpn_protocol(),
        Some(&b"http/1.1"[..])
    );

    assert_eq!(metric(&server, "weir_relay_certificates_total ").await, 1);
    let until = metric(&server, "weir_relay_certificate_until_seconds ").await;
    let (status, page) = health(&server).await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert_eq!(page["certificate"]["until"], until);
    assert_eq!(page["certificate"]["trouble"], serde_json::Value::Null);
    for name in ["acme-account.json", "acme-certificate.pem"] {
        let path = relay.config.state_dir.join(name);
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }

    server.stop().await;
    pebble.stop().await;
    let server = relay.start();
    // The very first handshake, and nobody could be asked.
    let stream = relay.connect(NAMES[0], &[]).await.unwrap();
    assert_eq!(leaf(&stream), first);
    assert_eq!(
        metric(&server, "weir_relay_certificate_until_seconds ").await,
        until
    );
    assert_eq!(metric(&server, "weir_relay_certificates_total ").await, 0);
    assert_eq!(
        metric(&server, "weir_relay_certificate_failures_total ").await,
        0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_while_the_relay_runs_and_stays_when_that_fails() {
    let Some(mut pebble) = Pebble::new("a_certificate_is_renewed") else {
        return;
    };
    let relay = Relay::of(&pebble);
    pebble.start(relay.addr(), 9).await;
    pebble.root_into(&relay.root).await;
    let server = relay.start();
    let first = relay.certified(&server, &pebble).await;
    let stream = relay.connect(NAMES[0], &[]).await.unwrap();
    let mut client = Client::login(stream, 1, Login::default()).await.unwrap();
    let start = Instant::now();
    while metric(&server, "weir_relay_certificates_total ").await < 2 {
        assert!(start.elapsed() < PATIENCE, "{}", pebble.log());
        sleep(LOOK).await;
    }
    let second = relay.certified(&server, &pebble).await;
    assert_ne!(first, second);
    assert!(
        client.until_pong().await.is_empty(),
        "whoever was there stays"
    );

    pebble.stop().await;
    let why = trouble(&server).await;
    assert!(why.contains("cannot be reached"), "{why}");
    assert!(metric(&server, "weir_relay_certificate_failures_total ").await > 0);
    // What there is goes on being shown, for as long as it is good and after.
    let (_, chain) = tls(relay.addr()).await;
    let kept = relay.config.state_dir.join("acme-certificate.pem");
    let kept = relay::tls::Identity::read(&kept, &kept).unwrap();
    assert_eq!(
        chain.len(),
        3,
        "the certificate, its authority, the relay's key"
    );
    assert_ne!(chain[0], first);
    let (status, page) = health(&server).await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert_eq!(page["certificate"]["until"], kept.validity().unwrap().end);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_certificate_nobody_is_let_in_and_the_reason_is_told() {
    let Some(mut pebble) = Pebble::new("without_a_certificate") else {
        return;
    };
    let relay = Relay::of(&pebble);
    fs::copy(pebble.roots(), &relay.root).unwrap();
    let server = relay.start();
    let why = trouble(&server).await;
    assert!(why.contains("cannot be reached"), "{why}");
    let refused = relay.connect(NAMES[0], &[]).await.unwrap_err().to_string();
    assert!(refused.contains("alert"), "{refused}");
    let (status, page) = health(&server).await;
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(page["status"], "no certificate");
    server.stop().await;

    // The names lead elsewhere.
    let elsewhere = SocketAddr::from((own_address(), 1));
    pebble.start(elsewhere, LONG).await;
    let server = relay.start();
    let why = trouble(&server).await;
    assert!(
        why.contains("port 443 of that name must lead here"),
        "{why}"
    );
    assert!(why.contains("Failed to connect"), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_and_of_no_use_is_asked_for_anew() {
    let Some(mut pebble) = Pebble::new("what_is_kept_and_of_no_use") else {
        return;
    };
    let mut relay = Relay::of(&pebble);
    pebble.start(relay.addr(), LONG).await;
    pebble.root_into(&relay.root).await;
    let server = relay.start();
    let first = relay.certified(&server, &pebble).await;
    server.stop().await;

    // Another name, another contact, and an authority that has forgotten us and has a new root.
    if let Certificate::Acme(acme) = &mut relay.config.certificate {
        acme.domains.push("third.example.com".to_owned());
        acme.contact = vec!["mailto:others@example.com".to_owned()];
    }
    pebble.stop().await;
    pebble.start(relay.addr(), LONG).await;
    pebble.root_into(&relay.root).await;
    let server = relay.start();
    assert_ne!(relay.certified(&server, &pebble).await, first);
    relay.connect("third.example.com", &[]).await.unwrap();
    server.stop().await;

    // A cut file is no certificate, and no reason not to start.
    let kept = relay.config.state_dir.join("acme-certificate.pem");
    fs::write(&kept, &fs::read(&kept).unwrap()[..200]).unwrap();
    let server = relay.start();
    relay.certified(&server, &pebble).await;
    assert_eq!(metric(&server, "weir_relay_certificates_total ").await, 1);
    drop(relay.dir);
}
