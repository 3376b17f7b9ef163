#include "trainer/codebook_sampling.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "trainer/random.h"
#include "trainer/reference_source.h"

namespace memory3 {
namespace {

constexpr int64_t kHeldOut = 10;  // every tenth memory
constexpr int64_t kFewestReferences = 1000;
constexpr int64_t kRows = 2048;

// A uniform sample of the distinct references (reservoir sampling, algorithm R), in random order.
absl::StatusOr<std::vector<std::vector<int32_t>>> DrawReferences(
    const CodebookSampleOptions& options, const WritingModel& model, int64_t wanted,
    const std::function<void(bool, int64_t, int64_t)>& progress, CodebookSample* sample) {
  ReferenceSourceOptions source_options;
  source_options.inputs = options.inputs;
  source_options.documents = options.documents;
  source_options.reference_tokens = model.memory().reference_tokens;
  source_options.threads = options.threads;
  auto source = ReferenceSource::Open(&model.tokenizer(), std::move(source_options));
  if (!source.ok()) return source.status();
  Random random({options.seed});
  std::vector<std::vector<int32_t>> drawn;
  std::vector<ReferenceItem> items;
  for (int64_t seen = 0;;) {
    absl::StatusOr<bool> some = (*source)->Next(kRows, 256, &items);
    if (!some.ok()) return some.status();
    const ReferenceCounts counts = (*source)->counts();
    if (progress) progress(true, counts.bytes_read, counts.bytes_total);
    if (!*some) break;
    for (ReferenceItem& item : items) {
      if (item.has_record) continue;  // a repetition
      ++seen;
      if (static_cast<int64_t>(drawn.size()) < wanted) {
        drawn.push_back(std::move(item.token_ids));
      } else if (const auto at = static_cast<int64_t>(random.Below(seen)); at < wanted) {
        drawn[at] = std::move(item.token_ids);
      }
    }
  }
  sample->skipped = (*source)->counts().skipped;
  sample->warnings = (*source)->warnings();
  for (size_t i = drawn.size(); i > 1; --i) std::swap(drawn[i - 1], drawn[random.Below(i)]);
  return drawn;
}

}  // namespace

absl::StatusOr<CodebookSample> SampleVectors(
    const CodebookSampleOptions& options, const WritingModel& model,
    const std::function<void(bool reading, int64_t done, int64_t total)>& progress) {
  const MemoryShape full = model.ShapeOf(model.memory().reference_tokens);
  const int64_t of_training = options.vectors * kHeldOut / (kHeldOut - 1) + 1;
  const int64_t wanted = options.references > 0
                             ? options.references
                             : std::max(kFewestReferences, 2 * of_training / full.vectors() + 1);
  CodebookSample sample;
  auto references = DrawReferences(options, model, wanted, progress, &sample);
  if (!references.ok()) return references.status();
  if (references->empty()) {
    std::string why = "the input holds no text to write";
    if (!sample.warnings.empty()) absl::StrAppend(&why, " (", sample.warnings[0], ")");
    return absl::InvalidArgumentError(why);
  }
  sample.memories = static_cast<int64_t>(references->size());
  const int64_t d = full.head_dim;
  const int64_t each = (of_training + sample.memories - 1) / sample.memories;
  Random random({options.seed, 1});
  const std::span<const std::vector<int32_t>> all = *references;
  const size_t at_once = std::max<size_t>(1, kRows / model.memory().reference_tokens);
  std::vector<int64_t> order;
  for (size_t begin = 0; begin < all.size(); begin += at_once) {
    const size_t count = std::min(at_once, all.size() - begin);
    auto memories = model.writer()->Write(all.subspan(begin, count));
    if (!memories.ok()) return memories.status();
    for (size_t m = 0; m < count; ++m) {
      const ExplicitMemory& memory = (*memories)[m];
      const int64_t vectors = memory.shape.vectors();
      const int64_t run = int64_t{memory.shape.kv_heads} * memory.shape.tokens;  // of K, of V
      order.resize(vectors);
      for (int64_t v = 0; v < vectors; ++v) order[v] = v;
      const bool held_out = static_cast<int64_t>(begin + m) % kHeldOut == kHeldOut - 1;
      for (int64_t i = 0; i < std::min(each, vectors); ++i) {  // the start of a random permutation
        std::swap(order[i], order[i + static_cast<int64_t>(random.Below(vectors - i))]);
        std::vector<float>& to = !held_out                 ? sample.training
                                 : order[i] / run % 2 == 0 ? sample.held_out_keys
                                                           : sample.held_out_values;
        const float* from = memory.values.data() + order[i] * d;
        to.insert(to.end(), from, from + d);
      }
    }
    if (progress) progress(false, static_cast<int64_t>(begin + count), sample.memories);
  }
  return sample;
}

}  // namespace memory3
