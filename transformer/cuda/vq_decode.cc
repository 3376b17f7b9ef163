#include "transformer/cuda/vq_decode.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "memory/vq_codec.h"
#include "transformer/check.h"
#include "transformer/cuda/cuda_device.h"
#include "transformer/cuda/vq_decode_kernel.h"

namespace memory3 {

absl::StatusOr<std::unique_ptr<VectorDecoder>> CudaDevice::MakeVectorDecoder(const Codec& codec) {
  const auto* vq = dynamic_cast<const VqCodec*>(&codec);
  if (vq == nullptr) return Device::MakeVectorDecoder(codec);
  return CudaVqDecoder::Create(this, vq->codebook());
}

absl::StatusOr<std::unique_ptr<CudaVqDecoder>> CudaVqDecoder::Create(Device* device,
                                                                     const VqCodebook& codebook) {
  auto* cuda = dynamic_cast<CudaDevice*>(device);
  if (cuda == nullptr) {
    return absl::InvalidArgumentError("vq decoder: the device is not a CUDA device");
  }
  if (absl::Status status = CheckCodebook(codebook); !status.ok()) return status;
  std::unique_ptr<CudaVqDecoder> decoder(new CudaVqDecoder);
  decoder->device_ = cuda;
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
    const size_t bytes = table->size() * sizeof(float);
    absl::StatusOr<Buffer> memory = cuda->Allocate(bytes);
    if (!memory.ok()) return memory.status();
    *buffer = *std::move(memory);
    // Not on the compute stream, which another thread may be recording.
    absl::Status status = cuda->UploadAside(buffer->data(), table->data(), bytes);
    if (!status.ok()) return status;
  }
  return decoder;
}

cudaError_t CudaVqDecoder::Launch(const VectorRuns& vectors, int64_t count, const uint8_t* codes,
                                  cudaStream_t stream) const {
  const VqTables tables{rotation_.as<float>(),
                        coarse_.as<float>(),
                        fine_.as<float>(),
                        coarse_bits_,
                        fine_bits_,
                        static_cast<int>(coarse_code_bytes_),
                        static_cast<int>(code_bytes_)};
  return LaunchVqDecode(vectors, count, head_dim_, codes, tables, stream);
}

absl::Status CudaVqDecoder::Decode(Tensor vectors, const uint8_t* codes) const {
  CHECK(vectors.cols == head_dim_);
  device_->Bind();
  const VectorRuns rows{vectors.data, vectors.dtype, /*run=*/1, vectors.stride};
  return CudaStatus(Launch(rows, vectors.rows, codes, device_->stream()), "vq decode");
}

absl::Status CudaVqDecoder::DecodeAside(const VectorRuns& vectors, std::span<const uint8_t> codes) {
  CHECK(vectors.run >= 1);
  if (codes.size() % code_bytes_ != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "vq decoder: ", codes.size(), " bytes are not a whole number of codes of ", code_bytes_));
  }
  const auto count = static_cast<int64_t>(codes.size()) / code_bytes_;
  return device_->aside().UploadFor(
      [&](const void* uploaded, cudaStream_t stream) {
        return Launch(vectors, count, static_cast<const uint8_t*>(uploaded), stream);
      },
      codes.data(), codes.size());
}

}  // namespace memory3
