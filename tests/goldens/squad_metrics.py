#!/usr/bin/env python3
"""Writes trainer/testdata/squad_metrics.json: answers normalised and marked by the functions of SQuAD's
official script (evaluate-v2.0.py), over strings put together from awkward pieces.

  squad_metrics.py trainer/testdata/squad_metrics.json
"""

import collections
import json
import random
import re
import string
import sys


def normalize_answer(s):
    def remove_articles(text):
        regex = re.compile(r"\b(a|an|the)\b", re.UNICODE)
        return re.sub(regex, " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text):
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def get_tokens(s):
    return normalize_answer(s).split() if s else []


def compute_exact(a_gold, a_pred):
    return int(normalize_answer(a_gold) == normalize_answer(a_pred))


def compute_f1(a_gold, a_pred):
    gold_toks = get_tokens(a_gold)
    pred_toks = get_tokens(a_pred)
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


PIECES = [
    "The", "a", "an", "AN", "the", "Paris", "é", "È", "1,000", "U.S.", "a-b", "the-", "–", "“the”", "x",
    "\u00a0", "\t", " ", "  ", "_a", "a_", "£5", "o'clock", "(the)", "日本", "%", "°", "Athens", "y",
]


def main():
    random.seed(1)

    def text():
        return "".join(random.choice(PIECES) + random.choice(["", " "]) for _ in range(random.randint(0, 7)))

    rows = []
    for i in range(200):
        answer = text()
        gold = text() if i % 2 else answer.upper() + random.choice(["", " Paris", "."])
        rows.append(
            {
                "answer": answer,
                "gold": gold,
                "normalized": normalize_answer(answer),
                "exact": compute_exact(gold, answer),
                "f1": compute_f1(gold, answer),
            }
        )
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=0)
        file.write("\n")


if __name__ == "__main__":
    main()
