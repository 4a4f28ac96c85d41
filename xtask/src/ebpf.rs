//! `cargo xtask ebpf [--check]`: builds the eBPF programs into the committed objects.
//!
//! The agent embeds `ebpf/acl.bpf.o` and `ebpf/steer.bpf.o`, and the bench `ebpf/floor.bpf.o`, so
//! that a plain `cargo build` needs no BPF toolchain. This verb makes those files, and with `--check` makes them again elsewhere and
//! compares bit for bit: what is committed is what the source says. `ebpf/NAME.bpf.stamp` names the
//! source and the compiler that one was made from; [`needs_rebuild`] compares it with what is there
//! now.
//!
//! Bit for bit asks for one compiler. It is Debian's `rustc-web` with its prebuilt `core` for BPF,
//! unpacked (not installed) into the cache, and `bpf-linker`, built by cargo into the cache.
//! Paths of this machine are mapped away. A machine without `apt-get` cannot rebuild, and says so.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{build, house};

/// Release of the compiler; its packages carry it in their version.
const RUST: &str = "1.96.0";
/// The last bpf-linker that uses the LLVM of the compiler at hand.
const LINKER: &str = "0.10.4";
/// What is unpacked: compiler, its LLVM, its library, `core` for this machine and for BPF.
const PACKAGES: [&str; 5] = [
    "rustc-web",
    "libllvm22",
    "libstd-rust-web-1.96",
    "libstd-rust-web-dev",
    "libstd-rust-web-dev-bpf",
];
/// The objects, each of a binary of that name.
const OBJECTS: [&str; 3] = ["acl", "steer", "floor"];
const TARGET: &str = "bpfel-unknown-none";
/// Instructions of Linux 5.1 and later; headers are read by word, wherever they lie, which all
/// supported processors can.
const FLAGS: [&str; 5] = [
    "--cfg=bpf_target_arch=\"x86_64\"",
    "-Cdebuginfo=2",
    "-Ctarget-cpu=v3",
    "-Clink-arg=--btf",
    "-Clink-arg=--cpu-features=+allows-misaligned-mem-access",
];

/// Builds the objects, or with `check` builds them elsewhere and compares with the committed ones.
pub fn run(check: bool) -> anyhow::Result<()> {
    if let Some(reason) = cannot_rebuild() {
        bail!("this machine cannot rebuild the eBPF objects: {reason}");
    }
    let toolchain = Toolchain::ready()?;
    let folder = if check { "bpf-check" } else { "bpf-target" };
    let target = house::cache()?.join(folder);
    if check {
        // From nothing, so that nothing of an earlier build can hide a difference.
        let _ = fs::remove_dir_all(&target);
    }
    toolchain.build(&target)?;
    for name in OBJECTS {
        let linked = target.join(TARGET).join("release").join(name);
        let built = target.join(format!("{name}.bpf.o"));
        strip(&linked, &built)?;
        if check {
            compare(name, &built)?;
            println!("ebpf/{name}.bpf.o is bit for bit what its source builds to");
        } else {
            let object = object(name);
            fs::copy(&built, &object)?;
            fs::write(stamp_file(name), stamp()?)?;
            println!("ebpf/{name}.bpf.o: {} bytes", fs::metadata(&object)?.len());
        }
    }
    Ok(())
}

/// Fails if the committed object is another than the one just built.
fn compare(name: &str, built: &Path) -> anyhow::Result<()> {
    let object = object(name);
    let committed =
        fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    let rebuilt = fs::read(built)?;
    ensure!(
        committed == rebuilt,
        "ebpf/{name}.bpf.o is not what its source builds to ({} bytes committed, {} rebuilt): run \
         `cargo xtask ebpf` and commit the result",
        committed.len(),
        rebuilt.len()
    );
    ensure!(
        is_stamped(name)?,
        "ebpf/{name}.bpf.stamp does not name this source: run `cargo xtask ebpf` and commit it"
    );
    Ok(())
}

