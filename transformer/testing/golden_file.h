// Reads the expected values of a golden (a safetensors file of F32 and I32 tensors). For tests: the
// product reads checkpoints with transformer/checkpoint.h, and what checks it should not be it.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace memory3 {

class GoldenFile {
 public:
  explicit GoldenFile(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(in), {});
    uint64_t header = 0;
    if (bytes_.size() < sizeof(header)) {
      ADD_FAILURE() << "cannot read " << path;
      return;
    }
    std::memcpy(&header, bytes_.data(), sizeof(header));
    data_ = sizeof(header) + header;
    tensors_ = nlohmann::json::parse(bytes_.substr(sizeof(header), header));
  }

  bool Has(const std::string& name) const { return tensors_.contains(name); }
  std::vector<int64_t> Shape(const std::string& name) const {
    return tensors_.at(name).at("shape");
  }
  std::vector<float> Floats(const std::string& name) const { return Values<float>(name, "F32"); }
  std::vector<int32_t> Ints(const std::string& name) const { return Values<int32_t>(name, "I32"); }

 private:
  template <typename T>
  std::vector<T> Values(const std::string& name, const std::string& dtype) const {
    const nlohmann::json& tensor = tensors_.at(name);
    EXPECT_EQ(tensor.at("dtype"), dtype) << name;
    const std::vector<uint64_t> range = tensor.at("data_offsets");
    std::vector<T> values((range[1] - range[0]) / sizeof(T));
    std::memcpy(values.data(), bytes_.data() + data_ + range[0], values.size() * sizeof(T));
    return values;
  }

  std::string bytes_;
  uint64_t data_ = 0;
  nlohmann::json tensors_;
};

}  // namespace memory3
