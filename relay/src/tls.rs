//! What a relay shows: its own X25519 key, and a certificate in which clients find that key.
//!
//! The chain ends with a *meta certificate* that carries the relay's key in its name. A client that
//! trusts the chain's first certificate knows the key before the first frame and skips the answer
//! to its upgrade (TLS 1.3 seals the chain, so nobody else reads it). The certificate proper is the
//! relay's own, made once and kept in the state folder, a given one, or one that an authority gives
//! by ACME and that changes while the relay runs ([`Shown`]). And how another relay of the region, or
//! an authority, is known by its certificate.

use proto::derp::{META_CERTIFICATE_PREFIX, VERSION};
use proto::key::{Fingerprint, KEY_BYTES, NodeSecret, RelayKey};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, DnType, KeyPair, SerialNumber};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::ring::default_provider;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use zeroize::Zeroizing;

/// What a certificate authority asks for to see whether a name is ours (RFC 8737 6.2).
pub const CHALLENGE_PROTOCOL: &[u8] = b"acme-tls/1";
const CERTIFICATE_FILE: &str = "certificate.pem";
const CERTIFICATE_KEY_FILE: &str = "certificate-key.pem";
const RELAY_KEY_FILE: &str = "relay.key";

/// Why the relay has nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds no PEM of the kind that it should.
    #[error("{path} holds no {wanted} in PEM form")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// The relay's key file was cut or is something else.
    #[error("{0} is no relay key; restore it, or remove it to get a new key")]
    RelayKey(PathBuf),
    /// The certificate and its key do not go together, or TLS does not take them.
    #[error("the certificate cannot be used")]
    Certificate(#[from] rustls::Error),
    /// A new certificate could not be made.
    #[error("a certificate could not be made")]
    Make(#[from] rcgen::Error),
    /// No random bytes.
    #[error("the operating system gives no random bytes")]
    Random,
}

/// A certificate and its key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// The relay's own key in its state folder, made on the first call. It stays, because clients
/// remember it.
///
/// # Errors
/// If it can be neither read nor made.
pub fn relay_secret(state_dir: &Path) -> Result<NodeSecret, TlsError> {
    let path = state_dir.join(RELAY_KEY_FILE);
    if !path.exists() {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        getrandom::fill(&mut *bytes).map_err(|_| TlsError::Random)?;
        write_file(&path, &*bytes)?;
    }
    let bytes = Zeroizing::new(read_file(&path)?);
    let bytes: [u8; KEY_BYTES] = bytes
        .as_slice()
        .try_into()
        .map_err(|_| TlsError::RelayKey(path))?;
    Ok(NodeSecret::from_bytes(bytes))
}

impl Identity {
    /// The certificate in these files.
    ///
    /// # Errors
    /// If one cannot be read or is not PEM of its kind.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let chain = chain_in(certificate)?;
        let secret = Zeroizing::new(read_file(key)?);
        let pem = |source| TlsError::Pem {
            path: key.to_owned(),
            wanted: "private key",
            source,
        };
        let key = PrivateKeyDer::from_pem_slice(&secret).map_err(pem)?;
        Ok(Self { chain, key })
    }

    /// The relay's own certificate in its state folder, made on the first call.
    ///
    /// # Errors
    /// If it can be neither read nor made.
    pub fn load_or_create(state_dir: &Path) -> Result<Self, TlsError> {
        let certificate = state_dir.join(CERTIFICATE_FILE);
        let key = state_dir.join(CERTIFICATE_KEY_FILE);
        if !certificate.exists() {
            let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
            let made = CertificateParams::new(["weir-relay".to_owned()])?.self_signed(&pair)?;
            let secret = Zeroizing::new(pair.serialize_pem());
            // The certificate last: while it is absent, the pair counts as not made.
            write_file(&key, secret.as_bytes())?;
            write_file(&certificate, made.pem().as_bytes())?;
        }
        Self::read(&certificate, &key)
    }

    /// What clients may pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let leaf = self.chain.first().map_or(&[][..], |leaf| leaf.as_ref());
        fingerprint(leaf)
    }

    /// From when until when it is valid, in seconds since 1970.
    ///
    /// # Errors
    /// If it is no certificate for servers.
    pub fn validity(&self) -> Result<Range<u64>, TlsError> {
        let leaf = self.leaf()?;
        Ok(limit(&leaf, 0)?..limit(&leaf, u64::from(u32::MAX) << 8)?)
    }

    /// Whether it is for this name, among others.
    #[must_use]
    pub fn names(&self, name: &str) -> bool {
        let (Ok(leaf), Ok(name)) = (self.leaf(), ServerName::try_from(name)) else {
            return false;
        };
        verify_server_name(&leaf, &name).is_ok()
    }

    fn leaf(&self) -> Result<ParsedCertificate<'_>, rustls::Error> {
        let leaf = self.chain.first().ok_or(CertificateError::BadEncoding)?;
        ParsedCertificate::try_from(leaf)
    }

    /// What TLS shows of it: the chain, and the relay's key at its end.
    ///
    /// # Errors
    /// If certificate and key do not go together.
    pub fn certified(mut self, relay: RelayKey) -> Result<CertifiedKey, TlsError> {
        self.chain.push(meta_certificate(relay)?);
        let certified = CertifiedKey::from_der(self.chain, self.key, &default_provider())?;
        Ok(certified)
    }
}

