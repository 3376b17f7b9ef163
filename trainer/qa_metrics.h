// How an answer is marked: SQuAD's rules (evaluate-v2.0.py). Lower-cased, ASCII
// punctuation removed, the words a, an, the removed, words split at white space.
//
// Thread-safety: pure functions.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace memory3 {

// The normalised words.
std::vector<std::string> AnswerWords(std::string_view answer);
std::string NormalizeAnswer(std::string_view answer);  // the words, with single spaces

// The best over the gold answers; 0 where there is none.
double ExactMatch(std::string_view answer, std::span<const std::string> gold);  // 0 or 1
double AnswerF1(std::string_view answer, std::span<const std::string> gold);

}  // namespace memory3
