// Documents from files: .txt (a file is a document), .jsonl (a line is one), each also .gz or .zst.
// For every command that takes text: tokenizer training, packing, the memory writer, `memory3
// load`.
//
// Damage to one line costs that line: a line that is no JSON object, is not UTF-8, has no text or
// is longer than max_document_bytes is skipped, counted, and described by file and line. In strict
// mode it is an error. Damage to a file (cut or corrupt compression, unreadable, binary) is an
// error.
//
// Thread-safety: a DocumentReader belongs to one thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "trainer/compressed_file.h"

namespace memory3 {

struct Document {
  std::string id;  // the id field, a number written in decimal; without one "FILE:LINE" or "FILE"
  std::string title;  // may be empty; a .txt file's is its name without extensions
  std::string text;   // valid UTF-8, not empty
  std::string uri;    // may be empty
  std::map<std::string, std::string> metadata;
  std::string file;
  int64_t line = 0;  // of a .jsonl, from 1; 0 in a .txt
};

struct DocumentOptions {
  std::string text_field = "text";
  std::string title_field = "title";
  std::string id_field = "id";
  std::string uri_field;  // empty: "uri", where there is none "url"
  // An object whose values are texts, numbers or truth values (others make the line bad), which
  // are kept as text. Default (empty): none is read.
  std::string metadata_field;
  // A longer line is bad; a longer .txt is cut into documents at line ends. Default: 64 MiB.
  size_t max_document_bytes = size_t{64} << 20;
  bool strict = false;
};

class DocumentReader {
 public:
  // Checks that every path exists and has a known ending. INVALID_ARGUMENT, NOT_FOUND name the
  // path.
  static absl::StatusOr<std::unique_ptr<DocumentReader>> Open(std::vector<std::string> paths,
                                                              DocumentOptions options = {});

  // The next document; false after the last one. After an error the reader is spent.
  absl::StatusOr<bool> Next(Document* document);

  int64_t documents() const { return documents_; }
  int64_t skipped() const { return skipped_; }
  // What was skipped or repaired, the first 20: "FILE:LINE: reason".
  const std::vector<std::string>& warnings() const { return warnings_; }
  // Bytes on disk, for progress.
  int64_t bytes_consumed() const;
  int64_t bytes_total() const { return bytes_total_; }

 private:
  DocumentReader(std::vector<std::string> paths, DocumentOptions options, int64_t bytes_total)
      : paths_(std::move(paths)), options_(std::move(options)), bytes_total_(bytes_total) {}

  enum class LineResult { kLine, kTooLong, kEnd };
  absl::StatusOr<LineResult> ReadLine(std::string* line);
  absl::Status Fill();
  absl::StatusOr<bool> NextFromText(Document* document);
  absl::StatusOr<bool> NextFromLines(Document* document);
  // Empty: `document` is good; else what is wrong with the line.
  std::string ParseLine(const std::string& line, Document* document) const;
  void Warn(std::string message);
  std::string Place() const;

  std::vector<std::string> paths_;
  DocumentOptions options_;
  int64_t bytes_total_;
  size_t next_path_ = 0;
  int64_t bytes_done_ = 0;  // of the files before this one
  std::unique_ptr<CompressedFile> file_;
  bool is_text_ = false;
  int64_t line_ = 0;
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;
  int64_t documents_ = 0, skipped_ = 0;
  std::vector<std::string> warnings_;
};

// Documents kept out of training, so that they can be asked about: those whose id is a number with
// id % modulus == remainder, and those with one of the titles (underscores count as spaces).
class HoldOut {
 public:
  HoldOut() = default;  // holds nothing out
  HoldOut(int64_t modulus, int64_t remainder) : modulus_(modulus), remainder_(remainder) {}

  void AddTitle(std::string_view title);
  // The `title` field of every line of a .jsonl, whatever else the lines hold.
  absl::Status AddTitlesFrom(const std::string& path);
  bool Contains(const Document& document) const;

 private:
  int64_t modulus_ = 0, remainder_ = 0;
  absl::flat_hash_set<std::string> titles_;
};

}  // namespace memory3
