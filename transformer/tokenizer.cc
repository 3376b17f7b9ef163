#include "transformer/tokenizer.h"

#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "transformer/json.h"
#include "transformer/tokenizer_utf8.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxFileBytes = 256 << 20;

enum class Broken : uint8_t { kReplace, kDrop };

// Appends the whole characters of `bytes`. `last`: nothing follows; else a truncated character at
// the end is left. Returns how many bytes were used.
size_t AppendUtf8(std::string_view bytes, Broken broken, bool last, std::string* out) {
  size_t at = 0;
  while (at < bytes.size()) {
    const Utf8Char c = NextUtf8(bytes.substr(at));
    if (c.kind == Utf8Char::Kind::kTruncated && !last) break;
    if (c.kind == Utf8Char::Kind::kValid) {
      out->append(bytes.substr(at, c.length));
    } else if (broken == Broken::kReplace) {
      out->append(kReplacementCharacter);
    }
    at += c.length;
  }
  return at;
}

// The bytes of the next token of a text, `strip` saying what is still to be dropped.
std::string_view WithoutLeadingSpace(std::string_view bytes, LeadingSpace* strip) {
  if (*strip == LeadingSpace::kNone || bytes.empty()) return bytes;
  if (bytes[0] == ' ') bytes.remove_prefix(1);
  if (*strip == LeadingSpace::kOne || !bytes.empty()) *strip = LeadingSpace::kNone;
  return bytes;
}

// tokenizer_config.json spells a token as a string or as {"content": …}.
std::string TokenOf(const nlohmann::json& config, const char* name) {
  if (!config.is_object() || !config.contains(name)) return "";
  const nlohmann::json& value = config[name];
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value["content"].is_string()) {
    return value["content"].get<std::string>();
  }
  return "";
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenBpe(const fs::path& directory,
                                                   const ModelConfig& config) {
  const std::string path = (directory / "tokenizer.json").string();
  auto text = ReadSmallFile(path, kMaxFileBytes);
  if (!text.ok()) return text.status();
  std::string bos, eos;
  const std::string config_path = (directory / "tokenizer_config.json").string();
  std::error_code error;
  if (fs::exists(config_path, error)) {
    auto config_text = ReadSmallFile(config_path, kMaxFileBytes);
    if (!config_text.ok()) return config_text.status();
    auto json = ParseJson(*config_text, config_path);
    if (!json.ok()) return json.status();
    bos = TokenOf(*json, "bos_token");
    eos = TokenOf(*json, "eos_token");
  }
  if (bos.empty() && config.bos_token_id >= 0) {
    // No tokenizer_config.json: the model's bos, where the tokenizer calls that id special.
    auto json = ParseJson(*text, path);
    if (!json.ok()) return json.status();
    if (json->is_object() && json->contains("added_tokens") && (*json)["added_tokens"].is_array()) {
      for (const auto& token : (*json)["added_tokens"]) {
        if (token.is_object() && token.value("id", nlohmann::json()) == config.bos_token_id) {
          bos = TokenOf(token, "content");
        }
      }
    }
  }
  return MakeBpeTokenizer(*text, bos, eos, path);
}

}  // namespace

Utf8Char NextUtf8(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {Utf8Char::Kind::kValid, first, 1};
  int length = 0;
  // Range of the second byte (Unicode, table 3-7): no overlong forms, no surrogates, none above
  // 10FFFF.
  uint8_t low = 0x80, high = 0xbf;
  if (first >= 0xc2 && first <= 0xdf) {
    length = 2;
  } else if (first >= 0xe0 && first <= 0xef) {
    length = 3;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
  } else if (first >= 0xf0 && first <= 0xf4) {
    length = 4;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
  } else {
    return {Utf8Char::Kind::kBroken, 0xfffd, 1};
  }
  char32_t code_point = first & (0x7f >> length);
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) >= text.size()) return {Utf8Char::Kind::kTruncated, 0xfffd, i};
    if (byte(i) < low || byte(i) > high) return {Utf8Char::Kind::kBroken, 0xfffd, i};
    low = 0x80;
    high = 0xbf;
    code_point = code_point << 6 | (byte(i) & 0x3f);
  }
  return {Utf8Char::Kind::kValid, code_point, length};
}

std::string Tokenizer::Bytes(std::span<const int32_t> ids) const {
  std::string bytes;
  LeadingSpace strip = leading_space();
  for (const int32_t id : ids) bytes += WithoutLeadingSpace(TokenBytes(id), &strip);
  return bytes;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids) const {
  std::string out;
  AppendUtf8(Bytes(ids), Broken::kReplace, /*last=*/true, &out);
  return out;
}

std::string Tokenizer::DecodeQuery(std::span<const int32_t> ids) const {
  std::string out;
  AppendUtf8(Bytes(ids), Broken::kDrop, /*last=*/true, &out);
  return out;
}

DecodeStream::DecodeStream(const Tokenizer* tokenizer, bool at_start)
    : tokenizer_(tokenizer), strip_(at_start ? tokenizer->leading_space() : LeadingSpace::kNone) {}

std::string DecodeStream::Push(int32_t id) {
  pending_ += WithoutLeadingSpace(tokenizer_->TokenBytes(id), &strip_);
  std::string out;
  pending_.erase(0, AppendUtf8(pending_, Broken::kReplace, /*last=*/false, &out));
  return out;
}

std::string DecodeStream::Finish() {
  std::string out;
  AppendUtf8(std::exchange(pending_, ""), Broken::kReplace, /*last=*/true, &out);
  return out;
}

std::vector<int32_t> PrefixTokenIds(const Tokenizer& tokenizer) {
  std::vector<int32_t> ids = {tokenizer.bos_id()};
  for (const int32_t id : tokenizer.Encode("Reference:")) ids.push_back(id);
  return ids;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& directory,
                                                         const ModelConfig& config) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer;
  const std::string model = (fs::path(directory) / "tokenizer.model").string();
  std::error_code error;
  if (fs::exists(model, error)) {
    auto bytes = ReadSmallFile(model, kMaxFileBytes);
    if (!bytes.ok()) return bytes.status();
    tokenizer = MakeSentencePieceTokenizer(*bytes, model);
  } else if (fs::exists(fs::path(directory) / "tokenizer.json", error)) {
    tokenizer = OpenBpe(directory, config);
  } else {
    return absl::NotFoundError(
        absl::StrCat(directory, ": neither tokenizer.model nor tokenizer.json"));
  }
  if (!tokenizer.ok()) return tokenizer.status();
  const Tokenizer& t = **tokenizer;
  if (t.vocab_size() > config.vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat(directory, ": the tokenizer has ", t.vocab_size(),
                     " tokens, config.json vocab_size ", config.vocab_size));
  }
  if (config.bos_token_id >= 0 && config.bos_token_id != t.bos_id()) {
    return absl::InvalidArgumentError(absl::StrCat(directory, ": the tokenizer's bos is ",
                                                   t.bos_id(), ", config.json bos_token_id ",
                                                   config.bos_token_id));
  }
  if (config.explicit_memory.has_value()) {
    const std::vector<int32_t> prefix = PrefixTokenIds(t);
    if (prefix != config.explicit_memory->prefix_token_ids) {
      return absl::InvalidArgumentError(
          absl::StrCat(directory, ": config.json explicit_memory.prefix_token_ids: [",
                       absl::StrJoin(config.explicit_memory->prefix_token_ids, ", "),
                       "], the tokenizer gives [", absl::StrJoin(prefix, ", "), "]"));
    }
  }
  return tokenizer;
}

}  // namespace memory3
