"""The tokenizer against two oracles: transformers' CLIPTokenizer (the same Rust library, other wiring) and a plain
Python byte-level BPE written here from the algorithm's definition (no library, no regular expressions)."""

import gzip
import hashlib
import json
import re
import random
import subprocess
import sys
import unicodedata
from functools import lru_cache

import pytest
from conftest import DEMO, ROOT
from hypothesis import given, settings, strategies as st
from transformers import CLIPTokenizerFast

from isadca.common.problem import Problem
from isadca.networks.tokenizer import END, START, Tokenizer

FOLDERS = {"clip": ROOT / "weights" / "tokenizer", "demo": DEMO / "tokenizer"}
TOKENS = {"clip": 77, "demo": 32}
SHA256 = {"vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
          "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"}

FRAGMENTS = [
    "", " ", "   \t ", "\n", "a photo of a cat", "A PHOTO of a Cat", "a cat, a dog; a fish. really?!",
    "cat's dog'll I'm", "DON'T WE'VE THEY'RE he'd", "'s", "''s'd", "!!!'s", "rock'n'roll o'clock",
    "it’s “curly” ‘quotes’", "x-ray co-op", "café naïve Ångström", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "\u1e9b\u0323 s\u0323\u0307", "\u212b \u00c5 A\u030a", "e\u0301\u0302\u0303\u0304", "\u0301 alone", "ﬁsh ﬀ Ǆ ǅ",
    "ß ẞ İstanbul ıi", "ΟΔΟΣ οδος Σ", "ПРИВЕТ мир", "Ελληνικά", "日本語のテキスト", "猫 と 犬", "カ\u3099 ガ ｶﾞ",
    "한국어 \u1112\u1161\u11ab", "中文，標點。", "𠮷野家 𐍈 𝔘𝔫𝔦", "العربية مُحَمَّد", "שָׁלוֹם", "हिन्दी क्षि", "ภาษาไทย น้ำ",
    "தமிழ்", "ქართული", "አማርኛ", "😀", "😀😀😀", "👩\u200d👩\u200d👧\u200d👦", "👍🏽", "🏳️\u200d🌈", "🇫🇷🇯🇵", "❤️ ❤", "1️⃣2️⃣",
    "☃☂★", "1234567890", "3.14159", "1,000,000", "2nd 3D 4k", "½ ² Ⅷ ٣٤ 五", "0x1F a1b2c3", "!!!!!!", "...", "?!?!",
    "--- *** ###", "(((word:1.3)))", "[a|b]", "{x}", "<tag attr=\"1\">", "\\n \\t", "a_b_c", "user@example.org",
    "https://a.b/c?d=e&f#g", "$5 £5 €5 ¥5", "© ® ™ ° ±", "~`^|", "a\tb\nc\r\nd\fe\vf",
    "a\u00a0b\u202fc\u3000d\u2009e\u2028f\u2029g\u1680h\u0085i", "a\u200bb\u200cc\u200dd\ufeffe\u2060f",
    "soft\u00adhyphen", "a\x00b\x01c\x1bd\x7fe", "a\x1cb\x1dc\x1ed\x1ff", "\u202eright\u202c",
    "\ufffd \uffff \ue000", "\U0010ffff", "&amp; &lt;b&gt; &#39;", "schÃ¶n", "x" * 600, "supercalifragilistic" * 20,
    "ab" * 3, "a " * 200, "a yellow striped sunflower and a red apple on a checkered background", START, END,
    f"a {END} b", f"x{START}y", f"{END}{END}", "<|ENDOFTEXT|>", "< |endoftext| >", "<|endoftext|", "</w>",
    "cat</w>", "Ġcat", "[UNK] [PAD] <unk>",
]


def awkward() -> list[str]:
    """The fragments, and 250 strings of 2 to 5 fragments or characters of them, glued with and without a space."""
    rng, texts = random.Random(0), list(FRAGMENTS)
    for _ in range(250):
        some = [rng.choice(FRAGMENTS) for _ in range(rng.randint(2, 5))]
        some = [rng.choice(s) if s and rng.random() < 0.4 else s[:40] for s in some]
        texts.append(rng.choice(["", " "]).join(some))
    return texts


