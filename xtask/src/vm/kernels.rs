//! Stock Debian kernels for QEMU: fetched as packages, unpacked into the cache, never installed;
//! and the initramfs that carries their modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::guest;
use crate::{house, setup};

/// The lines of kernels that are tested. The first is the default.
pub const VERSIONS: [&str; 2] = ["6.12", "6.1"];

/// Loaded before the root file system is there. 6.1 has virtio as modules.
const BOOT_MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
];

/// Packed for loading on demand; their dependencies come with them. `crc32c_generic` is asked
/// for by nf_tables at run time and named by no dependency.
const MODULES: &str = "wireguard veth tun dummy ifb bridge vrf macvlan ipvlan vxlan 8021q sctp \
    nf_tables nf_conntrack nf_nat nf_conntrack_netlink nft_chain_nat nft_ct nft_nat nft_masq \
    nft_redir nft_reject nft_reject_inet nft_reject_ipv4 nft_reject_ipv6 nft_limit nft_log \
    nft_hash nft_fib nft_fib_inet nft_fib_ipv4 nft_fib_ipv6 nft_socket nft_tproxy nft_quota \
    nft_queue nft_compat nft_numgen nf_log_syslog nfnetlink_log nfnetlink_queue \
    sch_ingress sch_netem sch_tbf sch_htb sch_fq sch_fq_codel sch_prio cls_bpf cls_flower \
    cls_u32 cls_matchall act_bpf act_gact act_mirred \
    inet_diag tcp_diag udp_diag netlink_diag unix_diag af_packet_diag \
    crc32c_generic crc32c_intel chacha20poly1305 chacha_x86_64 poly1305_x86_64 \
    curve25519_x86_64 libchacha20poly1305";

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    pub image: PathBuf,
    modules: PathBuf,
}

/// The newest packaged kernel of a line (`6.12`), from the cache or fetched into it.
pub fn stock(line: &str) -> anyhow::Result<Kernel> {
    anyhow::ensure!(
        VERSIONS.contains(&line),
        "--kernel {line}: the kernels known here are {}",
        VERSIONS.join(" and ")
    );
    let store = house::cache()?.join("kernels");
    fs::create_dir_all(&store)?;
    if let Some(kernel) = cached(&store, line)? {
        return Ok(kernel);
    }
    fetch(&store, line)?;
    cached(&store, line)?.context("the kernel package holds no kernel")
}

fn cached(store: &Path, line: &str) -> anyhow::Result<Option<Kernel>> {
    let Ok(entries) = fs::read_dir(store) else {
        return Ok(None);
    };
    let prefix = format!("linux-image-{line}.");
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(&prefix))
        })
        .collect();
    found.sort_by_key(|path| numbers(&path.to_string_lossy()));
    let Some(package) = found.pop() else {
        return Ok(None);
    };
    let name = package
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let release = name.trim_start_matches("linux-image-").to_owned();
    let kernel = Kernel {
        image: package.join("boot").join(format!("vmlinuz-{release}")),
        modules: ["lib/modules", "usr/lib/modules"]
            .map(|folder| package.join(folder).join(&release))
            .into_iter()
            .find(|folder| folder.is_dir())
            .unwrap_or_default(),
        release,
    };
    Ok((kernel.image.is_file() && kernel.modules.is_dir()).then_some(kernel))
}

