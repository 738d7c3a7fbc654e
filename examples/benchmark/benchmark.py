"""isadca beside diffusers and RIVAL's row layout: same weights, in alternation, several rounds, medians and ratios.

    python examples/benchmark/benchmark.py -o benchmark.md                # the demo checkpoint, on the CPU
    python examples/benchmark/benchmark.py --size sd15 --what unet,vae,clip,load    # random weights, true shapes
    python examples/benchmark/benchmark.py --device cuda --dtype fp16 --size sd15

A ratio is ours / theirs. Where the column `difference` is filled, both compute the same thing, to rounding. Needs the
test extra (diffusers, transformers) and a machine that does nothing else. "system" is the share of CPU time that our
side spent in the operating system's kernel; it is high where an allocator returns its pages.
"""

import argparse
import datetime
import inspect
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import benchmark_others as others
import diffusers
import torch
from bench import REF, Bench
from benchmark_sd15 import random_sd15
from transformers import CLIPVisionModelWithProjection

import isadca
from isadca.attention import attend
from isadca.common.images import clip_pixels
from isadca.loading.load import default_weights

HERE = Path(__file__).resolve().parent


# ---- networks ----------------------------------------------------------------------------------------------------

def unet(b: Bench) -> None:
    config = b.model.unet.config
    for batch in (1, 2, 4):
        z = torch.randn(batch, 4, config.sample_size, config.sample_size).to(b.device, b.dtype)
        context = b.model.context([""] * batch)
        t = torch.tensor(501, device=b.device)
        b.compare(f"UNet, one forward, batch {batch}", lambda: b.model.unet(z, t, context),
                  lambda: b.pipe.unet(z, t, context, return_dict=False)[0])


def bf16(b: Bench) -> None:
    """Ours in bfloat16 beside ours in float32: whether the CPU has it in hardware."""
    config, half = b.model.unet.config, isadca.load(b.folder, device=str(b.device), dtype="bf16")
    for batch in (1, 2, 4):
        z = torch.randn(batch, 4, config.sample_size, config.sample_size).to(b.device)
        context = [model.context([""] * batch) for model in (half, b.model)]
        b.compare(f"UNet in bfloat16, batch {batch}", lambda: half.noise(z, 501, context[0]),
                  lambda: b.model.noise(z, 501, context[1]), "ours in float32")


def vae(b: Bench) -> None:
    z = b.model.encode(b.pixels).to(b.dtype)
    b.compare("VAE, encode", lambda: b.model.vae.encode(b.pixels),
              lambda: b.pipe.vae.encode(b.pixels).latent_dist.mode() * b.pipe.vae.config.scaling_factor)
    b.compare("VAE, decode", lambda: b.model.vae.decode(z),
              lambda: b.pipe.vae.decode(z / b.pipe.vae.config.scaling_factor, return_dict=False)[0])


def clip(b: Bench) -> None:
    ids = b.model.tokenizer(["a lemon", ""]).to(b.device)
    b.compare("CLIP text, 2 prompts", lambda: b.model.text(ids), lambda: b.pipe.text_encoder(ids)[0])
    if b.model.vision is not None:
        theirs = CLIPVisionModelWithProjection.from_pretrained(b.model.files["vision"].parent).to(b.device, b.dtype)
        x = clip_pixels(b.image, b.model.vision.config.image_size).to(b.device, b.dtype)
        b.compare("CLIP image", lambda: b.model.vision(x)[0], lambda: theirs(x).image_embeds)


# ---- whole processes ---------------------------------------------------------------------------------------------

PEAK = "from pathlib import Path\n" + inspect.getsource(others.peak_megabytes)  # its module imports diffusers
LOAD = PEAK + """
import gc, json, sys, time
import isadca.loading.load
gc.collect()  # of what the imports left
began = time.perf_counter()
model = isadca.load(sys.argv[1], ip_adapter="none", device="cpu", dtype="fp32")
took = time.perf_counter() - began
touched = sum(float(p.flatten()[0]) for net in (model.unet, model.vae, model.text) for p in net.parameters())
print(json.dumps({"seconds": took, "MB": peak_megabytes()}))
"""
VARY = PEAK + """
import sys
from isadca.app.cli import main
main() and exit("failed")
print(peak_megabytes())
"""


