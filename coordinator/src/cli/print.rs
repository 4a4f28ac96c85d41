//! Answers as text for people and as JSON for programs.

use crate::http::admin::{Answer, AuditDocument, JSON_VERSION, NetworkDocument, NodeDocument};
use serde_json::json;
use std::io::{self, Write};

/// Writes the answer: one JSON document, or text whose last line is what a script wants. `false`
/// if the answer is bad news, or tells of a difference.
///
/// # Errors
/// If standard output cannot be written.
pub fn print(out: &mut impl Write, answer: &Answer, as_json: bool) -> io::Result<bool> {
    let good = match answer {
        Answer::Audit { broken_at, .. } => broken_at.is_none(),
        Answer::Reach(reach) => reach.same,
        Answer::Done { .. }
        | Answer::Networks(_)
        | Answer::Token { .. }
        | Answer::Policy { .. }
        | Answer::PolicySet { .. }
        | Answer::Nodes(_)
        | Answer::RelayKey { .. } => true,
    };
    if as_json {
        writeln!(out, "{}", document(answer))?;
        return Ok(good);
    }
    match answer {
        Answer::Done { message } => writeln!(out, "{message}")?,
        Answer::Networks(networks) => network_table(out, networks)?,
        Answer::Token { message, token } => writeln!(out, "{message}\n{token}")?,
        Answer::Policy { text: Some(text) } => out.write_all(text.as_bytes())?,
        Answer::Policy { text: None } => {
            writeln!(out, "// there is no policy: nobody may talk with anybody")?;
        }
        Answer::PolicySet { message, reach } => {
            let reach = reach.as_ref().map_or("", |reach| &reach.text);
            writeln!(out, "{}{message}", printable(reach))?;
        }
        Answer::Reach(reach) => write!(out, "{}", printable(&reach.text))?,
        Answer::Nodes(nodes) => node_table(out, nodes)?,
        Answer::RelayKey { network, key } => {
            writeln!(out, "[[network]]\nid = {network}\nkeys = [\"{key}\"]")?;
        }
        Answer::Audit { entries, broken_at } => audit_table(out, entries, *broken_at)?,
    }
    Ok(good)
}

/// Names may come from other machines: nothing in them commands the terminal.
fn printable(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}")
}

fn document(answer: &Answer) -> serde_json::Value {
    let mut value = match answer {
        Answer::Done { message } => json!({ "message": message }),
        Answer::Networks(networks) => json!({ "networks": networks }),
        Answer::Token { message, token } => json!({ "message": message, "token": token }),
        Answer::Policy { text } => json!({ "policy": text }),
        Answer::PolicySet { message, reach } => {
            let reach = reach.as_ref().map(|reach| &reach.document);
            json!({ "message": message, "diff": reach })
        }
        Answer::Reach(reach) => reach.document.clone(),
        Answer::Nodes(nodes) => json!({ "nodes": nodes }),
        Answer::RelayKey { network, key } => json!({ "network": network, "key": key }),
        Answer::Audit { entries, broken_at } => {
            json!({ "entries": entries, "whole": broken_at.is_none(), "broken_at": broken_at })
        }
    };
    if let Some(object) = value.as_object_mut() {
        object.insert("version".to_owned(), json!(JSON_VERSION));
    }
    value
}

fn network_table(out: &mut impl Write, networks: &[NetworkDocument]) -> io::Result<()> {
    if networks.is_empty() {
        return writeln!(
            out,
            "no networks; make one with `weir-coordinator network create NAME`"
        );
    }
    let row = |it: &NetworkDocument| {
        vec![
            it.name.clone(),
            it.v4.to_string(),
            it.v6.to_string(),
            it.generation.to_string(),
        ]
    };
    table(
        out,
        &["NAME", "V4", "V6", "GENERATION"],
        networks.iter().map(row).collect(),
    )
}

fn node_table(out: &mut impl Write, nodes: &[NodeDocument]) -> io::Result<()> {
    if nodes.is_empty() {
        return writeln!(
            out,
            "no nodes; `token create` makes a token, `weir up` joins with it"
        );
    }
    let row = |node: &NodeDocument| {
        let list = |items: Vec<String>| items.join(",");
        let state = if node.online {
            "online".to_owned()
        } else {
            node.last_seen.clone()
        };
        let waiting = node
            .routes_waiting
            .iter()
            .map(|route| format!("{route} (not approved)"));
        let routes = node.routes.iter().map(ToString::to_string).chain(waiting);
        vec![
            node.name.clone(),
            list(node.addrs.iter().map(ToString::to_string).collect()),
            node.owner.clone(),
            state,
            list(routes.collect()),
        ]
    };
    let head = ["NAME", "ADDRESSES", "OWNER", "LAST SEEN", "ROUTES"];
    table(out, &head, nodes.iter().map(row).collect())
}

fn audit_table(
    out: &mut impl Write,
    entries: &[AuditDocument],
    broken_at: Option<u64>,
) -> io::Result<()> {
    let row = |entry: &AuditDocument| {
        let number = entry.number.to_string();
        let (actor, action) = (entry.actor.clone(), entry.action.clone());
        vec![
            number,
            entry.at.clone(),
            actor,
            action,
            entry.subject.clone(),
        ]
    };
    let head = ["NUMBER", "TIME", "WHO", "WHAT", "TO"];
    table(out, &head, entries.iter().map(row).collect())?;
    match broken_at {
        None => writeln!(out, "the log is whole: every entry is as it was written"),
        Some(number) => {
            writeln!(
                out,
                "THE LOG WAS ALTERED: entry {number} is not as it was written"
            )
        }
    }
}

fn table(out: &mut impl Write, head: &[&str], rows: Vec<Vec<String>>) -> io::Result<()> {
    let head = head.iter().map(|&title| title.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    for row in &rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}
