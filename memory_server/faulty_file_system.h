// For tests: a file system whose writes can be made to fail.
//
// Thread-safety: any thread, faults may be switched at any time.
#pragma once

#include <rocksdb/file_system.h>

#include <atomic>
#include <memory>
#include <string>
#include <utility>

namespace memory3::store_testing {

class FaultyFileSystem : public rocksdb::FileSystemWrapper {
 public:
  enum class Fault {
    kNone,
    kNoSpace,  // everything that writes: the disk is full
    kError,    // everything that writes: an I/O error
    kSync,     // only syncs fail
    kLog,      // only writes to a write-ahead log fail
    kTable,    // only writes to tables fail: background work
  };
  std::atomic<Fault> fault{Fault::kNone};

  FaultyFileSystem() : FileSystemWrapper(rocksdb::FileSystem::Default()) {}
  const char* Name() const override { return "FaultyFileSystem"; }
  rocksdb::IOStatus NewWritableFile(const std::string& name, const rocksdb::FileOptions& options,
                                    std::unique_ptr<rocksdb::FSWritableFile>* file,
                                    rocksdb::IODebugContext* debug) override {
    if (rocksdb::IOStatus s = Check(name, false); !s.ok()) return s;
    rocksdb::IOStatus s = target()->NewWritableFile(name, options, file, debug);
    if (s.ok()) *file = std::make_unique<File>(std::move(*file), this, name);
    return s;
  }

 private:
  rocksdb::IOStatus Check(const std::string& name, bool sync) const {
    bool fails = false;
    switch (fault.load()) {
      case Fault::kNone:
        break;
      case Fault::kNoSpace:
        return rocksdb::IOStatus::NoSpace("injected: no space left on device");
      case Fault::kError:
        fails = true;
        break;
      case Fault::kSync:
        fails = sync;
        break;
      case Fault::kLog:
        fails = name.ends_with(".log");
        break;
      case Fault::kTable:
        fails = name.ends_with(".sst");
        break;
    }
    return fails ? rocksdb::IOStatus::IOError("injected: the disk fails") : rocksdb::IOStatus::OK();
  }

  class File : public rocksdb::FSWritableFileOwnerWrapper {
   public:
    File(std::unique_ptr<rocksdb::FSWritableFile> file, const FaultyFileSystem* fs,
         std::string name)
        : FSWritableFileOwnerWrapper(std::move(file)), fs_(fs), name_(std::move(name)) {}
    rocksdb::IOStatus Append(const rocksdb::Slice& data, const rocksdb::IOOptions& options,
                             rocksdb::IODebugContext* debug) override {
      if (rocksdb::IOStatus s = fs_->Check(name_, false); !s.ok()) return s;
      return FSWritableFileOwnerWrapper::Append(data, options, debug);
    }
    rocksdb::IOStatus Append(const rocksdb::Slice& data, const rocksdb::IOOptions& options,
                             const rocksdb::DataVerificationInfo& info,
                             rocksdb::IODebugContext* debug) override {
      if (rocksdb::IOStatus s = fs_->Check(name_, false); !s.ok()) return s;
      return FSWritableFileOwnerWrapper::Append(data, options, info, debug);
    }
    rocksdb::IOStatus Sync(const rocksdb::IOOptions& options,
                           rocksdb::IODebugContext* debug) override {
      if (rocksdb::IOStatus s = fs_->Check(name_, true); !s.ok()) return s;
      return FSWritableFileOwnerWrapper::Sync(options, debug);
    }

   private:
    const FaultyFileSystem* fs_;
    const std::string name_;
  };
};

}  // namespace memory3::store_testing
