#include "embedder/text_tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "embedder/sentencepiece_model.h"
#include "embedder/wordpiece.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{256} << 20;
using nlohmann::json;

// XLM-RoBERTa's ids. Its sentencepiece.bpe.model starts <unk>, <s>, </s>; fairseq, which trained
// it, put <s>, <pad>, </s>, <unk> in front, so that piece k >= 3 has id k + 1.
class XlmRobertaTokenizer : public TextTokenizer {
 public:
  XlmRobertaTokenizer(std::unique_ptr<UnigramModel> model, int offset, int32_t unknown,
                      int32_t begin, int32_t end)
      : model_(std::move(model)), offset_(offset), unknown_(unknown), begin_(begin), end_(end) {}

  void Encode(std::string_view text, size_t max_tokens, std::vector<int32_t>* ids) const override {
    // The library encodes all it is given; 256 bytes a token are more than any text needs.
    if (text.size() / 256 > max_tokens) text = text.substr(0, 256 * max_tokens);
    std::vector<int> pieces;
    model_->Encode(text, &pieces);
    if (pieces.size() > max_tokens) pieces.resize(max_tokens);
    for (const int piece : pieces) {
      ids->push_back(piece == model_->unknown_id() ? unknown_ : piece + offset_);
    }
  }
  int32_t begin_id() const override { return begin_; }
  int32_t end_id() const override { return end_; }
  int32_t max_id() const override { return model_->size() - 1 + offset_; }

 private:
  std::unique_ptr<UnigramModel> model_;
  int offset_;
  int32_t unknown_, begin_, end_;
};

absl::Status FieldError(const std::string& source, const std::string& field,
                        const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat(source, ": ", field, " ", problem));
}

bool Exists(const std::string& path) {
  std::error_code error;
  return std::filesystem::exists(path, error);
}

// object[field] if it is a string, else "".
std::string StringAt(const json& object, const char* field) {
  if (!object.is_object()) return "";
  const auto it = object.find(field);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

// A boolean that may be absent or null.
absl::StatusOr<bool> BoolAt(const json& object, const char* field, bool otherwise,
                            const std::string& source) {
  const auto it = object.find(field);
  if (it == object.end() || it->is_null()) return otherwise;
  if (!it->is_boolean()) return FieldError(source, field, "is no boolean");
  return it->get<bool>();
}

// BertNormalizer's fields, as tokenizer.json and tokenizer_config.json name them.
absl::Status ReadNormalizer(const json& object, const char* lower_name, const char* ideograph_name,
                            const std::string& source, WordPieceOptions* options) {
  absl::StatusOr<bool> clean = BoolAt(object, "clean_text", true, source);
  if (!clean.ok()) return clean.status();
  absl::StatusOr<bool> ideographs = BoolAt(object, ideograph_name, true, source);
  if (!ideographs.ok()) return ideographs.status();
  absl::StatusOr<bool> lower = BoolAt(object, lower_name, true, source);
  if (!lower.ok()) return lower.status();
  absl::StatusOr<bool> strip = BoolAt(object, "strip_accents", *lower, source);
  if (!strip.ok()) return strip.status();
  if (*strip && !*lower) {
    return FieldError(source, "strip_accents", "without lower-casing is not supported");
  }
  options->clean_text = *clean;
  options->ideographs_alone = *ideographs;
  options->lower_case = *lower;
  options->strip_accents = *strip;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TextTokenizer>> WordPieceFromJson(const json& root,
                                                                 const std::string& source) {
  const json model = root.value("model", json::object());
  if (StringAt(model, "type") != "WordPiece") {
    return FieldError(source, "model.type",
                      absl::StrCat("is \"", StringAt(model, "type"), "\", not WordPiece"));
  }
  const json normalizer = root.value("normalizer", json());
  if (StringAt(normalizer, "type") != "BertNormalizer") {
    return FieldError(source, "normalizer.type", "is not BertNormalizer");
  }
  if (StringAt(root.value("pre_tokenizer", json()), "type") != "BertPreTokenizer") {
    return FieldError(source, "pre_tokenizer.type", "is not BertPreTokenizer");
  }
  WordPieceOptions options;
  if (absl::Status status =
          ReadNormalizer(normalizer, "lowercase", "handle_chinese_chars", source, &options);
      !status.ok()) {
    return status;
  }
  if (const std::string unknown = StringAt(model, "unk_token"); !unknown.empty()) {
    options.unknown = unknown;
  }
  if (model.contains("continuing_subword_prefix")) {
    options.continuing_prefix = StringAt(model, "continuing_subword_prefix");
  }
  const auto longest = model.find("max_input_chars_per_word");
  if (longest != model.end()) {
    if (!longest->is_number_unsigned() || longest->get<uint64_t>() > 10000) {
      return FieldError(source, "model.max_input_chars_per_word", "is not in 0..10000");
    }
    options.max_word_chars = longest->get<size_t>();
  }
  const auto vocab = model.find("vocab");
  if (vocab == model.end() || !vocab->is_object()) {
    return FieldError(source, "model.vocab", "is no object");
  }
  absl::flat_hash_map<std::string, int32_t> vocabulary;
  vocabulary.reserve(vocab->size());
  for (const auto& [piece, id] : vocab->items()) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
      return FieldError(source, absl::StrCat("model.vocab[\"", piece, "\"]"), "is no token id");
    }
    vocabulary[piece] = id.get<int32_t>();
  }
  return WordPieceTokenizer::Create(std::move(vocabulary), std::move(options), source);
}

