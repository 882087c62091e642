"""Builds the wheel: maturin, with the C header and the `kvxfer` command put where it looks for them.

maturin's cffi bindings parse `header.h` in cargo's target folder. cffi knows declarations but no preprocessor, so the
checked-in `include/kvxfer.h` is reduced to what cffi understands. One source of truth, and no cbindgen needed here.

maturin builds one crate, as bindings or as a binary. The command is another crate: cargo builds it here, and maturin finds it
in its data folder (`data` in pyproject.toml), whose `scripts/` installers copy to `bin/`. So the command is the plain
executable, on the PATH, without an interpreter in front; `build_command.py` has the rest.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import maturin
from maturin import get_requires_for_build_wheel

import build_command

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HEADER = ROOT / "include" / "kvxfer.h"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with _alone():
        return maturin.build_wheel(wheel_directory, _prepared(config_settings), metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with _alone():
        return maturin.build_editable(wheel_directory, _prepared(config_settings), metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    # maturin wants its data folder to be there, though it reads none of it here.
    build_command.data_folder(ROOT)
    return maturin.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


@contextlib.contextmanager
def _alone():
    """One build at a time in a clone: two would put each other's command into their wheels."""
    with open(build_command.data_folder(ROOT).with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepared(config_settings):
    """Header and command in place; the settings with the arguments that both builds use."""
    arguments = _arguments(config_settings)
    _prepare_target(arguments)
    build_command.build(ROOT, arguments)
    return {"maturin.build-args": arguments}


def _arguments(config_settings):
    """What the caller asked maturin for; a profile where none was named; without NIXL and CUDA where they cannot be built."""
    arguments = list(maturin.get_maturin_pep517_args(config_settings))
    if not build_command.names(arguments, "--profile", "--release", "-r"):
        arguments.append("--profile=release")
    chosen = build_command.names(arguments, "--features", "-F", "--all-features", "--no-default-features")
    if not chosen and not _can_build_nixl():
        arguments.append("--no-default-features")
    return arguments


def _can_build_nixl():
    if os.environ.get("KVXFER_NO_NIXL"):
        return False
    missing = []
    if not (shutil.which("c++") or shutil.which("g++")):
        missing.append("a C++ compiler (Debian: g++)")
    if not _has_libclang():
        missing.append("libclang (Debian: libclang-dev)")
    if missing:
        print(
            f"kvxfer: building WITHOUT the NIXL and CUDA parts, because {' and '.join(missing)} is missing; install it and "
            "build again to have them. Shared memory, CMA and TCP work without.",
            file=sys.stderr,
        )
    return not missing


def _has_libclang():
    if os.environ.get("LIBCLANG_PATH"):
        return True
    found = (
        subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
        if shutil.which("ldconfig")
        else ""
    )
    names = found.split() + [str(p) for p in pathlib.Path("/usr/lib").glob("llvm-*/lib/libclang*.so*")]
    return any("libclang" in n and "libclang-cpp" not in n for n in names)


def _prepare_target(arguments):
    if not HEADER.is_file():
        raise SystemExit(f"kvxfer: {HEADER} is missing; the wheel is built from a clone of the whole repository")
    metadata = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1", "--manifest-path", str(ROOT / "Cargo.toml")],
        capture_output=True,
        text=True,
        check=True,
    )
    target = pathlib.Path(
        build_command.value(arguments, "--target-dir") or json.loads(metadata.stdout)["target_directory"]
    )
    target.mkdir(parents=True, exist_ok=True)
    # maturin keeps the library of its last run there, newer ones as a link to cargo's own file, through which an older one
    # that copies would empty it.
    shutil.rmtree(target / "maturin", ignore_errors=True)
    (target / "header.h").write_text(reduced(HEADER.read_text()))


def reduced(header):
    """The header without what cffi cannot parse: comments, C++ blocks, conditions, includes, macros that are no numbers."""
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    header = re.sub(r"//[^\n]*", "", header)
    kept, skipping, depth = [], None, 0
    for line in header.splitlines():
        directive = re.match(r"\s*#\s*(\w+)\s*(.*)", line)
        word, rest = directive.groups() if directive else ("", "")
        if word.startswith("if"):
            depth += 1
            if skipping is None and "__cplusplus" in rest and word != "ifndef":
                skipping = depth
        elif word == "endif":
            if skipping == depth:
                skipping = None
            depth -= 1
        elif word in ("else", "elif") and skipping == depth:
            skipping = None
        elif skipping is None and word == "define":
            number = re.fullmatch(r"(\w+)\s+\(?\s*(0[xX][0-9a-fA-F]+|\d+)[uUlL]*\s*\)?\s*", rest)
            if number:
                kept.append(f"#define {number[1]} {number[2]}")
        elif skipping is None and not directive and line.strip():
            kept.append(line)
    return "\n".join(kept) + "\n"
