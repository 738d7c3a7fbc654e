"""The demo world: one emoji on a named backdrop, 64 × 64, with captions that leave something out.

A scene is a noun, drawn by one of two artists, in one of three places and two sizes, on one of 8 colours × 4 patterns.
Its caption names the noun and, each sometimes, the artist's style, the colour, the pattern and the place. The phase
of the pattern, the exact place, shade and size are never in a caption: of the paper's two branches, only ISA can
carry them from a reference.

The art is fetched by `fetch_art` with npm: Noto Emoji (Apache-2.0) as "flat", Fluent Emoji (MIT) as "3d".
"""

import json
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 64
PACKAGES = {"flat": "emoji-datasource-google@16.0.0", "3d": "@lobehub/fluent-emoji-3d@1.1.0"}
FILES = {"flat": "package/img/google/64/{}.png", "3d": "package/assets/{}.webp"}
STYLES = ("flat", "3d")
NOUNS = {  # and the code point of the emoji
    "cat": "1f431", "dog": "1f436", "pig": "1f437", "cow": "1f42e", "bear": "1f43b", "panda": "1f43c",
    "koala": "1f428", "tiger": "1f42f", "fox": "1f98a", "mouse": "1f42d", "frog": "1f438", "rabbit": "1f430",
    "penguin": "1f427", "chicken": "1f414", "fish": "1f420", "butterfly": "1f98b", "apple": "1f34e",
    "lemon": "1f34b", "peach": "1f351", "watermelon": "1f349", "avocado": "1f951", "pineapple": "1f34d",
    "tomato": "1f345", "carrot": "1f955", "strawberry": "1f353", "banana": "1f34c", "doughnut": "1f369",
    "hamburger": "1f354", "pizza": "1f355", "cookie": "1f36a", "rocket": "1f680", "bus": "1f68c", "car": "1f697",
    "sailboat": "26f5", "bicycle": "1f6b2", "tree": "1f333", "cactus": "1f335", "tulip": "1f337",
    "rose": "1f339", "sunflower": "1f33b", "mushroom": "1f344", "house": "1f3e0", "castle": "1f3f0",
    "crown": "1f451", "guitar": "1f3b8", "umbrella": "2602-fe0f", "balloon": "1f388", "bell": "1f514"}
COLOURS = {"red": (214, 66, 66), "orange": (242, 150, 56), "yellow": (246, 212, 76), "green": (86, 172, 92),
           "blue": (68, 128, 208), "purple": (146, 96, 186), "pink": (238, 156, 190), "gray": (160, 164, 168)}
PATTERNS = ("plain", "striped", "dotted", "checkered")
PLACES = ("left", "middle", "right")
Art = dict[tuple[str, str], Image.Image]  # by (noun, style): 128 × 128 RGBA


