# The project's own shorthand: a room is a library, its tests stand beside it.
include(GoogleTest)

# memory3_library(NAME SOURCES… DEPS targets… [PRIVATE_DEPS targets…])
function(memory3_library name)
  cmake_parse_arguments(L "" "" "SOURCES;DEPS;PRIVATE_DEPS" ${ARGN})
  add_library(${name} STATIC ${L_SOURCES})
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PUBLIC memory3_flags ${L_DEPS} PRIVATE ${L_PRIVATE_DEPS})
endfunction()

# memory3_binary(NAME SOURCES… DEPS targets…)
function(memory3_binary name)
  cmake_parse_arguments(B "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${B_SOURCES})
  target_link_libraries(${name} PRIVATE memory3_flags ${B_DEPS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
endfunction()

# memory3_test(NAME SOURCES… DEPS targets… [TIMEOUT seconds] [LABELS …]): one ctest entry a case. Its
# labels are `unit` and those given (`concurrent` is what TSan is for); the target LABEL_tests builds
# the tests of a label and nothing else.
function(memory3_test name)
  cmake_parse_arguments(T "" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 120)
  endif()
  add_executable(${name} ${T_SOURCES})
  target_link_libraries(${name} PRIVATE memory3_flags ${T_DEPS} GTest::gmock GTest::gtest_main)
  target_compile_options(${name} PRIVATE $<$<CONFIG:Release>:-O1>)  # what they test stays as it is
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  foreach(label unit ${T_LABELS})
    if(NOT TARGET ${label}_tests)
      add_custom_target(${label}_tests)
    endif()
    add_dependencies(${label}_tests ${name})
  endforeach()
  gtest_discover_tests(${name}
    DISCOVERY_MODE PRE_TEST
    WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    PROPERTIES TIMEOUT ${T_TIMEOUT} LABELS "unit;${T_LABELS}")
endfunction()

# memory3_benchmark(NAME SOURCES… DEPS targets…): run by bench/run, writes build/bench/NAME.json.
function(memory3_benchmark name)
  cmake_parse_arguments(B "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(bench_${name} ${B_SOURCES})
  target_link_libraries(bench_${name} PRIVATE memory3_flags ${B_DEPS})
  set_target_properties(bench_${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bench
                                                 OUTPUT_NAME ${name})
endfunction()

# memory3_fuzzer(NAME SOURCES… DEPS targets… [SEEDS globs…]): built by the fuzz preset only, with target
# `fuzzers`; starts from copies of the files that SEEDS match, in BUILD/fuzz/seeds/NAME.
function(memory3_fuzzer name)
  if(NOT MEMORY3_FUZZ)
    return()
  endif()
  cmake_parse_arguments(F "" "" "SOURCES;DEPS;SEEDS" ${ARGN})
  add_executable(${name} ${F_SOURCES})
  target_link_libraries(${name} PRIVATE memory3_flags ${F_DEPS})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fuzz)
  if(NOT TARGET fuzzers)
    add_custom_target(fuzzers)
  endif()
  add_dependencies(fuzzers ${name})
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/fuzz/seeds/${name})
  set(count 0)
  foreach(pattern IN LISTS F_SEEDS)
    file(GLOB seeds CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${pattern})
    foreach(seed IN LISTS seeds)
      configure_file(${seed} ${CMAKE_BINARY_DIR}/fuzz/seeds/${name}/${count} COPYONLY)
      math(EXPR count "${count} + 1")
    endforeach()
  endforeach()
  if(F_SEEDS AND count EQUAL 0)
    message(FATAL_ERROR "${name}: no file matches ${F_SEEDS}")
  endif()
endfunction()
