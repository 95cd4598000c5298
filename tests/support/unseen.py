"""unseen: checkpoints and adapters that change under the same size, time and inode; what is built.

Between two builds, or at a moment of one at which a file's stamp is looked at. What is in build/
must then be made of the files as they were or as they are, and of nothing else.
"""

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from huggingface_hub import snapshot_download

from cache.files.stamp import Stamp
from support import adapted, built_inputs, checkpoints, hub_server, projects
from support.projects import Project

KINDS = ("safetensors", "pth", "bin", "hub's cache", "hub", "adapter")
OUTCOMES = ("as it was", "as it is", "an error")
WHEN = ("between", "while it is read", "while it is read again")
COMMIT = "c" * 40


class Outcome(NamedTuple):
    """What came of a change.

    Attributes:
        outcome: one of `OUTCOMES`; else what is wrong with it.
        detail: all that is needed to look into it.
    """

    outcome: str
    detail: str


class Unseen:
    """Projects in a folder, each for one attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._looks: dict[tuple[str, str], int] = {}

    def attempt(self, seed: int, kind: str) -> Outcome:
        """Change a checkpoint of a kind, and see what is built."""
        chance = random.Random(f"{kind} {seed}")
        when = WHEN[seed % len(WHEN)]
        has_ctime = chance.random() < 0.5
        folder = self.folder / str(next(self._numbers))
        with ExitStack() as stack:
            for module in ("headers", "checkpoint", "adapter") if not has_ctime else ():
                changed_at = f"tasks.checkpoints.{module}.changed_at"
                stack.enter_context(mock.patch(changed_at, return_value=0))
            project = stack.enter_context(_made(kind, folder))
            try:
                return self._tried(project, kind, when, has_ctime, chance)
            finally:
                shutil.rmtree(folder)

    def _tried(
        self, project: Project, kind: str, when: str, has_ctime: bool, chance: random.Random
    ) -> Outcome:
        quantize = {"bits": 4, "group_size": 32}
        project.configure(quantize=quantize)
        copy = _Copy(project, kind)
        change = _changes(copy.weights, chance)
        said, at = "", 0
        if when != WHEN[1]:
            said += project.doit().stdout
            quantize = {"bits": 4, "group_size": 32, "rules": [{"match": "*.1.*", "bits": 8}]}
            if chance.random() < 0.3 or kind == "adapter":
                quantize = {"bits": 8, "group_size": 32}
            project.configure(quantize=quantize)
        before = copy.built(quantize)
        if when == WHEN[0]:
            change()
            done = project.doit(expect=None)
        else:
            looks = self._looks.setdefault((kind, when), 60)
            at = chance.randrange(1, looks + 1)
            done, seen = _changed_at_look(project, at, change)
            self._looks[kind, when] = max(seen, 8)
            if seen < at:
                change()
        said += done.stdout + done.stderr
        after = copy.built(quantize)
        detail = f"{kind}, {when}, ctime {has_ctime}, at look {at}\n{said}"
        if "Traceback" in said:
            return Outcome("traceback", detail)
        if done.returncode:
            if kind == "hub":  # a commit has one content, which the message says to fetch anew
                shutil.rmtree(project.folder / "home" / "hub")
            again = project.doit(expect=None)
            if again.returncode:
                project.doit("lock", expect=None)
                again = project.doit(expect=None)
            built = _weights(project.folder / "build" / "model")
            right = again.returncode == 0 and built in (before, after)
            return Outcome("an error" if right else "not mended", f"{detail}\n{again.stdout}")
        built = _weights(project.folder / "build" / "model")
        if built == after:
            return Outcome(OUTCOMES[1], detail)
        return Outcome(OUTCOMES[0] if built == before else "a mixture", detail)


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def _changed_at_look(
    project: Project, at: int, change: Callable[[], None]
) -> tuple[projects.front_door.Finished, int]:
    """Build, and change files as a stamp is looked at for the so many'th time; how often it was."""
    original, looks = Stamp.of, itertools.count(1)
    seen = 0

    def of(path: str | Path | int) -> Stamp:
        nonlocal seen
        if isinstance(path, int):
            seen = next(looks)
            if seen == at:
                change()
        return original(path)

    with mock.patch.object(Stamp, "of", of):
        return project.doit("-n", "1", expect=None), seen


