//! Routers that are honest, and LANs that are not.

use super::*;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);
const LEASE: Duration = Duration::from_secs(1200);

fn router(gateway: Ipv4Addr) -> Router {
    Router { gateway, own: HERE }
}

fn description(control: &str) -> String {
    let service = |kind: &str, control: &str| {
        format!(
            "<service><serviceType>urn:schemas-upnp-org:service:{kind}</serviceType>\
             <controlURL>{control}</controlURL></service>"
        )
    };
    let services = service("Layer3Forwarding:1", "/other") + &service("WANIPConnection:1", control);
    format!(
        "<?xml version=\"1.0\"?>\n<root xmlns=\"urn:schemas-upnp-org:device-1-0\"><device>\
         <deviceList><device><serviceList>{services}</serviceList></device></deviceList>\
         </device></root>"
    )
}

fn http(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}")
}

fn called(said: &str) -> String {
    let body = format!(
        "<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\"><s:Body>{said}\
         </s:Body></s:Envelope>"
    );
    http("200 OK", &body)
}

fn fault(code: u16) -> String {
    let body = format!(
        "<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\"><s:Body><s:Fault>\
         <detail><UPnPError xmlns=\"urn:schemas-upnp-org:control-1-0\"><errorCode>{code}\
         </errorCode></UPnPError></detail></s:Fault></s:Body></s:Envelope>"
    );
    http("500 Internal Server Error", &body)
}

fn address(addr: &str) -> String {
    called(&format!(
        "<u:GetExternalIPAddressResponse xmlns:u=\"x\"><NewExternalIPAddress>{addr}\
         </NewExternalIPAddress></u:GetExternalIPAddressResponse>"
    ))
}

