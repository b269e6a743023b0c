# Compiler settings shared by every target. Warnings are errors.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

# $<COMPILE_LANGUAGE:CXX>: nvcc has its own spelling, in cuda.cmake.
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror;-Wshadow=local;-Wno-missing-field-initializers>")
# The row rule: g++ contracts a*b+c into fma by default, which would make bits depend on inlining.
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off;-fstack-protector-strong>")
if(CMAKE_BUILD_TYPE STREQUAL "Release" AND NOT MOEBIUS_SANITIZE)
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=2>")
endif()
# CHECK is ours and always on; NDEBUG only silences assert() in third-party headers.

if(MOEBIUS_SANITIZE)
  add_compile_options(-fsanitize=${MOEBIUS_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${MOEBIUS_SANITIZE})
  # g++ 12 reports false positives of these warnings under sanitizers.
  add_compile_options(-Wno-maybe-uninitialized -Wno-tsan -Wno-stringop-overflow)
endif()

find_program(MOEBIUS_CCACHE ccache)
if(MOEBIUS_CCACHE)
  set(CMAKE_C_COMPILER_LAUNCHER "${MOEBIUS_CCACHE}")
  set(CMAKE_CXX_COMPILER_LAUNCHER "${MOEBIUS_CCACHE}")
endif()
find_program(MOEBIUS_MOLD mold)
if(MOEBIUS_MOLD)
  add_link_options(-fuse-ld=mold)
endif()