class Oracle:
    """CLIP's byte-level BPE as it is defined: special tokens, NFC, lower case, words, bytes, merges by rank."""

    def __init__(self, folder):
        self.ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        self.rank = {tuple(line.split()): i for i, line in enumerate(lines)}
        printable = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]  # these stand for themselves
        rest = [b for b in range(256) if b not in printable]
        self.byte = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}

    def __call__(self, text: str) -> list[int]:
        for special in (START, END):  # these are cut out before anything else happens
            if special in text:
                before, _, after = text.partition(special)
                return self(before) + [self.ids[special]] + self(after)
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))  # by character: no final sigma
        return [self.ids[piece] for word in words(text) for piece in self.pieces(word)]

    def pieces(self, word: str) -> list[str]:
        parts = [self.byte[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while pairs := set(zip(parts, parts[1:])) & self.rank.keys():
            best, merged = min(pairs, key=self.rank.get), []
            while parts:
                n = 2 if tuple(parts[:2]) == best else 1
                merged, parts = merged + ["".join(parts[:n])], parts[n:]
            parts = merged
        return parts


def kind(c: str) -> str:
    if c.isspace() and c not in "\x1c\x1d\x1e\x1f":  # Python calls these four separators space, Unicode does not
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(c)[0], "other")


def words(text: str):
    """Contractions, runs of letters, single digits, runs of anything else; space only separates."""
    i = 0
    while i < len(text):
        found = next((s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s, i)), text[i])
        end = i + len(found)
        if len(found) == 1 and kind(found) in ("letter", "other"):
            while end < len(text) and kind(text[end]) == kind(found):
                end += 1
        if kind(text[i]) != "space":
            yield text[i:end]
        i = end


@lru_cache
def ours(name) -> Tokenizer:
    return Tokenizer.from_folder(FOLDERS[name], TOKENS[name])


@lru_cache
def theirs(name):
    return CLIPTokenizerFast.from_pretrained(FOLDERS[name], local_files_only=True)


@lru_cache
def oracle(name) -> Oracle:
    return Oracle(FOLDERS[name])


