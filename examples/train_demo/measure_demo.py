"""What the demo checkpoint can do, and what the method does with it: the tables of weights/demo/measured.md.

    python examples/train_demo/measure_demo.py [FOLDER] [-o measured.md] [--art FOLDER] [--steps 25] [--references 20]

All scenes are held out: their combination of noun, artist, colour and pattern was in no training. Pictures are judged
by the judge of demo_judge.py, which shares nothing with the networks that it judges; CLIP similarities are the demo
CLIP's own. One process a core.
"""

import argparse
import datetime
import itertools
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import demo_world as world
import numpy as np
import torch
from demo_judge import HEADS, Judge
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import isadca
from isadca.attention import Attend, attend as plain_attend, dca
from isadca.common.images import clip_pixels, to_images, to_tensor
from isadca.common.sheets import contact_sheet
from isadca.ddim import step
from isadca.evaluation.metrics import psnr
from isadca.loading.config_json import read_config
from isadca.loop import Run, decode, guide, sample
from isadca.methods import PRESETS, Method
from isadca.networks.clip import CLIPText
from isadca.networks.sizes import CLIPTextConfig

MIXED = [(mix, lam) for mix in ("noise", "attention") for lam in (0.25, 0.5, 0.7)]  # at the ends they are the same
SYSTEMS = [("λ 0", Method(lam=0)), *((f"λ {lam} {mix}", Method(lam=lam, mix=mix)) for mix, lam in MIXED),
           ("λ 1", Method(lam=1)), ("RIVAL", PRESETS["rival"]), ("RIVAL, editing", PRESETS["rival-edit"]),
           ("IP-Adapter", PRESETS["ip-adapter"])]
PROMPTS = 5  # per reference
shared: dict = {}  # what each process has loaded


