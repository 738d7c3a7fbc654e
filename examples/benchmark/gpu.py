"""Speed, memory and precision on a GPU, in one call of at most nine minutes. Each figure is written at once.

    python examples/benchmark/gpu.py -o gpu.md                                  # a CUDA card, SD1.5's true shapes
    python examples/benchmark/gpu.py --size tiny --device cpu -o tiny.md        # the same lines of code, anywhere

A bare machine is enough: torch, safetensors, tokenizers, pillow and numpy. Weights are random and made on the device,
since time and memory do not depend on them. diffusers' UNet is timed, too, where it is installed. A part that fails, or
for which no time is left, says so in the table, and the next one runs.
"""

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import arithmetic
import torch
from torch import Tensor

import isadca
from isadca.attention import attend
from isadca.common.images import to_images, to_tensor
from isadca.ddim import Schedule
from isadca.loading.load import default_weights
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.networks.ip_adapter import IPAdapter, numbered
from isadca.networks.model import Model
from isadca.networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from isadca.networks.tokenizer import Tokenizer
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

REF = Path(__file__).resolve().parent.parent / "cat.png"
SIZES = {"sd15": (UNetConfig(), VAEConfig(), CLIPTextConfig(), CLIPVisionConfig()),
         "tiny": (UNetConfig(channels=(16, 32), attention=(True, False), n_heads=2, context_dim=24, norm_groups=8,
                             sample_size=8),
                  VAEConfig(channels=(8, 16), layers_per_block=1, norm_groups=4),
                  CLIPTextConfig(vocab_size=772, width=24, layers=2, n_heads=2, mlp_width=48, max_tokens=12),
                  CLIPVisionConfig(width=24, layers=2, n_heads=2, mlp_width=48, image_size=16, patch_size=8,
                                   projection_dim=20))}
ATTENTION, NOISE = isadca.Method(mix="attention", init="shuffle"), isadca.Method(mix="noise", init="shuffle")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def adapter_shapes(unet: UNet, embed_dim: int, tokens: int = 4) -> dict[str, tuple[int, ...]]:
    """Those of ip-adapter_sd15.safetensors, for a UNet and an encoder of any size."""
    context = unet.config.context_dim
    shapes = {"image_proj.proj.weight": (tokens * context, embed_dim), "image_proj.norm.weight": (context,)}
    for number, site in numbered(unet.sites).items():
        wide = unet.get_submodule(site.name).to_q.out_features
        shapes |= {f"ip_adapter.{number}.to_{x}_ip.weight": (wide, context) for x in "kv"}
    return shapes


def random_model(size: str, device: str, dtype: torch.dtype) -> Model:
    """All networks with torch's initial values, from one seed; the VAE in float32, as loading has it."""
    torch.manual_seed(0)
    configs = SIZES[size]
    with torch.device(device):
        unet, vae, text, vision = (cls(config) for cls, config in zip((UNet, VAE, CLIPText, CLIPVision), configs))
        adapter = IPAdapter(adapter_shapes(unet, configs[3].projection_dim))
    for network in (unet, text, vision, adapter):
        network.to(dtype).requires_grad_(False)
    weights = default_weights()
    vocabulary = weights.parent / "tokenizer" if size == "sd15" else weights / "tokenizer"
    return Model(unet=unet, vae=vae.requires_grad_(False), text=text, vision=vision, ip_adapter=adapter, dtype=dtype,
                 tokenizer=Tokenizer.from_folder(vocabulary, configs[2].max_tokens), schedule=Schedule(),
                 device=torch.device(device))


@dataclass
class Bench:
    """What every part needs: the model, the table's file, and the time that is left."""

    size: str
    device: str
    steps: int
    out: Path
    until: float

    def __post_init__(self):
        self.models: dict[str, Model] = {}

    def model(self, dtype: str = "fp16") -> Model:
        """The model in one precision, kept until another is asked for; on a CPU always in fp32."""
        dtype = dtype if self.device.startswith("cuda") else "fp32"
        if dtype not in self.models:
            self.models = {dtype: random_model(self.size, self.device, DTYPES.get(dtype, torch.float32))}
        return self.models[dtype]

    def say(self, what: str, value: str, goal: str = "") -> None:
        print(f"{what}: {value}", flush=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(f"| {what} | {value} | {goal} |\n")

    def seconds(self, run: Callable, rounds: int = 5) -> float:
        """The median of some rounds after a first one, the device waited for."""
        times = []
        for _ in range(rounds + 1):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:] or times)

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def peak(self, run: Callable) -> str:
        """The device's memory at most, weights included."""
        if not self.device.startswith("cuda"):
            return "not counted on a CPU"
        torch.cuda.reset_peak_memory_stats()
        run()
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB"


