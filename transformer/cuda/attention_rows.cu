// Attention one query row at a time (decode, and the f32 path): a block has one row and up to
// kGroup query heads of one KV head, so that keys and values are read once for all of them, and a
// share of the row's units ("flash decoding"). Each of its warps takes every fourth unit with a
// softmax of its own; the four, then the shares, are combined in order.

#include <algorithm>

#include "transformer/cuda/attention.h"
#include "transformer/cuda/common.cuh"

namespace memory3 {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kMaxSplits = 32;
// Fewest units of a share: one for each warp.
constexpr int kFewestUnits = kWarps;

struct RowArgs {
  AttentionCall call;
  const AttentionItem* items;
  int subgroups;   // pieces of kGroup query heads that a KV head's group is cut into
  float* partial;  // [items, heads, splits, head_dim + 2]: sum, maximum, Σ p v; null: one share
};

// Units of each of the shares that `units` are cut into; the last may have fewer, those past the
// last unit have none.
__device__ __forceinline__ int ShareOf(int units, int splits) {
  return max((units + splits - 1) / splits, kFewestUnits);
}

template <int kGroup>
size_t SharedBytes(int head_dim) {
  return sizeof(float) * kGroup * (head_dim + kWarps * (head_dim + kUnitTokens + 2));
}

template <int kGroup>
__global__ __launch_bounds__(kThreads) void RowsKernel(RowArgs args) {
  extern __shared__ float shared[];
  const AttentionCall& a = args.call;
  const AttentionItem item = args.items[blockIdx.x];
  if (item.row < 0) return;
  const int d = a.head_dim;
  const int group = a.heads / a.kv_heads;
  const int kv_head = blockIdx.y / args.subgroups;
  const int member = blockIdx.y % args.subgroups * kGroup;
  const int members = min(kGroup, group - member);
  const int head = kv_head * group + member;
  const int splits = gridDim.z, split = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const int units = item.unit_end - item.unit_begin;
  const int share = ShareOf(units, splits);
  if (split > 0 && split * share >= units) return;  // the combination does not read it
  const int begin = item.unit_begin + min(split * share, units);
  const int end = min(begin + share, item.unit_end);

  float* q = shared;                                        // [kGroup][d]
  float* sums = q + kGroup * d;                             // [kWarps][kGroup][d]
  float* chances = sums + kWarps * kGroup * d;              // [kWarps][kGroup][kUnitTokens]
  float* maxima = chances + kWarps * kGroup * kUnitTokens;  // [kWarps][kGroup]
  float* totals = maxima + kWarps * kGroup;                 // [kWarps][kGroup]

  // Scores in powers of two: exp(x) = 2^(x log2 e).
  const float scale = a.scale * kLog2E;
  for (int i = threadIdx.x; i < kGroup * d; i += kThreads) {
    const int64_t at = item.row * a.q.stride + int64_t{head} * d + i;
    q[i] = i < members * d ? LoadOne(a.q.data, a.q.dtype, at) * scale : 0.0f;
  }
  __syncthreads();

  // Scores: two lanes have a token, and the even and odd pieces of eight numbers of its key.
  const int token = lane / 2, parity = lane % 2;
  const int pieces = (d + 7) / 8;
  // Values: a lane has one piece of eight numbers, of every `stride`-th token.
  const int stride = 32 / pieces;
  const int piece = lane % pieces, first_token = lane / pieces;
  const bool has_piece = first_token < stride;

  float maximum[kGroup], total[kGroup], sum[kGroup][8];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    maximum[g] = MinusInfinity();
    total[g] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[g][j] = 0;
  }
  float* chance = chances + warp * kGroup * kUnitTokens;

  for (int u = begin + warp; u < end; u += kWarps) {
    const KvUnit unit = a.units[u];
    const SourceAtLayer source = a.sources.at[unit.source];
    if (!source.read) continue;
    const int visible = unit.first == kFirstSeenByAll
                            ? unit.tokens
                            : min(max(item.index - unit.first + 1, 0), unit.tokens);
    if (visible == 0) continue;
    const int64_t base = source.layer_offset + kv_head * source.head_stride;

    float score[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) score[g] = 0;
    if (token < visible) {
      for (int p = parity; p < pieces; p += 2) {
        float key[8];
        LoadEight(unit.base, source.dtype, base + token * source.token_stride + p * 8, d - p * 8,
                  a.aligned, key);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            // Past head_dim the key is zero; the query there is another head's, or not there.
            if (a.aligned || p * 8 + j < d) score[g] += q[g * d + p * 8 + j] * key[j];
          }
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      score[g] += __shfl_xor_sync(kAllLanes, score[g], 1);
      if (token >= visible) score[g] = MinusInfinity();
      const float most = fmaxf(maximum[g], WarpMax(score[g]));
      // A unit of minus infinities leaves everything as it is.
      const float pivot = most == MinusInfinity() ? 0.0f : most;
      const float shrink = exp2f(maximum[g] - pivot);
      const float p = exp2f(score[g] - pivot);
      maximum[g] = most;
      total[g] = total[g] * shrink + (parity == 0 ? p : 0.0f);
      if (parity == 0) chance[g * kUnitTokens + token] = p;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[g][j] *= shrink;
    }
    __syncwarp();
    if (has_piece) {
      for (int t = first_token; t < visible; t += stride) {
        float value[8];
        LoadEight(unit.base, source.dtype,
                  base + source.value_offset + t * source.token_stride + piece * 8, d - piece * 8,
                  a.aligned, value);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          const float p = chance[g * kUnitTokens + t];
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[g][j] += p * value[j];
        }
      }
    }
    __syncwarp();  // the chances have been read
  }

  // Lanes with the same piece add up; then warps, through shared memory.
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    total[g] = WarpSum(total[g]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float x = sum[g][j];
      for (int i = 1; i < stride; ++i) {
        x += __shfl_sync(kAllLanes, sum[g][j], (lane + i * pieces) % 32);
      }
      const int c = piece * 8 + j;
      if (lane < pieces && c < d) sums[(warp * kGroup + g) * d + c] = x;
    }
    if (lane == 0) {
      maxima[warp * kGroup + g] = maximum[g];
      totals[warp * kGroup + g] = total[g];
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < members * d; i += kThreads) {
    const int g = i / d, c = i % d;
    float most = MinusInfinity();
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, maxima[w * kGroup + g]);
    const float pivot = most == MinusInfinity() ? 0.0f : most;
    float x = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      const float factor = exp2f(maxima[w * kGroup + g] - pivot);
      x += factor * sums[(w * kGroup + g) * d + c];
      all += factor * totals[w * kGroup + g];
    }
    if (args.partial == nullptr) {
      StoreOne(a.out.data, a.out.dtype, item.row * a.out.stride + int64_t{head} * d + i,
               all > 0 ? x / all : 0.0f);
      if (c == 0 && a.lse != nullptr) {
        a.lse[int64_t{item.row} * a.heads + head + g] = (most + log2f(all)) * kLn2;
      }
    } else {
      float* to =
          args.partial + ((int64_t{blockIdx.x} * a.heads + head + g) * splits + split) * (d + 2);
      to[2 + c] = x;
      if (c == 0) {
        to[0] = all;
        to[1] = most;
      }
    }
  }
}

