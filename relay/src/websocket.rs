//! DERP inside a WebSocket, for proxies that pass nothing else: the byte stream is cut into binary
//! messages wherever it happens to be cut, and a message's end means nothing (RFC 6455; subprotocol
//! `derp`).

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Sink, Stream as _};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

/// The subprotocol that a client must offer.
pub const PROTOCOL: &str = "derp";
/// Longest message that is taken; a client may put many frames into one.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Read at once: most clients are silent most of the time.
const READ_BYTES: usize = 4 << 10;
/// Messages gather up to this before they are written, or until the stream is flushed.
const WRITE_BYTES: usize = 16 << 10;

/// A WebSocket as the byte stream that it carries.
pub struct Stream<S> {
    /// On the heap, so that clients without one do not pay for its size.
    socket: Box<WebSocketStream<S>>,
    /// What is left of the last message.
    rest: Bytes,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream<S> {
    /// The relay's side of a connection that was just upgraded; `buffer` was read from it already.
    pub async fn accepted(stream: S, buffer: BytesMut) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BYTES)
            .write_buffer_size(WRITE_BYTES)
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let (read, role) = (buffer.to_vec(), Role::Server);
        Self::new(WebSocketStream::from_partially_read(stream, read, role, Some(config)).await)
    }

    /// Either side of a connection.
    #[must_use]
    pub fn new(socket: WebSocketStream<S>) -> Self {
        Self {
            socket: Box::new(socket),
            rest: Bytes::new(),
        }
    }

    fn socket(self: Pin<&mut Self>) -> Pin<&mut WebSocketStream<S>> {
        Pin::new(&mut *self.get_mut().socket)
    }
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.as_mut().socket().poll_next(context)) {
                Some(Ok(Message::Binary(message))) => self.rest = message,
                // The other end's pings are answered below us.
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_) | Message::Frame(_))) => {
                    return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
                }
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(failed(error))),
            }
        }
        let length = self.rest.len().min(buffer.remaining());
        if let Some(part) = self.rest.get(..length) {
            buffer.put_slice(part);
        }
        self.rest.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.as_mut().socket().poll_ready(context)).map_err(failed)?;
        let message = Message::Binary(Bytes::copy_from_slice(bytes));
        self.socket().start_send(message).map_err(failed)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_flush(context).map_err(failed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(self.socket().poll_close(context)) {
            // Closed by the other end first.
            Ok(()) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(failed(error))),
        }
    }
}
