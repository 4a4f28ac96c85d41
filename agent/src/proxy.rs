//! The way out of a network whose only way out is an HTTP proxy.
//!
//! ```text
//! relay, control ──HOST:PORT──► Proxy ── NO_PROXY names it, or it is this machine ──► None: directly
//!                                 └── else ──► the proxy ── CONNECT HOST:PORT ──► a stream to it
//! ```
//!
//! Which proxy, and for whom not, stands where services of Linux have it: `HTTPS_PROXY` and
//! `NO_PROXY` in the environment ([`Exempt`] has the rules). A password has no place there, since
//! every user may ask systemd for a unit's environment: it comes as a credential of the service, a
//! file of one line `USER:PASSWORD`, and leaves this module only towards the proxy.
//!
//! The proxy learns host and port, and carries TLS that ends at the host: certificates are checked
//! as they are without it. Names are looked up by the proxy, because such a network often knows none
//! but its own. A setting that cannot be used is no permission to go directly: connections fail and
//! say why.

mod connect;
mod exempt;

pub use connect::ProxyError;
pub use exempt::Exempt;

use data_encoding::BASE64;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hyper::Uri;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::watch;
use zeroize::Zeroizing;

/// Names of the variable that names the proxy; the first that is not empty counts.
const PROXY_VARIABLES: [&str; 2] = ["HTTPS_PROXY", "https_proxy"];
/// Names of the variable that names whom it is not for.
const EXEMPT_VARIABLES: [&str; 2] = ["NO_PROXY", "no_proxy"];
/// The folder that systemd keeps a service's credentials in, and the one that is ours.
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";
const CREDENTIAL: &str = "proxy";
/// A user's name and password are shorter than this.
const MAX_CREDENTIAL_BYTES: u64 = 1024;
/// Where a proxy listens if nobody says otherwise: the port of `http`.
const DEFAULT_PORT: u16 = 80;

/// Why the settings name no proxy that could be used. Nothing of them is repeated: there may be a
/// password in them.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// No URL.
    #[error("HTTPS_PROXY is not the URL of a proxy")]
    Url,
    /// Not `http`.
    #[error("HTTPS_PROXY names a proxy that is not spoken to by plain HTTP")]
    Scheme,
    /// A user or password.
    #[error(
        "HTTPS_PROXY has a user or password in it, where every user of this machine can read it"
    )]
    Password,
    /// The file of the credential.
    #[error("the credential for the proxy cannot be read: {0}")]
    Unreadable(io::Error),
    /// What it says.
    #[error("the credential for the proxy is not one line `USER:PASSWORD`")]
    Credential,
}

impl SettingError {
    /// What to do.
    #[must_use]
    pub fn next(&self) -> &'static str {
        match self {
            Self::Url | Self::Scheme => {
                "Write it as `http://HOST:PORT` into the environment of the service, and restart it."
            }
            Self::Password => {
                "Take it out of the URL, write `USER:PASSWORD` into a file that only root can read, \
                 name it with `LoadCredential=proxy:FILE` in the service, and restart it."
            }
            Self::Unreadable(_) | Self::Credential => {
                "Mend the file that `LoadCredential=proxy:FILE` names, and restart the service."
            }
        }
    }
}

/// What is shown to a proxy that asks who we are.
struct LoginSecret(Zeroizing<String>);

/// A proxy that can be used.
struct Server {
    /// `HOST:PORT`
    address: String,
    login: Option<LoginSecret>,
    /// Where its name led the last time: a resolver may be down when the proxy is not.
    known: watch::Sender<Vec<SocketAddr>>,
}

/// The proxy of this machine, if it has one.
pub struct Proxy {
    server: Option<Result<Server, SettingError>>,
    exempt: Exempt,
}

