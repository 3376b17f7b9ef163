# memory3_sentencepiece: SentencePiece's library as programs can have it beside libprotobuf (why and
# how: bind_own_symbols.cc). A copy in BUILD/lib, found by the programs' rpath; installations carry it.
find_library(SENTENCEPIECE_LIBRARY sentencepiece REQUIRED)
add_executable(bind_own_symbols ${CMAKE_CURRENT_LIST_DIR}/bind_own_symbols.cc)
target_link_libraries(bind_own_symbols PRIVATE memory3_flags)
# Nor may programs find its Protobuf where they look for libprotobuf's, whichever was linked first.
add_executable(hide_protobuf ${CMAKE_CURRENT_LIST_DIR}/hide_protobuf.cc)
target_link_libraries(hide_protobuf PRIVATE memory3_flags)
set(copy ${CMAKE_BINARY_DIR}/lib/libm3sentencepiece.so)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
add_custom_command(OUTPUT ${copy}
  COMMAND bind_own_symbols ${SENTENCEPIECE_LIBRARY} ${copy} libm3sentencepiece.so
  COMMAND hide_protobuf ${copy} ${copy}
  DEPENDS bind_own_symbols hide_protobuf ${SENTENCEPIECE_LIBRARY} VERBATIM)
add_custom_target(memory3_sentencepiece_copy DEPENDS ${copy})
add_library(memory3_sentencepiece SHARED IMPORTED GLOBAL)
set_target_properties(memory3_sentencepiece PROPERTIES IMPORTED_LOCATION ${copy})
target_include_directories(memory3_sentencepiece INTERFACE ${SentencePiece_INCLUDE_DIRS})
add_dependencies(memory3_sentencepiece memory3_sentencepiece_copy)
