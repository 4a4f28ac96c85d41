//! The database goes away and comes back: no netmap is ever empty for that.

use crate::client::{At, Machine, names};
use crate::place::Place;
use crate::postgres::Postgres;
use coordinator::http::admin::Verb;
use proto::control::{PollMessage, RefusalCode};
use proto::netmap::Update;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_error_is_never_an_empty_netmap() {
    let test = "a_database_error_is_never_an_empty_netmap";
    let Some(mut postgres) = Postgres::start(test) else {
        return;
    };
    let place = Place::with_network(Some(postgres.url())).await;
    let token = place.token("home", "tag:web").await;
    let (a, b) = (Machine::new(), Machine::new());
    a.join(&token, "a").await;
    b.join(&token, "b").await;
    let mut stream = a.connect(token.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    assert_eq!(names(&netmap), ["b"]);
    let mut waiting = b.connect(token.at()).await;

    postgres.kill();
    // The stream stays, and says nothing but that the coordinator lives.
    let quiet = async {
        loop {
            match stream.next().await.expect("the stream goes on") {
                PollMessage::KeepAlive => break,
                PollMessage::Update(Update::Full(full)) => {
                    panic!("a netmap from nothing: {full:?}")
                }
                PollMessage::Update(Update::Delta(delta)) => {
                    assert!(delta.removed.is_empty() && !delta.peers_empty_on_purpose);
                    netmap.apply(*delta).unwrap();
                }
            }
        }
    };
    let refused = async {
        let call = a.connect(token.at()).await.poll(None).await;
        assert_eq!(call.err().unwrap().code, RefusalCode::Unavailable);
        assert_eq!(
            waiting.hello().await.unwrap_err().code,
            RefusalCode::Unavailable
        );
        let admin = place
            .ask("home", Verb::NodeList)
            .await
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(admin.contains("database does not answer"), "{admin}");
    };
    tokio::join!(quiet, refused);
    assert_eq!(names(&netmap), ["b"]);

    postgres.resume();
    Machine::new().join(&token, "c").await;
    stream
        .until(&mut netmap, |netmap| names(netmap) == ["b", "c"])
        .await;
}
