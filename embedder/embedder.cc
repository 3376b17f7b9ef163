#include "embedder/embedder.h"

#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "embedder/bert.h"
#include "embedder/lexical.h"

namespace memory3 {

absl::StatusOr<std::vector<float>> Embedder::EmbedOne(std::string_view text) const {
  std::vector<float> vector(dimension());
  if (absl::Status status = Embed({&text, 1}, vector); !status.ok()) return status;
  return vector;
}

absl::StatusOr<std::string> DefaultModelDirectory(std::string_view name) {
  namespace fs = std::filesystem;
  std::vector<fs::path> places;
  if (const char* models = std::getenv("MEMORY3_MODELS"); models != nullptr && *models != '\0') {
    places.push_back(fs::path(models) / name);
  } else {
    places.push_back(fs::path("models") / name);
    std::error_code error;
    const fs::path program = fs::read_symlink("/proc/self/exe", error);
    if (!error) {
      const fs::path bin = program.parent_path();
      places.push_back(bin.parent_path() / "models" / name);
      places.push_back(bin.parent_path().parent_path() / "models" / name);
    }
  }
  for (const fs::path& place : places) {
    std::error_code error;
    if (fs::is_directory(place, error)) return place.string();
  }
  return absl::NotFoundError(absl::StrCat(
      "no model directory \"", std::string(name), "\"; looked for ",
      absl::StrJoin(places, ", ",
                    [](std::string* out, const fs::path& p) { absl::StrAppend(out, p.string()); }),
      " (MEMORY3_MODELS names the directory that holds models)"));
}

absl::StatusOr<std::unique_ptr<Embedder>> MakeEmbedder(std::string_view spec,
                                                       const EmbedderOptions& options) {
  if (spec == "lexical") {
    absl::StatusOr<std::string> shipped = DefaultModelDirectory("lexical");
    if (!shipped.ok()) return shipped.status();
    return LexicalEmbedder::Load(*shipped);
  }
  const size_t colon = spec.find(':');
  const std::string_view kind = spec.substr(0, colon);
  const std::string directory(colon == std::string_view::npos ? "" : spec.substr(colon + 1));
  if (kind == "lexical" && !directory.empty()) return LexicalEmbedder::Load(directory);
  if (kind == "bert" && !directory.empty()) return BertEmbedder::Load(directory, options);
  return absl::InvalidArgumentError(absl::StrCat("embedder \"", std::string(spec),
                                                 "\": must be lexical, lexical:DIR or bert:DIR"));
}

}  // namespace memory3
