"""Makes embedder/testdata/{bert_small,bert_cased,xlmr_small}: small random BERT and XLM-RoBERTa
directories as transformers saves them, each with the token ids and the vectors that transformers
computes for texts.json.

    python tests/goldens/bert_vectors.py                (packages: tests/goldens/requirements.txt)
    python tests/goldens/bert_vectors.py --real DIR     (all-MiniLM-L6-v2; writes minilm_expected.json)

expected.json: {"ids": [[...]...], "vectors": [[...]...]}, L2-normalised, f32, one text at a time, so
that no padding is involved. bert_small pools by mean, bert_cased and xlmr_small by the first token.
"""

import gzip
import json
import pathlib
import shutil
import sys
import tempfile

import sentencepiece
import torch
from transformers import (AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast,
                          XLMRobertaConfig, XLMRobertaModel)

OUT = pathlib.Path(__file__).resolve().parents[2] / "embedder" / "testdata"

TEXTS = [
    "The harbour lies north of the old town.",
    "a",
    "",
    "   \t\n ",
    "Gulls, terns and cormorants nest on the cliffs; nobody counts them (yet)!",
    "Übergröße naïve café façade Ångström Čapek ŁÓDŹ İstanbul",
    "Ωμέγα Ελλάδα ΣΊΣΥΦΟΣ — Москва, Ёлка, Йод",
    "東京は日本の首都です。 北京 한국어 가각",
    "e\u0301 combining, soft\u00adhyphen, zero\u200bwidth, bell\u0007bell, tab\there\x0bthere",
    "ﬁne ligatures, ½ ² ℃ Ｆｕｌｌｗｉｄｔｈ",
    "emoji 🙂 and 👩‍🚀, math 𝒳 ∑ ≠ $5 ^_^ a+b=c <tag> `code` ~tilde|",
    "don't can't it's O'Brien — “quoted” …",
    "1234567890 3.14159 1,000,000 v2.0-rc1",
    "x" * 120 + " after",
    "unaffordable harbours harbourmaster townships overcounting",
    "The lighthouse keeper wrote down the weather each morning. " * 12,
]

# The project's own sentences, to learn small vocabularies from.
CORPUS = [
    "The harbour lies north of the old town, where gulls and terns nest on the cliffs.",
    "Nobody counts the cormorants; the lighthouse keeper wrote down the weather each morning.",
    "A township of fishermen repaired nets, boats and walls before the storm came in.",
    "Harbourmasters overcounted the ships and undercounted the barrels of salted herring.",
    "An unaffordable ticket, a naïve traveller, a café on the quay and a façade of glass.",
    "Numbers such as 3, 14, 159 and 2024 appear in tables; versions look like v2 or rc1.",
    "Москва и ёлка, Ελλάδα και Ωμέγα, 東京 日本 首都 北京, 한국어.",
    "It's said that one can't see the island, but don't believe it: look at the map.",
]


def randomise(model, seed):
    """Weights large enough for peaked attention and gains away from 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        z = torch.randn(p.shape, generator=generator)
        if name.endswith("LayerNorm.weight"):
            p.data = 1 + 0.3 * z
        elif name.endswith("bias"):
            p.data = 0.2 * z
        elif "embeddings" in name:
            p.data = 0.5 * z
        elif "query" in name or "key" in name:
            p.data = z * 1.5 / p.shape[1] ** 0.5
        else:
            p.data = z * 1.2 / p.shape[1] ** 0.5


def vectors(model, tokenizer, pooling, max_tokens):
    model.eval()
    ids_out, vectors_out = [], []
    for text in TEXTS:
        encoded = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state[0]
        v = hidden[0] if pooling == "cls" else hidden.mean(0)
        v = v / v.norm()
        ids_out.append(encoded["input_ids"][0].tolist())
        vectors_out.append([round(float(x), 7) for x in v])
    return {"ids": ids_out, "vectors": vectors_out}


def save_pooling(directory, pooling, width):
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }, indent=2))


def word_pieces(lower):
    """A WordPiece vocabulary: letters, their continuations, and the commoner fragments of CORPUS."""
    from tokenizers import BertWordPieceTokenizer
    trainer = BertWordPieceTokenizer(lowercase=lower)
    trainer.train_from_iterator(CORPUS, vocab_size=300, min_frequency=1, show_progress=False)
    vocab = trainer.get_vocab()
    return [t for t, _ in sorted(vocab.items(), key=lambda kv: kv[1])]


def bert(name, lower, pooling, seed, keep_tokenizer_json):
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    pieces = word_pieces(lower)
    (directory / "vocab.txt").write_text("".join(p + "\n" for p in pieces))
    tokenizer = BertTokenizerFast.from_pretrained(str(directory), do_lower_case=lower)
    config = BertConfig(vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=48)
    model = BertModel(config, add_pooling_layer=False)
    randomise(model, seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "vocab.txt").write_text("".join(p + "\n" for p in pieces))
    save_pooling(directory, pooling, 32)
    expected = vectors(model, tokenizer, pooling, 48)
    if not keep_tokenizer_json:
        (directory / "tokenizer.json").unlink()
    (directory / "expected.json").write_text(json.dumps(expected))


def xlmr():
    directory = OUT / "xlmr_small"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        corpus = pathlib.Path(work) / "corpus.txt"
        corpus.write_text("\n".join(CORPUS))
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{work}/sp", model_type="unigram", vocab_size=220,
            normalization_rule_name="nmt_nfkc", character_coverage=1.0, hard_vocab_limit=False)
        shutil.copy(f"{work}/sp.model", directory / "sentencepiece.bpe.model")
    tokenizer = AutoTokenizer.from_pretrained(str(directory), tokenizer_type="xlm-roberta")
    config = XLMRobertaConfig(vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2,
                              num_attention_heads=3, intermediate_size=40, max_position_embeddings=50,
                              type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
                              layer_norm_eps=1e-5)
    model = XLMRobertaModel(config, add_pooling_layer=False)
    randomise(model, 3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # The same tokenizer in its other form, compressed: most of it is the normaliser's table.
    (directory / "tokenizer.json.gz").write_bytes(
        gzip.compress((directory / "tokenizer.json").read_bytes(), 9, mtime=0))
    (directory / "tokenizer.json").unlink()
    save_pooling(directory, "cls", 24)
    (directory / "expected.json").write_text(json.dumps(vectors(model, tokenizer, "cls", 48)))


def real(path):
    expected = vectors(AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path), "mean", 256)
    (OUT / "minilm_expected.json").write_text(json.dumps(expected))


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--real":
        real(sys.argv[2])
    else:
        bert("bert_small", True, "mean", 1, True)
        bert("bert_cased", False, "cls", 2, False)
        xlmr()
    (OUT / "texts.json").write_text(json.dumps(TEXTS, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
