// Trains a SentencePiece BPE model. Its source includes nothing of Abseil, whose string_view
// SentencePiece's headers redefine; hence no absl types here.
//
// Thread-safety: one training at a time (SentencePiece keeps global state).
#pragma once

#include <string>
#include <vector>

namespace memory3 {

// Byte fallback, digits apart, white space kept as it is, ids <unk> 0, <s> 1, </s> 2. `lines` hold
// no line ends: these become the byte <0x0A>. Fills `model` with the tokenizer.model's bytes, or
// returns false with `error`.
bool TrainSentencePiece(const std::vector<std::string>& lines, int vocab_size, int threads,
                        std::string* model, std::string* error);

}  // namespace memory3
