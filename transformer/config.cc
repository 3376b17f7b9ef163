#include "transformer/config.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <numbers>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"
#include "transformer/json.h"

namespace memory3 {
namespace {

using nlohmann::json;

// Bounds that no real model reaches and that keep every product of two of them within int64.
constexpr int64_t kMaxDimension = 1 << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxHeadDim = 4096;
constexpr int64_t kMaxReferenceTokens = 1 << 16;
constexpr int64_t kMaxPrefixTokens = 1024;

// Fields of other architectures, or of variants of this one, that change the forward pass wherever
// they do not hold the neutral value given here. Null and absence are always neutral.
struct NeutralField {
  const char* name;
  json neutral;
};
const std::vector<NeutralField>& NeutralFields() {
  static const auto* fields = new std::vector<NeutralField>{
      {"attention_bias", false},
      {"mlp_bias", false},
      {"qkv_bias", false},
      {"bias", false},
      {"use_bias", false},
      {"pretraining_tp", 1},
      {"quantization_config", nullptr},
      {"compression_config", nullptr},
      {"sliding_window", nullptr},
      {"use_sliding_window", false},
      {"partial_rotary_factor", 1.0},
      {"rotary_pct", 1.0},
      {"rope_interleaved", false},
      {"no_rope_layers", nullptr},
      {"no_rope_layer_interval", nullptr},
      {"attn_logit_softcapping", nullptr},
      {"final_logit_softcapping", nullptr},
      {"query_pre_attn_scalar", nullptr},
      {"clip_qkv", nullptr},
      {"qk_norm", false},
      {"use_qk_norm", false},
      {"qk_layernorm", false},
      {"attention_multiplier", nullptr},
      {"embedding_multiplier", 1.0},
      {"residual_multiplier", 1.0},
      {"logits_scaling", 1.0},
      {"logit_scale", 1.0},
      {"scale_emb", 1.0},
      {"scale_depth", nullptr},
      {"dim_model_base", nullptr},
      {"num_local_experts", nullptr},
      {"num_experts", nullptr},
      {"n_routed_experts", nullptr},
      {"alibi", false},
      {"add_cross_attention", false},
      {"is_encoder_decoder", false},
      {"use_parallel_residual", false},
      {"original_max_position_embeddings", nullptr},
  };
  return *fields;
}

class Reader {
 public:
  Reader(const json& object, std::string source, std::string path)
      : object_(object), source_(std::move(source)), path_(std::move(path)) {}

  const json* Find(std::string_view name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  absl::Status Error(std::string_view name, std::string_view what) const {
    return absl::InvalidArgumentError(
        absl::StrCat(source_, ": ", path_, std::string(name), ": ", std::string(what)));
  }
  static std::string Show(const json& value) {
    std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
    if (text.size() > 80) text = text.substr(0, 80) + "...";
    return text;
  }

  // An integer within [low, high]. Absent: `absent`, an error where that is null.
  absl::Status Int(std::string_view name, int64_t low, int64_t high, const int* absent,
                   int* out) const {
    const json* value = Find(name);
    if (value == nullptr) {
      if (absent == nullptr) return Error(name, "missing");
      *out = *absent;
      return absl::OkStatus();
    }
    int64_t number = 0;
    if (!ToInt(*value, &number) || number < low || number > high) {
      return Error(name, absl::StrCat(Show(*value), " is no integer within ", low, "..", high));
    }
    *out = static_cast<int>(number);
    return absl::OkStatus();
  }
  // A finite number > 0. Absent: `absent`, an error where that is null.
  absl::Status Positive(std::string_view name, const double* absent, double* out) const {
    const json* value = Find(name);
    if (value == nullptr) {
      if (absent == nullptr) return Error(name, "missing");
      *out = *absent;
      return absl::OkStatus();
    }
    if (!value->is_number() || !std::isfinite(value->get<double>()) || value->get<double>() <= 0) {
      return Error(name, absl::StrCat(Show(*value), " is no number above 0"));
    }
    *out = value->get<double>();
    return absl::OkStatus();
  }
  absl::Status Bool(std::string_view name, bool absent, bool* out) const {
    const json* value = Find(name);
    *out = absent;
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_boolean())
      return Error(name, absl::StrCat(Show(*value), " is not true or false"));
    *out = value->get<bool>();
    return absl::OkStatus();
  }
  // A list of integers within [low, high]; `scalar`: a single one may stand for a list of one.
  template <typename T>
  absl::Status Ints(std::string_view name, int64_t low, int64_t high, bool scalar,
                    std::vector<T>* out) const {
    out->clear();
    const json* value = Find(name);
    if (value == nullptr) return absl::OkStatus();
    const json list = scalar && !value->is_array() ? json::array({*value}) : *value;
    if (!list.is_array()) return Error(name, absl::StrCat(Show(*value), " is no list"));
    for (const json& element : list) {
      int64_t number = 0;
      if (!ToInt(element, &number) || number < low || number > high) {
        return Error(name, absl::StrCat(Show(element), " is no integer within ", low, "..", high));
      }
      out->push_back(static_cast<T>(number));
    }
    return absl::OkStatus();
  }
  // Refuses keys outside `known`.
  absl::Status OnlyKeys(std::initializer_list<std::string_view> known) const {
    for (const auto& [key, value] : object_.items()) {
      if (std::find(known.begin(), known.end(), key) == known.end() && !value.is_null()) {
        return Error(key, "not supported");
      }
    }
    return absl::OkStatus();
  }

