#include "trainer/knowledge_base_setup.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

using Stub = MemoryClient::Stub;

v1::Geometry GeometryOf(const WritingModel& model) {
  v1::Geometry geometry;
  const ExplicitMemoryConfig& memory = model.memory();
  for (const int layer : memory.memory_layers) geometry.add_memory_layers(layer);
  geometry.set_kv_heads(model.config().kv_heads);
  geometry.set_head_dim(model.config().head_dim);
  geometry.set_tokens_kept(memory.tokens_kept);
  geometry.set_reference_tokens(memory.reference_tokens);
  return geometry;
}

std::string Describe(const v1::Geometry& g) {
  std::string layers;
  for (const uint32_t layer : g.memory_layers())
    absl::StrAppend(&layers, layers.empty() ? "" : ",", layer);
  return absl::StrCat("layers ", layers, ", ", g.kv_heads(), " KV heads of ", g.head_dim(), ", ",
                      g.tokens_kept(), " of ", g.reference_tokens(), " tokens");
}

std::string Hex(const std::string& bytes) {
  const absl::StatusOr<Hash256> hash = Hash256::FromBytes(bytes);
  return hash.ok() ? hash->ToHex().substr(0, 16) : "?";
}

absl::Status Differs(const std::string& knowledge_base, const char* what, const std::string& theirs,
                     const std::string& ours) {
  return absl::FailedPreconditionError(absl::StrCat("knowledge base \"", knowledge_base, "\": its ",
                                                    what, " is ", theirs, ", here it is ", ours));
}

// proto and memory/codec.h number the codecs alike.
v1::Codec ToProto(CodecId id) { return static_cast<v1::Codec>(id); }

absl::Status CheckFits(const v1::KnowledgeBase& kb, const WritingModel& model,
                       const Embedder& embedder, const Codec& codec) {
  const v1::KnowledgeBaseSpec& spec = kb.spec();
  if (spec.writer_fingerprint() != model.fingerprint().view()) {
    return Differs(spec.name(), "writer fingerprint (model)", Hex(spec.writer_fingerprint()),
                   model.fingerprint().ToHex().substr(0, 16));
  }
  const std::string theirs = Describe(spec.geometry()), ours = Describe(GeometryOf(model));
  if (theirs != ours) return Differs(spec.name(), "geometry", theirs, ours);
  if (spec.codec() != ToProto(codec.id())) {
    const auto id = static_cast<CodecId>(spec.codec());
    return Differs(spec.name(), "codec", std::string(CodecName(id)),
                   std::string(CodecName(codec.id())));
  }
  if (codec.id() == CodecId::kVq && kb.codebook_hash() != codec.codebook_hash().view()) {
    return Differs(spec.name(), "codebook", Hex(kb.codebook_hash()),
                   codec.codebook_hash().ToHex().substr(0, 16));
  }
  if (spec.embedder_fingerprint() != embedder.fingerprint().view()) {
    return Differs(spec.name(), "embedder", Hex(spec.embedder_fingerprint()),
                   embedder.fingerprint().ToHex().substr(0, 16));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Codec>> CodecFor(const MemoryWritingOptions& options,
                                                const WritingModel& model,
                                                const v1::KnowledgeBase* knowledge_base) {
  CodecId id = CodecId::kBF16;
  if (options.codec) {
    id = *options.codec;
  } else if (knowledge_base != nullptr) {
    id = static_cast<CodecId>(knowledge_base->spec().codec());
  } else if (!options.codebook.empty()) {
    id = CodecId::kVq;
  }
  std::string_view codebook = options.codebook;
  if (id == CodecId::kVq && codebook.empty()) {
    if (knowledge_base != nullptr) codebook = knowledge_base->spec().codebook();
    if (codebook.empty()) {
      return absl::InvalidArgumentError(
          "codec vq needs a codebook (trainer codec makes one): --codebook");
    }
  }
  if (id != CodecId::kVq && !codebook.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a codebook is given, but the codec is ", std::string(CodecName(id))));
  }
  return MakeCodec(id, model.config().head_dim, codebook);
}

absl::StatusOr<TargetKnowledgeBase> OpenOrCreateKnowledgeBase(const MemoryWritingOptions& options,
                                                              const WritingModel& model,
                                                              const Embedder& embedder,
                                                              MemoryClient* client) {
  v1::GetKnowledgeBaseRequest get;
  get.set_knowledge_base(options.knowledge_base);
  get.set_with_codebook(options.codebook.empty());
  const auto found = client->Call(&Stub::GetKnowledgeBase, get);
  TargetKnowledgeBase target;
  if (!found.ok() && !absl::IsNotFound(found.status())) return found.status();
  const v1::KnowledgeBase* existing = found.ok() ? &found->knowledge_base() : nullptr;
  absl::StatusOr<std::unique_ptr<Codec>> codec = CodecFor(options, model, existing);
  if (!codec.ok()) return codec.status();
  target.codec = *std::move(codec);
  if (existing != nullptr) {
    target.has_records = existing->records() > 0;
    if (absl::Status s = CheckFits(*existing, model, embedder, *target.codec); !s.ok()) return s;
    return target;
  }
  v1::CreateKnowledgeBaseRequest create;
  create.set_if_not_exists(true);  // another shard may be making it
  v1::KnowledgeBaseSpec& spec = *create.mutable_spec();
  spec.set_name(options.knowledge_base);
  spec.set_description(options.description);
  spec.set_writer_fingerprint(std::string(model.fingerprint().view()));
  *spec.mutable_geometry() = GeometryOf(model);
  spec.set_codec(ToProto(target.codec->id()));
  if (target.codec->id() == CodecId::kVq) spec.set_codebook(options.codebook);
  spec.set_embedder_fingerprint(std::string(embedder.fingerprint().view()));
  spec.set_embedding_dimension(embedder.dimension());
  const auto created = client->Call(&Stub::CreateKnowledgeBase, create);
  if (!created.ok()) return created.status();
  return target;
}

}  // namespace memory3
