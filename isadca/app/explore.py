"""One run of the method from inside, as one HTML file: `look_inside` collects the data, `page` embeds it.

Everything is observed from outside the loop: attention through the seam by `record`, the branches' noise through
`on_step`. The page itself, with its CSS and JavaScript, is explore.html beside this file.
"""

import base64
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import __version__
from ..common.images import to_tensor
from ..common.problem import Problem
from ..common.progress import Progress, silent
from ..ddim import predict_x0
from ..evaluation.judge import CLIPPair
from ..evaluation.metrics import clip_similarity, ssim
from ..loading.checkpoints import load_into
from ..loading.load import build, find_part
from ..loop import Noise, Run, decode, sample
from ..methods import Method
from ..networks.clip import CLIPText
from ..networks.model import Model
from ..reference import Reference, reconstruct
from .record import Map, record

LAMS = [i / 10 for i in range(11)]
CHAIN = 5      # latents of the inversion chain on the page
MOMENTS = 4    # steps whose attention is kept
GRID = 16      # cells a side of an attention map; larger ones are averaged to keep a page of SD1.5 small
SIDE = 256     # pixels a side of a picture


def method_at(lam: float) -> Method:
    """The method that is looked into. Raises Problem for a λ at which one of the branches would not be computed."""
    if not 0 < lam < 1:
        raise Problem(f"lam is {lam}, expected more than 0 and less than 1; at the ends one branch is all")
    return Method(lam=lam, steps=20)


def look_inside(model: Model, ref: Reference, prompt: str, method: Method, progress: Progress = silent,
                beside: Sequence[Method] = (), keep: Tensor | None = None) -> dict:
    """All that the page shows, as JSON: the run of `method` step by step, the final pictures over λ, and those of the
    methods `beside`, all with the same `keep`."""
    words, tokens = model.tokenizer.words(prompt), model.tokenizer.max_tokens
    grid = model.schedule.steps(ref.steps)
    moments, chain = _spread(ref.steps - 1, MOMENTS), _spread(ref.steps, CHAIN + 1)[1:]
    kept = {grid[i].t for i in moments}
    recorder, attention = record(method, lambda site, t, branch: t in kept), []
    branches: list[list[Tensor]] = []

    def on_step(run: Run, t: int, z: Tensor, noise: Noise) -> None:
        if t in kept:
            attention.append({"t": t} | attention_maps(recorder.maps, [rows for _, rows in words], tokens))
            recorder.maps.clear()  # one step at a time, for memory
        branches.append([predict_x0(z, eps, model.schedule.alpha_bar(t)) for eps in noise])

    [z] = sample(model, ref, [Run(prompt, recorder.method)], on_step=on_step, progress=progress, keep=keep)
    show = lambda latents: [uri(image) for image in decode(model, latents)]
    return {"version": __version__, "prompt": prompt, "words": [word for word, _ in words], "lam": method.lam,
            "guidance": method.guidance, "size": ref.image.size, "times": [step.t for step in grid],
            "reference": uri(ref.image), "reconstruction": uri(reconstruct(model, ref, progress=progress)),
            "chain": [{"t": grid[-i].t, "picture": picture} for i, picture in zip(chain, show(ref.chain[chain]))],
            "x0": {name: show(torch.cat(x0)) for name, x0 in zip(Noise._fields, zip(*branches))},
            "variation": show(z)[0], "attention": attention, "lams": LAMS,
            "keep": None if keep is None else packed(pooled(keep.flatten()[None], (keep.shape[0], keep.shape[1]))),
            **over_lam(model, ref, prompt, progress, beside, keep)}


def attention_maps(maps: list[Map], rows: list[list[int]], tokens: int) -> dict:
    """One step's maps, averaged over the layers of each level: where each query looks, where each word acts.

    `rows` are each word's rows of the text, which has `tokens` rows; the image prompt has another number. Also the
    share of every layer's attention that the reference gets.
    """
    levels, layers = [], []
    looks = {site: p for site, _, branch, p in maps if site.kind == "self" and branch == 0}
    words = [(site, p) for site, _, _, p in maps if site.kind == "cross" and p.shape[1] == tokens]
    for hw in sorted({site.hw for site in looks}, reverse=True):
        look = torch.stack([p for site, p in looks.items() if site.hw == hw]).mean(0)
        cross = torch.stack([p for site, p in words if site.hw == hw]).mean(0)
        by_word = [pooled(cross[:, r].sum(1)[None], hw)[0] for r in rows]
        h, w = (min(side, GRID) for side in hw)
        levels.append({"hw": hw, "grid": (h, w), "looks": packed(pooled_both(look, hw)),
                       "words": packed(torch.stack(by_word)) if rows else ""})
    for site, p in looks.items():
        layers.append({"layer": site.layer, "place": site.place, "hw": site.hw,
                       "share": round(p[:, : len(p)].sum(1).mean().item(), 4)})
    return {"levels": levels, "layers": layers}


