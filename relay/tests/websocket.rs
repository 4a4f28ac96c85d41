//! DERP inside a WebSocket.

use crate::client::{Client, Login, join, parse, secret, tls};
use crate::place::Place;
use futures_util::{SinkExt, StreamExt};
use proto::derp::{Frame, GoneReason, LoginBox, Sealed};
use relay::admit::Admission;
use relay::config::Certificate;
use relay::websocket::Stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

/// A WebSocket with this subprotocol, or the relay's answer.
async fn open<S>(stream: S, protocol: &str) -> Result<WebSocketStream<S>, u16>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut request = "ws://relay/derp".into_client_request().unwrap();
    let headers = request.headers_mut();
    headers.insert("Sec-WebSocket-Protocol", protocol.parse().unwrap());
    match client_async(request, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(answer)) => Err(answer.status().as_u16()),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_client_in_a_websocket_talks_to_one_without() {
    let place = Place::start(Admission::Open, Certificate::Own, 0);
    let (stream, _) = tls(place.addr()).await;
    let socket = Stream::new(open(stream, "derp").await.unwrap());
    let mut a = Client::greet(socket, &secret(1), Login::default())
        .await
        .unwrap();
    let (stream, _) = tls(place.addr()).await;
    let mut b = Client::login(stream, 2, Login::default()).await.unwrap();
    for size in [0, 1, 1_200, 64 << 10] {
        let packet = vec![size as u8; size];
        a.send_packet(b.key, &packet).await;
        assert_eq!(b.packet().await, (a.key, packet.clone()));
        b.send_packet(a.key, &packet).await;
        assert_eq!(a.packet().await, (b.key, packet));
    }
    drop(a);
    let told = b.next().await.unwrap();
    let (peer, reason) = (crate::client::key(1), GoneReason::Disconnected);
    assert_eq!(parse(&told), Frame::PeerGone { peer, reason });
}

#[tokio::test]
async fn only_the_subprotocol_derp_is_spoken() {
    let place = Place::open();
    let stream = TcpStream::connect(place.addr()).await.unwrap();
    assert_eq!(open(stream, "chat").await.err(), Some(426));
    let stream = TcpStream::connect(place.addr()).await.unwrap();
    assert!(open(stream, "chat, derp").await.is_ok());
}

/// Where a proxy cuts messages is no business of DERP's.
#[tokio::test]
async fn messages_may_be_cut_anywhere() {
    let place = Place::open();
    let mut other = join(place.addr(), 2).await;
    let stream = TcpStream::connect(place.addr()).await.unwrap();
    let mut socket = open(stream, "derp").await.unwrap();
    let Some(Ok(Message::Binary(hello))) = socket.next().await else {
        panic!("the relay does not say its key");
    };
    let Frame::ServerKey(relay) = parse(&hello) else {
        panic!("{hello:?}");
    };
    let (secret, nonce) = (secret(1), [0; 24]);
    let seal = LoginBox::new(&secret.agree(relay.0).unwrap());
    let bytes = &seal.seal(nonce, br#"{"version": 2}"#);
    let (key, sealed) = (secret.public(), Sealed { nonce, bytes });
    let mut said = Frame::ClientInfo { key, sealed }.to_vec();
    let (dst, packet) = (other.key, &b"in pieces"[..]);
    Frame::SendPacket { dst, packet }.encode(&mut said);
    for byte in said {
        let message = Message::Binary(vec![byte].into());
        socket.send(message).await.unwrap();
    }
    assert_eq!(other.packet().await, (key, packet.to_vec()));
    // Text is no DERP: it ends the session.
    socket.send(Message::text("hello")).await.unwrap();
    while let Some(Ok(_)) = socket.next().await {}
    let told = other.next().await.unwrap();
    assert!(matches!(parse(&told), Frame::PeerGone { .. }), "{told:?}");
}