/// When a certificate begins to be valid, for a time before that, or when it ceases, for one after:
/// rustls tells that to whoever wants to use it then. It does so before it looks for authorities, so
/// none are needed.
fn limit(leaf: &ParsedCertificate<'_>, time: u64) -> Result<u64, rustls::Error> {
    let at = UnixTime::since_unix_epoch(Duration::from_secs(time));
    let algorithms = default_provider().signature_verification_algorithms.all;
    let nobody = RootCertStore::empty();
    match verify_server_cert_signed_by_trust_anchor(leaf, &nobody, &[], at, algorithms) {
        Err(rustls::Error::InvalidCertificate(
            CertificateError::NotValidYetContext {
                not_before: limit, ..
            }
            | CertificateError::ExpiredContext {
                not_after: limit, ..
            },
        )) => Ok(limit.as_secs()),
        Err(error) => Err(error),
        Ok(()) => Err(CertificateError::UnknownIssuer.into()),
    }
}

/// What TLS shows: a certificate that may be exchanged while connections come, and for a moment the
/// answers to an authority that wants to know whether a name is ours.
#[derive(Debug, Default)]
pub struct Shown {
    /// Locks and no channel: rustls asks from within a handshake, and cannot wait. Each is held for
    /// as long as a pointer is copied.
    certificate: RwLock<Option<Arc<CertifiedKey>>>,
    answers: RwLock<BTreeMap<String, Arc<CertifiedKey>>>,
}

impl Shown {
    /// Shows this certificate from the next handshake on.
    pub fn show(&self, certificate: CertifiedKey) {
        *write(&self.certificate) = Some(Arc::new(certificate));
    }

    /// Answers an authority that asks about `name`: with a certificate that holds the digest of
    /// what it gave us (RFC 8737 3).
    ///
    /// # Errors
    /// If none can be made.
    pub fn answer(&self, name: &str, digest: &[u8]) -> Result<(), TlsError> {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new([name.to_owned()])?;
        let extension = CustomExtension::new_acme_identifier(digest);
        params.custom_extensions.push(extension);
        let chain = vec![params.self_signed(&pair)?.der().clone()];
        let key = PrivateKeyDer::Pkcs8(pair.serialize_der().into());
        // Unchecked: webpki knows no certificate with such an extension.
        let key = default_provider().key_provider.load_private_key(key)?;
        let answer = CertifiedKey::new(chain, key);
        write(&self.answers).insert(name.to_owned(), Arc::new(answer));
        Ok(())
    }

    /// Answers no authority any more.
    pub fn answer_no_more(&self) {
        write(&self.answers).clear();
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // RFC 8737 3: the protocol is offered alone, and the name stands in the SNI.
        let mut offers = hello.alpn().into_iter().flatten();
        if offers.next() == Some(CHALLENGE_PROTOCOL) && offers.next().is_none() {
            let name = hello.server_name()?.to_ascii_lowercase();
            return read(&self.answers).get(&name).cloned();
        }
        read(&self.certificate).clone()
    }
}

