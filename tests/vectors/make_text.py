"""Vectors of the tokenizer: CLIP's byte-level BPE from its definition, without a library, on fifty awkward texts."""

import json
import unicodedata

import numpy as np

from cases import HERE, Case, File

FOLDER = "../../weights/tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = {
    "words": [
        "", "a photo of a cat", "A PHOTO of a Cat", "a cat, a dog; a fish. really?!", "cat's dog'll I'm we've",
        "DON'T WE'VE THEY'RE he'd", "''s'd", "rock'n'roll o'clock", "x-ray co-op a_b_c",
        "it\u2019s \u201ccurly\u201d \u2018quotes\u2019"],
    "accents": [
        "caf\xe9 na\xefve \xc5ngstr\xf6m", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
        "\u1e9b\u0323 s\u0323\u0307", "\u212b \xc5 A\u030a", "\u0301 alone", "\ufb01sh \ufb00 \u01c4",
        "\xdf \u1e9e \u0130stanbul \u0131i", "\u039f\u0394\u039f\u03a3 \u03bf\u03b4\u03bf\u03c2", "sch\xc3\xb6n",
        "soft\xadhyphen"],
    "scripts": [
        "\u041f\u0420\u0418\u0412\u0415\u0422 \u043c\u0438\u0440", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
        "\u30ab\u3099 \u30ac", "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab", "\u4e2d\u6587\uff0c\u6807\u70b9\u3002",
        "\U00020bb7\u91ce\u5bb6 \U00010348",
        "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
        "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0e19\u0e49\u0e33",
        "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd"],
    "signs": [
        "\U0001f600\U0001f600", "\U0001f469\u200d\U0001f467", "\u2764\ufe0f \u2603\u2602", "1234567890 3.14159 1,000",
        "\xbd \xb2 \u2167 \u0663\u0664 \u4e94", "!!!!!! ... ?!?! ---", "(((word:1.3))) [a|b] {x}",
        '<tag attr="1"> &amp; &lt;b&gt;', "https://a.b/c?d=e&f#g user@example.org",
        "$5 \xa35 \u20ac5 \xa9 \u2122 \xb0"],
    "space and length": [
        "   \t ", "  a \n b\r\n", "a\xa0b\u3000c\u2009d\u2028e", "a\u200bb\u200cc\ufeffd", "a\x00b\x1cc\x7fd",
        "x" * 300, "a " * 100, f"a {END} b", "<|ENDOFTEXT|> </w> cat</w>", "red apple " * 37 + "extraordinarily"],
}


def kind(c):
    """Space, letter, number or other, as Unicode says; four control characters are no space there."""
    if c.isspace() and c not in "\x1c\x1d\x1e\x1f":
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(c)[0], "other")


def words(text):
    """Contractions, runs of letters, single digits, runs of the rest; space only separates."""
    found, i = [], 0
    while i < len(text):
        end = i + next((len(s) for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s, i)), 0)
        if end == i:
            end += 1
            while kind(text[i]) in ("letter", "other") and end < len(text) and kind(text[end]) == kind(text[i]):
                end += 1
        if kind(text[i]) != "space":
            found.append(text[i:end])
        i = end
    return found


class BPE:
    def __init__(self):
        self.ids = json.loads((HERE / FOLDER / "vocab.json").read_text(encoding="utf-8"))
        lines = (HERE / FOLDER / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
        self.rank = {tuple(line.split(" ")): i for i, line in enumerate(lines) if line}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in shown]
        self.letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def pieces(self, word):
        parts = [self.letter[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while True:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(parts, parts[1:])]
            if not ranks or min(ranks) == len(self.rank):
                return parts
            pair, joined = (parts[ranks.index(min(ranks))], parts[ranks.index(min(ranks)) + 1]), []
            while parts:
                n = 2 if tuple(parts[:2]) == pair else 1
                joined, parts = joined + ["".join(parts[:n])], parts[n:]
            parts = joined

    def content(self, text, lower=True, form="NFC"):
        if END in text:  # the special tokens are cut out before anything else
            before, after = text.split(END, 1)
            return [*self.content(before, lower, form), self.ids[END], *self.content(after, lower, form)]
        text = unicodedata.normalize(form, text) if form else text
        text = "".join(c.lower() for c in text) if lower else text
        return [self.ids[piece] for word in words(text) for piece in self.pieces(word)]

    def row(self, text, pad=None, keep=75, **options):
        ids = [self.ids[START], *self.content(text, **options)[:keep]]
        ids = (ids + [self.ids[END]])[:77]
        return ids + [self.ids[END] if pad is None else pad] * (77 - len(ids))


def cases():
    bpe = BPE()
    for group, texts in TEXTS.items():
        table = lambda **options: np.array([bpe.row(text, **options) for text in texts], np.int32)
        right = table()
        mistakes = {"prompts are padded with token 0, Stable Diffusion 1 was trained with the end token": table(pad=0),
                    "truncation loses the end token": table(keep=76), "case is kept": table(lower=False),
                    "the text is not brought to NFC": table(form=None),
                    "the text is brought to NFKC": table(form="NFKC")}
        mistakes = {what: wrong for what, wrong in mistakes.items() if not np.array_equal(wrong, right)}
        yield Case("tokenize", group, dict(texts=texts, vocab=File(f"{FOLDER}/vocab.json"),
                                           merges=File(f"{FOLDER}/merges.txt")), right, 0, mistakes)
