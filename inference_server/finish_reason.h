// OpenAI's names of finish reasons, in its API's answers and in the metrics.
#pragma once

#include "memory3/v1/inference.pb.h"

namespace memory3 {

inline const char* FinishReasonName(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    default:
      return "abort";
  }
}

}  // namespace memory3
