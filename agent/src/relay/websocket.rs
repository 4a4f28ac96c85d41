//! DERP inside a WebSocket (RFC 6455, subprotocol `derp`), for networks whose middleboxes let no
//! other upgrade through. The byte stream is cut into binary messages anywhere.

use super::dial::{DialError, Wire};
use bytes::Bytes;
use futures_util::{Sink, Stream};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

const PROTOCOL: &str = "derp";
/// Longest message that is taken; a relay may put many frames into one.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

type Socket = WebSocketStream<Box<dyn Wire>>;

/// Asks the relay at `host`, to which `wire` leads, for a WebSocket.
pub(super) async fn open(host: &str, wire: Box<dyn Wire>) -> Result<Box<dyn Wire>, DialError> {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    let no_upgrade = |error: Error| match error {
        Error::Http(answer) => DialError::NoRelay {
            host: host.to_owned(),
            answer: answer.status().to_string(),
        },
        other => DialError::NoUpgrade {
            host: host.to_owned(),
            source: failed(other),
        },
    };
    // The scheme names a port alone, and the port is in `host`.
    let request = format!("ws://{host}/derp").into_client_request();
    let mut request = request.map_err(no_upgrade)?;
    let words = [("Sec-WebSocket-Protocol", PROTOCOL), ("User-Agent", "weir")];
    for (name, word) in words {
        let word = HeaderValue::from_static(word);
        request.headers_mut().insert(name, word);
    }
    let opened = client_async_with_config(request, wire, Some(config)).await;
    let (socket, _) = opened.map_err(no_upgrade)?;
    let rest = Bytes::new();
    Ok(Box::new(Carried { socket, rest }))
}

/// A WebSocket as the byte stream that it carries.
struct Carried {
    socket: Socket,
    /// What is left of the last message.
    rest: Bytes,
}

impl Carried {
    fn socket(self: Pin<&mut Self>) -> Pin<&mut Socket> {
        Pin::new(&mut self.get_mut().socket)
    }
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

impl AsyncRead for Carried {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.as_mut().socket().poll_next(context)) {
                Some(Ok(Message::Binary(message))) => self.rest = message,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_) | Message::Frame(_))) => {
                    return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
                }
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(failed(error))),
            }
        }
        let length = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Carried {
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
        self.socket().poll_close(context).map_err(failed)
    }
}
