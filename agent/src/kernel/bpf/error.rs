//! Why programs cannot be attached, or their maps not written.

use engine::status::FailureKind;
use std::io;
use std::path::PathBuf;

/// The programs cannot be attached, or their maps not written.
#[derive(Debug, thiserror::Error)]
pub enum AclError {
    /// The folder for pins is on another kind of file system.
    #[error(
        "{path} is not on a bpffs: mount one with `mount -t bpf bpf /sys/fs/bpf` (systemd does so \
         by itself), or give --bpf-dir a folder on one"
    )]
    NoBpffs {
        /// The folder.
        path: PathBuf,
    },
    /// PID 1 does not see the bpffs.
    #[error(
        "{path} is on a bpffs that PID 1 does not see: it would vanish with this process, and the \
         protection with it. Bind-mount the host's /sys/fs/bpf there, or start the agent in the \
         host's mount namespace"
    )]
    PrivateBpffs {
        /// The folder.
        path: PathBuf,
    },
    /// The kernel refused a program; the text is the end of the verifier's log.
    #[error("the kernel refused the programs: {0}")]
    Load(String),
    /// The kernel did not attach a program.
    #[error("cannot attach the programs to {interface}: {text}")]
    Attach {
        /// The device.
        interface: String,
        /// What the kernel said.
        text: String,
    },
    /// The object does not hold what this agent expects.
    #[error("the embedded object has no {0}")]
    Object(&'static str),
    /// A map operation failed.
    #[error("{what} {map}")]
    Map {
        /// What was done.
        what: &'static str,
        /// To which map.
        map: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A pin or its folder.
    #[error("{path}")]
    Pin {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl AclError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Map { source, .. } | Self::Pin { source, .. } => match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => FailureKind::Permission,
                Some(libc::E2BIG | libc::ENOMEM | libc::ENOSPC) => FailureKind::TooLarge,
                _ => FailureKind::Programs,
            },
            Self::NoBpffs { .. }
            | Self::PrivateBpffs { .. }
            | Self::Load(_)
            | Self::Attach { .. }
            | Self::Object(_) => FailureKind::Programs,
        }
    }
}
