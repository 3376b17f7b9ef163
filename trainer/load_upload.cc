#include "trainer/load_upload.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/time/clock.h"

namespace memory3 {

bool MayPass(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:  // a server that shuts down ends its streams so
      return true;
    case absl::StatusCode::kUnknown:  // gRPC's word for a connection cut in the middle of a stream
      return status.message() == "Stream removed";
    default:
      return false;
  }
}

LoadUpload::LoadUpload(MemoryClient* client, Options options)
    : client_(client),
      options_(std::move(options)),
      queue_(options_.queue_bytes),
      thread_([this] { Run(); }) {}

LoadUpload::~LoadUpload() {
  stop_ = true;
  queue_.Cancel();
  if (thread_.joinable()) thread_.join();
}

bool LoadUpload::Add(LoadEntry entry) {
  const int64_t bytes = entry.bytes();
  return queue_.Push(std::move(entry), bytes);
}

absl::Status LoadUpload::Finish() {
  queue_.Close();
  if (thread_.joinable()) thread_.join();
  return status_;
}

void LoadUpload::Run() {
  const absl::Duration first_pause = absl::Milliseconds(100);
  absl::Duration pause = first_pause;
  absl::Time give_up = absl::InfiniteFuture();
  while (!stop_) {
    if (sent_.empty()) {
      std::optional<LoadEntry> entry = queue_.Pop();
      if (!entry) return;  // closed and empty
      sent_.push_back(*std::move(entry));
    }
    const absl::Status status = SendSome();
    if (status.ok()) {
      pause = first_pause;
      give_up = absl::InfiniteFuture();
      continue;
    }
    give_up = std::min(give_up, absl::Now() + options_.patience);
    if (MayPass(status) && absl::Now() + pause < give_up) {
      absl::SleepFor(pause);
      pause = std::min(pause * 2, absl::Seconds(2));
      continue;
    }
    status_ = status;
    queue_.Cancel();
    return;
  }
}

absl::Status LoadUpload::SendSome() {
  const auto until = BoundedQueue<LoadEntry>::Clock::now() +
                     absl::ToChronoNanoseconds(options_.unacknowledged_time);
  const std::unique_ptr<LoadWriter> stream = client_->PutLoad(options_.load_id);
  const auto write = [&](const LoadEntry& e) { return stream->Write(e.entry, e.record).ok(); };
  int64_t bytes = 0;
  bool open = true;
  for (auto e = sent_.begin(); open && e != sent_.end(); ++e) {
    open = write(*e);
    bytes += e->bytes();
  }
  while (open && !stop_ && bytes < options_.unacknowledged_bytes) {
    std::optional<LoadEntry> entry = queue_.PopUntil(until);
    if (!entry) break;  // closed, or it is time
    bytes += entry->bytes();
    sent_.push_back(*std::move(entry));
    open = write(sent_.back());
  }
  if (stop_) return absl::CancelledError("stopped");
  const absl::StatusOr<v1::PutLoadResponse> answer = stream->Finish();
  if (!answer.ok()) return answer.status();
  entries_ += static_cast<int64_t>(sent_.size());
  for (const LoadEntry& e : sent_) bytes_ += e.bytes();
  sent_.clear();
  return absl::OkStatus();
}

}  // namespace memory3