def run_python(args: list[str]) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True, cwd=HERE).stdout


def load(b: Bench) -> None:
    """In fresh processes, imports not counted, files in the page cache; the memory is that of the whole process."""
    found: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(b.rounds + 1):
        for side, command in (("ours", ["-c", LOAD]), ("theirs", ["benchmark_others.py", "load"])):
            found[side].append(json.loads(run_python([*command, str(b.folder)]).splitlines()[-1]))
    middle = {(side, key): statistics.median(x[key] for x in runs[1:]) for side, runs in found.items()
              for key in ("seconds", "MB")}
    b.add("load", middle["ours", "seconds"], middle["theirs", "seconds"], "diffusers")
    b.add("peak memory, load", middle["ours", "MB"], middle["theirs", "MB"], "diffusers", unit="MB")


def cold(b: Bench) -> None:
    """From the shell to the picture on disk: 50 steps of inversion, 50 of sampling; and the most memory it took."""
    with tempfile.TemporaryDirectory() as out:
        commands = [["-c", VARY, "vary", str(REF), "a lemon", "-q", "-o", f"{out}/a.png", "--weights", str(b.folder),
                     "--device", "cpu"],
                    ["benchmark_others.py", "job", str(REF), "a lemon", f"{out}/b.png", str(b.folder)]]
        times, memory = ([], []), ([], [])
        for _ in range(b.rounds):
            for side, command in enumerate(commands):
                began = time.perf_counter()
                memory[side].append(float(run_python(command).split()[-1]))
                times[side].append(time.perf_counter() - began)
    who = "diffusers: inversion, IP-Adapter"
    b.add("cold job", *map(statistics.median, times), who)
    b.add("peak memory, job", *map(statistics.median, memory), who, unit="MB")


# ---- the method --------------------------------------------------------------------------------------------------

def vary(b: Bench, method: isadca.Method, n: int = 1) -> list:
    ref = isadca.invert(b.model, b.image, b.steps)
    return isadca.vary(b.model, ref, "a lemon", method, range(n))


def rival(b: Bench, n: int = 1) -> list[torch.Tensor]:
    chain = others.invert(b.pipe, b.pixels, b.steps)
    return [others.rival(b.pipe, chain, "a lemon") for _ in range(n)]


ATTENTION, NOISE = isadca.Method(mix="attention"), isadca.Method(mix="noise")


def job(b: Bench) -> None:
    b.compare("job, N = 1, attention mix", lambda: vary(b, ATTENTION), lambda: rival(b), "RIVAL, 5 rows a step")
    b.compare("job, N = 1, noise mix", lambda: vary(b, NOISE), lambda: rival(b), "RIVAL, 5 rows a step")


def many(b: Bench) -> None:
    """Once each, without rounds: it takes minutes."""
    several = {name: isadca.Method(mix=name, init="shuffle") for name in ("attention", "noise")}
    for name, method in several.items():
        b.add(f"N = 16, {name} mix", b.seconds(lambda: vary(b, method, 16)), b.seconds(lambda: rival(b, 16)),
              "RIVAL, 16 times")


def still(b: Bench) -> isadca.Reference:
    """A reference whose chain repeats one latent: a step costs the same, and no inversion is needed."""
    ref = isadca.invert(b.model, b.image, 1)
    return isadca.Reference(ref.image, ref.chain[[0] * (b.steps + 1)])


ALONE = isadca.Method(lam=1.0, ip_scale=0.0)  # ISA, without an image branch