/// Whether a committed object was made from other sources or by another compiler.
pub fn needs_rebuild() -> anyhow::Result<bool> {
    for name in OBJECTS {
        if !is_stamped(name)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_stamped(name: &str) -> anyhow::Result<bool> {
    Ok(fs::read_to_string(stamp_file(name)).unwrap_or_default() == stamp()?)
}

/// Why this machine cannot rebuild the objects, if so.
pub fn cannot_rebuild() -> Option<String> {
    if cfg!(not(target_arch = "x86_64")) {
        return Some("the committed objects are built on x86-64".to_owned());
    }
    let ready = house::cache().is_ok_and(|cache| Toolchain::in_cache(&cache).is_some());
    if ready {
        return None;
    }
    for program in ["apt-get", "apt-cache", "dpkg-deb"] {
        if house::program(program).is_none() {
            return Some(format!(
                "the compiler comes from Debian packages, and there is no {program} here"
            ));
        }
    }
    match package_version("rustc-web") {
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    }
}

fn object(name: &str) -> PathBuf {
    house::root().join(format!("ebpf/{name}.bpf.o"))
}

fn stamp_file(name: &str) -> PathBuf {
    house::root().join(format!("ebpf/{name}.bpf.stamp"))
}

/// Compiler, flags, linker, and a hash over everything that the objects are built from: they share
/// one library.
fn stamp() -> anyhow::Result<String> {
    let root = house::root();
    let mut files = vec![root.join("ebpf/Cargo.toml")];
    collect(&root.join("ebpf/src"), &mut files)?;
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let name = file.strip_prefix(root)?.to_string_lossy().into_owned();
        let content = fs::read(&file)?;
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    let mut text = format!(
        "rustc {RUST} {}\nbpf-linker {LINKER}\nsource ",
        FLAGS.join(" ")
    );
    for byte in hash.finalize() {
        let _ = write!(text, "{byte:02x}");
    }
    text.push('\n');
    Ok(text)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

struct Toolchain {
    /// Holds `usr`.
    compiler: PathBuf,
    linker: PathBuf,
}

impl Toolchain {
    /// The toolchain, fetched and built where it is not in the cache yet.
    fn ready() -> anyhow::Result<Self> {
        let cache = house::cache()?;
        if let Some(found) = Self::in_cache(&cache) {
            return Ok(found);
        }
        let places = Self::places(&cache);
        if !places.compiler.join("usr/bin/rustc").exists() {
            unpack_compiler(&cache, &places.compiler)?;
        }
        if !places.linker.exists() {
            build_linker(&cache)?;
        }
        Ok(places)
    }

    fn places(cache: &Path) -> Self {
        Self {
            compiler: cache.join(format!("bpf-rustc-{RUST}")),
            linker: linker_folder(cache).join("bin/bpf-linker"),
        }
    }

    fn in_cache(cache: &Path) -> Option<Self> {
        let places = Self::places(cache);
        (places.compiler.join("usr/bin/rustc").exists() && places.linker.exists()).then_some(places)
    }

    fn libraries(&self) -> PathBuf {
        self.compiler.join("usr/lib/x86_64-linux-gnu")
    }

    /// Builds the programs.
    fn build(&self, target: &Path) -> anyhow::Result<()> {
        let registry = home_of_cargo()?.join("registry/src");
        let mut flags = FLAGS.map(str::to_owned).to_vec();
        flags.extend([
            format!("-Clinker={}", self.linker.display()),
            format!("--remap-path-prefix={}=/weir", house::root().display()),
            format!("--remap-path-prefix={}=/registry", registry.display()),
            format!("--remap-path-prefix={}=/cache", self.compiler.display()),
        ]);
        let mut cargo = build::cargo();
        cargo
            .args(["build", "--quiet", "--locked", "--release", "-p", "ebpf"])
            .args(OBJECTS.into_iter().flat_map(|name| ["--bin", name]))
            .args(["--features", "programs", "--target", TARGET])
            .arg("--target-dir")
            .arg(target)
            .env("RUSTC", self.compiler.join("usr/bin/rustc"))
            .env("RUSTC_BOOTSTRAP", "1")
            .env("LD_LIBRARY_PATH", self.libraries())
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("CARGO_INCREMENTAL", "0")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("CARGO_BUILD_RUSTC_WRAPPER")
            .env_remove("RUSTFLAGS");
        for (name, value) in [
            ("PANIC", "abort"),
            ("LTO", "true"),
            ("CODEGEN_UNITS", "1"),
            ("OPT_LEVEL", "3"),
            ("DEBUG", "2"),
            ("STRIP", "none"),
        ] {
            cargo.env(format!("CARGO_PROFILE_RELEASE_{name}"), value);
        }
        run_command(&mut cargo, "build the programs")
    }
}

fn linker_folder(cache: &Path) -> PathBuf {
    cache.join(format!("bpf-linker-{LINKER}"))
}

fn home_of_cargo() -> anyhow::Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        return Ok(PathBuf::from(home));
    }
    let home = std::env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cargo"))
}

/// The newest version of a package that belongs to our release of Rust (or of LLVM).
fn package_version(package: &str) -> anyhow::Result<String> {
    let wanted = if package.starts_with("libllvm") {
        "22."
    } else {
        RUST
    };
    let output = Command::new("apt-cache")
        .args(["madison", package])
        .output();
    let text = String::from_utf8(output.context("cannot run apt-cache")?.stdout)?;
    let mut versions = text.lines().filter_map(|line| line.split('|').nth(1));
    let found = versions
        .find(|version| version.contains(wanted))
        .map(str::trim);
    found.map(str::to_owned).with_context(|| {
        format!(
            "apt-get knows no {package} {wanted}: it is in Debian 12's security archive (after \
             `apt-get update`)"
        )
    })
}

fn unpack_compiler(cache: &Path, to: &Path) -> anyhow::Result<()> {
    let folder = cache.join("bpf-rustc-download");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(folder.join("root"))?;
    println!(
        "fetching the BPF compiler: {} (about 120 MB)",
        PACKAGES.join(", ")
    );
    let mut wanted = Vec::new();
    for package in PACKAGES {
        wanted.push(format!("{package}={}", package_version(package)?));
    }
    let mut download = Command::new("apt-get");
    download
        .args(["-qq", "download"])
        .args(&wanted)
        .current_dir(&folder);
    run_command(&mut download, "fetch the BPF compiler")?;
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("-x").arg(&path).arg(folder.join("root"));
            run_command(&mut unpack, "unpack the BPF compiler")?;
        }
    }
    let _ = fs::remove_dir_all(to);
    fs::rename(folder.join("root"), to)?;
    fs::remove_dir_all(&folder)?;
    Ok(())
}

