//! Finds `libnixl_capi.so`, checks it, and opens it in such a way that `nixl-sys` gets this very copy.
//!
//! `nixl-sys` opens the bare name `libnixl_capi.so` at its first call and aborts the process when that fails or a
//! function is missing. The dynamic linker answers a bare name with a library that is already loaded under that
//! `DT_SONAME`, whatever its path and whether it was opened locally or globally. So the library is searched, opened by
//! its full path (locally: nothing of NIXL's dependencies leaks into the global symbol table of the host process),
//! every function that can be reached is looked up, and at last the bare name is asked for without loading and must
//! answer with the same library. Only then is anything of `nixl-sys` called. Everything that fails on the way is an
//! ordinary error that names what was searched.

use super::symbols;
use crate::cache::{self, variable};
use crate::config::NixlConfig;
use crate::{Error, Result};
use kvxfer_proto::ErrorCode;
use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// File name and `DT_SONAME`.
const NAME: &str = "libnixl_capi.so";
/// Said at the end of every error.
const REMEDY: &str = "install it with `pip install nixl-cu13` (or nixl-cu12) or scripts/install-nixl.sh, or name the file in \
                      KVXFER_NIXL_LIBRARY (configuration: nixl.library)";

/// The library, loaded for the rest of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// Its file.
    pub path: PathBuf,
    /// Version of the Python wheel it came from, where that can be told: the library itself does not say.
    pub version: Option<String>,
    /// Folder its plug-ins are taken from.
    pub plugin_dir: Option<PathBuf>,
}

/// Finds and loads the library; later calls answer with the same one.
///
/// A library once loaded stays: NIXL and UCX keep threads and state of the process. A later configuration that names
/// another file is an error. `NIXL_PLUGIN_DIR` is set here, before NIXL can read it, only when it is unset and the
/// plug-ins are not where NIXL looks by itself (`plugins` beside the library): changing the environment is not safe
/// beside another thread that reads it in C, so a program that needs another folder better sets the variable itself
/// before it starts threads.
pub fn load(config: &NixlConfig) -> Result<Library> {
    static LOADED: Mutex<Option<Library>> = Mutex::new(None);
    let mut loaded = LOADED.lock();
    if let Some(library) = &*loaded {
        return match &config.library {
            Some(wanted) if !same_file(wanted, &library.path) => Err(Error::failed(
                ErrorCode::NotAvailable,
                format!(
                    "NIXL not available: {} is configured but this process has loaded {} already; name that one or none",
                    wanted.display(),
                    library.path.display()
                ),
            )),
            _ => Ok(library.clone()),
        };
    }
    let library = search(config)?;
    set_plugin_dir(&library);
    tracing::debug!(path = %library.path.display(), version = library.version.as_deref(), "NIXL loaded");
    *loaded = Some(library.clone());
    Ok(library)
}

/// The functions a library must have to be used.
pub fn required_functions() -> impl Iterator<Item = &'static str> {
    symbols::USED.iter().copied()
}

/// Says whether NIXL seems to be there without loading it: looks for the file in the places that cost nothing to look
/// at (not in the system's library folders, and `python3` is not asked).
pub fn glance(config: &NixlConfig) -> Result<PathBuf> {
    if let Some(path) = &config.library {
        if path.is_file() {
            return Ok(path.clone());
        }
        return Err(not_available(&format!("the configured library {} does not exist", path.display())));
    }
    let mut searched = Vec::new();
    for place in places() {
        if place.costs {
            continue;
        }
        let (name, files) = (place.look)();
        if let Some(file) = files.into_iter().next() {
            return Ok(file);
        }
        searched.push(name);
    }
    Err(not_available(&format!(
        "{NAME} was not found; searched: {} (python3 and the system's library folders are asked only when nixl is asked \
         for: KVXFER_TRANSPORTS or nixl.same_host)",
        searched.join("; ")
    )))
}

