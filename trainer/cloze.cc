#include "trainer/cloze.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace memory3 {
namespace {

constexpr size_t kContext = 9;      // words on each side
constexpr size_t kLongestName = 4;  // words
constexpr size_t kFewestAsked = 4;  // words of a question
constexpr size_t kLongWord = 6;     // letters of a word that is asked for though it is no name

struct Word {
  size_t begin = 0, end = 0;
};

// Words of a text, without the marks around them.
std::vector<Word> WordsOf(std::string_view text) {
  const auto is_mark = [](char c) {
    return std::string_view(".,;:()\"'!?[]").find(c) != std::string_view::npos;
  };
  std::vector<Word> words;
  for (size_t i = 0; i < text.size();) {
    while (i < text.size() && absl::ascii_isspace(text[i])) ++i;
    size_t end = i;
    while (end < text.size() && !absl::ascii_isspace(text[end])) ++end;
    Word w = {i, end};
    while (w.begin < w.end && is_mark(text[w.begin])) ++w.begin;
    while (w.end > w.begin && is_mark(text[w.end - 1])) --w.end;
    if (w.end > w.begin) words.push_back(w);
    i = end;
  }
  return words;
}

bool IsName(std::string_view word) {
  return absl::ascii_isupper(word[0]) || absl::ascii_isdigit(word[0]);
}

bool IsOneOf(std::string_view word, std::initializer_list<std::string_view> list) {
  return std::find(list.begin(), list.end(), word) != list.end();
}

// Words that begin sentences and are no part of a name.
constexpr std::string_view kFirstWords[] = {
    "The",   "A",      "An",     "In",   "On",    "At",        "It",      "He",    "She",
    "They",  "This",   "These",  "That", "Those", "His",       "Her",     "Its",   "Their",
    "After", "Before", "During", "When", "While", "As",        "For",     "From",  "By",
    "With",  "Some",   "Many",   "Most", "Other", "Although",  "However", "There", "If",
    "Since", "Both",   "Not",    "No",   "One",   "Following", "And",     "But",   "To"};

bool IsNumber(std::string_view word) {
  return std::all_of(word.begin(), word.end(),
                     [](char c) { return absl::ascii_isdigit(c) || c == ',' || c == '.'; });
}

bool IsYear(std::string_view word) {
  return word.size() == 4 && (word[0] == '1' || word[0] == '2') &&
         std::all_of(word.begin(), word.end(), [](char c) { return absl::ascii_isdigit(c); });
}

bool IsMonth(std::string_view word) {
  return IsOneOf(word, {"January", "February", "March", "April", "May", "June", "July", "August",
                        "September", "October", "November", "December"});
}

// The past tense of a participle; empty for a word that looks like none.
std::string PastTense(const std::string& participle) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 16> kIrregular = {{
      {"written", "wrote"},
      {"made", "made"},
      {"built", "built"},
      {"led", "led"},
      {"sung", "sang"},
      {"drawn", "drew"},
      {"won", "won"},
      {"found", "found"},
      {"given", "gave"},
      {"taken", "took"},
      {"held", "held"},
      {"beaten", "beat"},
      {"driven", "drove"},
      {"run", "ran"},
      {"begun", "began"},
      {"brought", "brought"},
  }};
  for (const auto& [from, to] : kIrregular) {
    if (participle == from) return std::string(to);
  }
  return participle.size() > 4 && participle.ends_with("ed") && absl::ascii_islower(participle[0])
             ? participle
             : "";
}

// A reference's words and the span that is asked for.
struct Place {
  const std::string& text;
  size_t body;  // where the title ends
  const std::vector<Word>& words;
  size_t first, last;    // the span, words
  size_t begin, beyond;  // the sentence around it, words

  std::string At(size_t i) const {
    return text.substr(words[i].begin, words[i].end - words[i].begin);
  }
  std::string Title() const { return text.substr(0, body == 0 ? 0 : body - 1); }
};

// Words that follow each other with a single space between.
bool Joined(const Place& p, size_t i) {
  return p.words[i].end + 1 == p.words[i + 1].begin && p.text[p.words[i].end] == ' ';
}