def guided_step(b: Bench, method: isadca.Method) -> Callable:
    """One step in the middle of a job, its reference replayed; on the demo 20 such steps, long enough to time."""
    ref, t = still(b), b.model.schedule.steps(b.steps)[b.steps // 2].t
    [seen] = [seen for seen in isadca.replay(b.model, ref, lambda each: each == t) if seen]
    [told] = isadca.conditions(b.model, ref, [isadca.Run("a lemon", method)])
    controls = isadca.Controls(ref.chain[:1], t, 0, b.steps, method.lam_at(t, 1000), told, seen.kv, seen.eps, None,
                               method, attend)
    return lambda: [isadca.predict(b.model, controls).mixed for _ in range(1 if b.model.size >= 512 else 20)]


def overhead(b: Bench) -> None:
    """The paper's +2.63 %, for one guided step: with λ and DCA, over a step with ISA alone."""
    alone = guided_step(b, ALONE)
    b.compare("λ and DCA over ISA alone, a step, attention mix", guided_step(b, ATTENTION), alone, "ours")
    b.compare("λ and DCA over ISA alone, a step, noise mix", guided_step(b, NOISE), alone, "ours")


def profile(b: Bench) -> None:
    """Where a guided step's time goes, by torch's operators; what is left of the clock's time is Python."""
    for name, method in {"plain": isadca.PRESETS["plain"], "ISA": ALONE, "attention mix": ATTENTION}.items():
        run = guided_step(b, method)
        run()
        took = statistics.median(b.seconds(run) for _ in range(b.rounds))
        with torch.profiler.profile() as seen:
            run()
        times = {event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
        most = sorted(times, key=times.__getitem__, reverse=True)[:8]
        parts = ", ".join(f"{key} {times[key] / sum(times.values()):.0%}" for key in most)
        b.say(f"a guided step, {name}: {took:.3g} s, in operators {sum(times.values()):.3g} s: {parts}")


def chunks(b: Bench) -> None:
    """The replay, by how many steps go through the UNet at once; and the keys and values that a chunk holds."""
    ref = still(b)

    def run(m: int) -> float:
        largest = 0
        for seen in isadca.replay(b.model, ref, at_once=m):
            largest = max(largest, sum(x.numel() * x.element_size() for pair in seen.kv.values() for x in pair))
        return m * largest / 2**20
    for m in (m for m in (1, 5, 10, 50) if m <= b.steps):
        held = run(m)
        took = statistics.median(b.seconds(lambda: run(m)) for _ in range(b.rounds))
        b.say(f"replay, {m} steps at once: {took / b.steps:.3g} s a step, {held:.0f} MiB of keys and values")


def growth(b: Bench) -> None:
    """Time against N, steps and resolution, and the straight line through each."""
    size = b.model.size
    def at(n: int = 1, steps: int = 20, side: int = size) -> float:
        def run():
            ref = isadca.invert(b.model, b.image, steps, size=side)
            isadca.vary(b.model, ref, "a lemon", isadca.Method(mix="attention", init="shuffle"), range(n))
        run()
        return statistics.median(b.seconds(run) for _ in range(b.rounds))
    counts, steps, sides = (1, 2, 4, 8, 16), (10, 20, 40, 80), (size, 2 * size, 3 * size)
    for name, xs, times in [("N", counts, [at(n=n) for n in counts]), ("steps", steps, [at(steps=s) for s in steps]),
                            ("pixels", [side**2 for side in sides], [at(side=side) for side in sides])]:
        slope, offset = statistics.linear_regression(xs, times)
        measured = ", ".join(f"{x}: {t:.2f} s" for x, t in zip(xs, times))
        b.say(f"{name}: {measured}; about {offset:.2f} s + {slope:.3g} s × {name}")


MEASURES = {"unet": unet, "bf16": bf16, "vae": vae, "clip": clip, "load": load, "cold": cold, "job": job, "n": many,
            "overhead": overhead, "profile": profile, "chunks": chunks, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("demo", "sd15"), default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--what", default=",".join(MEASURES), help="some of %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="of a job (%(default)s); the cold job has 50")
    parser.add_argument("--sd15", type=Path, default=Path(tempfile.gettempdir()) / "isadca-sd15",
                        help="where the random weights of --size sd15 are kept, 7 GB (%(default)s)")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    folder = (default_weights() if args.size == "demo" else random_sd15(args.sd15)).resolve()
    bench = Bench(folder, args.device, args.dtype, args.rounds, args.steps)
    for name in args.what.split(","):
        MEASURES[name](bench)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    text = (f"{bench.table()}\n\n*{args.size}, {str(bench.dtype).removeprefix('torch.')}, {device} "
            f"({platform.machine()}), torch {torch.__version__}, diffusers {diffusers.__version__}, medians of "
            f"{args.rounds} rounds, {datetime.date.today()}: "
            f"`python examples/benchmark/benchmark.py {' '.join(sys.argv[1:])}`*\n")
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
