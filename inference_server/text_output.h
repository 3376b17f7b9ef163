// The text of a running generation: whole UTF-8, cut before the first stop string. Text that may
// still turn out to be the beginning of one is held back.
//
// Thread-safety: one thread. The tokenizer must outlive it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "transformer/tokenizer.h"

namespace memory3 {

class TextOutput {
 public:
  TextOutput(const Tokenizer* tokenizer, std::vector<std::string> stops)
      : stream_(tokenizer, /*at_start=*/false), stops_(std::move(stops)) {}

  // The text that is certain after one more token. `may_stop` false: stop strings that end in this
  // token's text do not count.
  std::string Push(int32_t id, bool may_stop) { return Add(stream_.Push(id), may_stop); }
  // At the end of a generation that met no stop string: the rest.
  std::string Finish(bool may_stop) {
    std::string text = Add(stream_.Finish(), may_stop);
    if (!stopped()) text += std::exchange(held_, {});
    return text;
  }
  bool stopped() const { return !stop_.empty(); }
  const std::string& stop() const { return stop_; }  // the one found

 private:
  std::string Add(const std::string& text, bool may_stop) {
    if (stopped()) return {};
    held_ += text;
    if (!may_stop) return std::exchange(held_, {});
    size_t first = std::string::npos;
    for (const std::string& stop : stops_) {
      const size_t at = held_.find(stop);
      if (at < first) {
        first = at;
        stop_ = stop;
      }
    }
    size_t certain = first;
    if (first == std::string::npos) {
      size_t keep = 0;  // longest end of held_ that begins a stop string
      for (const std::string& stop : stops_) {
        for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
          if (std::string_view(held_).substr(held_.size() - n) ==
              std::string_view(stop).substr(0, n)) {
            keep = n;
          }
        }
      }
      certain = held_.size() - keep;
      // A character is given out whole.
      while (certain > 0 && certain < held_.size() && (held_[certain] & 0xC0) == 0x80) --certain;
    }
    std::string out = held_.substr(0, certain);
    held_.erase(0, certain);
    return out;
  }

  DecodeStream stream_;
  const std::vector<std::string> stops_;
  std::string held_;
  std::string stop_;
};

}  // namespace memory3
