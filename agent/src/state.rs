//! The state folder: the last netmap, and what the operator said.
//!
//! ```text
//! STATE-DIR/            0700
//!   netmap              the netmap in force, for a start without the coordinator
//!   settings            up or down, name, routes, shields, which coordinator
//!   permit              the word that relays let this node in for
//!   *.copy              the same once more, should the first be unreadable
//! ```
//! (The `identity` module keeps its own file here.) A file is a line with its SHA-256, then JSON:
//! a flipped bit is an unreadable file and not another address. Each is replaced whole: written and
//! synced under another name, renamed into place, the folder synced; first the file, then its copy.
//! Power can fail anywhere in between; one of the two is always whole, the newest or the one before
//! it. A disk that is full fails the writing and leaves what was there.

use data_encoding::HEXLOWER;
use proto::key::Fingerprint;
use proto::net::Prefix;
use proto::netmap::Netmap;
use proto::permit::Permit;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

const NETMAP: &str = "netmap";
const SETTINGS: &str = "settings";
const PERMIT: &str = "permit";
/// Where the `kernel` module notes what it has to put back.
const SWITCHES: &str = "switches";
/// The folder's mode.
const PRIVATE: u32 = 0o700;
/// The largest file that is read, in bytes: the largest netmap, and some.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// What the operator said, and where the coordinator is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Whether the node is to be up.
    pub up: bool,
    /// What the node would like to be called; `None` for the machine's host name.
    pub hostname: Option<String>,
    /// Subnets to offer.
    pub routes: BTreeSet<Prefix>,
    /// The coordinator of the network that was joined.
    pub coordinator: Option<Coordinator>,
    /// Whether no new flow from others is let in, whatever policy says.
    #[serde(default, skip_serializing_if = "is_default")]
    pub shields_up: bool,
    /// Whether packets that this node refuses to send are dropped without an answer.
    #[serde(default, skip_serializing_if = "is_default")]
    pub silent: bool,
    /// Whether WireGuard's port is left to WireGuard alone.
    #[serde(default, skip_serializing_if = "is_default")]
    pub unguarded: bool,
    /// Whether nothing of ours may run in a network card's driver.
    #[serde(default, skip_serializing_if = "is_default")]
    pub no_xdp: bool,
    /// Whether no router is asked for a port.
    #[serde(default, skip_serializing_if = "is_default")]
    pub unmapped: bool,
}

/// What was never said is not written, so that an older agent can read the file.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Where the coordinator is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coordinator {
    /// `HOST:PORT`.
    pub address: String,
    /// SHA-256 of its certificate.
    pub fingerprint: Fingerprint,
}

/// Why state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file cannot be read or written.
    #[error("`{path}`")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("`{path}` is damaged")]
    Damaged {
        /// Which file.
        path: PathBuf,
    },
    /// The file has a form that this version does not know.
    #[error("`{path}` was written by another version of weir")]
    Form {
        /// Which file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
}

/// What a file holds, and what was wrong with it.
#[derive(Debug)]
pub struct Loaded<T> {
    /// The newest good value, if there is one.
    pub value: Option<T>,
    /// Why it is not the newest value.
    pub problem: Option<StateError>,
}

/// The state folder.
#[derive(Clone, Debug)]
pub struct StateDir {
    folder: PathBuf,
}

impl StateDir {
    /// The folder; made, mode 0700, if it is not there.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(PRIVATE);
        builder.create(folder).map_err(at(folder))?;
        let mode = fs::metadata(folder)
            .map_err(at(folder))?
            .permissions()
            .mode();
        if mode & 0o7777 != PRIVATE {
            // What is private already may be on a disk that became read-only.
            let private = fs::Permissions::from_mode(PRIVATE);
            fs::set_permissions(folder, private).map_err(at(folder))?;
        }
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// The netmap of an earlier run.
    #[must_use]
    pub fn netmap(&self) -> Loaded<Netmap> {
        self.load(NETMAP)
    }

    /// Keeps a netmap.
    ///
    /// # Errors
    /// [`StateError`]; what was kept before still is.
    pub fn keep_netmap(&self, netmap: &Netmap) -> Result<(), StateError> {
        self.keep(NETMAP, netmap)
    }

    /// What the operator said; the default if nobody ever said anything.
    #[must_use]
    pub fn settings(&self) -> Loaded<Settings> {
        self.load(SETTINGS)
    }

    /// Keeps what the operator said.
    ///
    /// # Errors
    /// [`StateError`]; what was kept before still is.
    pub fn keep_settings(&self, settings: &Settings) -> Result<(), StateError> {
        self.keep(SETTINGS, settings)
    }

    /// The relay permit of an earlier run.
    #[must_use]
    pub fn permit(&self) -> Loaded<Permit> {
        self.load(PERMIT)
    }

    /// Keeps a relay permit.
    ///
    /// # Errors
    /// [`StateError`]; what was kept before still is.
    pub fn keep_permit(&self, permit: &Permit) -> Result<(), StateError> {
        self.keep(PERMIT, permit)
    }

