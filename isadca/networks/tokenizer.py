"""CLIP's byte-level BPE, assembled from vocab.json and merges.txt with the `tokenizers` library.

OpenAI's first tokenizer also repaired mojibake with ftfy and unescaped HTML entities. Neither this one nor
transformers' fast one does.
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

    def __init__(self, ids: dict[str, int], merges: list[tuple[str, str]], max_tokens: int):
        if len(merges) < len(ids) - 514:  # all but the 2 x 256 bytes and the 2 special tokens come from merges
            raise ValueError(f"{len(merges)} merges for {len(ids)} tokens")
        if sorted(ids.values()) != list(range(len(ids))):  # an id beyond them has no row in the text encoder's table
            raise ValueError(f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}")
        self._bpe = clip_bpe(ids, merges)
        self.start_id, self.end_id = ids[START], ids[END]
        self.max_tokens = max_tokens

    @classmethod
    def from_folder(cls, folder: Path, max_tokens: int) -> "Tokenizer":
        """From vocab.json and merges.txt, or from tokenizer.json, where transformers 5 saves both."""
        files = [folder / "vocab.json", folder / "merges.txt"]
        if (folder / "tokenizer.json").is_file() and not files[0].exists():
            files = [folder / "tokenizer.json"]
        try:
            return cls(*read_vocabulary(*map(read_text, files)), max_tokens)
        except OSError as error:
            raise Problem(f"{error.filename}: cannot read the tokenizer ({error.strerror}); check the file") from None
        except Exception as error:  # the Rust side raises plain Exception
            reason, names = str(error).partition("\n")[0], ", ".join(map(str, files))
            raise Problem(f"{names}: not a CLIP vocabulary ({reason}); copy the tokenizer again") from None

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [[self.start_id, *self._encode(text).ids[: self.max_tokens - 2]] for text in texts]
        return torch.tensor([row + [self.end_id] * (self.max_tokens - len(row)) for row in rows])

    def cut(self, text: str) -> str:
        """The tail of `text` that does not fit into max_tokens; empty when all of it does."""
        offsets, room = self._encode(text).offsets, self.max_tokens - 2
        return text[offsets[room][0]:].strip() if len(offsets) > room else ""

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of `text`, each with the context's rows that hold its tokens."""
        encoded = self._encode(text)
        rows: dict[int | None, list[int]] = {}
        for i, word in enumerate(encoded.word_ids[: self.max_tokens - 2]):
            rows.setdefault(word, []).append(i + 1)
        return [(text[encoded.offsets[at[0] - 1][0]: encoded.offsets[at[-1] - 1][1]], at) for at in rows.values()]

    def _encode(self, text: str) -> Encoding:
        try:
            return self._bpe.encode(text, add_special_tokens=False)
        except TypeError:  # half of a surrogate pair: an argument in another encoding than the terminal's
            raise Problem(f"prompt {text!r} is not Unicode text; type it again in UTF-8") from None


def read_text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would never end
        raise ValueError(f"{path.name} is no regular file")
    return path.read_text(encoding="utf-8")


def read_vocabulary(vocab: str, merges: str | None = None) -> tuple[dict[str, int], list[tuple]]:
    """The ids and merges in the texts of vocab.json and merges.txt, or of tokenizer.json alone."""
    if merges is not None:
        lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
        return json.loads(vocab), [tuple(line.split(" ")) for line in lines]
    model = json.loads(vocab)["model"]
    if model.get("end_of_word_suffix") != "</w>":
        raise ValueError("words in it do not end in </w>")
    return model["vocab"], [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def clip_bpe(ids: dict[str, int], merges: list[tuple[str, str]]) -> BPETokenizer:
    bpe = BPETokenizer(models.BPE(ids, merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
                                  fuse_unk=False, unk_token=END))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens([START, END])
    return bpe
