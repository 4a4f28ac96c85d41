use super::*;
use crate::local::report::Seen;
use crate::local::{AskError, Explain, Monitor, Set, Up, ask, follow};
use proto::net::Protocol;
use std::io::{BufRead, Write};

const PATIENCE: Duration = Duration::from_secs(20);

/// A server whose daemon says `Done` to everything, and where it listens.
fn served(folder: &Path) -> PathBuf {
    let path = folder.join("weir.sock");
    let server = Server::bind(&path).unwrap();
    let (calls, mut received) = mpsc::channel::<Call>(1);
    tokio::spawn(server.serve(calls));
    tokio::spawn(async move {
        while let Some(call) = received.recv().await {
            let _ = call.reply.send(Response::Done(Vec::new()));
        }
    });
    path
}

/// What comes back for one raw line.
async fn raw(path: &Path, line: Vec<u8>) -> String {
    let path = path.to_owned();
    let exchange = move || {
        let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The server may refuse before it has read all of it.
        let _ = stream.write_all(&line);
        let mut answer = String::new();
        io::BufReader::new(stream).read_line(&mut answer).unwrap();
        answer
    };
    tokio::task::spawn_blocking(exchange).await.unwrap()
}

fn requests() -> Vec<(Request, Access)> {
    let explain = Explain {
        src: "a".to_owned(),
        dst: "b".to_owned(),
        port: Some(80),
        protocol: Protocol::TCP,
    };
    let up = Up {
        token: None,
        hostname: None,
        routes: None,
    };
    let peer = "a".to_owned();
    vec![
        (Request::Up(up), Access::Change),
        (Request::Down { purge: false }, Access::Change),
        (Request::Down { purge: true }, Access::Change),
        (Request::Set(Set::default()), Access::Change),
        (Request::Status, Access::Read),
        (Request::Peers, Access::Read),
        (Request::Ping { peer }, Access::Read),
        (Request::Explain(explain), Access::Read),
        (Request::Counters, Access::Read),
        (Request::Netcheck, Access::Read),
        (Request::Monitor(Monitor::default()), Access::Watch),
        (Request::Record { anew: false }, Access::Change),
    ]
}

#[test]
fn verbs_that_change_or_watch_need_root_or_the_agents_user_and_others_nobody() {
    for (request, access) in requests() {
        let line = serde_json::to_vec(&RequestLine {
            version: VERSION,
            request,
        })
        .unwrap();
        assert!(parse(&line, true).is_ok());
        let refused = parse(&line, false).err().map(|refused| refused.code);
        let wanted = (access != Access::Read).then_some(RefusedCode::NotPermitted);
        assert_eq!(refused, wanted);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_verb_is_answered_to_the_agents_own_user() {
    let folder = tempfile::tempdir().unwrap();
    let path = served(folder.path());
    for (request, _) in requests() {
        let path = path.clone();
        let asked = tokio::task::spawn_blocking(move || ask(&path, request, PATIENCE));
        assert_eq!(asked.await.unwrap().unwrap(), Response::Done(Vec::new()));
    }
}

#[tokio::test]
async fn a_stream_goes_on_until_the_client_hangs_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.sock");
    let server = Server::bind(&path).unwrap();
    let (calls, mut received) = mpsc::channel::<Call>(1);
    tokio::spawn(server.serve(calls));
    let request = Request::Monitor(Monitor::default());
    let mut stream = follow(&path, request).await.unwrap();
    let call = received.recv().await.unwrap();
    let more = call.more.unwrap();
    let begun = Response::Seen(Seen::Begun);
    call.reply.send(begun.clone()).unwrap();
    for _ in 0..3 {
        more.send(begun.clone()).await.unwrap();
    }
    for _ in 0..4 {
        assert_eq!(stream.next().await.unwrap(), begun);
    }
    drop(stream);
    more.closed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_is_refused_and_never_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let path = served(folder.path());
    let secret = "weir1.example:1.00.hunter2hunter2";
    for (line, says) in [
        (b"\n".to_vec(), "cannot be read"),
        (
            b"{\"version\":2,\"request\":\"status\"}\n".to_vec(),
            "version 1",
        ),
        (
            b"{\"version\":1,\"request\":\"fly\"}\n".to_vec(),
            "cannot be read",
        ),
        (
            format!("{{\"version\":1,\"request\":{{\"up\":{{\"tokem\":\"{secret}\"}}}}}}\n").into(),
            "cannot be read",
        ),
        (
            format!("{{\"version\":1,\"request\":{{\"{secret}\":1}}}}\n").into(),
            "cannot be read",
        ),
        (vec![b'x'; MAX_REQUEST_BYTES + 1], "longer than"),
    ] {
        let answer = raw(&path, line).await;
        assert!(
            answer.contains("bad_request") && answer.contains(says),
            "{answer}"
        );
        assert!(!answer.contains("hunter2"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_drops_a_call_is_reported_as_stopping() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.sock");
    let server = Server::bind(&path).unwrap();
    let (calls, mut received) = mpsc::channel::<Call>(1);
    tokio::spawn(server.serve(calls));
    tokio::spawn(async move { drop(received.recv().await) });
    let asked = tokio::task::spawn_blocking(move || ask(&path, Request::Status, PATIENCE));
    let Response::Refused(refused) = asked.await.unwrap().unwrap() else {
        panic!("not refused");
    };
    assert_eq!(refused.code, RefusedCode::Unavailable);
}

#[tokio::test]
async fn a_client_that_hangs_up_frees_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.sock");
    let server = Server::bind(&path).unwrap();
    let (calls, mut received) = mpsc::channel::<Call>(1);
    tokio::spawn(server.serve(calls));
    // More impatient clients than there are places: each must have freed its own.
    for _ in 0..=MAX_CLIENTS {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let line = b"{\"version\":1,\"request\":\"status\"}\n";
        stream.write_all(line).await.unwrap();
        let mut call = received.recv().await.unwrap();
        drop(stream);
        call.reply.closed().await;
    }
}

#[tokio::test]
async fn a_dead_socket_is_replaced_a_live_one_and_a_file_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/weir.sock");
    let first = Server::bind(&path).unwrap();
    assert!(matches!(Server::bind(&path), Err(BindError::InUse { .. })));
    drop(first);
    assert!(Server::bind(&path).is_ok());

    let file = folder.path().join("file");
    fs::write(&file, "mine").unwrap();
    assert!(matches!(
        Server::bind(&file),
        Err(BindError::NoSocket { .. })
    ));
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");

    let long = folder.path().join("x".repeat(MAX_PATH_BYTES));
    assert!(matches!(
        Server::bind(&long),
        Err(BindError::TooLong { .. })
    ));
}

#[test]
fn no_agent_is_told_apart_from_no_permission() {
    let folder = tempfile::tempdir().unwrap();
    let error = ask(&folder.path().join("none"), Request::Status, PATIENCE).unwrap_err();
    assert!(matches!(error, AskError::NoAgent { .. }));
}
