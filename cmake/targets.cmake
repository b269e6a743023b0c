# moebius_library(NAME [SRCS ...] [DEPS ...]): a static library (interface if it has no sources).
function(moebius_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  if(ARG_SRCS)
    add_library(${name} STATIC ${ARG_SRCS})
    target_include_directories(${name} PUBLIC "${CMAKE_SOURCE_DIR}" "${CMAKE_BINARY_DIR}")
    target_link_libraries(${name} PUBLIC ${ARG_DEPS})
  else()
    add_library(${name} INTERFACE)
    target_include_directories(${name} INTERFACE "${CMAKE_SOURCE_DIR}" "${CMAKE_BINARY_DIR}")
    target_link_libraries(${name} INTERFACE ${ARG_DEPS})
  endif()
endfunction()

# What the sanitizer presets build: tests labelled `parser` (bytes from outside; ASan+UBSan) and
# `threaded` (runtime and router; TSan).
add_custom_target(parser_tests)
add_custom_target(threaded_tests)

# Gives test `name` its labels and puts it into the targets above.
function(moebius_label_test name)
  set_tests_properties(${name} PROPERTIES LABELS "${ARGN}")
  foreach(label IN ITEMS parser threaded)
    if(label IN_LIST ARGN)
      add_dependencies(${label}_tests ${name})
    endif()
  endforeach()
endfunction()

# moebius_test(NAME SRCS ... [DEPS ...] [TIMEOUT seconds] [LABELS ...]): one gtest binary, one ctest
# entry. LABELS: parser, threaded (above). Extra DEFINES reach the sources. MOEBIUS_SOURCE_DIR names the checkout for fixtures.
function(moebius_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS;LABELS;DEFINES" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_include_directories(${name} PRIVATE "${CMAKE_SOURCE_DIR}" "${CMAKE_BINARY_DIR}")
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} GTest::gmock GTest::gtest GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE MOEBIUS_SOURCE_DIR="${CMAKE_SOURCE_DIR}" ${ARG_DEFINES})
  add_test(NAME ${name} COMMAND ${name})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT})
  moebius_label_test(${name} ${ARG_LABELS})
endfunction()

# moebius_fuzz(NAME SRC file DEPS ... [CORPUS dir]): a fuzz target exporting LLVMFuzzerTestOneInput.
# It is built with our own driver (tests/fuzz/driver.cc), which replays the corpus and a fixed number
# of seeded mutations, so that ctest runs it everywhere, under ASan too; `./dev fuzz` builds the same
# file with clang's libFuzzer.
option(MOEBIUS_LIBFUZZER "Link fuzz targets with clang's libFuzzer" OFF)
function(moebius_fuzz name)
  cmake_parse_arguments(ARG "" "SRC;CORPUS" "DEPS" ${ARGN})
  if(MOEBIUS_LIBFUZZER)
    add_executable(${name} ${ARG_SRC})
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  else()
    add_executable(${name} ${ARG_SRC} "${CMAKE_SOURCE_DIR}/tests/fuzz/driver.cc")
  endif()
  target_include_directories(${name} PRIVATE "${CMAKE_SOURCE_DIR}" "${CMAKE_BINARY_DIR}")
  target_link_libraries(${name} PRIVATE ${ARG_DEPS})
  add_test(NAME ${name} COMMAND ${name} ${ARG_CORPUS} -runs=20000)
  set_tests_properties(${name} PROPERTIES TIMEOUT 300)
  moebius_label_test(${name} fuzz parser)
endfunction()
