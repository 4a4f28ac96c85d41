//! One reader per section of the policy file.

use super::super::diagnostic::Code;
use super::super::document::{
    Access, AutoApprovers, Destination, IpService, IpsetItem, NodeAttr, Options, Policy, Section,
    Source, Spanned, SshAction, SshRule, SshTest, SshUser, Test,
};
use super::super::selector::{Protocols, Target, parse_ports};
use super::relays::derp_map;
use super::{Fields, Reader, json, nearest, span};
use crate::net::{Prefix, PrefixError};
use jsonc_parser::ast;
use jsonc_parser::common::Ranged;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;

const SECTIONS: &[&str] = &[
    "acls",
    "grants",
    "groups",
    "hosts",
    "ipsets",
    "tagOwners",
    "autoApprovers",
    "nodeAttrs",
    "postures",
    "defaultSrcPosture",
    "ssh",
    "tests",
    "sshTests",
    "derpMap",
    "disableIPv4",
    "OneCGNATRoute",
    "randomizeClientPort",
];
/// A week, as the language has it.
const MAX_CHECK_PERIOD_SECONDS: f64 = 168.0 * 3600.0;
const OPTIONS: [&str; 4] = [
    "derpMap",
    "disableIPv4",
    "OneCGNATRoute",
    "randomizeClientPort",
];

/// The whole document; `None` if it is no object.
pub(super) fn policy(reader: &mut Reader<'_>, root: &ast::Value<'_>) -> Option<Policy> {
    let fields = reader.fields(root, "a policy", SECTIONS)?;
    let section = |name: &str, reader: &mut Reader<'_>, read: ReadItem<Access>| {
        fields.get(name).map(|_| list(reader, &fields, name, read))
    };
    Some(Policy {
        source: Source::new(""),
        acls: section("acls", reader, acl),
        grants: section("grants", reader, grant),
        groups: named(reader, &fields, "groups", "group:"),
        hosts: hosts(reader, &fields),
        ipsets: ipsets(reader, &fields),
        ipset_addrs: BTreeMap::new(),
        tag_owners: named(reader, &fields, "tagOwners", "tag:"),
        auto_approvers: auto_approvers(reader, &fields),
        node_attrs: list(reader, &fields, "nodeAttrs", node_attr),
        postures: postures(reader, &fields),
        default_src_posture: reader.optional_strings(&fields, "defaultSrcPosture"),
        ssh: list(reader, &fields, "ssh", ssh_rule),
        tests: list(reader, &fields, "tests", test),
        ssh_tests: list(reader, &fields, "sshTests", ssh_test),
        options: options(reader, &fields),
        relays: fields
            .get("derpMap")
            .map(|value| derp_map(reader, value))
            .unwrap_or_default(),
    })
}

type ReadItem<T> = fn(&mut Reader<'_>, &ast::Value<'_>, u32) -> Option<T>;

fn list<T>(reader: &mut Reader<'_>, fields: &Fields<'_>, name: &str, read: ReadItem<T>) -> Vec<T> {
    let Some(value) = fields.get(name) else {
        return Vec::new();
    };
    let items = reader.items(value, &format!("`{name}`"));
    let item = |(index, value)| read(reader, value, index as u32);
    items.iter().enumerate().filter_map(item).collect()
}

fn acl(reader: &mut Reader<'_>, value: &ast::Value<'_>, index: u32) -> Option<Access> {
    const FIELDS: &[&str] = &[
        "action",
        "proto",
        "src",
        "dst",
        "users",
        "ports",
        "srcPosture",
    ];
    let fields = reader.fields(value, "an acl", FIELDS)?;
    acl_action(reader, &fields);
    let protocols = optional_protocols(reader, &fields);
    let (src, dst) = (
        either(&fields, "src", "users"),
        either(&fields, "dst", "ports"),
    );
    if fields.get(src).is_none() {
        reader.missing(&fields, "the acl", "src", "\"src\": [\"*\"]");
    }
    if fields.get(dst).is_none() {
        reader.missing(&fields, "the acl", "dst", "\"dst\": [\"*:*\"]");
    }
    let srcs = reader.targets(&fields, src);
    let dst_texts = reader.optional_strings(&fields, dst);
    let dsts = dst_texts
        .iter()
        .filter_map(|text| acl_destination(reader, text))
        .collect();
    Some(Access {
        section: Section::Acls,
        index,
        line: reader.source.line(fields.span),
        span: fields.span,
        srcs,
        dsts,
        services: vec![IpService {
            protocols,
            ports: Vec::new(),
        }],
        app: BTreeMap::new(),
        via: Vec::new(),
        postures: reader.optional_strings(&fields, "srcPosture"),
    })
}

