// Writing memories from the command line: the flags of `memory3 kb create` and `memory3 load`, and
// a load with one line of progress.
//
// Thread-safety: the main thread.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "cli/session.h"
#include "embedder/embedder.h"
#include "trainer/memory_writing.h"
#include "trainer/writing_model.h"

namespace memory3 {

struct WritingFlags {
  std::string model, embedder = "lexical", codec, codebook;
  std::string device = "cpu", weights = "f32";
  int threads = 0;  // 0: one per core
  MemoryWritingOptions writing;

  void AddTo(CLI::App& command);
};

// `flags.writing` with what the other flags say filled in.
absl::StatusOr<MemoryWritingOptions> ToOptions(const WritingFlags& flags);

// Loads `flags.writing.inputs` into the knowledge base; `quiet`: without a line of progress.
absl::StatusOr<MemoryWritingResult> LoadDocuments(const Session& session, const WritingFlags& flags,
                                                  bool quiet);

}  // namespace memory3
