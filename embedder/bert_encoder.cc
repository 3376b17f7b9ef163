#include "embedder/bert_encoder.h"

#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "embedder/bert_kernels.h"
#include "transformer/safetensors.h"

namespace memory3 {
namespace {

// Restores the calling thread's number of OpenMP threads; oneDNN takes it too.
class ThreadBound {
 public:
  explicit ThreadBound(int threads) : before_(omp_get_max_threads()) {
    omp_set_num_threads(threads);
  }
  ~ThreadBound() { omp_set_num_threads(before_); }
  ThreadBound(const ThreadBound&) = delete;
  ThreadBound& operator=(const ThreadBound&) = delete;

 private:
  int before_;
};

// c [m, n] = a [m, k] · b [n, k]ᵀ, rows `lda`, `ldb`, `ldc` apart.
void MultiplyTransposed(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                        const float* b, int64_t ldb, float* c, int64_t ldc) {
  dnnl_sgemm('N', 'T', m, n, k, 1.0f, a, lda, b, ldb, 0.0f, c, ldc);
}

}  // namespace

class BertEncoder::Loader {
 public:
  static absl::StatusOr<std::unique_ptr<Loader>> Open(const std::string& directory) {
    absl::StatusOr<std::unique_ptr<SafetensorsFile>> file =
        SafetensorsFile::Open(directory + "/model.safetensors");
    if (!file.ok()) return file.status();
    std::unique_ptr<Loader> loader(new Loader(*std::move(file)));
    // A bare encoder, or one inside a model with a head.
    for (const char* prefix : {"", "bert.", "roberta."}) {
      const std::string name = absl::StrCat(prefix, "embeddings.word_embeddings.weight");
      if (loader->file_->header().tensors.contains(name)) {
        loader->prefix_ = prefix;
        return loader;
      }
    }
    return absl::InvalidArgumentError(
        absl::StrCat(loader->file_->path(),
                     ": has no tensor embeddings.word_embeddings.weight, nor the same "
                     "under bert. or roberta."));
  }

  // Appends `shape`'s elements to `out`.
  absl::Status Read(const std::string& name, const std::vector<int64_t>& shape,
                    std::vector<float>* out) {
    const std::string full = prefix_ + name;
    const auto it = file_->header().tensors.find(full);
    if (it == file_->header().tensors.end()) {
      return absl::InvalidArgumentError(absl::StrCat(file_->path(), ": has no tensor ", full));
    }
    if (it->second.shape != shape) {
      return absl::InvalidArgumentError(absl::StrCat(
          file_->path(), ": tensor ", full, " has shape [", absl::StrJoin(it->second.shape, ", "),
          "], config.json asks for [", absl::StrJoin(shape, ", "), "]"));
    }
    const size_t begin = out->size();
    out->resize(begin + it->second.elements());
    const std::span<float> floats = std::span(*out).subspan(begin);
    if (absl::Status status = file_->ReadFloats(full, floats); !status.ok()) return status;
    sha_.UpdateLengthPrefixed(name);
    sha_.UpdateLengthPrefixed(
        {reinterpret_cast<const char*>(floats.data()), floats.size() * sizeof(float)});
    return absl::OkStatus();
  }
  // Appends, so that query, key and value make one matrix.
  absl::Status Read(const std::string& name, int64_t rows, int64_t columns, Linear* linear) {
    if (absl::Status s = Read(name + ".weight", {rows, columns}, &linear->weight); !s.ok())
      return s;
    return Read(name + ".bias", {rows}, &linear->bias);
  }
  absl::Status Read(const std::string& name, int64_t width, Norm* norm) {
    // TensorFlow's names live on in older files.
    const bool old = file_->header().tensors.contains(absl::StrCat(prefix_, name, ".gamma"));
    if (absl::Status s = Read(name + (old ? ".gamma" : ".weight"), {width}, &norm->weight);
        !s.ok()) {
      return s;
    }
    return Read(name + (old ? ".beta" : ".bias"), {width}, &norm->bias);
  }
  Hash256 Finish() { return sha_.Finish(); }

 private:
  explicit Loader(std::unique_ptr<SafetensorsFile> file) : file_(std::move(file)) {}