def _changes(paths: list[Path], chance: random.Random) -> Callable[[], None]:
    """Return what changes bytes of one file or all, somewhere behind the headers, and no stamp."""
    chosen = [(path, chance.random()) for path in paths if len(paths) == 1 or chance.random() < 0.7]

    def change() -> None:
        for path, where in chosen or [(paths[0], 0.5)]:
            real = path.resolve()
            stat = real.stat()
            real.chmod(0o644)
            with real.open("r+b") as file:
                for share in (0.3 + 0.2 * where, 0.55 + 0.2 * where, 0.8):
                    # Within a tensor, of which there are many; of a zip archive, its members.
                    file.seek(int(stat.st_size * share))
                    data = file.read(64)
                    file.seek(int(stat.st_size * share))
                    file.write(bytes(byte ^ 1 for byte in data))
            os.utime(real, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return change


class _Copy:
    """Builds of the files as they are at the moment, elsewhere, and of nothing else."""

    def __init__(self, project: Project, kind: str) -> None:
        self._project, self._kind = project, kind
        place = project.folder / ("adapter" if kind == "adapter" else "checkpoint")
        if kind == "hub":
            place = Path(snapshot_download("org/model"))
        if kind == "hub's cache":
            place = project.folder / "models--org--model" / "snapshots" / COMMIT
        self._place = place
        suffixes = (".safetensors", ".pth", ".bin")
        self.weights = [path for path in sorted(place.iterdir()) if path.suffix in suffixes]

    def built(self, quantize: dict) -> dict[str, bytes]:
        folder = self._project.folder / "anew"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        name = "adapter" if self._kind == "adapter" else "checkpoint"
        shutil.copytree(self._place, folder / name)
        if self._kind == "adapter":
            shutil.copytree(self._project.folder / "checkpoint", folder / "checkpoint")
        other = Project(folder, self._project.kind)
        keys = {k: v for k, v in self._project.models["model"].items() if k != "source"}
        other.configure(**{**keys, "quantize": quantize, "source": "checkpoint"})
        shutil.copytree(
            self._project.store / "memos/architectures", other.store / "memos/architectures"
        )
        other.doit()
        return _weights(folder / "build" / "model")


@contextmanager
def _made(kind: str, folder: Path) -> Iterator[Project]:
    """Make a project that has a checkpoint of a kind."""
    if kind == "adapter":
        folder.mkdir()
        checkpoints.make("qwen3", folder / "checkpoint", **built_inputs.TINY)
        adapted.write("mlx-lora", folder / "adapter")
        project = Project(folder, "huggingface")
        project.configure(adapter="adapter", dtype="float32")
        project.doit()
        shutil.rmtree(project.state)
        project.doit("list")
        yield project
        return
    project = projects.create(folder, "meta" if kind == "pth" else "huggingface")
    if kind == "bin":
        shutil.rmtree(project.checkpoint)
        checkpoints.make("llama", project.checkpoint, form="bin")
    if kind == "hub's cache":
        _as_in_the_hubs_cache(project)
    if kind != "hub":
        yield project
        return
    with hub_server.serve(folder / "uploaded") as hub, hub.inside(folder / "home"):
        hub.repository("org/model").add_folder(project.checkpoint)  # from where it is served
        snapshot_download("org/model")
        project.configure(source="hf:org/model")
        yield project


def _as_in_the_hubs_cache(project: Project) -> None:
    """Have the checkpoint lie as huggingface_hub keeps it: links to blobs."""
    root = project.folder / "models--org--model"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(project.checkpoint.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    project.checkpoint.rmdir()
    project.configure(source=str(root))
