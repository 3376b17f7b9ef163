#include "memory_server/conversions.h"

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

absl::StatusOr<Hash256> HashFromProto(std::string_view bytes, std::string_view field) {
  absl::StatusOr<Hash256> hash = Hash256::FromBytes(bytes);
  if (hash.ok()) return hash;
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(field), " must be 32 bytes, not ", bytes.size()));
}

v1::Codec ToProto(CodecId codec) {
  switch (codec) {
    case CodecId::kF32:
      return v1::CODEC_F32;
    case CodecId::kBF16:
      return v1::CODEC_BF16;
    case CodecId::kInt8:
      return v1::CODEC_INT8;
    case CodecId::kVq:
      return v1::CODEC_VQ;
  }
  return v1::CODEC_UNSPECIFIED;
}

}  // namespace

std::optional<CodecId> FromProto(v1::Codec codec) {
  switch (codec) {
    case v1::CODEC_F32:
      return CodecId::kF32;
    case v1::CODEC_BF16:
      return CodecId::kBF16;
    case v1::CODEC_INT8:
      return CodecId::kInt8;
    case v1::CODEC_VQ:
      return CodecId::kVq;
    default:
      return std::nullopt;
  }
}

google::protobuf::Timestamp ToProto(absl::Time time) {
  google::protobuf::Timestamp proto;
  const int64_t seconds = absl::ToUnixSeconds(time);
  proto.set_seconds(seconds);
  proto.set_nanos(
      static_cast<int32_t>(absl::ToInt64Nanoseconds(time - absl::FromUnixSeconds(seconds))));
  return proto;
}

google::protobuf::Duration ToProto(absl::Duration duration) {
  google::protobuf::Duration proto;
  absl::Duration rest;
  proto.set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &rest));
  proto.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(rest)));
  return proto;
}

absl::Duration FromProto(const google::protobuf::Duration& duration) {
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

absl::StatusOr<RecordId> RecordIdFromProto(std::string_view bytes, std::string_view field) {
  return HashFromProto(bytes, field);
}

absl::StatusOr<std::vector<RecordId>> RecordIdsFromProto(std::string_view bytes,
                                                         std::string_view field) {
  constexpr size_t kSize = sizeof(RecordId::bytes);
  if (bytes.size() % kSize != 0) {
    return absl::InvalidArgumentError(absl::StrCat(std::string(field),
                                                   " must hold ids of 32 bytes each, but is ",
                                                   bytes.size(), " bytes long"));
  }
  std::vector<RecordId> ids(bytes.size() / kSize);
  for (size_t i = 0; i < ids.size(); ++i) {
    std::copy_n(bytes.data() + i * kSize, kSize, reinterpret_cast<char*>(ids[i].bytes.data()));
  }
  return ids;
}

absl::StatusOr<KnowledgeBaseSpec> FromProto(const v1::KnowledgeBaseSpec& proto) {
  KnowledgeBaseSpec spec;
  spec.name = proto.name();
  absl::StatusOr<Hash256> writer =
      HashFromProto(proto.writer_fingerprint(), "spec.writer_fingerprint");
  if (!writer.ok()) return writer.status();
  spec.writer_fingerprint = *writer;
  absl::StatusOr<Hash256> embedder =
      HashFromProto(proto.embedder_fingerprint(), "spec.embedder_fingerprint");
  if (!embedder.ok()) return embedder.status();
  spec.embedder_fingerprint = *embedder;
  const std::optional<CodecId> codec = FromProto(proto.codec());
  if (!codec) {
    return absl::InvalidArgumentError(absl::StrCat("spec.codec must be f32, bf16, int8 or vq, not ",
                                                   static_cast<int>(proto.codec())));
  }
  spec.codec = *codec;
  switch (proto.metric()) {
    case v1::METRIC_UNSPECIFIED:
    case v1::METRIC_COSINE:
      spec.metric = Metric::kCosine;
      break;
    case v1::METRIC_INNER_PRODUCT:
      spec.metric = Metric::kInnerProduct;
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          "spec.metric must be cosine or inner product, not ", static_cast<int>(proto.metric())));
  }
  const v1::Geometry& geometry = proto.geometry();
  spec.geometry.memory_layers.assign(geometry.memory_layers().begin(),
                                     geometry.memory_layers().end());
  spec.geometry.kv_heads = geometry.kv_heads();
  spec.geometry.head_dim = geometry.head_dim();
  spec.geometry.tokens_kept = geometry.tokens_kept();
  spec.geometry.reference_tokens = geometry.reference_tokens();
  spec.codebook = proto.codebook();
  spec.embedding_dimension = proto.embedding_dimension();
  spec.description = proto.description();
  return spec;
}