 private:
  static bool ToInt(const json& value, int64_t* out) {
    if (!value.is_number_integer()) return false;
    if (value.is_number_unsigned() &&
        value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()}) {
      return false;
    }
    *out = value.get<int64_t>();
    return true;
  }

  const json& object_;
  const std::string source_;
  const std::string path_;
};

struct Rope {
  std::optional<double> theta;
  RopeScaling scaling;
};

bool SameScaling(const RopeScaling& a, const RopeScaling& b) {
  return a.kind == b.kind && a.factor == b.factor && a.low_freq_factor == b.low_freq_factor &&
         a.high_freq_factor == b.high_freq_factor &&
         a.original_max_position_embeddings == b.original_max_position_embeddings;
}

// `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).
absl::StatusOr<Rope> ParseRope(const json& object, const std::string& source,
                               const std::string& name, int max_position_embeddings) {
  const Reader reader(object, source, name + ".");
  std::string type = "default";
  const char* type_field = "rope_type";
  for (const char* field : {"type", "rope_type"}) {
    const json* value = reader.Find(field);
    if (value == nullptr) continue;
    if (!value->is_string()) return reader.Error(field, Reader::Show(*value) + " is no string");
    if (field == std::string_view("rope_type") && reader.Find("type") != nullptr &&
        *reader.Find("type") != *value) {
      return reader.Error(field, "disagrees with type");
    }
    type = value->get<std::string>();
    type_field = field;
  }
  if (reader.Find("type") == nullptr && reader.Find("rope_type") == nullptr &&
      reader.Find("factor") != nullptr) {
    return reader.Error("rope_type", "missing");
  }

  Rope rope;
  RopeScaling& s = rope.scaling;
  if (reader.Find("rope_theta") != nullptr) {
    double theta = 0;
    if (auto status = reader.Positive("rope_theta", nullptr, &theta); !status.ok()) return status;
    rope.theta = theta;
  }
  const double one = 1;
  double partial = 1;
  absl::Status status = reader.Positive("partial_rotary_factor", &one, &partial);
  if (!status.ok()) return status;
  if (partial != 1) return reader.Error("partial_rotary_factor", "only 1 is supported");

  if (type == "default") {
    status = reader.OnlyKeys({"type", "rope_type", "rope_theta", "partial_rotary_factor"});
  } else if (type == "linear") {
    s.kind = RopeScaling::Kind::kLinear;
    status =
        reader.OnlyKeys({"type", "rope_type", "rope_theta", "partial_rotary_factor", "factor"});
    if (status.ok()) status = reader.Positive("factor", nullptr, &s.factor);
  } else if (type == "llama3") {
    s.kind = RopeScaling::Kind::kLlama3;
    status = reader.OnlyKeys({"type", "rope_type", "rope_theta", "partial_rotary_factor", "factor",
                              "low_freq_factor", "high_freq_factor",
                              "original_max_position_embeddings"});
    if (status.ok()) status = reader.Positive("factor", nullptr, &s.factor);
    if (status.ok()) status = reader.Positive("low_freq_factor", nullptr, &s.low_freq_factor);
    if (status.ok()) status = reader.Positive("high_freq_factor", nullptr, &s.high_freq_factor);
    if (status.ok()) {
      status = reader.Int("original_max_position_embeddings", 1, kMaxDimension,
                          &max_position_embeddings, &s.original_max_position_embeddings);
    }
    if (status.ok() && s.high_freq_factor <= s.low_freq_factor) {
      return reader.Error("high_freq_factor", "not above low_freq_factor");
    }
  } else {
    return reader.Error(type_field, absl::StrCat("'", type,
                                                 "' is not supported; default, linear and llama3 "
                                                 "are"));
  }
  if (!status.ok()) return status;
  return rope;
}

absl::Status ParseRopeFields(const Reader& reader, const std::string& source, ModelConfig* c) {
  std::optional<double> theta;
  if (reader.Find("rope_theta") != nullptr) {
    theta.emplace();
    if (auto status = reader.Positive("rope_theta", nullptr, &*theta); !status.ok()) return status;
  }
  const char* first = nullptr;
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const json* object = reader.Find(name);
    if (object == nullptr) continue;
    if (!object->is_object()) return reader.Error(name, "no object");
    auto rope = ParseRope(*object, source, name, c->max_position_embeddings);
    if (!rope.ok()) return rope.status();
    if (first != nullptr && !SameScaling(c->rope_scaling, rope->scaling)) {
      return reader.Error(name, absl::StrCat("disagrees with ", first));
    }
    if (theta.has_value() && rope->theta.has_value() && *theta != *rope->theta) {
      return reader.Error(absl::StrCat(name, ".rope_theta"), "disagrees with another rope_theta");
    }
    if (rope->theta.has_value()) theta = rope->theta;
    c->rope_scaling = rope->scaling;
    first = name;
  }
  c->rope_theta = theta.value_or(10000);
  return absl::OkStatus();
}

