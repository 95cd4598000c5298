"""hub_faults: builds from a hub that fails, each failure at places spread over all requests.

    python benchmarks/hub_faults.py                  # every kind, at 20 places each
    python benchmarks/hub_faults.py --kinds cut longer --places 5

A small model and an adapter of it are planned and built from nothing; the tests' hub fails at one
request of them, once or from then on. What is built must be right to the bit, or there is one error
that names the repository or the hub, no traceback and no ``build/``; without the failure, the next
run must be right, too.
"""

from __future__ import annotations

import argparse
import errno
import logging
import math
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from measure import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT / "tests"))
import pytest

from support import adapters, hub_server, inside, projects
from support.hub_server import (
    Cut,
    Drip,
    Expired,
    Flipped,
    Gone,
    Longer,
    Moved,
    Renamed,
    Shorter,
    Stall,
    Unranged,
    busy,
)
from support.servers import Answer

NAME, ADAPTER = "org/model", "org/adapter"
BACK_SECONDS = 0.05  # within the time that is waited before the last try


def refusal(status: int, code: str = "") -> Answer:
    """An answer of the hub's own with an error code of its."""
    headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
    return Answer(status, b'{"error": "no"}', headers)


# What happens to one request, or, of a second word, to all from then on.
KINDS: dict[str, tuple[Any, bool]] = {
    "cut": (Cut(1000), False),
    "cut at once": (Cut(0), False),
    "stalled": (Stall(500, 3), False),
    "429, Retry-After": (busy(0), False),
    "503": (busy(0, 503), False),
    "502 of a proxy": (Answer(502, b"<html>", {}), False),
    "expired address": (Expired(), False),
    "shorter": (Shorter(3), False),
    "longer": (Longer(3), False),
    "another byte": (Flipped(7), False),
    "in drips": (Drip(0.02), False),
    "no range": (Unranged(), False),
    "another range": (Moved(1), False),
    "another ETag": (Renamed(), False),
    "other bytes": (Flipped(7), True),
    "gone, and back": (Gone(BACK_SECONDS), False),
    "no hub": (Answer(200, b"<html>login</html>", {}), False),
    "gated": (refusal(403, "GatedRepo"), True),
    "no such repository": (refusal(404, "RepoNotFound"), True),
    "revision went away": (refusal(404, "RevisionNotFound"), True),
    "no such file": (refusal(404, "EntryNotFound"), True),
    "wrong token": (refusal(401), True),
    "500": (busy(0, 500), True),
    "no server": (Gone(), False),
    "no such host": (Answer(302, b"", {"Location": "http://127.0.0.1:1/x"}), True),
}
# No failures of the hub's.
FULL, NAMELESS, NAMELESS_FOR_A_WHILE = "disk full", "no DNS", "no DNS for a while"
OTHERS = (NAMELESS, NAMELESS_FOR_A_WHILE, FULL)


