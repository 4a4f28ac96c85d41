//! A certificate that an authority gives by ACME (RFC 8555), kept good while the relay runs.
//!
//! ```text
//! we ── order, "look at me", signing request ──► authority
//! authority ── TLS with the protocol acme-tls/1 ──► our own port, which shows what it wants to see
//! authority ── certificate ──► state folder ──► shown from the next handshake on
//! ```
//!
//! An order is made when there is no certificate, when the one that is kept is for other names or
//! from another authority, and when two thirds of its time are over. If that fails, the certificate
//! that is shown stays, logs, metrics and the health page say why, and it is tried again after a pause
//! that grows: authorities count failures. Without any certificate, TLS is spoken with the authority
//! alone.
//!
//! Kept are the account with its key, and the certificate with its key, both for our eyes only. The
//! certificate's file begins with a line that says whom it is from.

mod authority;

use crate::config::Acme;
use crate::metrics::Metrics;
use crate::tls::{self, Identity, Shown, TlsError};
use authority::Authority;
use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Identifier, NewAccount,
    NewOrder, Order, OrderStatus, Problem, RetryPolicy,
};
use proto::key::RelayKey;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::ClientConfig;
use serde::{Deserialize, Serialize};
use std::error::Error as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

const ACCOUNT_FILE: &str = "acme-account.json";
const CERTIFICATE_FILE: &str = "acme-certificate.pem";
/// The pause after a first failure, doubled with each further one up to the longest: five failures in
/// a first hour, which is what a large public authority forgives.
const FIRST_PAUSE: Duration = Duration::from_secs(2 * 60);
const LONGEST_PAUSE: Duration = Duration::from_secs(6 * 3_600);
/// The clock may be set while we sleep: it is looked at so often.
const LOOK: Duration = Duration::from_secs(3_600);
/// Longest time from an order to its certificate.
const ATTEMPT: Duration = Duration::from_secs(5 * 60);
/// How an order is asked after.
const POLL: RetryPolicy = RetryPolicy::new().timeout(Duration::from_secs(120));
/// What an authority says that has forgotten our account (RFC 8555 6.7).
const NO_ACCOUNT: &str = "urn:ietf:params:acme:error:accountDoesNotExist";

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
enum AcmeError {
    #[error("the authority cannot be asked, or refuses")]
    Authority(#[from] instant_acme::Error),
    #[error("the authority does not offer to connect to {0} (tls-alpn-01)")]
    NoChallenge(String),
    #[error(
        "the authority does not find this relay under {name}; port 443 of that name must lead here"
    )]
    NotUs { name: String, source: Problem },
    #[error("the authority does not want the order any more")]
    Refused,
    #[error("what the authority gave is no certificate for {0}")]
    OtherNames(String),
    #[error("what the authority gave is not valid now: is this machine's clock right?")]
    Clock,
    #[error("{ACCOUNT_FILE} holds no account: remove it from the state folder to get a new one")]
    Account(#[from] serde_json::Error),
    #[error("the certificate cannot be made, kept or shown")]
    Tls(#[from] TlsError),
    #[error("the signing request cannot be made")]
    Request(#[from] rcgen::Error),
    #[error("the authority takes too long")]
    Late,
}

/// How the certificate is, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// When the one that is shown ends, in seconds since 1970.
    pub until: Option<u64>,
    /// Why there is no newer one, though there should be.
    pub trouble: Option<String>,
}

/// The account as it is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    directory: String,
    contact: Vec<String>,
    credentials: AccountCredentials,
}

/// Asks for certificates and shows them.
pub struct Keeper {
    acme: Acme,
    dir: PathBuf,
    relay: RelayKey,
    client: Arc<ClientConfig>,
    shown: Arc<Shown>,
    metrics: Arc<Metrics>,
    condition: watch::Sender<Condition>,
    /// When to ask next, in seconds since 1970.
    due: u64,
}

impl Keeper {
    /// Shows the certificate that is kept, if there is one, and is ready to [`keep`](Self::keep) it
    /// good. The receiver hears how it is.
    ///
    /// # Errors
    /// If the file that vouches for the authority cannot be used.
    pub fn start(
        acme: Acme,
        state_dir: &Path,
        relay: RelayKey,
        shown: Arc<Shown>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, watch::Receiver<Condition>), TlsError> {
        let client = tls::authority_client(acme.directory_roots.as_deref())?;
        let (condition, heard) = watch::channel(Condition::default());
        let mut keeper = Self {
            acme,
            dir: state_dir.to_owned(),
            relay,
            client: Arc::new(client),
            shown,
            metrics,
            condition,
            due: 0,
        };
        if keeper.dir.join(CERTIFICATE_FILE).exists() {
            match keeper.restore() {
                Ok(due) => keeper.due = due,
                Err(error) => {
                    let reason = &error as &dyn std::error::Error;
                    tracing::warn!(reason, "the certificate that was kept cannot be shown");
                }
            }
        }
        Ok((keeper, heard))
    }

