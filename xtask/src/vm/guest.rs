//! The folder that a guest boots from: its init scripts, its command, its kernel log.
//!
//! The scripts are the files of `xtask/vm/`; what differs from guest to guest is in `vars.sh`
//! (assignments and the two or three actions that a backend does its own way), `rw.list` (one
//! folder a line) and `cmd.sh`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::{Job, Machine};
use crate::house;

const PREFIX: &str = "weir-vm-";

/// One guest's folder; removed, with all that is in it, when dropped.
pub struct Folder {
    pub path: PathBuf,
    // Held for the folder's life: a folder whose lock is free belongs to nobody.
    _lock: fs::File,
}

impl Folder {
    /// Makes the folder and writes what the guest boots from.
    pub fn make(job: &Job) -> anyhow::Result<Folder> {
        let temp = std::env::temp_dir();
        sweep(&temp);
        let path = temp.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&path)
            .with_context(|| format!("cannot make the guest's folder {}", path.display()))?;
        let lock = fs::File::create(path.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        let folder = Folder { path, _lock: lock };
        folder.write(job)?;
        Ok(folder)
    }

    pub fn kernel_log(&self) -> PathBuf {
        self.path.join("kernel.log")
    }

    /// What the command returned; nothing when the guest did not come so far.
    pub fn exit_code(&self) -> Option<u8> {
        fs::read_to_string(self.path.join("io/rc"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// How often the guest said that it lives.
    pub fn beats(&self) -> u64 {
        fs::metadata(self.path.join("io/beat")).map_or(0, |file| file.len())
    }

    fn write(&self, job: &Job) -> anyhow::Result<()> {
        fs::create_dir(self.path.join("io"))?;
        fs::write(self.path.join("io/rc"), "")?;
        fs::write(self.kernel_log(), "")?;
        let busybox = busybox()?.display().to_string();
        let own = match &job.machine {
            Machine::Uml { .. } => {
                let init = include_str!("../../vm/uml-init.sh").replace("@BUSYBOX@", &busybox);
                self.script("init", &init)?;
                include_str!("../../vm/uml-vars.sh")
            }
            Machine::Qemu { .. } => include_str!("../../vm/qemu-vars.sh"),
            Machine::Host => {
                self.script("host-init.sh", include_str!("../../vm/host-init.sh"))?;
                include_str!("../../vm/host-vars.sh")
            }
        };
        let vars = format!(
            "VM_HOST_BUSYBOX={}\nVM_WORK={}\nVM_TTY={}\n{own}",
            quote(&busybox),
            quote(&self.path.to_string_lossy()),
            quote(&tty_settings(job)),
        );
        fs::write(self.path.join("vars.sh"), vars)?;
        self.script("root.sh", include_str!("../../vm/root.sh"))?;
        self.script("run.sh", include_str!("../../vm/run.sh"))?;
        self.script("cmd.sh", &command_script(job))?;
        let rw: String = job
            .rw
            .iter()
            .map(|dir| format!("{}\n", dir.display()))
            .collect();
        fs::write(self.path.join("rw.list"), rw)?;
        Ok(())
    }

    fn script(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let file = self.path.join(name);
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed now is swept by the next guest.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes folders of guards that were killed before they could.
fn sweep(temp: &Path) {
    let Ok(entries) = fs::read_dir(temp) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(lock) = fs::File::open(entry.path().join("lock")) else {
            continue;
        };
        let free = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        if rustix::fs::flock(&lock, free).is_ok() {
            // Another user's folder stays; it is not ours to remove.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A busybox that needs no library: the guest runs it before it has a root file system.
pub fn busybox() -> anyhow::Result<PathBuf> {
    house::program("busybox").context("no busybox here: `cargo xtask setup` installs it")
}

fn command_script(job: &Job) -> String {
    let mut text = String::from("#!/run/vm/busybox sh\n");
    for (name, value) in &job.env {
        text.push_str(&format!("export {name}={}\n", quote(value)));
    }
    let command: Vec<String> = job.command.iter().map(|word| quote(word)).collect();
    // Through env and not the shell, which would prefer its own applets to the host's programs.
    text.push_str(&format!(
        "cd {} || exit 126\nexec /usr/bin/env -- {}\n",
        quote(&job.cwd.to_string_lossy()),
        command.join(" ")
    ));
    text
}

/// `stty` words for the guest's side of our terminal, empty without one.
fn tty_settings(job: &Job) -> String {
    let Some(tty) = &job.tty else {
        return String::new();
    };
    let size = fs::File::open(tty)
        .ok()
        .and_then(|tty| rustix::termios::tcgetwinsize(tty).ok());
    match size {
        Some(size) if size.ws_row > 0 => format!("sane rows {} cols {}", size.ws_row, size.ws_col),
        _ => "sane rows 24 cols 80".into(),
    }
}

/// A word for the shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn quoting_survives_a_shell() {
        for word in ["plain", "two words", "it's", "$HOME `id` \\ \"x\" ;&", ""] {
            let out = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quote(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&out.stdout), word);
        }
    }
}
