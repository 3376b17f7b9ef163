// Questions made of a text itself: a name, a number or a word that stands once in a reference is
// asked for by the words around it. They teach to find a place by its words and to copy what stands
// there. Half have the words in their order with "what" in the answer's place, half the form of
// people's questions: the word that asks ("who", "when", "where", …, by the kind of answer and the
// word before it) first, then what the sentence says besides; of "discovered by NAME" it makes "Who
// discovered TITLE?".
//
// Thread-safety: pure functions.
#pragma once

#include <string>

#include "trainer/random.h"
#include "trainer/references.h"

namespace memory3 {

struct Cloze {
  std::string question, answer;  // the answer stands once in the reference, not in the question
};

// One try at a random place; an empty question where that gives none (about two in three do so).
Cloze TryCloze(const CutReference& reference, Random* random);

}  // namespace memory3
