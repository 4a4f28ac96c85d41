//! The socket's agent side: who may ask what, and bounds on how much and how long.

use super::{
    Access, Call, MAX_REQUEST_BYTES, Refused, RefusedCode, Request, RequestLine, Response,
    ResponseLine, VERSION,
};
use serde::Deserialize;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use zeroize::Zeroizing;

/// Most clients at a time; more wait in the kernel's queue.
const MAX_CLIENTS: usize = 64;
/// How long to wait when a client cannot be taken: others may give descriptors back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A client that says nothing for so long is cut off, so that idle ones cannot keep others out.
const IDLE: Duration = Duration::from_secs(30);
/// Longest wait for a client to take its answer.
const TAKE: Duration = Duration::from_secs(30);
/// Lines of a stream that may wait for a client to take them.
const STREAM: usize = 256;
/// Longest path of a unix socket, in bytes (`sun_path` in unix(7), less its NUL).
const MAX_PATH_BYTES: usize = 107;

/// Why the local API cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another agent answers there.
    #[error(
        "another agent answers at `{path}`: stop it first, or give this one its own \
         --state-dir, --socket and --interface"
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket stands there.
    #[error("`{path}` is there and is no socket: move it away, or name another with --socket")]
    NoSocket {
        /// What stands there.
        path: PathBuf,
    },
    /// The path does not fit a socket address.
    #[error(
        "`{path}` is too long for a socket, which may have {MAX_PATH_BYTES} bytes: use --socket"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("the socket `{path}` cannot be made")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The socket, open for clients.
pub struct Server {
    listener: UnixListener,
    /// Besides root, this user may change things: the one that the agent runs as.
    owner: u32,
}

impl Server {
    /// Opens the socket, in place of one that a dead agent left. Needs a tokio runtime around it.
    ///
    /// # Errors
    /// [`BindError`]; what stood at `path` is then still there, unless it was a dead socket.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let owned = || path.to_owned();
        let failed = |source| BindError::Io {
            path: owned(),
            source,
        };
        if path.as_os_str().len() > MAX_PATH_BYTES {
            return Err(BindError::TooLong { path: owned() });
        }
        if let Some(folder) = path.parent() {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o755);
            builder.create(folder).map_err(failed)?;
        }
        match fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => {
                return Err(BindError::NoSocket { path: owned() });
            }
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                return Err(BindError::InUse { path: owned() });
            }
            Ok(_) => fs::remove_file(path).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        // Anyone may connect; what each may ask is decided by who it is.
        fs::set_permissions(path, Permissions::from_mode(0o666)).map_err(failed)?;
        let owner = rustix::process::geteuid().as_raw();
        Ok(Self { listener, owner })
    }

    /// Serves clients until `calls` closes.
    pub async fn serve(self, calls: mpsc::Sender<Call>) {
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = calls.closed() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a local client could not be taken");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (calls, owner) = (calls.clone(), self.owner);
            tokio::spawn(async move {
                if let Err(error) = converse(stream, owner, calls).await {
                    tracing::debug!(%error, "a local client went away");
                }
                drop(place);
            });
        }
    }
}

/// One client, until it hangs up. A client that closes its side has hung up.
async fn converse(stream: UnixStream, owner: u32, calls: mpsc::Sender<Call>) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let may_change = uid == 0 || uid == owner;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Zeroizing::new(Vec::new());
        let mut bounded = (&mut reader).take(MAX_REQUEST_BYTES as u64 + 1);
        let read = timeout(IDLE, bounded.read_until(b'\n', &mut line)).await??;
        if read == 0 {
            return Ok(());
        }
        let whole = line.last() == Some(&b'\n');
        let mut stream = None;
        let response = match parse(&line, may_change) {
            Ok(request) => {
                let (more_in, more) = mpsc::channel(STREAM);
                let streams = matches!(request, Request::Monitor(_) | Request::Record { .. });
                stream = streams.then_some(more);
                tokio::select! {
                    response = answer(request, streams.then_some(more_in), &calls) => response,
                    () = hung_up(&mut reader) => return Ok(()),
                }
            }
            Err(refused) => Response::Refused(refused),
        };
        tell(&mut writer, response).await?;
        while let Some(more) = &mut stream {
            let next = tokio::select! {
                next = more.recv() => next,
                () = hung_up(&mut reader) => return Ok(()),
            };
            match next {
                Some(response) => tell(&mut writer, response).await?,
                None => stream = None,
            }
        }
        if !whole {
            return Ok(());
        }
    }
}

/// Writes one line.
async fn tell(writer: &mut OwnedWriteHalf, response: Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(&ResponseLine {
        version: VERSION,
        response,
    })?;
    line.push(b'\n');
    timeout(TAKE, writer.write_all(&line)).await?
}

/// The request in the line, if its sender may make it.
fn parse(line: &[u8], may_change: bool) -> Result<Request, Refused> {
    let refused = |code, message: String, next: &str| Refused {
        code,
        message,
        next: next.to_owned(),
    };
    #[derive(Deserialize)]
    struct AnyVersion {
        version: u32,
    }
    let bad = |message: String| refused(RefusedCode::BadRequest, message, "");
    if line.len() > MAX_REQUEST_BYTES {
        let message = format!("the request is longer than {MAX_REQUEST_BYTES} bytes");
        return Err(bad(message));
    }
    // The parser's own complaint could quote the line, and the line may hold a token.
    let unreadable = |error: serde_json::Error| {
        let column = error.column();
        bad(format!(
            "the request cannot be read from its byte {column} on"
        ))
    };
    let AnyVersion { version } = serde_json::from_slice(line).map_err(unreadable)?;
    if version != VERSION {
        return Err(refused(
            RefusedCode::BadRequest,
            format!("this agent speaks version {VERSION} of the local API, not {version}"),
            "Use the `weir` command that was installed with the agent, or restart the agent.",
        ));
    }
    let RequestLine { request, .. } = serde_json::from_slice(line).map_err(unreadable)?;
    match request.access() {
        Access::Change if !may_change => Err(refused(
            RefusedCode::NotPermitted,
            "only root may change how this machine is connected".to_owned(),
            "Run the same command with sudo.",
        )),
        Access::Watch if !may_change => Err(refused(
            RefusedCode::NotPermitted,
            "only root may see what others send and receive".to_owned(),
            "Run the same command with sudo.",
        )),
        Access::Change | Access::Watch | Access::Read => Ok(request),
    }
}

async fn answer(
    request: Request,
    more: Option<mpsc::Sender<Response>>,
    calls: &mpsc::Sender<Call>,
) -> Response {
    let (reply, response) = oneshot::channel();
    let call = Call {
        request,
        reply,
        more,
    };
    let sent = calls.send(call).await;
    match (sent, response.await) {
        (Ok(()), Ok(response)) => response,
        (Err(_), _) | (_, Err(_)) => Response::Refused(Refused {
            code: RefusedCode::Unavailable,
            message: "the agent is stopping".to_owned(),
            next: "Try again when it has started.".to_owned(),
        }),
    }
}

/// Returns when the client is gone; never if it sent more meanwhile.
async fn hung_up(reader: &mut (impl AsyncBufRead + Unpin)) {
    match reader.fill_buf().await {
        Ok([]) | Err(_) => {}
        Ok(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
