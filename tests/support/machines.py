"""machines: projects with a cache of their own each, which have a remote in common."""

import shutil
from pathlib import Path

from support import checkpoints
from support.front_door import Finished
from support.inside import doit
from support.projects import Project

BIG = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 4}
SMALL = {"num_hidden_layers": 1, "intermediate_size": 64, "hidden_size": 64}
REMOTE = "MLX_MAKE_CACHE_REMOTE"
MODE = "MLX_MAKE_CACHE_MODE"
KEEP = "MLX_MAKE_CACHE_KEEP"
SIGNING = "MLX_MAKE_SIGNING_KEY"


class Machine(Project):
    """A project whose doit has these variables, above all those of a remote."""

    environ: dict[str, str]

    def doit(self, *args: str, expect: int = 0, **environ: str) -> Finished:
        return doit(self.folder, *args, expect=expect, env={**self.environ, **environ})

    def beside(self, name: str, *, checkpoint: bool = False, **environ: str) -> "Machine":
        """A machine with the same models.toml and models.lock, and nothing else."""
        other = machine(self.folder.parent / name, self.environ | environ)
        other.models = {target: dict(told) for target, told in self.models.items()}
        for file in ("models.toml", "models.lock"):
            shutil.copy(self.folder / file, other.folder)
        if checkpoint:
            other.checkpoint.symlink_to(self.checkpoint)
        # What mlx-lm says of the architecture, only to save seconds of imports.
        for kind in ("architectures", "tokenizers"):
            if (memos := self.store / "memos" / kind).exists():
                shutil.copytree(memos, other.store / "memos" / kind)
        return other


def machine(folder: Path, environ: dict[str, str]) -> Machine:
    folder.mkdir(parents=True)
    new = Machine(folder, "huggingface")
    new.environ = environ
    return new


def first(folder: Path, environ: dict[str, str], arch: str = "llama", **keys: object) -> Machine:
    """The machine that builds first: it has the checkpoint."""
    new = machine(folder / "one", environ)
    checkpoints.make(arch, new.checkpoint, **keys.pop("config", {}))
    new.configure(**keys)
    return new


def warnings(done: Finished) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("warning:")]
