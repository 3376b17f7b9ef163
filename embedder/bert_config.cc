#include "embedder/bert_config.h"

#include <algorithm>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

using nlohmann::json;
constexpr int64_t kMaxFileBytes = int64_t{16} << 20;

// One JSON object file with its name, for errors.
struct JsonFile {
  std::string path;
  json object;

  absl::Status Error(const std::string& field, const std::string& problem) const {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", field, " ", problem));
  }
  // An integer within [least, most].
  absl::Status Int(const char* field, int64_t least, int64_t most, int* out) const {
    const auto it = object.find(field);
    if (it == object.end()) return Error(field, "is missing");
    if (!it->is_number_integer() || it->get<double>() < static_cast<double>(least) ||
        it->get<double>() > static_cast<double>(most)) {
      return Error(field,
                   absl::StrCat("is ", it->dump(), ", not an integer in ", least, "..", most));
    }
    *out = it->get<int>();
    return absl::OkStatus();
  }
  // A field that must be absent, null or `wanted`.
  absl::Status Only(const char* field, const json& wanted) const {
    const auto it = object.find(field);
    if (it == object.end() || it->is_null() || *it == wanted) return absl::OkStatus();
    return Error(field, absl::StrCat("is ", it->dump(), "; only ", wanted.dump(), " is supported"));
  }
};

absl::StatusOr<JsonFile> Read(const std::string& path, bool array = false) {
  absl::StatusOr<std::string> text = ReadSmallFile(path, kMaxFileBytes);
  if (!text.ok()) return text.status();
  absl::StatusOr<json> parsed = ParseJson(*text, path);
  if (!parsed.ok()) return parsed.status();
  JsonFile file{path, *std::move(parsed)};
  if (array ? !file.object.is_array() : !file.object.is_object()) {
    return file.Error("the file", array ? "is no JSON array" : "is no JSON object");
  }
  return file;
}

absl::Status ReadPooling(const std::string& directory, BertConfig* config) {
  absl::StatusOr<JsonFile> file = Read(directory + "/1_Pooling/config.json");
  if (absl::IsNotFound(file.status())) return absl::OkStatus();
  if (!file.ok()) return file.status();
  if (file->object.contains("word_embedding_dimension")) {
    int width = 0;
    if (absl::Status s = file->Int("word_embedding_dimension", 1, 1 << 20, &width); !s.ok())
      return s;
    if (width != config->hidden_size) {
      return file->Error(
          "word_embedding_dimension",
          absl::StrCat("is ", width, ", config.json's hidden_size is ", config->hidden_size));
    }
  }
  // One mode by name, or one boolean a mode (the older form).
  std::string mode;
  for (const auto& [field, value] : file->object.items()) {
    if (field == "pooling_mode" && value.is_string()) mode = value.get<std::string>();
    if (std::string_view(field).starts_with("pooling_mode_") && value == json(true)) {
      if (!mode.empty()) return file->Error(field, absl::StrCat("is true beside ", mode));
      mode = field;
    }
  }
  if (mode == "cls" || mode == "pooling_mode_cls_token") {
    config->pooling = BertConfig::Pooling::kCls;
  } else if (mode == "mean" || mode == "pooling_mode_mean_tokens") {
    config->pooling = BertConfig::Pooling::kMean;
  } else {
    return file->Error(mode.empty() ? "pooling_mode" : mode,
                       "is not supported; cls and mean pooling are");
  }
  return absl::OkStatus();
}

