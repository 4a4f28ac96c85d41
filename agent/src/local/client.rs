//! The socket's other side, for the command line: one question, one answer ([`ask`]), or a stream of
//! them ([`follow`]).

use super::{MAX_RESPONSE_BYTES, Request, RequestLine, Response, ResponseLine, VERSION};
use serde::Deserialize;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
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
    let mut stream = UnixStream::connect(socket).map_err(|error| unreachable(socket, error))?;
    let line = written(request)?;
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
    read(&answer)
}

/// Asks the agent at `socket` for a stream, whose lines come from [`Stream::next`].
///
/// # Errors
/// [`AskError`].
pub async fn follow(socket: &Path, request: Request) -> Result<Stream, AskError> {
    let connected = tokio::net::UnixStream::connect(socket).await;
    let stream = connected.map_err(|error| unreachable(socket, error))?;
    let (reader, mut writer) = stream.into_split();
    let line = written(request)?;
    writer.write_all(&line).await.map_err(AskError::BrokenOff)?;
    Ok(Stream {
        reader: tokio::io::BufReader::new(reader),
        _writer: writer,
    })
}

/// Answers that come as they come. Dropping it hangs up.
pub struct Stream {
    reader: tokio::io::BufReader<OwnedReadHalf>,
    /// Who closes this side has hung up.
    _writer: OwnedWriteHalf,
}

impl Stream {
    /// The next one, however long it takes.
    ///
    /// # Errors
    /// [`AskError`]; [`AskError::BrokenOff`] when the agent ends.
    pub async fn next(&mut self) -> Result<Response, AskError> {
        let mut answer = Vec::new();
        let mut bounded = (&mut self.reader).take(MAX_RESPONSE_BYTES);
        let taken = bounded.read_until(b'\n', &mut answer).await;
        taken.map_err(AskError::BrokenOff)?;
        read(&answer)
    }
}

fn unreachable(socket: &Path, source: io::Error) -> AskError {
    let socket = socket.to_owned();
    match source.kind() {
        io::ErrorKind::PermissionDenied => AskError::NotPermitted { socket },
        _ => AskError::NoAgent { socket, source },
    }
}

/// The request as it stands on the socket.
fn written(request: Request) -> Result<Zeroizing<Vec<u8>>, AskError> {
    let line = RequestLine {
        version: VERSION,
        request,
    };
    let mut line = Zeroizing::new(serde_json::to_vec(&line).map_err(AskError::Unreadable)?);
    line.push(b'\n');
    Ok(line)
}

/// The answer in a whole line.
fn read(answer: &[u8]) -> Result<Response, AskError> {
    if answer.last() != Some(&b'\n') {
        return Err(AskError::BrokenOff(io::ErrorKind::UnexpectedEof.into()));
    }
    #[derive(Deserialize)]
    struct AnyVersion {
        version: u32,
    }
    let AnyVersion { version } = serde_json::from_slice(answer).map_err(AskError::Unreadable)?;
    if version != VERSION {
        return Err(AskError::Version(version));
    }
    let line: ResponseLine = serde_json::from_slice(answer).map_err(AskError::Unreadable)?;
    Ok(line.response)
}
