//! A running coordinator: its state folder, its two doors and its tasks, started and stopped as
//! one.

use crate::config::{Advertise, Config, Relays};
use crate::http::admin::{self, Admin};
use crate::http::node::{self, Nodes};
use crate::http::pace::Pace;
use crate::http::{serve_admin, serve_nodes};
use crate::network;
use crate::presence::{Keeper, Presence};
use crate::store::{Store, StoreError, Timestamp};
use crate::tls::{Identity, TlsError};
use crate::watch::Watch;
use proto::key::{Fingerprint, NodeSecret};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use zeroize::Zeroizing;

/// The administrators' socket in the state folder.
pub const ADMIN_SOCKET: &str = "admin.sock";
const DATABASE_FILE: &str = "coordinator.db";
const LOCK_FILE: &str = "lock";
/// The relays that nodes were told of at the last start.
const RELAYS_FILE: &str = "relays.json";
/// Longest wait for what is under way when the coordinator stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the coordinator does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state folder cannot be used.
    #[error("cannot use the state folder {path}")]
    StateDir {
        /// The folder, or what in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Two coordinators cannot share a state folder.
    #[error("a coordinator runs on {0} already; give this one another --state-dir")]
    Running(PathBuf),
    /// The address is not ours, or taken.
    #[error("cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// See [`StoreError`].
    #[error("the database cannot be used")]
    Store(#[from] StoreError),
    /// See [`TlsError`].
    #[error("there is no certificate to show")]
    Tls(#[from] TlsError),
    /// No random bytes.
    #[error("the operating system gives no random bytes")]
    Random,
}

/// A running coordinator.
pub struct Server {
    /// Where the node API listens.
    pub addr: SocketAddr,
    /// What nodes pin.
    pub fingerprint: Fingerprint,
    store: Store,
    socket: PathBuf,
    shutdown: watch::Sender<bool>,
    doors: Vec<JoinHandle<()>>,
    keeper: JoinHandle<()>,
    _lock: File,
}

impl Server {
    /// Starts it. When this returns, it answers.
    ///
    /// # Errors
    /// If the state folder, the database, the certificate or the address cannot be used.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let dir = &config.state_dir;
        let lock = take_state_dir(dir)?;
        let identity = match &config.certificate {
            Some((certificate, key)) => Identity::read(certificate, key)?,
            None => Identity::load_or_create(dir)?,
        };
        let fingerprint = identity.fingerprint();
        let tls = TlsAcceptor::from(Arc::new(identity.server_config()?));
        let store = match &config.database {
            Some(url) => Store::open_url(url).await?,
            None => Store::open_sqlite(&dir.join(DATABASE_FILE)).await?,
        };
        let presence = Arc::new(Presence::default());
        let keeper = Keeper {
            store: store.clone(),
            replica: data_encoding::HEXLOWER.encode(&*random::<16>()?),
            presence: Arc::clone(&presence),
            ephemeral_offline: config.ephemeral_offline,
        };
        keeper.announce().await?;
        RelaysFile::renew(dir, &config.relays, &store).await?;
        let permits = network::permit_signer(&store, Timestamp::now()).await?;

        let listen = |source| StartError::Listen {
            addr: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;
        let socket = dir.join(ADMIN_SOCKET);
        let admin_listener = bind_socket(&socket)?;

        let permit_key = permits.public();
        let (shutdown, ends) = watch::channel(false);
        let nodes = node::router(Arc::new(Nodes {
            store: store.clone(),
            watch: Watch::start(store.clone(), config.relays),
            permits,
            presence,
            pace: Pace::default(),
            challenge: NodeSecret::from_bytes(*random::<32>()?),
            shutdown: ends.clone(),
        }));
        let admin = admin::router(Arc::new(Admin {
            store: store.clone(),
            advertise: config.advertise.or_else(|| Advertise::of(addr)),
            fingerprint,
            permit_key,
            uid: rustix::process::getuid().as_raw(),
        }));
        let doors = vec![
            tokio::spawn(serve_nodes(listener, tls, nodes, ends.clone())),
            tokio::spawn(serve_admin(admin_listener, admin, ends)),
        ];
        let keeper = tokio::spawn(keeper.run());
        Ok(Self {
            addr,
            fingerprint,
            store,
            socket,
            shutdown,
            doors,
            keeper,
            _lock: lock,
        })
    }

    /// Ends every stream, finishes what is under way, and closes the database.
    pub async fn stop(self) {
        // An error means that nobody is left to be told.
        let _ = self.shutdown.send(true);
        // Before the next coordinator can make its own.
        let _ = fs::remove_file(&self.socket);
        for door in self.doors {
            let _ = tokio::time::timeout(STOP_TIMEOUT, door).await;
        }
        self.keeper.abort();
        let _ = tokio::time::timeout(STOP_TIMEOUT, self.store.close()).await;
    }
}

/// Makes the folder if it is absent, and makes sure that no other coordinator uses it.
fn take_state_dir(dir: &Path) -> Result<File, StartError> {
    let failed = |source| StartError::StateDir {
        path: dir.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed)?;
    let lock = File::create(dir.join(LOCK_FILE)).map_err(failed)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
        if error == rustix::io::Errno::WOULDBLOCK {
            StartError::Running(dir.to_owned())
        } else {
            failed(error.into())
        }
    })?;
    Ok(lock)
}

/// The relays of the last start.
struct RelaysFile {
    path: PathBuf,
    text: String,
}

impl RelaysFile {
    /// Tells all networks of relays that are others than at the last start.
    async fn renew(dir: &Path, relays: &Relays, store: &Store) -> Result<(), StartError> {
        if let Some(kept) = Self::outdated(dir, relays)? {
            // A netmap that nodes hold already is never sent again: this is a newer one.
            network::tell_relays(store, Timestamp::now(), relays).await?;
            kept.write()?;
        }
        Ok(())
    }

    /// The file as it should be, if it is not so.
    fn outdated(dir: &Path, relays: &Relays) -> Result<Option<Self>, StartError> {
        let path = dir.join(RELAYS_FILE);
        let before = match fs::read_to_string(&path) {
            // What cannot be read is told anew, which costs a netmap.
            Ok(text) => serde_json::from_str(&text).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(Relays::default()),
            Err(source) => return Err(StartError::StateDir { path, source }),
        };
        let text = serde_json::to_string(relays).unwrap_or_default();
        Ok((before.as_ref() != Some(relays)).then_some(Self { path, text }))
    }

    fn write(self) -> Result<(), StartError> {
        let Self { path, text } = self;
        fs::write(&path, text).map_err(|source| StartError::StateDir { path, source })
    }
}

/// The socket's folder is ours alone and we hold its lock: what lies there is left over.
fn bind_socket(path: &Path) -> Result<UnixListener, StartError> {
    let bind = || {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    bind().map_err(|source| StartError::StateDir {
        path: path.to_owned(),
        source,
    })
}

fn random<const N: usize>() -> Result<Zeroizing<[u8; N]>, StartError> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(&mut *bytes).map_err(|_| StartError::Random)?;
    Ok(bytes)
}