    /// Forgets the relay permit: it is of a network that this node left.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn forget_permit(&self) -> Result<(), StateError> {
        self.remove(PERMIT)
    }

    /// The file for what the `kernel` module has to put back.
    #[must_use]
    pub fn switches(&self) -> PathBuf {
        self.folder.join(SWITCHES)
    }

    /// Whether a netmap is kept, good or not.
    #[must_use]
    pub fn has_netmap(&self) -> bool {
        let path = self.folder.join(NETMAP);
        path.exists() || copy(&path).exists()
    }

    /// Forgets the netmap: it is of a network that this node left.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn forget_netmap(&self) -> Result<(), StateError> {
        self.remove(NETMAP)
    }

    /// Forgets everything kept here.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn wipe(&self) -> Result<(), StateError> {
        self.remove(NETMAP)?;
        self.remove(PERMIT)?;
        self.remove(SETTINGS)
    }

    fn load<T: DeserializeOwned>(&self, name: &str) -> Loaded<T> {
        let path = self.folder.join(name);
        let problem = match read(&path) {
            Ok(Some(value)) => {
                return Loaded {
                    value: Some(value),
                    problem: None,
                };
            }
            Ok(None) => None,
            Err(error) => Some(error),
        };
        let value = read(&copy(&path)).unwrap_or_default();
        Loaded { value, problem }
    }

    fn keep<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let path = self.folder.join(name);
        let json = serde_json::to_vec(value).map_err(|source| StateError::Form {
            path: path.clone(),
            source,
        })?;
        self.replace(&path, &json)
            .and_then(|()| self.replace(&copy(&path), &json))
            .map_err(at(&path))
    }

    fn replace(&self, path: &Path, json: &[u8]) -> io::Result<()> {
        let new = path.with_extension("new");
        let written = write(&new, json)
            .and_then(|()| fs::rename(&new, path))
            .and_then(|()| File::open(&self.folder)?.sync_all());
        if written.is_err() {
            // What is half written would only take room.
            let _ = fs::remove_file(&new);
        }
        written
    }

    fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.folder.join(name);
        for path in [path.with_extension("new"), copy(&path), path] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(at(&path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn copy(path: &Path) -> PathBuf {
    path.with_extension("copy")
}

fn write(path: &Path, json: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(HEXLOWER.encode(&Sha256::digest(json)).as_bytes())?;
    file.write_all(b"\n")?;
    file.write_all(json)?;
    file.sync_all()
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let bytes = match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
            return Err(StateError::Damaged {
                path: path.to_owned(),
            });
        }
        Ok(_) => fs::read(path).map_err(at(path))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path)(error)),
    };
    let json = intact(&bytes).ok_or_else(|| StateError::Damaged {
        path: path.to_owned(),
    })?;
    let value = serde_json::from_slice(json).map_err(|source| StateError::Form {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(value))
}

/// The JSON of a file whose hash is right.
fn intact(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let (hash, json) = (bytes.get(..end)?, bytes.get(end + 1..)?);
    let right = HEXLOWER.encode(&Sha256::digest(json));
    (right.as_bytes() == hash).then_some(json)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    |source| StateError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(hostname: &str) -> Settings {
        Settings {
            up: true,
            hostname: Some(hostname.to_owned()),
            ..Settings::default()
        }
    }

    fn folder() -> (tempfile::TempDir, StateDir) {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(&folder.path().join("state")).unwrap();
        (folder, state)
    }

    #[test]
    fn what_is_kept_is_found_and_nobody_else_can_read_it() {
        let (_guard, state) = folder();
        assert!(state.settings().value.is_none());
        state.keep_settings(&settings("a")).unwrap();
        assert_eq!(state.settings().value, Some(settings("a")));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state.folder), 0o700);
        assert_eq!(mode(&state.folder.join(SETTINGS)), 0o600);
        state.wipe().unwrap();
        assert_eq!(fs::read_dir(&state.folder).unwrap().count(), 0);
    }

    #[test]
    fn what_older_agents_wrote_is_read_and_what_they_do_not_know_is_written_only_when_said() {
        let (_guard, state) = folder();
        let path = state.folder.join(SETTINGS);
        state.keep_settings(&settings("a")).unwrap();
        let text = String::from_utf8(fs::read(&path).unwrap()).unwrap();
        assert!(
            !text.contains("shields_up") && !text.contains("silent"),
            "{text}"
        );
        let said = Settings {
            shields_up: true,
            silent: true,
            ..settings("a")
        };
        state.keep_settings(&said).unwrap();
        assert_eq!(state.settings().value, Some(said));
    }

    #[test]
    fn any_flipped_bit_is_noticed_and_nothing_is_lost() {
        let (_guard, state) = folder();
        state.keep_settings(&settings("a")).unwrap();
        let path = state.folder.join(SETTINGS);
        let good = fs::read(&path).unwrap();
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 1;
            fs::write(&path, &bad).unwrap();
            let loaded = state.settings();
            assert_eq!(loaded.value, Some(settings("a")), "byte {position}");
            assert!(matches!(loaded.problem, Some(StateError::Damaged { .. })));
        }
        fs::write(&path, b"").unwrap();
        assert_eq!(state.settings().value, Some(settings("a")));
        fs::write(copy(&path), b"").unwrap();
        let loaded = state.settings();
        assert!(loaded.value.is_none() && loaded.problem.is_some());
    }

    #[test]
    fn a_crash_before_the_copy_is_written_loses_nothing() {
        let (_guard, state) = folder();
        state.keep_settings(&settings("a")).unwrap();
        let path = state.folder.join(SETTINGS);
        let before = fs::read(copy(&path)).unwrap();
        state.keep_settings(&settings("b")).unwrap();
        fs::write(copy(&path), before).unwrap();
        let loaded = state.settings();
        assert_eq!(loaded.value, Some(settings("b")));
        assert!(loaded.problem.is_none());
    }

    #[test]
    fn a_write_that_fails_leaves_what_was_there() {
        let (_guard, state) = folder();
        state.keep_settings(&settings("a")).unwrap();
        // A folder in the way of the new file stands for a disk that takes no more.
        fs::create_dir(state.folder.join("settings.new")).unwrap();
        let error = state.keep_settings(&settings("b")).unwrap_err();
        assert!(matches!(error, StateError::Io { .. }));
        assert_eq!(state.settings().value, Some(settings("a")));
    }
}