fn acl_action(reader: &mut Reader<'_>, fields: &Fields<'_>) {
    let Some(action) = fields.get("action") else {
        reader.missing(fields, "the acl", "action", "\"action\": \"accept\"");
        return;
    };
    if let Some(action) = reader.string(action, "`action`")
        && action.value != "accept"
    {
        let message = format!("action `{}` is not known", action.value);
        let hint = "write \"accept\": rules only allow, and what none allows is denied";
        reader.fault(action.span, Code::BadValue, message, hint);
    }
}

/// The name under which a field was written: the present one or that of older files.
fn either(fields: &Fields<'_>, name: &'static str, legacy: &'static str) -> &'static str {
    if fields.get(name).is_none() && fields.get(legacy).is_some() {
        legacy
    } else {
        name
    }
}

fn optional_protocols(reader: &mut Reader<'_>, fields: &Fields<'_>) -> Protocols {
    let value = fields.get("proto");
    let text = value.and_then(|value| reader.string(value, "`proto`"));
    let parsed = text.and_then(|text| protocols(reader, &text, &text.value));
    parsed.unwrap_or(Protocols::Usual)
}

fn protocols(reader: &mut Reader<'_>, at: &Spanned<String>, text: &str) -> Option<Protocols> {
    let parsed = Protocols::parse(text);
    if parsed.is_none() {
        let near = nearest(text, Protocols::names());
        let hint = near.map_or_else(
            || "write a name such as tcp, udp, icmp, sctp, gre, or a number up to 255".to_owned(),
            |near| format!("write `{near}`"),
        );
        let message = format!("unknown protocol `{text}`");
        reader.fault(at.span, Code::BadProtocol, message, hint);
    }
    parsed
}

/// `SELECTOR:PORTS`; an IPv6 address may stand in brackets, with the length of a prefix behind.
fn acl_destination(reader: &mut Reader<'_>, text: &Spanned<String>) -> Option<Destination> {
    let written = &text.value;
    let Some((target, ports)) = split_ports(written) else {
        let message = format!("destination `{written}` has no ports");
        let hint = format!("write `{written}:*` for every port, or `{written}:443`");
        reader.fault(text.span, Code::BadPort, message, hint);
        return None;
    };
    let target = reader.target(&Spanned {
        value: target.into_owned(),
        span: text.span,
    });
    match parse_ports(ports) {
        Ok(ports) => Some(Destination {
            target: target?,
            ports,
        }),
        Err(message) => {
            let message = format!("destination `{written}`: {message}");
            let hint = "write `*`, a port (22), a list (80,443) or a range (8000-8100)";
            reader.fault(text.span, Code::BadPort, message, hint);
            None
        }
    }
}

/// Splits `SELECTOR:PORTS` at the last colon, and takes brackets off: `[fd7a::]/48:22` is
/// `fd7a::/48` and `22`.
pub(in super::super) fn split_ports(text: &str) -> Option<(Cow<'_, str>, &str)> {
    let (target, ports) = text.rsplit_once(':')?;
    if let Some(rest) = target.strip_prefix('[')
        && let Some((addr, length)) = rest.split_once(']')
        && (length.is_empty() || length.starts_with('/'))
    {
        return Some((format!("{addr}{length}").into(), ports));
    }
    (!target.is_empty()).then_some((target.into(), ports))
}

fn grant(reader: &mut Reader<'_>, value: &ast::Value<'_>, index: u32) -> Option<Access> {
    const FIELDS: &[&str] = &["src", "dst", "ip", "app", "via", "srcPosture"];
    let fields = reader.fields(value, "a grant", FIELDS)?;
    for (name, example) in [("src", "\"src\": [\"*\"]"), ("dst", "\"dst\": [\"*\"]")] {
        if fields.get(name).is_none() {
            reader.missing(&fields, "the grant", name, example);
        }
    }
    let ip = reader.optional_strings(&fields, "ip");
    let services = ip.iter().filter_map(|text| service(reader, text)).collect();
    let app = app(reader, &fields);
    if ip.is_empty() && app.is_empty() {
        let opening = fields.span;
        let message = "the grant has neither `ip` nor `app`: it would grant nothing";
        let hint = "add `\"ip\": [\"*\"]` for every port, or an `app` capability";
        reader.fault(opening, Code::MissingField, message, hint);
    }
    let destination = |target| Destination {
        target,
        ports: Vec::new(),
    };
    let dsts = reader
        .targets(&fields, "dst")
        .into_iter()
        .map(destination)
        .collect();
    Some(Access {
        section: Section::Grants,
        index,
        line: reader.source.line(fields.span),
        span: fields.span,
        srcs: reader.targets(&fields, "src"),
        dsts,
        services,
        app,
        via: reader.targets(&fields, "via"),
        postures: reader.optional_strings(&fields, "srcPosture"),
    })
}

/// An item of a grant's `ip`: `*`, `443`, `tcp:443`, `udp:53-60`.
fn service(reader: &mut Reader<'_>, text: &Spanned<String>) -> Option<IpService> {
    if text.value.matches(':').count() > 1 {
        let message = format!("`{}` has more than one colon", text.value);
        reader.fault(text.span, Code::BadPort, message, "write `tcp:443`");
        return None;
    }
    let (protocols, ports) = match text.value.split_once(':') {
        Some((protocol, ports)) => (protocols(reader, text, protocol)?, ports),
        None => match Protocols::parse(&text.value) {
            Some(named @ Protocols::One(_)) if parse_ports(&text.value).is_err() => (named, "*"),
            _ => (Protocols::Usual, text.value.as_str()),
        },
    };
    match parse_ports(ports) {
        Ok(ports) => Some(IpService { protocols, ports }),
        Err(message) => {
            let hint = "write `*`, `443`, `tcp:443` or `udp:8000-8100`";
            reader.fault(text.span, Code::BadPort, message, hint);
            None
        }
    }
}

fn app(reader: &mut Reader<'_>, fields: &Fields<'_>) -> BTreeMap<String, Vec<Value>> {
    let mut out = BTreeMap::new();
    let Some(value) = fields.get("app") else {
        return out;
    };
    for (name, value) in reader.entries(value, "`app`") {
        if !is_capability(&name.value) {
            let written = &name.value;
            let message = format!("capability `{written}` is no name of the form domain/path");
            let hint = "write for example `example.com/cap/backup`, without `https://`";
            reader.fault(name.span, Code::BadValue, message, hint);
        }
        let items = match value {
            ast::Value::NullKeyword(_) => Vec::new(),
            other => reader
                .items(other, "a capability's value")
                .iter()
                .map(json)
                .collect(),
        };
        out.insert(name.value, items);
    }
    out
}

/// `domain/path`: a domain, no scheme, and something after the slash.
fn is_capability(name: &str) -> bool {
    let Some((domain, path)) = name.split_once('/') else {
        return false;
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !domain.is_empty() && domain.chars().all(plain) && !path.is_empty() && !path.starts_with('/')
}

type Named<T> = BTreeMap<String, Spanned<T>>;

/// A section whose fields are free names.
fn names<T>(
    reader: &mut Reader<'_>,
    fields: &Fields<'_>,
    section: &str,
    mut read: impl FnMut(&mut Reader<'_>, &Spanned<String>, &ast::Value<'_>) -> Option<T>,
) -> Named<T> {
    let mut out = BTreeMap::new();
    let Some(value) = fields.get(section) else {
        return out;
    };
    for (name, value) in reader.entries(value, &format!("`{section}`")) {
        if let Some(value) = read(reader, &name, value) {
            let span = name.span;
            out.insert(name.value, Spanned { value, span });
        }
    }
    out
}

/// A section of named lists of selectors.
fn named(
    reader: &mut Reader<'_>,
    fields: &Fields<'_>,
    section: &'static str,
    prefix: &str,
) -> Named<Vec<Spanned<Target>>> {
    names(reader, fields, section, |reader, name, value| {
        check_prefix(reader, name, prefix, section);
        Some(target_list(reader, name, value))
    })
}

fn target_list(
    reader: &mut Reader<'_>,
    name: &Spanned<String>,
    value: &ast::Value<'_>,
) -> Vec<Spanned<Target>> {
    if matches!(value, ast::Value::NullKeyword(_)) {
        return Vec::new();
    }
    let texts = reader.strings(value, &format!("`{}`", name.value));
    texts
        .iter()
        .filter_map(|text| reader.target(text))
        .collect()
}

fn check_prefix(reader: &mut Reader<'_>, name: &Spanned<String>, prefix: &str, section: &str) {
    let rest = name.value.strip_prefix(prefix);
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | '/' | '+');
    if !rest.is_some_and(|rest| !rest.is_empty() && rest.chars().all(plain)) {
        let message = format!("`{}` is no name for `{section}`", name.value);
        let bare = name.value.rsplit(':').next().unwrap_or_default();
        let hint = format!(
            "write `{prefix}{}`",
            if bare.is_empty() { "name" } else { bare }
        );
        reader.fault(name.span, Code::BadValue, message, hint);
    } else if prefix == "tag:" && !rest.is_some_and(|rest| rest.starts_with(is_letter)) {
        let message = format!("`{}`: tag names must start with a letter", name.value);
        reader.fault(
            name.span,
            Code::BadValue,
            message,
            "write for example `tag:web`",
        );
    }
}

fn is_letter(c: char) -> bool {
    c.is_ascii_alphabetic()
}

fn hosts(reader: &mut Reader<'_>, fields: &Fields<'_>) -> Named<Prefix> {
    names(reader, fields, "hosts", |reader, name, value| {
        if name.value.is_empty() || name.value.contains([':', '@', '/', ' ', '*']) {
            let message = format!("`{}` is no host name", name.value);
            let hint = "a name has none of `: @ / *` and no space";
            reader.fault(name.span, Code::BadValue, message, hint);
        }
        let text = reader.string(value, "a host")?;
        prefix(reader, &text)
    })
}

fn prefix(reader: &mut Reader<'_>, text: &Spanned<String>) -> Option<Prefix> {
    match text.value.parse() {
        Ok(prefix) => Some(prefix),
        Err(error) => {
            let hint = match &error {
                PrefixError::HostBits(..) => "",
                PrefixError::Address(_) | PrefixError::Length(_) => {
                    "write an address (`10.0.0.7`) or a prefix (`10.0.0.0/8`)"
                }
            };
            reader.fault(text.span, Code::BadValue, error.to_string(), hint);
            None
        }
    }
}

fn ipsets(reader: &mut Reader<'_>, fields: &Fields<'_>) -> Named<Vec<Spanned<IpsetItem>>> {
    names(reader, fields, "ipsets", |reader, name, value| {
        check_prefix(reader, name, "ipset:", "ipsets");
        let texts = reader.strings(value, &format!("`{}`", name.value));
        Some(
            texts
                .iter()
                .filter_map(|text| ipset_item(reader, text))
                .collect(),
        )
    })
}

/// `10.0.0.0/8`, `add 10.0.0.0/8`, `remove host`, …
fn ipset_item(reader: &mut Reader<'_>, text: &Spanned<String>) -> Option<Spanned<IpsetItem>> {
    let (make, selector): (fn(Target) -> IpsetItem, &str) =
        match text.value.trim().split_once(char::is_whitespace) {
            Some(("add", rest)) => (IpsetItem::Add, rest),
            Some(("remove", rest)) => (IpsetItem::Remove, rest),
            _ => (IpsetItem::Add, &text.value),
        };
    let target = reader.target(&Spanned {
        value: selector.trim().to_owned(),
        span: text.span,
    })?;
    Some(Spanned {
        value: make(target.value),
        span: text.span,
    })
}

fn auto_approvers(reader: &mut Reader<'_>, fields: &Fields<'_>) -> AutoApprovers {
    const FIELDS: &[&str] = &["routes", "exitNode", "services"];
    let mut out = AutoApprovers::default();
    let value = fields.get("autoApprovers");
    let Some(fields) = value.and_then(|value| reader.fields(value, "`autoApprovers`", FIELDS))
    else {
        return out;
    };
    out.exit_node = reader.targets(&fields, "exitNode");
    out.services = named(reader, &fields, "services", "svc:");
    let by_text = names(reader, &fields, "routes", |reader, name, value| {
        Some((prefix(reader, name)?, target_list(reader, name, value)))
    });
    for route in by_text.into_values() {
        let span = route.span;
        let (prefix, value) = route.value;
        out.routes.insert(prefix, Spanned { value, span });
    }
    out
}

fn node_attr(reader: &mut Reader<'_>, value: &ast::Value<'_>, _index: u32) -> Option<NodeAttr> {
    const FIELDS: &[&str] = &["target", "attr", "app", "ipPool"];
    let fields = reader.fields(value, "an entry of `nodeAttrs`", FIELDS)?;
    if fields.get("target").is_none() {
        reader.missing(&fields, "the entry", "target", "\"target\": [\"*\"]");
    }
    let pool = reader.optional_strings(&fields, "ipPool");
    let pool = pool.iter().filter_map(|text| {
        let value = prefix(reader, text)?;
        let span = text.span;
        Some(Spanned { value, span })
    });
    let ip_pool = pool.collect();
    Some(NodeAttr {
        span: fields.span,
        targets: reader.targets(&fields, "target"),
        attrs: reader.optional_strings(&fields, "attr"),
        app: app(reader, &fields),
        ip_pool,
    })
}

fn postures(reader: &mut Reader<'_>, fields: &Fields<'_>) -> Named<Vec<Spanned<String>>> {
    names(reader, fields, "postures", |reader, name, value| {
        check_prefix(reader, name, "posture:", "postures");
        Some(reader.strings(value, &format!("`{}`", name.value)))
    })
}

fn ssh_rule(reader: &mut Reader<'_>, value: &ast::Value<'_>, index: u32) -> Option<SshRule> {
    const FIELDS: &[&str] = &[
        "action",
        "src",
        "dst",
        "users",
        "checkPeriod",
        "acceptEnv",
        "recorder",
        "enforceRecorder",
        "srcPosture",
    ];
    let fields = reader.fields(value, "an ssh rule", FIELDS)?;
    let action = ssh_action(reader, &fields);
    let users = reader.optional_strings(&fields, "users");
    if users.is_empty() {
        let example = "\"users\": [\"autogroup:nonroot\"]";
        reader.missing(&fields, "the ssh rule", "users", example);
    }
    let users = users
        .iter()
        .filter_map(|text| ssh_user(reader, text))
        .collect();
    let accept_env = reader.optional_strings(&fields, "acceptEnv");
    for empty in accept_env.iter().filter(|name| name.value.is_empty()) {
        let message = "an empty name in `acceptEnv`";
        reader.fault(
            empty.span,
            Code::BadValue,
            message,
            "name a variable, or `*`",
        );
    }
    let enforce = fields.get("enforceRecorder");
    Some(SshRule {
        index,
        line: reader.source.line(fields.span),
        span: fields.span,
        action,
        srcs: reader.targets(&fields, "src"),
        dsts: reader.targets(&fields, "dst"),
        users,
        check_period: check_period(reader, &fields),
        accept_env: accept_env.into_iter().map(|text| text.value).collect(),
        recorder: reader.targets(&fields, "recorder"),
        enforce_recorder: enforce.is_some_and(|value| reader.boolean(value, "`enforceRecorder`")),
        postures: reader.optional_strings(&fields, "srcPosture"),
    })
}

/// `always`, or a duration of at most a week. Only rules that check have one.
fn check_period(reader: &mut Reader<'_>, fields: &Fields<'_>) -> Option<Spanned<String>> {
    let value = fields.get("checkPeriod")?;
    let text = reader.string(value, "`checkPeriod`")?;
    let action = fields.get("action").and_then(ast::Value::as_string_lit);
    if action.is_none_or(|action| action.value.trim() != "check") {
        let message = "only a rule with action `check` has a `checkPeriod`";
        reader.fault(text.span, Code::BadValue, message, "");
    }
    let fits = |seconds: f64| (0.0..=MAX_CHECK_PERIOD_SECONDS).contains(&seconds);
    if text.value != "always" && !duration_seconds(&text.value).is_some_and(fits) {
        let message = format!("`{}` is no period from 0s to 168h", text.value);
        let hint = "write for example `30m`, `12h`, or `always`";
        reader.fault(text.span, Code::BadValue, message, hint);
    }
    Some(text)
}

/// A duration as Go writes it (`1h30m`, `90s`, `1.5h`), in seconds.
fn duration_seconds(text: &str) -> Option<f64> {
    const UNITS: [(&str, f64); 7] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("µs", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
    ];
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0.0);
    }
    let mut total = 0.0;
    while !rest.is_empty() || total == 0.0 {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let number: f64 = number.parse().ok()?;
        let end = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let (_, seconds) = UNITS.iter().find(|(name, _)| *name == unit)?;
        total += number * seconds;
        rest = tail;
        if rest.is_empty() {
            break;
        }
    }
    Some(sign * total)
}