class Model:
    """The checkpoint on the hub, and what is built of it."""

    def __init__(self, hub: Any, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.project = projects.create(folder / "made", "huggingface", **projects.FOUR_BIT)
        hub.repository(NAME).add_folder(self.project.checkpoint)
        adapter = adapters.make(self.project.checkpoint, folder / "adapter", "lora")
        hub.repository(ADAPTER).add_folder(adapter)
        self.project.configure(source=f"hf:{NAME}", adapter=f"hf:{ADAPTER}")
        self.hub.requests.clear()
        self.expected = self._built(self.project.folder)[1]
        self.requests = len(hub.requests)
        self.writes = 0

    def _built(self, folder: Path) -> tuple[str, dict[str, str]]:
        """Build; what was said, and what is there, but for the card."""
        done = inside.doit(folder, "-n", "2", expect=None)
        built = folder / "build" / "model"
        found = projects.contents(built) if built.exists() else {}
        return done.stdout + done.stderr, found

    def attempt(self, fails: Callable[[Path], Any]) -> str:
        """Build from nothing while something fails, and then without that: right or an error."""
        folder = self.folder / "attempt"
        shutil.copytree(self.project.folder, folder, ignore=lambda at, names: {
            name for name in names if name in ("build", "checkpoint", "models.lock", ".mlx-make")
        })  # fmt: skip
        home = self.folder / "home"
        try:
            with self.hub.inside(home):
                self.hub.requests.clear()
                with fails(folder):
                    said, found = self._built(folder)
                self.hub.fault = lambda request: None
                if found and found != self.expected:
                    raise BenchmarkError(f"other bytes were built:\n{said}")
                if not found and (
                    "Traceback" in said
                    or not any(word in said for word in (NAME, ADAPTER, self.hub.url, "disk"))
                ):
                    raise BenchmarkError(f"no clear error:\n{said}")
                again, mended = self._built(folder)
                if mended != self.expected:
                    raise BenchmarkError(f"not right without the failure:\n{said}\n{again}")
                return "right" if found else "error"
        finally:
            shutil.rmtree(folder)
            shutil.rmtree(home, ignore_errors=True)

    def failing(self, kind: str, place: float) -> Callable[[Path], Any]:
        """What fails, at a part of the requests or writes."""
        if kind == FULL:
            return self.full_disk(place)
        if kind in OTHERS:
            return self.failing_names(place, mends=kind == NAMELESS_FOR_A_WHILE)
        return self.failing_hub(kind, place)

    def failing_hub(self, kind: str, place: float) -> Callable[[Path], Any]:
        """What fails at a part of the requests."""
        fault, from_then_on = KINDS[kind]
        at = int(place * self.requests)

        @contextmanager
        def fails(folder: Path) -> Iterator[None]:
            def choose(request: Any) -> Any:
                is_now = request.count >= at if from_then_on else request.count == at
                is_his = kind != "no such host" or "/resolve/" in request.path
                return fault if is_now and is_his else None

            self.hub.fault = choose
            yield
            self.hub.come_back()

        return fails

    def failing_names(self, place: float, *, mends: bool) -> Callable[[Path], Any]:
        """No host that has an address, from a part of the requests on, or for a while then."""
        at, ask = int(place * self.requests), socket.getaddrinfo
        ends: list[float] = []

        def address(*args: Any, **keys: Any) -> Any:
            if ends and time.monotonic() < ends[0]:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return ask(*args, **keys)

        @contextmanager
        def fails(folder: Path) -> Iterator[None]:
            def choose(request: Any) -> Any:
                if request.count != at:
                    return None
                ends.append(time.monotonic() + BACK_SECONDS if mends else math.inf)
                self.hub.cut_connections()
                return Cut(0)

            self.hub.fault = choose
            with mock.patch.object(socket, "getaddrinfo", address):
                yield

        return fails

    def full_disk(self, place: float) -> Callable[[Path], Any]:
        """What fails at a part of the writes of what is fetched."""
        from cache.files import atomic

        write, count = atomic.write_all, 0
        at = int(place * self.writes)

        @contextmanager
        def fails(folder: Path) -> Iterator[None]:
            def written(*args: Any) -> Any:
                nonlocal count
                count += 1
                if self.writes and count > at:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(*args)

            with mock.patch.object(atomic, "write_all", written):
                yield
            self.writes = self.writes or count

        return fails


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *OTHERS], default=[*KINDS, *OTHERS])
    parser.add_argument("--places", type=int, default=20)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with (
        tempfile.TemporaryDirectory() as name,
        hub_server.serve(Path(name, "uploaded")) as hub,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("tasks.checkpoints.hub_requests.FIRST_WAIT_SECONDS", 0.02)
        patch.setattr("tasks.checkpoints.hub_requests.PROGRESS_SECONDS", 1.0)
        patch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1.5)
        patch.setattr("tasks.checkpoints.hub_ranges.PAST_BYTES", 1)  # as of large tensors
        with hub.inside(Path(name, "first")):
            model = Model(hub, Path(name))
        print(f"{model.requests} requests in all")
        print("| failure | places | right | an error |\n|---|---|---|---|", flush=True)
        for kind in arguments.kinds:
            if kind == FULL:
                model.attempt(model.full_disk(0))  # how many writes there are
            found = []
            for place in range(arguments.places):
                part = (place + 0.5) / arguments.places
                found.append(model.attempt(model.failing(kind, part)))
            print(
                f"| {kind} | {len(found)} | {found.count('right')} | {found.count('error')} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
