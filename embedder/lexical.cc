#include "embedder/lexical.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "embedder/words.h"

namespace memory3 {
namespace {

constexpr float kSaturation = 32;
constexpr float kPairWeight = 0.2f;
constexpr int kDraws = 4, kPositionsPerDraw = 4;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
static_assert(LexicalEmbedder::kDimension == 1 << 10, "positions are 10 bits of a hash");

// Distinct terms of one text with their counts: open addressing, emptied in the time of what it
// held.
class TermCounter {
 public:
  struct Term {
    uint64_t hash;
    float idf;
    float count;
  };

  void Clear(size_t max_terms) {
    terms_.clear();
    const size_t want = std::bit_ceil(std::max<size_t>(64, 2 * max_terms));
    if (slots_.size() < want || slots_.size() > 64 * want) {
      slots_.assign(want, 0);
    } else {
      std::fill(slots_.begin(), slots_.end(), 0);
    }
  }
  void Add(uint64_t hash, float idf) {
    const size_t mask = slots_.size() - 1;
    for (size_t slot = hash & mask;; slot = (slot + 1) & mask) {
      if (slots_[slot] == 0) {
        terms_.push_back({hash, idf, 1});
        slots_[slot] = static_cast<uint32_t>(terms_.size());
        return;
      }
      if (Term& term = terms_[slots_[slot] - 1]; term.hash == hash) {
        term.count += 1;
        return;
      }
    }
  }
  const std::vector<Term>& terms() const { return terms_; }

 private:
  std::vector<uint32_t> slots_;  // 1 + index into terms_; 0: free
  std::vector<Term> terms_;      // in order of first appearance
};

struct Scratch {
  WordSplitter words;
  TermCounter terms;
};

void EmbedText(const IdfTable& idf, std::string_view text, Scratch* scratch, float* out) {
  WordSplitter& words = scratch->words;
  TermCounter& terms = scratch->terms;
  words.Split(text);
  terms.Clear(2 * words.size());
  uint64_t previous = 0;
  float previous_idf = 0;
  for (size_t i = 0; i < words.size(); ++i) {
    const uint64_t hash = HashWord(words.word(i));
    const float weight = idf.Weight(hash);
    terms.Add(hash, weight);
    if (i > 0) {
      terms.Add(MixHash(previous * kGolden + hash), kPairWeight * std::min(previous_idf, weight));
    }
    previous = hash;
    previous_idf = weight;
  }

  std::fill_n(out, LexicalEmbedder::kDimension, 0.0f);
  for (const TermCounter::Term& term : terms.terms()) {
    const float weight = term.idf * term.count * (kSaturation + 1) / (term.count + kSaturation);
    const float signed_weight[2] = {weight, -weight};
    for (int j = 0; j < kDraws; ++j) {
      uint64_t draw = MixHash(term.hash + (j + 1) * kGolden);
      for (int k = 0; k < kPositionsPerDraw; ++k, draw >>= 16) {
        out[draw & (LexicalEmbedder::kDimension - 1)] += signed_weight[(draw >> 15) & 1];
      }
    }
  }
  double squares = 0;
  for (int d = 0; d < LexicalEmbedder::kDimension; ++d) squares += double{out[d]} * out[d];
  if (squares == 0) return;
  const auto scale = static_cast<float>(1 / std::sqrt(squares));
  for (int d = 0; d < LexicalEmbedder::kDimension; ++d) out[d] *= scale;
}

}  // namespace

LexicalEmbedder::LexicalEmbedder(IdfTable idf) : idf_(std::move(idf)) {
  Sha256 sha;
  sha.UpdateLengthPrefixed("m3lexical1");
  sha.UpdateLengthPrefixed(idf_.digest().view());
  fingerprint_ = sha.Finish();
}

absl::StatusOr<std::unique_ptr<LexicalEmbedder>> LexicalEmbedder::Load(
    const std::string& directory) {
  absl::StatusOr<IdfTable> idf = IdfTable::Load(directory + "/idf.bin");
  if (!idf.ok()) return idf.status();
  return std::make_unique<LexicalEmbedder>(*std::move(idf));
}

absl::Status LexicalEmbedder::Embed(std::span<const std::string_view> texts,
                                    std::span<float> out) const {
  if (out.size() != texts.size() * kDimension) {
    return absl::InvalidArgumentError(
        absl::StrCat("out: ", out.size(), " numbers for ", texts.size(), " texts of ", kDimension));
  }
  Scratch scratch;
  for (size_t i = 0; i < texts.size(); ++i) {
    EmbedText(idf_, texts[i], &scratch, out.data() + i * kDimension);
  }
  return absl::OkStatus();
}

}  // namespace memory3
