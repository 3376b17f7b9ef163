#include "trainer/run_flags.h"

namespace memory3 {

void RunFlags::AddTo(CLI::App* flags) {
  RunOptions& r = run;
  flags->add_option("--out", r.directory, "The run's directory; one with checkpoints is resumed")
      ->required();
  flags->add_option("--steps", r.schedule.steps)
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  flags->add_option("--schedule", schedule)
      ->check(CLI::IsMember({"cosine", "wsd"}))
      ->capture_default_str();
  flags->add_option("--learning_rate", r.schedule.peak)
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  flags->add_option("--final_learning_rate", r.schedule.floor)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--warmup_steps", r.schedule.warmup)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--decay_steps", r.schedule.decay, "wsd: the last steps, falling linearly")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--batch", batch, "Sequences of one pass")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  flags->add_option("--accumulate", r.accumulate, "Passes of one update")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  flags->add_option("--weight_decay", r.weight_decay)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--clip", r.clip, "Norm of the gradient; 0: no clipping")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags
      ->add_option("--spike_deviations", r.spike_deviations,
                   "Skips updates whose loss is this far above its running mean; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--save_every", r.save_every, "Steps between checkpoints")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  flags->add_option("--keep", r.keep, "Checkpoints kept")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  flags->add_option("--stop_after", r.stop_after, "Stops after so many steps; 0: at the end")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--seed", seed)->capture_default_str();
  flags->add_flag("--recompute", recompute, "Recomputes activations in backward: less memory");
}

absl::Status SaveModelOnce(const Parameters& parameters, const std::string& directory,
                           const std::string& tokenizer) {
  const absl::Status status = parameters.Save(directory, DType::kF32, tokenizer);
  return absl::IsAlreadyExists(status) ? absl::OkStatus() : status;
}

}  // namespace memory3
