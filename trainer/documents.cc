#include "trainer/documents.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <span>
#include <system_error>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "embedder/unicode.h"
#include "nlohmann/json.hpp"

namespace memory3 {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 18;
constexpr size_t kMaxWarnings = 20;

// The name without .gz or .zst.
std::string_view Uncompressed(std::string_view path) {
  for (std::string_view ending : {".gz", ".zst"}) {
    if (path.ends_with(ending)) return path.substr(0, path.size() - ending.size());
  }
  return path;
}

// Replaces what is not UTF-8 by U+FFFD; the number of replacements.
int64_t RepairUtf8(std::string* text) {
  int64_t repaired = 0;
  std::string out;
  for (size_t pos = 0; pos < text->size();) {
    const size_t at = pos;
    if (DecodeUtf8(*text, &pos) != kReplacementChar || pos - at == 3) {
      if (repaired > 0) out.append(*text, at, pos - at);
      continue;
    }
    if (repaired++ == 0) out.assign(*text, 0, at);
    AppendUtf8(kReplacementChar, &out);
  }
  if (repaired > 0) *text = std::move(out);
  return repaired;
}

bool IsBlank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

// A field as text: strings as they are, numbers in decimal; "" for anything else.
std::string FieldText(const nlohmann::json& object, const std::string& field) {
  const auto it = object.find(field);
  if (it == object.end()) return "";
  if (it->is_string()) return it->get<std::string>();
  if (it->is_number_integer()) return it->dump();
  return "";
}

// The object's pairs as texts; false: it is no object, or a value is none of text, number and truth
// value. No field: no pairs.
bool ReadMetadata(const nlohmann::json& object, const std::string& field,
                  std::map<std::string, std::string>* metadata) {
  metadata->clear();
  const auto it = object.find(field);
  if (it == object.end() || it->is_null()) return true;
  if (!it->is_object()) return false;
  for (const auto& [key, value] : it->items()) {
    if (!value.is_string() && !value.is_number() && !value.is_boolean()) return false;
    (*metadata)[key] = value.is_string() ? value.get<std::string>() : value.dump();
  }
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<DocumentReader>> DocumentReader::Open(std::vector<std::string> paths,
                                                                     DocumentOptions options) {
  int64_t total = 0;
  for (const std::string& path : paths) {
    const std::string_view name = Uncompressed(path);
    if (!name.ends_with(".txt") && !name.ends_with(".jsonl")) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": must end in .txt or .jsonl, or either with .gz or .zst"));
    }
    absl::StatusOr<std::unique_ptr<CompressedFile>> file = CompressedFile::Open(path);
    if (!file.ok()) return file.status();
    total += (*file)->bytes_total();
  }
  return std::unique_ptr<DocumentReader>(
      new DocumentReader(std::move(paths), std::move(options), total));
}

int64_t DocumentReader::bytes_consumed() const {
  return bytes_done_ + (file_ == nullptr ? 0 : file_->bytes_consumed());
}

std::string DocumentReader::Place() const {
  return is_text_ ? file_->path() : absl::StrCat(file_->path(), ":", line_);
}

void DocumentReader::Warn(std::string message) {
  if (warnings_.size() < kMaxWarnings) {
    warnings_.push_back(absl::StrCat(Place(), ": ", message));
  }
}

absl::StatusOr<bool> DocumentReader::Next(Document* document) {
  while (true) {
    if (file_ == nullptr) {
      if (next_path_ == paths_.size()) return false;
      const std::string& path = paths_[next_path_++];
      absl::StatusOr<std::unique_ptr<CompressedFile>> file = CompressedFile::Open(path);
      if (!file.ok()) return file.status();
      file_ = *std::move(file);
      is_text_ = Uncompressed(path).ends_with(".txt");
      line_ = 0;
      begin_ = end_ = 0;
      buffer_.resize(kBufferBytes);
    }
    absl::StatusOr<bool> found = is_text_ ? NextFromText(document) : NextFromLines(document);
    if (!found.ok()) return found;
    if (*found) {
      ++documents_;
      return true;
    }
    bytes_done_ += file_->bytes_consumed();
    file_.reset();
  }
}

absl::Status DocumentReader::Fill() {
  absl::StatusOr<size_t> read = file_->Read(buffer_);
  if (!read.ok()) return read.status();
  begin_ = 0;
  end_ = *read;
  return absl::OkStatus();
}

absl::StatusOr<DocumentReader::LineResult> DocumentReader::ReadLine(std::string* line) {
  line->clear();
  bool any = false, too_long = false;
  while (true) {
    if (begin_ == end_) {
      if (absl::Status status = Fill(); !status.ok()) return status;
      if (begin_ == end_) {
        if (!any) return LineResult::kEnd;
        break;
      }
    }
    any = true;
    const char* const start = buffer_.data() + begin_;
    const auto* newline = static_cast<const char*>(std::memchr(start, '\n', end_ - begin_));
    const size_t length = newline == nullptr ? end_ - begin_ : newline - start;
    too_long = too_long || line->size() + length > options_.max_document_bytes;
    if (too_long) {
      line->clear();  // the rest of it is read past, not kept
    } else {
      line->append(start, length);
    }
    begin_ += length + (newline == nullptr ? 0 : 1);
    if (newline != nullptr) break;
  }
  ++line_;
  return too_long ? LineResult::kTooLong : LineResult::kLine;
}

