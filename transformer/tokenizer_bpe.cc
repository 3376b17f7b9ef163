// Byte-level BPE from a tokenizer.json (Hugging Face tokenizers), as GPT-2 and Llama 3 have it.
#include <algorithm>
#include <array>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "transformer/json.h"
#include "transformer/tokenizer.h"
#include "transformer/tokenizer_pretokenize.h"
#include "transformer/tokenizer_utf8.h"

namespace memory3 {
namespace {

using nlohmann::json;

constexpr int64_t kMaxVocab = 1 << 22;

// GPT-2's bytes_to_unicode: printable Latin-1 stands for itself, the other bytes for 256, 257, ....
std::array<int, 324> BytesOfCharacters() {
  std::array<int, 324> bytes;
  bytes.fill(-1);
  int next = 256;
  for (int b = 0; b < 256; ++b) {
    const bool itself = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    bytes[itself ? b : next++] = b;
  }
  return bytes;
}

// The bytes a vocabulary entry stands for; false where it has a character outside that alphabet.
bool BytesOfPiece(std::string_view piece, std::string* out) {
  static const std::array<int, 324> table = BytesOfCharacters();
  out->clear();
  while (!piece.empty()) {
    const Utf8Char c = NextUtf8(piece);
    if (c.kind != Utf8Char::Kind::kValid || c.code_point >= table.size() ||
        table[c.code_point] < 0) {
      return false;
    }
    out->push_back(static_cast<char>(table[c.code_point]));
    piece.remove_prefix(c.length);
  }
  return true;
}

uint64_t PairKey(int32_t a, int32_t b) {
  return uint64_t{static_cast<uint32_t>(a)} << 32 | static_cast<uint32_t>(b);
}

class BpeTokenizer : public Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Make(std::string_view text,
                                                         std::string_view bos, std::string_view eos,
                                                         std::string_view source) {
    auto object = ParseJson(text, source);
    if (!object.ok()) return object.status();
    std::unique_ptr<BpeTokenizer> t(new BpeTokenizer);
    t->source_ = std::string(source);
    t->file_hash_ = Sha256Of(text);
    if (!object->is_object()) return t->Error("", "no JSON object");
    for (const auto step :
         {&BpeTokenizer::ReadModel, &BpeTokenizer::ReadAddedTokens, &BpeTokenizer::ReadPipeline}) {
      if (auto status = ((*t).*step)(*object); !status.ok()) return status;
    }
    t->bos_id_ = t->TokenId(bos);
    if (t->bos_id_ < 0) {
      return t->Error("bos_token", bos.empty() ? "the tokenizer has none"
                                               : absl::StrCat("'", std::string(bos),
                                                              "' is not in the vocabulary"));
    }
    t->eos_id_ = t->TokenId(eos);
    return t;
  }

  int vocab_size() const override { return static_cast<int>(tokens_.size()); }
  int32_t bos_id() const override { return bos_id_; }
  int32_t eos_id() const override { return eos_id_; }
  std::string_view TokenBytes(int32_t id) const override {
    return InRange(id) && !tokens_[id].special ? std::string_view(tokens_[id].bytes)
                                               : std::string_view();
  }
  std::string_view Piece(int32_t id) const override {
    return InRange(id) ? std::string_view(tokens_[id].piece) : std::string_view();
  }
  bool IsSpecial(int32_t id) const override { return InRange(id) && tokens_[id].special; }
  int32_t TokenId(std::string_view piece) const override {
    const auto it = ids_.find(std::string(piece));
    return it == ids_.end() || piece.empty() ? -1 : it->second;
  }
  LeadingSpace leading_space() const override { return LeadingSpace::kNone; }
  const Hash256& file_hash() const override { return file_hash_; }

  std::vector<int32_t> Encode(std::string_view text, SpecialTokens special) const override {
    std::vector<int32_t> ids;
    EncodeFrom(0, text, special, &ids);
    return ids;
  }

 private:
  struct Token {
    std::string piece, bytes;
    bool used = false, special = false;
  };
  struct Merge {
    uint32_t rank;
    int32_t id;
  };
  struct AddedToken {
    std::string content;
    int32_t id;
    bool special;
  };

