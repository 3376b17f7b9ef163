#include "memory_server/encoding.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "memory_server/message.h"

namespace memory3 {
namespace {

constexpr uint8_t kPutRow = 1;
constexpr uint8_t kTombstoneRow = 2;
constexpr size_t kMaxDocumentId = 512;
constexpr size_t kMaxTenant = 128;
// Bounds on what one entry may carry beside its record, so that a batch of entries stays small.
constexpr size_t kMaxTitle = 4096;
constexpr size_t kMaxUri = 8192;
constexpr size_t kMaxText = size_t{1} << 20;
constexpr size_t kMaxMetadataPairs = 64;
constexpr size_t kMaxMetadataKey = 256;
constexpr size_t kMaxMetadataValue = 4096;

std::string Shown(std::string_view v) {
  return Message("\"", absl::CHexEscape(std::string(v.substr(0, 64))), v.size() > 64 ? "…" : "",
                 "\"");
}

}  // namespace

void AppendBig32(std::string* key, uint32_t v) {
  for (int shift = 24; shift >= 0; shift -= 8) key->push_back(static_cast<char>(v >> shift));
}

void AppendBig64(std::string* key, uint64_t v) {
  for (int shift = 56; shift >= 0; shift -= 8) key->push_back(static_cast<char>(v >> shift));
}

uint64_t ReadBig64(const char* p) {
  uint64_t v = 0;
  for (int i = 0; i < 8; ++i) v = v << 8 | static_cast<uint8_t>(p[i]);
  return v;
}

std::string TenantPrefix(std::string_view tenant) {
  std::string key;
  key.push_back(static_cast<char>(tenant.size()));
  key.append(tenant);
  return key;
}

void AppendDocumentKey(std::string* key, std::string_view document_id) {
  for (char c : document_id) {
    key->push_back(c);
    if (c == '\0') key->push_back('\xff');
  }
  key->append("\0\x01", 2);
}

bool TakeDocumentKey(std::string_view* key, std::string* document_id) {
  document_id->clear();
  for (size_t i = 0; i < key->size(); ++i) {
    char c = (*key)[i];
    if (c != '\0') {
      document_id->push_back(c);
      continue;
    }
    if (++i == key->size()) return false;
    if ((*key)[i] == '\x01') {
      key->remove_prefix(i + 1);
      return true;
    }
    if ((*key)[i] != '\xff') return false;
    document_id->push_back('\0');
  }
  return false;
}

std::string EntrySuffix(std::string_view document_id, uint32_t ordinal) {
  std::string suffix;
  suffix.reserve(document_id.size() + 6);
  AppendDocumentKey(&suffix, document_id);
  AppendBig32(&suffix, ordinal);
  return suffix;
}

bool ParseEntrySuffix(std::string_view suffix, std::string* document_id, uint32_t* ordinal) {
  if (!TakeDocumentKey(&suffix, document_id) || suffix.size() != 4) return false;
  *ordinal = 0;
  for (char c : suffix) *ordinal = *ordinal << 8 | static_cast<uint8_t>(c);
  return true;
}

std::string_view DocumentKeyOf(std::string_view suffix) {
  return suffix.substr(0, suffix.size() - 4);
}

std::string PrefixEnd(std::string prefix) {
  while (!prefix.empty() && prefix.back() == '\xff') prefix.pop_back();
  if (!prefix.empty()) ++prefix.back();
  return prefix;
}

std::string EncodeEntryRow(const RecordId& id, uint64_t embedding_hash, uint64_t record_bytes,
                           const Source& source) {
  ByteWriter w;
  w.U8(kPutRow);
  w.Bytes(id.view());
  w.U64(embedding_hash);
  w.U64(record_bytes);
  w.U64(source.char_begin);
  w.U64(source.char_end);
  w.String(source.title);
  w.String(source.uri);
  w.U32(static_cast<uint32_t>(source.metadata.size()));
  for (const auto& [k, v] : source.metadata) {
    w.String(k);
    w.String(v);
  }
  return w.Take();
}

std::string EncodeTombstoneRow() { return std::string(1, static_cast<char>(kTombstoneRow)); }

bool DecodeEntryRow(std::string_view value, EntryRow* row) {
  ByteReader r(value);
  uint8_t kind = r.U8();
  *row = EntryRow();
  row->tombstone = kind == kTombstoneRow;
  if (row->tombstone) return r.done();
  if (kind != kPutRow) return false;
  row->record_id = r.Hash();
  row->embedding_hash = r.U64();
  row->record_bytes = r.U64();
  row->char_begin = r.U64();
  row->char_end = r.U64();
  row->title = r.String();
  row->uri = r.String();
  uint32_t pairs = r.U32();
  for (uint32_t i = 0; i < pairs && r.ok(); ++i) {
    std::string key(r.String());
    row->metadata[std::move(key)] = r.String();
  }
  return r.done();
}

bool DecodeEntryRowHead(std::string_view value, bool* tombstone, RecordId* id, uint64_t* hash) {
  ByteReader r(value);
  uint8_t kind = r.U8();
  *tombstone = kind == kTombstoneRow;
  if (*tombstone) return true;
  *id = r.Hash();
  *hash = r.U64();
  return kind == kPutRow && r.ok();
}

uint64_t EmbeddingHash(std::span<const float> embedding) {
  // Four lanes over 8-byte words, so that the multiplications overlap.
  constexpr uint64_t kOdd = 0xff51afd7ed558ccd;
  uint64_t lanes[4] = {0x9e3779b97f4a7c15 ^ embedding.size(), 1, 2, 3};
  const char* p = reinterpret_cast<const char*>(embedding.data());
  const size_t words = embedding.size() / 2;
  for (size_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, p + 8 * i, 8);
    uint64_t& h = lanes[i % 4];
    h = (h ^ word) * kOdd;
    h ^= h >> 32;
  }
  if (embedding.size() % 2 != 0) {
    uint32_t last;
    std::memcpy(&last, p + 8 * words, 4);
    lanes[3] = (lanes[3] ^ last) * kOdd;
  }
  uint64_t h = 0;
  for (uint64_t lane : lanes) {
    h = (h ^ lane) * kOdd;
    h ^= h >> 32;
  }
  return h;
}

