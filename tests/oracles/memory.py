"""How many bytes of tensors live at once: torch's own calls are watched, on any device, "meta" too."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that the tensors made under it held at once. A view counts nothing of its own."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self.key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and self.key(x) not in given and x.untyped_storage() not in self.seen:
                self.count(x.untyped_storage())
        return result

    @staticmethod
    def key(x: torch.Tensor) -> int:
        return x.untyped_storage()._cdata

    def count(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size