absl::StatusOr<ExplicitMemoryConfig> ParseExplicitMemory(const json& object,
                                                         const std::string& source,
                                                         const ModelConfig& c) {
  const Reader reader(object, source, "explicit_memory.");
  ExplicitMemoryConfig m;
  absl::Status status =
      reader.OnlyKeys({"version", "memory_layers", "tokens_kept", "reference_tokens",
                       "chunk_tokens", "references_per_chunk", "prefix_token_ids"});
  if (status.ok()) status = reader.Int("version", 1, 1, nullptr, &m.version);
  if (status.ok()) {
    status = reader.Ints("memory_layers", 0, c.layers - 1, /*scalar=*/false, &m.memory_layers);
  }
  const ExplicitMemoryConfig d;
  if (status.ok()) {
    status = reader.Int("reference_tokens", 1, kMaxReferenceTokens, &d.reference_tokens,
                        &m.reference_tokens);
  }
  if (status.ok()) {
    status = reader.Int("tokens_kept", 1, m.reference_tokens, &d.tokens_kept, &m.tokens_kept);
  }
  if (status.ok()) {
    status = reader.Int("chunk_tokens", 1, kMaxReferenceTokens, &d.chunk_tokens, &m.chunk_tokens);
  }
  if (status.ok()) {
    status = reader.Int("references_per_chunk", 1, 1024, &d.references_per_chunk,
                        &m.references_per_chunk);
  }
  if (status.ok()) {
    status =
        reader.Ints("prefix_token_ids", 0, c.vocab_size - 1, /*scalar=*/false, &m.prefix_token_ids);
  }
  if (!status.ok()) return status;
  if (m.memory_layers.empty()) return reader.Error("memory_layers", "missing or empty");
  for (size_t i = 1; i < m.memory_layers.size(); ++i) {
    if (m.memory_layers[i] <= m.memory_layers[i - 1]) {
      return reader.Error("memory_layers", "not ascending");
    }
  }
  if (m.prefix_token_ids.empty()) return reader.Error("prefix_token_ids", "missing or empty");
  if (m.prefix_token_ids.size() > kMaxPrefixTokens) {
    return reader.Error("prefix_token_ids", absl::StrCat("longer than ", kMaxPrefixTokens));
  }
  if (m.prefix_token_ids[0] != c.bos_token_id) {
    return reader.Error("prefix_token_ids", absl::StrCat("starts with ", m.prefix_token_ids[0],
                                                         ", bos_token_id is ", c.bos_token_id));
  }
  // explicit-memory.md, Layout: the context starts at p + reference_tokens with <s>.
  const int64_t before = static_cast<int64_t>(m.prefix_token_ids.size()) + m.reference_tokens + 1;
  if (c.max_position_embeddings <= before) {
    return reader.Error("reference_tokens", absl::StrCat("prefix and references take ", before,
                                                         " positions, max_position_embeddings is ",
                                                         c.max_position_embeddings));
  }
  return m;
}