# ---- parts -----------------------------------------------------------------------------------------------------

def inputs(model: Model, batch: int) -> tuple[Tensor, Tensor, dict]:
    side = model.unet.config.sample_size
    z = torch.randn(batch, 4, side, side, device=model.device, dtype=model.dtype)
    context = model.context(["a lemon"] * batch)
    return z, context, model.unet.keys_values(context)


def card(b: Bench) -> None:
    """The rate of a large matrix product: what the UNet's rates are to be compared with."""
    n = 8192 if b.size == "sd15" else 128
    for name in DTYPES:
        x = torch.randn(n, n, device=b.device, dtype=b.model(name).dtype)
        b.say(f"product of {n} × {n} matrices, {name}", f"{2 * n**3 / b.seconds(lambda: x @ x) / 1e12:.3g} TFLOP/s")


def unet(b: Bench, compiled: bool = False) -> None:
    for name in ("bf16", "fp16"):
        model = b.model(name)
        config = model.unet.config
        flop = arithmetic.forward(config, config.sample_size, tokens=model.text.config.max_tokens)
        backend = "inductor" if b.size == "sd15" else "eager"  # the tiny size is about these lines, not about speed
        run = torch.compile(model.unet, backend=backend) if compiled else model.unet
        theirs = None if compiled else diffusers_unet(model)
        for batch in (1, 2, 4, 8):
            z, context, kv = inputs(model, batch)
            took = b.seconds(lambda: run(z, 501, kv))
            beside, goal = "", ""
            if theirs:
                other = b.seconds(lambda: theirs(z, 501, context, return_dict=False))
                beside, goal = f"; diffusers {1e3 * other:.2f} ms, ratio {took / other:.2f}", "ratio 0.9"
            b.say(f"UNet, {name}, batch {batch}, {'compiled' if compiled else 'eager'}",
                  f"{1e3 * took:.2f} ms, {batch * flop / took / 1e12:.3g} TFLOP/s{beside}", goal)


def diffusers_unet(model: Model) -> torch.nn.Module | None:
    """diffusers' UNet with the same weights; None where diffusers is not installed, or the sizes are not SD1.5's."""
    if model.unet.config != UNetConfig():
        return None
    with suppress(ImportError):
        from diffusers import UNet2DConditionModel
        down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
        up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
        with torch.device(model.device):
            net = UNet2DConditionModel(sample_size=64, down_block_types=down, up_block_types=up, attention_head_dim=8,
                                       cross_attention_dim=model.unet.config.context_dim)
        net.to(model.dtype).requires_grad_(False).load_state_dict(model.unet.state_dict())
        return net
    return None


def whole(b: Bench) -> None:
    """From the picture's file to the variation's pixels; each further variation with the replay kept; RIVAL's rows."""
    model = b.model()
    for name, method, goal in ("attention", ATTENTION, "2.5 s"), ("noise", NOISE, ""):
        job = lambda n=1: isadca.vary(model, isadca.invert(model, REF, b.steps), "a lemon", method, range(n))
        b.say(f"whole job, N = 1, {name} mix", f"{b.seconds(job, 3):.3f} s; peak memory {b.peak(job)}", goal + ", 4 GB")
        ref = isadca.invert(model, REF, b.steps)
        kept = list(isadca.replay(model, ref))
        more = lambda: isadca.vary(model, ref, "a lemon", method, (1,), replayed=kept)
        b.say(f"each further variation of a kept replay, {name} mix", f"{b.seconds(more, 3):.3f} s", "0.5 s")
        n = 16 if b.size == "sd15" else 4
        b.say(f"whole job, N = {n}, {name} mix",
              f"{b.seconds(lambda: job(n), 0):.2f} s; peak memory {b.peak(lambda: job(n))}")
    b.say("whole job, RIVAL's rows (four a step, no keys kept)", f"{b.seconds(lambda: rival(b, model), 3):.3f} s")


def rival(b: Bench, model: Model) -> None:
    """The same networks under the rows [reference, picture] × guidance halves; see benchmark_others.py."""
    ref, halves = isadca.invert(model, REF, b.steps), [0, 0, 2, 2]
    kv, z = model.unet.keys_values(model.context(["", "", "", "a lemon"])), ref.chain[-1:]

    def attend_rival(q, k, v, site):
        if site.kind != "self":
            return attend(q, k, v, site)
        return attend(q, torch.cat([k[halves], k], 2), torch.cat([v[halves], v], 2), site)
    for i, stride in enumerate(model.schedule.steps(b.steps)):
        seen = ref.chain[b.steps - i][None]
        _, eps_u, _, eps_c = model.noise(torch.cat([seen, z, seen, z]), stride.t, kv, attend_rival).split(1)
        z = model.schedule.step(z, eps_u + 7 * (eps_c - eps_u), stride)
    to_images(model.decode(z))


