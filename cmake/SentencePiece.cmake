# memory3_sentencepiece: SentencePiece's library as programs can have it beside libprotobuf. Debian's
# carries a Protobuf of its own, of another version, and exports its symbols; in a program that loads
# both, whichever comes first is used by both, and dies. So this is a copy that keeps its own to
# itself (isolate_library.cc), in BUILD/lib, found by the programs' rpath; installations carry it.
find_library(SENTENCEPIECE_LIBRARY sentencepiece REQUIRED)
add_executable(isolate_library ${CMAKE_CURRENT_LIST_DIR}/isolate_library.cc)
target_link_libraries(isolate_library PRIVATE memory3_flags)
set(copy ${CMAKE_BINARY_DIR}/lib/libm3sentencepiece.so)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
# As mangled names spell google::protobuf.
add_custom_command(OUTPUT ${copy}
  COMMAND isolate_library ${SENTENCEPIECE_LIBRARY} ${copy} libm3sentencepiece.so 6google8protobuf
  DEPENDS isolate_library ${SENTENCEPIECE_LIBRARY} VERBATIM)
add_custom_target(memory3_sentencepiece_copy DEPENDS ${copy})
add_library(memory3_sentencepiece SHARED IMPORTED GLOBAL)
set_target_properties(memory3_sentencepiece PROPERTIES IMPORTED_LOCATION ${copy})
target_include_directories(memory3_sentencepiece INTERFACE ${SentencePiece_INCLUDE_DIRS})
add_dependencies(memory3_sentencepiece memory3_sentencepiece_copy)