impl Proxy {
    /// As the environment has it.
    #[must_use]
    pub fn of_environment() -> Self {
        let first = |names: [&str; 2]| {
            let values = names.iter().filter_map(|name| std::env::var(name).ok());
            let mut values = values.map(|value| value.trim().to_owned());
            values.find(|value| !value.is_empty())
        };
        let folder = std::env::var_os(CREDENTIALS_VARIABLE);
        let proxy = Self::new(
            first(PROXY_VARIABLES).as_deref(),
            first(EXEMPT_VARIABLES).as_deref().unwrap_or_default(),
            folder.as_deref().map(Path::new),
        );
        if let Some(why) = proxy.problem() {
            tracing::warn!(%why, "the proxy that was named is not used");
        }
        proxy
    }

    /// By the URL of a proxy, whom it is not for, and the folder with the credential, if there is
    /// one.
    #[must_use]
    pub fn new(url: Option<&str>, exempt: &str, credentials: Option<&Path>) -> Self {
        Self {
            server: url.map(|url| Server::new(url, credentials)),
            exempt: Exempt::parse(exempt),
        }
    }

    /// The proxy's `HOST:PORT`, if one is to be used and can be.
    #[must_use]
    pub fn address(&self) -> Option<&str> {
        let server = self.server.as_ref()?.as_ref().ok()?;
        Some(&server.address)
    }

    /// Why there is none, although one was named.
    #[must_use]
    pub fn problem(&self) -> Option<&SettingError> {
        self.server.as_ref()?.as_ref().err()
    }

    /// Whether `HOST:PORT` is reached through it.
    #[must_use]
    pub fn is_for(&self, target: &str) -> bool {
        self.server.is_some() && !self.exempt.has(target)
    }

    /// Opens a stream to `HOST:PORT` through the proxy; `None` if it is to be reached directly.
    #[must_use]
    pub fn open(
        self: &Arc<Self>,
        target: &str,
    ) -> Option<BoxFuture<'static, io::Result<TcpStream>>> {
        self.is_for(target).then(|| {
            let (proxy, target) = (Arc::clone(self), target.to_owned());
            async move { proxy.reach(&target).await.map_err(io::Error::other) }.boxed()
        })
    }

    async fn reach(&self, target: &str) -> Result<TcpStream, ProxyError> {
        match &self.server {
            Some(Ok(server)) => server.reach(target).await,
            Some(Err(why)) => Err(ProxyError::Setting(why.to_string())),
            None => Err(ProxyError::Setting("there is no proxy".to_owned())),
        }
    }
}

impl Server {
    fn new(url: &str, credentials: Option<&Path>) -> Result<Self, SettingError> {
        let uri: Uri = url.parse().map_err(|_| SettingError::Url)?;
        // As everywhere, `http` is meant where nothing is said.
        if uri.scheme_str().is_some_and(|scheme| scheme != "http") {
            return Err(SettingError::Scheme);
        }
        let authority = uri.authority().ok_or(SettingError::Url)?;
        if authority.as_str().contains('@') {
            return Err(SettingError::Password);
        }
        if authority.host().is_empty() || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(SettingError::Url);
        }
        let host = authority.host();
        let port = match authority.as_str().strip_prefix(host) {
            None | Some("") => DEFAULT_PORT,
            Some(_) => authority.port_u16().ok_or(SettingError::Url)?,
        };
        Ok(Self {
            address: format!("{host}:{port}"),
            login: credentials.map_or(Ok(None), LoginSecret::read)?,
            known: watch::Sender::default(),
        })
    }
}

impl LoginSecret {
    /// The credential in this folder, if there is one, as the header's value (RFC 7617).
    fn read(folder: &Path) -> Result<Option<Self>, SettingError> {
        let mut text = Zeroizing::new(String::new());
        let file = match File::open(folder.join(CREDENTIAL)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(SettingError::Unreadable(error)),
        };
        // Never moved for want of room: what it was moved from would not be wiped.
        text.reserve(2 * MAX_CREDENTIAL_BYTES as usize);
        file.take(MAX_CREDENTIAL_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(SettingError::Unreadable)?;
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let is_whole = text.len() as u64 <= MAX_CREDENTIAL_BYTES;
        if !is_whole || !line.contains(':') || line.chars().any(char::is_control) {
            return Err(SettingError::Credential);
        }
        Ok(Some(Self(Zeroizing::new(BASE64.encode(line.as_bytes())))))
    }
}

#[cfg(test)]
mod tests;
