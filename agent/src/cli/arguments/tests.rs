use super::*;
use clap::CommandFactory;

/// The arguments, or what clap says of them.
fn parsed(line: &str) -> Result<Arguments, clap::Error> {
    Arguments::try_parse_from(line.split(' '))
}

#[test]
fn shared_flags_stand_before_or_after_the_verb() {
    for line in [
        "weir --state-dir /a --socket /b --json status",
        "weir status --state-dir /a --socket /b --json",
        "weir --json status --socket=/b --state-dir=/a",
    ] {
        let Shared {
            state_dir,
            socket,
            json,
        } = parsed(line).unwrap().shared;
        assert_eq!(state_dir, Some("/a".into()), "{line}");
        assert_eq!(socket, Some("/b".into()), "{line}");
        assert!(json, "{line}");
    }
}

#[test]
fn every_verb_of_the_surface_is_understood() {
    for line in [
        "weir agent --state-dir /a",
        "weir agent --state-dir /a --socket /b --interface weir1 --listen-port 51821 --bpf-dir /c",
        "weir up",
        "weir up -",
        "weir up weir1.a:1.00.x --hostname web-1",
        "weir up --token-file /t --advertise-routes 10.0.0.0/24,fd00::/64",
        "weir down",
        "weir down --purge",
        "weir status --json",
        "weir peers --json",
        "weir ping web-1",
        "weir explain 10.0.0.1 10.0.0.2:80 --proto udp --json",
        "weir explain web-1 [fd00::1]:80",
        "weir counters --json",
        "weir set --shields-up --json",
        "weir set --shields-up=false --refuse=drop",
        "weir doctor",
        "weir explain a b:80 --policy /p --network /n",
        "weir policy check /p",
        "weir policy test --policy /p --network /n",
        "weir policy compile --policy /p --network /n --settings /s --json",
        "weir policy explain a b:80 --policy /p --network /n",
    ] {
        assert!(parsed(line).is_ok(), "{line}");
    }
    Arguments::command().debug_assert();
}

#[test]
fn shields_go_up_without_a_word_and_down_with_one() {
    for (line, up) in [
        ("weir set --shields-up", Some(true)),
        ("weir set --shields-up=true", Some(true)),
        ("weir set --shields-up=false", Some(false)),
        ("weir set --refuse=answer", None),
    ] {
        let Verb::Set(set) = parsed(line).unwrap().verb else {
            panic!("{line}");
        };
        assert_eq!(set.shields_up, up, "{line}");
    }
}

#[test]
fn wrong_use_explains_itself() {
    for (line, says) in [
        ("weir", "Usage"),
        ("weir fly", "fly"),
        ("weir set", "--shields-up"),
        ("weir set --shields-up=perhaps", "perhaps"),
        ("weir set --refuse=politely", "`answer` or `drop`"),
        ("weir statsu", "status"),
        ("weir up a b", "unexpected argument"),
        ("weir up a --token-file b", "cannot be used with"),
        ("weir up --hostname a_b", "letters, digits"),
        ("weir up --hostname -a", "Usage"),
        (
            "weir up --advertise-routes 10.0.0.1/24",
            "write `10.0.0.0/24`",
        ),
        (
            "weir up --advertise-routes ten",
            "`ten` is not an IP address",
        ),
        ("weir agent --interface a/b", "1 to 15 characters"),
        ("weir agent --listen-port 0", "1..=65535"),
        ("weir explain a", "DST"),
        ("weir explain a b:c", "`c` is not a port"),
        ("weir explain a fd00::zz:1", "[ADDRESS]:PORT"),
        ("weir explain a b --proto tpc", "tcp, udp"),
        ("weir ping a --count 0", "1..=65535"),
        ("weir explain a b --policy /p", "--network"),
        ("weir policy compile --policy /p", "--network"),
    ] {
        let error = parsed(line).err().unwrap();
        assert_eq!(error.exit_code(), 2, "{line}");
        let text = error.render().to_string();
        assert!(text.contains(says), "{line}: {text}");
    }
    assert_eq!(parsed("weir --help").err().unwrap().exit_code(), 0);
    assert_eq!(parsed("weir --version").err().unwrap().exit_code(), 0);
}

#[test]
fn routes_are_a_set_and_an_empty_list_withdraws_all() {
    let text = "10.0.0.0/24, fd00::/64,10.0.0.0/24";
    assert_eq!(parse_routes(text).unwrap().0.len(), 2);
    assert_eq!(parse_routes(""), Ok(Routes(BTreeSet::new())));
}

#[test]
fn a_token_in_the_wrong_place_is_not_repeated() {
    let token = "weir1.example:1.00.hunter2";
    let line = format!("weir up a {token}");
    let text = parsed(&line).err().unwrap().render().to_string();
    assert!(text.contains(token), "clap quotes it: {text}");
    let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
    let safe = without_tokens(&text, &arguments).unwrap();
    assert!(
        !safe.contains("hunter2") && safe.contains("weir1.…"),
        "{safe}"
    );
}
