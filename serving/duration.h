// Protobuf durations as people and JSON have them.
#pragma once

#include <google/protobuf/duration.pb.h>

namespace memory3 {

inline double Milliseconds(const google::protobuf::Duration& duration) {
  return 1e3 * static_cast<double>(duration.seconds()) + 1e-6 * duration.nanos();
}

}  // namespace memory3
