#include "inference_server/memory_source.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

std::string Hex(std::string_view fingerprint) {
  const absl::StatusOr<Hash256> hash = Hash256::FromBytes(fingerprint);
  return hash.ok() ? hash->ToHex() : absl::StrCat("of ", fingerprint.size(), " bytes");
}

}  // namespace

absl::Status CheckReadable(const v1::KnowledgeBaseSpec& spec, const ReaderIdentity& reader) {
  const std::string who = absl::StrCat("knowledge base \"", spec.name(), "\"");
  if (spec.writer_fingerprint() != reader.writer_fingerprint.view()) {
    return absl::FailedPreconditionError(
        absl::StrCat(who, " was written by model ", Hex(spec.writer_fingerprint()),
                     ", this server runs ", reader.writer_fingerprint.ToHex()));
  }
  if (spec.embedder_fingerprint() != reader.embedder_fingerprint.view() ||
      spec.embedding_dimension() != reader.embedding_dimension) {
    return absl::FailedPreconditionError(
        absl::StrCat(who, " was embedded by ", Hex(spec.embedder_fingerprint()), " into ",
                     spec.embedding_dimension(), " dimensions, this server embeds by ",
                     reader.embedder_fingerprint.ToHex(), " into ", reader.embedding_dimension));
  }
  const v1::Geometry &a = spec.geometry(), &b = reader.geometry;
  if (!std::equal(a.memory_layers().begin(), a.memory_layers().end(), b.memory_layers().begin(),
                  b.memory_layers().end()) ||
      a.kv_heads() != b.kv_heads() || a.head_dim() != b.head_dim() ||
      a.tokens_kept() != b.tokens_kept() || a.reference_tokens() != b.reference_tokens()) {
    return absl::FailedPreconditionError(absl::StrCat(who, " has geometry {", a.ShortDebugString(),
                                                      "}, the model's is {", b.ShortDebugString(),
                                                      "}"));
  }
  return absl::OkStatus();
}

}  // namespace memory3
