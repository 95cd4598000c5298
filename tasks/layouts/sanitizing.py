"""sanitizing: what a library's ``sanitize`` computes, by a process that goes on for many requests.

The library loads the model once, lazily, from files that are no more than headers: one for each
layer. A request's tensors are written behind a header, what is made of them is evaluated and
written out, and the file is cut off again. So it takes the memory and the disk of what is asked for
at once.

This side is the process's, and runs within ``probe.answer``: a request a line on standard input, an
answer a line on standard output.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache.blobs import Blobs, Part
from cache.files.stamp import Stamp
from cache.records.manifests import TensorSpec
from tasks.layouts.model import layer_names
from tasks.layouts.safetensors_format import DTYPES
from tasks.tensors import arrays, rows, steps
from tasks.unpack import registry as unpack


class Files:
    """Lazy tensors, and the files that they are read from once they are evaluated.

    Attributes:
        tensors: by name; to be emptied by who gives them to a library.
    """

    def __init__(self, mx: Any, tensors: dict[str, tuple[str, Any]], folder: Path) -> None:
        """Begin a file of headers for each layer.

        Args:
            mx: MLX, whose ``load`` is its own.
            tensors: dtype and shape of each, by name.
            folder: where there is room for one layer of them.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
        with suppress(ValueError, OSError):  # two files a layer, at most
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        self.tensors: dict[str, Any] = {}
        self._places: dict[str, tuple[int, int]] = {}  # descriptor, offset
        self._headers: dict[int, int] = {}  # descriptor, bytes
        layers: dict[str, list[str]] = {}
        for name, layer in layer_names(list(tensors)).items():
            layers.setdefault(layer, []).append(name)
        for names in layers.values():
            self.tensors |= self._begin(mx, {name: tensors[name] for name in names}, folder)

    def _begin(self, mx: Any, tensors: dict[str, tuple[str, Any]], folder: Path) -> dict[str, Any]:
        header, at = {}, 0
        for name, (dtype, shape) in tensors.items():
            nbytes = TensorSpec(dtype, tuple(shape)).nbytes
            kind = DTYPES[dtype]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        data = json.dumps(header).encode()
        descriptor, path = tempfile.mkstemp(".safetensors", dir=folder)
        try:
            os.write(descriptor, len(data).to_bytes(8, "little") + data)
            os.ftruncate(descriptor, 8 + len(data) + at)  # MLX looks at the size, once
            loaded: dict[str, Any] = mx.load(path)
            os.ftruncate(descriptor, 8 + len(data))
        finally:
            os.unlink(path)  # MLX has it open, and so have we
        begin = self._headers[descriptor] = 8 + len(data)
        for name, entry in header.items():
            self._places[name] = descriptor, begin + entry["data_offsets"][0]
        return loaded

    def write(self, name: str, tensor: rows.Rows) -> None:
        """Have a tensor's bytes where they are read."""
        descriptor, at = self._places[name]
        for data in rows.pieces(tensor):
            view = memoryview(data).cast("B")
            while view:
                written = os.pwrite(descriptor, view, at)
                view, at = view[written:], at + written

    def clear(self) -> None:
        """Have no tensor's bytes any more."""
        for descriptor, begin in self._headers.items():
            os.ftruncate(descriptor, begin)


def serve(parameters: dict[str, Any], files: Files, answers: Any) -> None:
    """Answer requests until there are no more.

    Args:
        parameters: of the model, by name; nobody else has them.
        files: what they are made of.
        answers: where to write answers.
    """
    _say(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            for name, given in request["inputs"].items():
                files.write(name, _rows(given))
            for name, path in request["outputs"].items():
                array = parameters.pop(name)
                Path(path).write_bytes(arrays.view(array))
                del array
            files.clear()
        except Exception as error:
            _say(answers, {"error": str(error), "kind": type(error).__name__})
            return
        _say(answers, {"written": len(request["outputs"])})


def _rows(given: dict[str, Any]) -> rows.Rows:
    """Return a tensor as a request gives it: stored ones, and what is to be done to them."""
    return unpack.apply([_stored(*each) for each in given["stored"]], steps.read(given["steps"]))


def _stored(dtype: str, shape: list[int], parts: Iterable[list[Any]]) -> rows.Stored:
    located = [Part(p, at, n, Stamp(*stamp) if stamp else None) for p, at, n, *stamp in parts]
    return rows.Stored(Blobs(Path()), located, dtype, tuple(shape))


def _say(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
