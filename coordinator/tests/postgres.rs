//! A Postgres server of a test's own: made in a temporary folder, reached by a unix socket, gone
//! with the test.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Postgres refuses to run as root; this is `nobody` everywhere.
const NOBODY: u32 = 65_534;
const USER: &str = "weir";
const START_TIMEOUT: Duration = Duration::from_secs(60);

pub struct Postgres {
    dir: TempDir,
    bin: PathBuf,
    child: Option<Child>,
    /// Where it speaks TLS, if it does.
    tls_port: Option<u16>,
}

impl Postgres {
    /// A running server with an empty database; `None`, and a line in the list of skipped tests,
    /// if this machine has no Postgres.
    pub fn start(test: &str) -> Option<Self> {
        let mut this = Self::made(test)?;
        this.resume();
        Some(this)
    }

    /// As [`Self::start`], and it speaks TLS on a port, with a certificate for `localhost`.
    pub fn start_with_tls(test: &str) -> Option<Self> {
        let mut this = Self::made(test)?;
        let pair = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        let certificate = params.self_signed(&pair).unwrap();
        fs::write(this.certificate(), certificate.pem()).unwrap();
        let key = this.dir.path().join("key.pem");
        fs::write(&key, pair.serialize_pem()).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        if is_root() {
            chown(&key, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        this.tls_port = Some(free.local_addr().unwrap().port());
        drop(free);
        this.resume();
        Some(this)
    }

    fn made(test: &str) -> Option<Self> {
        let Some(bin) = find() else {
            skip(
                test,
                "no Postgres server (initdb, postgres) on this machine",
            );
            return None;
        };
        let dir = tempfile::Builder::new()
            .prefix("weir-postgres-")
            .tempdir()
            .unwrap();
        if is_root() {
            chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let this = Self {
            dir,
            bin,
            child: None,
            tls_port: None,
        };
        let made = this
            .command("initdb")
            .args([
                "--auth=trust",
                "--no-sync",
                "--encoding=UTF8",
                "--locale=C",
                "-U",
                USER,
                "-D",
            ])
            .arg(this.data())
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        Some(this)
    }

    fn certificate(&self) -> PathBuf {
        self.dir.path().join("certificate.pem")
    }

    /// What `--database` takes to reach it over TLS and nothing else.
    pub fn tls_url(&self) -> String {
        let (port, root) = (self.tls_port.unwrap(), self.certificate());
        let root = root.display();
        format!(
            "postgres://{USER}@localhost:{port}/postgres?sslmode=verify-full&sslrootcert={root}"
        )
    }

    /// What `--database` takes.
    pub fn url(&self) -> String {
        format!(
            "postgres://{USER}@localhost/postgres?host={}",
            self.dir.path().display()
        )
    }

    /// Starts the server (again), and waits until it takes connections.
    pub fn resume(&mut self) {
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        let mut command = self.command("postgres");
        command
            .arg("-D")
            .arg(self.data())
            .arg("-k")
            .arg(self.dir.path());
        let mut settings = vec!["fsync=off".to_owned(), "max_connections=200".to_owned()];
        match self.tls_port {
            None => settings.push("listen_addresses=".to_owned()),
            Some(port) => {
                let path = |name: &str| self.dir.path().join(name).display().to_string();
                settings.push("listen_addresses=127.0.0.1".to_owned());
                settings.push(format!("port={port}"));
                settings.push("ssl=on".to_owned());
                settings.push(format!("ssl_cert_file={}", path("certificate.pem")));
                settings.push(format!("ssl_key_file={}", path("key.pem")));
            }
        }
        for setting in settings {
            command.arg("-c").arg(setting);
        }
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.child = Some(child);
        let start = Instant::now();
        while !self.answers() {
            assert!(
                start.elapsed() < START_TIMEOUT,
                "Postgres starts: {}",
                self.log()
            );
            std::thread::yield_now();
        }
    }

    /// Kills the server at once: no goodbye to its clients.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = i32::try_from(child.id())
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            // SIGQUIT is Postgres' immediate shutdown; it takes its worker processes with it.
            let _ = rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::QUIT);
            child.wait().unwrap();
        }
    }

    fn answers(&self) -> bool {
        let ready = self.log().contains("ready to accept connections");
        ready
            && UnixStream::connect(
                self.dir
                    .path()
                    .join(format!(".s.PGSQL.{}", self.tls_port.unwrap_or(5432))),
            )
            .is_ok()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A command of Postgres, without root's rights, that ends with this thread.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new("setpriv");
        command
            .arg("--pdeathsig=QUIT")
            .current_dir(self.dir.path())
            .env("LC_ALL", "C");
        if is_root() {
            let (uid, gid) = (format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"));
            command.arg(uid).arg(gid).arg("--clear-groups");
        }
        command.arg(self.bin.join(name));
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill();
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The folder of `initdb` and `postgres`.
fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let debian = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    std::env::split_paths(&path)
        .chain(debian.map(|entry| entry.path().join("bin")))
        .find(|dir| {
            ["initdb", "postgres"]
                .iter()
                .all(|name| is_file(&dir.join(name)))
        })
}

fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file())
}

/// Lists a test that cannot run here, with its reason.
pub fn skip(test: &str, reason: &str) {
    eprintln!("skipped {test}: {reason}");
    if let Some(list) = std::env::var_os("WEIR_SKIPS") {
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(list)
            .unwrap();
        writeln!(file, "coordinator/{test}\t{reason}").unwrap();
    }
}
