//! What the agent is told once, at its start: folders, the socket, the device.
//!
//! Everything here is checked when it is parsed, so that the rest of the agent can take any value
//! that exists for a legal one.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where the state is kept if nobody says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/weir";
/// Where the agent listens if neither a socket nor another state folder was named.
pub const DEFAULT_SOCKET: &str = "/run/weir/weir.sock";
/// Name of the socket in a state folder that is not the default one.
pub const SOCKET_NAME: &str = "weir.sock";
/// The device's name if nobody says otherwise.
pub const DEFAULT_INTERFACE: &str = "weir0";
/// WireGuard's UDP port if nobody says otherwise.
pub const DEFAULT_LISTEN_PORT: u16 = 51820;
/// Each device has its folder in this one, on a bpffs that PID 1 sees.
pub const BPF_ROOT: &str = "/sys/fs/bpf/weir";
/// Longest name of a device, in bytes (`IFNAMSIZ` in the kernel's `if.h`, less its NUL).
pub const MAX_INTERFACE_BYTES: usize = 15;

/// The agent's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Identity, cache and settings live here.
    pub state_dir: PathBuf,
    /// Where the local API listens.
    pub socket: PathBuf,
    /// The WireGuard device.
    pub interface: InterfaceName,
    /// Its UDP port.
    pub listen_port: u16,
    /// Where programs and maps are pinned.
    pub bpf_dir: PathBuf,
}

impl Config {
    /// Settings for a state folder and a device; whatever is `None` gets its default.
    #[must_use]
    pub fn new(
        state_dir: PathBuf,
        socket: Option<PathBuf>,
        interface: InterfaceName,
        listen_port: u16,
        bpf_dir: Option<PathBuf>,
    ) -> Self {
        let socket = socket.unwrap_or_else(|| socket_of(&state_dir));
        let bpf_dir = bpf_dir.unwrap_or_else(|| Path::new(BPF_ROOT).join(interface.as_str()));
        Self {
            state_dir,
            socket,
            interface,
            listen_port,
            bpf_dir,
        }
    }
}

/// Where the agent with this state folder listens when it is not told: agent and command line both
/// ask here, so that naming the state folder is enough to find each other.
#[must_use]
pub fn socket_of(state_dir: &Path) -> PathBuf {
    if state_dir == Path::new(DEFAULT_STATE_DIR) {
        PathBuf::from(DEFAULT_SOCKET)
    } else {
        state_dir.join(SOCKET_NAME)
    }
}

/// A name that the kernel takes for a network device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InterfaceName(String);

/// A text is no name of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a network device's name has 1 to 15 characters, letters, digits, `-`, `_` and `.`, \
     and is neither `.` nor `..`"
)]
pub struct InterfaceNameError;

impl InterfaceName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = InterfaceNameError;

    // The kernel (`dev_valid_name` in net/core/dev.c) takes more than this, but nobody means it,
    // and the name also becomes a folder's.
    fn from_str(text: &str) -> Result<Self, InterfaceNameError> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let fits = (1..=MAX_INTERFACE_BYTES).contains(&text.len());
        if fits && text != "." && text != ".." && text.bytes().all(legal) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InterfaceNameError)
        }
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_what_the_kernel_takes() {
        for good in ["weir0", "a", "fifteen-bytes.x"] {
            assert_eq!(good.parse::<InterfaceName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", "sixteen-bytes.xx", "ä", "a:1"] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_state_folder_is_enough_to_find_the_socket() {
        let weir0: InterfaceName = "weir0".parse().unwrap();
        let config = |state: &str| Config::new(state.into(), None, weir0.clone(), 1, None);
        assert_eq!(
            config("/var/lib/weir").socket,
            Path::new("/run/weir/weir.sock")
        );
        assert_eq!(config("/srv/a").socket, Path::new("/srv/a/weir.sock"));
        assert_eq!(
            config("/srv/a").bpf_dir,
            Path::new("/sys/fs/bpf/weir/weir0")
        );
    }
}
