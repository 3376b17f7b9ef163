// Attention over a list of key/value blocks under one softmax.
//
// A task is one KV head and a tile of rows of one segment: all query heads that read this KV head,
// so keys and values are brought in once for them. The keys the tile may see are strung together,
// whatever blocks they stand in, and taken 64 at a time:
//   scores = q Kᵀ    keys turned into the columns of a panel, then the product kernel;
//   softmax          per query, over its own row of scores, masked keys at -inf;
//   out = p V        values are already rows of a panel; the sum goes on from tile to tile.
// Every score is one sum over head_dim, every output one sum over the keys in their order, and a
// masked key adds an exact zero, so a row's result depends neither on the rows beside it nor on how
// its keys are cut into blocks.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "transformer/check.h"
#include "transformer/cpu/cpu_device.h"
#include "transformer/cpu/kernels.h"

namespace memory3 {
namespace {

constexpr int kTileKeys = CpuKernels::kPanel;
// Queries (rows times heads of the group) of one task.
constexpr int kTileQueries = 64;
// Scores of one task that should stay in the second-level cache.
constexpr int64_t kScoreBytes = int64_t{1} << 19;

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A run of visible keys: tokens [0, tokens) of one block.
struct KeyRun {
  const void* key;
  int64_t token_stride;
  int64_t value_offset;
  DType dtype;
  int tokens;
  int start;  // number of keys before this run
  int first;  // KvBlock::first
};

int Visible(const KvBlock& block, int index) {
  if (block.first == KvBlock::kSeenByAll) return block.tokens;
  return static_cast<int>(std::clamp<int64_t>(int64_t{index} - block.first + 1, 0, block.tokens));
}

struct Task {
  const AttentionSegment* segment;
  int kv_head;
  int row, rows;  // within the segment
};

// One thread's room to work in.
struct Workspace {
  float* query;   // [queries, head_dim]
  float* scores;  // [queries, keys rounded up]
  float* out;     // [queries, width]
  float* keys;    // [head_dim, 64]
  float* values;  // [width / 64][64, 64]
  float* token;   // [64, head_dim], bf16 tokens widened
};

}  // namespace

void CpuDevice::Attention(Tensor out, Tensor q, const PreparedBatch& batch,
                          std::span<const int> source_layer, const AttentionShape& shape,
                          float* lse) {
  const AttentionPlan& plan = static_cast<const CpuPreparedBatch&>(batch).input.attention;
  const int d = shape.head_dim;
  CHECK(q.dtype == DType::kF32 && out.dtype == DType::kF32);
  CHECK(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0);
  CHECK(q.cols == shape.heads * d && out.cols == q.cols && q.rows == out.rows);
  CHECK(source_layer.size() == plan.sources.size());
  const int group = shape.heads / shape.kv_heads;
  const int64_t width = RoundUp(d, CpuKernels::kPanel);

  std::vector<Task> tasks;
  int64_t most_queries = 0, most_scores = 0;
  for (const AttentionSegment& s : plan.segments) {
    if (s.rows == 0) continue;
    CHECK(s.row >= 0 && s.row + s.rows <= q.rows);
    int64_t keys = 0;
    for (int b = s.block_begin; b < s.block_end; ++b) {
      const KvBlock& block = plan.blocks[plan.block_ids[b]];
      if (source_layer[block.source] >= 0) keys += Visible(block, s.first + s.rows - 1);
    }
    const int64_t stride = RoundUp(keys, kTileKeys);
    const int64_t fitting =
        std::min<int64_t>(kTileQueries, kScoreBytes / std::max<int64_t>(stride * 4, 1));
    const int rows = static_cast<int>(std::clamp<int64_t>(fitting / group, 1, s.rows));
    most_queries = std::max<int64_t>(most_queries, rows * group);
    most_scores = std::max<int64_t>(most_scores, rows * group * stride);
    // Later rows see more: they go first, so that the threads end together.
    for (int row = (s.rows - 1) / rows * rows; row >= 0; row -= rows) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        tasks.push_back({&s, h, row, std::min(rows, s.rows - row)});
      }
    }
  }
  if (tasks.empty()) return;

  const int64_t sizes[] = {most_queries * d,       most_scores,       most_queries * width,
                           int64_t{d} * kTileKeys, kTileKeys * width, int64_t{kTileKeys} * d};
  int64_t floats = 0;
  for (const int64_t size : sizes) floats += RoundUp(size, 16);
  const int team = std::min<int>(threads_, static_cast<int>(tasks.size()));
  float* const scratch = static_cast<float*>(Scratch(team * floats * sizeof(float)));