    /// Keeps the certificate good, for as long as the relay runs.
    pub async fn keep(mut self) {
        let mut failures = 0;
        loop {
            while let Some(left) = self.due.checked_sub(now()).filter(|left| *left > 0) {
                sleep(Duration::from_secs(left).min(LOOK)).await;
            }
            match self.obtain().await {
                Ok(due) => {
                    self.due = due;
                    failures = 0;
                    Metrics::add(&self.metrics.certificates, 1);
                    let names = self.acme.domains.join(", ");
                    tracing::info!(names, "the authority gave a certificate");
                }
                Err(error) => {
                    let pause = pause(failures);
                    self.due = now().saturating_add(pause.as_secs());
                    failures += 1;
                    Metrics::add(&self.metrics.certificate_failures, 1);
                    let trouble = with_sources(&error);
                    tracing::warn!(trouble, ?pause, "no new certificate");
                    self.condition
                        .send_modify(|condition| condition.trouble = Some(trouble));
                }
            }
        }
    }

    /// Shows what is kept. Returns when a new one is to be asked for.
    fn restore(&self) -> Result<u64, AcmeError> {
        let path = self.dir.join(CERTIFICATE_FILE);
        let kept = Zeroizing::new(tls::read_file(&path)?);
        let identity = Identity::read(&path, &path)?;
        let ours = kept.starts_with(self.origin().as_bytes())
            && self.acme.domains.iter().all(|name| identity.names(name));
        let due = self.show(identity)?;
        // Shown it is until there is a better one: it may be good for those who are to come.
        Ok(if ours { due } else { 0 })
    }

    /// Asks for a certificate, keeps it and shows it. Returns when to ask for the next.
    async fn obtain(&self) -> Result<u64, AcmeError> {
        let done = timeout(ATTEMPT, self.ordered()).await;
        self.shown.answer_no_more();
        let pem = done.map_err(|_| AcmeError::Late)??;
        // What is of no use must not take the place of what is.
        let fresh = self.dir.join(CERTIFICATE_FILE).with_extension("fresh");
        tls::write_file(&fresh, pem.as_bytes())?;
        let identity = Identity::read(&fresh, &fresh)?;
        if let Some(name) = self.acme.domains.iter().find(|name| !identity.names(name)) {
            return Err(AcmeError::OtherNames(name.clone()));
        }
        let validity = identity.validity()?;
        if renewal(validity.start, validity.end) <= now() || validity.start > now() + LOOK.as_secs()
        {
            return Err(AcmeError::Clock);
        }
        let path = self.dir.join(CERTIFICATE_FILE);
        fs::rename(&fresh, &path).map_err(|source| TlsError::File { path, source })?;
        self.show(identity)
    }

    fn show(&self, identity: Identity) -> Result<u64, AcmeError> {
        let validity = identity.validity()?;
        self.shown.show(identity.certified(self.relay)?);
        self.metrics
            .certificate_until
            .store(validity.end, Ordering::Relaxed);
        self.condition.send_replace(Condition {
            until: Some(validity.end),
            trouble: None,
        });
        Ok(renewal(validity.start, validity.end))
    }