def padded(ids: list[int], name: str) -> list[int]:
    """Start, at most max_tokens - 2 words, end, and the end token as padding."""
    room, vocab = TOKENS[name] - 2, oracle(name).ids
    return [vocab[START], *ids[:room], *[vocab[END]] * (1 + room - len(ids[:room]))]


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_transformers_and_the_definition(name):
    texts = awkward()
    got = ours(name)(texts).tolist()
    hf = theirs(name)(texts, padding="max_length", truncation=True, max_length=TOKENS[name])["input_ids"]
    for text, a, b in zip(texts, got, hf):
        assert a == b == padded(oracle(name)(text), name), repr(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_ids_equal_transformers_on_any_unicode(text):
    """Characters newer than a Unicode table differ between tables, so the definition written here stays out."""
    hf = theirs("clip")(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert ours("clip")([text])[0].tolist() == hf


def test_the_known_sentence():
    ids = ours("clip")(["a photo of a cat"])
    assert ids.shape == (1, 77) and ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert (ids[0, 6:] == 49407).all(), "SD1.x pads with the end token"


@pytest.mark.parametrize("text, openai_reads, why", [
    ("&lt;b&gt; fish &amp;amp; chips", "<b> fish & chips", "html.unescape, twice"),
    ("ﬁsh", "fish", "ftfy: ligatures"),
    ("it’s a “cat”", 'it\'s a "cat"', "ftfy: curly quotes"),
    ("schÃ¶n", "schön", "ftfy: mojibake"),
    ("ＣＡＴ", "cat", "ftfy: full-width letters"),
    ("a\x1bb\x1c", "ab", "ftfy: control characters"),
    ("a\ufeffb", "ab", "ftfy: byte order marks"),
    ("ΟΔΟΣ", "οδος", "Python lower-cases a final sigma by its context, transformers by the character"),
    ("<|ENDOFTEXT|>", END, "OpenAI looks for special tokens after lower-casing, transformers before"),
])
def test_known_differences_from_openais_first_tokenizer(text, openai_reads, why):
    """It cleaned the text before the BPE: to it, `text` was `openai_reads`. Here it is what it is in transformers'
    tokenizer, which is what Stable Diffusion pipelines run."""
    got = ours("clip")([text])[0].tolist()
    assert got != ours("clip")([openai_reads])[0].tolist(), why
    assert got == theirs("clip")(text, padding="max_length", max_length=77)["input_ids"]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("extra", [-1, 0, 1, 2, 40])
def test_cut_is_the_tail_that_is_not_used(name, extra):
    """One token more than fits is one word cut; exactly as many as fit, none."""
    room = TOKENS[name] - 2
    text = "the  \t".join(["red "] * (room // 2)) + " apple" * (room + extra - 2 * (room // 2) + 1)
    assert len(oracle(name)(text)) == room + extra
    assert ours(name).cut(text) == " ".join(["apple"] * max(extra, 0))


def test_cut_starts_at_the_first_character_that_is_not_wholly_used():
    """Inside a word, and inside the bytes of one character; after accents that compose and space that collapses."""
    a = "e\u0301 \t" * 74  # 74 tokens, 296 characters
    assert ours("clip").cut(a + "supercalifragilisticexpialidocious ") == "califragilisticexpialidocious"
    assert len(oracle("clip")("𐍈")) > 1 and ours("clip").cut(a + "𐍈 x") == "𐍈 x"
    each = len(oracle("clip")("İ"))  # lower case makes two characters of it
    assert each > 1 and ours("clip").cut("İ " * 100).split() == ["İ"] * (100 - 75 // each)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_used_head_and_the_cut_tail_make_the_text(name):
    for text in awkward():
        tail = ours(name).cut(text)
        assert text.rstrip().endswith(tail)
        assert bool(tail) == (len(oracle(name)(text)) > TOKENS[name] - 2), repr(text)


@pytest.mark.parametrize("name", FOLDERS)
def test_words_hold_every_row_once_and_in_order(name):
    for text in awkward():
        rows = [row for _, rows in ours(name).words(text) for row in rows]
        assert rows == list(range(1, 1 + min(len(oracle(name)(text)), TOKENS[name] - 2))), repr(text)


def test_words_are_the_texts_own():
    text = "Ein  Löwe, it's 🦁"
    words = ours("demo").words(text)
    assert [word for word, _ in words] == ["Ein", "Löwe", ",", "it", "'s", "🦁"]
    ids = ours("demo")([text])[0]
    assert ids[words[4][1]].tolist() == [oracle("demo").ids[piece] for piece in ("'", "s</w>")]


def test_rows_do_not_depend_on_each_other():
    texts = awkward()[:40]
    assert ours("clip")(texts).tolist() == [ours("clip")([t])[0].tolist() for t in texts]


@pytest.mark.parametrize("text", ["\ud800", "a \udcff cat", None])
def test_what_is_not_unicode_is_a_problem(text):
    """An argument in Latin-1 reaches Python as lone surrogates."""
    for call in (lambda: ours("demo")([text]), lambda: ours("demo").cut(text), lambda: ours("demo").words(text)):
        with pytest.raises(Problem, match="prompt .* is not Unicode") as problem:
            call()
        str(problem.value).encode("utf-8")  # can be printed


VOCAB, MERGES = [(FOLDERS["demo"] / name).read_text(encoding="utf-8") for name in SHA256]


@pytest.mark.parametrize("vocab, merges, says", [
    (None, MERGES, "vocab.json: cannot read"),
    (VOCAB, None, "merges.txt: cannot read"),
    (VOCAB[:-100], MERGES, "not a CLIP vocabulary"),
    ("<html>", MERGES, "not a CLIP vocabulary"),
    ("[1, 2]", MERGES, "not a CLIP vocabulary"),
    ("null", MERGES, "not a CLIP vocabulary"),
    (VOCAB.replace(": 5,", ": 5.5,"), MERGES, "not a CLIP vocabulary"),
    (VOCAB.replace(START, "<s>"), MERGES, "startoftext"),
    (VOCAB, MERGES + "q zz\n", "out of vocabulary"),
    (VOCAB, MERGES + "a b c\n", "not a CLIP vocabulary"),
    (VOCAB, MERGES[: len(MERGES) // 2], "merges for 745 tokens"),
    (VOCAB, "", "0 merges"),
    (VOCAB, b"\xff\xfe\x00", "utf-8"),
    (VOCAB.replace('"lemon</w>": ', '"lemon</w>": 1000'), MERGES, "the ids of its 745 tokens are not 0 to 744"),
    (re.sub('"lemon</w>": [0-9]+', '"lemon</w>": 700', VOCAB), MERGES, "are not 0 to 744"),  # another token's
])
def test_broken_files_are_one_line(tmp_path, vocab, merges, says):
    for name, text in (("vocab.json", vocab), ("merges.txt", merges)):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(Problem, match=says) as problem:
        Tokenizer.from_folder(tmp_path, 77)
    assert "\n" not in str(problem.value) and str(tmp_path) in str(problem.value)


def test_windows_line_ends_do_no_harm(tmp_path):
    (tmp_path / "vocab.json").write_text(VOCAB, encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes(MERGES.replace("\n", "\r\n").encode("utf-8"))
    assert Tokenizer.from_folder(tmp_path, 32)(FRAGMENTS).equal(ours("demo")(FRAGMENTS))


def test_the_shipped_vocabulary_is_clips():
    for name, sha in SHA256.items():
        assert hashlib.sha256((FOLDERS["clip"] / name).read_bytes()).hexdigest() == sha
    assert "MIT License" in (licence := (FOLDERS["clip"] / "LICENSE").read_text()) and "2021 OpenAI" in licence


def test_the_build_script_makes_the_shipped_files(tmp_path):
    """From a list like OpenAI's: a version line, the merges, and many more merges that CLIP does not use."""
    merges = (FOLDERS["clip"] / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    source = tmp_path / "list.txt.gz"
    source.write_bytes(gzip.compress("\n".join(["version", *merges, "unused merge", ""]).encode("utf-8")))
    script = ROOT / "examples" / "train_demo" / "build_tokenizer.py"
    subprocess.run([sys.executable, script, source, tmp_path / "out"], check=True, capture_output=True)
    for name, sha in SHA256.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == sha
