"""CLIP's byte-level BPE, assembled from vocab.json and merges.txt with the `tokenizers` library.

Two things OpenAI's first tokenizer did before this are not done here (nor by transformers' fast one): repairing
mojibake with ftfy, and unescaping HTML entities.
"""

import json
from pathlib import Path

import torch
from tokenizers import Encoding, Regex, Tokenizer as BPETokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from ..common.problem import Problem

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Text -> ids (B, max_tokens): start, words, end, then padding with the end token, as SD1.x was trained."""

    def __init__(self, vocab: Path, merges: Path, max_tokens: int = 77):
        try:
            ids, pairs = _read_both(Path(vocab)) if vocab == merges else _read(Path(vocab), Path(merges))
            if len(pairs) < len(ids) - 514:  # all but the 2 x 256 bytes and the 2 special tokens come from merges
                raise ValueError(f"{len(pairs)} merges for {len(ids)} tokens")
            self._bpe = _clip_bpe(ids, pairs)
            self.start_id, self.end_id = ids[START], ids[END]
        except OSError as error:
            raise Problem(f"{error.filename}: cannot read the tokenizer ({error.strerror})") from None
        except Exception as error:  # the Rust side raises plain Exception
            reason = str(error).partition("\n")[0]
            raise Problem(f"{vocab}, {merges}: not a CLIP vocabulary ({reason}); copy both again") from None
        self.max_tokens = max_tokens

    @classmethod
    def from_folder(cls, folder: Path, max_tokens: int) -> "Tokenizer":
        """From vocab.json and merges.txt, or from tokenizer.json, where transformers 5 saves both."""
        folder = Path(folder)
        both = folder / "tokenizer.json"
        if both.is_file() and not (folder / "vocab.json").exists():
            return cls(both, both, max_tokens)
        return cls(folder / "vocab.json", folder / "merges.txt", max_tokens)

    def __call__(self, texts: list[str]) -> Tensor:
        rows = []
        for text in texts:
            words = self._encode(text).ids[: self.max_tokens - 2]
            row = [self.start_id, *words, self.end_id]
            rows.append(row + [self.end_id] * (self.max_tokens - len(row)))
        return torch.tensor(rows)

    def cut(self, text: str) -> str:
        """The tail of `text` that does not fit into max_tokens; empty when all of it does."""
        encoded = self._encode(text)
        room = self.max_tokens - 2
        return text[encoded.offsets[room][0]:].strip() if len(encoded.ids) > room else ""

    def pieces(self, text: str) -> list[str]:
        """The tokens of `text` as strings, in the order of the context's rows 1, 2, ... (row 0 is the start)."""
        return self._encode(text).tokens[: self.max_tokens - 2]

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of `text`, each with the context's rows that hold its tokens."""
        encoded = self._encode(text)
        rows: dict[int | None, list[int]] = {}
        for i, word in enumerate(encoded.word_ids[: self.max_tokens - 2]):
            rows.setdefault(word, []).append(i)
        span = lambda at: text[encoded.offsets[at[0]][0]: encoded.offsets[at[-1]][1]]
        return [(span(at), [i + 1 for i in at]) for at in rows.values()]

    def _encode(self, text: str) -> Encoding:
        try:
            return self._bpe.encode(text, add_special_tokens=False)
        except TypeError:  # half of a surrogate pair: an argument in another encoding than the terminal's
            raise Problem(f"prompt {text!r} is not Unicode text; type it again in UTF-8") from None


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would never end
        raise ValueError(f"{path.name} is no regular file")
    return path.read_text(encoding="utf-8")


def _read(vocab: Path, merges: Path) -> tuple[dict[str, int], list[tuple]]:
    lines = _text(merges).splitlines()
    return json.loads(_text(vocab)), [tuple(line.split(" ")) for line in lines
                                      if line and not line.startswith("#version")]


def _read_both(path: Path) -> tuple[dict[str, int], list[tuple]]:
    model = json.loads(_text(path))["model"]
    if model.get("end_of_word_suffix") != "</w>":
        raise ValueError("words in it do not end in </w>")
    return model["vocab"], [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _clip_bpe(ids: dict[str, int], pairs: list[tuple[str, str]]) -> BPETokenizer:
    bpe = BPETokenizer(models.BPE(ids, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>",
                                  fuse_unk=False, unk_token=END))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens([START, END])
    return bpe
