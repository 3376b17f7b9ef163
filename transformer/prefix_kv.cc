#include "transformer/prefix_kv.h"

#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "transformer/block.h"

namespace memory3 {

absl::StatusOr<std::shared_ptr<const PrefixKv>> PrefixKv::Create(const Model& model,
                                                                 std::span<const int32_t> ids,
                                                                 DType dtype) {
  const ModelConfig& c = model.config();
  if (ids.empty()) return absl::InvalidArgumentError("prefix_token_ids is empty");
  for (int32_t id : ids) {
    if (id < 0 || id >= c.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("prefix_token_ids: ", id, " is not in the vocabulary of ", c.vocab_size));
    }
  }
  std::shared_ptr<PrefixKv> prefix(new PrefixKv);
  const int p = prefix->tokens_ = static_cast<int>(ids.size());
  KvSource& s = prefix->source_;
  s.dtype = dtype;
  s.token_stride = c.head_dim;
  s.head_stride = s.token_stride * p;
  s.value_offset = s.head_stride * c.kv_heads;
  s.layer_stride = s.value_offset * 2;
  absl::StatusOr<Buffer> storage =
      model.device().Allocate(s.layer_stride * c.layers * SizeOf(dtype));
  if (!storage.ok()) return storage.status();
  prefix->storage_ = *std::move(storage);

  BatchInput input;
  input.token_ids.assign(ids.begin(), ids.end());
  input.positions.resize(p);
  std::iota(input.positions.begin(), input.positions.end(), 0);
  for (int row = 0; row < p; ++row) {
    input.destination.push_back(prefix->storage_.as<char>() + row * s.token_stride * SizeOf(dtype));
  }
  KvBlock block = prefix->Block(0);
  block.first = 0;  // here its own rows read it, so it is masked
  input.attention = {{s}, {block}, {0}, {{0, p, 0, 0, 1}}};

  absl::StatusOr<ActivationBuffers> activations = ActivationBuffers::Create(model, p);
  if (!activations.ok()) return activations.status();
  Device& device = model.device();
  const PreparedBatch* batch = device.Prepare(input, /*slot=*/0);
  device.Run(0, [&] {
    const LayerActivations a = activations->View(p);
    device.Embed(a.x, *batch, model.weights().embedding);
    for (int layer = 0; layer < c.layers; ++layer)
      BlockForward(model, layer, *batch, {{&layer, 1}, layer}, a);
  });
  if (absl::Status status = device.Synchronize(); !status.ok()) return status;
  return prefix;
}

}  // namespace memory3
