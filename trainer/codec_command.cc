// `trainer codec`: the vq codec's codebook for one model's memories.
#include <iostream>
#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "memory/codec.h"
#include "memory/vq_codebook.h"
#include "memory/vq_training.h"
#include "trainer/codebook_sampling.h"
#include "trainer/command.h"
#include "trainer/progress.h"
#include "transformer/atomic_file.h"

namespace memory3 {
namespace {

struct CodecFlags {
  std::string model, out, weights = "f32";
  CodebookSampleOptions sample;
  VqTrainingOptions training;
  DeviceFlags device;
};

absl::Status RunCodec(CodecFlags& f) {
  absl::StatusOr<WeightFormat> format = ParseWeightFormat(f.weights);
  if (!format.ok()) return format.status();
  auto device = f.device.Make();  // outlives the model
  if (!device.ok()) return device.status();
  auto model = WritingModel::Open(f.model);
  if (!model.ok()) return model.status();
  const int d = (*model)->config().head_dim;
  if (d % 8 != 0) {  // before hours of writing
    return absl::InvalidArgumentError(
        absl::StrCat(f.model, ": head_dim is ", d, "; vq wants a multiple of 8"));
  }
  if (absl::Status s = (*model)->LoadWriter(device->get(), *format, 0); !s.ok()) return s;
  if (f.sample.vectors == 0) {
    f.sample.vectors = kVectorsPerCentroid << std::max(f.training.coarse_bits, 8);
  }
  f.sample.threads = f.device.threads > 0
                         ? f.device.threads
                         : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  absl::StatusOr<CodebookSample> sample;
  {
    std::optional<Progress> reading(std::in_place, "reading", "MB", 1e6), writing;
    sample = SampleVectors(f.sample, **model, [&](bool is_reading, int64_t done, int64_t total) {
      if (is_reading) return reading->Update(done, total);
      if (!writing) {
        reading.reset();
        writing.emplace("writing", "memories");
      }
      writing->Update(done, total);
    });
  }
  if (!sample.ok()) return sample.status();
  for (const std::string& warning : sample->warnings) std::cerr << warning << "\n";
  if (sample->skipped > 0) std::cerr << sample->skipped << " documents skipped\n";
  const int64_t vectors = static_cast<int64_t>(sample->training.size()) / d;
  std::cerr << absl::StrFormat("training %s on %d vectors of %d memories\n",
                               VqFactoryString(d, f.training), vectors, sample->memories);
  absl::StatusOr<VqTraining> trained = TrainVqCodebook(sample->training, d, f.training);
  if (!trained.ok()) return trained.status();  // a warning it has logged itself
  absl::StatusOr<std::string> file = SerializeCodebook(trained->codebook);
  if (!file.ok()) return file.status();
  auto codec = MakeVqCodec(*file);
  if (!codec.ok()) return codec.status();
  if (absl::Status status = WriteFileAtomically(f.out, *file); !status.ok()) return status;
  std::cout << absl::StrFormat(
      "%s: %s, %d bytes a vector\nrelative squared error: %.4f on the training vectors", f.out,
      (*codec)->codebook_hash().ToHex(), (*codec)->bytes_per_vector(), trained->relative_error);
  for (const auto& [what, held_out] :
       {std::pair{"keys", &sample->held_out_keys}, {"values", &sample->held_out_values}}) {
    if (held_out->empty()) continue;
    absl::StatusOr<double> error = RelativeError(**codec, *held_out);
    if (!error.ok()) return error.status();
    std::cout << absl::StrFormat(", %.4f on held-out %s", *error, what);
  }
  std::cout << "\n";
  return absl::OkStatus();
}

}  // namespace

void AddCodecCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags =
      app->add_subcommand("codec", "Trains the vq codec's codebook on a model's memories");
  auto f = std::make_shared<CodecFlags>();
  flags->add_option("documents", f->sample.inputs, ".txt or .jsonl files, also .gz or .zst")
      ->required();
  flags->add_option("--model", f->model, "Model directory")->required();
  flags->add_option("--out", f->out, "The codebook's file")->required();
  flags
      ->add_option("--vectors", f->sample.vectors,
                   "To train on; 0: 39 for each coarse centroid, 638,976")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags
      ->add_option("--references", f->sample.references,
                   "To draw and write; 0: twice what holds the vectors, at least 1,000")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--seed", f->sample.seed)->capture_default_str();
  flags->add_option("--coarse_bits", f->training.coarse_bits, "14 is the paper's")
      ->check(CLI::Range(1, 16))
      ->capture_default_str();
  flags->add_option("--fine_bits", f->training.fine_bits, "10 is the paper's")
      ->check(CLI::Range(1, 12))
      ->capture_default_str();
  flags->add_option("--weights", f->weights, "What the model computes with")
      ->check(CLI::IsMember({"f32", "bf16", "int8"}))
      ->capture_default_str();
  flags->add_option("--text_field", f->sample.documents.text_field)->capture_default_str();
  flags->add_option("--title_field", f->sample.documents.title_field)->capture_default_str();
  flags->add_option("--id_field", f->sample.documents.id_field)->capture_default_str();
  flags->add_flag("--strict", f->sample.documents.strict, "A bad line is an error, not skipped");
  f->device.AddTo(flags);
  commands->push_back({flags, [f] { return RunCodec(*f); }});
}

}  // namespace memory3
