"""publish_cuts: publishing that is killed (SIGKILL) at places spread over its requests.

    python benchmarks/publish_cuts.py                # at 20 places, before and after the answer

Two small targets are published to the tests' hub, each time to a hub that has nothing. A killed one
must leave each repository without a file of ours, or with all of them; the next publish must make
it what is in ``build/`` by one commit each in all, and the one behind that must write nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT / "tests"))
from support import hub_server, projects
from support.hub_repositories import whole

KEYS: dict[str, Any] = {**projects.FOUR_BIT, "publish": "org/{target}"}
SETTLING_SECONDS = 0.2  # for what the hub was doing when its client went


class Publishing:
    """A project that is built, and published again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = projects.create(folder / "built", "huggingface", **KEYS)
        self.project.configure("other", **{**KEYS, "quantize": {"bits": 8}})
        self.project.doit()
        self.wanted = {name: self._files(name) for name in ("model", "other")}

    def _files(self, name: str) -> dict[str, bytes]:
        built = self.project.folder / "build" / name
        return {path.name: path.read_bytes() for path in built.iterdir()}

    def attempt(self, place: float | None, requests: int = 0, *, late: bool = False) -> int:
        """Publish to an empty hub, killed at a part of the requests; how many there were.

        Args:
            place: the part; None: not at all.
            requests: of a publishing that nothing happens to.
            late: whether the request is answered.
        """
        folder = self.folder / "attempt"
        shutil.copytree(self.project.folder, folder, symlinks=True)
        try:
            with hub_server.serve(self.folder / "uploaded") as hub:
                return self._attempt(hub, folder, place, requests, late=late)
        finally:
            shutil.rmtree(folder)
            for left in ("uploaded", "home"):
                shutil.rmtree(self.folder / left, ignore_errors=True)

    def _attempt(
        self, hub: Any, folder: Path, place: float | None, requests: int, *, late: bool
    ) -> int:
        environ = os.environ | hub.environ(self.folder / "home") | {"HF_HUB_OFFLINE": "0"}
        process = _publish(folder, environ)
        at = -1 if place is None else int(place * requests)

        def kill(request: Any) -> None:
            if request.count == at + late:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

        hub.fault = kill
        said, _ = process.communicate()
        hub.fault = lambda request: None
        count = len(hub.requests)
        if place is not None:
            time.sleep(SETTLING_SECONDS)
            self._check(hub, said, whole=False)
            self._finish(hub, folder, environ)
        self._check(hub, said, whole=True)
        del hub.requests[:]
        said = self._finish(hub, folder, environ)
        writes = [r for r in hub.requests if r.method not in ("GET", "HEAD")]
        if writes or said.count("no commit") != len(self.wanted):
            raise BenchmarkError(f"published once more: {writes}\n{said}")
        return count

    def _finish(self, hub: Any, folder: Path, environ: Mapping[str, str]) -> str:
        process = _publish(folder, environ)
        said, _ = process.communicate()
        if process.returncode:
            raise BenchmarkError(f"exit status {process.returncode}:\n{said}")
        return str(said)

    def _check(self, hub: Any, said: str, *, whole: bool) -> None:
        """Refuse repositories that are a part of a build, or were committed to twice."""
        for name, wanted in self.wanted.items():
            repository = hub.repositories.get(f"org/{name}")
            held = _held(repository) if repository else {}
            if held != wanted and (whole or held):
                raise BenchmarkError(f"org/{name} has {sorted(held)}:\n{said}")
            if repository and len(repository.commits) > 2:  # the hub's own, and one
                raise BenchmarkError(f"org/{name} has {len(repository.commits)} commits")


def _held(repository: Any) -> dict[str, bytes]:
    files = repository.files.items()
    return {name: whole(file.content) for name, file in files if name != ".gitattributes"}


def _publish(folder: Path, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "doit", "publish", f"models={folder / 'models.toml'}"],
        cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        publishing = Publishing(Path(name))
        requests = publishing.attempt(None)
        print(f"{requests} requests in all")
        for number in range(arguments.places):
            place = (number + 0.5) / arguments.places
            publishing.attempt(place, requests, late=bool(number % 2))
        print(f"killed at {arguments.places} places: each repository as it was or whole, the next "
              "publishing right, and the one behind that without a commit")  # fmt: skip


if __name__ == "__main__":
    main()
