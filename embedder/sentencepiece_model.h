// Unigram tokenisation through the SentencePiece library (Kudo and Richardson 2018). This header
// and its source include nothing of Abseil: SentencePiece's own header redefines its string_view.
//
// Thread-safety: immutable after loading; any method from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace memory3 {

class UnigramModel {
 public:
  // From a .model file's bytes. Null on failure, with the reason in `error`.
  static std::unique_ptr<UnigramModel> Parse(std::string_view bytes, std::string* error);
  // From pieces with their scores, in the order of their ids, and SentencePiece's compiled table of
  // character replacements. Pieces with an id below `control_end` other than `unknown_id` are
  // control symbols, and `mask` likewise; text never encodes to them.
  static std::unique_ptr<UnigramModel> Build(
      const std::vector<std::pair<std::string, float>>& pieces, int unknown_id, int control_end,
      const std::string& mask, const std::string& charsmap, std::string* error);
  ~UnigramModel();

  // Replaces *ids by those of `text`.
  void Encode(std::string_view text, std::vector<int>* ids) const;
  int size() const;
  int unknown_id() const;
  int PieceId(const std::string& piece) const;  // the unknown's id where there is none

 private:
  struct Impl;
  explicit UnigramModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace memory3