void WriteSpec(const KnowledgeBaseSpec& spec, ByteWriter* w) {
  w->String(spec.name);
  w->Bytes(spec.writer_fingerprint.view());
  w->U32(static_cast<uint32_t>(spec.geometry.memory_layers.size()));
  for (uint32_t layer : spec.geometry.memory_layers) w->U32(layer);
  w->U32(spec.geometry.kv_heads);
  w->U32(spec.geometry.head_dim);
  w->U32(spec.geometry.tokens_kept);
  w->U32(spec.geometry.reference_tokens);
  w->U8(static_cast<uint8_t>(spec.codec));
  w->Bytes(spec.embedder_fingerprint.view());
  w->U32(spec.embedding_dimension);
  w->U8(static_cast<uint8_t>(spec.metric));
  w->String(spec.description);
}

bool ReadSpec(ByteReader* r, KnowledgeBaseSpec* spec) {
  spec->name = r->String();
  spec->writer_fingerprint = r->Hash();
  uint32_t layers = r->U32();
  for (uint32_t i = 0; i < layers && r->ok(); ++i) spec->geometry.memory_layers.push_back(r->U32());
  spec->geometry.kv_heads = r->U32();
  spec->geometry.head_dim = r->U32();
  spec->geometry.tokens_kept = r->U32();
  spec->geometry.reference_tokens = r->U32();
  spec->codec = static_cast<CodecId>(r->U8());
  spec->embedder_fingerprint = r->Hash();
  spec->embedding_dimension = r->U32();
  spec->metric = static_cast<Metric>(r->U8());
  spec->description = r->String();
  return r->ok();
}

absl::Status CheckName(std::string_view field, std::string_view name) {
  auto alnum = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
  };
  bool good = !name.empty() && name.size() <= 128 && alnum(name[0]) &&
              std::all_of(name.begin(), name.end(),
                          [&](char c) { return alnum(c) || c == '.' || c == '_' || c == '-'; });
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(
      Message(field, " ", Shown(name), " does not match [A-Za-z0-9][A-Za-z0-9._-]{0,127}"));
}

absl::Status CheckTenant(std::string_view tenant) {
  if (tenant.empty() || tenant.size() > kMaxTenant) {
    return absl::InvalidArgumentError(
        Message("tenant of ", tenant.size(), " bytes: 1 to ", kMaxTenant));
  }
  return absl::OkStatus();
}

