"""Run isadca's attention functions, or your own, inside diffusers (pip install diffusers transformers).

    python examples/in_diffusers.py examples/cat.png "a lemon" -o lemon.png

`install(unet, attend)` is all that it takes, for a UNet by itself or in a pipeline. As a demonstration, the method
itself, λ · ISA + (1 - λ) · DCA, runs on diffusers' UNet, text encoder, scheduler and VAE. The number printed is the
largest difference from the picture that isadca makes on its own, in grey levels: 0, or 1 where rounding differs.
"""

import argparse

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import isadca
from isadca.loading.load import default_weights
from isadca.networks.layers import merge_heads, split_heads


class AttendProcessor:
    """Makes one attention layer of diffusers compute what an isadca attend function says."""

    def __init__(self, attend, site: isadca.Site):
        self.attend, self.site = attend, site

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (split_heads(y, attn.heads) for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        side = int(q.shape[2] ** 0.5)  # diffusers does not say the grid's shape; this is for square pictures
        return attn.to_out[0](merge_heads(self.attend(q, k, v, self.site._replace(hw=(side, side)))))


def install(unet, attend) -> None:
    """Every attention layer of `unet` calls `attend` from now on; `install(unet, isadca.attend)` is plain again."""
    places = [(name.split("_")[0], name.removesuffix(".processor")) for name in unet.attn_processors]
    places.sort(key=lambda pair: pair[0])  # down, mid, up: the order of execution
    sites = [isadca.Site(name, "self" if name.endswith("attn1") else "cross", place, i // 2)
             for i, (place, name) in enumerate(places)]
    unet.set_attn_processor({f"{site.name}.processor": AttendProcessor(attend, site) for site in sites})


@torch.no_grad()
def vary_in_diffusers(pipe, ref: isadca.Reference, prompt: str, ip_kv: dict, lam: float = 0.7, m: float = 7.0):
    """The method's default as a loop over parts of `pipe`: one reference row a step, then two branches."""
    text, null = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=True)
    pipe.scheduler.set_timesteps(ref.steps)
    z, ref_kv = ref.chain[-1:], {}  # at every step the reference's keys and values overwrite those of the step before
    for i, t in enumerate(pipe.scheduler.timesteps):
        install(pipe.unet, isadca.capture(ref_kv))
        pipe.unet(ref.chain[ref.steps - i][None], t, null)
        install(pipe.unet, isadca.by_rows(2, isadca.isa(ref_kv), isadca.dca(ip_kv)))
        isa_u, isa_c, dca_u, dca_c = pipe.unet(z.repeat(4, 1, 1, 1), t, torch.cat([null, text] * 2)).sample.split(1)
        eps = lam * (isa_u + m * (isa_c - isa_u)) + (1 - lam) * (dca_u + m * (dca_c - dca_u))
        z = pipe.scheduler.step(eps, t, z).prev_sample
    return pipe.image_processor.postprocess(pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample)[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--weights", default=default_weights(), help="a diffusers folder with an IP-Adapter file in it")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(argv)
    model = isadca.load(args.weights, device="cpu", dtype="fp32")
    pipe = StableDiffusionPipeline.from_pretrained(args.weights, safety_checker=None, low_cpu_mem_usage=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    ref = isadca.invert(model, isadca.load_image(args.ref), args.steps)
    [told] = isadca.conditions(model, ref, [isadca.Run(args.prompt)])
    theirs = vary_in_diffusers(pipe, ref, args.prompt, told.ip_kv)
    theirs.save(args.out)
    [ours] = isadca.vary(model, ref, args.prompt)
    difference = np.abs(np.asarray(theirs, dtype=int) - np.asarray(ours, dtype=int)).max()
    print(f"{args.out}: differs from isadca's own picture by at most {difference} of 255")


if __name__ == "__main__":
    main()