fn ssh_action(reader: &mut Reader<'_>, fields: &Fields<'_>) -> SshAction {
    let Some(value) = fields.get("action") else {
        reader.missing(fields, "the ssh rule", "action", "\"action\": \"accept\"");
        return SshAction::Accept;
    };
    let text = reader.string(value, "`action`");
    match text.as_ref().map(|text| text.value.trim()) {
        Some("check") => SshAction::Check,
        Some("accept") | None => SshAction::Accept,
        Some(other) => {
            let message = format!("action `{other}` is not known");
            let hint = "write \"accept\" or \"check\"";
            reader.fault(span(value.range()), Code::BadValue, message, hint);
            SshAction::Accept
        }
    }
}

/// An account; anything that is no pattern is a name, whatever it looks like.
fn ssh_user(reader: &mut Reader<'_>, text: &Spanned<String>) -> Option<Spanned<SshUser>> {
    let written = text.value.trim();
    let pattern = written.strip_prefix("localpart:*@");
    let value = match pattern {
        Some(domain) if !domain.is_empty() && !domain.contains('@') => {
            SshUser::LocalPart(domain.to_owned())
        }
        _ if written == "autogroup:nonroot" => SshUser::NonRoot,
        _ if written.is_empty() || written == "*" => {
            let message = format!("user `{written}` is not valid");
            let hint = "name an account (`root`), or `autogroup:nonroot` for every other";
            reader.fault(text.span, Code::BadValue, message, hint);
            return None;
        }
        _ => SshUser::Name(written.to_owned()),
    };
    Some(Spanned {
        value,
        span: text.span,
    })
}

