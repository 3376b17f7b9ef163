#include "embedder/sentencepiece_model.h"

#include <cstring>

#include "sentencepiece_processor.h"

namespace memory3 {
namespace {

// The few pieces of protobuf's encoding that a ModelProto needs (sentencepiece_model.proto).
void PutVarint(uint64_t v, std::string* out) {
  for (; v >= 0x80; v >>= 7) out->push_back(static_cast<char>(v | 0x80));
  out->push_back(static_cast<char>(v));
}
void PutInt(int field, uint64_t v, std::string* out) {
  PutVarint(field << 3, out);
  PutVarint(v, out);
}
void PutBytes(int field, const std::string& bytes, std::string* out) {
  PutVarint(field << 3 | 2, out);
  PutVarint(bytes.size(), out);
  *out += bytes;
}
void PutFloat(int field, float v, std::string* out) {
  PutVarint(field << 3 | 5, out);
  char bytes[4];
  std::memcpy(bytes, &v, 4);
  out->append(bytes, 4);
}

}  // namespace

struct UnigramModel::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

UnigramModel::UnigramModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
UnigramModel::~UnigramModel() = default;

std::unique_ptr<UnigramModel> UnigramModel::Parse(std::string_view bytes, std::string* error) {
  auto impl = std::make_unique<Impl>();
  const auto status =
      impl->processor.LoadFromSerializedProto(absl::string_view(bytes.data(), bytes.size()));
  if (!status.ok()) {
    *error = status.ToString();
    return nullptr;
  }
  return std::unique_ptr<UnigramModel>(new UnigramModel(std::move(impl)));
}

std::unique_ptr<UnigramModel> UnigramModel::Build(
    const std::vector<std::pair<std::string, float>>& pieces, int unknown_id, int control_end,
    const std::string& mask, const std::string& charsmap, std::string* error) {
  enum PieceType { kNormal = 1, kUnknown = 2, kControl = 3 };
  std::string model;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const int id = static_cast<int>(i);
    const bool control = id < control_end || pieces[i].first == mask;
    std::string piece;
    PutBytes(1, pieces[i].first, &piece);
    PutFloat(2, pieces[i].second, &piece);
    PutInt(3, id == unknown_id ? kUnknown : control ? kControl : kNormal, &piece);
    PutBytes(1, piece, &model);
  }
  std::string trainer;
  PutInt(3, 1, &trainer);  // model_type: UNIGRAM
  PutInt(40, unknown_id, &trainer);
  PutBytes(45, pieces[unknown_id].first, &trainer);
  PutBytes(2, trainer, &model);
  std::string normalizer;
  PutBytes(2, charsmap, &normalizer);
  for (int field : {3, 4, 5}) {  // add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    PutInt(field, 1, &normalizer);
  }
  PutBytes(3, normalizer, &model);
  return Parse(model, error);
}

void UnigramModel::Encode(std::string_view text, std::vector<int>* ids) const {
  if (!impl_->processor.Encode(absl::string_view(text.data(), text.size()), ids).ok()) ids->clear();
}

int UnigramModel::size() const { return impl_->processor.GetPieceSize(); }
int UnigramModel::unknown_id() const { return impl_->processor.unk_id(); }
int UnigramModel::PieceId(const std::string& piece) const {
  return impl_->processor.PieceToId(piece);
}

}  // namespace memory3
