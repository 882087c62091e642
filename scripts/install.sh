#!/usr/bin/env bash
# install.sh [PREFIX]: copies what `make build` built (library, headers, pkg-config file, CMake package, command) to PREFIX,
# /usr/local by default.
#
# Read from the environment: DESTDIR (a root to stage into, for packagers), LIBDIR (default PREFIX/lib), INCLUDEDIR (default
# PREFIX/include), BUILD_DIR (default target/release).
set -euo pipefail
cd "$(dirname "$0")/.."

prefix=${1:-${PREFIX:-/usr/local}}
case $prefix in
  /*) ;;
  *) prefix=$PWD/$prefix ;;
esac
libdir=${LIBDIR:-$prefix/lib}
includedir=${INCLUDEDIR:-$prefix/include}
build=${BUILD_DIR:-target/release}
dest=${DESTDIR:-}
version=$(sed -nE 's/^version = "([^"]+)"/\1/p' Cargo.toml | head -1)
soname=libkvxfer.so.$(sed -nE 's/^#define KVXFER_ABI_VERSION ([0-9]+)/\1/p' include/kvxfer.h)

[ -f "$build/libkvxfer.so" ] || { echo "install: $build/libkvxfer.so is missing: run 'make build' first" >&2; exit 1; }

# What a program that links the static library needs besides: what Rust's standard library asks for, and C++'s for NIXL's stub.
private="-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc"
if grep -qs __cxa_guard_acquire "$build/libkvxfer.a"; then private="-lstdc++ $private"; fi

put() { # put MODE FROM TO
  install -D -m "$1" "$2" "$dest$3"
}
fill() { # fill TEMPLATE TO
  local text
  text=$(sed -e "s|@prefix@|$prefix|g" -e "s|@libdir@|$libdir|g" -e "s|@includedir@|$includedir|g" \
    -e "s|@version@|$version|g" -e "s|@soname@|$soname|g" \
    -e "s|@private@|$private|g" -e "s|@private_cmake@|$(sed -e 's/-l//g' -e 's/ /;/g' <<<"$private")|g" \
    -e "s|@compatible@|${version%.*}|g" \
    -e "s|@include_from_lib@|$(realpath -m --relative-to="$libdir" "$includedir")|g" "$1")
  mkdir -p "$(dirname "$dest$2")"
  printf '%s\n' "$text" >"$dest$2"
  chmod 644 "$dest$2"
}

put 755 "$build/libkvxfer.so" "$libdir/libkvxfer.so.$version"
ln -sfn "libkvxfer.so.$version" "$dest$libdir/$soname"
ln -sfn "$soname" "$dest$libdir/libkvxfer.so"
if [ -f "$build/libkvxfer.a" ]; then put 644 "$build/libkvxfer.a" "$libdir/libkvxfer.a"; fi
put 644 include/kvxfer.h "$includedir/kvxfer.h"
put 644 include/kvxfer.hpp "$includedir/kvxfer.hpp"
fill pkgconfig/kvxfer.pc.in "$libdir/pkgconfig/kvxfer.pc"
fill cmake/kvxferConfig.cmake.in "$libdir/cmake/kvxfer/kvxferConfig.cmake"
fill cmake/kvxferConfigVersion.cmake.in "$libdir/cmake/kvxfer/kvxferConfigVersion.cmake"
if [ -f "$build/kvxfer" ]; then put 755 "$build/kvxfer" "$prefix/bin/kvxfer"; fi
put 644 LICENSE "$prefix/share/doc/kvxfer/LICENSE"

echo "kvxfer $version installed in $dest$prefix"
if [ -z "$dest" ] && [ "$(id -u)" -eq 0 ] && command -v ldconfig >/dev/null 2>&1; then
  case ":$(ldconfig -v -N 2>/dev/null | sed -nE 's|^(/[^:]+):.*|\1|p' | tr '\n' ':')" in
    *":$libdir:"*) ldconfig ;;
    *) echo "note: $libdir is not on the loader's path: link with -Wl,-rpath,$libdir or set LD_LIBRARY_PATH" ;;
  esac
fi