// Whether a sentence ends behind word i.
bool EndsSentence(const Place& p, size_t i) {
  const size_t end = p.words[i].end;
  return end < p.text.size() && IsOneOf(p.text.substr(end, 1), {".", "!", "?", "\n"}) &&
         (p.text[end] == '\n' || p.words[i].end - p.words[i].begin > 1);
}

// Draws a span: a name with its parts, or a long word. False: there is none at the place drawn.
bool DrawSpan(Place* p, Random* random) {
  p->first = p->last = random->Below(p->words.size());
  if (p->words[p->first].begin < p->body) return false;
  if (!IsName(p->At(p->first))) {
    return p->At(p->first).size() >= kLongWord && random->Below(6) == 0;
  }
  const auto is_link = [&](size_t i) {
    return IsOneOf(p->At(i), {"of", "de", "van", "von", "la", "der"});
  };
  // Names run on over single spaces, and over small words between two names.
  while (p->last + 1 < p->words.size() && p->last - p->first + 1 < kLongestName &&
         Joined(*p, p->last)) {
    if (IsName(p->At(p->last + 1))) {
      p->last += 1;
    } else if (p->last + 2 < p->words.size() && p->last - p->first + 2 < kLongestName &&
               is_link(p->last + 1) && Joined(*p, p->last + 1) && IsName(p->At(p->last + 2)) &&
               !IsNumber(p->At(p->last))) {
      p->last += 2;
    } else {
      break;
    }
  }
  while (p->first > 0 && p->words[p->first - 1].begin >= p->body &&
         p->last - p->first + 1 < kLongestName && Joined(*p, p->first - 1) &&
         IsName(p->At(p->first - 1))) {
    p->first -= 1;
  }
  // A sentence's first word is a capital for another reason.
  if (std::find(std::begin(kFirstWords), std::end(kFirstWords), p->At(p->first)) !=
      std::end(kFirstWords)) {
    if (p->first == p->last) return false;
    p->first += 1;
  }
  const bool starts =
      p->words[p->first].begin == p->body || (p->first > 0 && EndsSentence(*p, p->first - 1));
  return p->last > p->first || !starts || IsNumber(p->At(p->first));
}

// Draws the word that asks. Prepositions it stands for are dropped by the caller.
std::string AskingWord(const Place& p, Random* random) {
  const auto draw = [&](std::initializer_list<std::string_view> list) {
    return std::string(*(list.begin() + random->Below(list.size())));
  };
  const std::string before =
      p.first > p.begin ? absl::AsciiStrToLower(p.At(p.first - 1)) : std::string();
  bool month = false;
  for (size_t i = p.first; i <= p.last; ++i) month = month || IsMonth(p.At(i));
  const std::string word = p.At(p.first);
  if (month) return draw({"when", "when", "on what date"});
  if (p.first == p.last && IsYear(word)) {
    return draw({"when", "when", "in which year", "in what year", "what year"});
  }
  if (IsNumber(word)) return p.first == p.last ? "how many" : draw({"when", "what", "how many"});
  if (!IsName(word)) return draw({"what", "what", "which", "what kind of"});
  if (IsOneOf(before, {"in", "at", "near", "from", "to"})) {
    return draw({"where", "where", "where", "in which city", "in which country", "which place"});
  }
  if (IsOneOf(before, {"the", "a", "an", "called", "named"}))
    return draw({"what", "what", "which"});
  return draw({"who", "who", "who", "what", "which"});
}

// "Who discovered TITLE?" of "discovered by NAME"; empty: it does not stand so.
std::string AskForAgent(const Place& p, Random* random) {
  if (p.first < p.begin + 2 || p.At(p.first - 1) != "by") return "";
  const std::string verb = PastTense(p.At(p.first - 2));
  if (verb.empty()) return "";
  std::string subject = p.Title();
  if (subject.empty() || random->Below(3) == 0) {
    const size_t end = p.first - 2;
    const size_t begin = end > p.begin + 6 ? end - 6 : p.begin;
    std::vector<std::string> words;
    for (size_t i = begin; i < end; ++i) {
      if (!IsOneOf(p.At(i), {"was", "were", "is", "are", "been", "be", "and"})) {
        words.push_back(p.At(i));
      }
    }
    if (words.empty()) return "";
    subject = absl::StrJoin(words, " ");
  }
  return absl::StrCat("who ", verb, " ", subject);
}

