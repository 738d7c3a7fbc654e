"""isadca fetch, against a small server on this machine that speaks the hub's resolve addresses, and misbehaves."""

import contextlib
import fcntl
import hashlib
import os
import struct
import subprocess
import sys
import termios
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.file_download
import pytest
from conftest import ROOT

from isadca.app import fetch
from isadca.app.cli import main
from isadca.app.fetch import Pinned

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS, CONFIG = bytes(range(256)) * 1000, b'{"sample_size": 64}\n'
UNET = Pinned(("sd15",), "sd15", "someone/model", COMMIT, "unet/model.safetensors", len(WEIGHTS),
              hashlib.sha256(WEIGHTS).hexdigest())
UNET_CONFIG = UNET._replace(file="unet/config.json", size=len(CONFIG), sha256="-")


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        hub = self.server.hub
        if hub.down:  # the connection closes without a word
            return
        content = hub.files.get(self.path)
        status = hub.status or (200 if content is not None else 404)
        start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        content = (content or b"")[start:]
        self.send_response(206 if start and status == 200 else status)
        if not (body and hub.endless):
            self.send_header("Content-Length", str(len(content)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{start + len(content)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"an etag"')
        self.end_headers()
        if body:
            sent = content[:hub.drop_after]
            hub.down = len(sent) < len(content)
            hub.served.append((self.path, start, len(sent), self.headers["Authorization"]))
            self.wfile.write(sent)
            with contextlib.suppress(OSError):  # the other side has had enough
                for _ in range(100 if hub.endless else 0):
                    self.wfile.write(bytes(100_000))

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server; `files` by address, and its faults."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = SimpleNamespace(files={}, status=None, down=False, endless=False, drop_after=None, served=[],
                            url=f"http://127.0.0.1:{server.server_port}")
    for item, content in [(UNET, WEIGHTS), (UNET_CONFIG, CONFIG)]:
        state.files[f"/{item.repository}/resolve/{item.revision}/{item.file}"] = content
    server.hub = state
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest.py sets it
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        state.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is lost where a download breaks off
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(fetch, "PINNED", [UNET_CONFIG, UNET])
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, capsys):
    def run(*names) -> tuple[int, list[str], str]:
        code = main(["fetch", *(names or ["sd15"]), "--to", str(tmp_path / "w")])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err
    return run


def written(screen: int):
    """What arrived on a terminal that is closed by now; the end is an error."""
    with contextlib.suppress(OSError):
        while block := os.read(screen, 1 << 16):
            yield block


def files(folder) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def fails(run, *words) -> None:
    """Exit 2, the last line of standard error has the words, nothing on standard output."""
    code, out, err = run()
    last = err.splitlines()[-1]
    assert code == 2 and not [path for path in out if path.endswith("model.safetensors")]
    assert "Traceback" not in err and last.startswith("isadca: ") and all(word in last for word in words), last


# --- what works ---------------------------------------------------------------------------------------------------

def test_files_arrive_whole_and_are_not_fetched_twice(hub, run, tmp_path):
    code, out, err = run()
    assert code == 0 and out == [str(tmp_path / "w/sd15/unet" / name) for name in ("config.json", "model.safetensors")]
    assert (tmp_path / "w/sd15/unet/model.safetensors").read_bytes() == WEIGHTS
    assert "0 of 2 files are there" in err and "verified by size alone, no checksum is known: unet/config.json\n" in err
    assert f"next: isadca vary PICTURE PROMPT -o out.png --weights {tmp_path}/w/sd15\n" in err
    assert files(tmp_path / "w") == {"sd15/unet/config.json": len(CONFIG), "sd15/unet/model.safetensors": len(WEIGHTS)}
    served = len(hub.served)
    code, again, err = run()
    assert (code, again, len(hub.served)) == (0, out, served) and "2 of 2 files are there and verified" in err


def test_a_broken_download_goes_on_where_it_stopped(hub, run, tmp_path):
    """Two runs; every byte of the file is sent once."""
    hub.drop_after = 100_000
    fails(run, "someone/model/unet/model.safetensors", "broke off", "fetch again, it goes on")
    assert files(tmp_path / "w") == {"sd15/unet/config.json": 20, "sd15/unet/model.safetensors.part": 100_000}
    hub.down, hub.drop_after = False, None
    assert run()[0] == 0
    assert [(start, sent) for path, start, sent, _ in hub.served if path.endswith("safetensors")] == \
        [(0, 100_000), (100_000, 156_000)]
    assert (tmp_path / "w/sd15/unet/model.safetensors").read_bytes() == WEIGHTS
    assert not (tmp_path / "w/sd15/unet/model.safetensors.part").exists()


def test_what_a_damaged_part_becomes(hub, run, tmp_path):
    """The end fits, the beginning does not: deleted, so that the next run starts anew. Too long: started anew."""
    part = tmp_path / "w/sd15/unet/model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    fails(run, "what came is not the pinned file (sha256", "was deleted")
    assert files(tmp_path / "w") == {"sd15/unet/config.json": 20}
    part.write_bytes(b"x" * (len(WEIGHTS) + 1))
    assert run()[0] == 0


def test_the_environment_is_honoured(hub, tmp_path):
    """HF_HUB_OFFLINE, then HF_ENDPOINT and HF_TOKEN, each in a process of its own."""
    code = ("import pathlib, sys; from isadca.app import fetch; from isadca.common.problem import Problem\n"
            f"try: fetch.download(fetch.Pinned{tuple(UNET)!r}, pathlib.Path(sys.argv[1]))\n"
            "except Problem as problem: print(problem)")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # 24 lines of 100 characters
    call = lambda **more: subprocess.run([sys.executable, "-c", code, tmp_path / "w"], env=env | more, text=True,
                                         stdout=subprocess.PIPE, stderr=terminal)
    assert "HF_HUB_OFFLINE is set; unset it, or put the file at" in call(HF_HUB_OFFLINE="1").stdout
    assert hub.served == [] and not (tmp_path / "w").exists()
    done = call()
    assert (done.returncode, done.stdout) == (0, "")
    os.close(terminal)
    assert b"model.safetensors: 100%" in b"".join(written(screen))
    assert [header for path, *_, header in hub.served if path.endswith(UNET.file)] == ["Bearer hf_secret"]
    assert (tmp_path / "w/sd15/unet/model.safetensors").read_bytes() == WEIGHTS


# --- what does not ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("status, words", [
    (401, ("not open to you (401)", "https://huggingface.co/someone/model", "HF_TOKEN")),
    (403, ("not open to you (403)", "accept its terms")),
    (404, ("not there at 0123456789", "HF_ENDPOINT")),
    (503, ("answered 503", "fetch again"))])
