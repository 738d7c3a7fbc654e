"""The published weights: listed in fetch.tsv by commit, size and sha256, downloaded, verified, then moved into place.

huggingface_hub brings HF_ENDPOINT, HF_HUB_OFFLINE, tokens and the progress bar. Its http_get is used rather than
hf_hub_download, which starts again from nothing after a run that was cut off.
"""

import contextlib
import errno
import os
import shlex
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from ..common.files import sha256
from ..common.problem import Problem
from .console import note

PROXY = "look at HF_ENDPOINT and proxies"


class Pinned(NamedTuple):
    """A line of fetch.tsv. It belongs to `names`; `file` lies under `folder` here as it does in the repository."""

    names: tuple[str, ...]
    folder: str
    repository: str
    revision: str  # a commit; a branch where no commit is known
    file: str
    size: int      # bytes
    sha256: str    # "-" where it is not known

    def target(self, to: Path) -> Path:
        return to / self.folder / self.file

    def __str__(self) -> str:
        return f"{self.repository}/{self.file}"


def _read() -> list[Pinned]:
    lines = Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return [Pinned(tuple(names.split(",")), folder, repository, revision, file, int(size), sha256)
            for names, folder, repository, revision, file, size, sha256 in rows]


PINNED = _read()


def names() -> dict[str, int]:
    """What can be fetched -> bytes."""
    known = dict.fromkeys(name for item in PINNED for name in item.names)
    return {name: sum(item.size for item in PINNED if name in item.names) for name in known}


def wanted(asked: list[str]) -> list[Pinned]:
    """The files of the named sets, each once; "all" is every set. Raises Problem for an unknown name."""
    for name in asked:
        if name not in (*names(), "all"):
            raise Problem(f"{name!r} is nothing to fetch, expected all or some of {', '.join(names())}")
    return [item for item in PINNED if "all" in asked or set(asked) & set(item.names)]


def missing(items: list[Pinned], to: Path) -> list[Pinned]:
    """The files that are not there yet. Raises Problem for one that is there but differs, and for a full disk."""
    for item in items:
        if item.target(to).exists() and (why := _differs(item, item.target(to))):
            raise Problem(f"{item.target(to)}: is not the published file ({why}); move it away and fetch again")
    absent = [item for item in items if not item.target(to).exists()]
    resumed = sum(_part(item, to).stat().st_size for item in absent if _part(item, to).exists())
    to_come = sum(item.size for item in absent) - resumed
    here = next(folder for folder in (to.absolute(), *to.absolute().parents) if folder.exists())
    free = shutil.disk_usage(here).free
    if to_come > free:
        raise Problem(f"{to}: {to_come / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free; choose another --to")
    return absent


def download(item: Pinned, to: Path) -> None:
    """Download one file. A download that is cut off leaves NAME.part, where the next one goes on. Raises Problem."""
    part = _part(item, to)
    try:
        _download(item, part)
    except Problem:
        raise
    except Exception as error:  # the HTTP library below huggingface_hub has errors of its own
        raise Problem(_explain(error, item, to)) from None
    if why := _differs(item, part):
        part.unlink()
        raise Problem(f"{item}: what came is not the pinned file ({why}) and was deleted; fetch again, or {PROXY}")
    os.replace(part, item.target(to))


def _part(item: Pinned, to: Path) -> Path:
    return item.target(to).with_name(item.target(to).name + ".part")


