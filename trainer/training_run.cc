#include "trainer/training_run.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "trainer/progress.h"
#include "trainer/run_checkpoint.h"
#include "transformer/atomic_file.h"

namespace memory3 {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr int kMostSkipsInARow = 20;
constexpr int64_t kSpikeHistory = 50;  // steps before a spike can be told
constexpr double kSpikeDecay = 0.95;   // of the running mean, a step

volatile std::sig_atomic_t stop_requested = 0;

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

bool StopRequested() {
  sigset_t pending;
  sigpending(&pending);
  return stop_requested != 0 || sigismember(&pending, SIGTERM) == 1 ||
         sigismember(&pending, SIGINT) == 1;
}

// What changes from step to step besides the arrays.
struct RunState {
  int64_t step = 0;     // steps done
  int64_t updates = 0;  // of them not skipped: AdamW's count
  int64_t tokens = 0;   // with a target
  int64_t skipped = 0, skipped_in_a_row = 0;
  double mean = 0, variance = 0;  // running, of the loss

  json ToJson() const {
    return {{"step", step},        {"updates", updates}, {"tokens", tokens},
            {"skipped", skipped},  {"mean", mean},       {"skipped_in_a_row", skipped_in_a_row},
            {"variance", variance}};
  }
  static RunState FromJson(const json& j) {
    RunState s;
    s.step = j.value("step", int64_t{0});
    s.updates = j.value("updates", int64_t{0});
    s.tokens = j.value("tokens", int64_t{0});
    s.skipped = j.value("skipped", int64_t{0});
    s.skipped_in_a_row = j.value("skipped_in_a_row", int64_t{0});
    s.mean = j.value("mean", 0.0);
    s.variance = j.value("variance", 0.0);
    return s;
  }

  bool IsSpike(double loss, double deviations) const {
    return deviations > 0 && updates >= kSpikeHistory && skipped_in_a_row < 3 &&
           loss > mean + deviations * std::sqrt(variance);
  }
  void Learn(double loss) {
    if (updates == 0) mean = loss;
    const double off = loss - mean;
    mean += (1 - kSpikeDecay) * off;
    variance = kSpikeDecay * (variance + (1 - kSpikeDecay) * off * off);
  }
};

// Losses of a step by kind of sequence.
class KindLosses {
 public:
  void Add(const std::vector<std::string>& kinds, const TrainingBatch& batch,
           const TrainingResult& result) {
    for (size_t s = 0; s < kinds.size(); ++s) {
      const std::vector<int32_t>& targets = batch.sequences[s].targets;
      Sum& sum = sums_[kinds[s]];
      sum.loss += result.sequence_loss[s];
      sum.tokens += std::count_if(targets.begin(), targets.end(), [](int32_t t) { return t >= 0; });
    }
  }
  void AddTo(json* line) const {
    for (const auto& [kind, sum] : sums_) {
      if (sum.tokens == 0) continue;
      (*line)["loss_" + kind] = sum.loss / static_cast<double>(sum.tokens);
    }
  }