absl::Status CheckArchitecture(const Reader& reader) {
  const json* type = reader.Find("model_type");
  const json* architectures = reader.Find("architectures");
  if (type == nullptr && architectures == nullptr) {
    return reader.Error("architectures", "missing; only LlamaForCausalLM is supported");
  }
  if (architectures != nullptr &&
      (!architectures->is_array() || architectures->size() != 1 ||
       !(*architectures)[0].is_string() || (*architectures)[0] != "LlamaForCausalLM")) {
    return reader.Error(
        "architectures",
        absl::StrCat(Reader::Show(*architectures), " is not supported; [\"LlamaForCausalLM\"] is"));
  }
  if (type != nullptr && *type != "llama") {
    return reader.Error("model_type",
                        absl::StrCat(Reader::Show(*type), " is not supported; \"llama\" is"));
  }
  return absl::OkStatus();
}

absl::Status CheckNeutral(const Reader& reader) {
  for (const NeutralField& field : NeutralFields()) {
    const json* value = reader.Find(field.name);
    if (value == nullptr || *value == field.neutral) continue;
    return reader.Error(field.name, absl::StrCat(Reader::Show(*value), " is not supported"));
  }
  if (const json* act = reader.Find("hidden_act"); act != nullptr && *act != "silu") {
    return reader.Error("hidden_act",
                        absl::StrCat(Reader::Show(*act), " is not supported; \"silu\" is"));
  }
  if (const json* types = reader.Find("layer_types"); types != nullptr) {
    if (!types->is_array() || !std::all_of(types->begin(), types->end(),
                                           [](const json& t) { return t == "full_attention"; })) {
      return reader.Error("layer_types",
                          absl::StrCat(Reader::Show(*types),
                                       " is not supported; \"full_attention\" throughout is"));
    }
  }
  return absl::OkStatus();
}

// The double whose shortest text is that of `value`: 1e-05f becomes 1e-05,
// not 9.99999974737875e-06.
double ShortestDouble(float value) {
  std::array<char, 64> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  double out = value;
  std::from_chars(text.data(), end, out);
  return out;
}

}  // namespace

int64_t ModelConfig::parameter_count() const {
  const int64_t q = int64_t{heads} * head_dim;
  const int64_t kv = int64_t{kv_heads} * head_dim;
  const int64_t layer = hidden_size * (2 * q + 2 * kv) +
                        int64_t{3} * hidden_size * intermediate_size + 2 * int64_t{hidden_size};
  const int64_t embedding = int64_t{vocab_size} * hidden_size;
  return layer * layers + hidden_size + embedding * (tie_word_embeddings ? 1 : 2);
}