def _download(item: Pinned, part: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    url = hf_hub_url(item.repository, item.file, revision=item.revision)
    offered = get_hf_file_metadata(url).size
    if offered not in (None, item.size):
        raise Problem(f"{item}: {offered} bytes are offered, {item.size} are pinned; {PROXY}")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        _lock(file, part)
        if file.tell() > item.size:
            file.seek(0)
            file.truncate()
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # the bytes that are counted and resumed
        bounded: Any = Bounded(file, item)  # as much of a file as http_get uses
        http_get(url, bounded, resume_size=file.tell(), headers=headers, expected_size=item.size,
                 displayed_filename=item.file)


class Bounded:
    """A file that takes no more than the pinned bytes, whatever a server sends."""

    def __init__(self, file, item: Pinned):
        self.tell, self.item, self._write = file.tell, item, file.write

    def write(self, block: bytes) -> int:
        if self.tell() + len(block) > self.item.size:
            raise Problem(f"{self.item}: more came than the {self.item.size} pinned bytes; {PROXY}")
        return self._write(block)


def _lock(file, part: Path) -> None:
    """Two fetches at once would spoil a .part file. Without such locks on this system, nothing is done."""
    with contextlib.suppress(ImportError):
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"{part}: another isadca fetch writes it; wait for that one, then fetch again") from None


def _differs(item: Pinned, path: Path) -> str:
    """Why a file is not the pinned one; "" if it is. Where no checksum is known the size decides."""
    if not path.is_file():
        return "not a file"
    if path.stat().st_size != item.size:
        return f"{path.stat().st_size} bytes, expected {item.size}"
    found = sha256(path) if item.sha256 != "-" else "-"
    return "" if found == item.sha256 else f"sha256 {found[:12]}..., expected {item.sha256[:12]}..."


def _explain(error: Exception, item: Pinned, to: Path) -> str:
    """One line: what went wrong, and what to do."""
    again = "fetch again, it goes on where it stopped"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"{item}: HF_HUB_OFFLINE is set; unset it, or put the file at {item.target(to)}"
    if status in (401, 403):
        return (f"{item}: not open to you ({status}); accept its terms at https://huggingface.co/{item.repository} and "
                "log in with: hf auth login (or set HF_TOKEN)")
    if status:
        return f"{item}: " + (f"not there at {item.revision} (404); look at HF_ENDPOINT" if status == 404 else
                              f"the server answered {status}; {again}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{item.target(to)}: the disk is full; make room, then {again}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: cannot write there ({error.strerror}); choose another --to"
    return f"{item}: the download broke off ({str(error).partition(chr(10))[0] or type(error).__name__}); {again}"


def next_steps(items: list[Pinned], to: Path) -> list[str]:
    """The commands to run once the files are there."""
    targets = [item.target(to) for item in items]
    steps = [f"isadca convert {shlex.quote(str(path))} -o {shlex.quote(str(path.with_suffix('.safetensors')))}"
             for path in targets if path.suffix == ".bin"]
    if not any(item.folder == "sd15" for item in items):
        return steps
    folder, single = to / "sd15", to / "sd15" / "v1-5-pruned-emaonly.safetensors"
    if not (folder / "unet").is_dir() and not single.is_file():
        return [*steps, f"isadca fetch sd15 --to {shlex.quote(str(to))}"]
    flags = ["--weights", str(folder if (folder / "unet").is_dir() else single)]
    for flag, start in [("--ip-adapter", "ip-adapter"), ("--vae", "vae-ft-mse")]:
        files = [path for path in targets if path.name.startswith(start)]
        if len(files) == 1 and files[0].name != "ip-adapter_sd15.safetensors":  # which is found by itself
            flags += [flag, str(files[0])]
    return [*steps, f"isadca vary PICTURE PROMPT -o out.png {shlex.join(flags)}"]


def fetch(args: Namespace) -> None:
    items = wanted(args.names)
    absent = missing(items, args.to)
    note(f"{len(items) - len(absent)} of {len(items)} files are there and verified; "
         f"to download: {sum(item.size for item in absent) / 1e9:.2f} GB")
    for item in items:
        if item in absent:
            download(item, args.to)
        print(item.target(args.to))
    for what, files in [("verified by size alone, no checksum is known", [i.file for i in items if i.sha256 == "-"]),
                        ("from the branch main, no commit is known", [i.file for i in items if i.revision == "main"])]:
        if files:
            note(f"{what}: {', '.join(files)}")
    for step in next_steps(items, args.to):
        note(f"next: {step}")