fn fetch(store: &Path, line: &str) -> anyhow::Result<()> {
    let package = newest_package(line)?;
    eprintln!("xtask vm: fetching {package} (unpacked into the cache, not installed)");
    let work = store.join(format!(".fetch-{}", std::process::id()));
    fs::create_dir_all(&work)?;
    let fetched = Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(&work)
        .stdout(Stdio::null())
        .status()
        .context("cannot run apt-get")?;
    let file = fs::read_dir(&work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let unpacked = work.join("unpacked");
    let done = fetched.success()
        && file.is_some_and(|file| {
            let status = Command::new("dpkg-deb")
                .arg("-x")
                .arg(file)
                .arg(&unpacked)
                .status();
            status.is_ok_and(|status| status.success())
        });
    if done {
        // A second xtask may have been faster; its copy is as good.
        let _ = fs::rename(&unpacked, store.join(&package));
    }
    fs::remove_dir_all(&work)?;
    anyhow::ensure!(
        done,
        "apt-get could not download {package}; is the network there?"
    );
    Ok(())
}

/// The newest signed generic kernel of a line that apt knows. Cloud kernels lack 9p.
fn newest_package(line: &str) -> anyhow::Result<String> {
    if let Some(package) = known_package(line)? {
        return Ok(package);
    }
    // A fresh machine has no package lists at all.
    setup::refresh_lists();
    known_package(line)?.with_context(|| {
        format!("apt knows no stock kernel {line} here (Debian 12 with bookworm-security has both)")
    })
}

fn known_package(line: &str) -> anyhow::Result<Option<String>> {
    let pattern = format!("^linux-image-{}\\..*-amd64$", line.replace('.', "\\."));
    let found = Command::new("apt-cache")
        .args(["search", "--names-only", &pattern])
        .output()
        .context("stock kernels come as Debian packages, and there is no apt-cache here")?;
    let text = String::from_utf8_lossy(&found.stdout);
    let names = text
        .lines()
        .filter_map(|found| found.split_whitespace().next());
    Ok(newest(names))
}

fn newest<'a>(packages: impl Iterator<Item = &'a str>) -> Option<String> {
    packages
        .filter(|name| {
            !["-cloud-", "-rt-", "-unsigned", "-dbg"]
                .iter()
                .any(|x| name.contains(x))
        })
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

/// The numbers in a version, for comparing as people do: 6.12.9 before 6.12.10.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// An initramfs with the modules, a busybox and the first init; cached.
pub fn initramfs(kernel: &Kernel) -> anyhow::Result<PathBuf> {
    let init = include_str!("../../vm/qemu-init.sh");
    let busybox = fs::read(guest::busybox()?)?;
    let mut hash = Sha256::new();
    for part in [
        init.as_bytes(),
        MODULES.as_bytes(),
        &busybox,
        kernel.release.as_bytes(),
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let key: String = hash
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let cache = house::cache()?;
    let file = cache.join(format!("initramfs-{}-{key}.cpio", kernel.release));
    if file.is_file() {
        return Ok(file);
    }
    eprintln!("xtask vm: packing the modules of {}", kernel.release);
    let tree = cache.join(format!(".initramfs-{}", std::process::id()));
    let packed = module_tree(kernel, &tree).and_then(|boot| {
        let mut archive = Archive::default();
        for folder in ["bin", "proc", "sys", "dev", "lower", "stage", "tmp", "lib"] {
            archive.folder(folder);
        }
        archive.file("bin/busybox", 0o755, &busybox);
        archive.file("init", 0o755, init.as_bytes());
        archive.file("boot-modules", 0o644, boot.concat().as_bytes());
        archive.tree(&tree, "")?;
        Ok(archive.finish())
    });
    // Made anew when it is needed again.
    let _ = fs::remove_dir_all(&tree);
    let temporary = cache.join(format!(".initramfs-{}.cpio", std::process::id()));
    fs::write(&temporary, packed?)?;
    fs::rename(&temporary, &file)?;
    Ok(file)
}

/// Writes the modules and their index below `tree`; returns what to load at boot, in order.
fn module_tree(kernel: &Kernel, tree: &Path) -> anyhow::Result<Vec<String>> {
    let mut files = BTreeMap::new();
    find_modules(&kernel.modules, &mut files)?;
    let folder = tree.join("lib/modules").join(&kernel.release);
    fs::create_dir_all(&folder)?;
    let mut closure = Closure {
        files: &files,
        order: Vec::new(),
        seen: BTreeSet::new(),
    };
    for name in BOOT_MODULES {
        closure.visit(name)?;
    }
    let boot = closure.order.len();
    for name in MODULES.split_whitespace() {
        closure.visit(name)?;
    }
    let mut names = Vec::new();
    for (name, bytes) in &closure.order {
        fs::write(folder.join(format!("{name}.ko")), bytes)?;
        names.push(format!("/lib/modules/{}/{name}.ko\n", kernel.release));
    }
    for index in [
        "modules.order",
        "modules.builtin",
        "modules.builtin.modinfo",
    ] {
        if kernel.modules.join(index).is_file() {
            fs::copy(kernel.modules.join(index), folder.join(index))?;
        }
    }
    let status = Command::new(guest::busybox()?)
        .args(["depmod", "-b"])
        .arg(tree)
        .arg(&kernel.release)
        .status()?;
    anyhow::ensure!(status.success(), "busybox depmod failed");
    names.truncate(boot);
    Ok(names)
}

fn find_modules(folder: &Path, into: &mut BTreeMap<String, PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            find_modules(&path, into)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            into.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Modules with all that they depend on, dependencies first. A name without a file is built in.
struct Closure<'a> {
    files: &'a BTreeMap<String, PathBuf>,
    order: Vec<(String, Vec<u8>)>,
    seen: BTreeSet<String>,
}

impl Closure<'_> {
    fn visit(&mut self, name: &str) -> anyhow::Result<()> {
        let name = name.replace('-', "_");
        let Some(path) = self.files.get(&name) else {
            return Ok(());
        };
        if !self.seen.insert(name.clone()) {
            return Ok(());
        }
        let bytes = module_bytes(path)?;
        for dependency in depends(&bytes) {
            self.visit(&dependency)?;
        }
        self.order.push((name, bytes));
        Ok(())
    }
}

fn module_bytes(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "ko") {
        return Ok(fs::read(path)?);
    }
    let unpacked = Command::new("xz")
        .arg("-dc")
        .arg(path)
        .output()
        .context("cannot run xz")?;
    anyhow::ensure!(
        unpacked.status.success(),
        "xz cannot unpack {}",
        path.display()
    );
    Ok(unpacked.stdout)
}

