// The CPU device's backward operations. Work is shared so that no two threads add to one number and
// each number is summed in an order that the number of threads does not change (products with
// weights, oneDNN's, keep their order for a fixed number of threads).

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "transformer/bf16.h"
#include "transformer/check.h"
#include "transformer/cpu/backward_kernels.h"
#include "transformer/cpu/cpu_device.h"

namespace memory3 {
namespace {

// Bounds the threads oneDNN starts from this thread.
class OmpThreads {
 public:
  explicit OmpThreads(int threads) : before_(omp_get_max_threads()) {
    omp_set_num_threads(threads);
  }
  ~OmpThreads() { omp_set_num_threads(before_); }

 private:
  const int before_;
};

float* Row(const Tensor& t, int64_t r) { return t.as<float>() + r * t.stride; }

const BatchInput& InputOf(const PreparedBatch& batch) {
  return static_cast<const CpuPreparedBatch&>(batch).input;
}

// Columns [begin, end) of `cols` that thread i of n works on: whole cache lines.
std::pair<int64_t, int64_t> ColumnShare(int64_t cols, int i, int n) {
  const int64_t lines = (cols + 15) / 16;
  return {std::min(cols, lines * i / n * 16), std::min(cols, lines * (i + 1) / n * 16)};
}

void CheckF32(const Tensor& t) { CHECK(t.dtype == DType::kF32 && t.stride >= t.cols); }

// ---- attention ----

constexpr int kTileTokens = 64;
constexpr int kTileRows = 64;

// Tokens of one block within a key tile.
struct Run {
  int block;
  int token;  // first, within the block
  int count;
};

// Up to kTileTokens keys, of one or several blocks, whose context indices do not fall; so that what
// a query sees of a tile are its first so many tokens.
struct KeyTile {
  std::vector<Run> runs;
  int tokens = 0;
};

struct SegmentTiles {
  const AttentionSegment* segment;
  std::vector<KeyTile> tiles;
};

int LastIndex(const KvBlock& block, const Run& run) {
  return block.first == KvBlock::kSeenByAll ? KvBlock::kSeenByAll
                                            : block.first + run.token + run.count - 1;
}

std::vector<KeyTile> CutIntoTiles(const AttentionPlan& plan, const AttentionSegment& segment,
                                  std::span<const int> source_layer) {
  std::vector<KeyTile> tiles;
  for (const bool masked : {false, true}) {
    for (int i = segment.block_begin; i < segment.block_end; ++i) {
      const int id = plan.block_ids[i];
      const KvBlock& block = plan.blocks[id];
      if (source_layer[block.source] < 0) continue;
      if ((block.first != KvBlock::kSeenByAll) != masked) continue;
      int tokens = block.tokens;
      if (masked) tokens = std::min(tokens, segment.first + segment.rows - block.first);
      for (int token = 0; token < tokens;) {
        const bool open =
            !tiles.empty() && tiles.back().tokens < kTileTokens &&
            (!masked || block.first + token > LastIndex(plan.blocks[tiles.back().runs.back().block],
                                                        tiles.back().runs.back()));
        if (!open) tiles.emplace_back();
        KeyTile& tile = tiles.back();
        const int count = std::min(tokens - token, kTileTokens - tile.tokens);
        tile.runs.push_back({id, token, count});
        tile.tokens += count;
        token += count;
      }
    }
  }
  return tiles;
}

int Visible(const AttentionPlan& plan, const KeyTile& tile, int context_index) {
  int visible = 0;
  for (const Run& run : tile.runs) {
    const KvBlock& block = plan.blocks[run.block];
    visible += block.first == KvBlock::kSeenByAll
                   ? run.count
                   : std::clamp(context_index - (block.first + run.token) + 1, 0, run.count);
  }
  return visible;
}

// Segments whose blocks share a gradient must be worked on by one thread: groups them. Gradients
// overlap only where they begin at one address.
std::vector<std::vector<int>> Components(const AttentionPlan& plan,
                                         const std::vector<SegmentTiles>& segments) {
  std::vector<int> parent(segments.size());
  std::iota(parent.begin(), parent.end(), 0);
  const auto root = [&](int i) {
    while (parent[i] != i) i = parent[i] = parent[parent[i]];
    return i;
  };
  // By address: two blocks may be one memory.
  absl::flat_hash_map<const float*, int> owner;
  for (int s = 0; s < segments.size(); ++s) {
    for (const KeyTile& tile : segments[s].tiles) {
      for (const Run& run : tile.runs) {
        const float* gradient = plan.blocks[run.block].gradient;
        if (gradient == nullptr) continue;
        const auto [known, is_new] = owner.try_emplace(gradient, s);
        if (!is_new) {
          // The lower index is the root, so the order of the components is the segments'.
          const int a = root(known->second), b = root(s);
          parent[std::max(a, b)] = std::min(a, b);
        }
      }
    }
  }
  std::vector<std::vector<int>> components;
  std::vector<int> component(segments.size(), -1);
  for (int s = 0; s < segments.size(); ++s) {
    int& c = component[root(s)];
    if (c < 0) {
      c = components.size();
      components.emplace_back();
    }
    components[c].push_back(s);
  }
  return components;
}

int64_t PadTo(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The backward of one KV head over one component's segments.
class HeadBackward {
 public:
  HeadBackward(const BackwardKernels& kernels, const AttentionPlan& plan,
               std::span<const int> source_layer, const AttentionShape& shape, Tensor dq,
               Tensor dout, Tensor out, Tensor q, const float* lse, int most_rows)
      : kernels_(kernels),
        plan_(plan),
        source_layer_(source_layer),
        shape_(shape),
        dq_(dq),
        dout_(dout),
        out_(out),
        q_(q),
        lse_(lse),
        group_(shape.heads / shape.kv_heads),
        width_(PadTo(shape.head_dim, kColumnPad)) {
    const int64_t rows = PadTo(int64_t{most_rows} * group_, kRowPad);
    rows_q_.resize(rows * width_);
    rows_dout_.resize(rows * width_);
    rows_dq_.resize(rows * width_);
    rows_lse_.resize(rows);
    rows_delta_.resize(rows);
    key_.resize(kTileTokens * width_);
    value_.resize(kTileTokens * width_);
    key_columns_.resize(width_ * kTileTokens);
    value_columns_.resize(width_ * kTileTokens);
    dkey_.resize(kTileTokens * width_);
    dvalue_.resize(kTileTokens * width_);
    p_.resize(kTileRows * kTileTokens);
    ds_.resize(kTileRows * kTileTokens);
  }

  void Segment(const SegmentTiles& work, int kv_head) {
    const AttentionSegment& segment = *work.segment;
    const int rows = segment.rows * group_;
    const int padded = PadTo(rows, kRowPad);
    LoadRows(segment, kv_head, rows, padded);
    for (const KeyTile& tile : work.tiles) Tile(tile, segment, kv_head, rows, padded);
    for (int r = 0; r < rows; ++r) {
      std::memcpy(Row(dq_, segment.row + r / group_) + HeadOffset(kv_head, r % group_),
                  &rows_dq_[r * width_], shape_.head_dim * sizeof(float));
    }
  }

 private:
  int64_t HeadOffset(int kv_head, int member) const {
    return (int64_t{kv_head} * group_ + member) * shape_.head_dim;
  }

  // Row r of the scratch is token r / group_, query head r % group_ of the group; zero past `rows`.
  void LoadRows(const AttentionSegment& segment, int kv_head, int rows, int padded) {
    const int d = shape_.head_dim;
    std::fill_n(rows_dq_.begin(), padded * width_, 0.0f);
    for (int r = 0; r < padded; ++r) {
      float* q = &rows_q_[r * width_];
      float* dout = &rows_dout_[r * width_];
      std::fill_n(q, width_, 0.0f);
      std::fill_n(dout, width_, 0.0f);
      rows_lse_[r] = rows_delta_[r] = 0;
      if (r >= rows) continue;
      const int64_t row = segment.row + r / group_;
      const int64_t offset = HeadOffset(kv_head, r % group_);
      std::memcpy(q, Row(q_, row) + offset, d * sizeof(float));
      std::memcpy(dout, Row(dout_, row) + offset, d * sizeof(float));
      rows_lse_[r] = lse_[row * shape_.heads + kv_head * group_ + r % group_];
      // Σ_t p_t dp_t = dout · out.
      rows_delta_[r] = kernels_.dot(dout, Row(out_, row) + offset, d);
    }
  }

  int64_t KeyOffset(const KvBlock& block, int token, int kv_head) const {
    const KvSource& source = plan_.sources[block.source];
    return source_layer_[block.source] * source.layer_stride + kv_head * source.head_stride +
           token * source.token_stride;
  }

  void LoadVector(float* to, const KvBlock& block, int64_t offset) const {
    if (plan_.sources[block.source].dtype == DType::kF32) {
      std::memcpy(to, static_cast<const float*>(block.base) + offset,
                  shape_.head_dim * sizeof(float));
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(block.base) + offset;
      for (int i = 0; i < shape_.head_dim; ++i) to[i] = Bf16ToFloat(from[i]);
    }
  }

  void Tile(const KeyTile& tile, const AttentionSegment& segment, int kv_head, int rows,
            int padded) {
    bool wants_gradient = false;
    std::fill(key_.begin(), key_.end(), 0.0f);
    std::fill(value_.begin(), value_.end(), 0.0f);
    int column = 0;
    for (const Run& run : tile.runs) {
      const KvBlock& block = plan_.blocks[run.block];
      wants_gradient |= block.gradient != nullptr;
      for (int t = 0; t < run.count; ++t, ++column) {
        const int64_t offset = KeyOffset(block, run.token + t, kv_head);
        LoadVector(&key_[column * width_], block, offset);
        LoadVector(&value_[column * width_], block,
                   offset + plan_.sources[block.source].value_offset);
      }
    }
    kernels_.transpose(key_columns_.data(), kTileTokens, key_.data(), width_, kTileTokens, width_);
    kernels_.transpose(value_columns_.data(), kTileTokens, value_.data(), width_, kTileTokens,
                       width_);
    if (wants_gradient) {
      std::fill(dkey_.begin(), dkey_.end(), 0.0f);
      std::fill(dvalue_.begin(), dvalue_.end(), 0.0f);
    }

    const int columns = PadTo(tile.tokens, kColumnPad);
    for (int r0 = 0; r0 < rows; r0 += kTileRows) {
      const int last = std::min(r0 + kTileRows, rows) - 1;
      if (Visible(plan_, tile, segment.first + last / group_) == 0) continue;
      const int count = std::min(kTileRows, padded - r0);
      const float* q = &rows_q_[r0 * width_];
      const float* dout = &rows_dout_[r0 * width_];
      kernels_.product(count, columns, shape_.head_dim, q, width_, 1, key_columns_.data(),
                       kTileTokens, p_.data(), kTileTokens, false);
      kernels_.product(count, columns, shape_.head_dim, dout, width_, 1, value_columns_.data(),
                       kTileTokens, ds_.data(), kTileTokens, false);
      for (int i = 0; i < count; ++i) {
        const int visible =
            r0 + i < rows ? Visible(plan_, tile, segment.first + (r0 + i) / group_) : 0;
        kernels_.softmax_backward(&p_[i * kTileTokens], &ds_[i * kTileTokens], columns, visible,
                                  shape_.scale, rows_lse_[r0 + i], rows_delta_[r0 + i]);
      }
      kernels_.product(count, width_, tile.tokens, ds_.data(), kTileTokens, 1, key_.data(), width_,
                       &rows_dq_[r0 * width_], width_, true);
      if (!wants_gradient) continue;
      const int tokens = PadTo(tile.tokens, kRowPad);
      kernels_.product(tokens, width_, count, p_.data(), 1, kTileTokens, dout, width_,
                       dvalue_.data(), width_, true);
      kernels_.product(tokens, width_, count, ds_.data(), 1, kTileTokens, q, width_, dkey_.data(),
                       width_, true);
    }

    column = 0;
    for (const Run& run : tile.runs) {
      const KvBlock& block = plan_.blocks[run.block];
      for (int t = 0; t < run.count; ++t, ++column) {
        if (block.gradient == nullptr) continue;
        float* dkey = block.gradient + KeyOffset(block, run.token + t, kv_head);
        kernels_.add(dkey, &dkey_[column * width_], shape_.head_dim);
        kernels_.add(dkey + plan_.sources[block.source].value_offset, &dvalue_[column * width_],
                     shape_.head_dim);
      }
    }
  }

  const BackwardKernels& kernels_;
  const AttentionPlan& plan_;
  const std::span<const int> source_layer_;
  const AttentionShape shape_;
  const Tensor dq_, dout_, out_, q_;
  const float* const lse_;
  const int group_;
  const int64_t width_;  // head_dim, padded
  std::vector<float> rows_q_, rows_dout_, rows_dq_, rows_lse_, rows_delta_;
  std::vector<float> key_, value_, key_columns_, value_columns_, dkey_, dvalue_;
  std::vector<float> p_, ds_;
};

}  // namespace

const BackwardKernels& BackwardKernelsFor(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kGeneric:
      return GenericBackwardKernels();
    case CpuIsa::kAvx2:
      return Avx2BackwardKernels();
    default:
      return Avx512BackwardKernels();
  }
}

void CpuDevice::MatMulBackwardInput(Tensor dx, Tensor dy, const Weight& w, bool accumulate) {
  const auto* trainable = dynamic_cast<const CpuTrainableWeight*>(&w);
  CHECK(trainable != nullptr);  // a packed weight has no backward
  const Tensor& matrix = trainable->matrix();
  CHECK(dx.rows == dy.rows && dx.cols == w.in() && dy.cols == w.out());
  CheckF32(dx);
  CheckF32(dy);
  if (dx.rows == 0) return;
  const OmpThreads bound(threads_);
  const dnnl_status_t status = dnnl_sgemm('N', 'N', dx.rows, dx.cols, dy.cols, 1.0f, dy.as<float>(),
                                          dy.stride, matrix.as<float>(), matrix.stride,
                                          accumulate ? 1.0f : 0.0f, dx.as<float>(), dx.stride);
  CHECK(status == dnnl_success);
}

void CpuDevice::MatMulBackwardWeight(Tensor dw, Tensor dy, Tensor x) {
  CHECK(dw.rows == dy.cols && dw.cols == x.cols && dy.rows == x.rows);
  CheckF32(dw);
  CheckF32(dy);
  CheckF32(x);
  if (x.rows == 0) return;
  const OmpThreads bound(threads_);
  const dnnl_status_t status =
      dnnl_sgemm('T', 'N', dw.rows, dw.cols, x.rows, 1.0f, dy.as<float>(), dy.stride, x.as<float>(),
                 x.stride, 1.0f, dw.as<float>(), dw.stride);
  CHECK(status == dnnl_success);
}

void CpuDevice::EmbedBackward(Tensor dtable, Tensor dy, const PreparedBatch& batch) {
  const std::vector<int32_t>& ids = InputOf(batch).token_ids;
  CHECK(dy.rows == ids.size() && dtable.cols == dy.cols);
  CheckF32(dtable);
  CheckF32(dy);
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
  // A token may stand in many rows: threads share the columns.
#pragma omp parallel num_threads(threads_)
  {
    const auto [begin, end] = ColumnShare(dy.cols, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t r = 0; r < dy.rows; ++r) {
      kernels.add(Row(dtable, ids[r]) + begin, Row(dy, r) + begin, end - begin);
    }
  }
}

void CpuDevice::RmsNormBackward(Tensor dx, float* dgain, Tensor dy, Tensor x, const float* gain,
                                const float* inv_rms) {
  CHECK(dx.rows == x.rows && dy.rows == x.rows && dx.cols == x.cols && dy.cols == x.cols);
  CheckF32(dx);
  CheckF32(dy);
  CheckF32(x);
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
  // Columns of dgain and rows of dx are shared out, so no number has two writers.
#pragma omp parallel num_threads(threads_)
  {
    const auto [begin, end] = ColumnShare(x.cols, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t r = 0; r < x.rows; ++r) {
      kernels.rms_norm_gain(dgain + begin, Row(dy, r) + begin, Row(x, r) + begin, inv_rms[r],
                            end - begin);
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < x.rows; ++r) {
      kernels.rms_norm_backward(Row(dx, r), Row(dy, r), Row(x, r), gain, inv_rms[r], x.cols);
    }
  }
}

void CpuDevice::AttentionBackward(Tensor dq, Tensor dout, Tensor out, Tensor q,
                                  const PreparedBatch& batch, std::span<const int> source_layer,
                                  const AttentionShape& shape, const float* lse) {
  const AttentionPlan& plan = InputOf(batch).attention;
  CHECK(source_layer.size() == plan.sources.size());
  CHECK(shape.heads % shape.kv_heads == 0);
  for (const Tensor& t : {dq, dout, out, q}) {
    CheckF32(t);
    CHECK(t.cols == int64_t{shape.heads} * shape.head_dim);
  }
  std::vector<SegmentTiles> segments;
  int most_rows = 0;
  for (const AttentionSegment& segment : plan.segments) {
    segments.push_back({&segment, CutIntoTiles(plan, segment, source_layer)});
    most_rows = std::max(most_rows, segment.rows);
  }
  const std::vector<std::vector<int>> components = Components(plan, segments);
  const int tasks = static_cast<int>(components.size()) * shape.kv_heads;
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
#pragma omp parallel num_threads(std::min(threads_, std::max(tasks, 1)))
  {
    HeadBackward head(kernels, plan, source_layer, shape, dq, dout, out, q, lse, most_rows);
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      for (const int s : components[task / shape.kv_heads]) {
        head.Segment(segments[s], task % shape.kv_heads);
      }
    }
  }
}