v1::KnowledgeBaseSpec ToProto(const KnowledgeBaseSpec& spec) {
  v1::KnowledgeBaseSpec proto;
  proto.set_name(spec.name);
  proto.set_writer_fingerprint(std::string(spec.writer_fingerprint.view()));
  v1::Geometry& geometry = *proto.mutable_geometry();
  for (const uint32_t layer : spec.geometry.memory_layers) geometry.add_memory_layers(layer);
  geometry.set_kv_heads(spec.geometry.kv_heads);
  geometry.set_head_dim(spec.geometry.head_dim);
  geometry.set_tokens_kept(spec.geometry.tokens_kept);
  geometry.set_reference_tokens(spec.geometry.reference_tokens);
  proto.set_codec(ToProto(spec.codec));
  proto.set_codebook(spec.codebook);
  proto.set_embedder_fingerprint(std::string(spec.embedder_fingerprint.view()));
  proto.set_embedding_dimension(spec.embedding_dimension);
  proto.set_metric(spec.metric == Metric::kCosine ? v1::METRIC_COSINE : v1::METRIC_INNER_PRODUCT);
  proto.set_description(spec.description);
  return proto;
}

v1::KnowledgeBase ToProto(const KnowledgeBaseInfo& info) {
  v1::KnowledgeBase proto;
  *proto.mutable_spec() = ToProto(info.spec);
  if (!info.codebook_hash.is_zero())
    proto.set_codebook_hash(std::string(info.codebook_hash.view()));
  proto.set_version(info.version);
  proto.set_entries(info.entries);
  proto.set_records(info.records);
  proto.set_documents(info.documents);
  proto.set_bytes_per_reference(info.bytes_per_reference);
  *proto.mutable_created_at() = ToProto(info.created_at);
  *proto.mutable_published_at() = ToProto(info.published_at);
  for (const std::string& alias : info.aliases) proto.add_aliases(alias);
  proto.set_index(info.index);
  return proto;
}

v1::Version ToProto(const VersionInfo& info) {
  v1::Version proto;
  proto.set_version(info.version);
  proto.set_published(info.published);
  proto.set_entries(info.entries);
  proto.set_records(info.records);
  *proto.mutable_published_at() = ToProto(info.published_at);
  proto.set_pins(info.pins);
  return proto;
}

v1::Source ToProto(const Source& source) {
  v1::Source proto;
  proto.set_document_id(source.document_id);
  proto.set_ordinal(source.ordinal);
  proto.set_title(source.title);
  proto.set_uri(source.uri);
  proto.set_char_begin(source.char_begin);
  proto.set_char_end(source.char_end);
  proto.set_text(source.text);
  proto.mutable_metadata()->insert(source.metadata.begin(), source.metadata.end());
  return proto;
}

Source FromProto(const v1::Source& proto) {
  Source source;
  source.document_id = proto.document_id();
  source.ordinal = proto.ordinal();
  source.title = proto.title();
  source.uri = proto.uri();
  source.char_begin = proto.char_begin();
  source.char_end = proto.char_end();
  source.text = proto.text();
  source.metadata.insert(proto.metadata().begin(), proto.metadata().end());
  return source;
}

Filter FromProto(const v1::Filter& proto) {
  Filter filter;
  filter.document_ids.assign(proto.document_ids().begin(), proto.document_ids().end());
  filter.metadata.insert(proto.metadata().begin(), proto.metadata().end());
  return filter;
}

v1::Document ToProto(const DocumentInfo& info) {
  v1::Document proto;
  proto.set_document_id(info.document_id);
  proto.set_title(info.title);
  proto.set_uri(info.uri);
  proto.set_entries(info.entries);
  return proto;
}

v1::Load ToProto(const LoadInfo& info) {
  v1::Load proto;
  proto.set_load_id(info.load_id);
  proto.set_knowledge_base(info.knowledge_base);
  proto.set_idempotency_key(info.idempotency_key);
  proto.set_mode(info.mode == LoadMode::kAppend ? v1::LOAD_MODE_APPEND : v1::LOAD_MODE_REPLACE);
  proto.set_state(static_cast<v1::LoadState>(info.state));  // the same numbers
  proto.set_entries(info.entries);
  proto.set_bytes(info.bytes);
  if (info.expected_entries) proto.set_expected_entries(*info.expected_entries);
  proto.set_entries_per_second(info.entries_per_second);
  proto.set_bytes_per_second(info.bytes_per_second);
  if (info.time_left) *proto.mutable_time_left() = ToProto(*info.time_left);
  proto.set_indexing_fraction(info.indexing_fraction);
  proto.set_failure(info.failure);
  proto.set_version(info.version);
  *proto.mutable_begun_at() = ToProto(info.begun_at);
  if (info.ended_at != absl::InfiniteFuture()) *proto.mutable_ended_at() = ToProto(info.ended_at);
  return proto;
}

v1::Snapshot ToProto(const SnapshotInfo& info) {
  v1::Snapshot proto;
  proto.set_name(info.name);
  *proto.mutable_created_at() = ToProto(info.created_at);
  proto.set_bytes(info.bytes);
  proto.set_manifest_sha256(std::string(info.manifest_sha256.view()));
  return proto;
}

}  // namespace memory3
