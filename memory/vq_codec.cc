#include "memory/vq_codec.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

// FAISS's packing (PQEncoderGeneric): numbers of `bits` bits, the first in the lowest bits.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}
  void Put(uint32_t number, int bits) {
    pending_ |= static_cast<uint64_t>(number) << count_;
    for (count_ += bits; count_ >= 8; count_ -= 8, pending_ >>= 8)
      *out_++ = static_cast<uint8_t>(pending_);
  }
  void Flush() {
    if (count_ > 0) *out_++ = static_cast<uint8_t>(pending_);
    pending_ = 0;
    count_ = 0;
  }

 private:
  uint8_t* out_;
  uint64_t pending_ = 0;
  int count_ = 0;
};

class BitReader {
 public:
  explicit BitReader(const uint8_t* in) : in_(in) {}
  uint32_t Take(int bits) {
    for (; count_ < bits; count_ += 8) pending_ |= static_cast<uint64_t>(*in_++) << count_;
    const auto number = static_cast<uint32_t>(pending_ & ((uint64_t{1} << bits) - 1));
    pending_ >>= bits;
    count_ -= bits;
    return number;
  }

 private:
  const uint8_t* in_;
  uint64_t pending_ = 0;
  int count_ = 0;
};

}  // namespace

vq::RowBlocks VqCodec::Table::blocks() const {
  return {.values = values.data(),
          .half_norms = half_norms.data(),
          .rows = rows,
          .blocks = static_cast<int64_t>(half_norms.size()) / vq::kRowBlock,
          .depth = depth};
}

VqCodec::Table VqCodec::MakeTable(const float* rows, int64_t count, int depth) {
  const int64_t blocks = (count + vq::kRowBlock - 1) / vq::kRowBlock;
  Table table;
  table.rows = count;
  table.depth = depth;
  table.values.assign(blocks * depth * vq::kRowBlock, 0.0f);
  table.half_norms.assign(blocks * vq::kRowBlock, std::numeric_limits<float>::infinity());
  for (int64_t row = 0; row < count; ++row) {
    float* block = table.values.data() + row / vq::kRowBlock * depth * vq::kRowBlock;
    double norm = 0;
    for (int k = 0; k < depth; ++k) {
      const float x = rows[row * depth + k];
      block[k * vq::kRowBlock + row % vq::kRowBlock] = x;
      norm += static_cast<double>(x) * x;
    }
    table.half_norms[row] = static_cast<float>(norm / 2);
  }
  return table;
}

absl::StatusOr<std::unique_ptr<VqCodec>> VqCodec::Create(VqCodebook codebook, const Hash256& hash,
                                                         const vq::Kernels& kernels) {
  if (absl::Status status = CheckCodebook(codebook); !status.ok()) return status;
  return std::unique_ptr<VqCodec>(new VqCodec(std::move(codebook), hash, kernels));
}

VqCodec::VqCodec(VqCodebook codebook, const Hash256& hash, const vq::Kernels& kernels)
    : codebook_(std::move(codebook)), hash_(hash), kernels_(kernels) {
  const int d = codebook_.head_dim;
  rotation_ = MakeTable(codebook_.rotation.data(), d, d);
  std::vector<float> transposed(codebook_.rotation.size());
  for (int i = 0; i < d; ++i)
    for (int j = 0; j < d; ++j) transposed[j * d + i] = codebook_.rotation[i * d + j];
  inverse_ = MakeTable(transposed.data(), d, d);
  const int half = d / kCoarseBooks, part = d / kFineBooks;
  for (int m = 0; m < kCoarseBooks; ++m) {
    coarse_[m] = MakeTable(codebook_.coarse.data() + m * codebook_.coarse_rows() * half,
                           codebook_.coarse_rows(), half);
  }
  for (int m = 0; m < kFineBooks; ++m) {
    fine_[m] = MakeTable(codebook_.fine.data() + m * codebook_.fine_rows() * part,
                         codebook_.fine_rows(), part);
  }
}

absl::Status VqCodec::Encode(std::span<const float> vectors, std::span<uint8_t> out) const {
  if (absl::Status sizes = CheckCodecSizes(*this, vectors.size(), out.size()); !sizes.ok())
    return sizes;
  if (absl::Status finite = CheckFinite(vectors, head_dim()); !finite.ok()) return finite;
  const int d = head_dim();
  const int half = d / kCoarseBooks, part = d / kFineBooks;
  const int64_t n = static_cast<int64_t>(vectors.size()) / d;
  std::vector<float> rotated(int64_t{vq::kMaxKernelBatch} * d);
  int32_t coarse[kCoarseBooks][vq::kMaxKernelBatch];
  int32_t fine[kFineBooks][vq::kMaxKernelBatch];
  for (int64_t first = 0; first < n; first += vq::kMaxKernelBatch) {
    const int count = static_cast<int>(std::min<int64_t>(vq::kMaxKernelBatch, n - first));
    kernels_.product(rotation_.blocks(), vectors.data() + first * d, count, d, rotated.data());
    for (int m = 0; m < kCoarseBooks; ++m) {
      kernels_.nearest(coarse_[m].blocks(), rotated.data() + m * half, count, d, coarse[m]);
      const float* book = codebook_.coarse.data() + m * codebook_.coarse_rows() * half;
      for (int v = 0; v < count; ++v) {  // what the coarse books leave
        float* x = rotated.data() + v * d + m * half;
        const float* centroid = book + static_cast<int64_t>(coarse[m][v]) * half;
        for (int k = 0; k < half; ++k) x[k] -= centroid[k];
      }
    }
    for (int m = 0; m < kFineBooks; ++m)
      kernels_.nearest(fine_[m].blocks(), rotated.data() + m * part, count, d, fine[m]);
    for (int v = 0; v < count; ++v) {
      BitWriter code(out.data() + (first + v) * bytes_per_vector());
      for (int m = 0; m < kCoarseBooks; ++m) code.Put(coarse[m][v], codebook_.coarse_bits);
      code.Flush();
      for (int m = 0; m < kFineBooks; ++m) code.Put(fine[m][v], codebook_.fine_bits);
      code.Flush();
    }
  }
  return absl::OkStatus();
}

