#!/usr/bin/env bash
# Fresh-installation check: `pip install .` beside nothing but torch, then a first use.
# SPDX-License-Identifier: MIT
#
#   scripts/wheel_check.sh [TORCH_VERSION ...]
#
# Always: a new environment with torch 2.13.0 and pip, the plain isolated `pip install .`, and
# `python -m bitsandbytes` and a quantization by native code, run outside the checkout. A clean copy
# of the sources is built, so that nothing left in build/ can help.
# For each TORCH_VERSION given (2.10 or later): one wheel, built beside torch 2.13.0, must also
# work, unchanged, beside that torch. A torch with CUDA takes 5 GB of disk and a minute or more.
#
# Environment: PYTHON (python3), BNB_BUILD_TORCH (2.13.0).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
build_torch="${BNB_BUILD_TORCH:-2.13.0}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

mkdir "$scratch/source" "$scratch/elsewhere"
tar -c --exclude-vcs --exclude=./build --exclude=./dist --exclude=./out --exclude=./.venv \
  --exclude=./.cache --exclude='*.so' --exclude=__pycache__ . | tar -x -C "$scratch/source"
# Where ccache is in use, the copy shares its entries with the checkout.
export CCACHE_BASEDIR="$scratch/source"

say() { printf 'wheel_check: [%4d s] %s\n' "$SECONDS" "$*"; }

# new_environment NAME TORCH_VERSION: torch and pip, nothing else.
new_environment() {
  say "environment with torch $2"
  "$python" -m venv "$scratch/$1"
  "$scratch/$1/bin/pip" install -qq "torch==$2"
}

# first_use NAME TORCH_VERSION: the report and a round trip, from a folder that holds no sources.
first_use() {
  (
    cd "$scratch/elsewhere"
    "$scratch/$1/bin/python" -m bitsandbytes
    "$scratch/$1/bin/python" - "$scratch/$1" "$2" <<'PY'
import pathlib
import sys

import torch

import bitsandbytes as bnb

home = pathlib.Path(bnb.__file__).resolve()
if not home.is_relative_to(pathlib.Path(sys.argv[1]).resolve()):
    sys.exit(f"imported from {home}, which is not the new environment")
if torch.__version__.partition("+")[0] != sys.argv[2]:
    sys.exit(f"the installation replaced torch {sys.argv[2]} by {torch.__version__}")
if not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_blockwise", "CPU"):
    sys.exit("the native CPU library is missing or did not load")
x = torch.randn(1000)
y = bnb.functional.dequantize_blockwise(*bnb.functional.quantize_blockwise(x))
error = (x - y).abs().max().item()
if not error < 0.1:
    sys.exit(f"quantize_blockwise and back: error {error}")
print(f"{bnb.__name__} {bnb.__version__} works beside torch {torch.__version__}")
PY
  )
}

new_environment fresh "$build_torch"
say "pip install ."
(cd "$scratch/source" && "$scratch/fresh/bin/pip" install .)
first_use fresh "$build_torch"

if (($#)); then
  say "pip wheel --no-deps ."
  "$scratch/fresh/bin/pip" wheel -qq --no-deps --wheel-dir "$scratch/wheels" "$scratch/source"
  wheels=("$scratch"/wheels/bitsandbytes-*.whl)
  [[ ${#wheels[@]} == 1 && -f ${wheels[0]} ]] || {
    say "expected one wheel, got: ${wheels[*]}"
    exit 1
  }
  for version in "$@"; do
    new_environment other "$version"
    say "${wheels[0]##*/} beside torch $version"
    "$scratch/other/bin/pip" install -qq "${wheels[0]}"
    first_use other "$version"
    rm -rf "$scratch/other"
  done
fi

say "passed: torch $build_torch${*:+, wheel also with torch $*}"
