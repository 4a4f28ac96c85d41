//! A client of a relay whose calls wait, with TLS or without.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use proto::derp::login::NONCE_BYTES;
use proto::derp::{ClientInfo, Frame, HEADER_BYTES, Header, LoginBox, Sealed, VERSION, kind};
use proto::key::{NodeKey, NodeSecret};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// Where a relay is, and how it is spoken to.
#[derive(Clone)]
pub struct Door {
    /// Its address.
    pub addr: SocketAddr,
    /// `None`: plain HTTP.
    pub tls: Option<Arc<ClientConfig>>,
    /// Bytes read at once.
    pub buffer: usize,
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

/// A client that is logged in.
pub struct Client {
    /// Its address.
    pub key: NodeKey,
    stream: BufReader<Wire>,
}

/// TLS to the relay that has this state folder: its own certificate is the only one taken.
pub fn tls_of(state: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(
        state.join("certificate.pem"),
    )?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

impl Client {
    /// Logs in as the node of this number, the same whenever it is asked for.
    pub fn join(door: &Door, number: u64) -> anyhow::Result<Self> {
        let mut seed = [7; 32];
        seed[..8].copy_from_slice(&number.to_be_bytes());
        let secret = NodeSecret::from_bytes(seed);
        let key = secret.public();
        let tcp = TcpStream::connect(door.addr)?;
        tcp.set_nodelay(true)?;
        let wire = match &door.tls {
            None => Wire::Plain(tcp),
            Some(config) => {
                let name = ServerName::try_from("weir-relay")?;
                let tls = ClientConnection::new(Arc::clone(config), name)?;
                Wire::Tls(Box::new(StreamOwned::new(tls, tcp)))
            }
        };
        let stream = BufReader::with_capacity(door.buffer, wire);
        let mut client = Self { key, stream };
        client.send(b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n")?;
        let hello = client.next(kind::SERVER_KEY)?;
        let Frame::ServerKey(relay) = Frame::decode(kind::SERVER_KEY, &hello)? else {
            bail!("the relay did not say its key");
        };
        let agreed = secret.agree(relay.0).context("the relay's key is no key")?;
        let info = ClientInfo {
            version: VERSION,
            ..ClientInfo::default()
        };
        // The relay is ours and lives for one measurement: its logins need no secrecy.
        let nonce = [0; NONCE_BYTES];
        let bytes = &LoginBox::new(&agreed).seal(nonce, &serde_json::to_vec(&info)?);
        let sealed = Sealed { nonce, bytes };
        client.send(&Frame::ClientInfo { key, sealed }.to_vec())?;
        client.next(kind::SERVER_INFO)?;
        Ok(client)
    }

    /// Writes whole frames.
    pub fn send(&mut self, frames: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(frames)
    }

    /// The connection, to end it from elsewhere.
    pub fn connection(&self) -> io::Result<TcpStream> {
        match self.stream.get_ref() {
            Wire::Plain(tcp) => tcp.try_clone(),
            Wire::Tls(tls) => tls.get_ref().try_clone(),
        }
    }

    /// The body of the next frame of this kind; others are skipped.
    pub fn next(&mut self, wanted: u8) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        self.next_into(wanted, &mut body)?;
        Ok(body)
    }

    /// The same, into a buffer that is kept for the next one.
    pub fn next_into(&mut self, wanted: u8, body: &mut Vec<u8>) -> io::Result<()> {
        loop {
            let mut header = [0; HEADER_BYTES];
            self.stream.read_exact(&mut header)?;
            let Header { kind, length } = Header::decode(header).map_err(io::Error::other)?;
            body.resize(length, 0);
            self.stream.read_exact(body)?;
            if kind == wanted {
                return Ok(());
            }
        }
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(tcp) => tcp.read(buffer),
            Self::Tls(tls) => tls.read(buffer),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(tcp) => tcp.write(bytes),
            Self::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.flush(),
            Self::Tls(tls) => tls.flush(),
        }
    }
}