/// A server that gives these answers, one a connection, and keeps what it was asked.
async fn server(answers: Vec<String>) -> (SocketAddrV4, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let SocketAddr::V4(at) = listener.local_addr().unwrap() else {
        panic!("an IPv4 socket has an IPv4 address");
    };
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (kept, mut answers) = (Arc::clone(&asked), VecDeque::from(answers));
    tokio::spawn(async move {
        while let Some(answer) = answers.pop_front() {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut question = Vec::new();
            let whole = |question: &[u8]| {
                let text = String::from_utf8_lossy(question);
                text.starts_with("GET") && text.ends_with("\r\n\r\n")
                    || text.trim_end().ends_with("</s:Envelope>")
            };
            while !whole(&question) {
                let mut some = [0; 4096];
                let read = stream.read(&mut some).await.unwrap();
                assert!(read > 0, "it hung up");
                question.extend_from_slice(&some[..read]);
            }
            let question = String::from_utf8(question).unwrap();
            kept.lock().unwrap().push(question);
            // Whoever has had enough of it hangs up.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (at, asked)
}

/// Answers searches with this, from this address. Returns where it listens.
async fn announcer(from: Ipv4Addr, location: String) -> u16 {
    let listener = UdpSocket::bind((HERE, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mouth = UdpSocket::bind((from, 0)).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        loop {
            let (_, asker) = listener.recv_from(&mut buffer).await.unwrap();
            let answer = format!("HTTP/1.1 200 OK\r\nLocation: {location}\r\nST: x\r\n\r\n");
            mouth.send_to(answer.as_bytes(), asker).await.unwrap();
        }
    });
    port
}

fn port() -> NonZeroU16 {
    NonZeroU16::new(51820).unwrap()
}

#[tokio::test]
async fn a_port_is_opened_kept_and_given_back() {
    let (at, asked) = server(vec![
        http("200 OK", &description("ctl/IPConn")),
        called("<u:AddPortMappingResponse xmlns:u=\"x\"/>"),
        address("192.0.2.7"),
        called("<u:DeletePortMappingResponse xmlns:u=\"x\"/>"),
    ])
    .await;
    let search = announcer(HERE, format!("http://{at}/igd/desc.xml")).await;
    let service = find(router(HERE), search).await.unwrap();
    let (mapping, outside) = Mapping::of(service, router(HERE), port(), LEASE)
        .await
        .unwrap();
    assert_eq!(outside, "192.0.2.7:51820".parse().unwrap());
    mapping.close().await.unwrap();
    let asked = asked.lock().unwrap().clone();
    assert!(
        asked[0].starts_with("GET /igd/desc.xml HTTP/1.1\r\n"),
        "{}",
        asked[0]
    );
    assert!(
        asked[1].starts_with("POST /igd/ctl/IPConn HTTP/1.1\r\n"),
        "{}",
        asked[1]
    );
    for part in [
        "\"urn:schemas-upnp-org:service:WANIPConnection:1#AddPortMapping\"",
        "<NewInternalClient>127.0.0.1</NewInternalClient>",
        "<NewLeaseDuration>1200</NewLeaseDuration>",
    ] {
        assert!(asked[1].contains(part), "{part}: {}", asked[1]);
    }
    assert!(asked[3].contains("<NewExternalPort>51820</NewExternalPort>"));
    assert!(asked[3].contains("u:DeletePortMapping"), "{}", asked[3]);
}

async fn service_of(answers: Vec<String>) -> (Service, Arc<Mutex<Vec<String>>>) {
    let (at, asked) = server(answers).await;
    let control = Place {
        at,
        path: "/c".to_owned(),
    };
    let kind = "urn:schemas-upnp-org:service:WANIPConnection:1".to_owned();
    (Service { control, kind }, asked)
}

#[tokio::test]
async fn where_ours_is_taken_another_port_is_asked_for_and_a_permanent_lease_where_there_is_no_other()
 {
    let (service, asked) = service_of(vec![
        fault(ONLY_PERMANENT),
        fault(CONFLICT),
        called("<u:AddPortMappingResponse xmlns:u=\"x\"/>"),
        address("192.0.2.7"),
    ])
    .await;
    let (_, outside) = Mapping::of(service, router(HERE), port(), LEASE)
        .await
        .unwrap();
    assert_ne!(outside.port(), 51820);
    let last = asked.lock().unwrap()[2].clone();
    assert!(
        last.contains(&format!("<NewExternalPort>{}<", outside.port())),
        "{last}"
    );
    assert!(last.contains("<NewInternalPort>51820<"), "{last}");
    assert!(last.contains("<NewLeaseDuration>0<"), "{last}");

    let (service, asked) = service_of(vec![fault(CONFLICT); 1 + OTHER_PORTS]).await;
    let refused = Mapping::of(service, router(HERE), port(), LEASE).await;
    assert!(matches!(refused, Err(UpnpError::Refused(CONFLICT))));
    assert_eq!(asked.lock().unwrap().len(), 1 + OTHER_PORTS);
}

#[tokio::test]
async fn nonsense_is_refused_and_bounded() {
    let long = format!("<a>{}</a>", "x".repeat(MAX_BYTES));
    let many = format!("<a>{}</a>", "<b/>".repeat(5_000));
    let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(2 * MAX_HEAD_BYTES));
    let bomb = "<!DOCTYPE a [<!ENTITY x SYSTEM \"file:///etc/passwd\">]><a>&x;</a>";
    let answers = [
        http("200 OK", &long),
        http("200 OK", &many),
        endless,
        http("200 OK", bomb),
        http("200 OK", "<a>"),
        "no HTTP\r\n\r\n".to_owned(),
        called("<u:AddPortMappingResponse xmlns:u=\"x\"/>") + "then more",
    ];
    for answer in answers {
        let (service, asked) = service_of(vec![answer.clone(), address("0.0.0.0")]).await;
        let opened = Mapping::of(service, router(HERE), port(), LEASE).await;
        assert!(opened.is_err(), "{}", &answer[..answer.len().min(80)]);
        assert!(asked.lock().unwrap().len() <= 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_router_that_accepts_and_says_nothing_is_not_waited_for() {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let SocketAddr::V4(at) = listener.local_addr().unwrap() else {
        panic!("an IPv4 socket has an IPv4 address");
    };
    let place = Place {
        at,
        path: "/".to_owned(),
    };
    let answered = exchange(Request::get("/"), &place, String::new()).await;
    assert!(matches!(answered, Err(UpnpError::Silent)), "{answered:?}");
}

#[tokio::test(start_paused = true)]
async fn only_the_gateway_is_believed_and_only_about_itself() {
    let (at, _) = server(vec![http("200 OK", &description("/c"))]).await;
    let liar = announcer(ELSEWHERE, format!("http://{at}/d")).await;
    let found = find(router(HERE), liar).await;
    assert!(matches!(found, Err(UpnpError::Silent)), "{found:?}");
    let pointing = announcer(HERE, format!("http://{ELSEWHERE}:{}/d", at.port())).await;
    let found = find(router(HERE), pointing).await;
    assert!(matches!(found, Err(UpnpError::Silent)), "{found:?}");
}

#[test]
fn urls_lead_to_the_gateway_by_its_number() {
    let gateway = Ipv4Addr::new(10, 0, 0, 1);
    let found = |url: &str| search::place(url, gateway).map(|it| (it.at.port(), it.path));
    assert_eq!(
        found("http://10.0.0.1:5000/d.xml"),
        Some((5000, "/d.xml".to_owned()))
    );
    assert_eq!(found("http://10.0.0.1"), Some((80, "/".to_owned())));
    for wrong in [
        "http://10.0.0.2:5000/d.xml",
        "https://10.0.0.1/d.xml",
        "http://router/d.xml",
        "http://10.0.0.1@10.0.0.2/d.xml",
        "http://10.0.0.1:0/d.xml",
        "http://10.0.0.1:99999/",
        "http://10.0.0.1/a b",
        "http://10.0.0.1/a\r\nX: y",
        "http://[::1]/",
        "",
    ] {
        assert_eq!(found(wrong), None, "{wrong}");
    }
    assert_eq!(found(&format!("http://10.0.0.1/{}", "x".repeat(600))), None);
}

#[test]
fn a_description_names_a_service_on_its_own_host() {
    let at = SocketAddrV4::new(HERE, 5000);
    let location = Place {
        at,
        path: "/a/b.xml".to_owned(),
    };
    let control = |url: &str| {
        let service = document::service(&description(url), &location).ok()?;
        assert_eq!(IpAddr::from(*service.control.at.ip()), HERE);
        Some((service.control.at.port(), service.control.path))
    };
    assert_eq!(control("/ctl"), Some((5000, "/ctl".to_owned())));
    assert_eq!(control("ctl"), Some((5000, "/a/ctl".to_owned())));
    assert_eq!(
        control("http://127.0.0.1:81/c"),
        Some((81, "/c".to_owned()))
    );
    assert_eq!(control("http://192.0.2.1/c"), None);
    assert_eq!(
        control("//192.0.2.1/c"),
        Some((5000, "//192.0.2.1/c".to_owned()))
    );
    let moved =
        description("ctl").replace("<device>", "<URLBase>http://192.0.2.1/</URLBase><device>");
    let service = document::service(&moved, &location).unwrap();
    assert_eq!(service.control.at, at, "another host's base is no base");
    let both = description("/one").replace(
        "</serviceList>",
        "<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:2</serviceType>\
         <controlURL>/two</controlURL></service></serviceList>",
    );
    assert_eq!(
        document::service(&both, &location).unwrap().control.path,
        "/two"
    );
}