    /// A key and the chain for it, in PEM, behind a line that says whom it is from.
    async fn ordered(&self) -> Result<Zeroizing<String>, AcmeError> {
        let mut order = match self.order().await {
            Err(AcmeError::Authority(instant_acme::Error::Api(problem)))
                if problem.r#type.as_deref() == Some(NO_ACCOUNT) =>
            {
                // It was removed there: begin anew.
                let path = self.dir.join(ACCOUNT_FILE);
                fs::remove_file(&path).map_err(|source| TlsError::File { path, source })?;
                self.order().await?
            }
            order => order?,
        };
        self.prove(&mut order).await?;
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(self.acme.domains.clone())?;
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&pair)?;
        order.finalize_csr(request.der()).await?;
        let chain = order.poll_certificate(&POLL).await?;
        let key = Zeroizing::new(pair.serialize_pem());
        Ok(Zeroizing::new(format!("{}{}{chain}", self.origin(), &*key)))
    }

    async fn order(&self) -> Result<Order, AcmeError> {
        let account = self.account().await?;
        let names = self.acme.domains.iter();
        let names: Vec<_> = names.map(|name| Identifier::Dns(name.clone())).collect();
        Ok(account.new_order(&NewOrder::new(&names)).await?)
    }

    /// Shows the authority, for each name, that it is ours.
    async fn prove(&self, order: &mut Order) -> Result<(), AcmeError> {
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            // One that was proven lately counts for a while.
            if authorization.status != AuthorizationStatus::Pending {
                continue;
            }
            let name = authorization.identifier().to_string();
            let challenge = authorization.challenge(ChallengeType::TlsAlpn01);
            let mut challenge = challenge.ok_or_else(|| AcmeError::NoChallenge(name.clone()))?;
            let digest = challenge.key_authorization().digest();
            self.shown.answer(&name, digest.as_ref())?;
            challenge.set_ready().await?;
        }
        match order.poll_ready(&POLL).await {
            Ok(OrderStatus::Ready) => Ok(()),
            Err(error @ instant_acme::Error::Timeout(_)) => Err(error.into()),
            Ok(_) | Err(_) => Err(why(order).await?),
        }
    }

    /// Our account with the authority; made if there is none yet.
    async fn account(&self) -> Result<Account, AcmeError> {
        let path = self.dir.join(ACCOUNT_FILE);
        let Acme {
            contact, directory, ..
        } = &self.acme;
        let builder = || Account::builder_with_http(Box::new(Authority::new(self.client.clone())));
        let urls: Vec<&str> = contact.iter().map(String::as_str).collect();
        if let Some(mut kept) = kept_account(&path)?.filter(|kept| kept.directory == *directory) {
            let known = kept.contact == *contact;
            let json = Zeroizing::new(serde_json::to_vec(&kept.credentials)?);
            let account = builder().from_credentials(kept.credentials).await?;
            if !known {
                account.update_contacts(&urls).await?;
                kept.credentials = serde_json::from_slice(&json)?;
                kept.contact.clone_from(contact);
                keep_account(&path, &kept)?;
            }
            return Ok(account);
        }
        let wanted = NewAccount {
            contact: &urls,
            // The configuration is refused without it.
            terms_of_service_agreed: true,
            only_return_existing: false,
        };
        let (account, credentials) = builder().create(&wanted, directory.clone(), None).await?;
        let kept = Kept {
            directory: directory.clone(),
            contact: contact.clone(),
            credentials,
        };
        keep_account(&path, &kept)?;
        Ok(account)
    }

    /// The first line of a certificate's file: PEM may have words around it (RFC 7468 2).
    fn origin(&self) -> String {
        format!("A certificate of {}\n", self.acme.directory)
    }
}

fn kept_account(path: &Path) -> Result<Option<Kept>, AcmeError> {
    match tls::read_file(path) {
        Ok(json) => Ok(Some(serde_json::from_slice(&Zeroizing::new(json))?)),
        Err(TlsError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn keep_account(path: &Path, kept: &Kept) -> Result<(), AcmeError> {
    let json = Zeroizing::new(serde_json::to_vec(kept)?);
    Ok(tls::write_file(path, &json)?)
}

/// What the authority found under the first name that it did not take.
async fn why(order: &mut Order) -> Result<AcmeError, instant_acme::Error> {
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        let name = authorization.identifier().to_string();
        let state = authorization.refresh().await?;
        let mut challenges = state.challenges.iter();
        if let Some(source) = challenges.find_map(|challenge| challenge.error.clone()) {
            return Ok(AcmeError::NotUs { name, source });
        }
    }
    Ok(AcmeError::Refused)
}

/// When two thirds of its time are over.
fn renewal(start: u64, end: u64) -> u64 {
    let third = end.saturating_sub(start) / 3;
    end.saturating_sub(third)
}

/// The pause after so many failures in a row.
fn pause(failures: u32) -> Duration {
    let factor = 2_u32.saturating_pow(failures.min(16));
    FIRST_PAUSE.saturating_mul(factor).min(LONGEST_PAUSE)
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// An error and what is behind it, in one line.
fn with_sources(error: &AcmeError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        // Transparent errors say the same twice.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_is_not_pressed() {
        let minutes: Vec<u64> = (0..10).map(|n| pause(n).as_secs() / 60).collect();
        assert_eq!(minutes, [2, 4, 8, 16, 32, 64, 128, 256, 360, 360]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }

    #[test]
    fn a_certificate_is_replaced_when_a_third_of_its_time_is_left() {
        assert_eq!(renewal(1_000, 1_090), 1_060);
        assert_eq!(renewal(1_000, 1_001), 1_001);
        assert_eq!(renewal(5, 4), 4);
    }
}
