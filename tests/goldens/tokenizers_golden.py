"""Makes the tokenizers' fixtures under transformer/testdata/: small tokenizers trained on the text
below (bpe_*/tokenizer.json, spm_tiny/tokenizer.model), and tokenizers.json with the ids and texts that
the real libraries (tokenizers, sentencepiece) give for them.

    python tests/goldens/tokenizers_golden.py [SHARED_DATA]     (packages: tests/goldens/requirements.txt)

With SHARED_DATA (default ../shared/data) the ids of the two SentencePiece models there are stored as
well; the models themselves are not.
"""

import io
import json
import pathlib
import random
import sys

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "transformer" / "testdata"
SHARED = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "../shared/data")

CORPUS = """The harbour master keeps a ledger of every ship that enters the bay. On Monday 14 vessels came in,
on Tuesday only 9; by the end of 2019 the count had passed 3,650. She doesn't trust the radio, and she'll
tell you so: "I've seen what happens when it's wrong." The tide tables hang beside the window.

A reference is a short piece of text. The model reads it once, keeps what matters and forgets the rest.
When a question comes, the memories that fit are fetched and attended to. Nothing is pasted into the prompt.

def count(words):
    total = {}
    for word in words:
        total[word] = total.get(word, 0) + 1
    return total

Der Hafen schläft, die Möwen nicht. Größe, Straße, Übermut. Le café est fermé jusqu'à midi, peut-être
plus tard. El niño corrió por la playa. Корабль вошёл в гавань утром. 港に船が入った。船長は海を見ていた。
배가 항구에 들어왔다. जहाज बंदरगाह में आया। السفينة في الميناء. Total: 100% of 25 kg at 3.50 each = 87.50!
""" * 3

TEXTS = [
    "", " ", "  ", "a", " a", "a ", "Hello world", "Hello, world!", "  two leading", "trailing two  ",
    "a\nb", "a\n\nb", "\n", "\n\n\n", " \n", "\n ", "a \n b", "\r\n", "a\r\nb\r\n\r\nc", "\t", "\ttab\t\ttabs", "a\x0bb\x0cc",
    "one  two   three    four", "x     \n\n     y", "end   ", "   ", "\u00a0nbsp\u00a0", "\u2003em\u3000ideographic\u2028line",
    "it's I've you're he'd we'll I'm can't", "IT'S I'VE YOU'RE HE'D WE'LL I'M CAN'T", "'s't're've'm'll'd", "rock 'n' roll's",
    "it\u2019s", "'\u017ftrange", "x'\u017f", "'Tis 'LLama 'Re", "don''t '", "'", "''s",
    "0", "12", "123", "1234", "12345678901", "3.14159", "1,000,000", "2nd 3rd", "v2.0.1-rc3", "\u0663\u0664\u0665 \u00b2\u00bd\u2166", "a1b22c333d4444",
    "foo_bar fooBar foo-bar", "!!!", "...", "?!?!\n\n", "a...b", " ...", "({[<>]})", "#include <vector>\nint main() { return 0; }\n",
    "    for word in words:\n        total += 1\n", "http://example.org/a?b=c&d=%20", "me@example.org",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcbermut Stra\u00dfe", "\u041a\u043e\u0440\u0430\u0431\u043b\u044c \u0432\u043e\u0448\u0451\u043b", "\u6e2f\u306b\u8239\u304c\u5165\u3063\u305f\u3002", "\u8239\u9577 is at sea",
    "\ubc30\uac00 \ud56d\uad6c\uc5d0", "\u091c\u0939\u093e\u091c \u092c\u0902\u0926\u0930\u0917\u093e\u0939", "\u0627\u0644\u0633\u0641\u064a\u0646\u0629", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467 family", "\U0001f1e9\U0001f1ea flag", "a\U0001f600b \U0001f44d\U0001f3fd", "\u2603\ufe0f", "\U00020000 \U0001d54f",
    "\ufeffbom", "\u200bzero", "\ufffd", "\u0000nul", "\u007f\u0080", "\u2581 \u2581a", "<s>", "</s> <unk>", "<0x41>", "a<|im_start|>b",
    "<|im_start|>user\nHi<|im_end|>\n", "<|begin_of_text|>x<|end_of_text|>", "<tool>x</tool>", "x <tool> y", "<|im_start|", "<tool><tool>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ab" * 60, " " * 70, "\n" * 40, "the " * 30,
    "Reference:", "The harbour master keeps a ledger.", "She doesn't trust the radio, and she'll\ntell you so.",
]

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