  BpeTokenizer() = default;
  bool InRange(int32_t id) const { return id >= 0 && id < vocab_size(); }
  absl::Status Error(const std::string& field, const std::string& what) const {
    return absl::InvalidArgumentError(
        absl::StrCat(source_, ": ", field, field.empty() ? "" : ": ", what));
  }
  static const json& At(const json& object, const char* name) {
    static const json null;
    const auto it = object.find(name);
    return it == object.end() ? null : *it;
  }
  // Neither null, false, 0 nor "".
  static bool IsSet(const json& value) {
    return !(value.is_null() || value == false || value == 0 || value == "");
  }

  absl::Status AddPiece(const std::string& field, const std::string& piece, const json& id_value) {
    if (!id_value.is_number_unsigned() || id_value.get<uint64_t>() >= kMaxVocab) {
      return Error(field, absl::StrCat("'", piece, "': no id below ", kMaxVocab));
    }
    const auto id = id_value.get<int32_t>();
    if (id >= vocab_size()) tokens_.resize(id + 1);
    Token& token = tokens_[id];
    if (token.used && token.piece != piece) {
      return Error(field,
                   absl::StrCat("id ", id, " is both '", token.piece, "' and '", piece, "'"));
    }
    const auto [it, added] = ids_.try_emplace(piece, id);
    if (!added && it->second != id) {
      return Error(field, absl::StrCat("'", piece, "' is both ", it->second, " and ", id));
    }
    token.used = true;
    token.piece = piece;
    return absl::OkStatus();
  }

  absl::Status ReadModel(const json& object) {
    const json& model = At(object, "model");
    if (!model.is_object() || At(model, "type") != "BPE") {
      return Error("model.type", "only BPE is supported");
    }
    for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
      if (IsSet(At(model, name))) return Error(absl::StrCat("model.", name), "not supported");
    }
    ignore_merges_ = At(model, "ignore_merges") == true;
    const json& vocab = At(model, "vocab");
    if (!vocab.is_object() || vocab.empty()) return Error("model.vocab", "missing or no object");
    for (const auto& [piece, id] : vocab.items()) {
      if (auto status = AddPiece("model.vocab", piece, id); !status.ok()) return status;
      Token& token = tokens_[id.get<int32_t>()];
      if (BytesOfPiece(piece, &token.bytes)) {
        words_.try_emplace(token.bytes, id.get<int32_t>());
      } else {
        token.bytes = piece;  // never made by merges; decodes to its own spelling
      }
    }
    for (int b = 0; b < 256; ++b) {
      const auto it = words_.find(std::string(1, static_cast<char>(b)));
      if (it == words_.end()) {
        return Error("model.vocab", absl::StrCat("no token for byte ", b, ": not byte-level"));
      }
      byte_ids_[b] = it->second;
    }
    return ReadMerges(At(model, "merges"));
  }