def start(folder: Path, art: Path, steps: int) -> None:
    """Load everything, once a process."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    judge, text = Judge(), CLIPText(read_config(CLIPTextConfig, folder / "text_encoder_with_projection/config.json"))
    judge.load_state_dict(load_file(folder / "judge/model.safetensors"))
    text.load_state_dict(load_file(folder / "text_encoder_with_projection/model.safetensors"))
    shared.update(model=isadca.load(folder, device="cpu", dtype="fp32"), judge=judge.float().eval(),
                  text=text.float().eval(), art=world.fetch_art(art), steps=steps)


def held_out_scenes(n: int, seed: int) -> list[tuple[world.Scene, Image.Image]]:
    rng = np.random.default_rng(seed)
    scenes = [world.random_scene(rng, unseen=True) for _ in range(n)]
    return [(scene, Image.fromarray(world.draw(scene, shared["art"]))) for scene in scenes]


def verdict(pictures: list[Image.Image]) -> list[dict[str, str]]:
    """What the judge sees in each picture."""
    logits = shared["judge"](torch.cat([to_tensor(p) for p in pictures]))
    found = {name: x.argmax(1).tolist() for name, x in logits.items()}
    return [{name: HEADS[name][found[name][i]] for name in HEADS} for i in range(len(pictures))]


def generate(prompts: list[str], guidance: float, seed: int, attend: Attend = plain_attend) -> list[Image.Image]:
    """Text to image, all prompts in one batch, rows [unconditional | text]."""
    model, n = shared["model"], len(prompts)
    z = torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    context = model.context([""] * n + prompts)
    for t, t_prev in model.schedule.steps(shared["steps"]):
        eps = guide(model.noise(z.repeat(2, 1, 1, 1), t, context, attend).chunk(2), guidance)
        z = step(z, eps, model.schedule.alpha_bar(t), model.schedule.alpha_bar(t_prev))
    return decode(model, z)


# ---- one task each, for a process pool ---------------------------------------------------------------------------

def measure_vae(seed: int, n: int = 100) -> list[float]:
    model = shared["model"]
    return [psnr(picture, to_images(model.decode(model.encode(to_tensor(picture))))[0])
            for _, picture in held_out_scenes(n, seed)]


def measure_judge(seed: int, n: int = 200) -> list[list[bool]]:
    """The judge on real held-out scenes: its own ceiling."""
    scenes, pictures = zip(*held_out_scenes(n, seed))
    return [[seen[name] == getattr(scene, name) for name in HEADS] for scene, seen in zip(scenes, verdict(pictures))]


def measure_text(task: tuple[float, int]) -> list[list[bool]]:
    """"a N on a C P background" for every noun: is it N, C, P?"""
    guidance, seed = task
    rng = np.random.default_rng(seed)
    wanted = [dict(noun=noun, colour=str(rng.choice(HEADS["colour"])), pattern=str(rng.choice(HEADS["pattern"])))
              for noun in HEADS["noun"]]
    prompts = [f"{world.article(w['noun'])} on {world.article(w['colour'])} {w['pattern']} background" for w in wanted]
    seen = verdict(generate(prompts, guidance, seed))
    return [[s[name] == w[name] for name in w] for s, w in zip(seen, wanted)]


def measure_adapter(task: tuple[float, int], n: int = 48) -> list[list[bool]]:
    """The reference through the IP-Adapter alone, with an empty prompt: are its noun and colour found?"""
    guidance, seed = task
    scenes, pictures = zip(*held_out_scenes(n, seed))
    model = shared["model"]
    tokens = torch.stack([model.image_tokens(p) for p in pictures], dim=1).flatten(0, 1)  # [no image | image]
    kv = model.ip_adapter.keys_values(tokens, model.unet.sites, model.unet.config.n_heads)
    seen = verdict(generate([""] * n, guidance, seed, dca(kv)))
    return [[s[name] == getattr(scene, name) for name in ("noun", "colour")] for s, scene in zip(seen, scenes)]


def measure_method(seed: int) -> tuple[float, list[list[tuple]], list[Image.Image], str]:
    """One reference, PROMPTS other nouns, every system. -> PSNR of the reconstruction, numbers by prompt and system
    (see `judged`), and the first prompt's pictures with their label."""
    model, rng = shared["model"], np.random.default_rng(seed)
    [(scene, picture)] = held_out_scenes(1, seed)
    nouns = rng.choice([n for n in HEADS["noun"] if n != scene.noun], PROMPTS, replace=False).tolist()
    back = isadca.reconstruct(model, isadca.invert(model, picture, 50))
    ref = isadca.invert(model, picture, shared["steps"])
    runs = [Run(world.article(noun), method, (seed,)) for noun in nouns for _, method in SYSTEMS]
    made = [decode(model, z)[0] for z in sample(model, ref, runs)]
    rows = [judged(scene, picture, noun, made[i * len(SYSTEMS):][:len(SYSTEMS)]) for i, noun in enumerate(nouns)]
    return psnr(picture, back), rows, [picture, back, *made[:len(SYSTEMS)]], runs[0].prompt


def judged(scene: world.Scene, reference: Image.Image, noun: str, pictures: list[Image.Image]) -> list[tuple]:
    """For each picture: is it the prompt's noun; the reference's colour and pattern; mean error of the backdrop
    outside the object, in grey levels; CLIP similarity to the prompt and to the reference."""
    outside, real = world.outside(scene), np.asarray(reference, np.float32)
    text = shared["text"].embed(shared["model"].tokenizer([world.article(noun)]))
    similarity = lambda p, other: torch.cosine_similarity(embed(p), other).item()
    return [(s["noun"] == noun, s["colour"] == scene.colour, s["pattern"] == scene.pattern,
             float(np.abs(np.asarray(p, np.float32) - real)[outside].mean()),
             similarity(p, text), similarity(p, embed(reference)))
            for s, p in zip(verdict(pictures), pictures)]


def embed(picture: Image.Image) -> Tensor:
    vision = shared["model"].vision
    return vision(clip_pixels(picture, vision.config.image_size))[0]


# ---- tables ------------------------------------------------------------------------------------------------------

def percent(answers: list[list[bool]]) -> list[str]:
    return [f"{100 * x:.0f} %" for x in np.mean(np.array(answers, float), axis=0)]


def listed(numbers) -> str:
    return ", ".join(f"{x:g}" for x in numbers)


def best_of(rounds: dict[float, list[list[bool]]]) -> float:
    return max(rounds, key=lambda guidance: np.mean(rounds[guidance]))