  std::unique_ptr<SafetensorsFile> file_;
  std::string prefix_;
  Sha256 sha_;
};

absl::StatusOr<std::unique_ptr<BertEncoder>> BertEncoder::Load(const std::string& directory,
                                                               const BertConfig& config) {
  absl::StatusOr<std::unique_ptr<Loader>> opened = Loader::Open(directory);
  if (!opened.ok()) return opened.status();
  Loader& in = **opened;
  std::unique_ptr<BertEncoder> e(new BertEncoder(config));
  const int64_t h = config.hidden_size, inner = config.intermediate_size;

  std::vector<float> positions, types;
  absl::Status status =
      in.Read("embeddings.word_embeddings.weight", {config.vocab_size, h}, &e->words_);
  status.Update(
      in.Read("embeddings.position_embeddings.weight", {config.positions, h}, &positions));
  status.Update(
      in.Read("embeddings.token_type_embeddings.weight", {config.token_types, h}, &types));
  status.Update(in.Read("embeddings.LayerNorm", h, &e->embedding_norm_));
  e->layers_.resize(config.layers);
  for (int l = 0; l < config.layers && status.ok(); ++l) {
    const std::string at = absl::StrCat("encoder.layer.", l, ".");
    Layer& layer = e->layers_[l];
    for (const char* part : {"query", "key", "value"}) {
      status.Update(in.Read(at + "attention.self." + part, h, h, &layer.qkv));
    }
    status.Update(in.Read(at + "attention.output.dense", h, h, &layer.output));
    status.Update(in.Read(at + "attention.output.LayerNorm", h, &layer.attention_norm));
    status.Update(in.Read(at + "intermediate.dense", inner, h, &layer.up));
    status.Update(in.Read(at + "output.dense", h, inner, &layer.down));
    status.Update(in.Read(at + "output.LayerNorm", h, &layer.norm));
  }
  if (!status.ok()) return status;
  e->digest_ = in.Finish();

  // All tokens are of type 0.
  e->positions_.resize(config.max_tokens * h);
  for (int64_t i = 0; i < config.max_tokens; ++i) {
    for (int64_t j = 0; j < h; ++j) {
      e->positions_[i * h + j] = positions[(config.position_offset + i) * h + j] + types[j];
    }
  }
  return e;
}

absl::Status BertEncoder::Encode(std::span<const int32_t> ids, std::span<const int> lengths,
                                 int threads, std::span<float> out) const {
  const int64_t tokens = static_cast<int64_t>(ids.size());
  const int64_t sequences = static_cast<int64_t>(lengths.size());
  const int64_t h = config_.hidden_size, inner = config_.intermediate_size, heads = config_.heads,
                head_dim = config_.head_dim();
  std::vector<int64_t> begins(sequences + 1, 0);
  int longest = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    if (lengths[s] < 1 || lengths[s] > config_.max_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("lengths[", s, "] is ", lengths[s], ", not in 1..", config_.max_tokens));
    }
    begins[s + 1] = begins[s] + lengths[s];
    longest = std::max(longest, lengths[s]);
  }
  if (begins[sequences] != tokens || static_cast<int64_t>(out.size()) != sequences * h) {
    return absl::InvalidArgumentError("ids, lengths and out do not fit together");
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (ids[t] < 0 || ids[t] >= config_.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("ids[", t, "] is ", ids[t], ", not in 0..", config_.vocab_size - 1));
    }
  }

  const ThreadBound bound(threads);
  std::vector<float> x(tokens * h), y(tokens * h), wide(tokens * std::max(3 * h, inner));
  const auto norm_rows = [&](const Norm& norm, const float* residual, float* rows) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      AddLayerNorm(residual == nullptr ? nullptr : residual + t * h, norm.weight.data(),
                   norm.bias.data(), config_.layer_norm_eps, static_cast<int>(h), rows + t * h);
    }
  };
  const auto bias_rows = [&](const std::vector<float>& bias, float* rows) {
    const int64_t n = static_cast<int64_t>(bias.size());
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) AddBias(bias.data(), static_cast<int>(n), rows + t * n);
  };

  for (int64_t s = 0; s < sequences; ++s) {
    for (int i = 0; i < lengths[s]; ++i) {
      const int64_t t = begins[s] + i;
      const float* word = words_.data() + ids[t] * h;
      const float* position = positions_.data() + i * h;
      for (int64_t j = 0; j < h; ++j) x[t * h + j] = word[j] + position[j];
    }
  }
  norm_rows(embedding_norm_, nullptr, x.data());

  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (const Layer& layer : layers_) {
    MultiplyTransposed(tokens, 3 * h, h, x.data(), h, layer.qkv.weight.data(), h, wide.data(),
                       3 * h);
    bias_rows(layer.qkv.bias, wide.data());
#pragma omp parallel
    {
      std::vector<float> scores(static_cast<size_t>(longest) * longest);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < sequences * heads; ++task) {
        const int64_t s = task / heads, head = task % heads, n = lengths[s];
        const float* q = wide.data() + begins[s] * 3 * h + head * head_dim;
        MultiplyTransposed(n, n, head_dim, q, 3 * h, q + h, 3 * h, scores.data(), n);
        for (int64_t i = 0; i < n; ++i) {
          ScaledSoftmax(scale, static_cast<int>(n), scores.data() + i * n);
        }
        dnnl_sgemm('N', 'N', n, head_dim, n, 1.0f, scores.data(), n, q + 2 * h, 3 * h, 0.0f,
                   y.data() + begins[s] * h + head * head_dim, h);
      }
    }
    // y: what the heads read; x stays the residual.
    MultiplyTransposed(tokens, h, h, y.data(), h, layer.output.weight.data(), h, wide.data(), h);
    bias_rows(layer.output.bias, wide.data());
    norm_rows(layer.attention_norm, x.data(), wide.data());
    x.assign(wide.begin(), wide.begin() + tokens * h);

    MultiplyTransposed(tokens, inner, h, x.data(), h, layer.up.weight.data(), h, wide.data(),
                       inner);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      BiasGelu(layer.up.bias.data(), static_cast<int>(inner), wide.data() + t * inner);
    }
    MultiplyTransposed(tokens, h, inner, wide.data(), inner, layer.down.weight.data(), inner,
                       y.data(), h);
    bias_rows(layer.down.bias, y.data());
    norm_rows(layer.norm, x.data(), y.data());
    std::swap(x, y);
  }

  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t rows = config_.pooling == BertConfig::Pooling::kCls ? 1 : lengths[s];
    float* const pooled = out.data() + s * h;
    std::fill_n(pooled, h, 0.0f);
    for (int64_t t = begins[s]; t < begins[s] + rows; ++t) {
      for (int64_t j = 0; j < h; ++j) pooled[j] += x[t * h + j];
    }
    double squares = 0;
    for (int64_t j = 0; j < h; ++j) squares += double{pooled[j]} * pooled[j];
    const auto inverse = static_cast<float>(1 / std::sqrt(squares));
    // A model whose weights are not finite, or all zero, has no direction to give.
    if (!std::isfinite(inverse)) {
      return absl::InternalError("the encoder's output has no finite, positive norm");
    }
    for (int64_t j = 0; j < h; ++j) pooled[j] *= inverse;
  }
  return absl::OkStatus();
}

}  // namespace memory3
