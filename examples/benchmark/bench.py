"""Both sides of benchmark.py, loaded, and how they are timed: in alternation, several rounds, medians.

Not a script.
"""

import gc
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import benchmark_others as others
import torch

import isadca
from isadca.common.images import to_tensor

REF = Path(__file__).resolve().parents[1] / "cat.png"
GOALS = {"UNet, one forward, batch 1": "0.8 (demo), 0.95 (sd15)", "load": "0.4 (demo), 0.5 (sd15)", "cold job": "0.5",
         "job, N = 1, attention mix": "0.75", "N = 16, attention mix": "0.55", "N = 16, noise mix": "1.0",
         "λ and DCA over ISA alone, a step, attention": "1.0263", "peak memory, load": "1.0", "peak memory, job": "1.0"}


class Bench:
    """Both sides loaded, and the table as it grows."""

    def __init__(self, folder: Path, device: str, dtype: str, rounds: int, steps: int):
        self.folder, self.rounds, self.steps, self.rows = folder, rounds, steps, []
        self.model = isadca.load(folder, device=device, dtype=dtype)
        self.device, self.dtype = self.model.device, self.model.dtype
        self.pipe = others.load_pipeline(folder, device, self.dtype)
        self.image = isadca.load_image(REF).resize((self.model.size, self.model.size))
        self.pixels = to_tensor(self.image).to(self.device, self.dtype)

    def compare(self, name: str, ours: Callable, theirs: Callable, by: str = "diffusers") -> None:
        """Time both in alternation after a warm-up each; outputs that are tensors are compared."""
        first, second = ours(), theirs()
        tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        differs = f"{(first.float() - second.float()).abs().max().item():.1e}" if tensors else ""
        times, system, spent = ([], []), 0.0, 0.0
        for _ in range(self.rounds):
            for side, run in enumerate((ours, theirs)):
                before = resource.getrusage(resource.RUSAGE_SELF)
                times[side].append(self.seconds(run))
                after = resource.getrusage(resource.RUSAGE_SELF)
                if side == 0:
                    system += after.ru_stime - before.ru_stime
                    spent += after.ru_stime - before.ru_stime + after.ru_utime - before.ru_utime
        self.add(name, statistics.median(times[0]), statistics.median(times[1]), by, differs,
                 f"{100 * system / max(spent, 1e-9):.0f} %")

    def seconds(self, run: Callable) -> float:
        gc.collect()
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def add(self, name: str, ours: float, theirs: float, by: str, differs: str = "", system: str = "",
            unit: str = "s") -> None:
        goal = next((goal for start, goal in GOALS.items() if name.startswith(start)), "")
        cells = [name, f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", by, f"**{ours / theirs:.2f}**", goal, differs,
                 system]
        self.rows.append(cells)
        print(" | ".join(cells), flush=True)

    def say(self, line: str) -> None:
        self.rows.append([line, "", "", "", "", "", "", ""])
        print(line, flush=True)

    def table(self) -> str:
        head = ["what", "ours", "theirs", "who", "ratio", "goal", "difference", "system"]
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *self.rows])
