"""The attention maps of a run, kept as they pass through the seam."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import Attend, Site, attend, attention_probs
from ..loop import Controls, attends
from ..methods import ISADCA, Method


class Map(NamedTuple):
    """One call of the kernel. N queries, M keys; ISA's keys are [reference, self]."""

    site: Site
    t: int
    branch: int    # 0 is ISA and 1 is DCA where their noise is mixed; the number of a `Guided` row; else 0
    probs: Tensor  # (N,M), the mean over heads


class record:
    """Keeps attention maps while a method runs; the picture stays the same.

        recorder = isadca.record(isadca.ISADCA, lambda site, t, branch: site.layer >= 10 and t > 500)
        pictures = isadca.vary(model, ref, "a lemon", recorder.method)
        site, t, branch, probs = recorder.maps[0]

    `wanted` says which. `row` is of the batch: the last is the last variation's, in the text half. What a method
    computes without `controls.kernel` is not seen. `recorder.kernel(t)` is an Attend for your own call of the UNet.
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
        own = {name: getattr(self.recorded, name) for name in ("mix", "k", "t_start")}
        kernel = self.kernel(controls.t, controls.kernel)
        made = attends(controls._replace(method=replace(controls.method, **own), kernel=kernel))
        if isinstance(made, list):
            return [row._replace(attend=self._told(i, row.attend)) for i, row in enumerate(made)]
        return tuple(map(self._told, (0, 1), made)) if isinstance(made, tuple) else self._told(0, made)

    def _told(self, branch: int, f: Attend) -> Attend:
        def attend_told(q, k, v, site):
            self.branch = branch
            return f(q, k, v, site)
        return attend_told
