# bnb_target(<target>): the compile settings that every target of this project shares.
function(bnb_target target)
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/include"
                                               "${PROJECT_SOURCE_DIR}/csrc")
  # Spelled as a flag: CMake 3.25 does not know C++20 for nvcc, and CUDA would inherit the standard.
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX,CUDA>:-std=c++20>)
  # Fused multiply-adds are spelled where they are meant, so that every device rounds alike.
  target_compile_options(
    ${target}
    PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall
            -Wextra
            -ffp-contract=off
            -fno-math-errno
            -fno-trapping-math
            -ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>)
  if(BNB_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
  if(BNB_SANITIZE)
    set(flags -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${flags}>)
    # Programs must load the sanitizers before this library does.
    target_link_options(${target} PUBLIC -fsanitize=address,undefined)
  endif()
endfunction()

# bnb_gpu_target(<target> <file.cu>...): the same for a target with GPU code, in the language of
# BNB_BACKEND and with its runtime.
function(bnb_gpu_target target)
  bnb_target(${target})
  if(BNB_BACKEND STREQUAL "cuda")
    target_compile_options(
      ${target}
      PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false
              -Xcompiler=-Wall,-Wextra,-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=
              $<$<BOOL:${BNB_WERROR}>:-Werror=all-warnings>>)
    target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  else()
    set_source_files_properties(${ARGN} PROPERTIES LANGUAGE HIP)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:HIP>:-ffp-contract=off>)
    target_link_libraries(${target} PRIVATE hip::host)
  endif()
endfunction()

# bnb_public_target(<target>): a library that C++ programs link to, as bitsandbytes::<name> where
# <target> is bitsandbytes_<name>. Its functions are visible, and bring their headers.
function(bnb_public_target target)
  string(REPLACE "bitsandbytes_" "" name ${target})
  add_library(bitsandbytes::${name} ALIAS ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name} CXX_VISIBILITY_PRESET default)
  target_compile_features(${target} INTERFACE cxx_std_20)
  target_include_directories(${target} INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
                                                 $<INSTALL_INTERFACE:include>)
endfunction()
