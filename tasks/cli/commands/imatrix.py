"""imatrix: ``doit imatrix``: writes a model's importance matrix as llama.cpp has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from doit.exceptions import InvalidCommand

from cache.records.manifests import Manifest
from tasks.cli.commands.forecasting import ForecastCommand
from tasks.cli.failures import as_invalid_dodo_file
from tasks.core.program import COMMAND
from tasks.core.task_names import task_name
from tasks.core.text import listed, plural
from tasks.planning.plan import Plan
from tasks.quality import imatrix
from tasks.quality.imatrix import Entry
from tasks.stages import registry
from tasks.stages.activations import COUNT, MEAN_SQUARE

if TYPE_CHECKING:
    import numpy as np

OUTPUT = {
    "name": "output",
    "short": "o",
    "long": "output",
    "type": str,
    "default": "",
    "help": "the file that is written, over one that is there; without it, a new one here, "
    "TARGET.imatrix.gguf",
}


class ImatrixCommand(ForecastCommand):
    """``doit imatrix``."""

    name = "imatrix"
    doc_purpose = "write a model's importance matrix as llama.cpp has it"
    doc_usage = "TARGET"
    doc_description = f"""\
What the channels of its modules are given on the text to calibrate on, as {COMMAND}
activations:TARGET found it, which comes first. The extra gguf writes it. Modules that llama.cpp has
no name for are left out, and named."""
    cmd_options = (OUTPUT,)
    names_tasks = False

    def execute(self, params: Any, args: list[str]) -> int:
        """Load the target's tasks, and write the file."""
        if len(args) != 1:
            raise InvalidCommand(f"of what? {COMMAND} imatrix TARGET; {COMMAND} help imatrix")
        self._target = args[0]
        path = Path(params["output"] or f"{self._target}.imatrix.gguf")
        if not params["output"] and path.exists():
            raise InvalidCommand(f"{path} is there: remove it, or name a file with -o")
        if params["output"] and path.is_dir():
            raise InvalidCommand(f"{path} is a folder: name a file in it")
        if not path.absolute().parent.is_dir():
            raise InvalidCommand(f"there is no folder {path.parent}: make it, or name another file")
        return int(super().execute(params, [task_name(registry.ACTIVATIONS.group, self._target)]))

    def _execute(self, output: str) -> int:
        path = Path(output or f"{self._target}.imatrix.gguf")
        targets = self.session.config.targets
        if self._target not in targets:
            raise InvalidCommand(
                f"there is no target {self._target!r}. There are {', '.join(targets)}."
            )
        plan = self.session.plans[self._target]
        with as_invalid_dodo_file():
            entries, without = self._entries(plan)
            quality = plan.model.quality
            texts = [Path(name).name for name in quality.text or ()] or ["Python's topics"]
            imatrix.write(path, entries, texts, quality.samples, quality.sequence_length - 1)
        if without:
            self.outstream.write(
                f"note: llama.cpp has no name for {plural(len(without), 'module')}, which "
                f"{'is' if len(without) == 1 else 'are'} left out: {listed(without)}\n"
            )
        self.outstream.write(f"{path}: {plural(len(entries), 'weight')}\n")
        return 0

    def _entries(self, plan: Plan) -> tuple[dict[str, Entry], list[str]]:
        """Return what is on record, by llama.cpp's names, and the modules that have none."""
        import numpy as np

        builder = self.session.builder
        nodes = plan.nodes(registry.ACTIVATIONS.name)
        found: dict[str, Entry] = {}
        without: list[str] = []
        called = imatrix.names(plan.model.memos, plan.shared.model)
        for node, manifest in zip(nodes, builder.on_record(plan, nodes), strict=True):
            if manifest is None:
                raise InvalidCommand(
                    f"what {self._target} is given is not on record: {COMMAND} "
                    f"{task_name(registry.ACTIVATIONS.group, self._target)} finds out"
                )
            read = builder.contents(plan, node, manifest)
            for path in (n.removesuffix(f".{MEAN_SQUARE}") for n in _told(manifest)):
                shape = manifest.tensors[f"{path}.{MEAN_SQUARE}"].shape
                means = np.frombuffer(read[f"{path}.{MEAN_SQUARE}"], np.float32)
                counts = np.frombuffer(read[f"{path}.{COUNT}"], np.uint32).astype(np.float32)
                if path in called:
                    found[called[path]] = _entry(means.reshape(-1, shape[-1]), counts)
                else:
                    without.append(path)
        return found, without


def _told(manifest: Manifest) -> list[str]:
    return [name for name in manifest.tensors if name.endswith(f".{MEAN_SQUARE}")]


def _entry(means: np.ndarray, counts: np.ndarray) -> Entry:
    import numpy as np

    sums = means.astype(np.float64) * counts[:, None]
    return Entry(sums.astype(np.float32), counts)
