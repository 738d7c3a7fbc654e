"""Several processes on one folder of results, as torchrun starts them."""

import os
import socket
from datetime import timedelta

import torch

from ..common.problem import Problem


def join() -> tuple[int, int]:
    """This process's number and how many there are. Raises Problem where they cannot meet."""
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isascii() and text.isdigit() and len(text) < 7 for text in texts) or int(texts[0]) >= int(texts[1]):
        raise Problem(f"the environment has RANK {texts[0][:20]!r} of WORLD_SIZE {texts[1][:20]!r}, expected a number "
                      "below another; torchrun sets both")
    rank, ranks = map(int, texts)
    if ranks > 1 and not torch.distributed.is_initialized():
        try:
            socket.getaddrinfo(os.environ.get("MASTER_ADDR", "localhost"), None)  # torch tries for minutes
            torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
        except (ValueError, RuntimeError, OSError) as error:
            raise Problem(f"the processes do not find each other ({str(error)[:120]}); start all of them with "
                          "torchrun") from None
    return rank, ranks


def wait_for_others() -> None:
    """Returns when every process has come here, even the one with the slowest share."""
    if torch.distributed.is_initialized():
        try:
            torch.distributed.monitored_barrier(timeout=timedelta(days=7))
        except RuntimeError as error:
            raise Problem(f"another process ended early ({str(error)[:120]}); start all again") from None


def own_device(name: str) -> str:
    """Under torchrun each process has a GPU of its own."""
    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own and name in ("auto", "cuda") and torch.cuda.is_available() else name
