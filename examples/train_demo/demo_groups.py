"""Hard batches for the CLIP pair: groups of four scenes that differ in one attribute only, which their captions name.

Among 64 random scenes the noun, the colour and the place decide nearly everything, and a text encoder need not tell
"striped" from "checkered". In such a group nothing else helps.
"""

import demo_world as world
import numpy as np
from demo_judge import HEADS

KEYS = ("noun", "style", "colour", "pattern", "place")
GROUPS = ("pattern", "pattern", "pattern", "noun", "noun", "noun", "colour", "style")  # the attributes of eight groups
NEAR = 8  # a noun's neighbours in the world's list are of its kind: animals, fruit, vehicles


class Groups:
    """The training scenes, found by their attributes."""

    def __init__(self, scenes: list[world.Scene]):
        self.scenes, self.places = scenes, {}
        for i, scene in enumerate(scenes):
            self.places.setdefault(tuple(getattr(scene, key) for key in KEYS), []).append(i)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """`size` scenes, the first half in groups, the rest random: their numbers and captions."""
        index, texts = [], []
        for number in range(size // 8):
            found, said = self.group(GROUPS[number % len(GROUPS)], rng)
            index, texts = index + found, texts + said
        rest = rng.integers(len(self.scenes), size=size - len(index))
        return np.array([*index, *rest]), texts + [world.caption(self.scenes[i], rng) for i in rest]

    def group(self, attribute: str, rng: np.random.Generator) -> tuple[list[int], list[str]]:
        """Scenes that differ in `attribute` only (and in what no caption says), and captions of one form for them."""
        while True:
            first = self.scenes[rng.integers(len(self.scenes))]
            words = alternatives(attribute, first, rng)
            alike = [self.places.get(tuple(word if key == attribute else getattr(first, key) for key in KEYS), [])
                     for word in words]
            found = [int(rng.choice(places)) for places in alike if places][:4]
            if len(found) == min(4, len(words)):
                break
        while True:  # the same seed: the same attributes are said of each
            seed = int(rng.integers(2**31))
            texts = [world.caption(self.scenes[i], np.random.default_rng(seed)) for i in found]
            if len(set(texts)) == len(texts):
                return found, texts


def alternatives(attribute: str, scene: world.Scene, rng: np.random.Generator) -> list[str]:
    """The scene's own word, then others to take instead, in random order."""
    words, own = HEADS[attribute], getattr(scene, attribute)
    if attribute == "noun":
        at = words.index(own)
        words = words[max(at - NEAR, 0):at + NEAR + 1]
    return [own, *rng.permutation([word for word in words if word != own]).tolist()]
