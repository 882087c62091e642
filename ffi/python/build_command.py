"""Builds the `kvxfer` command with what maturin was told, and puts it into maturin's data folder.

Profile, features and target are the library's, so `--no-default-features` and `--profile=dev` mean both. cargo's target folder
is the usual one: whoever has built the command already does not build it again.
"""

import json
import os
import shutil
import subprocess
import sys

# Of maturin's options, those that cargo knows too, and whether a value follows.
SHARED = {
    "--profile": True,
    "--release": False,
    "-r": False,
    "--features": True,
    "-F": True,
    "--all-features": False,
    "--no-default-features": False,
    "--target": True,
    "--target-dir": True,
    "--jobs": True,
    "-j": True,
    "--locked": False,
    "--frozen": False,
    "--offline": False,
    "--ignore-rust-version": False,
    "--config": True,
}


def build(root, arguments):
    """Leaves `build/wheel-data/scripts/kvxfer` in the repository."""
    command = ["cargo", "build", "--package", "kvxfer-cli", "--bin", "kvxfer", *shared(arguments)]
    command += ["--message-format", "json-render-diagnostics", "--manifest-path", str(root / "Cargo.toml")]
    print("Running `" + " ".join(command) + "`", flush=True)
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode != 0:
        raise SystemExit(f"kvxfer: cargo did not build the command (status {made.returncode}); its messages are above")
    messages = (json.loads(line) for line in made.stdout.splitlines() if line.startswith("{"))
    (executable,) = [m["executable"] for m in messages if m["reason"] == "compiler-artifact" and m["executable"]]

    scripts = data_folder(root) / "scripts"
    scripts.mkdir(exist_ok=True)
    staged = scripts / f".kvxfer.{os.getpid()}"
    try:
        shutil.copy2(executable, staged)
        _strip(staged)
        # At once, so that nobody packs half of it.
        staged.replace(scripts / "kvxfer")
    finally:
        staged.unlink(missing_ok=True)


def data_folder(root):
    """maturin's data folder, as pyproject.toml names it."""
    folder = root / "build" / "wheel-data"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _strip(file):
    """As maturin does with the library. The copy is stripped and not the build, which others use too."""
    try:
        subprocess.run(["strip", str(file)], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        print(f"kvxfer: the command keeps its symbols, because strip does not work here: {e}", file=sys.stderr)


def shared(arguments):
    """The arguments that cargo is given too."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        # Arguments of rustc follow, for the library alone.
        if argument == "--":
            break
        takes = SHARED.get(name) if name.startswith("--") or len(argument) == 2 else SHARED.get(argument[:2])
        if takes is None:
            continue
        kept.append(argument)
        if takes and not equals and (name.startswith("--") or len(argument) == 2):
            kept.append(next(rest, ""))
    return kept


def names(arguments, *options):
    """Whether one of these options is among the arguments."""
    return any(a.partition("=")[0] in options or (a[:2] in options and a[1:2] != "-") for a in arguments)


def value(arguments, option):
    """The value of a long option; the last one, None without."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, text = argument.partition("=")
        if name == option:
            found = text if equals else following
    return found
