//! Node attributes: what `nodeAttrs` and the network-wide options set on each node.

use super::directory::DirectoryNode;
use super::render::Resolver;
use super::selector::Target;
use serde_json::{Map, Value};

/// The attributes that the policy gives a node, by name; most have no value.
pub(super) fn attributes(resolver: Resolver<'_>, node: &DirectoryNode) -> Map<String, Value> {
    let mut out = Map::new();
    for entry in &resolver.policy.node_attrs {
        let mut targets = entry.targets.iter();
        if !targets.any(|target| is_target(resolver, &target.value, node)) {
            continue;
        }
        for attr in &entry.attrs {
            out.entry(attr.value.clone()).or_insert(Value::Null);
        }
        for (name, values) in &entry.app {
            match out.entry(name.clone()).or_insert(Value::Null) {
                Value::Array(all) => all.extend(values.iter().cloned()),
                other => *other = Value::Array(values.clone()),
            }
        }
    }
    for (option, value) in &resolver.policy.options.values {
        if let Some(name) = option_attribute(option, value) {
            out.entry(name).or_insert(Value::Null);
        }
    }
    out
}

fn is_target(resolver: Resolver<'_>, target: &Target, node: &DirectoryNode) -> bool {
    if *target == Target::Any || resolver.names(target, node) {
        return true;
    }
    let set = resolver.set(target);
    node.addrs.iter().any(|addr| set.contains(*addr))
}

/// The attribute that a network-wide option sets on every node.
fn option_attribute(option: &str, value: &Value) -> Option<String> {
    let name = match (option, value) {
        ("randomizeClientPort", Value::Bool(true)) => "randomize-client-port",
        ("disableIPv4", Value::Bool(true)) => "disable-ipv4",
        ("OneCGNATRoute", Value::String(text)) => match text.as_str() {
            "mac-always" => "one-cgnat?v=true",
            "mac-never" => "one-cgnat?v=false",
            _ => return None,
        },
        _ => return None,
    };
    Some(name.to_owned())
}