ExplicitMemoryConfig DenseMode(const ModelConfig& config, std::vector<int32_t> prefix_token_ids) {
  ExplicitMemoryConfig m;
  m.memory_layers.resize(config.layers);
  for (int l = 0; l < config.layers; ++l) m.memory_layers[l] = l;
  m.tokens_kept = m.reference_tokens;
  m.prefix_token_ids = std::move(prefix_token_ids);
  return m;
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view text, std::string_view source_name) {
  const std::string source(source_name);
  auto object = ParseJson(text, source);
  if (!object.ok()) return object.status();
  if (!object->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": no JSON object"));
  }
  const Reader reader(*object, source, "");
  if (auto status = CheckArchitecture(reader); !status.ok()) return status;
  if (auto status = CheckNeutral(reader); !status.ok()) return status;

  // Defaults are those of transformers' LlamaConfig.
  ModelConfig c;
  absl::Status status = reader.Int("vocab_size", 1, kMaxDimension, nullptr, &c.vocab_size);
  const auto integer = [&](const char* name, int64_t low, int64_t high, const int* absent,
                           int* out) {
    if (status.ok()) status = reader.Int(name, low, high, absent, out);
  };
  integer("hidden_size", 1, kMaxDimension, nullptr, &c.hidden_size);
  integer("intermediate_size", 1, kMaxDimension, nullptr, &c.intermediate_size);
  integer("num_hidden_layers", 1, kMaxLayers, nullptr, &c.layers);
  integer("num_attention_heads", 1, kMaxHeads, nullptr, &c.heads);
  integer("num_key_value_heads", 1, kMaxHeads, &c.heads, &c.kv_heads);
  const int derived = 0;
  integer("head_dim", 1, kMaxHeadDim, &derived, &c.head_dim);
  const int positions = 2048;
  integer("max_position_embeddings", 1, kMaxDimension, &positions, &c.max_position_embeddings);
  double eps = 1e-6;
  const double default_eps = eps;
  if (status.ok()) status = reader.Positive("rms_norm_eps", &default_eps, &eps);
  if (status.ok()) status = reader.Bool("tie_word_embeddings", false, &c.tie_word_embeddings);
  if (!status.ok()) return status;
  c.rms_norm_eps = static_cast<float>(eps);
  if (c.rms_norm_eps <= 0 || !std::isfinite(c.rms_norm_eps)) {
    return reader.Error("rms_norm_eps", "no number above 0 in f32");
  }
  if (c.heads % c.kv_heads != 0) {
    return reader.Error("num_key_value_heads",
                        absl::StrCat(c.kv_heads, " does not divide num_attention_heads ", c.heads));
  }
  if (c.head_dim == derived) {
    if (c.hidden_size % c.heads != 0) {
      return reader.Error("hidden_size",
                          absl::StrCat(c.hidden_size, " is no multiple of num_attention_heads ",
                                       c.heads, ", and head_dim is not given"));
    }
    c.head_dim = c.hidden_size / c.heads;
  }
  if (c.head_dim % 2 != 0 || c.head_dim > kMaxHeadDim) {
    return reader.Error("head_dim", absl::StrCat(c.head_dim, " is odd or above ", kMaxHeadDim));
  }

  if (status = ParseRopeFields(reader, source, &c); !status.ok()) return status;

  // Absent is transformers' default, null is none.
  c.bos_token_id = -1;
  const json* object_bos = object->contains("bos_token_id") ? &(*object)["bos_token_id"] : nullptr;
  if (object_bos == nullptr) {
    c.bos_token_id = c.vocab_size > 1 ? 1 : -1;
  } else if (!object_bos->is_null()) {
    int bos = 0;
    integer("bos_token_id", 0, c.vocab_size - 1, nullptr, &bos);
    c.bos_token_id = bos;
  }
  if (status.ok()) {
    status = reader.Ints("eos_token_id", 0, c.vocab_size - 1, /*scalar=*/true, &c.eos_token_ids);
  }
  if (!status.ok()) return status;
  if (!object->contains("eos_token_id") && c.vocab_size > 2) c.eos_token_ids = {2};

  if (const json* memory = reader.Find("explicit_memory"); memory != nullptr) {
    if (!memory->is_object()) return reader.Error("explicit_memory", "no object");
    auto parsed = ParseExplicitMemory(*memory, source, c);
    if (!parsed.ok()) return parsed.status();
    c.explicit_memory = *std::move(parsed);
  }
  return c;
}

