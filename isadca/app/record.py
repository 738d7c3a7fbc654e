"""The attention maps of a run, kept as they pass through the seam."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ..attention import Attend, Site, attend, attention_probs
from ..loop import Controls, attends
from ..methods import ISADCA, Method


class Map(NamedTuple):
    """One call of the kernel: N queries by M keys, the mean over heads. ISA's keys are [reference, self]."""

    site: Site
    t: int
    branch: int    # 0 is ISA and 1 is DCA where their noise is mixed; the number of a `Guided` row; else 0
    probs: torch.Tensor  # (N,M)


class record:
    """Keeps in `maps` the attention that `wanted` asks for, while `method` runs; the picture stays the same.

        recorder = isadca.record(isadca.PRESETS["isadca"], lambda site, t, branch: site.place == "up" and t > 500)
        pictures = isadca.vary(model, ref, "a lemon", recorder.method)

    `row` is the batch's row that is kept; the last is the last variation's, in the text half. Attention that bypasses
    `controls.kernel` is not seen. To record a UNet call of your own, pass `recorder.kernel(t)` to it as `attend`.
    """

    def __init__(self, method: Method = ISADCA, wanted: Callable[[Site, int, int], bool] = lambda *at: True,
                 row: int = -1):
        self.maps: list[Map] = []
        self.recorded, self.wanted, self.row, self.branch = method, wanted, row, 0
        self.method = replace(method, mix=self._mix, k=0, t_start=ISADCA.t_start)  # steps without control, too

    def kernel(self, t: int, kernel: Attend = attend) -> Attend:
        def attend_kept(q, k, v, site):
            if self.wanted(site, t, self.branch):
                wide = torch.promote_types(q.dtype, torch.float32)
                heads = zip(q[self.row].to(wide), k[self.row].to(wide))  # one by one, for memory
                probs = sum(attention_probs(q_head, k_head) for q_head, k_head in heads) / q.shape[1]
                self.maps.append(Map(site, t, self.branch, probs))
            return kernel(q, k, v, site)
        return attend_kept

    def _mix(self, controls: Controls):
        own, kernel = self.recorded, self.kernel(controls.t, controls.kernel)
        method = replace(controls.method, mix=own.mix, k=own.k, t_start=own.t_start)
        made = attends(controls._replace(method=method, kernel=kernel))
        if isinstance(made, list):
            return [row._replace(attend=partial(self._told, i, row.attend)) for i, row in enumerate(made)]
        return tuple(partial(self._told, i, f) for i, f in enumerate(made)) if isinstance(made, tuple) else made

    def _told(self, branch: int, f: Attend, *of_layer) -> torch.Tensor:
        self.branch = branch
        return f(*of_layer)