fn search(config: &NixlConfig) -> Result<Library> {
    if let Some(path) = &config.library {
        // A configured file is used or refused, never replaced by another one.
        return open(path).map(|path| describe(path, config)).map_err(|why| {
            not_available(&format!("the configured library {} cannot be used: {why}", path.display()))
        });
    }
    let mut searched = Vec::new();
    for place in places() {
        let (name, files) = (place.look)();
        if files.is_empty() {
            searched.push(name);
            continue;
        }
        for file in files {
            match open(&file) {
                Ok(path) => return Ok(describe(path, config)),
                Err(why) if file.as_os_str() == NAME => searched.push(format!("{name} ({why})")),
                Err(why) => searched.push(format!("{} ({why})", file.display())),
            }
        }
    }
    Err(not_available(&format!("{NAME} was not found; searched: {}", searched.join("; "))))
}

fn not_available(what: &str) -> Error {
    Error::failed(ErrorCode::NotAvailable, format!("NIXL not available: {what}; remedy: {REMEDY}"))
}

/// Opens a candidate and keeps it loaded, or says why it cannot be used.
fn open(path: &Path) -> Result<PathBuf, String> {
    if path.as_os_str() != OsStr::new(NAME) && !path.is_file() {
        return Err("no such file".into());
    }
    // SAFETY: runs the initialisers of the library and of what it needs; the file was named by the user or lies where
    // NIXL's packages put it, and NIXL's initialisers have no precondition.
    let handle = unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| reason(&e))?;
    let missing: Vec<&str> =
        symbols::USED.iter().copied().filter(|name| address(&handle, name).is_none()).collect();
    if let Some(first) = missing.first() {
        return Err(match missing.len() {
            n if n == symbols::USED.len() => format!("not NIXL's C library: it has no {first}"),
            1 => format!("it lacks the function {first}; NIXL 1.1 or newer is needed"),
            n => format!("it lacks {first} and {} more functions; NIXL 1.1 or newer is needed", n - 1),
        });
    }
    let ours = address(&handle, symbols::USED[0]);
    // SAFETY: RTLD_NOLOAD runs nothing; it answers with a library that is loaded already, or with an error.
    let bare = unsafe { Handle::open(Some(NAME), RTLD_NOW | RTLD_LOCAL | libc::RTLD_NOLOAD) };
    match bare {
        Ok(bare) if address(&bare, symbols::USED[0]) == ours => {}
        Ok(bare) => {
            let other = file_of(&bare).unwrap_or_else(|| "an unknown path".into());
            return Err(format!("another {NAME} is loaded in this process, from {}", other.display()));
        }
        Err(_) => return Err(format!("its DT_SONAME is not {NAME}")),
    }
    let real = file_of(&handle).unwrap_or_else(|| path.to_owned());
    // Never closed: the calls of nixl-sys go there, and UCX's threads live in it.
    std::mem::forget(handle);
    Ok(real)
}

fn reason(e: &libloading::Error) -> String {
    let mut text = e.to_string();
    let mut source = std::error::Error::source(e);
    while let Some(inner) = source {
        text = inner.to_string();
        source = inner.source();
    }
    text
}

fn address(handle: &Handle, name: &str) -> Option<usize> {
    // SAFETY: the symbol is only looked up; its address is taken, nothing is called or read through it.
    let symbol = unsafe { handle.get::<*mut libc::c_void>(name.as_bytes()) }.ok()?;
    Some(symbol.into_raw() as usize)
}

/// The file a loaded library came from.
fn file_of(handle: &Handle) -> Option<PathBuf> {
    let inside = symbols::USED.iter().find_map(|name| address(handle, name))?;
    file_at(inside)
}

fn file_at(address: usize) -> Option<PathBuf> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr accepts any address and fills `info` when it returns non-zero; the name it stores stays valid as
    // long as the library is loaded, and it is copied at once.
    let name = unsafe {
        if libc::dladdr(address as *const libc::c_void, info.as_mut_ptr()) == 0 {
            return None;
        }
        let info = info.assume_init();
        if info.dli_fname.is_null() {
            return None;
        }
        CStr::from_ptr(info.dli_fname)
    };
    let path = PathBuf::from(OsStr::from_bytes(name.to_bytes()));
    Some(path.canonicalize().unwrap_or(path))
}

/// One place to look.
struct Place {
    /// Looking there loads something or runs something.
    costs: bool,
    /// Gives its name for the error message, and the files there that exist.
    look: Box<dyn Fn() -> (String, Vec<PathBuf>)>,
}

