#include "transformer/cuda/vq_decode.h"

#include <utility>
#include <vector>

#include "transformer/check.h"
#include "transformer/cuda/cuda_device.h"
#include "transformer/cuda/vq_decode_kernel.h"

namespace memory3 {

absl::StatusOr<std::unique_ptr<CudaVqDecoder>> CudaVqDecoder::Create(Device* device,
                                                                     const VqCodebook& codebook) {
  if (dynamic_cast<CudaDevice*>(device) == nullptr) {
    return absl::InvalidArgumentError("vq decoder: the device is not a CUDA device");
  }
  if (absl::Status status = CheckCodebook(codebook); !status.ok()) return status;
  std::unique_ptr<CudaVqDecoder> decoder(new CudaVqDecoder);
  decoder->device_ = device;
  decoder->head_dim_ = codebook.head_dim;
  decoder->coarse_bits_ = codebook.coarse_bits;
  decoder->fine_bits_ = codebook.fine_bits;
  decoder->code_bytes_ = codebook.code_bytes();
  decoder->coarse_code_bytes_ = codebook.coarse_code_bytes();
  const std::pair<Buffer*, const std::vector<float>*> tables[] = {
      {&decoder->rotation_, &codebook.rotation},
      {&decoder->coarse_, &codebook.coarse},
      {&decoder->fine_, &codebook.fine}};
  for (const auto& [buffer, table] : tables) {
    absl::StatusOr<Buffer> memory = device->Allocate(table->size() * sizeof(float));
    if (!memory.ok()) return memory.status();
    *buffer = *std::move(memory);
    device->Upload(buffer->data(), table->data(), table->size() * sizeof(float));
  }
  if (absl::Status status = device->Synchronize(); !status.ok()) return status;
  return decoder;
}

absl::Status CudaVqDecoder::Decode(Tensor vectors, const uint8_t* codes) const {
  CHECK(vectors.cols == head_dim_);
  const VqTables tables{rotation_.as<float>(),
                        coarse_.as<float>(),
                        fine_.as<float>(),
                        coarse_bits_,
                        fine_bits_,
                        static_cast<int>(coarse_code_bytes_),
                        static_cast<int>(code_bytes_)};
  const auto& device = static_cast<const CudaDevice&>(*device_);
  device.Bind();
  return CudaStatus(LaunchVqDecode(vectors, codes, tables, device.stream()), "vq decode");
}

}  // namespace memory3