class Scene(NamedTuple):
    noun: str
    style: str
    colour: str
    pattern: str
    place: str
    big: bool
    offset: tuple[int, int]  # pixels from the place's centre
    phase: tuple[int, int]   # pixels by which the pattern is shifted
    shade: float             # brightness of the backdrop, about 1

    @property
    def box(self) -> tuple[int, int, int]:
        """Left, top and side of the square that the object fills, in pixels."""
        side = 44 if self.big else 32
        x = {"left": 21, "middle": 32, "right": 43}[self.place] + self.offset[0]
        left, top = (min(max(c - side // 2, 0), SIZE - side) for c in (x, 32 + self.offset[1]))
        return left, top, side


def held_out(noun: str, style: str, colour: str, pattern: str) -> bool:
    """Whether a combination, about one in sixteen, is kept from all training: no model has seen it together."""
    key = (7 * list(NOUNS).index(noun) + 3 * STYLES.index(style) + 5 * list(COLOURS).index(colour)
           + 11 * PATTERNS.index(pattern))
    return key % 17 == 0


def random_scene(rng: np.random.Generator, unseen: bool = False, **fixed) -> Scene:
    """A scene of the training world, or of its held-out part; `fixed` names attributes that are not drawn.

    Raises ValueError where no scene of that part has them all.
    """
    def pick(field, values):
        return fixed.get(field) or values[rng.integers(len(values))]

    for _ in range(10000):
        kind = (pick("noun", list(NOUNS)), pick("style", STYLES), pick("colour", list(COLOURS)),
                pick("pattern", PATTERNS))
        if held_out(*kind) == unseen:
            break
    else:
        raise ValueError(f"no {'held-out' if unseen else 'training'} scene has {fixed}")
    offset = (int(rng.integers(-3, 4)), int(rng.integers(-6, 7)))
    phase = (int(rng.integers(16)), int(rng.integers(16)))
    return Scene(*kind, pick("place", PLACES), bool(rng.integers(2)), offset, phase, float(rng.uniform(0.94, 1.04)))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """What a person might say of the scene: always the noun, each of the rest with a probability of 0.4 to 0.75."""
    says_style, says_colour, says_pattern, says_place = (rng.random(4) < (0.5, 0.75, 0.65, 0.4)).tolist()
    thing = f"{scene.style} {scene.noun}" if says_style else scene.noun
    words = [scene.colour] * says_colour + [scene.pattern] * says_pattern
    text = article(thing) + (f" on {article(' '.join(words + ['background']))}" if words else "")
    place = "in the middle" if scene.place == "middle" else f"on the {scene.place}"
    return text + (f", {place}" if says_place else "")


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def background(scene: Scene) -> np.ndarray:
    """The backdrop alone, (64,64,3) float32 in 0..255. Patterns have period 16, stripes run diagonally."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    y, x = (y + scene.phase[1]) % 16, (x + scene.phase[0]) % 16
    lighter = {"plain": np.zeros_like(x),
               "striped": np.clip(4.5 - np.abs((x + y) % 16 - 8), 0, 1),
               "dotted": np.clip(4.5 - np.hypot(x - 8, y - 8), 0, 1),
               "checkered": ((x < 8) ^ (y < 8)).astype(np.float32)}[scene.pattern]
    base = np.array(COLOURS[scene.colour], np.float32) * scene.shade
    return base + 0.45 * (255 - base) * lighter[..., None]


def draw(scene: Scene, art: Art) -> np.ndarray:
    """The scene's picture, (64,64,3) uint8."""
    left, top, side = scene.box
    sprite = art[scene.noun, scene.style].resize((side, side), Image.Resampling.LANCZOS)
    picture = Image.fromarray(background(scene).clip(0, 255).round().astype(np.uint8))
    picture.paste(sprite, (left, top), sprite)
    return np.asarray(picture)


def outside(scene: Scene, margin: int = 3) -> np.ndarray:
    """Where the backdrop shows, (64,64) bool: all but the object's square and a margin around it."""
    left, top, side = scene.box
    mask = np.ones((SIZE, SIZE), bool)
    mask[max(top - margin, 0):top + side + margin, max(left - margin, 0):left + side + margin] = False
    return mask


def fetch_art(folder: Path) -> Art:
    """Every noun by both artists, from npm packages that are fetched into `folder` once."""
    folder.mkdir(parents=True, exist_ok=True)
    art: Art = {}
    for style, package in PACKAGES.items():
        tarball = folder / (package.strip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not tarball.exists():
            npm_pack(package, folder)
        with tarfile.open(tarball) as archive:
            names = {FILES[style].format(code): noun for noun, code in NOUNS.items()}
            for member in archive:
                if member.name in names:
                    sprite = Image.open(archive.extractfile(member)).convert("RGBA")
                    art[names[member.name], style] = sprite.resize((128, 128), Image.Resampling.LANCZOS)
    missing = [key for key in ((n, s) for n in NOUNS for s in STYLES) if key not in art]
    if missing:
        raise FileNotFoundError(f"{folder}: the packages have no picture of {missing}")
    return art


def npm_pack(package: str, folder: Path) -> None:
    try:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit(f"{folder}: no art there, and no npm to fetch {package} with; install Node.js") from None


def vocabulary() -> list[str]:
    """Every word of the captions. ("3d" becomes two tokens all the same: CLIP splits off digits before it merges.)"""
    return sorted({*NOUNS, *STYLES, *COLOURS, *PATTERNS, *PLACES, "a", "an", "on", "in", "the", "background", ","})


def learn_bpe(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair encoding for a small world: merge until every word is one token. -> vocabulary, merges."""
    letters = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]  # bytes without a glyph of their own
    merges, split = [], [[*word[:-1], word[-1] + "</w>"] for word in words]
    while any(len(word) > 1 for word in split):
        pairs = [pair for word in split for pair in zip(word, word[1:])]
        best = max(dict.fromkeys(pairs), key=pairs.count)
        merges.append(best)
        split = [_merged(word, best) for word in split]
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    return {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def save_tokenizer(folder: Path, max_tokens: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = learn_bpe(vocabulary())
    start, end = "<|startoftext|>", "<|endoftext|>"
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    config = dict(bos_token=start, eos_token=end, unk_token=end, pad_token=end, model_max_length=max_tokens,
                  do_lower_case=True, tokenizer_class="CLIPTokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
