"""sanitizer: a library's own ``sanitize``, in a process of its own, makes what is no plain tensor.

``sanitizing`` is what that process does.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache.blobs import Part
from cache.digest import digest_record
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.layouts import asking
from tasks.layouts.model import Model, Parameter


def identity(checkpoint: Checkpoint, model: Model) -> str:
    """Return a digest of all that a model's ``sanitize`` depends on besides the tensors' data.

    The values that it was decided by are part of it.
    """
    told = model.told or checkpoint
    return digest_record(asking.question(told, model.library, model.values, model.left_out))


class Sanitizer:
    """A process that has a library's ``sanitize`` make parameters that are no plain tensors.

    It begins with the first request, and ends with whoever asks it. Safe in threads.
    """

    def __init__(self, checkpoint: Checkpoint, model: Model, device: str) -> None:
        """Begin nothing yet.

        Args:
            checkpoint: with Hugging Face's names.
            model: the model, as ``model`` returned it.
            device: ``cpu`` or ``gpu``: what is to be MLX's default, as it is for mlx_lm.convert.
        """
        self._told = model.told or checkpoint
        self._model = model
        self._device = device
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._done: set[str] = set()
        names = {key: name for name, t in self._told.tensors.items() for key in t.inputs}
        computed = [p for p in model.parameters.values() if _is_computed(p)]
        read = dict.fromkeys(key for parameter in computed for key in parameter.inputs)
        self._names = {key: names[key] for key in read}

    def compute(
        self, inputs: Mapping[str, Sequence[Part]], outputs: Mapping[str, Path], folder: Path
    ) -> None:
        """Have parameters computed.

        Args:
            inputs: where the tensors lie that the parameters are made of, by key.
            outputs: files to write the parameters' bytes into, by the parameter's name.
            folder: where there is room for these inputs, unpacked.

        Raises:
            ArchitectureError: the library failed.
            BuildError: what it reads is not there, or not as it was.
        """
        given = {}
        for name in dict.fromkeys(self._names[key] for key in inputs):
            tensor = self._told.tensors[name]
            stored = [self._told.stored[key] for key in tensor.inputs]
            parts = [inputs[key] for key in tensor.inputs]
            given[name] = {
                "stored": [
                    [s.dtype, s.shape, [[p.path, p.offset, p.length, *(p.stamp or ())] for p in at]]
                    for s, at in zip(stored, parts, strict=True)
                ],
                "steps": tensor.steps,
            }
        request = {"inputs": given, "outputs": {name: str(path) for name, path in outputs.items()}}
        with self._lock:
            if self._done & outputs.keys():  # it has each but once
                self._end()
            process = self._process or self._begin(folder)
            said = process.say(request)
            if "error" in said:
                self._end()
                asking.fail(said, self._told, self._model.library)
            self._done |= outputs.keys()

    def _begin(self, folder: Path) -> _Process:
        """Begin a process that has loaded the model."""
        model = self._model
        question = asking.question(self._told, model.library, model.values, model.left_out)
        tensors = sorted({*self._names.values()})
        compute = {"device": self._device, "tensors": tensors, "folder": str(folder)}
        said: dict[str, Any] = {}
        for light in (True, False):
            process = _Process(model.library)
            weakref.finalize(self, process.end)
            self._process, self._done = process, set()
            said = process.say({**question, "light": light, "compute": compute})
            if "error" not in said:
                return process
            self._end()
            if said["kind"] in ("ValueError", "SystemExit"):
                break
        asking.fail(said, self._told, model.library)
        raise AssertionError("an error was raised")

    def _end(self) -> None:
        if self._process:
            self._process.end()
        self._process = None


def _is_computed(parameter: Parameter) -> bool:
    return any(step[0] == "sanitize" for step in parameter.steps)


class _Process:
    """A process that answers line by line."""

    def __init__(self, library: str) -> None:
        command, environment = asking.command(library)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by ``end``
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=environment
        )

    def say(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return what it answers to a line."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        if answered := self._process.stdout.readline():
            return dict(json.loads(answered))
        status = self._process.wait()
        self._errors.seek(0)
        said = f"it ended (exit status {status}):\n{self._errors.read()[-2000:]}"
        return {"error": said, "kind": "Process"}

    def end(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                if file:
                    file.close()