/// In the order of preference.
fn places() -> [Place; 7] {
    fn place(look: impl Fn() -> (String, Vec<PathBuf>) + 'static) -> Place {
        Place { costs: false, look: Box::new(look) }
    }
    fn in_folders(name: &str, dirs: &[PathBuf], find: fn(&Path) -> Vec<PathBuf>) -> (String, Vec<PathBuf>) {
        (format!("{name} ({})", list(dirs)), dirs.iter().flat_map(|d| find(d)).collect())
    }
    [
        // A NIXL that is loaded already (`import nixl` in this Python): a second copy beside it would be mixed up with
        // it by the dynamic linker, so its own folder comes first.
        place(|| {
            let dirs =
                mapped().filter(|p| p.ends_with("libnixl.so")).filter_map(|p| p.parent().map(Path::to_owned));
            in_folders("NIXL loaded in this process", &dirs.collect::<Vec<_>>(), plain)
        }),
        place(|| in_folders("LD_LIBRARY_PATH", &variable_paths("LD_LIBRARY_PATH"), plain)),
        Place { costs: true, look: Box::new(|| ("the system's library folders".into(), vec![NAME.into()])) },
        place(|| {
            let prefix = variable("NIXL_PREFIX").unwrap_or_else(|| "/opt/nvidia/nvda_nixl".into());
            let lib = [format!("lib/{}-linux-gnu", std::env::consts::ARCH), "lib64".into(), "lib".into()];
            in_folders("NIXL's own prefix", &lib.map(|l| prefix.join(l)), plain)
        }),
        place(|| {
            let dirs: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
                .into_iter()
                .filter_map(variable)
                .flat_map(|prefix| site_packages(&prefix))
                .chain(mapped().filter_map(|p| site_folder_of(&p)))
                .collect();
            in_folders("this process's Python", &dirs, wheels)
        }),
        place(|| in_folders("kvxfer's cache", cache_dir().as_slice(), wheels)),
        Place {
            costs: true,
            look: Box::new(|| {
                in_folders("python3's site-packages", &ask_python(Duration::from_secs(5)), wheels)
            }),
        },
    ]
}

/// kvxfer's own folder, filled by `scripts/install-nixl.sh`.
fn cache_dir() -> Option<PathBuf> {
    Some(cache::folder()?.join("nixl"))
}

fn variable_paths(name: &str) -> Vec<PathBuf> {
    std::env::var_os(name)
        .map(|v| std::env::split_paths(&v).filter(|p| !p.as_os_str().is_empty()).collect())
        .unwrap_or_default()
}

fn list(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "none".into();
    }
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The library directly in a folder.
fn plain(dir: &Path) -> Vec<PathBuf> {
    Some(dir.join(NAME)).filter(|f| f.is_file()).into_iter().collect()
}

/// The library in the folders NIXL's wheels unpack to, below `site-packages`; CUDA 13 first.
fn wheels(site: &Path) -> Vec<PathBuf> {
    ["nixl_cu13", "nixl_cu12", "nixl"]
        .into_iter()
        .map(|package| site.join(format!(".{package}.mesonpy.libs")).join(NAME))
        .filter(|f| f.is_file())
        .collect()
}

fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(prefix.join("lib")) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|e| e.file_name().as_bytes().starts_with(b"python3"))
        .map(|e| e.path().join("site-packages"))
        .filter(|p| p.is_dir())
        .collect();
    found.sort();
    found
}

/// Files mapped into this process.
fn mapped() -> impl Iterator<Item = PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut files: Vec<PathBuf> =
        maps.lines().filter_map(|l| l.find('/').map(|at| PathBuf::from(&l[at..]))).collect();
    files.dedup();
    files.into_iter()
}

/// The `site-packages` folder a file lies in: an extension module tells which Python runs in this process.
fn site_folder_of(file: &Path) -> Option<PathBuf> {
    file.ancestors().find(|a| a.file_name() == Some(OsStr::new("site-packages"))).map(Path::to_owned)
}

/// Asks `python3` where its packages are, without importing anything heavy.
fn ask_python(limit: Duration) -> Vec<PathBuf> {
    let script = "import sysconfig,site\nfor p in {sysconfig.get_path('platlib'), *site.getsitepackages(), site.getusersitepackages()}: print(p)";
    let child = Command::new("python3")
        .args(["-I", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return Vec::new() };
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Vec::new();
            }
        }
    }
    let Ok(out) = child.wait_with_output() else { return Vec::new() };
    let mut dirs: Vec<PathBuf> = String::from_utf8_lossy(&out.stdout).lines().map(PathBuf::from).collect();
    dirs.sort();
    dirs.dedup();
    dirs
}

