// Attention over the units of a plan (plan.h), one softmax, forward and backward.
//
// Two families of kernels. The row kernels take one query row at a time, in f32, any head_dim up to
// kMaxHeadDim: decode, and everything where activations are f32. The tile kernels take up to
// kTileRows rows of a segment with bf16 tensor cores, head_dim up to kMaxTileDim: prefill and
// training. Every sum has one fixed order; nothing is added atomically.
//
// Launches return the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transformer/cuda/plan.h"
#include "transformer/tensor.h"

namespace memory3 {

struct AttentionCall {
  Tensor q;              // [rows, heads * head_dim]
  Tensor out;            // as q
  float* lse = nullptr;  // [rows, heads], may be null in the forward
  const KvUnit* units = nullptr;
  Sources sources;
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;
  // Every query, key and value vector can be read 16 bytes at a time.
  bool aligned = false;
};

// ---- rows ----

// Parts that the row kernel cuts a row's units into, from what the launch knows, so that a launch
// is the same while contexts grow.
int AttentionSplits(int items, int heads, int kv_heads, int multiprocessors);
// Floats of scratch for `splits` > 1.
int64_t AttentionRowScratch(int items, int heads, int head_dim, int splits);
cudaError_t LaunchAttentionRows(const AttentionCall& call, const AttentionItem* items, int count,
                                int splits, float* scratch, cudaStream_t stream);

// ---- tiles ----

cudaError_t LaunchAttentionTiles(const AttentionCall& call, const QueryTile* tiles, int count,
                                 cudaStream_t stream);

// ---- backward ----

struct AttentionBackwardCall {
  AttentionCall forward;  // with its out and lse
  Tensor dq;              // f32 or bf16; every row of an item or tile is overwritten
  Tensor dout;
  float* delta = nullptr;  // [rows, heads] scratch: dout · out
};

// delta; before either of the others.
cudaError_t LaunchAttentionDelta(const AttentionBackwardCall& call, cudaStream_t stream);
// dq.
cudaError_t LaunchAttentionBackwardRows(const AttentionBackwardCall& call,
                                        const AttentionItem* items, int count, cudaStream_t stream);
cudaError_t LaunchAttentionBackwardTiles(const AttentionBackwardCall& call, const QueryTile* tiles,
                                         int count, cudaStream_t stream);
// Adds to the tiles' gradients; those of one launch must not share memory.
cudaError_t LaunchAttentionBackwardKeys(const AttentionBackwardCall& call, const KeyTile* tiles,
                                        int count, const QuerySegment* segments,
                                        cudaStream_t stream);
cudaError_t LaunchAttentionBackwardKeyTiles(const AttentionBackwardCall& call, const KeyTile* tiles,
                                            int count, const QuerySegment* segments,
                                            cudaStream_t stream);

}  // namespace memory3
