//! A relay of a test's own, in this process.

use proto::id::NetworkId;
use proto::key::PermitKey;
use proto::permit::PermitSecret;
use relay::admit::Admission;
use relay::config::{Certificate, Config};
use relay::server::Server;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub struct Place {
    pub server: Server,
    _dir: TempDir,
}

pub fn any() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// A loopback address of the caller's own, where every port is free.
pub fn own_address() -> Ipv4Addr {
    static NUMBER: AtomicU8 = AtomicU8::new(1);
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Ipv4Addr::new(127, 64 | (high & 63), low, number)
}

pub fn secret(seed: u8) -> PermitSecret {
    PermitSecret::from_seed(&[seed; 32]).unwrap()
}

/// Network 1 signs with secret 1, network 2 with secret 2.
pub fn networks() -> Admission {
    let keys = |seed: u8| -> Vec<PermitKey> { vec![secret(seed).public()] };
    Admission::Permit(BTreeMap::from([
        (NetworkId(1), keys(1)),
        (NetworkId(2), keys(2)),
    ]))
}

impl Place {
    pub fn start(admission: Admission, certificate: Certificate, rate: u64) -> Self {
        Self::with(|config| {
            config.admission = admission;
            config.certificate = certificate;
            config.rate = rate;
        })
    }

    /// Open, without TLS and without a rate, but for what `change` changes.
    pub fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            state_dir: dir.path().to_owned(),
            listen: any(),
            stun_listen: any(),
            status_listen: any(),
            certificate: Certificate::Off,
            admission: Admission::Open,
            rate: 0,
            region: Vec::new(),
        };
        change(&mut config);
        let server = Server::start(config).unwrap();
        Self { server, _dir: dir }
    }

    /// Anybody may come, without TLS, as fast as they can.
    pub fn open() -> Self {
        Self::with(|_| {})
    }

    pub fn addr(&self) -> SocketAddr {
        self.server.addr
    }

    /// The value of a line of the metrics page.
    pub async fn metric(&self, name: &str) -> u64 {
        let page = get(self.server.status_addr, "/metrics").await;
        let line = page.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name}: {page}"))
            .trim()
            .parse()
            .unwrap()
    }
}

/// Head and body of a page.
pub async fn get(addr: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: relay\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    page
}