/// The `src` of a test; a missing one is an empty text at the test's place, and fails the test.
fn test_src(reader: &mut Reader<'_>, fields: &Fields<'_>, name: &str) -> Spanned<String> {
    let value = fields.get(name);
    let src = value.and_then(|value| reader.string(value, "`src`"));
    src.unwrap_or(Spanned {
        value: String::new(),
        span: fields.span,
    })
}

fn test(reader: &mut Reader<'_>, value: &ast::Value<'_>, _index: u32) -> Option<Test> {
    const FIELDS: &[&str] = &[
        "src",
        "srcPostureAttrs",
        "proto",
        "accept",
        "deny",
        "user",
        "allow",
    ];
    let fields = reader.fields(value, "a test", FIELDS)?;
    Some(Test {
        span: fields.span,
        src: test_src(reader, &fields, either(&fields, "src", "user")),
        protocols: optional_protocols(reader, &fields),
        accept: reader.optional_strings(&fields, either(&fields, "accept", "allow")),
        deny: reader.optional_strings(&fields, "deny"),
    })
}

fn ssh_test(reader: &mut Reader<'_>, value: &ast::Value<'_>, _index: u32) -> Option<SshTest> {
    const FIELDS: &[&str] = &["src", "srcPostureAttrs", "dst", "accept", "deny", "check"];
    let fields = reader.fields(value, "an ssh test", FIELDS)?;
    Some(SshTest {
        span: fields.span,
        src: test_src(reader, &fields, "src"),
        dsts: reader.optional_strings(&fields, "dst"),
        accept: reader.optional_strings(&fields, "accept"),
        deny: reader.optional_strings(&fields, "deny"),
        check: reader.optional_strings(&fields, "check"),
    })
}

fn options(reader: &mut Reader<'_>, fields: &Fields<'_>) -> Options {
    let mut out = Options::default();
    for name in OPTIONS {
        let Some(value) = fields.get(name) else {
            continue;
        };
        let what = format!("`{name}`");
        match name {
            "disableIPv4" | "randomizeClientPort" => {
                reader.boolean(value, &what);
            }
            // Read in whole as `relays`.
            "derpMap" => {}
            _ => {
                reader.string(value, &what);
            }
        }
        out.values.insert(name.to_owned(), json(value));
    }
    out
}
