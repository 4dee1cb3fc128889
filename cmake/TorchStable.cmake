# Finds torch's stable C++ interface without importing torch and without find_package(Torch),
# which asks for a CUDA toolkit whenever torch was built with one.
#
# Looked at in this order: -DTORCH_STABLE_DIR=<.../site-packages/torch>; torch in the running
# Python; torch beside that interpreter (pip's isolated builds hide the environment they run in,
# but sys.prefix still names it).
#
# Gives: target torch_stable; TORCH_STABLE_DIR, TORCH_STABLE_VERSION, TORCH_STABLE_CUDA,
# TORCH_STABLE_HIP (versions or empty).

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

set(TORCH_STABLE_DIR "" CACHE PATH "Folder of the installed torch package")

if(NOT TORCH_STABLE_DIR)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util as u, pathlib as p, sys, sysconfig
spec = u.find_spec('torch')
prefixes = [] if spec is None else [p.Path(spec.origin).parent]
for key in ('platlib', 'purelib'):
    prefixes.append(p.Path(sysconfig.get_path(key, vars={'base': sys.prefix, 'platbase': sys.prefix})) / 'torch')
print(next((d.as_posix() for d in prefixes if (d / 'include/torch/csrc/stable').is_dir()), ''))"
    OUTPUT_VARIABLE found
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(TORCH_STABLE_DIR "${found}" CACHE PATH "Folder of the installed torch package" FORCE)
endif()

if(NOT EXISTS "${TORCH_STABLE_DIR}/include/torch/csrc/stable/library.h")
  message(
    FATAL_ERROR
      "bitsandbytes compiles against an installed PyTorch of version 2.10 or newer and found none "
      "for ${Python_EXECUTABLE}. Install it in this environment (pip install 'torch>=2.10') and "
      "run pip install again, with --no-build-isolation if your tool builds in an environment of "
      "its own, or give its folder: -C cmake.define.TORCH_STABLE_DIR=/path/to/site-packages/torch")
endif()

file(STRINGS "${TORCH_STABLE_DIR}/version.py" lines REGEX "^(__version__|cuda|hip)")
foreach(name IN ITEMS __version__ cuda hip)
  set(value "")
  foreach(line IN LISTS lines)
    if(line MATCHES "^${name}[^=]*= *'([^']*)'")
      set(value "${CMAKE_MATCH_1}")
    endif()
  endforeach()
  set(torch_${name} "${value}")
endforeach()
set(TORCH_STABLE_VERSION "${torch___version__}")
set(TORCH_STABLE_CUDA "${torch_cuda}")
set(TORCH_STABLE_HIP "${torch_hip}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" short "${TORCH_STABLE_VERSION}")
if(short VERSION_LESS 2.10)
  message(FATAL_ERROR "bitsandbytes needs PyTorch 2.10 or newer, got ${TORCH_STABLE_VERSION} in "
                      "${TORCH_STABLE_DIR}. Upgrade it: pip install -U 'torch>=2.10'")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_STABLE_DIR}/include")
# The oldest interface that carries what the ops need; the binary runs in every later torch.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# libtorch.so is a stub that brings libtorch_cuda where torch has it. Nothing refers to its symbols
# at link time, so it is kept explicitly.
target_link_libraries(
  torch_stable INTERFACE -Wl,--no-as-needed "${TORCH_STABLE_DIR}/lib/libtorch.so"
                         "${TORCH_STABLE_DIR}/lib/libtorch_cpu.so" -Wl,--as-needed)
message(STATUS "torch ${TORCH_STABLE_VERSION} in ${TORCH_STABLE_DIR}")
