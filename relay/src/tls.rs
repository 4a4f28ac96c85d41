//! What a relay shows: its own X25519 key, and a certificate in which clients find that key.
//!
//! The chain ends with a *meta certificate* that carries the relay's key in its name. A client that
//! trusts the chain's first certificate knows the key before the first frame and skips the answer
//! to its upgrade (TLS 1.3 seals the chain, so nobody else reads it). The certificate proper is the
//! relay's own, made once and kept in the state folder, or a given one. And how another relay of the
//! region is known by its certificate.

use proto::derp::{META_CERTIFICATE_PREFIX, VERSION};
use proto::key::{Fingerprint, KEY_BYTES, NodeSecret, RelayKey};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SerialNumber};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use sha2::{Digest, Sha256};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

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
        write_new(&path, &*bytes)?;
    }
    let bytes = Zeroizing::new(read(&path)?);
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
        let pem = |path: &Path, wanted| {
            let path = path.to_owned();
            move |source| TlsError::Pem {
                path,
                wanted,
                source,
            }
        };
        let chain = CertificateDer::pem_slice_iter(&read(certificate)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(pem(certificate, "certificate"))?;
        let secret = Zeroizing::new(read(key)?);
        let key = PrivateKeyDer::from_pem_slice(&secret).map_err(pem(key, "private key"))?;
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
            write_new(&key, secret.as_bytes())?;
            write_new(&certificate, made.pem().as_bytes())?;
        }
        Self::read(&certificate, &key)
    }

    /// What clients may pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let leaf = self.chain.first().map_or(&[][..], |leaf| leaf.as_ref());
        fingerprint(leaf)
    }

    /// The server's side of TLS 1.2 and 1.3, with the relay's key at the end of the chain.
    ///
    /// # Errors
    /// If certificate and key do not go together.
    pub fn server_config(mut self, relay: RelayKey) -> Result<ServerConfig, TlsError> {
        self.chain.push(meta_certificate(relay)?);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(self.chain, self.key)?;
        // Connections last for days: resuming one is not worth the memory.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// The client's side of TLS 1.3, to another relay: to the one certificate that is pinned, or to
/// whatever the system's authorities vouch for.
#[must_use]
pub fn client_config(pin: Option<Fingerprint>) -> ClientConfig {
    let provider = rustls::crypto::ring::default_provider();
    let algorithms = provider.signature_verification_algorithms;
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring speaks TLS 1.3");
    let Some(pin) = pin else {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return config.with_root_certificates(roots).with_no_client_auth();
    };
    config
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { pin, algorithms }))
        .with_no_client_auth()
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

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File {
        path: path.to_owned(),
        source,
    })
}

/// Writes a file that only we may read, whole or not at all.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), TlsError> {
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
        again.server_config(RelayKey(key.0)).unwrap();
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
