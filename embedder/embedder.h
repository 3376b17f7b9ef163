// Text → retrieval vector, for the memory writer, the inference server, the trainer and the command
// line alike. A knowledge base keeps the fingerprint of the embedder that filled it; queries
// embedded by another one are refused.
//
// Thread-safety: an Embedder is immutable after construction; any method from any thread.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/hash.h"

namespace memory3 {

class Embedder {
 public:
  virtual ~Embedder() = default;

  virtual int dimension() const = 0;
  // Everything that changes a vector: the method and its version, its tables or weights, its
  // settings. Not the number of threads.
  virtual const Hash256& fingerprint() const = 0;
  // Writes one vector of L2 norm 1 a text to `out`, [texts, dimension] row-major. A text without a
  // single word gives zeros where the embedder has nothing to say of it (lexical). Any bytes are
  // accepted. A text's vector does not depend on the others of its batch beyond rounding (lexical:
  // not at all). Errors: INVALID_ARGUMENT where out's size is not texts.size() · dimension().
  virtual absl::Status Embed(std::span<const std::string_view> texts,
                             std::span<float> out) const = 0;

  // One text.
  absl::StatusOr<std::vector<float>> EmbedOne(std::string_view text) const;
};

struct EmbedderOptions {
  // Threads that one Embed call of a neural embedder may use. Default: 0, all cores of the machine.
  int threads = 0;
};

// `spec`:
//   lexical       the lexical embedder with the table shipped in models/lexical
//   (DefaultModelDirectory) lexical:DIR   the same with DIR/idf.bin bert:DIR      a BERT or
//   XLM-RoBERTa directory in Hugging Face's layout
// Errors: INVALID_ARGUMENT names an unknown kind, or the file and field at fault; NOT_FOUND the
// file.
absl::StatusOr<std::unique_ptr<Embedder>> MakeEmbedder(std::string_view spec,
                                                       const EmbedderOptions& options = {});

// Where models/NAME lies: $MEMORY3_MODELS/NAME; models/NAME under the working directory, beside the
// running program's directory (an installation) or above it (a build tree). NOT_FOUND lists these.
absl::StatusOr<std::string> DefaultModelDirectory(std::string_view name);

}  // namespace memory3
