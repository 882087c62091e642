//! NVRTC's calls, from the very library that was opened. cudarc has them too, but looks its library up by a list of names: one that
//! was asked for by path might not be the one it finds, and CUDA 13's is not on the list.

use super::failed;
use crate::{Error, Result};
use parking_lot::Mutex;
use std::error::Error as _;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

type Program = *mut c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// A loaded library. It stays loaded: it may have threads and destructors of its own.
#[derive(Debug)]
pub(super) struct Nvrtc {
    path: PathBuf,
    version: (c_int, c_int),
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    text: unsafe extern "C" fn(c_int) -> *const c_char,
    log: (Size, Get),
    ptx: (Size, Get),
    cubin: (Size, Get),
}

/// What comes out of the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Text that the driver makes machine code of; NUL-terminated.
    Ptx,
    /// Machine code of one architecture.
    Cubin,
}

impl Nvrtc {
    /// Opens a path, or a name on the loader's path. Once for each.
    pub(super) fn open(path: &Path) -> Result<&'static Self> {
        static LOADED: Mutex<Vec<&'static Nvrtc>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock();
        if let Some(known) = loaded.iter().find(|n| n.path == path) {
            return Ok(known);
        }
        let nvrtc: &'static Self = Box::leak(Box::new(Self::load(path)?));
        loaded.push(nvrtc);
        Ok(nvrtc)
    }

    fn load(path: &Path) -> Result<Self> {
        // SAFETY: NVIDIA's library, whose initialisers do nothing but set up itself. It is never closed, so what is looked up stays. The
        // types are those of nvrtc.h, the same from CUDA 11 to 13.
        unsafe {
            let library: &'static libloading::Library =
                Box::leak(Box::new(libloading::Library::new(path).map_err(|e| loading(path, &e))?));
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
                find(library, "nvrtcVersion")?;
            let (mut major, mut minor) = (0, 0);
            let asked = version(&raw mut major, &raw mut minor);
            if asked != 0 {
                return Err(failed(format!("nvrtcVersion of {}: error {asked}", path.display())));
            }
            Ok(Self {
                path: path.to_owned(),
                version: (major, minor),
                create: find(library, "nvrtcCreateProgram")?,
                compile: find(library, "nvrtcCompileProgram")?,
                destroy: find(library, "nvrtcDestroyProgram")?,
                text: find(library, "nvrtcGetErrorString")?,
                log: (find(library, "nvrtcGetProgramLogSize")?, find(library, "nvrtcGetProgramLog")?),
                ptx: (find(library, "nvrtcGetPTXSize")?, find(library, "nvrtcGetPTX")?),
                cubin: (find(library, "nvrtcGetCUBINSize")?, find(library, "nvrtcGetCUBIN")?),
            })
        }
    }

    /// Compiles `source` for an architecture: 90 is compute capability 9.0.
    pub(super) fn compile(&self, source: &CStr, architecture: i32, form: Form) -> Result<Vec<u8>> {
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: a pointer to a live handle, NUL-terminated texts, no headers.
        self.check("nvrtcCreateProgram", unsafe {
            (self.create)(
                &raw mut program,
                source.as_ptr(),
                c"kvxfer.cu".as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        })?;
        let code = match form {
            Form::Ptx => "compute",
            Form::Cubin => "sm",
        };
        let made = CString::new(format!("--gpu-architecture={code}_{architecture}"))
            .map_err(failed)
            .and_then(|architecture| {
                let options = [architecture.as_ptr(), c"--std=c++17".as_ptr()];
                // SAFETY: the program lives; two options, NUL-terminated, that outlive the call.
                let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
                if let Err(e) = self.check("nvrtcCompileProgram", compiled) {
                    let log = self.take(program, self.log).unwrap_or_default();
                    let log = String::from_utf8_lossy(log.split(|b| *b == 0).next().unwrap_or_default());
                    return Err(failed(format!(
                        "{e} for {}: {}",
                        architecture.to_string_lossy(),
                        log.trim()
                    )));
                }
                self.take(program, if form == Form::Ptx { self.ptx } else { self.cubin })
            });
        // SAFETY: made above, destroyed once.
        if let Err(e) = self.check("nvrtcDestroyProgram", unsafe { (self.destroy)(&raw mut program) }) {
            tracing::debug!(error = %e, "after compiling");
        }
        made
    }

    fn take(&self, program: Program, (size, get): (Size, Get)) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program lives; a pointer to a live integer.
        self.check("the size of NVRTC's answer", unsafe { size(program, &raw mut bytes) })?;
        let mut out = vec![0u8; bytes];
        // SAFETY: room for as many bytes as it has just named.
        self.check("NVRTC's answer", unsafe { get(program, out.as_mut_ptr().cast()) })?;
        Ok(out)
    }

    fn check(&self, call: &str, result: c_int) -> Result<()> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: it answers any number with a static text.
        let text = unsafe { (self.text)(result) };
        let text = if text.is_null() {
            format!("error {result}")
        } else {
            // SAFETY: NUL-terminated, and never freed.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        Err(failed(format!("{call}: {text}")))
    }
}

/// # Safety
/// `T` is the type of the function of that name, and the library is never closed.
unsafe fn find<T: Copy>(library: &libloading::Library, name: &str) -> Result<T> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name.as_bytes()) }.map(|f| *f).map_err(|e| loading(name, &e))
}

/// In the loader's own words, which libloading's error has as its source.
fn loading(what: impl AsRef<Path>, error: &libloading::Error) -> Error {
    let words = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    failed(format!("{}: {words}", what.as_ref().display()))
}

impl std::fmt::Display for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}.{})", self.path.display(), self.version.0, self.version.1)
    }
}