def test_a_refusal_says_what_to_do(hub, run, tmp_path, status, words):
    hub.status = status
    fails(run, "someone/model/unet/config.json", *words)
    assert not (tmp_path / "w").exists()


def test_no_server(hub, run, tmp_path):
    hub.down = True
    fails(run, "broke off", "fetch again")
    assert not (tmp_path / "w").exists()


def test_another_size_is_not_downloaded(hub, run, tmp_path):
    hub.files = {path: content + b"<html>" for path, content in hub.files.items()}
    fails(run, "26 bytes are offered, 20 are pinned")
    assert not hub.served and not (tmp_path / "w").exists()


def test_another_content_of_the_same_size_is_deleted(hub, run, tmp_path):
    hub.files = {path: content[::-1] for path, content in hub.files.items()}
    fails(run, "what came is not the pinned file (sha256", "expected " + UNET.sha256[:12], "was deleted")
    assert files(tmp_path / "w") == {"sd15/unet/config.json": 20}  # of which the size alone is known


@pytest.mark.parametrize("content, words", [(b"mine", "4 bytes, expected 256000"), (WEIGHTS[::-1], "sha256")])
def test_a_file_of_ones_own_is_left_alone(hub, run, tmp_path, content, words):
    path = tmp_path / "w/sd15/unet/model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    fails(run, f"{path}: is not the published file", words, "move it away")
    assert path.read_bytes() == content and not hub.served


def test_a_full_disk_is_found_before_the_download(hub, run, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fails(run, "0.0 GB to download", "choose another --to")
    assert not hub.served


def test_a_disk_that_fills_up(hub, run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    fails(run, f"{tmp_path}/w/sd15/unet/config.json: the disk is full", "make room")


def test_a_folder_that_cannot_be_made(hub, run, tmp_path):
    (tmp_path / "w").write_text("a file")
    fails(run, str(tmp_path / "w"), "cannot write there", "choose another --to")


def test_an_unknown_name_lists_the_known(hub, run):
    code, _, err = run("sd15", "sd21")
    assert code == 2 and err == "isadca: 'sd21' is nothing to fetch, expected all or some of sd15\n"


def test_a_server_that_never_ends_fills_no_disk(hub, run, tmp_path):
    """Without a Content-Length, as some proxies answer."""
    hub.endless = True
    fails(run, "bytes", "look at HF_ENDPOINT and proxies")
    assert sum(files(tmp_path).values()) <= len(WEIGHTS) + len(CONFIG)


def test_two_fetches_at_once_do_not_mix(hub, run, tmp_path):
    part = tmp_path / "w" / "sd15" / "unet" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    with open(part, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        fails(run, "model.safetensors.part: another isadca fetch writes it; wait for that one, then fetch again")
    assert run()[0] == 0
