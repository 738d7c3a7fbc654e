"""Rebuild weights/tokenizer/vocab.json and merges.txt from the merge list that OpenAI published with CLIP.

    python examples/train_demo/build_tokenizer.py bpe_simple_vocab_16e6.txt.gz weights/tokenizer

The list, bpe_simple_vocab_16e6.txt.gz (1,356,917 bytes, MIT licence), is part of OpenAI's CLIP repository and of the
wheels of open_clip_torch and clip-anytorch. A wheel is a zip file: nothing has to be installed to take it out. Both
files come out byte for byte as they lie in Stable Diffusion 1.5's tokenizer folder.
"""

import argparse
import gzip
import json
from pathlib import Path

MERGES = 49152 - 256 - 2  # CLIP uses the first 48,894 of the 262,144 merges that the list holds
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """One visible character for each of the 256 bytes, in the order of their ids: first the bytes that are
    printable in Latin-1, as themselves; then the others, as U+0100, U+0101, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def build(lines: list[str]) -> tuple[dict[str, int], list[str]]:
    """The list's lines, the version line first -> (token -> id, merges in order of rank)."""
    merges = lines[1 : 1 + MERGES]
    characters = byte_characters()
    endings = [c + "</w>" for c in characters]  # the same, at the end of a word
    tokens = characters + endings + [merge.replace(" ", "") for merge in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("folder", type=Path, help="where vocab.json and merges.txt go")
    args = parser.parse_args()
    vocab, merges = build(gzip.decompress(args.list.read_bytes()).decode("utf-8").split("\n"))
    args.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(vocab, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    (args.folder / "vocab.json").write_bytes(text.encode("utf-8"))
    (args.folder / "merges.txt").write_bytes("\n".join(["#version: 0.2", *merges, ""]).encode("utf-8"))
    print(f"{args.folder}: vocab.json with {len(vocab):,} tokens, merges.txt with {len(merges):,} merges")


if __name__ == "__main__":
    main()