  absl::Status ReadMerges(const json& merges) {
    if (!merges.is_array()) return Error("model.merges", "missing or no list");
    uint32_t rank = 0;
    for (const json& merge : merges) {
      std::string a, b;
      const std::string field = absl::StrCat("model.merges[", rank, "]");
      if (merge.is_string()) {  // "a b", as before tokenizers 0.20
        const auto& text = merge.get_ref<const std::string&>();
        const size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
          return Error(field, absl::StrCat("'", text, "' is no pair"));
        }
        a = text.substr(0, space);
        b = text.substr(space + 1);
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                 merge[1].is_string()) {
        a = merge[0].get<std::string>();
        b = merge[1].get<std::string>();
      } else {
        return Error(field, "no pair");
      }
      const int32_t left = TokenId(a), right = TokenId(b), whole = TokenId(a + b);
      if (left < 0 || right < 0 || whole < 0) {
        return Error(field, absl::StrCat("'",
                                         left < 0    ? a
                                         : right < 0 ? b
                                                     : a + b,
                                         "' is not in the vocabulary"));
      }
      merges_.insert_or_assign(PairKey(left, right), Merge{rank, whole});
      ++rank;
    }
    return absl::OkStatus();
  }

  absl::Status ReadAddedTokens(const json& object) {
    const json& list = At(object, "added_tokens");
    if (list.is_null()) return absl::OkStatus();
    if (!list.is_array()) return Error("added_tokens", "no list");
    for (const json& entry : list) {
      if (!entry.is_object() || !At(entry, "content").is_string()) {
        return Error("added_tokens", "an entry without content");
      }
      const std::string content = At(entry, "content").get<std::string>();
      for (const char* name : {"single_word", "lstrip", "rstrip"}) {
        if (IsSet(At(entry, name))) {
          return Error("added_tokens",
                       absl::StrCat("'", content, "': ", name, " is not supported"));
        }
      }
      if (auto status = AddPiece("added_tokens", content, At(entry, "id")); !status.ok()) {
        return status;
      }
      if (content.empty()) continue;
      const AddedToken token{content, At(entry, "id").get<int32_t>(), At(entry, "special") == true};
      tokens_[token.id].bytes = content;
      tokens_[token.id].special = token.special;
      // Those marked `normalized` are looked for in what the others leave.
      added_[At(entry, "normalized") == true ? 1 : 0][static_cast<uint8_t>(content[0])].push_back(
          token);
    }
    for (auto& phase : added_) {
      for (auto& bucket : phase) {
        std::stable_sort(bucket.begin(), bucket.end(),
                         [](const AddedToken& a, const AddedToken& b) {
                           return a.content.size() > b.content.size();
                         });
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadPipeline(const json& object) {
    const json& normalizer = At(object, "normalizer");
    if (!normalizer.is_null() &&
        !(normalizer.is_object() && At(normalizer, "type") == "Sequence" &&
          At(normalizer, "normalizers").is_array() && At(normalizer, "normalizers").empty())) {
      return Error("normalizer", absl::StrCat(normalizer.is_object() ? TypeOf(normalizer) : "it",
                                              " is not supported"));
    }
    const json& decoder = At(object, "decoder");
    if (!decoder.is_null() && TypeOf(decoder) != "ByteLevel") {
      return Error("decoder", TypeOf(decoder) + " is not supported; ByteLevel is");
    }
    const json& pre = At(object, "pre_tokenizer");
    if (TypeOf(pre) != "Sequence") {
      if (auto status = ReadPreTokenizer(pre); !status.ok()) return status;
    } else {
      const json& list = At(pre, "pretokenizers");
      if (!list.is_array()) return Error("pre_tokenizer.pretokenizers", "no list");
      for (const json& element : list) {
        if (auto status = ReadPreTokenizer(element); !status.ok()) return status;
      }
    }
    if (!byte_level_) return Error("pre_tokenizer", "no ByteLevel: not byte-level BPE");
    return absl::OkStatus();
  }

  static std::string TypeOf(const json& value) {
    if (!value.is_object() || !At(value, "type").is_string()) return "none";
    return At(value, "type").get<std::string>();
  }

  absl::Status ReadPreTokenizer(const json& pre) {
    const std::string type = TypeOf(pre);
    if (byte_level_) return Error("pre_tokenizer", type + " after ByteLevel is not supported");
    if (type == "ByteLevel") {
      byte_level_ = true;
      if (At(pre, "add_prefix_space") != false) {
        return Error("pre_tokenizer.add_prefix_space", "only false is supported");
      }
      // Absent is true.
      if (At(pre, "use_regex") != false) splits_.push_back(SplitPattern::kGpt2);
      return absl::OkStatus();
    }
    if (type == "Digits") {
      splits_.push_back(At(pre, "individual_digits") == true ? SplitPattern::kDigits
                                                             : SplitPattern::kContiguousDigits);
      return absl::OkStatus();
    }
    if (type == "Split") {
      const json& pattern = At(pre, "pattern");
      const json& regex = pattern.is_object() ? At(pattern, "Regex") : pattern;
      const std::string text = regex.is_string() ? regex.get<std::string>() : "";
      const auto known = PatternOfRegex(text);
      if (!known.has_value()) {
        return Error("pre_tokenizer.pattern", absl::StrCat("'", text, "' is not supported"));
      }
      if (At(pre, "behavior") != "Isolated" || IsSet(At(pre, "invert"))) {
        return Error("pre_tokenizer.behavior", "only Isolated, not inverted, is supported");
      }
      splits_.push_back(*known);
      return absl::OkStatus();
    }
    return Error("pre_tokenizer", type + " is not supported");
  }

  // Cuts at added tokens of `phase` (leftmost, longest), the rest goes to the next phase and then
  // to the words.
  void EncodeFrom(size_t phase, std::string_view text, SpecialTokens special,
                  std::vector<int32_t>* ids) const {
    if (text.empty()) return;
    if (phase == added_.size()) {
      EncodeText(text, ids);
      return;
    }
    size_t begin = 0, at = 0;
    while (at < text.size()) {
      const AddedToken* found = nullptr;
      for (const AddedToken& token : added_[phase][static_cast<uint8_t>(text[at])]) {
        if (token.special && special == SpecialTokens::kText) continue;
        if (text.compare(at, token.content.size(), token.content) == 0) {
          found = &token;
          break;
        }
      }
      if (found == nullptr) {
        ++at;
        continue;
      }
      EncodeFrom(phase + 1, text.substr(begin, at - begin), special, ids);
      ids->push_back(found->id);
      begin = at = at + found->content.size();
    }
    EncodeFrom(phase + 1, text.substr(begin), special, ids);
  }

  void EncodeText(std::string_view text, std::vector<int32_t>* ids) const {
    std::vector<std::string_view> words = {text}, next;
    for (const SplitPattern pattern : splits_) {
      next.clear();
      for (const std::string_view word : words) SplitWords(pattern, word, &next);
      words.swap(next);
    }
    for (const std::string_view word : words) EncodeWord(word, ids);
  }

  // Merges the adjacent pair of lowest rank, leftmost first, until none is left; O(n log n).
  void EncodeWord(std::string_view word, std::vector<int32_t>* ids) const {
    if (ignore_merges_) {
      if (const auto it = words_.find(std::string(word)); it != words_.end()) {
        ids->push_back(it->second);
        return;
      }
    }
    struct Symbol {
      int32_t id;  // -1: merged into the one before
      int previous, next;
    };
    const int n = static_cast<int>(word.size());
    std::vector<Symbol> symbols(n);
    for (int i = 0; i < n; ++i) {
      symbols[i] = {byte_ids_[static_cast<uint8_t>(word[i])], i - 1, i + 1 < n ? i + 1 : -1};
    }
    struct Candidate {
      uint32_t rank;
      int at;
      int32_t id;
      bool operator>(const Candidate& o) const {
        return std::pair(rank, at) > std::pair(o.rank, o.at);
      }
    };
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
    const auto consider = [&](int left) {
      if (left < 0 || symbols[left].next < 0) return;
      const auto it = merges_.find(PairKey(symbols[left].id, symbols[symbols[left].next].id));
      if (it != merges_.end()) queue.push({it->second.rank, left, it->second.id});
    };
    for (int i = 0; i + 1 < n; ++i) consider(i);
    while (!queue.empty()) {
      const Candidate top = queue.top();
      queue.pop();
      Symbol& left = symbols[top.at];
      if (left.id < 0 || left.next < 0) continue;
      Symbol& right = symbols[left.next];
      // Outdated where one of the two has been merged since.
      const auto it = merges_.find(PairKey(left.id, right.id));
      if (it == merges_.end() || it->second.id != top.id) continue;
      left.id = top.id;
      right.id = -1;
      left.next = right.next;
      if (left.next >= 0) symbols[left.next].previous = top.at;
      consider(left.previous);
      consider(top.at);
    }
    for (const Symbol& symbol : symbols) {
      if (symbol.id >= 0) ids->push_back(symbol.id);
    }
  }

  std::string source_;
  Hash256 file_hash_;
  std::vector<Token> tokens_;
  absl::flat_hash_map<std::string, int32_t> ids_;    // by spelling
  absl::flat_hash_map<std::string, int32_t> words_;  // by bytes
  absl::flat_hash_map<uint64_t, Merge> merges_;
  std::array<int32_t, 256> byte_ids_{};
  std::array<std::array<std::vector<AddedToken>, 256>, 2> added_;  // by phase, first byte
  std::vector<SplitPattern> splits_;
  bool byte_level_ = false, ignore_merges_ = false;
  int32_t bos_id_ = -1, eos_id_ = -1;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(std::string_view json,
                                                            std::string_view bos_token,
                                                            std::string_view eos_token,
                                                            std::string_view source) {
  return BpeTokenizer::Make(json, bos_token, eos_token, source);
}

}  // namespace memory3
