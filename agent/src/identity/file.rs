//! The identity on disk: one small text file.
//!
//! ```text
//! weir identity 1
//! node 64 hexadecimal digits
//! machine PKCS#8 in base64
//! check SHA-256 of the lines above, in hexadecimal
//! ```
//!
//! The check is there because any 32 bytes are a WireGuard key: without it a flipped bit would be a
//! new, silent identity. Both keys stand in one file so that one rename brings or leaves both.

use data_encoding::{BASE64, HEXLOWER};
use proto::key::KEY_BYTES;
use sha2::{Digest, Sha256};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// A file longer than this is not ours.
const MAX_FILE_BYTES: u64 = 4096;
const HEADER: &str = "weir identity 1";
/// Permission bits that let others than the owner at the file.
const OTHERS: u32 = 0o077;

/// The secrets, as they are kept.
pub(super) struct Keys {
    pub(super) node: Zeroizing<[u8; KEY_BYTES]>,
    /// PKCS#8.
    pub(super) machine: Zeroizing<Vec<u8>>,
}

/// Why the identity file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Reading, writing or removing failed.
    #[error("`{path}` cannot be {verb}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a participle.
        verb: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Others may read it, so it may be no secret any more.
    #[error(
        "`{path}` holds this node's private keys, and its mode {mode:04o} lets others at it: \
         if nobody else has read it, run `chmod 600 {path}`"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is not what was written.
    #[error(
        "`{path}` is damaged: {how}. It is left as it is. Restore it from a backup, or move it \
         away and run `weir up` with a new token to join as a new node"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In which way.
        how: &'static str,
    },
}

/// The keys in the file at `path`; `None` if there is no file.
pub(super) fn read(path: &Path) -> Result<Option<Keys>, FileError> {
    let file = match OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
    {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(path, "read", source)),
    };
    let mode = file
        .metadata()
        .map_err(|source| failed(path, "read", source))?
        .mode()
        & 0o7777;
    if mode & OTHERS != 0 {
        return Err(FileError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    // Room for all of it at once: a string that grows leaves copies of what it held behind.
    let mut text = Zeroizing::new(String::with_capacity(MAX_FILE_BYTES as usize + 1));
    let damaged = |how| FileError::Damaged {
        path: path.to_owned(),
        how,
    };
    match file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(damaged("it is not text"));
        }
        Err(source) => return Err(failed(path, "read", source)),
    }
    parse(&text).map(Some).map_err(damaged)
}

/// Writes the file that is not there yet, whole or not at all.
pub(super) fn write_new(folder: &Path, path: &Path, keys: &Keys) -> Result<(), FileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|source| failed(folder, "made", source))?;
    let new = path.with_extension("new");
    let written = || -> io::Result<()> {
        // What an interrupted attempt left here was never anyone's identity.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(print(keys).as_bytes())?;
        file.sync_all()?;
        // A link fails where a file is: whoever came first stays.
        fs::hard_link(&new, path)?;
        fs::remove_file(&new)?;
        File::open(folder)?.sync_all()
    };
    written().map_err(|source| failed(path, "written", source))
}

/// Overwrites and removes the file. Succeeds if there is none.
pub(super) fn wipe(path: &Path) -> Result<(), FileError> {
    let wiped = || -> io::Result<()> {
        let length = fs::symlink_metadata(path)?.len().min(MAX_FILE_BYTES);
        let mut file = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        file.write_all(&vec![0; length as usize])?;
        file.sync_all()?;
        fs::remove_file(path)?;
        match path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    match wiped() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| failed(path, "removed", source)),
    }
}

fn print(keys: &Keys) -> Zeroizing<String> {
    let node = Zeroizing::new(HEXLOWER.encode(&*keys.node));
    let machine = Zeroizing::new(BASE64.encode(&keys.machine));
    let body = Zeroizing::new(format!("{HEADER}\nnode {}\nmachine {}\n", *node, *machine));
    let check = HEXLOWER.encode(&Sha256::digest(body.as_bytes()));
    Zeroizing::new(format!("{}check {check}\n", *body))
}

fn parse(text: &str) -> Result<Keys, &'static str> {
    let body_length = text.rfind("check ").ok_or("it is cut short")?;
    let (body, check) = text.split_at(body_length);
    let sum = HEXLOWER.encode(&Sha256::digest(body.as_bytes()));
    if check != format!("check {sum}\n") {
        return Err("its check sum does not match");
    }
    let mut lines = body.lines();
    if lines.next() != Some(HEADER) {
        return Err("its first line is unknown; perhaps a newer weir wrote it");
    }
    let mut field = |name: &str| lines.next().and_then(|line| line.strip_prefix(name));
    let (Some(node), Some(machine)) = (field("node "), field("machine ")) else {
        return Err("a line is missing");
    };
    let node = Zeroizing::new(HEXLOWER.decode(node.as_bytes()).map_err(|_| NOT_KEYS)?);
    let machine = BASE64.decode(machine.as_bytes()).map_err(|_| NOT_KEYS)?;
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    if node.len() != KEY_BYTES {
        return Err(NOT_KEYS);
    }
    bytes.copy_from_slice(&node);
    Ok(Keys {
        node: bytes,
        machine: Zeroizing::new(machine),
    })
}

const NOT_KEYS: &str = "a line does not hold a key";

fn failed(path: &Path, verb: &'static str, source: io::Error) -> FileError {
    FileError::Io {
        path: path.to_owned(),
        verb,
        source,
    }
}