// One block an item and head.
__global__ void CombineKernel(AttentionCall a, const AttentionItem* items, const float* partial,
                              int splits) {
  const AttentionItem item = items[blockIdx.x];
  if (item.row < 0) return;
  const int d = a.head_dim, head = blockIdx.y;
  const float* from = partial + (int64_t{blockIdx.x} * a.heads + head) * splits * (d + 2);
  // The shares that have units, or the first, which is empty.
  const int units = item.unit_end - item.unit_begin, share = ShareOf(units, splits);
  const int shares = max((units + share - 1) / share, 1);
  float most = MinusInfinity();
  for (int s = 0; s < shares; ++s) most = fmaxf(most, from[s * (d + 2) + 1]);
  const float pivot = most == MinusInfinity() ? 0.0f : most;
  float all = 0;
  for (int s = 0; s < shares; ++s) {
    all += exp2f(from[s * (d + 2) + 1] - pivot) * from[s * (d + 2)];
  }
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float x = 0;
    for (int s = 0; s < shares; ++s) {
      const float* part = from + s * (d + 2);
      // A share whose keys are not seen has written zeros.
      x += exp2f(part[1] - pivot) * part[2 + c];
    }
    StoreOne(a.out.data, a.out.dtype, item.row * a.out.stride + int64_t{head} * d + c,
             all > 0 ? x / all : 0.0f);
  }
  if (threadIdx.x == 0 && a.lse != nullptr) {
    a.lse[int64_t{item.row} * a.heads + head] = (most + log2f(all)) * kLn2;
  }
}

template <int kGroup>
void Launch(RowArgs args, int count, int splits, cudaStream_t stream) {
  const int group = args.call.heads / args.call.kv_heads;
  args.subgroups = CeilDivide(group, kGroup);
  const dim3 grid(count, args.call.kv_heads * args.subgroups, splits);
  RowsKernel<kGroup><<<grid, kThreads, SharedBytes<kGroup>(args.call.head_dim), stream>>>(args);
}

// Query heads of a KV head that one block takes.
int GroupPiece(int group) {
  if (group <= 2) return group;
  return group <= 4 ? 4 : group == 5 ? 5 : 8;
}

}  // namespace

int AttentionSplits(int items, int heads, int kv_heads, int multiprocessors) {
  const int group = heads / kv_heads;
  const int64_t blocks = int64_t{items} * kv_heads * CeilDivide(group, GroupPiece(group));
  // About four blocks of four warps for each multiprocessor hide the memory's latency.
  return std::clamp<int64_t>(CeilDivide(4 * multiprocessors, std::max<int64_t>(blocks, 1)), 1,
                             kMaxSplits);
}

int64_t AttentionRowScratch(int items, int heads, int head_dim, int splits) {
  return splits == 1 ? 0 : int64_t{items} * heads * splits * (head_dim + 2);
}

cudaError_t LaunchAttentionRows(const AttentionCall& call, const AttentionItem* items, int count,
                                int splits, float* scratch, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const RowArgs args{call, items, 1, splits == 1 ? nullptr : scratch};
  switch (GroupPiece(call.heads / call.kv_heads)) {
    case 1:
      Launch<1>(args, count, splits, stream);
      break;
    case 2:
      Launch<2>(args, count, splits, stream);
      break;
    case 4:
      Launch<4>(args, count, splits, stream);
      break;
    case 5:  // the paper's 40 query heads on 8
      Launch<5>(args, count, splits, stream);
      break;
    default:
      Launch<8>(args, count, splits, stream);
  }
  if (splits > 1) {
    CombineKernel<<<dim3(count, call.heads), 64, 0, stream>>>(call, items, scratch, splits);
  }
  return cudaGetLastError();
}

}  // namespace memory3
