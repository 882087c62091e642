#!/usr/bin/env bash
# features.sh: prints the cargo flags this machine can build with: nothing (all default features), or
# --no-default-features with a sentence on stderr about what is missing.
have_libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] && return 0
  { ldconfig -p 2>/dev/null | sed -nE 's/.*=> //p'; compgen -G '/usr/lib/llvm-*/lib/libclang*.so*'; } | grep -v 'libclang-cpp' | grep -q 'libclang'
}
missing=()
have_libclang || missing+=("libclang (Debian: libclang-dev)")
command -v g++ >/dev/null 2>&1 || command -v c++ >/dev/null 2>&1 || missing+=("a C++ compiler (Debian: g++)")
if [ "${#missing[@]}" -gt 0 ]; then
  echo "kvxfer: building without NIXL and CUDA because ${missing[*]} is missing; install it and build again to have them." >&2
  echo "--no-default-features"
fi
