//! How the programs hang on the device: tcx from Linux 6.6, clsact before.
//!
//! *tcx*: each program has a link, pinned; replacing the program of a link is atomic. A link dies
//! with its device, and its pin then only says so. *clsact*: each program is a filter with a fixed
//! priority and handle in a qdisc that dies with the device; a filter is replaced in one message.

use super::{AclError, pins};
use aya::Ebpf;
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact,
    qdisc_detach_program,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, TcError};
use aya::util::KernelVersion;
use ebpf::abi::programs;
use std::fs;
use std::path::Path;

/// Priority of weir's filters: before others.
const PRIORITY: u16 = 1;
/// Handle of weir's filters ("weir").
const HANDLE: TcHandle = TcHandle::new(0x7765, 0x6972);

/// Where programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `BPF_TCX_INGRESS`, `BPF_TCX_EGRESS`; Linux 6.6 and later.
    Tcx,
    /// Filters in a clsact qdisc.
    Clsact,
}

impl Hook {
    /// The best one that this kernel has.
    #[must_use]
    pub fn of_this_kernel() -> Self {
        let tcx = KernelVersion::current().is_ok_and(|now| now >= KernelVersion::new(6, 6, 0));
        if tcx { Self::Tcx } else { Self::Clsact }
    }

    /// Its name, for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

type AttachError = Box<dyn std::error::Error + Send + Sync>;

/// Loads the programs of `object` and puts them on `interface`, in place of their predecessors.
pub(super) fn attach(
    object: &mut Ebpf,
    hook: Hook,
    interface: &str,
    dir: &Path,
) -> Result<(), AclError> {
    let failed = |source: AttachError| AclError::Attach {
        interface: interface.to_owned(),
        source,
    };
    // Both are loaded before either is attached.
    for (name, _) in PROGRAMS {
        program(object, name)?
            .load()
            .map_err(|error| failed(error.into()))?;
    }
    if hook == Hook::Clsact {
        add_clsact(interface).map_err(|error| failed(error.into()))?;
    }
    for (name, side) in PROGRAMS {
        let program = program(object, name)?;
        match hook {
            Hook::Tcx => tcx(program, interface, side, &dir.join(pins::link(name))),
            Hook::Clsact => clsact(program, interface, side),
        }
        .map_err(failed)?;
    }
    Ok(())
}

/// Takes weir's filters off, where there are any.
pub(super) fn detach_clsact(interface: &str) {
    for (name, side) in PROGRAMS {
        // No device, no qdisc, no filter: nothing to take off.
        let _ = qdisc_detach_program(interface, side, name);
    }
}

const PROGRAMS: [(&str, TcAttachType); 2] = [
    (programs::INGRESS, TcAttachType::Ingress),
    (programs::EGRESS, TcAttachType::Egress),
];

fn program<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, AclError> {
    let program = object.program_mut(name).ok_or(AclError::Incomplete(name))?;
    program.try_into().map_err(|_| AclError::Incomplete(name))
}

fn tcx(
    program: &mut SchedClassifier,
    interface: &str,
    side: TcAttachType,
    pin: &Path,
) -> Result<(), AttachError> {
    if replace(program, pin)? {
        return Ok(());
    }
    // First to see what comes in, last to see what goes out: what others rewrite is judged as it
    // goes on the wire.
    let order = match side {
        TcAttachType::Ingress => LinkOrder::first(),
        TcAttachType::Egress | TcAttachType::Custom(_) => LinkOrder::last(),
    };
    let options = TcAttachOptions::TcxOrder(order);
    let id = program.attach_with_options(interface, side, options)?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(pin)?;
    Ok(())
}

/// Replaces the program of a pinned link. `false`: there is no link, or its device is gone.
fn replace(program: &mut SchedClassifier, pin: &Path) -> Result<bool, AttachError> {
    let pinned = match PinnedLink::from_pin(pin) {
        Ok(pinned) => pinned,
        Err(LinkError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    let link: SchedClassifierLink = FdLink::from(pinned).try_into()?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // Dropped, the link lives on by its pin.
            program.take_link(id)?;
            Ok(true)
        }
        Err(ProgramError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOLINK) =>
        {
            fs::remove_file(pin)?;
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

fn clsact(
    program: &mut SchedClassifier,
    interface: &str,
    side: TcAttachType,
) -> Result<(), AttachError> {
    let options = NlOptions {
        priority: PRIORITY,
        handle: HANDLE,
        ..NlOptions::default()
    };
    let created = program.attach_with_options(interface, side, TcAttachOptions::Netlink(options));
    let id = match created {
        Ok(id) => id,
        Err(error) if is_exists(&error) => {
            let there = SchedClassifierLink::attached(interface, side, PRIORITY, HANDLE, None)?;
            program.attach_to_link(there)?
        }
        Err(error) => return Err(error.into()),
    };
    // Dropped, the link would take the filter with it; it is found again by priority and handle.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn add_clsact(interface: &str) -> Result<(), TcError> {
    match qdisc_add_clsact(interface) {
        Err(error) if !chain_has(&error, libc::EEXIST) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn is_exists(error: &ProgramError) -> bool {
    chain_has(error, libc::EEXIST)
}

/// Whether the kernel's answer, somewhere in the chain, is `errno`.
fn chain_has(error: &(dyn std::error::Error + 'static), errno: i32) -> bool {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| error.raw_os_error() == Some(errno))
}
