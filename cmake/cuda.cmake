# CUDA kernels for Hopper (sm_90a). Compiled wherever nvcc is present, with or without a GPU; left out,
# with a line that says so, where it is not. MOEBIUS_CUDA tells the rest of the build.
include(CheckLanguage)
set(MOEBIUS_CUDA OFF)
if(NOT MOEBIUS_SANITIZE AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(MOEBIUS_CUDA ON)
  endif()
endif()
if(MOEBIUS_CUDA)
  message(STATUS "CUDA ${CUDAToolkit_VERSION}: kernels/cuda is built for sm_90a")
  # CMake 3.25 does not know nvcc's flag for C++20.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  if(MOEBIUS_CCACHE)
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${MOEBIUS_CCACHE}")
  endif()
  # The row rule again: no contraction that depends on inlining; fma where the source says so.
  # Diagnostic 177: a variable that only some instances of a template use.
  add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;--expt-relaxed-constexpr;-Werror=all-warnings;-diag-suppress=177;-Xptxas=-warn-spills;-Xcompiler=-Wall;-Xcompiler=-ffp-contract=off>")

  # Identifies the kernels that a test or benchmark ran: SHA-256 over the names and contents of kernels/cuda
  # and of this file, which has the compiler's flags.
  file(GLOB_RECURSE cuda_files RELATIVE "${CMAKE_SOURCE_DIR}" CONFIGURE_DEPENDS
       "${CMAKE_SOURCE_DIR}/kernels/cuda/*.cu" "${CMAKE_SOURCE_DIR}/kernels/cuda/*.cuh"
       "${CMAKE_SOURCE_DIR}/kernels/cuda/*.h" "${CMAKE_SOURCE_DIR}/kernels/cuda/*.cc"
       "${CMAKE_SOURCE_DIR}/kernels/cuda/*.py" "${CMAKE_SOURCE_DIR}/kernels/cuda/CMakeLists.txt")
  list(APPEND cuda_files cmake/cuda.cmake)
  list(SORT cuda_files)
  set(cuda_digests "")
  foreach(cuda_file IN LISTS cuda_files)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/${cuda_file}")
    file(SHA256 "${CMAKE_SOURCE_DIR}/${cuda_file}" cuda_digest)
    string(APPEND cuda_digests "${cuda_file} ${cuda_digest}\n")
  endforeach()
  string(SHA256 MOEBIUS_CUDA_HASH "${cuda_digests}")
  string(SUBSTRING "${MOEBIUS_CUDA_HASH}" 0 16 MOEBIUS_CUDA_HASH)
else()
  message(STATUS "no CUDA compiler (or a sanitizer build): kernels/cuda is left out")
endif()

# moebius_cuda_library(NAME SRCS ... [DEPS ...]): like moebius_library; sources are .cu or .cc.
function(moebius_cuda_library name)
  moebius_library(${name} ${ARGN})
  target_link_libraries(${name} PUBLIC CUDA::cudart_static)
  add_dependencies(${name} cuda_generated)
endfunction()

# moebius_cuda_test(NAME SRCS ... [DEPS ...]): a gtest binary that needs a GPU and says so without one.
# All of them form the target cuda_tests, and the global property MOEBIUS_CUDA_TESTS names them.
add_custom_target(cuda_tests)
function(moebius_cuda_test name)
  moebius_test(${name} ${ARGN} LABELS cuda)
  target_link_libraries(${name} PRIVATE cuda_test_support)
  add_dependencies(cuda_tests ${name})
  set_property(GLOBAL APPEND PROPERTY MOEBIUS_CUDA_TESTS ${name})
  # gtest counts a skipped test as passed; ctest should not.
  set_tests_properties(${name} PROPERTIES SKIP_REGULAR_EXPRESSION "NOT TESTED ON GPU")
endfunction()
