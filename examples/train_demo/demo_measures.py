"""What measure_demo.py measures of each network: one function for a kind of row, each run in a process of its own.

Every scene is held out, and every picture is judged by the judge of demo_judge.py. A function that draws takes a
guidance and a seed, most others a seed; the answer is, for each picture, a list of "is it right?" by attribute.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import demo_world as world
import numpy as np
import torch
import torch.nn.functional as F
from demo_judge import HEADS, Judge
from demo_metrics import DISTORTIONS, UNSEEN, answers, new_heads, scaled
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import isadca
from isadca.attention import Attend, attend as plain_attend, dca
from isadca.common.images import clip_pixels, to_images, to_tensor
from isadca.ddim import step
from isadca.evaluation.metrics import inception_map, load_metric, lpips, psnr, taps
from isadca.loading.checkpoints import load_into
from isadca.loading.load import build, find_part
from isadca.loop import decode, guide

sys.path.append(str(Path(__file__).resolve().parents[1] / "counterparts"))
from controlnet_shuffle import load_controlnet, shuffle_content
from image_variations import load_image_variations, squash_pixels
from kandinsky_prior import embed_prompt, load_prior

Answers = list[list[bool]]
Task = tuple[float, int]  # guidance, seed
NOUNS = len(world.NOUNS)
shared: dict = {}  # what each process has loaded


def start(folder: Path, art: Path, steps: int) -> None:
    """Load everything, once a process."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    judge, part = Judge(), find_part(folder / "text_encoder_with_projection", "text", torch.float32)
    judge.load_state_dict(load_file(folder / "judge/model.safetensors"))
    model = isadca.load(folder, device="cpu", dtype="fp32")
    shared.update(model=model, judge=judge.float().eval(), text=load_into(build(part), part, torch.float32),
                  art=world.fetch_art(art), steps=steps, folder=folder, prior=load_prior(folder / "prior"),
                  controlnet=load_controlnet(folder / "controlnet-shuffle", model.unet.config),
                  variations=load_image_variations(folder / "image-variations"))


# ---- scenes and pictures -----------------------------------------------------------------------------------------

def drawn(scenes: list[world.Scene]) -> tuple[list[world.Scene], list[Image.Image]]:
    return scenes, [Image.fromarray(world.draw(scene, shared["art"])) for scene in scenes]


def held_out_scenes(n: int, seed: int) -> tuple[list[world.Scene], list[Image.Image]]:
    rng = np.random.default_rng(seed)
    return drawn([world.random_scene(rng, unseen=True) for _ in range(n)])


def one_of_each_noun(seed: int) -> tuple[list[world.Scene], list[Image.Image]]:
    rng = np.random.default_rng(seed)
    return drawn([world.random_scene(rng, unseen=True, noun=noun) for noun in HEADS["noun"]])


def verdict(pictures: list[Image.Image]) -> list[dict[str, str]]:
    """What the judge sees in each picture."""
    logits = shared["judge"](torch.cat([to_tensor(p) for p in pictures]))
    found = {name: x.argmax(1).tolist() for name, x in logits.items()}
    return [{name: HEADS[name][found[name][i]] for name in HEADS} for i in range(len(pictures))]


def compared(scenes: list[world.Scene], seen: list[dict[str, str]], names: tuple[str, ...]) -> Answers:
    return [[s[name] == getattr(scene, name) for name in names] for scene, s in zip(scenes, seen)]


def generate(context: Tensor, guidance: float, seed: int, attend: Attend = plain_attend, model=None,
             correct: Callable | None = None) -> list[Image.Image]:
    """All pictures in one batch, rows [unconditional | conditional]. `correct` gives a ControlNet's residuals."""
    model, n = model or shared["model"], len(context) // 2
    z = torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    for t, t_prev in shared["model"].schedule.steps(shared["steps"]):
        residuals = correct(z, t, context[n:]) if correct else None
        eps = model.unet(z.repeat(2, 1, 1, 1), t, context, attend, residuals=residuals)
        z = step(z, guide(eps.chunk(2), guidance), model.schedule.alpha_bar(t), model.schedule.alpha_bar(t_prev))
    return decode(model, z)


