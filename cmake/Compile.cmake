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
    target_link_options(${target} PRIVATE -fsanitize=address,undefined)
  endif()
endfunction()