def by_guidance(pool, task, guidances, seeds) -> dict[float, list[list[bool]]]:
    tasks = list(itertools.product(guidances, seeds))
    found: dict[float, list[list[bool]]] = {}
    for (guidance, _), answers in zip(tasks, pool.map(task, tasks)):
        found.setdefault(guidance, []).extend(answers)
    return found


def networks_table(pool, seeds: range) -> str:
    vae = np.concatenate(list(pool.map(measure_vae, seeds)))
    judge = percent(sum(pool.map(measure_judge, seeds), []))
    texts = by_guidance(pool, measure_text, (3.0, 5.0, 7.0), seeds)
    images = by_guidance(pool, measure_adapter, (1.5, 3.0, 5.0), seeds)
    m, a = best_of(texts), best_of(images)
    noun, colour, pattern = percent(texts[m])
    lines = [f"| VAE, PSNR over {len(vae)} scenes | {vae.mean():.1f} dB | 28 dB |",
             f"| the judge itself on real scenes: noun, style, colour, pattern | {', '.join(judge)} | |",
             f"| text to image, {len(texts[m])} pictures, guidance {m:g} (best of {listed(texts)}): noun, colour, "
             f"pattern | {noun}, {colour}, {pattern} | 85, 95, 85 % |",
             f"| IP-Adapter, empty prompt, {len(images[a])} pictures, guidance {a:g} (best of {listed(images)}): "
             f"noun, colour | {', '.join(percent(images[a]))} | 80, 90 % |"]
    return "| what | measured | goal |\n|---|---|---|\n" + "\n".join(lines)


def method_table(pool, seeds: range) -> tuple[str, Image.Image]:
    """The table of the systems, and a sheet of the first references' pictures."""
    found = list(pool.map(measure_method, seeds))
    numbers = np.array([rows for _, rows, _, _ in found], float).reshape(-1, len(SYSTEMS), 6)
    lines = [f"| {name} | {100 * noun:.0f} % | {100 * colour:.0f} % | {100 * pattern:.0f} % | {error:.1f} | {text:.3f} "
             f"| {image:.3f} |"
             for (name, _), (noun, colour, pattern, error, text, image) in zip(SYSTEMS, numbers.mean(0))]
    head = ("| system | prompt's noun | R's colour | R's pattern | backdrop error | CLIP to prompt | CLIP to R |\n"
            "|---|---|---|---|---|---|---|\n")
    back = np.mean([decibel for decibel, _, _, _ in found])
    return (f"Reconstruction (50 steps of inversion and back, empty prompt): PSNR {back:.1f} dB over {len(found)} "
            f"references; the goal is 25 dB.\n\n{len(numbers)} pairs of a reference R and a prompt \"a N\" with "
            "another noun:\n\n" + head + "\n".join(lines),
            contact_sheet([pictures for _, _, pictures, _ in found[:8]],
                          ["reference", "reconstruction", *(name.replace("λ", "lambda") for name, _ in SYSTEMS)],
                          [label for _, _, _, label in found[:8]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[2] / "weights/demo")
    parser.add_argument("-o", "--out", type=Path, help="write the tables there, and a sheet of pictures beside them")
    parser.add_argument("--art", type=Path, default=Path("art"), help="where the art is kept")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--references", type=int, default=20, help="five pairs each (%(default)s)")
    args = parser.parse_args()
    world.fetch_art(args.art)  # before the processes start
    began, cores = time.monotonic(), os.cpu_count()
    with ProcessPoolExecutor(cores, get_context("spawn"), start, (args.folder, args.art, args.steps)) as pool:
        networks = networks_table(pool, range(100, 102))
        method, sheet = method_table(pool, range(200, 200 + args.references))
    text = (f"{networks}\n\n{method}\n\n*{args.steps} steps; `python examples/train_demo/measure_demo.py --references "
            f"{args.references}`; {cores} cores ({platform.machine()}), torch {torch.__version__}, "
            f"{datetime.date.today()}, {(time.monotonic() - began) / 60:.0f} minutes.*\n")
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
        sheet.save(args.out.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