#pragma omp parallel num_threads(team)
  {
    Workspace work;
    float* at = scratch + omp_get_thread_num() * floats;
    int part = 0;
    for (float** p :
         {&work.query, &work.scores, &work.out, &work.keys, &work.values, &work.token}) {
      *p = at;
      at += RoundUp(sizes[part++], 16);
    }
    std::memset(work.values, 0, sizes[4] * sizeof(float));  // columns past head_dim stay zero
    std::vector<KeyRun> runs;

#pragma omp for schedule(dynamic, 1)
    for (size_t t = 0; t < tasks.size(); ++t) {
      const Task& task = tasks[t];
      const AttentionSegment& segment = *task.segment;
      const int queries = task.rows * group;

      runs.clear();
      int keys = 0;
      for (int b = segment.block_begin; b < segment.block_end; ++b) {
        const KvBlock& block = plan.blocks[plan.block_ids[b]];
        const KvSource& source = plan.sources[block.source];
        const int layer = source_layer[block.source];
        if (layer < 0) continue;
        const int tokens = Visible(block, segment.first + task.row + task.rows - 1);
        if (tokens == 0) continue;
        const int64_t offset = layer * source.layer_stride + task.kv_head * source.head_stride;
        runs.push_back({static_cast<const char*>(block.base) + offset * SizeOf(source.dtype),
                        source.token_stride, source.value_offset, source.dtype, tokens, keys,
                        block.first});
        keys += tokens;
      }
      const int64_t stride = RoundUp(keys, kTileKeys);

      for (int r = 0; r < task.rows; ++r) {
        const int64_t row = segment.row + task.row + r;
        std::memcpy(work.query + r * group * d,
                    q.as<float>() + row * q.stride + task.kv_head * group * d,
                    group * d * sizeof(float));
      }

      // Calls use(column, tokens, data, stride) for the runs' parts within keys [first, first + n);
      // data: keys, or values, as f32.
      const auto for_tile = [&](int first, int n, bool value, const auto& use) {
        for (const KeyRun& run : runs) {
          const int from = std::max(first, run.start);
          const int to = std::min(first + n, run.start + run.tokens);
          if (from >= to) continue;
          const int64_t element =
              (from - run.start) * run.token_stride + (value ? run.value_offset : 0);
          if (run.dtype == DType::kF32) {
            use(from - first, to - from, static_cast<const float*>(run.key) + element,
                run.token_stride);
          } else {
            const uint16_t* half = static_cast<const uint16_t*>(run.key) + element;
            for (int i = 0; i < to - from; ++i) {
              kernels_.f32_from_bf16(work.token + i * d, half + i * run.token_stride, d);
            }
            use(from - first, to - from, work.token, int64_t{d});
          }
        }
      };

      for (int first = 0; first < keys; first += kTileKeys) {
        for_tile(first, kTileKeys, false, [&](int column, int n, const float* data, int64_t step) {
          kernels_.pack_columns(work.keys, column, data, step, n, d);
        });
        kernels_.panel_f32(work.query, d, work.keys, d, queries, work.scores + first, stride,
                           PanelMode::kStore, nullptr);
      }

      for (int i = 0; i < queries; ++i) {
        float* s = work.scores + i * stride;
        const int index = segment.first + task.row + i / group;
        for (const KeyRun& run : runs) {
          if (run.first == KvBlock::kSeenByAll) continue;
          const int visible = std::clamp(index - run.first + 1, 0, run.tokens);
          std::fill(s + run.start + visible, s + run.start + run.tokens, -INFINITY);
        }
        float max = 0;
        const float sum = kernels_.softmax_numerators(s, keys, shape.scale, &max);
        const int64_t row = segment.row + task.row + i / group;
        const int head = task.kv_head * group + i % group;
        if (lse != nullptr) lse[row * shape.heads + head] = max * shape.scale + std::log(sum);
        // The factor that the output takes at the end waits behind the query, which is done with.
        work.query[i * d] = sum > 0 ? 1.0f / sum : 0.0f;
      }

      std::memset(work.out, 0, queries * width * sizeof(float));
      for (int first = 0; first < keys; first += kTileKeys) {
        const int n = std::min(kTileKeys, keys - first);
        for_tile(first, n, true, [&](int token, int count, const float* data, int64_t step) {
          for (int i = 0; i < count; ++i) {
            for (int64_t c = 0; c < d; c += CpuKernels::kPanel) {
              std::memcpy(work.values + c * kTileKeys + (token + i) * CpuKernels::kPanel,
                          data + i * step + c,
                          std::min<int64_t>(CpuKernels::kPanel, d - c) * sizeof(float));
            }
          }
        });
        for (int64_t c = 0; c < width; c += CpuKernels::kPanel) {
          kernels_.panel_f32(work.scores + first, stride, work.values + c * kTileKeys, n, queries,
                             work.out + c, width, PanelMode::kContinue, nullptr);
        }
      }
      for (int i = 0; i < queries; ++i) {
        const int64_t row = segment.row + task.row + i / group;
        const int head = task.kv_head * group + i % group;
        kernels_.scale(out.as<float>() + row * out.stride + head * d, work.out + i * width,
                       work.query[i * d], d);
      }
    }
  }
}

}  // namespace memory3