fn same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Version and plug-in folder of a library that was opened.
fn describe(path: PathBuf, config: &NixlConfig) -> Library {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let version = wheel_version(dir);
    let plugin_dir = match (variable("NIXL_PLUGIN_DIR"), &config.plugin_dir) {
        (Some(set), wanted) => {
            if wanted.as_ref().is_some_and(|w| !same_file(w, &set)) {
                tracing::warn!(variable = %set.display(), "NIXL_PLUGIN_DIR is set and wins over nixl.plugin_dir");
            }
            Some(set)
        }
        (None, Some(wanted)) => Some(wanted.clone()),
        (None, None) => [dir.join("plugins"), repaired_plugins(dir)]
            .into_iter()
            .find(|d| std::fs::read_dir(d).is_ok_and(|mut entries| entries.next().is_some())),
    };
    Library { path, version, plugin_dir }
}

/// Where a wheel's plug-ins are put when they are not beside the library.
fn repaired_plugins(dir: &Path) -> PathBuf {
    let package = package_of(dir).unwrap_or_default();
    dir.parent().unwrap_or(dir).join(format!("{package}.libs/nixl"))
}

/// `nixl_cu13` of `…/.nixl_cu13.mesonpy.libs`.
fn package_of(dir: &Path) -> Option<String> {
    Some(dir.file_name()?.to_str()?.strip_prefix('.')?.strip_suffix(".mesonpy.libs")?.to_owned())
}

/// From the name of the wheel's `dist-info` folder.
fn wheel_version(dir: &Path) -> Option<String> {
    let prefix = format!("{}-", package_of(dir)?);
    std::fs::read_dir(dir.parent()?).ok()?.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        Some(name.strip_prefix(&prefix)?.strip_suffix(".dist-info")?.to_owned())
    })
}

/// Tells NIXL where its plug-ins are when it would not find them by itself.
fn set_plugin_dir(library: &Library) {
    let beside = library.path.parent().map(|d| d.join("plugins"));
    match &library.plugin_dir {
        Some(dir) if variable("NIXL_PLUGIN_DIR").is_none() && Some(dir) != beside.as_ref() => {
            // SAFETY: only unsafe beside a thread that reads the environment through C without Rust's lock. It happens
            // at most once per process, before NIXL's first agent, and not at all with wheels as they are published;
            // `load` documents it.
            unsafe { std::env::set_var("NIXL_PLUGIN_DIR", dir) };
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheel_folders_tell_package_and_version() {
        let site = tempfile::tempdir().expect("temporary folder");
        let dir = site.path().join(".nixl_cu12.mesonpy.libs");
        std::fs::create_dir_all(dir.join("plugins")).expect("folder");
        std::fs::create_dir_all(site.path().join("nixl_cu12-1.4.2.dist-info")).expect("folder");
        std::fs::create_dir_all(site.path().join("nixl_cu12.libs/nixl")).expect("folder");
        std::fs::write(site.path().join("nixl_cu12.libs/nixl/libplugin_UCX.so"), b"").expect("file");
        std::fs::write(dir.join(NAME), b"").expect("file");
        assert_eq!(wheels(site.path()), [dir.join(NAME)]);
        assert_eq!(wheel_version(&dir).as_deref(), Some("1.4.2"));
        // An empty folder beside the library does not count.
        let found = describe(dir.join(NAME), &NixlConfig::default());
        if variable("NIXL_PLUGIN_DIR").is_none() {
            assert_eq!(found.plugin_dir, Some(site.path().join("nixl_cu12.libs/nixl")));
        }
    }

    #[test]
    fn an_extension_module_tells_the_python_of_this_process() {
        let file = Path::new("/venv/lib/python3.11/site-packages/torch/lib/libtorch.so");
        assert_eq!(site_folder_of(file), Some("/venv/lib/python3.11/site-packages".into()));
        assert_eq!(site_folder_of(Path::new("/usr/lib/libc.so.6")), None);
    }
}