absl::StatusOr<std::unique_ptr<TextTokenizer>> WordPieceFromVocabulary(
    const std::string& vocabulary_text, const std::string& source, const json& settings,
    const std::string& settings_source) {
  WordPieceOptions options;
  if (absl::Status status = ReadNormalizer(settings, "do_lower_case", "tokenize_chinese_chars",
                                           settings_source, &options);
      !status.ok()) {
    return status;
  }
  absl::flat_hash_map<std::string, int32_t> vocabulary;
  int32_t id = 0;
  for (absl::string_view line : absl::StrSplit(vocabulary_text, '\n')) {
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    // A piece that stands twice keeps its last line, as in transformers; the end makes no piece.
    if (!line.empty()) vocabulary[std::string(line)] = id;
    ++id;
  }
  return WordPieceTokenizer::Create(std::move(vocabulary), std::move(options), source);
}

bool IsMetaspace(const json& j) { return StringAt(j, "type") == "Metaspace"; }

absl::StatusOr<std::unique_ptr<TextTokenizer>> UnigramFromJson(const json& root,
                                                               const std::string& source) {
  const json model = root.value("model", json::object());
  if (StringAt(model, "type") != "Unigram") {
    return FieldError(source, "model.type",
                      absl::StrCat("is \"", StringAt(model, "type"), "\", not Unigram"));
  }
  if (model.value("byte_fallback", json(false)) != json(false)) {
    return FieldError(source, "model.byte_fallback", "is not supported");
  }
  // SentencePiece does what these say; anything else would give other pieces.
  std::string charsmap;
  const json normalizer = root.value("normalizer", json());
  json steps = json::array();
  if (StringAt(normalizer, "type") == "Sequence") {
    steps = normalizer.value("normalizers", json::array());
  } else if (!normalizer.is_null()) {
    steps.push_back(normalizer);
  }
  for (const json& step : steps) {
    const std::string type = StringAt(step, "type");
    if (type == "Precompiled" && charsmap.empty()) {
      if (!absl::Base64Unescape(StringAt(step, "precompiled_charsmap"), &charsmap)) {
        return FieldError(source, "normalizer.precompiled_charsmap", "is no base64");
      }
    } else if (type != "Replace" || step.value("pattern", json()) != json({{"Regex", " {2,}"}})) {
      return FieldError(source, "normalizer", absl::StrCat("\"", type, "\" is not supported"));
    }
  }
  const json splitter = root.value("pre_tokenizer", json());
  const json parts = splitter.is_object() ? splitter.value("pretokenizers", json()) : json();
  if (!IsMetaspace(splitter) &&
      !(parts.is_array() && parts.size() == 2 && StringAt(parts[0], "type") == "WhitespaceSplit" &&
        IsMetaspace(parts[1]))) {
    return FieldError(source, "pre_tokenizer", "is neither Metaspace nor WhitespaceSplit with it");
  }

  const auto vocab = model.find("vocab");
  if (vocab == model.end() || !vocab->is_array()) {
    return FieldError(source, "model.vocab", "is no array");
  }
  std::vector<std::pair<std::string, float>> pieces;
  pieces.reserve(vocab->size());
  for (const json& entry : *vocab) {
    if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_number()) {
      return FieldError(source, absl::StrCat("model.vocab[", pieces.size(), "]"),
                        "is not [piece, score]");
    }
    pieces.emplace_back(entry[0].get<std::string>(), entry[1].get<float>());
  }
  const json unknown = model.value("unk_id", json());
  if (!unknown.is_number_unsigned() || unknown.get<uint64_t>() >= pieces.size()) {
    return FieldError(source, "model.unk_id", "is no id of the vocabulary");
  }
  const auto find = [&](const char* piece) {
    return static_cast<int32_t>(std::find_if(pieces.begin(), pieces.end(),
                                             [&](const auto& p) { return p.first == piece; }) -
                                pieces.begin());
  };
  const int32_t begin = find("<s>"), end = find("</s>");
  for (const auto& [id, name] : {std::pair{begin, "<s>"}, std::pair{end, "</s>"}}) {
    if (id > 3) {
      return FieldError(source, "model.vocab",
                        absl::StrCat("has no ", name, " among its first four pieces"));
    }
  }
  std::string error;
  std::unique_ptr<UnigramModel> built = UnigramModel::Build(
      pieces, unknown.get<int>(), /*control_end=*/std::min<int>(4, pieces.size()), "<mask>",
      charsmap, &error);
  if (built == nullptr) return FieldError(source, "model", absl::StrCat("is refused: ", error));
  return std::make_unique<XlmRobertaTokenizer>(std::move(built), 0, unknown.get<int32_t>(), begin,
                                               end);
}

}  // namespace