# ---- drawing -----------------------------------------------------------------------------------------------------

def measure_text(task: Task) -> Answers:
    """"a S N on a C P background", for held-out combinations, one of each noun: is it N, C, P, S?"""
    guidance, seed = task
    scenes, _ = one_of_each_noun(seed)
    prompts = [f"{world.article(f'{s.style} {s.noun}')} on {world.article(s.colour)} {s.pattern} background"
               for s in scenes]
    pictures = generate(shared["model"].context([""] * len(prompts) + prompts), guidance, seed)
    return compared(scenes, verdict(pictures), ("noun", "colour", "pattern", "style"))


def by_tokens(tokens: Tensor, guidance: float, seed: int) -> list[Image.Image]:
    """Through the IP-Adapter alone, with an empty prompt. tokens: rows [no image | image]."""
    model = shared["model"]
    kv = model.ip_adapter.keys_values(tokens, model.unet.sites, model.unet.config.n_heads)
    return generate(model.context([""] * len(tokens)), guidance, seed, dca(kv))


def measure_adapter(task: Task) -> Answers:
    """The reference through the IP-Adapter: are its noun, colour and pattern found?"""
    guidance, seed = task
    scenes, pictures = one_of_each_noun(seed)
    tokens = torch.stack([shared["model"].image_tokens(p) for p in pictures], dim=1).flatten(0, 1)
    return compared(scenes, verdict(by_tokens(tokens, guidance, seed)), ("noun", "colour", "pattern"))


def measure_prior(task: Task) -> Answers:
    """"a N" becomes an image embedding, which the IP-Adapter draws: is it N?"""
    guidance, seed = task
    prior, encoder, tokenizer = shared["prior"]
    embeds = [embed_prompt(prior, encoder, tokenizer, world.article(noun), seed=seed * NOUNS + i)
              for i, noun in enumerate(HEADS["noun"])]
    tokens = torch.stack([shared["model"].image_tokens(embeds=e) for e in embeds], dim=1).flatten(0, 1)
    seen = verdict(by_tokens(tokens, guidance, seed))
    return [[s["noun"] == noun] for s, noun in zip(seen, HEADS["noun"])]


def measure_variations(task: Task) -> Answers:
    """SD image-variations' counterpart: are the reference's noun and colour found?"""
    guidance, seed = task
    scenes, pictures = one_of_each_noun(seed)
    model = shared["variations"]
    pixels = torch.cat([squash_pixels(p, model.vision.config.image_size) for p in pictures])
    embeds = model.vision(pixels)[0][:, None]
    made = generate(torch.cat([torch.zeros_like(embeds), embeds]), guidance, seed, model=model)
    return compared(scenes, verdict(made), ("noun", "colour"))