fn build_linker(cache: &Path) -> anyhow::Result<()> {
    println!("building bpf-linker {LINKER} (about three minutes, once)");
    let mut install = build::cargo();
    install
        .args([
            "install",
            "--quiet",
            "bpf-linker",
            "--version",
            LINKER,
            "--locked",
            "--root",
        ])
        .arg(linker_folder(cache));
    run_command(&mut install, "build bpf-linker")
}

/// Removes what only a debugger reads; BTF stays. By the objcopy that comes with the compiler that builds xtask, or by an
/// LLVM of the machine; all of them write the same bytes.
fn strip(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut command = match sysroot_objcopy() {
        Some((objcopy, libraries)) => {
            let mut command = Command::new(objcopy);
            command.env("LD_LIBRARY_PATH", libraries);
            command
        }
        None => Command::new(
            house::program("llvm-objcopy").context("no rust-objcopy or llvm-objcopy here")?,
        ),
    };
    command.arg("--strip-debug").arg(from).arg(to);
    run_command(&mut command, "strip the object")
}

fn sysroot_objcopy() -> Option<(PathBuf, PathBuf)> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--print", "sysroot"])
        .output()
        .ok()?;
    let sysroot = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    let objcopy = sysroot.join("lib/rustlib/x86_64-unknown-linux-gnu/bin/rust-objcopy");
    objcopy.exists().then(|| (objcopy, sysroot.join("lib")))
}

fn run_command(command: &mut Command, what: &str) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot {what}"))?;
    ensure!(status.success(), "cannot {what}: {status}");
    Ok(())
}