 private:
  struct Sum {
    double loss = 0;
    int64_t tokens = 0;
  };
  std::map<std::string, Sum> sums_;
};

// The directory's lock; held until it dies.
class RunLock {
 public:
  explicit RunLock(const std::string& directory)
      : fd_(open((directory + "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)),
        held_(fd_ >= 0 && flock(fd_, LOCK_EX | LOCK_NB) == 0) {}
  ~RunLock() {
    if (fd_ >= 0) close(fd_);
  }
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;
  bool held() const { return held_; }

 private:
  const int fd_;
  const bool held_;
};

// Takes back the lines of steps that a killed process did after its last checkpoint.
absl::Status TrimMetrics(const std::string& path, int64_t step) {
  std::ifstream in(path);
  std::string kept;
  for (std::string line; std::getline(in, line);) {
    const json j = json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (j.is_object() && j.contains("step") && j["step"].is_number_integer() &&
        j["step"].get<int64_t>() <= step) {
      kept += line + "\n";
    }
  }
  return WriteFileAtomically(path, kept);
}

absl::Status CheckSettings(const std::string& path, const json& stored, const json& wanted) {
  for (const auto& [name, value] : wanted.items()) {
    const json found = stored.value(name, json());
    if (found != value) {
      return absl::FailedPreconditionError(absl::StrCat(
          path, ": is of another run: ", name, " was ", found.dump(), ", is now ", value.dump()));
    }
  }
  return absl::OkStatus();
}

json Settings(const RunOptions& o) {
  json settings = o.settings;
  settings["schedule"] = {{"kind", o.schedule.kind == Schedule::Kind::kCosine ? "cosine" : "wsd"},
                          {"peak", o.schedule.peak},
                          {"floor", o.schedule.floor},
                          {"warmup", o.schedule.warmup},
                          {"steps", o.schedule.steps},
                          {"decay", o.schedule.decay}};
  settings["accumulate"] = o.accumulate;
  settings["weight_decay"] = o.weight_decay;
  settings["clip"] = o.clip;
  settings["spike_deviations"] = o.spike_deviations;
  return settings;
}

}  // namespace

void RequestStop() { stop_requested = 1; }

// The signals stay blocked and are asked for between steps. A handler would corrupt the heap:
// oneDNN's generated f32 products keep the stack pointer in a workspace on the heap while they run,
// and a handler's frame is written below it. (Under a storm of signals with an empty handler, 3 %
// of them found the stack pointer there: glibc aborted within 600. The same handler on a stack of
// its own, SA_ONSTACK in every thread, took 34,000 and the weights came out bit for bit.)
void StopOnSignals() {
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

absl::StatusOr<RunOutcome> RunTraining(
    Parameters* parameters, BatchSource* batches, const RunOptions& options,
    const std::function<absl::Status(int64_t step, json* metrics)>& extra) {
  std::error_code error;
  std::filesystem::create_directories(options.directory, error);
  if (error) return absl::UnavailableError(absl::StrCat(options.directory, ": ", error.message()));
  const RunLock lock(options.directory);
  if (!lock.held()) {
    return absl::FailedPreconditionError(
        absl::StrCat(options.directory, ": another run is using it, or it cannot be written"));
  }
  Device& device = parameters->device();
  absl::StatusOr<Buffer> gradient = parameters->AllocateLike();
  absl::StatusOr<Buffer> m = parameters->AllocateLike(), v = parameters->AllocateLike();
  for (const auto* buffer : {&gradient, &m, &v}) {
    if (!buffer->ok()) return buffer->status();
  }

  const json settings = Settings(options);
  RunState state;
  PruneRunCheckpoints(options.directory, options.keep);
  if (const auto found = ListRunCheckpoints(options.directory); !found.empty()) {
    const std::string& path = found.back().second;
    absl::StatusOr<json> about = ReadRunCheckpointAbout(path);
    if (!about.ok()) return about.status();
    absl::Status status = CheckSettings(path, about->value("settings", json::object()), settings);
    if (status.ok()) status = LoadRunCheckpoint(path, parameters, &*m, &*v);
    if (!status.ok()) return status;
    state = RunState::FromJson(about->value("state", json::object()));
    std::fprintf(stderr, "resumed at step %lld from %s\n", static_cast<long long>(state.step),
                 path.c_str());
  }
  const std::string metrics_path = options.directory + "/metrics.jsonl";
  if (absl::Status status = TrimMetrics(metrics_path, state.step); !status.ok()) return status;
  std::ofstream log(metrics_path, std::ios::app);

  const auto save = [&] {
    absl::Status status =
        SaveRunCheckpoint(RunCheckpointPath(options.directory, state.step),
                          {{"settings", settings}, {"state", state.ToJson()}}, *parameters, *m, *v);
    if (status.ok()) PruneRunCheckpoints(options.directory, options.keep);
    return status;
  };

  TrainingStep training(parameters);
  Progress progress("training", "steps");
  RunOutcome outcome;
  const int64_t end = options.schedule.steps;
  const int64_t first = state.step;
  int64_t saved = state.step;
  while (state.step < end && !StopRequested() &&
         (options.stop_after == 0 || state.step - first < options.stop_after)) {
    const Clock::time_point begin = Clock::now();
    device.Zero(gradient->data(), gradient->bytes());
    double loss = 0;
    int64_t tokens = 0;
    KindLosses kinds;
    for (int a = 0; a < options.accumulate; ++a) {
      absl::StatusOr<TrainingBatch> batch = batches->Make(state.step * options.accumulate + a);
      if (!batch.ok()) return batch.status();
      absl::StatusOr<TrainingResult> result = training.Run(*batch, gradient->as<float>());
      if (!result.ok()) return result.status();
      loss += result->loss;
      tokens += result->tokens;
      kinds.Add(batches->Kinds(), *batch, *result);
    }
    if (tokens == 0) return absl::InvalidArgumentError("a batch without a token to learn");
    loss /= static_cast<double>(tokens);
    absl::StatusOr<double> squares = device.SumOfSquares(gradient->as<float>(), parameters->size());
    if (!squares.ok()) return squares.status();
    const double norm = std::sqrt(*squares) / static_cast<double>(tokens);
    const double rate = options.schedule.At(state.step);
    const bool finite = std::isfinite(loss) && std::isfinite(norm);
    const bool skip = !finite || state.IsSpike(loss, options.spike_deviations);
    state.step += 1;
    state.tokens += tokens;
    if (skip) {
      state.skipped += 1;
      if (++state.skipped_in_a_row >= kMostSkipsInARow) {
        return absl::AbortedError(absl::StrCat("step ", state.step, ": the last ", kMostSkipsInARow,
                                               " updates were not finite"));
      }
    } else {
      state.Learn(loss);
      state.skipped_in_a_row = 0;
      state.updates += 1;
      // As torch.nn.utils.clip_grad_norm_.
      const double clip = options.clip > 0 ? std::min(1.0, options.clip / (norm + 1e-6)) : 1.0;
      parameters->AdamWStep(gradient->as<float>(), m->as<float>(), v->as<float>(),
                            {.learning_rate = static_cast<float>(rate),
                             .weight_decay = static_cast<float>(options.weight_decay),
                             .step = state.updates},
                            static_cast<float>(clip / static_cast<double>(tokens)));
      if (absl::Status status = device.Synchronize(); !status.ok()) return status;
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    json line = {{"step", state.step},
                 {"loss", finite ? json(loss) : json()},
                 {"gradient_norm", finite ? json(norm) : json()},
                 {"learning_rate", rate},
                 {"tokens", state.tokens},
                 {"tokens_per_s", static_cast<double>(tokens) / seconds}};
    if (skip) line["skipped"] = true;
    kinds.AddTo(&line);
    if (extra) {
      if (absl::Status status = extra(state.step, &line); !status.ok()) return status;
    }
    log << line.dump() << std::endl;
    if (!log) return absl::UnavailableError(absl::StrCat(metrics_path, ": cannot be written"));
    outcome.loss = loss;
    progress.Update(
        state.step, end,
        absl::StrFormat("loss %.4f  %.0f tokens/s", loss, static_cast<double>(tokens) / seconds));
    if (state.step % options.save_every == 0) {
      if (absl::Status status = save(); !status.ok()) return status;
      saved = state.step;
    }
  }
  if (saved != state.step) {
    if (absl::Status status = save(); !status.ok()) return status;
  }
  outcome.step = state.step;
  outcome.finished = state.step >= end;
  return outcome;
}

}  // namespace memory3
