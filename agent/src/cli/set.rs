//! `weir set`.

use super::arguments::Set as Arguments;
use super::{Agent, Console, Failure, astray};
use crate::local::report::{GuardMode, Refuse};
use crate::local::{Request, Response, Set};
use serde::Serialize;
use std::time::Duration;

/// How long the agent may take to put settings in force.
const SET: Duration = Duration::from_secs(30);

pub(super) fn set(agent: &Agent, console: &Console, arguments: &Arguments) -> Result<(), Failure> {
    let set = Set {
        shields_up: arguments.shields_up,
        refuse: arguments.refuse,
        guard: arguments.guard,
        port_mapping: arguments.port_mapping,
    };
    let Response::Done(remarks) = agent.ask(Request::Set(set), SET)? else {
        return Err(astray());
    };
    if console.json {
        #[derive(Serialize)]
        struct Done {
            remarks: Vec<String>,
        }
        return console.document(Done { remarks });
    }
    let shields = set.shields_up.map(|up| {
        if up {
            "Shields are up: nothing that others begin is let in, whatever policy says. What others \
             had open here is cut, what this machine opens goes on."
        } else {
            "Shields are down: policy says who may begin what here."
        }
    });
    let refuse = set.refuse.map(|refuse| match refuse {
        Refuse::Answer => "Whoever sends from here what policy does not permit is told at once.",
        Refuse::Drop => "What policy does not permit to leave here is dropped without a word.",
    });
    let guard = set.guard.map(|guard| match guard {
        GuardMode::On => {
            "Floods to WireGuard's port are held off, in the driver of a network card that takes it."
        }
        GuardMode::Tc => "Floods to WireGuard's port are held off, and never in a driver.",
        GuardMode::Off => "WireGuard's port is not guarded: WireGuard itself sorts what it is sent.",
    });
    let port_mapping = set.port_mapping.map(|on| match on {
        true => "The router is asked to open WireGuard's port.",
        false => "No router is asked for a port. What one opened is given back.",
    });
    let said = shields.into_iter().chain(refuse).chain(guard);
    let said = said.chain(port_mapping);
    let said = said.map(str::to_owned);
    let lines: Vec<String> = said.chain(remarks).collect();
    console.say(&format!("{}\n", lines.join("\n")))
}
