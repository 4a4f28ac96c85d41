//! The node's secrets: the WireGuard key and the machine key.
//!
//! Both are made here, on first use, and never leave: whoever needs them gets an operation. The
//! one exception is netlink, which must be told the WireGuard private key
//! ([`Identity::with_node_secret`]). The machine key (P-256) signs behind rustls' `SigningKey`, so
//! that a key in a TPM can take its place without anyone noticing.
//!
//! On disk is one file, `identity`, mode 0600, written whole and renamed into place ([`file`]). A
//! file that cannot be read as what was written is an error that says so; it is never replaced,
//! because a new identity is a new node and whoever runs this machine must want that.

mod file;
mod seals;

pub use file::FileError;
pub use seals::Seals;

use proto::control::{EXPORTER_BYTES, KeyProof, ProofContext, prove_node_key};
use proto::derp::LoginBox;
use proto::key::{
    ChallengeKey, DiscoKey, DiscoSecret, KEY_BYTES, MachineId, NodeKey, NodeSecret, RelayKey,
};
use ring::hmac;
use rustls::crypto::ring::sign::any_ecdsa_type;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

/// Name of the file in the state folder.
pub const FILE_NAME: &str = "identity";
/// What the discovery key is derived with.
const DISCO_LABEL: &[u8] = b"weir discovery key 1";

/// This machine's identity. Deliberately without `Debug`, `Clone` and serde.
pub struct Identity {
    node: NodeSecret,
    machine: MachineId,
    certificate: Arc<CertifiedKey>,
    /// The machine key, PKCS#8, to be kept.
    pkcs8: Zeroizing<Vec<u8>>,
    path: PathBuf,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read, trusted or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel gave no random bytes.
    #[error("the kernel gave no random bytes for a new key")]
    Randomness,
    /// The machine key is not one that TLS can sign with.
    #[error("the machine key in `{path}` is not a P-256 key that TLS can use")]
    MachineKey {
        /// The file.
        path: PathBuf,
    },
}

impl Identity {
    /// The identity kept in `folder`; a new one if none is kept there. The folder is made, mode
    /// 0700, if it is not there.
    ///
    /// # Errors
    /// [`IdentityError`]; a file that is there is then as it was.
    pub fn load_or_create(folder: &Path) -> Result<Self, IdentityError> {
        let path = folder.join(FILE_NAME);
        if let Some(keys) = file::read(&path)? {
            return Self::from_keys(keys, path);
        }
        let new = Self::fresh(folder)?;
        new.keep()?;
        Ok(new)
    }

    /// A new identity for `folder`, in memory only until [`Self::keep`].
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn fresh(folder: &Path) -> Result<Self, IdentityError> {
        Self::from_keys(new_keys()?, folder.join(FILE_NAME))
    }

    /// Writes the identity into its folder, if it is not there yet. To be called before anyone else
    /// learns of it.
    ///
    /// # Errors
    /// [`IdentityError::File`].
    pub fn keep(&self) -> Result<(), IdentityError> {
        if self.path.exists() {
            return Ok(());
        }
        let keys = file::Keys {
            node: Zeroizing::new(*self.node.expose()),
            machine: self.pkcs8.clone(),
        };
        let folder = self.path.parent().unwrap_or(Path::new("."));
        Ok(file::write_new(folder, &self.path, &keys)?)
    }

    /// Whether `folder` keeps an identity: whether this machine ever was set up.
    #[must_use]
    pub fn exists(folder: &Path) -> bool {
        folder.join(FILE_NAME).exists()
    }

    fn from_keys(keys: file::Keys, path: PathBuf) -> Result<Self, IdentityError> {
        let broken = |path: &Path| IdentityError::MachineKey {
            path: path.to_owned(),
        };
        let pkcs8 = PrivatePkcs8KeyDer::from(keys.machine.as_slice());
        let signing = any_ecdsa_type(&PrivateKeyDer::Pkcs8(pkcs8)).map_err(|_| broken(&path))?;
        let spki = signing.public_key().ok_or_else(|| broken(&path))?;
        let machine = MachineId(Sha256::digest(&spki).into());
        let certificate = self_signed(&keys.machine).map_err(|_| broken(&path))?;
        Ok(Self {
            node: NodeSecret::from_bytes(*keys.node),
            machine,
            certificate: Arc::new(CertifiedKey::new(vec![certificate], signing)),
            pkcs8: keys.machine,
            path,
        })
    }

    /// The WireGuard public key.
    #[must_use]
    pub fn node_key(&self) -> NodeKey {
        self.node.public()
    }

    /// The key that probes of paths are sealed with: the same after every start, so that peers need
    /// nobody to tell them of a new one.
    #[must_use]
    pub fn disco_key(&self) -> DiscoKey {
        self.disco_secret().public()
    }

    /// Derived from the WireGuard key. Whoever needs it gets [`Seals`].
    fn disco_secret(&self) -> DiscoSecret {
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.node.expose());
        let mut derived = Zeroizing::new([0; KEY_BYTES]);
        derived.copy_from_slice(hmac::sign(&key, DISCO_LABEL).as_ref());
        DiscoSecret::from_bytes(*derived)
    }

    /// Seals and opens the login at a relay. `None` if its key is a low-order point.
    #[must_use]
    pub fn relay_login(&self, relay: RelayKey) -> Option<LoginBox> {
        Some(LoginBox::new(&*self.node.agree(relay.0)?))
    }

    /// The hash of the machine key: who this node is on a control connection.
    #[must_use]
    pub fn machine_id(&self) -> MachineId {
        self.machine
    }

    /// Proof, for one TLS connection, that this machine holds the WireGuard private key. `None` if
    /// the challenge is a low-order point.
    #[must_use]
    pub fn prove(
        &self,
        challenge: ChallengeKey,
        exporter: &[u8; EXPORTER_BYTES],
    ) -> Option<KeyProof> {
        let context = ProofContext {
            exporter,
            machine: self.machine,
        };
        prove_node_key(&self.node, challenge, context)
    }

    /// The self-signed certificate of the machine key and the key that signs for it.
    #[must_use]
    pub fn client_certificate(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certificate)
    }

    /// Lends the WireGuard private key to the one caller that tells it to the kernel.
    pub fn with_node_secret<T>(&self, tell: impl FnOnce(&[u8; KEY_BYTES]) -> T) -> T {
        tell(self.node.expose())
    }

    /// Forgets the identity: the file is overwritten and removed. What is in memory goes when the
    /// last holder drops it.
    ///
    /// # Errors
    /// [`FileError`] if the file is still there afterwards.
    pub fn wipe(&self) -> Result<(), FileError> {
        file::wipe(&self.path)
    }
}

fn new_keys() -> Result<file::Keys, IdentityError> {
    let mut node = Zeroizing::new([0; KEY_BYTES]);
    getrandom::fill(&mut *node).map_err(|_| IdentityError::Randomness)?;
    let machine = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
        .map_err(|_| IdentityError::Randomness)?;
    Ok(file::Keys {
        node,
        machine: Zeroizing::new(machine.serialize_der()),
    })
}

/// A certificate over the machine key. Made anew at each start: nobody looks at more of it than
/// its key, so there is nothing in it to keep.
fn self_signed(pkcs8: &[u8]) -> Result<rustls::pki_types::CertificateDer<'static>, rcgen::Error> {
    let pkcs8 = PrivatePkcs8KeyDer::from(pkcs8);
    let pair =
        rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "weir node");
    Ok(params.self_signed(&pair)?.der().clone())
}

#[cfg(test)]
mod tests;