absl::StatusOr<LoadedTokenizer> LoadTextTokenizer(const std::string& directory,
                                                  const std::string& model_type) {
  const std::string json_path = directory + "/tokenizer.json";
  const bool is_bert = model_type == "bert";
  const std::string plain_path = directory + (is_bert ? "/vocab.txt" : "/sentencepiece.bpe.model");
  // BERT: tokenizer.json is complete, vocab.txt needs settings from elsewhere. XLM-RoBERTa: the
  // SentencePiece model is the original.
  const bool use_json = Exists(json_path) && (is_bert || !Exists(plain_path));
  const std::string& path = use_json ? json_path : plain_path;
  absl::StatusOr<std::string> bytes = ReadSmallFile(path, kMaxFileBytes);
  if (absl::IsNotFound(bytes.status())) {
    return absl::NotFoundError(
        absl::StrCat(directory, ": has no tokenizer; looked for ", json_path, " and ", plain_path));
  }
  if (!bytes.ok()) return bytes.status();
  Sha256 digest;
  digest.UpdateLengthPrefixed(use_json ? "tokenizer.json" : "plain");
  digest.UpdateLengthPrefixed(*bytes);

  absl::StatusOr<std::unique_ptr<TextTokenizer>> tokenizer = nullptr;
  if (use_json) {
    absl::StatusOr<json> root = ParseJson(*bytes, path);
    if (!root.ok()) return root.status();
    if (!root->is_object()) return FieldError(path, "the file", "is no JSON object");
    tokenizer = is_bert ? WordPieceFromJson(*root, path) : UnigramFromJson(*root, path);
  } else if (is_bert) {
    const std::string settings_path = directory + "/tokenizer_config.json";
    json settings = json::object();
    absl::StatusOr<std::string> text = ReadSmallFile(settings_path, kMaxFileBytes);
    if (text.ok()) {
      absl::StatusOr<json> parsed = ParseJson(*text, settings_path);
      if (!parsed.ok()) return parsed.status();
      if (!parsed->is_object()) return FieldError(settings_path, "the file", "is no JSON object");
      settings = *std::move(parsed);
      digest.UpdateLengthPrefixed(*text);
    } else if (!absl::IsNotFound(text.status())) {
      return text.status();
    }
    tokenizer = WordPieceFromVocabulary(*bytes, path, settings, settings_path);
  } else {
    std::string error;
    std::unique_ptr<UnigramModel> model = UnigramModel::Parse(*bytes, &error);
    if (model == nullptr) return FieldError(path, "the model", absl::StrCat("is refused: ", error));
    if (model->unknown_id() != 0 || model->PieceId("<s>") != 1 || model->PieceId("</s>") != 2) {
      return FieldError(path, "the model", "does not start with <unk>, <s>, </s>");
    }
    tokenizer = std::make_unique<XlmRobertaTokenizer>(std::move(model), /*offset=*/1, /*unknown=*/3,
                                                      /*begin=*/0, /*end=*/2);
  }
  if (!tokenizer.ok()) return tokenizer.status();
  return LoadedTokenizer{*std::move(tokenizer), digest.Finish()};
}

}  // namespace memory3
