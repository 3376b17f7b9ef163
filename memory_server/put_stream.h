// Puts the messages of a Put or PutLoad stream together: entries, their records from pieces,
// batches of a few MiB for the store. Collects one batch at a time, so that the store's pace is the
// stream's.
//
// Thread-safety: one thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "memory3/v1/memory.pb.h"
#include "memory_server/memory_store.h"

namespace memory3 {

class PutStream {
 public:
  // Takes a batch, all or nothing; it keeps alive what its entries point to.
  using PutFunction = std::function<absl::Status(std::shared_ptr<const std::vector<NewEntry>>)>;
  explicit PutStream(PutFunction put) : put_(std::move(put)) {}

  // The next message (`entry` or `record_piece`; moved from). INVALID_ARGUMENT names entry and
  // field, or what `put` answered; the stream is over then.
  absl::Status Take(v1::PutRequest& message);
  // The stream has ended: puts the last batch. INVALID_ARGUMENT where a record is not complete.
  absl::Status Finish();

 private:
  struct Pending {
    v1::Entry message;
    RecordId record_id;
    std::string record;
  };
  bool RecordIncomplete() const {
    return !batch_.empty() && batch_.back().record.size() < batch_.back().message.record_bytes();
  }
  std::string Name(const v1::Entry& entry) const;
  absl::Status PutBatch();

  const PutFunction put_;
  std::vector<Pending> batch_;
  size_t batch_bytes_ = 0;
  uint64_t taken_ = 0;  // entries, for messages
};

}  // namespace memory3
