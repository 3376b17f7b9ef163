// `trainer plot`: the curves of runs as an HTML page.
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "trainer/command.h"
#include "trainer/plot.h"
#include "transformer/atomic_file.h"

namespace memory3 {
namespace {

struct PlotFlags {
  std::vector<std::string> runs;
  std::string out, title;
  size_t points = 4000;
};

// NAME=PATH, or a path whose last part is the name.
void Split(const std::string& run, std::string* name, std::string* path) {
  const size_t equals = run.find('=');
  if (equals != std::string::npos && !std::filesystem::exists(run)) {
    *name = run.substr(0, equals);
    *path = run.substr(equals + 1);
    return;
  }
  *path = run;
  std::filesystem::path p = std::filesystem::path(run).lexically_normal();
  if (!p.has_filename() || p.filename() == "metrics.jsonl") p = p.parent_path();
  *name = p.has_filename() ? p.filename().string() : run;
}

absl::Status RunPlot(const PlotFlags& f) {
  std::vector<RunCurves> runs;
  for (const std::string& run : f.runs) {
    std::string name, path;
    Split(run, &name, &path);
    // Two runs of one name are told apart by their paths.
    const bool taken = std::any_of(runs.begin(), runs.end(),
                                   [&](const RunCurves& other) { return other.name == name; });
    absl::StatusOr<RunCurves> curves = ReadRunCurves(path, taken ? run : name);
    if (!curves.ok()) return curves.status();
    if (curves->bad_lines > 0) {
      std::fprintf(stderr, "%s: %lld lines are no JSON objects, left out\n", path.c_str(),
                   static_cast<long long>(curves->bad_lines));
    }
    Thin(&*curves, f.points);
    runs.push_back(*std::move(curves));
  }
  const std::string title = f.title.empty() ? absl::StrCat("memory3: ", runs[0].name) : f.title;
  if (absl::Status status = WriteFileAtomically(f.out, CurvesPage(runs, title)); !status.ok()) {
    return status;
  }
  std::printf("%s: %zu runs\n", f.out.c_str(), runs.size());
  return absl::OkStatus();
}

}  // namespace

void AddPlotCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags = app->add_subcommand("plot", "The curves of runs as a self-contained HTML page");
  auto f = std::make_shared<PlotFlags>();
  flags->add_option("runs", f->runs, "Directories of runs or .jsonl files; NAME=PATH names one")
      ->required();
  flags->add_option("--out", f->out, "The page, e.g. curves.html")->required();
  flags->add_option("--title", f->title, "Default: the first run's name");
  flags->add_option("--points", f->points, "Longer curves are thinned to so many means")
      ->check(CLI::Range(size_t{2}, size_t{1000000}))
      ->capture_default_str();
  commands->push_back({flags, [f] { return RunPlot(*f); }});
}

}  // namespace memory3