def train_bpe(name, pre, bos, eos, special, ignore_merges, pairs):
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    t.pre_tokenizer = pre
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=420, show_progress=False,
                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens([AddedToken(s, special=True) for s in special])
    t.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=True)])
    t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    path = OUT / name
    path.mkdir(exist_ok=True)
    j = json.loads(t.to_str())
    if ignore_merges:
        # A whole word that no merge makes: only ignore_merges finds it.
        j["model"]["vocab"]["\u0120ledger"] = 417
        j["model"]["vocab"] = {k: v for k, v in sorted(j["model"]["vocab"].items(), key=lambda kv: kv[1])}
        drop = [k for k, v in j["model"]["vocab"].items() if v == 417 and k != "\u0120ledger"]
        for k in drop:
            del j["model"]["vocab"][k]
        j["model"]["merges"] = [m for m in j["model"]["merges"] if "".join(m) not in drop and not set(m) & set(drop)]
    if not pairs:
        j["model"]["merges"] = [" ".join(m) for m in j["model"]["merges"]]
    (path / "tokenizer.json").write_text(json.dumps(j, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": {"content": bos, "special": True} if pairs else bos, "eos_token": eos,
         "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def bpe_goldens(t):
    g = {"vocab_size": t.get_vocab_size(True), "text": [], "parsed": [], "decoded": []}
    t.encode_special_tokens = True
    g["text"] = [t.encode(s, add_special_tokens=False).ids for s in TEXTS]
    t.encode_special_tokens = False
    g["parsed"] = [t.encode(s, add_special_tokens=False).ids for s in TEXTS]
    # Cut and shuffled ids: broken UTF-8, replaced as Rust's from_utf8_lossy does.
    r = random.Random(5)
    for ids in g["parsed"] + [[r.randrange(g["vocab_size"]) for _ in range(12)] for _ in range(40)]:
        for cut in {0, len(ids) // 2}:
            g["decoded"].append({"ids": ids[cut:], "text": t.decode(ids[cut:], skip_special_tokens=True)})
    return g


def spm_goldens(path):
    p = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = [p.encode(s) for s in TEXTS]
    return {"vocab_size": p.get_piece_size(), "bos": p.bos_id(), "eos": p.eos_id(), "text": ids,
            "decoded": [{"ids": i, "text": p.decode(i)} for i in ids],
            "pieces": [p.id_to_piece(i) for i in range(min(300, p.get_piece_size()))]}


def main():
    goldens = {"texts": TEXTS, "bpe": {}, "spm": {}}
    chatml = ["<|im_start|>", "<|im_end|>"]
    llama3 = ["<|begin_of_text|>", "<|end_of_text|>", *chatml]
    for name, args in {
        "bpe_llama3": (split(LLAMA3), llama3[0], llama3[1], llama3, True, True),
        "bpe_qwen2": (split(QWEN2), llama3[0], llama3[1], llama3, False, True),
        "bpe_gpt2": (byte_level(True), "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"], False, False),
        "bpe_digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]),
                       chatml[0], chatml[1], chatml, False, False),
    }.items():
        goldens["bpe"][name] = bpe_goldens(train_bpe(name, *args))

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")), model_writer=model, model_type="bpe", vocab_size=420,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.99, minloglevel=2)
    (OUT / "spm_tiny").mkdir(exist_ok=True)
    (OUT / "spm_tiny" / "tokenizer.model").write_bytes(model.getvalue())
    goldens["spm"]["transformer/testdata/spm_tiny/tokenizer.model"] = spm_goldens(OUT / "spm_tiny" / "tokenizer.model")
    for name in ("fixtures/stories260K/tokenizer.model", "fixtures/tokenizers/llama2.model"):
        goldens["spm"]["MEMORY3_DATA/" + name] = spm_goldens(SHARED / name)
    (OUT / "tokenizers.json").write_text(json.dumps(goldens, ensure_ascii=True, separators=(",", ":")).replace(
        '],"', '],\n"').replace("],[", "],\n[") + "\n")


if __name__ == "__main__":
    main()
