"""Stand-ins for the CUDA libraries that a CUDA build of torch is linked against.

    python cuda_stubs.py TORCH_LIB_FOLDER

The loader refuses torch's libraries while a library they name is missing, although nothing in them is called on a machine
without a GPU. For each missing library this writes a small one beside torch's own (their RPATH contains $ORIGIN) in which
every wanted symbol, with its version, is a function that returns an error. libcudart and libcuda are left alone: the first
is really called, the second is opened at run time and its absence is handled. For use on machines without a GPU only.
"""

import collections
import pathlib
import re
import subprocess
import sys
import tempfile

# Which library a symbol without a version belongs to, by its prefix. The first that matches decides.
LIBRARY_OF_PREFIX = {
    "cublasLt": "libcublasLt",
    "cublas": "libcublas",
    "cudnn": "libcudnn",
    "cufft": "libcufft",
    "curand": "libcurand",
    "cusparseLt": "libcusparseLt",
    "cusparse": "libcusparse",
    "cusolver": "libcusolver",
    "nccl": "libnccl",
    "pnccl": "libnccl",
    "nvrtc": "libnvrtc",
    "nvshmem": "libnvshmem_host",
    "_nvshmem": "libnvshmem_host",
    "cupti": "libcupti",
    "cuFile": "libcufile",
}


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wanted_libraries(torch_libraries):
    """Names (with version, as the loader asks for them) of CUDA libraries that torch's libraries need."""
    names = set()
    for path in torch_libraries:
        for name in re.findall(r"NEEDED\s+(\S+)", output("objdump", "-p", path)):
            if name.startswith(("libcu", "libnv", "libnccl")) and not name.startswith(("libcudart.", "libcuda.")):
                names.add(name)
    return names


def library_of(symbol, version, libraries):
    """The wanted library that should define `symbol`, or None when it belongs elsewhere."""
    stems = {name.split(".so")[0]: name for name in libraries}
    if version and ".so" in version:
        return stems.get(version.split(".so")[0])
    for prefix, stem in LIBRARY_OF_PREFIX.items():
        if symbol.startswith(prefix) and stem in stems:
            return stems[stem]
    return None


def wanted_symbols(torch_libraries, libraries):
    """library -> version ('' for none) -> symbols."""
    wanted = {name: collections.defaultdict(set) for name in libraries}
    for path in torch_libraries:
        for line in output("nm", "-D", "--undefined-only", path).splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            version = version.lstrip("@")
            library = library_of(symbol, version, libraries)
            if library:
                wanted[library][version].add(symbol)
    return wanted


def write_stub(folder, library, symbols_by_version):
    symbols = sorted(set().union(*symbols_by_version.values())) if symbols_by_version else []
    source = "".join(f"int {symbol}(void) {{ return 1; }}\n" for symbol in symbols) or "int kvxfer_stub;\n"
    versions = "".join(
        f"{version} {{ global: {'; '.join(sorted(names))}; }};\n"
        for version, names in symbols_by_version.items()
        if version
    )
    with tempfile.TemporaryDirectory() as scratch:
        source_file, version_file = pathlib.Path(scratch, "stub.c"), pathlib.Path(scratch, "versions")
        source_file.write_text(source)
        command = [
            "gcc",
            "-shared",
            "-fPIC",
            "-w",
            "-fno-builtin",
            source_file,
            f"-Wl,-soname,{library}",
            "-o",
            folder / library,
        ]
        if versions:
            version_file.write_text(versions)
            command.append(f"-Wl,--version-script={version_file}")
        subprocess.run(command, check=True)


def main():
    folder = pathlib.Path(sys.argv[1])
    torch_libraries = sorted(p for p in folder.glob("lib*.so") if re.match(r"lib(torch|c10|shm|caffe2)", p.name))
    if not torch_libraries:
        sys.exit(f"no torch libraries in {folder}")
    libraries = wanted_libraries(torch_libraries)
    for library, symbols in sorted(wanted_symbols(torch_libraries, libraries).items()):
        write_stub(folder, library, symbols)


if __name__ == "__main__":
    main()