def guided_step(model: Model, steps: int, method: isadca.Method) -> Callable[[], Tensor]:
    """One step in the middle, its reference already replayed."""
    t = model.schedule.steps(steps)[steps // 2].t
    ref = isadca.invert(model, REF, 1)
    ref = isadca.Reference(ref.image, ref.chain[[0] * (steps + 1)])
    [seen] = [seen for seen in isadca.replay(model, ref, lambda each: each == t) if seen]
    [told] = isadca.conditions(model, ref, [isadca.Run("a lemon", method)])
    controls = isadca.Controls(ref.chain[:1], t, 0, steps, method.lam_at(t, 1000), told, seen.kv, seen.eps, None,
                               method, attend)
    return lambda: isadca.predict(model, controls).mixed


def overhead(b: Bench) -> None:
    """The paper's +2.63 %: a guided step with λ and DCA over one with ISA alone, in alternation."""
    for name in DTYPES:
        model = b.model(name)
        alone = guided_step(model, b.steps, isadca.Method(lam=1.0, ip_scale=0.0))
        for mix, method in ("attention", ATTENTION), ("noise", NOISE):
            step = guided_step(model, b.steps, method)
            pairs = [(b.seconds(step, 5), b.seconds(alone, 5)) for _ in range(3)]
            ratio = statistics.median(ours / base for ours, base in pairs)
            b.say(f"λ and DCA over ISA alone, {mix} mix, {name}", f"{ratio:.4f} ({1e3 * pairs[-1][1]:.2f} ms alone)",
                  "1.0263" if mix == "attention" else "")


def profile(b: Bench) -> None:
    """One guided step: how long the GPU idles between kernels; on a CPU, what takes longest."""
    from torch.profiler import ProfilerActivity
    step = guided_step(b.model(), b.steps, ATTENTION)
    step()
    cuda = b.device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as seen:
        step()
        b.wait()
    if not cuda:
        by_time = sorted(seen.key_averages(), key=lambda each: -each.self_cpu_time_total)[:3]
        return b.say("a guided step spends most in", ", ".join(each.key for each in by_time))
    spans = sorted((event.time_range.start, event.time_range.end) for event in seen.events()
                   if event.device_type == torch.autograd.DeviceType.CUDA)
    end, gaps = spans[0][1], []
    for start, stop in spans[1:]:
        gaps.append(max(0.0, start - end))
        end = max(end, stop)
    b.say("a guided step: idle of the device", f"{100 * sum(gaps) / (end - spans[0][0]):.1f} % of "
          f"{(end - spans[0][0]) / 1e3:.2f} ms; longest gap {max(gaps):.0f} µs of {len(spans)} kernels", "one launch")


def precision(b: Bench) -> None:
    """A few steps from the same weights in each precision, as pictures: grey levels apart, of 255."""
    steps, pictures = min(b.steps, 10), []
    for name in ("fp32", *DTYPES):
        model = random_model(b.size, b.device, DTYPES.get(name, torch.float32))
        [picture] = isadca.vary(model, isadca.invert(model, REF, steps), "a lemon", ATTENTION)
        pictures.append(to_tensor(picture))
        apart = 127.5 * (pictures[-1] - pictures[0]).abs()
        b.say(f"picture after {steps} steps, {name}, from fp32's", f"{apart.mean():.2f} grey levels, {apart.max():.0f} "
              "at most")


PARTS: dict[str, Callable[[Bench], None]] = {
    "card": card, "unet": unet, "whole": whole, "overhead": overhead, "profile": profile, "precision": precision,
    "compiled": lambda b: unet(b, compiled=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=7, help="no part begins later (%(default)s)")
    parser.add_argument("--what", default=",".join(PARTS), help="some of %(default)s, in that order")
    parser.add_argument("-o", "--out", type=Path, default=Path("gpu.md"))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    args.out.write_text(f"{args.size}, {where}, torch {torch.__version__}, {datetime.date.today()}, {args.steps} steps"
                        "\n\n| what | measured | goal |\n|---|---|---|\n", encoding="utf-8")
    b = Bench(args.size, args.device, args.steps, args.out, time.monotonic() + 60 * args.minutes)
    for name in args.what.split(","):
        if time.monotonic() > b.until:
            b.say(name, "no time was left")
            continue
        try:
            PARTS[name](b)
        except Exception as error:  # the next part may still work
            b.say(name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


if __name__ == "__main__":
    main()
