"""Several processes on one folder of results, as torchrun starts them."""

import os
from datetime import timedelta

import torch

from ..common.problem import Problem


def join() -> tuple[int, int]:
    """This process's number and how many there are. Raises Problem where the environment says nonsense."""
    rank, ranks = _number("RANK", "0"), _number("WORLD_SIZE", "1")
    if rank >= ranks:
        raise Problem(f"the environment variable RANK is {rank}, expected less than WORLD_SIZE, which is {ranks}; "
                      "torchrun sets both")
    if ranks > 1 and not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
        except (ValueError, RuntimeError, OSError) as error:
            raise _apart(error) from None
    return rank, ranks


def wait_for_others() -> None:
    """Until every process is here; the slowest share is waited for."""
    if torch.distributed.is_initialized():
        try:
            torch.distributed.monitored_barrier(timeout=timedelta(days=7))
        except RuntimeError as error:
            raise _apart(error) from None


def own_device(name: str) -> str:
    """Under torchrun each process has a GPU of its own."""
    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own and name in ("auto", "cuda") and torch.cuda.is_available() else name


def _number(name: str, usual: str) -> int:
    text = os.environ.get(name, usual)
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise Problem(f"the environment variable {name} is {text[:40]!r}, expected a number; torchrun sets it")
    return int(text)


def _apart(error: Exception) -> Problem:
    return Problem(f"the processes do not find each other ({str(error)[:120]}); start all of them with torchrun")
