// A SentencePiece model behind an interface of the standard library alone: SentencePiece's headers
// redefine absl::string_view, so only tokenizer_spm.cc includes them, and nothing of Abseil.
//
// Thread-safety: const methods from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace memory3 {

class SentencePieceModel {
 public:
  enum class Type : uint8_t { kNormal, kUnknown, kControl, kByte };

  virtual ~SentencePieceModel() = default;
  // Null where the bytes are no model; `error` says why.
  static std::unique_ptr<SentencePieceModel> Load(std::string_view bytes, std::string* error);

  virtual int size() const = 0;
  virtual int bos_id() const = 0;  // -1: none
  virtual int eos_id() const = 0;
  virtual std::string Piece(int id) const = 0;
  virtual Type TypeOf(int id) const = 0;
  virtual std::vector<int> Encode(std::string_view text) const = 0;
};

}  // namespace memory3
