#include "transformer/tokenizer_spm.h"

#include <sentencepiece_processor.h>

namespace memory3 {
namespace {

class Model : public SentencePieceModel {
 public:
  sentencepiece::SentencePieceProcessor processor;

  int size() const override { return processor.GetPieceSize(); }
  int bos_id() const override { return processor.bos_id(); }
  int eos_id() const override { return processor.eos_id(); }
  std::string Piece(int id) const override { return processor.IdToPiece(id); }
  Type TypeOf(int id) const override {
    if (processor.IsUnknown(id)) return Type::kUnknown;
    if (processor.IsControl(id)) return Type::kControl;
    return processor.IsByte(id) ? Type::kByte : Type::kNormal;
  }
  std::vector<int> Encode(std::string_view text) const override {
    return processor.EncodeAsIds(absl::string_view(text.data(), text.size()));
  }
};

}  // namespace

std::unique_ptr<SentencePieceModel> SentencePieceModel::Load(std::string_view bytes,
                                                             std::string* error) {
  auto model = std::make_unique<Model>();
  const auto status =
      model->processor.LoadFromSerializedProto(absl::string_view(bytes.data(), bytes.size()));
  if (!status.ok()) {
    *error = status.ToString();
    return nullptr;
  }
  return model;
}

}  // namespace memory3