absl::Status CheckSpec(const KnowledgeBaseSpec& spec) {
  if (absl::Status s = CheckName("name", spec.name); !s.ok()) return s;
  auto bad = [](auto&&... parts) { return absl::InvalidArgumentError(Message(parts...)); };
  if (spec.writer_fingerprint.is_zero()) return bad("writer_fingerprint is empty");
  if (spec.embedder_fingerprint.is_zero()) return bad("embedder_fingerprint is empty");
  const Geometry& g = spec.geometry;
  if (g.memory_layers.empty() || g.memory_layers.size() > 4096) {
    return bad("geometry.memory_layers has ", g.memory_layers.size(), " layers: 1 to 4096");
  }
  for (size_t i = 1; i < g.memory_layers.size(); ++i) {
    if (g.memory_layers[i] <= g.memory_layers[i - 1]) {
      return bad("geometry.memory_layers is not ascending at ", g.memory_layers[i]);
    }
  }
  struct {
    const char* name;
    uint32_t value;
    uint32_t max;
  } const fields[] = {{"kv_heads", g.kv_heads, 4096},
                      {"head_dim", g.head_dim, 4096},
                      {"tokens_kept", g.tokens_kept, 1 << 16},
                      {"reference_tokens", g.reference_tokens, 1 << 20}};
  for (const auto& f : fields) {
    if (f.value == 0 || f.value > f.max) {
      return bad("geometry.", f.name, " is ", f.value, ": 1 to ", f.max);
    }
  }
  if (g.tokens_kept > g.reference_tokens) {
    return bad("geometry.tokens_kept ", g.tokens_kept, " is above reference_tokens ",
               g.reference_tokens);
  }
  if (spec.codec < CodecId::kF32 || spec.codec > CodecId::kVq) {
    return bad("codec ", static_cast<int>(spec.codec), " is unknown");
  }
  if ((spec.codec == CodecId::kVq) == spec.codebook.empty()) {
    return bad("codebook: ", spec.codebook.empty() ? "missing for" : "given for another codec than",
               " CODEC_VQ");
  }
  if (spec.embedding_dimension == 0 || spec.embedding_dimension > kMaxEmbeddingDimension) {
    return bad("embedding_dimension is ", spec.embedding_dimension, ": 1 to ",
               kMaxEmbeddingDimension);
  }
  if (spec.metric != Metric::kCosine && spec.metric != Metric::kInnerProduct) {
    return bad("metric ", static_cast<int>(spec.metric), " is unknown");
  }
  if (!IsUtf8(spec.description) || spec.description.size() > 65536) {
    return bad("description: at most 65536 bytes of UTF-8");
  }
  return absl::OkStatus();
}

absl::Status CheckSource(const Source& s) {
  auto bad = [&s](auto&&... parts) {
    return absl::InvalidArgumentError(
        Message("entry (", Shown(s.document_id), ", ", s.ordinal, "): ", parts...));
  };
  if (s.document_id.empty() || s.document_id.size() > kMaxDocumentId || !IsUtf8(s.document_id)) {
    return bad("document_id of ", s.document_id.size(), " bytes: 1 to ", kMaxDocumentId,
               " bytes of UTF-8");
  }
  if (s.title.size() > kMaxTitle || !IsUtf8(s.title)) {
    return bad("title: at most ", kMaxTitle, " bytes of UTF-8");
  }
  if (s.uri.size() > kMaxUri || !IsUtf8(s.uri)) {
    return bad("uri: at most ", kMaxUri, " bytes of UTF-8");
  }
  if (s.text.size() > kMaxText || !IsUtf8(s.text)) {
    return bad("text: at most ", kMaxText, " bytes of UTF-8");
  }
  if (s.char_begin > s.char_end) {
    return bad("char_begin ", s.char_begin, " is above char_end ", s.char_end);
  }
  if (s.metadata.size() > kMaxMetadataPairs) {
    return bad("metadata has ", s.metadata.size(), " pairs: at most ", kMaxMetadataPairs);
  }
  for (const auto& [k, v] : s.metadata) {
    if (k.empty() || k.size() > kMaxMetadataKey || v.size() > kMaxMetadataValue || !IsUtf8(k) ||
        !IsUtf8(v)) {
      return bad("metadata ", Shown(k), ": key of 1 to ", kMaxMetadataKey,
                 " bytes, value of at most ", kMaxMetadataValue, ", UTF-8");
    }
  }
  return absl::OkStatus();
}

bool IsUtf8(std::string_view text) {
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  const uint8_t* end = p + text.size();
  while (p < end) {
    uint64_t eight;
    if (end - p >= 8 && (std::memcpy(&eight, p, 8), (eight & 0x8080808080808080) == 0)) {
      p += 8;
      continue;
    }
    if (*p < 0x80) {
      ++p;
      continue;
    }
    int more = *p >= 0xf0 ? 3 : *p >= 0xe0 ? 2 : 1;
    if (*p < 0xc2 || *p > 0xf4 || end - p <= more) return false;
    uint32_t code = *p & (0x3f >> more);
    for (int i = 1; i <= more; ++i) {
      if ((p[i] & 0xc0) != 0x80) return false;
      code = code << 6 | (p[i] & 0x3f);
    }
    if ((more == 2 && (code < 0x800 || (code >= 0xd800 && code < 0xe000))) ||
        (more == 3 && (code < 0x10000 || code > 0x10ffff))) {
      return false;
    }
    p += more + 1;
  }
  return true;
}

absl::Status CheckRelativePath(std::string_view field, std::string_view path) {
  bool good = !path.empty() && path.size() <= 1024 && path[0] != '/' &&
              path.find('\0') == std::string_view::npos;
  for (size_t begin = 0; begin <= path.size();) {
    size_t end = std::min(path.find('/', begin), path.size());
    std::string_view part = path.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") good = false;
    begin = end + 1;
  }
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(Message(
      field, " ", Shown(path), " is not a plain relative path (no \"..\", no leading slash)"));
}

}  // namespace memory3
