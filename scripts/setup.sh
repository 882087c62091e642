#!/usr/bin/env bash
# setup.sh build|test: brings what the build (libclang, g++) and the tests (valgrind, cmake, …) need on Debian.
# Installs only what is missing, and only as root with apt-get; elsewhere it says what to install and goes on.
set -euo pipefail

want=()
need() { # need COMMAND PACKAGE
  command -v "$1" >/dev/null 2>&1 || want+=("$2")
}

# The one place that knows how to find libclang says --no-default-features when it is missing.
have_libclang() {
  [ -z "$("$(dirname "$0")/features.sh" 2>&1 | grep libclang)" ]
}

need cc gcc
need g++ g++
need make make
have_libclang || want+=(libclang-dev)
if [ "${1:-build}" = test ]; then
  need valgrind valgrind
  need pkg-config pkg-config
  need cmake cmake
  need nm binutils
  need curl curl
  python3 -c 'import ensurepip, venv' 2>/dev/null || want+=(python3-venv)
fi

if [ "${#want[@]}" -eq 0 ]; then
  exit 0
fi
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "setup: installing ${want[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${want[@]}" >/dev/null
else
  echo "setup: please install: ${want[*]} (Debian names); going on without" >&2
fi
