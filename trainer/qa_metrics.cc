#include "trainer/qa_metrics.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_join.h"
#include "embedder/unicode.h"

namespace memory3 {
namespace {

// Python's string.punctuation.
bool IsAsciiPunctuation(char32_t c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
         (c >= '{' && c <= '~');
}

// What Python's str.split takes for white space.
bool IsSpace(char32_t c) {
  return c <= ' ' ? (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20)
                  : c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
                        c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// What \w matches: a, an and the are articles only between characters that it does not.
bool IsWordCharacter(char32_t c) { return c == '_' || ClassOf(c) == CharClass::kWord; }

double F1(const std::vector<std::string>& answer, const std::vector<std::string>& gold) {
  if (answer.empty() || gold.empty()) return answer == gold ? 1 : 0;
  std::map<std::string, int> left;
  for (const std::string& word : gold) ++left[word];
  int same = 0;
  for (const std::string& word : answer) same += left[word]-- > 0;
  if (same == 0) return 0;
  const double precision = static_cast<double>(same) / static_cast<double>(answer.size());
  const double recall = static_cast<double>(same) / static_cast<double>(gold.size());
  return 2 * precision * recall / (precision + recall);
}

}  // namespace

std::vector<std::string> AnswerWords(std::string_view answer) {
  std::vector<std::string> words;
  std::string word, run;  // run: of word characters, the last of `word`
  const auto end_run = [&] {
    if (run != "a" && run != "an" && run != "the") {
      word += run;
    } else if (!word.empty()) {  // an article is replaced by a space
      words.push_back(std::move(word));
      word.clear();
    }
    run.clear();
  };
  const auto end_word = [&] {
    end_run();
    if (!word.empty()) words.push_back(std::move(word));
    word.clear();
  };
  for (size_t at = 0; at < answer.size();) {
    const char32_t c = ToLower(DecodeUtf8(answer, &at));
    if (IsAsciiPunctuation(c)) continue;
    if (IsSpace(c)) {
      end_word();
    } else if (IsWordCharacter(c)) {
      AppendUtf8(c, &run);
    } else {
      end_run();
      AppendUtf8(c, &word);
    }
  }
  end_word();
  return words;
}

std::string NormalizeAnswer(std::string_view answer) {
  return absl::StrJoin(AnswerWords(answer), " ");
}

double ExactMatch(std::string_view answer, std::span<const std::string> gold) {
  const std::vector<std::string> words = AnswerWords(answer);
  return std::any_of(gold.begin(), gold.end(),
                     [&](const std::string& g) { return AnswerWords(g) == words; })
             ? 1
             : 0;
}

double AnswerF1(std::string_view answer, std::span<const std::string> gold) {
  const std::vector<std::string> words = AnswerWords(answer);
  double best = 0;
  for (const std::string& g : gold) best = std::max(best, F1(words, AnswerWords(g)));
  return best;
}

}  // namespace memory3