void CpuDevice::SiluMulBackward(Tensor dgate_up, Tensor dy, Tensor gate_up) {
  CHECK(dy.rows == gate_up.rows && dgate_up.rows == gate_up.rows);
  CHECK(gate_up.cols == 2 * dy.cols && dgate_up.cols == gate_up.cols);
  CheckF32(dgate_up);
  CheckF32(dy);
  CheckF32(gate_up);
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
  const int64_t n = dy.cols;
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t r = 0; r < dy.rows; ++r) {
    kernels.silu_mul_backward(Row(dgate_up, r), Row(dgate_up, r) + n, Row(dy, r), Row(gate_up, r),
                              Row(gate_up, r) + n, n);
  }
}

void CpuDevice::ScatterRows(Tensor dx, Tensor dy, const PreparedBatch& batch) {
  const std::vector<int32_t>& rows = InputOf(batch).logit_rows;
  CHECK(dy.rows == rows.size() && dx.cols == dy.cols);
  CheckF32(dx);
  CheckF32(dy);
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
#pragma omp parallel num_threads(threads_)
  {
    const auto [begin, end] = ColumnShare(dy.cols, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t i = 0; i < dy.rows; ++i) {
      kernels.add(Row(dx, rows[i]) + begin, Row(dy, i) + begin, end - begin);
    }
  }
}

