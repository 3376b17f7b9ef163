// Text to token ids and back. Two kinds: SentencePiece (tokenizer.model) and byte-level BPE
// (tokenizer.json).
//
// Leading spaces. SentencePiece models put a space before the text they encode ("dummy prefix"), so
// the first token of a text carries one that the text did not have. TokenBytes keeps every space:
// the text of a continuation is the concatenation of its tokens' bytes, whatever stood before.
// Decode and a DecodeStream `at_start` take the ids for a text of their own and drop that one
// space.
//
// Thread-safety: const methods from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/hash.h"
#include "transformer/config.h"

namespace memory3 {

// What the spelling of a special token ("<s>", "<|im_start|>") in a text means. Text of users is
// kText.
enum class SpecialTokens : uint8_t { kText, kParse };

// What the pieces at the start of a text carry that the text has not: nothing; one space (the dummy
// prefix); or, in models that collapse white space, a space each until one says something.
enum class LeadingSpace : uint8_t { kNone, kOne, kEach };

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual int vocab_size() const = 0;  // ids are below
  virtual int32_t bos_id() const = 0;  // always there: a tokenizer without bos is refused
  virtual int32_t eos_id() const = 0;  // -1: none
  // Without bos or eos. Any bytes; what is no UTF-8 is encoded by byte (BPE) or as U+FFFD
  // (SentencePiece).
  virtual std::vector<int32_t> Encode(std::string_view text,
                                      SpecialTokens special = SpecialTokens::kText) const = 0;
  // The bytes a token adds to the text; maybe a part of a character. Empty for special tokens and
  // ids out of range. Valid as long as the tokenizer.
  virtual std::string_view TokenBytes(int32_t id) const = 0;
  // As the vocabulary spells it ("▁the", "Ġthe", "<0x0A>"); empty out of range.
  virtual std::string_view Piece(int32_t id) const = 0;
  virtual bool IsSpecial(int32_t id) const = 0;
  // The id of a piece as the vocabulary spells it; -1: none.
  virtual int32_t TokenId(std::string_view piece) const = 0;
  virtual LeadingSpace leading_space() const = 0;
  // Of the file it was read from; part of the writer fingerprint.
  virtual const Hash256& file_hash() const = 0;

  // The text of `ids`: special tokens left out, broken UTF-8 replaced by U+FFFD (one for each
  // maximal subpart, as WHATWG and Rust do).
  std::string Decode(std::span<const int32_t> ids) const;
  // For queries: broken UTF-8, as at the ends of a chunk cut inside a character, is left out.
  std::string DecodeQuery(std::span<const int32_t> ids) const;

 private:
  std::string Bytes(std::span<const int32_t> ids) const;
};

// Text of a running generation in whole UTF-8. One thread.
class DecodeStream {
 public:
  // `at_start`: the first token begins a text of its own rather than continuing one. The tokenizer
  // must outlive the stream.
  DecodeStream(const Tokenizer* tokenizer, bool at_start);
  // What is certain now. The concatenation over all calls and Finish is Decode's (at_start).
  std::string Push(int32_t id);
  // What is left: U+FFFD for a character that never got whole.
  std::string Finish();

 private:
  const Tokenizer* tokenizer_;
  LeadingSpace strip_;   // what is still to be dropped
  std::string pending_;  // a character's first bytes
};

// Reads tokenizer.model, or where there is none tokenizer.json with tokenizer_config.json, of a
// model directory. NOT_FOUND: neither is there. INVALID_ARGUMENT names file and field: a tokenizer
// that is damaged, unsupported, without bos, larger than config.vocab_size, with another bos than
// config.json's, or one that gives another prefix than config.explicit_memory's.
absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& directory,
                                                         const ModelConfig& config);

// `bytes`: the file's; `source` names it in errors.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeSentencePieceTokenizer(std::string_view bytes,
                                                                      std::string_view source);
// bos_token, eos_token: their spelling, from tokenizer_config.json; eos_token may be empty.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(std::string_view json,
                                                            std::string_view bos_token,
                                                            std::string_view eos_token,
                                                            std::string_view source);

// bos + Encode("Reference:"), what every memory is written behind (explicit-memory.md, Writing).
std::vector<int32_t> PrefixTokenIds(const Tokenizer& tokenizer);

}  // namespace memory3
