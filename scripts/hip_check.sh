#!/usr/bin/env bash
# Compile check of the GPU sources as HIP: device code for each architecture, then the host side.
# SPDX-License-Identifier: MIT
#
#   scripts/hip_check.sh [FILE.cu ...]        default: every .cu file under csrc/gpu
#
# Needs clang 19 or newer and the HIP headers, no AMD GPU and no ROCm installation:
#   apt-get install clang-19 libamdhip64-dev
# Nothing is linked and no device library is read, so a pass means "HIP compiles it down to
# instructions", not "it was run".
#
# Environment: HIP_CLANG (clang++-19), HIP_ROOT (/usr), HIP_ARCHS, HIP_JOBS (2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HIP_CLANG="${HIP_CLANG:-clang++-19}" HIP_ROOT="${HIP_ROOT:-/usr}"
archs="${HIP_ARCHS:-gfx90a gfx942 gfx1100 gfx1201}"
jobs="${HIP_JOBS:-2}"
start=$SECONDS

die() { echo "hip_check: $*" >&2; exit 1; }

command -v "$HIP_CLANG" >/dev/null ||
  die "no $HIP_CLANG; install it with: apt-get install clang-19 libamdhip64-dev"
[[ -e $HIP_ROOT/include/hip/hip_runtime.h ]] ||
  die "no HIP headers in $HIP_ROOT/include; install them with: apt-get install libamdhip64-dev"

if (($#)); then
  files=("$@")
else
  mapfile -t files < <(find csrc/gpu -name '*.cu' | LC_ALL=C sort)
fi
((${#files[@]})) || die "no .cu files under csrc/gpu"
for file in "${files[@]}"; do
  [[ -f $file ]] || die "no such file: $file"
done

# One compilation. Its messages are printed in one piece, so that parallel jobs do not interleave.
compile() {
  local target=$1 file=$2 mode log
  # -S reaches the code generator: wrong inline assembly and too much shared memory are found there.
  if [[ $target == host ]]; then
    mode=(--offload-arch=gfx90a --offload-host-only -fsyntax-only)
  else
    mode=("--offload-arch=$target" --offload-device-only -S -o /dev/null)
  fi
  # A loop that could not be unrolled as asked (pass-failed) is worth reading, but no error.
  if log=$("$HIP_CLANG" -x hip "--rocm-path=$HIP_ROOT" -nogpulib -D__HIP_PLATFORM_AMD__=1 \
      -std=c++20 -O2 -ffp-contract=off -I include -I csrc \
      -Wall -Wextra -Werror -Wno-error=pass-failed "${mode[@]}" "$file" 2>&1); then
    [[ -z $log ]] || printf '%s\n' "$log"
  else
    printf 'FAILED %s %s\n%s\n' "$target" "$file" "$log"
    return 1
  fi
}
export -f compile

status=0
for target in $archs host; do
  for file in "${files[@]}"; do
    printf '%s\0%s\0' "$target" "$file"
  done
done | xargs -0 -n 2 -P "$jobs" bash -c 'compile "$@"' compile || status=1

summary="${#files[@]} files, $archs and host, $((SECONDS - start)) s"
((status == 0)) || die "FAILED: $summary"
echo "hip_check: passed: $summary"
