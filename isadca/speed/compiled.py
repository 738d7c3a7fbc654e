"""A model whose UNet is compiled once, for any `attend`. As `attend` is a new function at every step, torch.compile
would compile each one again; so it is shown a single opaque operator, which calls the `attend` of the moment."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import KV, Attend, Site, attend as plain_attend, repeat_rows
from ..common.problem import Problem
from ..networks.model import Model
from ..networks.unet import Edit

_attend: ContextVar[Attend] = ContextVar("attend")


@torch.library.custom_op("isadca::attend", mutates_args=())
def attend_of_the_moment(q: Tensor, k: Tensor, v: Tensor, name: str, kind: str, place: str, layer: int,
                         hw: list[int]) -> Tensor:
    """`attend(q, k, v, site)`, the site's fields one by one. Compiled code writes over its memory as it goes, while
    `capture` keeps what it is given and others keep what they return: so everything goes in and out as a copy."""
    y = _attend.get()(q.clone(), k.clone(), v.clone(), Site(name, kind, place, layer, (hw[0], hw[1])))
    return torch.empty_like(q).copy_(y)


attend_of_the_moment.register_fake(lambda q, *others: torch.empty_like(q))


@dataclass(kw_only=True, repr=False, eq=False)
class CompiledModel(Model):
    """Computes what the model does, to rounding and without gradients. With `edit`, nothing is compiled."""

    forward: Callable

    def noise(self, z: Tensor, t: Tensor | int, context: Tensor | KV, attend: Attend = plain_attend,
              edit: Edit | None = None) -> Tensor:
        if edit is not None:
            return super().noise(z, t, context, attend, edit)
        kv = self.unet.keys_values(context) if isinstance(context, Tensor) else context
        each_row = {name: [repeat_rows(x, len(z)).contiguous() for x in pair] for name, pair in kv.items()}
        times = torch.zeros(len(z), dtype=torch.int64, device=z.device) + t  # of one shape, whatever t is
        before = _attend.set(attend)
        try:
            return self.forward(z.to(self.dtype), times, each_row).to(z.dtype)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:120]
            raise Problem(f"torch cannot compile here ({reason}); leave out --compile") from error
        finally:
            _attend.reset(before)


def compile_model(model: Model, **options) -> CompiledModel:
    """Its first call compiles, for one row or for any number of them. `options` are torch.compile's."""
    call = lambda q, k, v, site: attend_of_the_moment(q, k, v, *site[:4], list(site.hw))
    forward = torch.compile(lambda z, t, kv: model.unet(z, t, kv, call), fullgraph=True, **options)
    return CompiledModel(**vars(model), forward=torch.no_grad()(forward))