/// Every change under these locks is whole before anything that could panic.
fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// The server's side of TLS 1.2 and 1.3; `challenged` if an authority may come and ask.
///
/// # Errors
/// Never, while *ring* speaks both versions.
pub fn server_config(shown: Arc<Shown>, challenged: bool) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(shown);
    // Connections last for days: resuming one is not worth the memory.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    if challenged {
        config.alpn_protocols.push(CHALLENGE_PROTOCOL.to_vec());
    }
    Ok(config)
}

/// The client's side of TLS 1.3, to another relay: to the one certificate that is pinned, or to
/// whatever the system's authorities vouch for.
#[must_use]
pub fn client_config(pin: Option<Fingerprint>) -> ClientConfig {
    let provider = default_provider();
    let algorithms = provider.signature_verification_algorithms;
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring speaks TLS 1.3");
    let Some(pin) = pin else {
        return config
            .with_root_certificates(system_roots())
            .with_no_client_auth();
    };
    config
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { pin, algorithms }))
        .with_no_client_auth()
}

/// The client's side of TLS, to a server that the system's authorities vouch for, or those in `roots`
/// (PEM).
///
/// # Errors
/// If the file cannot be read or holds no certificate.
pub fn authority_client(roots: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let store = match roots {
        None => system_roots(),
        Some(path) => {
            let mut store = RootCertStore::empty();
            for root in chain_in(path)? {
                store.add(root)?;
            }
            store
        }
    };
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    Ok(config)
}

fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// The certificates in a file, at least one.
fn chain_in(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read_file(path)?).collect();
    let chain = chain.and_then(|chain| match chain.is_empty() {
        true => Err(rustls::pki_types::pem::Error::NoItemsFound),
        false => Ok(chain),
    });
    chain.map_err(|source| TlsError::Pem {
        path: path.to_owned(),
        wanted: "certificate",
        source,
    })
}

/// Takes one certificate, whatever it says.
#[derive(Debug)]
struct Pinned {
    pin: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if fingerprint(leaf) == self.pin {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn fingerprint(leaf: &[u8]) -> Fingerprint {
    Fingerprint(Sha256::digest(leaf).into())
}

/// Signed by a key that is forgotten at once: only its name says something.
fn meta_certificate(relay: RelayKey) -> Result<CertificateDer<'static>, TlsError> {
    let pair = KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let hex = data_encoding::HEXLOWER.encode(&relay.0);
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = DistinguishedName::new();
    let name = format!("{META_CERTIFICATE_PREFIX}{hex}");
    params.distinguished_name.push(DnType::CommonName, name);
    params.serial_number = Some(SerialNumber::from(u64::from(VERSION)));
    Ok(params.self_signed(&pair)?.der().clone())
}

pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File {
        path: path.to_owned(),
        source,
    })
}

/// Writes a file that only we may read, whole or not at all.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), TlsError> {
    let write = || {
        let partial = path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().map_err(|source| TlsError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn key_and_certificate_are_made_once_and_only_we_may_read_them() {
        let dir = tempfile::tempdir().unwrap();
        let key = relay_secret(dir.path()).unwrap().public();
        assert_eq!(key, relay_secret(dir.path()).unwrap().public());
        let first = Identity::load_or_create(dir.path()).unwrap().fingerprint();
        let again = Identity::load_or_create(dir.path()).unwrap();
        assert_eq!(first, again.fingerprint());
        for name in [RELAY_KEY_FILE, CERTIFICATE_KEY_FILE] {
            let mode = fs::metadata(dir.path().join(name)).unwrap().permissions();
            assert_eq!(mode.mode() & 0o777, 0o600, "{name}");
        }
        again.certified(RelayKey(key.0)).unwrap();
    }

    #[test]
    fn a_cut_key_is_refused_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(RELAY_KEY_FILE);
        fs::write(&path, [1; 31]).unwrap();
        let refused = relay_secret(dir.path())
            .err()
            .map(|error| error.to_string());
        assert!(refused.unwrap().contains("is no relay key"));
        assert_eq!(fs::read(&path).unwrap(), [1; 31]);
    }
}