std::string ModelConfigToJson(const ModelConfig& c) {
  // transformers 4's spelling of rope, which transformers 5 reads as well.
  nlohmann::ordered_json j = {
      {"architectures", {"LlamaForCausalLM"}},
      {"model_type", "llama"},
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.layers},
      {"num_attention_heads", c.heads},
      {"num_key_value_heads", c.kv_heads},
      {"head_dim", c.head_dim},
      {"hidden_act", "silu"},
      {"attention_bias", false},
      {"mlp_bias", false},
      {"max_position_embeddings", c.max_position_embeddings},
      {"rms_norm_eps", ShortestDouble(c.rms_norm_eps)},
      {"rope_theta", c.rope_theta},
      {"tie_word_embeddings", c.tie_word_embeddings},
      {"bos_token_id", nullptr},
      {"eos_token_id", nullptr},
      {"use_cache", true},
  };
  const RopeScaling& s = c.rope_scaling;
  if (s.kind == RopeScaling::Kind::kLinear) {
    j["rope_scaling"] = {{"rope_type", "linear"}, {"factor", s.factor}};
  } else if (s.kind == RopeScaling::Kind::kLlama3) {
    j["rope_scaling"] = {{"rope_type", "llama3"},
                         {"factor", s.factor},
                         {"low_freq_factor", s.low_freq_factor},
                         {"high_freq_factor", s.high_freq_factor},
                         {"original_max_position_embeddings", s.original_max_position_embeddings}};
  }
  if (c.bos_token_id >= 0) j["bos_token_id"] = c.bos_token_id;
  if (c.eos_token_ids.size() == 1) {
    j["eos_token_id"] = c.eos_token_ids[0];
  } else if (!c.eos_token_ids.empty()) {
    j["eos_token_id"] = c.eos_token_ids;
  }
  if (c.explicit_memory.has_value()) {
    const ExplicitMemoryConfig& m = *c.explicit_memory;
    j["explicit_memory"] = {{"version", m.version},
                            {"memory_layers", m.memory_layers},
                            {"tokens_kept", m.tokens_kept},
                            {"reference_tokens", m.reference_tokens},
                            {"chunk_tokens", m.chunk_tokens},
                            {"references_per_chunk", m.references_per_chunk},
                            {"prefix_token_ids", m.prefix_token_ids}};
  }
  return j.dump(2) + "\n";
}

std::vector<float> RopeInverseFrequencies(const ModelConfig& config) {
  // The order of operations, all in f32, is that of transformers' ROPE_INIT_FUNCTIONS (a number
  // divided by a tensor is its reciprocal times the number there).
  const RopeScaling& s = config.rope_scaling;
  std::vector<float> out(config.head_dim / 2);
  for (int i = 0; i < config.head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    const float power = static_cast<float>(
        std::pow(static_cast<double>(static_cast<float>(config.rope_theta)), double{exponent}));
    float f = 1.0f / power;
    const float factor = static_cast<float>(s.factor);
    if (s.kind == RopeScaling::Kind::kLinear) {
      f /= factor;
    } else if (s.kind == RopeScaling::Kind::kLlama3) {
      const double length = s.original_max_position_embeddings;
      const float wavelength = (1.0f / f) * static_cast<float>(2 * std::numbers::pi);
      const bool low = wavelength > static_cast<float>(length / s.low_freq_factor);
      const bool high = wavelength < static_cast<float>(length / s.high_freq_factor);
      if (low) {
        f /= factor;
      } else if (!high) {
        const float smooth = ((1.0f / wavelength) * static_cast<float>(length) -
                              static_cast<float>(s.low_freq_factor)) /
                             static_cast<float>(s.high_freq_factor - s.low_freq_factor);
        f = (1.0f - smooth) * f / factor + smooth * f;
      }
    }
    out[i] = f;
  }
  return out;
}

}  // namespace memory3