def measure_controlnet(task: Task) -> Answers:
    """A reference's shuffled picture and "a N" with another noun: are the reference's colour and N found?"""
    guidance, seed = task
    scenes, pictures = one_of_each_noun(seed)
    nouns = [HEADS["noun"][(i + NOUNS // 2) % NOUNS] for i in range(NOUNS)]
    hints = torch.cat([to_tensor(shuffle_content(p, seed, cell=32)) + 1 for p in pictures]) / 2
    made = generate(shared["model"].context([""] * NOUNS + [world.article(noun) for noun in nouns]), guidance, seed,
                    correct=lambda z, t, context: on_the_conditional_half(
                        shared["controlnet"](z, t, context, hints, pooled=True)))
    return [[s["colour"] == scene.colour, s["noun"] == noun]
            for s, scene, noun in zip(verdict(made), scenes, nouns)]


def on_the_conditional_half(residuals: list[Tensor]) -> list[Tensor]:
    return [torch.cat([torch.zeros_like(r), r]) for r in residuals]


# ---- seeing ------------------------------------------------------------------------------------------------------

def measure_vae(seed: int, n: int = 100) -> list[float]:
    model = shared["model"]
    return [psnr(picture, to_images(model.decode(model.encode(to_tensor(picture))))[0])
            for picture in held_out_scenes(n, seed)[1]]


def measure_reconstruction(seed: int, n: int = 16) -> list[float]:
    """50 steps of inversion and back, with the empty prompt."""
    model = shared["model"]
    return [psnr(picture, isadca.reconstruct(model, isadca.invert(model, picture, 50)))
            for picture in held_out_scenes(n, seed)[1]]


def measure_judge(seed: int, n: int = 200) -> Answers:
    """The judge on real scenes: its own ceiling."""
    scenes, pictures = held_out_scenes(n, seed)
    return compared(scenes, verdict(pictures), tuple(HEADS))


def measure_clip(seed: int, n: int = 200) -> Answers:
    """Zero-shot, in two ways. Noun, colour and pattern of the nearest of all 1,536 sentences "a N on a C P
    background"; then each word by the mean of its sentences, as CLIP's own are averaged over templates."""
    scenes, pictures = held_out_scenes(n, seed)
    vision = shared["model"].vision
    seen = F.normalize(vision(torch.cat([clip_pixels(p, vision.config.image_size) for p in pictures]))[0], dim=-1)
    names = ("noun", "colour", "pattern")
    texts = [f"{world.article(noun)} on {world.article(colour)} {pattern} background"
             for noun, colour, pattern in itertools.product(*(HEADS[name] for name in names))]
    told = torch.cat([F.normalize(shared["text"].embed(shared["model"].tokenizer(texts[i:i + 128])), dim=-1)
                      for i in range(0, len(texts), 128)])
    shape = [len(HEADS[name]) for name in names]
    nearest = np.unravel_index((seen @ told.T).argmax(1).numpy(), shape)
    means = [F.normalize(told.view(*shape, -1).mean([i for i in range(3) if i != axis]), dim=-1) for axis in range(3)]
    found = [*nearest, *((seen @ words.T).argmax(1).numpy() for words in means)]
    right = [np.array([HEADS[name].index(getattr(scene, name)) for scene in scenes]) for name in names * 2]
    return np.stack([a == b for a, b in zip(found, right)], axis=1).tolist()


def measure_trunk(kind: str, n: int = 400, seed: int = 100) -> Answers:
    """A metric's trunk with the heads that it was trained with."""
    scenes, pictures = held_out_scenes(n, seed)
    x, folder = torch.cat([to_tensor(p) for p in pictures]), shared["folder"] / "metrics"
    trunk = load_metric(folder / f"{kind}.safetensors", kind)
    features = inception_map(x, trunk) if kind == "inception" else taps(scaled(x), kind, trunk)[-1]
    saved = load_file(folder / f"{kind}-heads.safetensors")
    heads = new_heads(features.shape[1])
    heads.load_state_dict({key.removeprefix("heads."): value for key, value in saved.items()})
    found = {name: x.argmax(1).tolist() for name, x in answers(heads, features).items()}
    return [[HEADS[name][found[name][i]] == getattr(scene, name) for name in ("noun", "colour", "pattern")]
            for i, scene in enumerate(scenes)]


def measure_lpips(task: tuple[str, str], n: int = 192, seed: int = 100) -> list[bool]:
    """(alex or vgg, a kind of distortion) -> for each picture: is the stronger of two distortions farther?"""
    trunk_kind, how = task
    folder, distort = shared["folder"] / "metrics", (DISTORTIONS | UNSEEN)[how]
    trunk = load_metric(folder / f"{trunk_kind}.safetensors", trunk_kind)
    heads = load_metric(folder / f"lpips-{trunk_kind}.safetensors", f"{trunk_kind} heads")
    x = torch.cat([to_tensor(p) for p in held_out_scenes(n, seed)[1]])
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    found = []
    for part in x.split(4):  # each four with strengths of their own
        weak, strong = (float(s) for s in sorted(rng.random(2)))
        near, far = (lpips(part, distort(part, s), trunk_kind, trunk, heads) for s in (weak, strong))
        found += (near < far).tolist()
    return found