// The asking word first, then the title or what stands for it and the sentence's other words.
std::string AskInQuestionForm(const Place& p, Random* random) {
  if (random->Below(2) == 0) {
    std::string question = AskForAgent(p, random);
    if (!question.empty()) return question;
  }
  std::vector<std::string> asked = {AskingWord(p, random)};
  const bool behind_only = p.first <= p.begin + 2 && random->Below(4) != 0;
  const double drop = 0.4 * random->Unit();
  const std::string title = p.Title();
  bool titled = title.empty() || random->Below(3) == 0;
  for (size_t i = p.begin; i < p.beyond; ++i) {
    if (i >= p.first && i <= p.last) {
      // A name that the text goes on from needs no title.
      if (behind_only) titled = titled || random->Below(2) == 0;
      continue;
    }
    if (i < p.first && behind_only) continue;
    const std::string word = p.At(i);
    if (i + 1 == p.first && IsOneOf(word, {"in", "at", "on", "near"}) && random->Below(4) != 0) {
      continue;
    }
    if (!title.empty() && i == p.begin &&
        IsOneOf(word, {"He", "She", "It", "They", "His", "Her"})) {
      if (!titled) asked.push_back(title);
      titled = true;
      continue;
    }
    if (random->Unit() >= drop) asked.emplace_back(word);
  }
  if (!titled) {
    // Behind the asking word, as a subject, or at the end.
    const bool at_end = random->Below(3) == 0;
    asked.insert(at_end ? asked.end() : asked.begin() + 1, title);
  }
  return asked.size() < kFewestAsked ? "" : absl::StrJoin(asked, " ");
}

// The words in their order, "what" in the place of the answer.
std::string AskInPlace(const Place& p, Random* random) {
  const double drop = 0.6 * random->Unit();
  std::vector<std::string> asked;
  for (size_t i = p.begin; i < p.beyond; ++i) {
    if (i == p.first) asked.emplace_back("what");
    if (i >= p.first && i <= p.last) continue;
    if (random->Unit() >= drop) asked.emplace_back(p.At(i));
  }
  if (asked.size() < kFewestAsked) return "";
  // Often with the title, as questions name what they are about.
  const std::string title = p.Title();
  if (!title.empty() && random->Below(2) == 0) asked.insert(asked.begin(), title + ":");
  return absl::StrJoin(asked, " ");
}

}  // namespace

Cloze TryCloze(const CutReference& reference, Random* random) {
  const std::string& text = reference.text;
  const std::vector<Word> words = WordsOf(text);
  if (words.size() < 12) return {};
  Place p = {text, text.size() - (reference.end - reference.begin), words, 0, 0, 0, 0};
  if (!DrawSpan(&p, random)) return {};
  Cloze cloze;
  cloze.answer = text.substr(words[p.first].begin, words[p.last].end - words[p.first].begin);
  if (text.find(cloze.answer) != words[p.first].begin ||
      text.find(cloze.answer, words[p.last].end) != std::string::npos) {
    return {};
  }
  const bool form = random->Below(2) == 0;
  // The sentence, or with "what" in place the words around it.
  p.begin = p.first;
  while (p.begin > 0 && p.first - p.begin < kContext && words[p.begin - 1].begin >= p.body &&
         !(form && EndsSentence(p, p.begin - 1))) {
    p.begin -= 1;
  }
  p.beyond = p.last + 1;
  while (p.beyond < words.size() && p.beyond - p.last <= kContext &&
         !(form && EndsSentence(p, p.beyond - 1))) {
    p.beyond += 1;
  }
  std::string question = form ? AskInQuestionForm(p, random) : AskInPlace(p, random);
  if (question.empty() || question.find(cloze.answer) != std::string::npos) return {};
  // As people write.
  if (form && random->Below(4) == 0) {
    absl::AsciiStrToLower(&question);
  } else if (form && random->Below(4) != 0) {
    question[0] = absl::ascii_toupper(question[0]);
  }
  cloze.question = question + "?";
  return cloze;
}

}  // namespace memory3
