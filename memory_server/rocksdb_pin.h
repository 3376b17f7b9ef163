// VersionPin of the RocksDB store.
//
// Thread-safety: immutable; destroyed from any thread.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "memory_server/rocksdb_core.h"

namespace memory3 {

class RocksDbCore::PinImpl : public VersionPin {
 public:
  PinImpl(std::weak_ptr<RocksDbCore> core, std::shared_ptr<Version> version)
      : core_(std::move(core)), version_(std::move(version)) {
    version_->pins.fetch_add(1);
  }
  ~PinImpl() override {
    if (version_->pins.fetch_sub(1) != 1) return;
    // Dropped, or no longer published: something may be freed now. A core that stops meanwhile is
    // kept alive here and must not die in this thread while it waits for its own: Stop has run by
    // then.
    if (std::shared_ptr<RocksDbCore> core = core_.lock()) core->WakeMaintenance();
  }
  const std::string& tenant() const override { return version_->kb->tenant; }
  const std::string& knowledge_base() const override { return version_->kb->spec.name; }
  uint64_t version() const override { return version_->number; }
  const KnowledgeBaseSpec& spec() const override { return version_->kb->spec; }

  const std::shared_ptr<Version>& pinned() const { return version_; }
  // Whether it is this core's; another's ended with a restore.
  bool OfCore(const RocksDbCore* core) const { return core_.lock().get() == core; }

 private:
  std::weak_ptr<RocksDbCore> core_;
  std::shared_ptr<Version> version_;
};

}  // namespace memory3