def pooled(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """Maps (R,h·w) averaged to at most GRID × GRID cells."""
    return F.adaptive_avg_pool2d(x.view(-1, 1, *hw), (min(hw[0], GRID), min(hw[1], GRID))).flatten(1)


def pooled_both(p: Tensor, hw: tuple[int, int]) -> Tensor:
    """Rows over [reference, self], (N,2N) -> (n,2n), averaged over queries and keys; each sums to 1 again."""
    p = pooled(p.reshape(-1, len(p)), hw).view(len(p), -1)  # keys
    p = pooled(p.T, hw).T                                   # queries
    return p / p.sum(1, keepdim=True)


def packed(rows: Tensor) -> str:
    """(R,n) -> base64, a byte a value: 255 √(value / its row's highest). The root keeps small weights apart."""
    bytes_ = (255 * (rows / rows.amax(1, keepdim=True).clamp(min=1e-12)).sqrt()).round().to(torch.uint8)
    return base64.b64encode(bytes_.cpu().numpy().tobytes()).decode()


def over_lam(model: Model, ref: Reference, prompt: str, progress: Progress, beside: Sequence[Method],
             keep: Tensor | None = None) -> dict:
    """The picture at every λ, for both places to mix, and of each method `beside`, with its distance and similarity."""
    runs = [Run(prompt, Method(lam=lam)) for lam in LAMS]
    runs += [Run(prompt, Method(lam=lam, mix="attention")) for lam in LAMS[1:-1]]  # at both ends it is the same run
    runs += [Run(prompt, other) for other in beside]
    pictures = decode(model, torch.cat(sample(model, ref, runs, progress=progress, keep=keep)))
    n = len(LAMS)
    noise, inner, others = pictures[:n], pictures[n: 2 * n - 2], pictures[2 * n - 2:]
    label, similar = similarity(model, ref, prompt)

    def measured(of: list[Image.Image]) -> dict:
        return {"pictures": [uri(p) for p in of], "similarity": [similar(p) for p in of] if label else None,
                "distance": [round(1 - ssim(to_tensor(p), to_tensor(ref.image)).item(), 4) for p in of]}
    mixes = {"noise": measured(noise), "attention": measured([noise[0], *inner, noise[-1]])}
    return {"similarity": label, "mixes": mixes,
            "beside": measured(others) | {"names": [other.name for other in beside]}}


def similarity(model: Model, ref: Reference, prompt: str):
    """What pictures are compared with, and the function: the prompt, if the image encoder's text encoder is beside it
    in `text_encoder_with_projection`; else the reference; without an image encoder nothing, ("", None)."""
    if model.vision is None:
        return "", None
    clip = CLIPPair(paired_text(model), model.vision, model.tokenizer)
    label, to = ("prompt", clip.embed_text(prompt)) if clip.text else ("reference", clip.embed_picture(ref.image))
    return label, lambda image: round(clip_similarity(clip.embed_picture(image), to).item(), 4)


def paired_text(model: Model) -> CLIPText | None:
    file = model.files.get("vision")
    folder = file.parent.parent / "text_encoder_with_projection" if file else None
    if folder is None or not folder.is_dir():
        return None
    part = find_part(folder, "text", model.dtype)
    text = load_into(build(part), part, model.dtype, model.device)
    return text if text.config.projection_dim == model.vision.config.projection_dim else None


def uri(image: Image.Image) -> str:
    """A picture as a data: URI, at most SIDE pixels a side: PNG where it is tiny, JPEG otherwise."""
    image, file = image.copy(), BytesIO()
    image.thumbnail((SIDE, SIDE))
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.save(file, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _spread(last: int, n: int) -> list[int]:
    """At most n whole numbers from 0 to `last`, evenly spaced."""
    return sorted({round(i * last / (n - 1)) for i in range(n)})


def page(data: dict) -> str:
    """The template with `data` in it. "<" is escaped, so that no prompt can end the script element."""
    template = Path(__file__).with_name("explore.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