/// The `depends=` entry of a module's modinfo section.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = &module[at + key.len()..];
    let end = value
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(value.len());
    let text = String::from_utf8_lossy(&value[..end]);
    text.split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A cpio archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/
/// buffer-format.rst): a header of hexadecimal fields, the name, the bytes, each padded to four.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | mode, content);
    }

    fn tree(&mut self, folder: &Path, prefix: &str) -> anyhow::Result<()> {
        let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                self.folder(&name);
                self.tree(&entry.path(), &format!("{name}/"))?;
            } else {
                let mode = entry.metadata()?.permissions().mode() & 0o777;
                self.file(&name, mode, &fs::read(entry.path())?);
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let (links, size, name_size) = (1, content.len(), name.len() + 1);
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}\
             {:08x}{name_size:08x}{:08x}{name}\0",
            self.inode, 0, 0, 0, 0, 0, 0, 0, 0
        );
        self.append(header.as_bytes());
        self.append(content);
    }

    fn append(&mut self, part: &[u8]) {
        self.bytes.extend_from_slice(part);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        // Writing to a vector cannot fail.
        let _ = self.bytes.flush();
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_generic_kernel_is_taken() {
        let names = [
            "linux-image-6.12.9+deb12-amd64",
            "linux-image-6.12.10+deb12-amd64",
            "linux-image-6.12.11+deb12-cloud-amd64",
            "linux-image-6.12.12+deb12-amd64-unsigned",
            "linux-image-6.12.13+deb12-rt-amd64",
        ];
        assert_eq!(
            newest(names.into_iter()).as_deref(),
            Some("linux-image-6.12.10+deb12-amd64")
        );
        assert_eq!(newest([].into_iter()), None);
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"..\0license=GPL\0depends=udp_tunnel,ip6_udp_tunnel\0name=wireguard\0";
        assert_eq!(depends(module), ["udp_tunnel", "ip6_udp_tunnel"]);
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"").is_empty());
    }

    #[test]
    fn the_archive_is_what_busybox_reads() {
        let mut archive = Archive::default();
        archive.folder("a");
        archive.file("a/b.txt", 0o644, b"five!");
        archive.file("c", 0o755, b"");
        let Ok(busybox) = guest::busybox() else {
            return;
        };
        let mut cpio = Command::new(busybox)
            .args(["cpio", "-t"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        cpio.stdin
            .take()
            .unwrap()
            .write_all(&archive.finish())
            .unwrap();
        let listed = cpio.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&listed.stdout), "a\na/b.txt\nc\n");
    }
}
