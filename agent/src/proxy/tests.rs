use super::*;
use std::future::Future;
use std::net::Ipv4Addr;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const TARGET: &str = "relay.example.com:443";

/// A folder with this credential, or with none.
fn folder(credential: Option<&str>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    if let Some(text) = credential {
        std::fs::write(folder.path().join("proxy"), text).unwrap();
    }
    folder
}

/// A proxy that reads one request and does this with it. Returns its URL, and the request.
async fn one<F>(does: impl FnOnce(TcpStream) -> F + Send + 'static) -> (String, JoinHandle<String>)
where
    F: Future<Output = ()> + Send,
{
    let door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("http://{}", door.local_addr().unwrap());
    let asked = tokio::spawn(async move {
        let (mut stream, _) = door.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        does(stream).await;
        String::from_utf8(head).unwrap()
    });
    (url, asked)
}

async fn open(proxy: Proxy) -> Result<TcpStream, String> {
    let opened = Arc::new(proxy).open(TARGET).expect("a target of the proxy");
    opened.await.map_err(|error| error.to_string())
}

/// Why there is no stream through a proxy that does this.
async fn failure<F>(
    credential: Option<&str>,
    does: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> String
where
    F: Future<Output = ()> + Send,
{
    let (url, asked) = one(does).await;
    let folder = folder(credential);
    let proxy = Proxy::new(Some(&url), "", Some(folder.path()));
    let why = open(proxy).await.expect_err("no stream");
    asked.abort();
    why.replace(url.trim_start_matches("http://"), "PROXY")
}

async fn says(text: &'static str, credential: Option<&str>) -> String {
    let does = move |mut stream: TcpStream| async move {
        stream.write_all(text.as_bytes()).await.unwrap();
        // It ends when the other side has had enough.
        let _ = stream.read(&mut [0; 16]).await;
    };
    failure(credential, does).await
}

#[tokio::test]
async fn a_tunnel_begins_right_after_the_answer() {
    let (url, asked) = one(|mut stream| async move {
        for piece in [
            "HTTP/1.1 2",
            "00 Connection established\r\nVia: x\r\n",
            "\r\n",
        ] {
            stream.write_all(piece.as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
        }
        let mut first = [0; 5];
        stream.read_exact(&mut first).await.unwrap();
        stream.write_all(&first).await.unwrap();
    })
    .await;
    let folder = folder(Some("ana:open sesame\n"));
    let mut stream = open(Proxy::new(Some(&url), "", Some(folder.path())))
        .await
        .unwrap();
    stream.write_all(b"first").await.unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).await.unwrap();
    assert_eq!(back, "first");
    assert_eq!(
        asked.await.unwrap(),
        "CONNECT relay.example.com:443 HTTP/1.1\r\nHost: relay.example.com:443\r\n\
         User-Agent: weir\r\nProxy-Authorization: Basic YW5hOm9wZW4gc2VzYW1l\r\n\r\n"
    );
}

#[tokio::test]
async fn a_refusal_is_told_in_the_proxys_words_and_never_with_ours() {
    let unknown = "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n";
    let nobody = says(unknown, None).await;
    assert!(nobody.contains("the proxy PROXY wants a user"), "{nobody}");
    assert!(nobody.contains("LoadCredential=proxy:"), "{nobody}");
    for answer in [unknown, "HTTP/1.0 401 Unauthorized\r\n\r\n"] {
        let wrong = says(answer, Some("ana:sesame")).await;
        assert!(wrong.contains("PROXY does not take the user"), "{wrong}");
        let shown = wrong.contains("sesame") || wrong.contains("YW5h");
        assert!(!shown, "{wrong}");
    }
    assert_eq!(
        says("HTTP/1.0 403 Not\ttoday\r\n\r\n<html>", None).await,
        "the proxy PROXY refuses to connect to relay.example.com:443: \
         it answers `HTTP/1.0 403 Not?today`"
    );
}

#[tokio::test]
async fn what_is_no_proxy_is_told_as_it_answers() {
    for (text, shown) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH_9.2"),
        ("HTTP/1.1 200 OK\r\n\r\nhello", "HTTP/1.1 200 OK"),
    ] {
        let why = says(text, None).await;
        assert_eq!(why, format!("PROXY is no HTTP proxy: it answers `{shown}`"));
    }
    let endless = failure(None, |mut stream| async move {
        let line = b"HTTP/1.1 200 OK\r\nX: ";
        stream.write_all(line).await.unwrap();
        while stream.write_all(&[b'x'; 1024]).await.is_ok() {}
    });
    assert_eq!(endless.await, "the proxy PROXY answers without an end");
    let closed = failure(None, |stream| async move { drop(stream) }).await;
    assert!(
        closed.contains("PROXY ends the connection when asked"),
        "{closed}"
    );
}

/// The clock stands still but for what is waited for, from the moment that the proxy was asked.
#[tokio::test]
async fn a_proxy_that_does_not_answer_is_given_up_in_time() {
    let silent = failure(None, |stream| async move {
        tokio::time::pause();
        let _open = stream;
        std::future::pending::<()>().await;
    });
    let why = silent.await;
    assert!(
        why.contains("PROXY does not answer when asked for relay"),
        "{why}"
    );
}

#[tokio::test]
async fn a_proxy_that_is_not_there_is_named() {
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = closed.local_addr().unwrap().to_string();
    drop(closed);
    let why = open(Proxy::new(Some(&address), "", None))
        .await
        .unwrap_err();
    assert!(
        why.starts_with(&format!("the proxy {address} cannot be reached: ")),
        "{why}"
    );
}

#[tokio::test]
async fn nothing_but_a_host_and_port_gets_into_a_request() {
    let proxy = Arc::new(Proxy::new(Some("http://127.0.0.1:9"), "", None));
    for target in ["a b:443", "a\r\nX: y:443", "ä.example:443"] {
        let why = proxy.open(target).unwrap().await.unwrap_err();
        assert!(why.to_string().ends_with("is no host and port"), "{why}");
    }
}

#[tokio::test]
async fn a_setting_that_cannot_be_used_is_no_permission_to_go_directly() {
    let password = |url: &str| {
        let proxy = Proxy::new(Some(url), "direct.example.com", None);
        let why = proxy.problem().unwrap();
        (
            why.to_string(),
            why.next(),
            proxy.address().map(str::to_owned),
        )
    };
    for (url, what) in [
        (
            "http://ana:sesame@proxy:3128",
            "has a user or password in it",
        ),
        ("ana:sesame@proxy:3128", "has a user or password in it"),
        ("https://proxy:3128", "by plain HTTP"),
        ("socks5://proxy:1080", "by plain HTTP"),
        ("http://", "is not the URL"),
        ("http://proxy:99999", "is not the URL"),
        ("http://proxy:3128/path", "is not the URL"),
        ("sesame sesame", "is not the URL"),
    ] {
        let (why, next, address) = password(url);
        assert!(why.contains(what), "{url}: {why}");
        assert!(!why.contains("sesame") && !next.contains("sesame"), "{url}");
        assert_eq!(address, None, "{url}");
        let proxy = Proxy::new(Some(url), "direct.example.com", None);
        assert!(!proxy.is_for("direct.example.com:443"));
        let why = open(proxy).await.unwrap_err();
        assert!(why.contains(what), "{url}: {why}");
    }
    for credential in [
        "no colon",
        "a:b\nc",
        "a:b\r\n",
        &format!("a:{}", "b".repeat(1024)),
    ] {
        let folder = folder(Some(credential));
        let proxy = Proxy::new(Some("http://proxy"), "", Some(folder.path()));
        let why = proxy.problem().unwrap().to_string();
        assert!(why.ends_with("is not one line `USER:PASSWORD`"), "{why}");
    }
}

#[test]
fn a_proxy_is_named_as_other_programs_want_it() {
    for (url, address) in [
        ("http://proxy.example.com:3128", "proxy.example.com:3128"),
        ("http://proxy.example.com/", "proxy.example.com:80"),
        ("proxy:8080", "proxy:8080"),
        ("http://[2001:db8::1]:3128", "[2001:db8::1]:3128"),
    ] {
        let folder = folder(None);
        let proxy = Proxy::new(Some(url), "", Some(folder.path()));
        assert!(proxy.problem().is_none(), "{url}");
        assert_eq!(proxy.address(), Some(address));
    }
    let none = Proxy::new(None, "", None);
    assert!(!none.is_for(TARGET) && none.address().is_none() && none.problem().is_none());
    assert!(Arc::new(none).open(TARGET).is_none());
}

#[test]
fn whom_the_proxy_is_not_for_is_reached_directly() {
    let list = "a.example, .b.example *.c.example,10.0.0.0/8,192.0.2.7,[2001:db8::1]:443,\
                2001:db8:1::/48,d.example:8443,10.9.9.9/33,*.*,E.example.,2001:db8:2::1";
    let exempt = Exempt::parse(list);
    for direct in [
        "a.example:1",
        "x.A.example:1",
        "a.example.:1",
        "x.b.example:1",
        "x.c.example:1",
        "10.1.2.3:1",
        "192.0.2.7:1",
        "[::ffff:192.0.2.7]:1",
        "[2001:db8::1]:443",
        "[2001:db8:1:2::3]:1",
        "[2001:db8:2::1]:1",
        "d.example:8443",
        "e.example:1",
    ] {
        assert!(exempt.has(direct), "{direct}");
    }
    for other in [
        "ba.example:1",
        "b.example:1",
        "c.example:1",
        "11.0.0.1:1",
        "192.0.2.8:1",
        "[2001:db8::1]:444",
        "d.example:443",
        "10.example:1",
    ] {
        assert!(!exempt.has(other), "{other}");
    }
    assert!(Exempt::parse("*").has(TARGET));
    // Nobody's proxy leads to this machine.
    for own in [
        "localhost:1",
        "x.localhost:1",
        "127.3.4.5:1",
        "[::1]:1",
        "[::ffff:127.0.0.1]:1",
    ] {
        assert!(Exempt::default().has(own), "{own}");
    }
    assert!(!Exempt::default().has(TARGET));
}
