//! The control channel's two ends: who the coordinator is, and who the node is.
//!
//! The coordinator shows one certificate, its own (made once, kept in the state folder) or a given
//! one; nodes pin it by [`Fingerprint`]. A node shows a self-signed certificate of which only the
//! key matters: [`MachineVerifier`] takes exactly one P-256 leaf and checks that the peer signed
//! this very handshake with it, and [`MachineId`] is the hash of that key. Names, dates and
//! signatures inside a node's certificate say nothing and are not looked at.
//!
//! TLS 1.3 only, without resumption: every connection proves its key anew.

use proto::control::{EXPORTER_BYTES, EXPORTER_LABEL};
use proto::key::{Fingerprint, MachineId};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    ServerConnection, SignatureScheme,
};
use sha2::{Digest, Sha256};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// SubjectPublicKeyInfo of an uncompressed P-256 point up to the point itself (RFC 5480 2.1).
const P256_PREFIX: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];
const P256_SPKI_BYTES: usize = P256_PREFIX.len() + 64;
const CERTIFICATE_FILE: &str = "certificate.pem";
const KEY_FILE: &str = "certificate-key.pem";

/// Why the coordinator has no certificate to show.
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
    /// The certificate and its key do not go together, or TLS does not take them.
    #[error("the certificate cannot be used")]
    Certificate(#[from] Error),
    /// A new certificate could not be made.
    #[error("a certificate could not be made")]
    Make(#[from] rcgen::Error),
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// The machine whose key signed the handshake.
    pub machine: MachineId,
    /// What a key proof on this connection is bound to.
    pub exporter: [u8; EXPORTER_BYTES],
    /// Where the connection comes from.
    pub remote: std::net::SocketAddr,
}

impl Channel {
    /// The channel of a finished handshake, or `None` if the peer showed no usable key.
    #[must_use]
    pub fn of(connection: &ServerConnection, remote: std::net::SocketAddr) -> Option<Self> {
        let leaf = connection.peer_certificates()?.first()?;
        let machine = machine_id(leaf).ok()?;
        let exporter = connection
            .export_keying_material([0; EXPORTER_BYTES], EXPORTER_LABEL, None)
            .ok()?;
        Some(Self {
            machine,
            exporter,
            remote,
        })
    }
}

/// The coordinator's certificate and what nodes pin of it.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
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
        let read = |path: &Path| {
            fs::read(path).map_err(|source| TlsError::File {
                path: path.to_owned(),
                source,
            })
        };
        let chain = CertificateDer::pem_slice_iter(&read(certificate)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(pem(certificate, "certificate"))?;
        let secret = zeroize::Zeroizing::new(read(key)?);
        let key = PrivateKeyDer::from_pem_slice(&secret).map_err(pem(key, "private key"))?;
        Ok(Self { chain, key })
    }

    /// The coordinator's own certificate in its state folder, made on the first call.
    ///
    /// # Errors
    /// If it can be neither read nor made.
    pub fn load_or_create(state_dir: &Path) -> Result<Self, TlsError> {
        let (certificate, key) = (state_dir.join(CERTIFICATE_FILE), state_dir.join(KEY_FILE));
        if !certificate.exists() {
            let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
            let params = rcgen::CertificateParams::new(["weir-coordinator".to_owned()])?;
            let made = params.self_signed(&pair)?;
            let secret = zeroize::Zeroizing::new(pair.serialize_pem());
            // The certificate last: while it is absent, the pair counts as not made.
            write_new(&key, secret.as_bytes())?;
            write_new(&certificate, made.pem().as_bytes())?;
        }
        Self::read(&certificate, &key)
    }

    /// What nodes pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let leaf = self.chain.first().map_or(&[][..], |leaf| leaf.as_ref());
        Fingerprint(Sha256::digest(leaf).into())
    }

    /// The TLS side of the node API.
    ///
    /// # Errors
    /// If certificate and key do not go together.
    pub fn server_config(self) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = MachineVerifier {
            provider: Arc::clone(&provider),
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(self.chain, self.key)?;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
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

/// The machine that this certificate's key names.
fn machine_id(leaf: &CertificateDer<'_>) -> Result<MachineId, Error> {
    let parsed = ParsedCertificate::try_from(leaf)?;
    let spki = parsed.subject_public_key_info();
    if spki.len() != P256_SPKI_BYTES || !spki.starts_with(&P256_PREFIX) {
        return Err(Error::InvalidCertificate(CertificateError::BadEncoding));
    }
    Ok(MachineId(Sha256::digest(&spki).into()))
}

/// Takes any machine that proves its P-256 key; who may do what is decided later, by [`MachineId`].
#[derive(Debug)]
struct MachineVerifier {
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for MachineVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if !intermediates.is_empty() {
            return Err(Error::InvalidCertificate(CertificateError::BadEncoding));
        }
        machine_id(end_entity)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
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
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verifier() -> MachineVerifier {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        MachineVerifier { provider }
    }

    fn leaf(algorithm: &'static rcgen::SignatureAlgorithm) -> CertificateDer<'static> {
        let pair = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let params = rcgen::CertificateParams::new(["node".to_owned()]).unwrap();
        params.self_signed(&pair).unwrap().der().clone()
    }

    #[test]
    fn exactly_one_p256_leaf_is_a_machine() {
        let p256 = leaf(&rcgen::PKCS_ECDSA_P256_SHA256);
        let now = UnixTime::now();
        assert!(verifier().verify_client_cert(&p256, &[], now).is_ok());
        let with_chain = verifier().verify_client_cert(&p256, std::slice::from_ref(&p256), now);
        assert!(with_chain.is_err(), "a chain is not a machine");
        for other in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            assert!(
                verifier()
                    .verify_client_cert(&leaf(other), &[], now)
                    .is_err()
            );
        }
        let garbage = CertificateDer::from(vec![0x30, 0x03, 0x02, 0x01, 0x00]);
        assert!(verifier().verify_client_cert(&garbage, &[], now).is_err());
    }

    #[test]
    fn the_own_certificate_is_made_once_and_only_we_may_read_its_key() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(dir.path()).unwrap().fingerprint();
        let again = Identity::load_or_create(dir.path()).unwrap();
        assert_eq!(first, again.fingerprint());
        let mode = fs::metadata(dir.path().join(KEY_FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        again.server_config().unwrap();
    }
}