absl::Status VqCodec::CheckCodes(std::span<const uint8_t> codes) const {
  const int64_t code_bytes = bytes_per_vector();
  if (static_cast<int64_t>(codes.size()) % code_bytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "codec vq: ", codes.size(), " bytes are not a whole number of codes of ", code_bytes));
  }
  // The coarse numbers end within a byte, whose upper bits are zero; the fine ones fill theirs.
  const int64_t last = codebook_.coarse_code_bytes() - 1;
  const int used = kCoarseBooks * codebook_.coarse_bits - 8 * static_cast<int>(last);
  for (size_t at = last; at < codes.size(); at += code_bytes) {
    if (codes[at] >> used != 0) {
      return absl::DataLossError(
          absl::StrCat("codec vq: vector ", at / code_bytes, " has bits that no code has"));
    }
  }
  return absl::OkStatus();
}

absl::Status VqCodec::Decode(std::span<const uint8_t> bytes, std::span<float> vectors) const {
  if (absl::Status sizes = CheckCodecSizes(*this, vectors.size(), bytes.size()); !sizes.ok())
    return sizes;
  if (absl::Status codes = CheckCodes(bytes); !codes.ok()) return codes;
  const int d = head_dim();
  const int half = d / kCoarseBooks, part = d / kFineBooks;
  const int64_t n = static_cast<int64_t>(vectors.size()) / d;
  std::vector<float> rotated(int64_t{vq::kMaxKernelBatch} * d);
  for (int64_t first = 0; first < n; first += vq::kMaxKernelBatch) {
    const int count = static_cast<int>(std::min<int64_t>(vq::kMaxKernelBatch, n - first));
    for (int v = 0; v < count; ++v) {
      const uint8_t* code = bytes.data() + (first + v) * bytes_per_vector();
      float* x = rotated.data() + v * d;
      BitReader coarse(code);
      for (int m = 0; m < kCoarseBooks; ++m) {
        const int64_t row = m * codebook_.coarse_rows() + coarse.Take(codebook_.coarse_bits);
        std::copy_n(codebook_.coarse.data() + row * half, half, x + m * half);
      }
      BitReader fine(code + codebook_.coarse_code_bytes());
      for (int m = 0; m < kFineBooks; ++m) {
        const int64_t row = m * codebook_.fine_rows() + fine.Take(codebook_.fine_bits);
        const float* centroid = codebook_.fine.data() + row * part;
        for (int k = 0; k < part; ++k) x[m * part + k] += centroid[k];
      }
    }
    kernels_.product(inverse_.blocks(), rotated.data(), count, d, vectors.data() + first * d);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Codec>> MakeVqCodec(std::string_view file) {
  absl::StatusOr<VqCodebook> codebook = ParseCodebook(file);
  if (!codebook.ok()) return codebook.status();
  return VqCodec::Create(*std::move(codebook), Sha256Of(file));
}

absl::StatusOr<std::unique_ptr<Codec>> MakeCodec(CodecId id, int head_dim,
                                                 std::string_view codebook) {
  if (head_dim < 1)
    return absl::InvalidArgumentError(absl::StrCat("codec: head_dim is ", head_dim));
  if (id != CodecId::kVq && !codebook.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("codec ", std::string(CodecName(id)), " has no codebook, one was given"));
  }
  switch (id) {
    case CodecId::kF32:
      return MakeF32Codec(head_dim);
    case CodecId::kBF16:
      return MakeBF16Codec(head_dim);
    case CodecId::kInt8:
      return MakeInt8Codec(head_dim);
    case CodecId::kVq:
      break;
  }
  if (id != CodecId::kVq)
    return absl::InvalidArgumentError(absl::StrCat("codec ", static_cast<int>(id), " is unknown"));
  if (codebook.empty()) return absl::InvalidArgumentError("codec vq wants a codebook");
  absl::StatusOr<std::unique_ptr<Codec>> codec = MakeVqCodec(codebook);
  if (codec.ok() && (*codec)->head_dim() != head_dim) {
    return absl::InvalidArgumentError(absl::StrCat("codebook: head_dim is ", (*codec)->head_dim(),
                                                   ", the model's is ", head_dim));
  }
  return codec;
}

}  // namespace memory3
