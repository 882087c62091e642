"""Builds the wheel: maturin, after the C header has been put where maturin looks for it.

maturin's cffi bindings parse `header.h` in cargo's target folder. cffi knows declarations but no preprocessor, so the
checked-in `include/kvxfer.h` is reduced to what cffi understands. One source of truth, and no cbindgen needed here.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import maturin
from maturin import get_requires_for_build_wheel, prepare_metadata_for_build_wheel

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HEADER = ROOT / "include" / "kvxfer.h"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _write_header()
    return maturin.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _write_header()
    return maturin.build_editable(wheel_directory, _settings(config_settings), metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def _settings(config_settings):
    """What the caller asked for, and without NIXL and CUDA where the machine cannot build them."""
    settings = dict(config_settings or {})
    if "build-args" not in settings and "MATURIN_PEP517_ARGS" not in os.environ and not _can_build_nixl():
        settings["build-args"] = "--no-default-features"
    return settings


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


def _write_header():
    if not HEADER.is_file():
        raise SystemExit(f"kvxfer: {HEADER} is missing; the wheel is built from a clone of the whole repository")
    metadata = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1", "--manifest-path", str(ROOT / "Cargo.toml")],
        capture_output=True,
        text=True,
        check=True,
    )
    target = pathlib.Path(json.loads(metadata.stdout)["target_directory"])
    target.mkdir(parents=True, exist_ok=True)
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