void CpuDevice::ScatterKept(Tensor dk, Tensor dv, const float* dmemory, const int32_t* kept,
                            int references, int keep, int kv_heads, int head_dim) {
  CheckF32(dk);
  CheckF32(dv);
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
  const int64_t half = int64_t{kv_heads} * keep * head_dim;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads_)
  for (int r = 0; r < references; ++r) {
    for (int h = 0; h < kv_heads; ++h) {
      for (int i = 0; i < keep; ++i) {
        const int32_t row = kept[(int64_t{r} * kv_heads + h) * keep + i];
        if (row < 0) continue;
        const float* key = dmemory + r * 2 * half + (int64_t{h} * keep + i) * head_dim;
        kernels.add(Row(dk, row) + int64_t{h} * head_dim, key, head_dim);
        kernels.add(Row(dv, row) + int64_t{h} * head_dim, key + half, head_dim);
      }
    }
  }
}

void CpuDevice::CrossEntropy(float* losses, Tensor logits, std::span<const int32_t> targets,
                             float loss_scale) {
  CHECK(logits.rows == targets.size());
  CheckF32(logits);
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t r = 0; r < logits.rows; ++r) {
    if (targets[r] < 0) {
      std::memset(Row(logits, r), 0, logits.cols * sizeof(float));
      losses[r] = 0;
    } else {
      losses[r] = kernels.cross_entropy(Row(logits, r), logits.cols, targets[r], loss_scale);
    }
  }
}

}  // namespace memory3
