#!/usr/bin/env bash
# Makes sure that GoogleTest is there for the C++ tests; installs Debian's package where it may.
# SPDX-License-Identifier: MIT
#
# With --check it only says ON or OFF: whether GoogleTest is there.
set -euo pipefail

have_gtest() { echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -std=c++17 -E -x c++ - >/dev/null 2>&1; }

if [ "${1:-}" = --check ]; then
  have_gtest && echo ON || echo OFF
  exit 0
fi
have_gtest && exit 0
as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi
if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
  echo "== package libgtest-dev, for the C++ tests"
  "${as_root[@]}" apt-get install -y -q libgtest-dev ||
    { "${as_root[@]}" apt-get update -q && "${as_root[@]}" apt-get install -y -q libgtest-dev; }
fi
have_gtest && exit 0
echo "The C++ tests need GoogleTest: sudo apt-get install -y libgtest-dev (or your system's name for it)" >&2
exit 1
