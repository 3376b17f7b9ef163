// SentencePiece behind the Tokenizer interface.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "transformer/tokenizer.h"
#include "transformer/tokenizer_spm.h"

namespace memory3 {
namespace {

constexpr char kSpaceSymbol[] = "\xe2\x96\x81";  // ▁

using Type = SentencePieceModel::Type;

// The byte of "<0x41>"; -1 for another spelling.
int ByteOfPiece(const std::string& piece) {
  if (piece.size() != 6 || piece.compare(0, 3, "<0x") != 0 || piece[5] != '>') return -1;
  int value = 0;
  for (int i = 3; i < 5; ++i) {
    const char c = piece[i];
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Make(std::string_view bytes,
                                                         std::string_view source) {
    std::string error;
    std::unique_ptr<SentencePieceTokenizer> t(new SentencePieceTokenizer);
    t->model_ = SentencePieceModel::Load(bytes, &error);
    if (t->model_ == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(std::string(source), ": no SentencePiece model: ", error));
    }
    if (t->model_->bos_id() < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(std::string(source), ": bos: the model has none"));
    }
    t->file_hash_ = Sha256Of(bytes);
    for (int id = 0; id < t->model_->size(); ++id) {
      Token token;
      token.piece = t->model_->Piece(id);
      const Type type = t->model_->TypeOf(id);
      token.special = type == Type::kControl;
      if (type == Type::kUnknown) {
        token.bytes = " \xe2\x81\x87 ";  // SentencePiece's own surface for <unk>
      } else if (type == Type::kByte) {
        const int byte = ByteOfPiece(token.piece);
        if (byte < 0) {
          return absl::InvalidArgumentError(
              absl::StrCat(std::string(source), ": piece ", id, " '", token.piece, "' is no byte"));
        }
        token.bytes = std::string(1, static_cast<char>(byte));
      } else if (type != Type::kControl) {
        token.bytes = absl::StrReplaceAll(token.piece, {{kSpaceSymbol, " "}});
      }
      t->ids_.try_emplace(token.piece, id);
      t->tokens_.push_back(std::move(token));
    }
    // The processor does not tell its normaliser's settings; what it does with a letter does.
    const std::vector<int> letter = t->model_->Encode("a");
    if (letter == t->model_->Encode("   a")) {
      t->leading_space_ = LeadingSpace::kEach;
    } else if (!letter.empty() && t->TokenBytes(letter[0]).substr(0, 1) == " ") {
      t->leading_space_ = LeadingSpace::kOne;
    }
    return t;
  }

  int vocab_size() const override { return static_cast<int>(tokens_.size()); }
  int32_t bos_id() const override { return model_->bos_id(); }
  int32_t eos_id() const override { return model_->eos_id(); }
  std::vector<int32_t> Encode(std::string_view text, SpecialTokens special) const override {
    std::vector<int32_t> ids;
    size_t begin = 0;
    if (special == SpecialTokens::kParse) {
      // SentencePiece never reads a control piece out of text; cut at the first that fits.
      for (size_t at = text.find('<'); at != std::string_view::npos; at = text.find('<', at)) {
        const size_t end = text.find('>', at);
        if (end == std::string_view::npos) break;
        const int32_t id = TokenId(text.substr(at, end + 1 - at));
        if (id < 0 || !IsSpecial(id)) {
          ++at;
          continue;
        }
        Append(text.substr(begin, at - begin), &ids);
        ids.push_back(id);
        begin = at = end + 1;
      }
    }
    Append(text.substr(begin), &ids);
    return ids;
  }
  std::string_view TokenBytes(int32_t id) const override {
    return InRange(id) ? std::string_view(tokens_[id].bytes) : std::string_view();
  }
  std::string_view Piece(int32_t id) const override {
    return InRange(id) ? std::string_view(tokens_[id].piece) : std::string_view();
  }
  bool IsSpecial(int32_t id) const override { return InRange(id) && tokens_[id].special; }
  int32_t TokenId(std::string_view piece) const override {
    const auto it = ids_.find(std::string(piece));
    return it == ids_.end() ? -1 : it->second;
  }
  LeadingSpace leading_space() const override { return leading_space_; }
  const Hash256& file_hash() const override { return file_hash_; }

 private:
  struct Token {
    std::string piece, bytes;
    bool special = false;
  };

  SentencePieceTokenizer() = default;
  bool InRange(int32_t id) const { return id >= 0 && id < vocab_size(); }
  void Append(std::string_view text, std::vector<int32_t>* ids) const {
    if (text.empty()) return;
    const std::vector<int> more = model_->Encode(text);
    ids->insert(ids->end(), more.begin(), more.end());
  }

  std::unique_ptr<SentencePieceModel> model_;
  std::vector<Token> tokens_;
  absl::flat_hash_map<std::string, int32_t> ids_;
  LeadingSpace leading_space_ = LeadingSpace::kNone;
  Hash256 file_hash_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeSentencePieceTokenizer(std::string_view bytes,
                                                                      std::string_view source) {
  return SentencePieceTokenizer::Make(bytes, source);
}

}  // namespace memory3
