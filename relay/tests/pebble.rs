//! A certificate authority that speaks ACME: Pebble, which Let's Encrypt wrote to test clients with,
//! with a name server that leads every name to one address.

use crate::place::own_address;
use rcgen::{CertificateParams, KeyPair};
use relay::tls::authority_client;
use rustls::pki_types::ServerName;
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::sleep;
use tokio_rustls::TlsConnector;

/// Longest wait for anything here: other tests may have the processors.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks.
pub const LOOK: Duration = Duration::from_millis(20);
const PORT: u16 = 14_000;
const MANAGEMENT: u16 = 15_000;

/// A place for an authority; it runs when [`start`](Self::start) is called.
pub struct Pebble {
    dir: TempDir,
    addr: Ipv4Addr,
    running: Vec<Child>,
}

impl Pebble {
    /// `None`, and the test listed as skipped, where there is no Pebble.
    pub fn new(test: &str) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let is_there = |name: &str| std::env::split_paths(&path).any(|dir| dir.join(name).exists());
        if !is_there("pebble") || !is_there("pebble-challtestsrv") {
            skip(test, "no Pebble (a certificate authority for tests)");
            return None;
        }
        let pebble = Self {
            dir: tempfile::tempdir().unwrap(),
            addr: own_address(),
            running: Vec::new(),
        };
        pebble.make_certificate();
        Some(pebble)
    }

    /// What the relay's configuration says.
    pub fn directory(&self) -> String {
        format!("https://{}:{PORT}/dir", self.addr)
    }

    /// Who vouches for the directory.
    pub fn roots(&self) -> PathBuf {
        self.dir.path().join("door.pem")
    }

    fn make_certificate(&self) {
        let pair = KeyPair::generate().unwrap();
        let params = CertificateParams::new([self.addr.to_string()]).unwrap();
        let made = params.self_signed(&pair).unwrap();
        fs::write(self.roots(), made.pem()).unwrap();
        fs::write(self.dir.path().join("door-key.pem"), pair.serialize_pem()).unwrap();
    }

    /// Starts it with nothing in its memory. Names lead to `relay`, its certificates are good for
    /// `seconds`. Returns when it answers.
    pub async fn start(&mut self, relay: SocketAddr, seconds: u64) {
        let (addr, dir) = (self.addr, self.dir.path());
        let config = serde_json::json!({ "pebble": {
            "listenAddress": format!("{addr}:{PORT}"),
            "managementListenAddress": format!("{addr}:{MANAGEMENT}"),
            "certificate": self.roots(),
            "privateKey": dir.join("door-key.pem"),
            "httpPort": 1,
            "tlsPort": relay.port(),
            "certificateValidityPeriod": seconds,
        }});
        let path = dir.join("pebble.json");
        fs::write(&path, config.to_string()).unwrap();
        let names = format!("{addr}:8053");
        let mut server = Command::new("pebble-challtestsrv");
        server.args(["-http01", "", "-https01", "", "-tlsalpn01", ""]);
        server.args(["-dns01", &names, "-defaultIPv6", "", "-defaultIPv4"]);
        server.args([
            &relay.ip().to_string(),
            "-management",
            &format!("{addr}:8055"),
        ]);
        let mut authority = Command::new("pebble");
        authority
            .args(["-strict", "-dnsserver", &names, "-config"])
            .arg(&path);
        // No waiting, no proof that is remembered, and no nonces refused by the dice.
        authority.env("PEBBLE_VA_NOSLEEP", "1");
        authority
            .env("PEBBLE_AUTHZREUSE", "0")
            .env("PEBBLE_WFE_NONCEREJECT", "0");
        for mut command in [server, authority] {
            let mut log = fs::File::options();
            let log = log.create(true).append(true).open(dir.join("log")).unwrap();
            command.stdin(Stdio::null()).kill_on_drop(true);
            command.stdout(log.try_clone().unwrap()).stderr(log);
            self.running.push(command.spawn().unwrap());
        }
        let start = Instant::now();
        while TcpStream::connect((addr, MANAGEMENT)).await.is_err()
            || TcpStream::connect((addr, PORT)).await.is_err()
        {
            assert!(start.elapsed() < PATIENCE, "{}", self.log());
            sleep(LOOK).await;
        }
    }

    /// Ends it, and with it all that it knows.
    pub async fn stop(&mut self) {
        for mut child in self.running.drain(..) {
            child.kill().await.unwrap();
        }
    }

    /// Writes the certificate that vouches for those that it gives into `path`.
    pub async fn root_into(&self, path: &Path) {
        let config = authority_client(Some(&self.roots())).unwrap();
        let tcp = TcpStream::connect((self.addr, MANAGEMENT)).await.unwrap();
        let name = ServerName::try_from(self.addr.to_string()).unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let mut stream = connector.connect(name, tcp).await.unwrap();
        let request = "GET /roots/0 HTTP/1.0\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // It may hang up without TLS's last word.
        let _ = stream.read_to_string(&mut answer).await;
        let (_, root) = answer.split_once("\r\n\r\n").unwrap();
        fs::write(path, root).unwrap();
    }

    /// What it wrote down.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

/// Lists a test that cannot run here, with its reason.
fn skip(test: &str, reason: &str) {
    eprintln!("skipped {test}: {reason}");
    if let Some(list) = std::env::var_os("WEIR_SKIPS") {
        let mut file = fs::File::options();
        let mut file = file.create(true).append(true).open(list).unwrap();
        writeln!(file, "relay/acme::{test}\t{reason}").unwrap();
    }
}
