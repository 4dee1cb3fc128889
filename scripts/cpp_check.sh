#!/usr/bin/env bash
# The libraries for C++ programs: built without torch and Python, installed, found and used.
# SPDX-License-Identifier: MIT
#
#   scripts/cpp_check.sh [CMAKE_ARGUMENT ...]
#
# Builds in build/cpp and installs to build/cpp/install. Python is hidden from CMake. Without
# arguments only the CPU's library is built; -DCOMPUTE_BACKEND=auto adds the GPU's where its
# compiler is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=build/cpp
prefix="$PWD/$build/install"
say() { printf 'cpp_check: [%4d s] %s\n' "$SECONDS" "$*"; }

say "build without torch and Python"
cmake -G Ninja -S . -B "$build" -DBNB_BUILD_PYTHON=OFF -DBNB_WERROR=ON -DCOMPUTE_BACKEND=cpu \
  -DCMAKE_DISABLE_FIND_PACKAGE_Python=ON -DCMAKE_INSTALL_PREFIX="$prefix" "$@"
cmake --build "$build"
rm -rf "$prefix"
cmake --install "$build"

say "examples against the installed libraries"
rm -rf "$build/examples"
cmake -G Ninja -S examples/cpp -B "$build/examples" -DCMAKE_PREFIX_PATH="$prefix" \
  -DCMAKE_CXX_FLAGS="-Wall -Wextra -Werror"
cmake --build "$build/examples"
ctest --test-dir "$build/examples" --output-on-failure
"$build/examples/round_trip_cpu"
say "passed"
