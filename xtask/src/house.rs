//! Where things are: the checkout, the results folder, the user's cache.

use std::path::{Path, PathBuf};

use anyhow::Context;

/// The root of the checkout that this xtask was built from.
pub fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// The folder that outlives a test run: logs, captures, numbers. Made when missing.
pub fn results() -> anyhow::Result<PathBuf> {
    let folder = match std::env::var_os("WEIR_RESULTS") {
        Some(given) => PathBuf::from(given),
        None => root().join("results"),
    };
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the results folder {}", folder.display()))?;
    Ok(folder.canonicalize()?)
}

/// The user's cache folder for kernels and the like, never anything that cannot be made again.
pub fn cache() -> anyhow::Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => match std::env::var_os("HOME").filter(|dir| !dir.is_empty()) {
            Some(home) => PathBuf::from(home).join(".cache"),
            None => anyhow::bail!("neither XDG_CACHE_HOME nor HOME is set: no place for a cache"),
        },
    };
    let folder = base.join("weir");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the cache folder {}", folder.display()))?;
    Ok(folder)
}

/// A program by name, in PATH or in the sbin folders that an ordinary user's PATH may lack.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| {
            rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file()
        })
}

/// How many processors we may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
