//! The socket's other side, for the command line: one question, one answer.

use super::{MAX_RESPONSE_BYTES, Request, RequestLine, Response, ResponseLine, VERSION};
use serde::Deserialize;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use zeroize::Zeroizing;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("no agent answers at `{socket}`")]
    NoAgent {
        /// Where it was looked for.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket, or its folder, is closed to this user.
    #[error("this user may not talk with the agent at `{socket}`")]
    NotPermitted {
        /// Where it was looked for.
        socket: PathBuf,
    },
    /// The answer did not come in time.
    #[error("the agent did not answer within {} seconds", .0.as_secs())]
    Late(Duration),
    /// The agent hung up.
    #[error("the agent broke off before it answered")]
    BrokenOff(#[source] io::Error),
    /// The answer makes no sense.
    #[error("the agent's answer cannot be read")]
    Unreadable(#[source] serde_json::Error),
    /// The agent is another version.
    #[error("the agent speaks version {0} of the local API, this command version {VERSION}")]
    Version(u32),
}

/// Asks the agent at `socket` and waits up to `patience` for the answer.
///
/// # Errors
/// [`AskError`]. After [`AskError::Late`] and [`AskError::BrokenOff`] the request may still have
/// been carried out.
pub fn ask(socket: &Path, request: Request, patience: Duration) -> Result<Response, AskError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => AskError::NotPermitted {
            socket: socket.to_owned(),
        },
        _ => AskError::NoAgent {
            socket: socket.to_owned(),
            source,
        },
    })?;
    let line = RequestLine {
        version: VERSION,
        request,
    };
    let mut line = Zeroizing::new(serde_json::to_vec(&line).map_err(AskError::Unreadable)?);
    line.push(b'\n');
    let mut answer = Vec::new();
    let exchange = || {
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        stream.write_all(&line)?;
        BufReader::new(stream)
            .take(MAX_RESPONSE_BYTES)
            .read_until(b'\n', &mut answer)
    };
    exchange().map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => AskError::Late(patience),
        _ => AskError::BrokenOff(error),
    })?;
    if answer.last() != Some(&b'\n') {
        return Err(AskError::BrokenOff(io::ErrorKind::UnexpectedEof.into()));
    }
    #[derive(Deserialize)]
    struct AnyVersion {
        version: u32,
    }
    let AnyVersion { version } = serde_json::from_slice(&answer).map_err(AskError::Unreadable)?;
    if version != VERSION {
        return Err(AskError::Version(version));
    }
    let line: ResponseLine = serde_json::from_slice(&answer).map_err(AskError::Unreadable)?;
    Ok(line.response)
}
