// Numbers in the byte order of every format of memory3: little endian, unaligned.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

namespace memory3 {

static_assert(std::endian::native == std::endian::little,
              "the codecs copy floats to their bytes as they stand");

template <typename T>
T LoadLittleEndian(const void* from) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void StoreLittleEndian(void* to, T value) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::memcpy(to, &value, sizeof(T));
}

}  // namespace memory3