absl::Status ReadModules(const std::string& directory) {
  absl::StatusOr<JsonFile> file = Read(directory + "/modules.json", /*array=*/true);
  if (absl::IsNotFound(file.status())) return absl::OkStatus();
  if (!file.ok()) return file.status();
  for (size_t i = 0; i < file->object.size(); ++i) {
    const json& module = file->object[i];
    const std::string type =
        module.is_object() && module.contains("type") && module["type"].is_string()
            ? module["type"].get<std::string>()
            : "";
    const std::string_view name = std::string_view(type).substr(type.rfind('.') + 1);
    if (name != "Transformer" && name != "Pooling" && name != "Normalize") {
      return file->Error(
          absl::StrCat("[", i, "].type"),
          absl::StrCat("is \"", type, "\"; Transformer, Pooling, Normalize are supported"));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadSentenceSettings(const std::string& directory, BertConfig* config) {
  absl::StatusOr<JsonFile> prompts = Read(directory + "/config_sentence_transformers.json");
  if (prompts.ok()) {
    if (absl::Status s = prompts->Only("default_prompt_name", json()); !s.ok()) return s;
  } else if (!absl::IsNotFound(prompts.status())) {
    return prompts.status();
  }
  absl::StatusOr<JsonFile> file = Read(directory + "/sentence_bert_config.json");
  if (absl::IsNotFound(file.status())) return absl::OkStatus();
  if (!file.ok()) return file.status();
  // do_lower_case lower-cases before the tokenizer does its own.
  if (absl::Status s = file->Only("do_lower_case", false); !s.ok()) return s;
  const auto longest = file->object.find("max_seq_length");
  if (longest == file->object.end() || longest->is_null()) return absl::OkStatus();
  int max_tokens = 0;
  if (absl::Status s = file->Int("max_seq_length", 3, 1 << 20, &max_tokens); !s.ok()) return s;
  config->max_tokens = std::min(config->max_tokens, max_tokens);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<BertConfig> LoadBertConfig(const std::string& directory) {
  absl::StatusOr<JsonFile> file = Read(directory + "/config.json");
  if (!file.ok()) return file.status();
  BertConfig c;
  const auto type = file->object.find("model_type");
  if (type != file->object.end() && type->is_string()) c.model_type = type->get<std::string>();
  if (c.model_type != "bert" && c.model_type != "xlm-roberta") {
    return file->Error("model_type", absl::StrCat("is \"", c.model_type,
                                                  "\"; bert and xlm-roberta are supported"));
  }
  const bool xlm_roberta = c.model_type == "xlm-roberta";
  struct IntField {
    const char* name;
    int* out;
    int64_t least, most;
  };
  for (const IntField& f : {IntField{"vocab_size", &c.vocab_size, 4, 1 << 22},
                            IntField{"hidden_size", &c.hidden_size, 1, 1 << 16},
                            IntField{"num_hidden_layers", &c.layers, 1, 1000},
                            IntField{"num_attention_heads", &c.heads, 1, 1 << 16},
                            IntField{"intermediate_size", &c.intermediate_size, 1, 1 << 20},
                            IntField{"max_position_embeddings", &c.positions, 4, 1 << 20}}) {
    if (absl::Status s = file->Int(f.name, f.least, f.most, f.out); !s.ok()) return s;
  }
  if (c.hidden_size % c.heads != 0) {
    return file->Error("num_attention_heads", absl::StrCat("is ", c.heads,
                                                           ", which does not divide "
                                                           "hidden_size ",
                                                           c.hidden_size));
  }
  if (file->object.contains("type_vocab_size")) {
    if (absl::Status s = file->Int("type_vocab_size", 1, 1 << 16, &c.token_types); !s.ok())
      return s;
  }
  const auto eps = file->object.find("layer_norm_eps");
  if (eps != file->object.end()) {
    if (!eps->is_number() || !(eps->get<double>() >= 0 && eps->get<double>() < 1)) {
      return file->Error("layer_norm_eps", absl::StrCat("is ", eps->dump(), ", not in [0, 1)"));
    }
    c.layer_norm_eps = eps->get<float>();
  }
  for (const auto& [field, wanted] : {std::pair<const char*, json>{"hidden_act", "gelu"},
                                      {"position_embedding_type", "absolute"},
                                      {"is_decoder", false},
                                      {"add_cross_attention", false}}) {
    if (absl::Status s = file->Only(field, wanted); !s.ok()) return s;
  }
  if (xlm_roberta) {
    int pad = 1;
    if (file->object.contains("pad_token_id")) {
      if (absl::Status s = file->Int("pad_token_id", 0, c.positions - 4, &pad); !s.ok()) return s;
    }
    c.position_offset = pad + 1;
  }
  c.max_tokens = c.positions - c.position_offset;
  if (absl::Status s = ReadPooling(directory, &c); !s.ok()) return s;
  if (absl::Status s = ReadModules(directory); !s.ok()) return s;
  if (absl::Status s = ReadSentenceSettings(directory, &c); !s.ok()) return s;
  return c;
}

}  // namespace memory3
