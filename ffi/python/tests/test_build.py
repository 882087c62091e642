"""What the wheel's two builds, maturin's and cargo's, are told: the same profile, features and target."""

import importlib.util
import pathlib

import pytest

SOURCE = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build_command():
    spec = importlib.util.spec_from_file_location("build_command", SOURCE / "build_command.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("maturin", "cargo"),
    [
        ("", ""),
        ("--profile=dev --no-default-features", "--profile=dev --no-default-features"),
        ("--profile dev --strip --features nixl,cuda", "--profile dev --features nixl,cuda"),
        ("-r -F nixl -j 2 --locked", "-r -F nixl -j 2 --locked"),
        ("-j2 -Fnixl", "-j2 -Fnixl"),
        ("--compatibility manylinux_2_34 --auditwheel skip --target-dir /x", "--target-dir /x"),
        ("--target=aarch64-unknown-linux-gnu -- -C link-arg=-s --profile no", "--target=aarch64-unknown-linux-gnu"),
    ],
)
def test_cargo_is_given_what_both_know(build_command, maturin, cargo):
    assert build_command.shared(maturin.split()) == cargo.split()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--profile=dev", True),
        ("--profile dev", True),
        ("-r", True),
        ("--release", True),
        ("--profiles=dev", False),
        ("--features=release", False),
        ("-j2 --locked", False),
    ],
)
def test_a_profile_that_was_named_is_seen(build_command, arguments, named):
    assert build_command.names(arguments.split(), "--profile", "--release", "-r") is named


def test_the_target_folder_is_read_from_either_form(build_command):
    assert build_command.value(["--target-dir", "/a", "-r"], "--target-dir") == "/a"
    assert build_command.value(["--target-dir=/a", "--target-dir=/b"], "--target-dir") == "/b"
    assert build_command.value(["-r"], "--target-dir") is None