std::string DocumentReader::ParseLine(const std::string& line, Document* document) const {
  const nlohmann::json object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (object.is_discarded()) return "is not valid JSON in UTF-8";
  if (!object.is_object()) return "is not a JSON object";
  const auto text = object.find(options_.text_field);
  if (text == object.end()) return absl::StrCat("has no field \"", options_.text_field, "\"");
  if (!text->is_string())
    return absl::StrCat("field \"", options_.text_field, "\" is not a string");
  document->text = text->get<std::string>();
  if (IsBlank(document->text)) return absl::StrCat("field \"", options_.text_field, "\" is empty");
  document->title = FieldText(object, options_.title_field);
  document->id = FieldText(object, options_.id_field);
  document->uri = FieldText(object, options_.uri_field.empty() ? "uri" : options_.uri_field);
  if (document->uri.empty() && options_.uri_field.empty()) {
    document->uri = FieldText(object, "url");
  }
  if (!options_.metadata_field.empty() &&
      !ReadMetadata(object, options_.metadata_field, &document->metadata)) {
    return absl::StrCat("field \"", options_.metadata_field,
                        "\" is not an object of texts, numbers and truth values");
  }
  return "";
}

absl::StatusOr<bool> DocumentReader::NextFromLines(Document* document) {
  std::string line;
  while (true) {
    absl::StatusOr<LineResult> result = ReadLine(&line);
    if (!result.ok()) return result.status();
    if (*result == LineResult::kEnd) return false;
    std::string problem;
    if (*result == LineResult::kTooLong) {
      problem = absl::StrCat("is longer than ", options_.max_document_bytes, " bytes");
    } else if (IsBlank(line)) {
      continue;
    } else {
      problem = ParseLine(line, document);
    }
    if (problem.empty()) {
      document->file = file_->path();
      document->line = line_;
      if (document->id.empty()) document->id = Place();
      return true;
    }
    if (options_.strict) {
      return absl::InvalidArgumentError(absl::StrCat(Place(), ": ", problem));
    }
    ++skipped_;
    Warn(problem);
  }
}

absl::StatusOr<bool> DocumentReader::NextFromText(Document* document) {
  document->text.clear();
  const bool first = line_ == 0;
  std::string line;
  while (document->text.size() < options_.max_document_bytes) {
    absl::StatusOr<LineResult> result = ReadLine(&line);
    if (!result.ok()) return result.status();
    if (*result == LineResult::kEnd) break;
    if (*result == LineResult::kTooLong) {
      return absl::InvalidArgumentError(absl::StrCat(Place(), ": line ", line_, " is longer than ",
                                                     options_.max_document_bytes,
                                                     " bytes; is this text?"));
    }
    if (line.find('\0') != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(Place(), ": line ", line_, " holds a NUL byte; this is no text file"));
    }
    absl::StrAppend(&document->text, line, "\n");
  }
  if (IsBlank(document->text)) {
    if (first) Warn("holds no text");
    return false;
  }
  document->text.pop_back();
  if (const int64_t repaired = RepairUtf8(&document->text); repaired > 0) {
    const std::string problem = absl::StrCat(repaired, " bytes are not UTF-8");
    if (options_.strict) {
      return absl::InvalidArgumentError(absl::StrCat(Place(), ": ", problem));
    }
    Warn(absl::StrCat(problem, "; replaced by U+FFFD"));
  }
  const std::filesystem::path name(std::string(Uncompressed(file_->path())));
  document->title = name.stem().string();
  document->uri.clear();
  document->metadata.clear();
  document->file = file_->path();
  document->line = 0;
  document->id = first ? file_->path() : absl::StrCat(file_->path(), ":", line_);
  return true;
}

void HoldOut::AddTitle(std::string_view title) {
  titles_.insert(absl::StrReplaceAll(std::string(title), {{"_", " "}}));
}

absl::Status HoldOut::AddTitlesFrom(const std::string& path) {
  DocumentOptions options;
  options.text_field = "title";
  options.strict = true;
  absl::StatusOr<std::unique_ptr<DocumentReader>> reader = DocumentReader::Open({path}, options);
  if (!reader.ok()) return reader.status();
  Document document;
  while (true) {
    absl::StatusOr<bool> found = (*reader)->Next(&document);
    if (!found.ok()) return found.status();
    if (!*found) return absl::OkStatus();
    AddTitle(document.text);
  }
}

bool HoldOut::Contains(const Document& document) const {
  int64_t id = 0;
  if (modulus_ > 0 && absl::SimpleAtoi(document.id, &id) && id % modulus_ == remainder_)
    return true;
  return !titles_.empty() && titles_.contains(absl::StrReplaceAll(document.title, {{"_", " "}}));
}

}  // namespace memory3
