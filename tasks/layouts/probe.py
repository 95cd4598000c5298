"""probe: what a library would do with a checkpoint, worked out from its headers alone.

It gives the library's own loading function arrays that hold no data, and asked for a ``light``
answer it leaves out modules that a conversion does not need and that take seconds to import.
Question and answer are JSON; see ``tasks.layouts.architecture`` for what they hold, and
``tasks.layouts.libraries`` for what is said of a library.

Zeros must not decide anything: where the library looks at the values of tensors, the answer is
which (``looked_at``), and the next question has them, by name, in base64 (``values``).

Asked to ``compute``, it is given some tensors' data and writes the parameters made of them. That,
and whatever needs the heavy modules, is for a process of its own (``python -m tasks.layouts.probe
LIBRARY``, question on standard input, answer on standard output).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import resource
import sys
import tempfile
import types
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from tasks.layouts.importing import importing
from tasks.layouts.libraries import LIBRARIES, Library
from tasks.layouts.model import layer_names

LABELS = 500  # arrays at once: MLX's functions take 1024 names, and two sorts are compared
_SAME_NUMBERS = (
    "AsType", "Broadcast", "Concatenate", "Contiguous", "Copy", "ExpandDims", "Flatten", "Pad",
    "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unflatten",
)  # fmt: skip  # operations of MLX by which an array is the same numbers, elsewhere
# By the ``id`` of a joined array: what was done, the axis, the arrays joined, and the result.
Joins = dict[int, tuple[str, int, list[Any], Any]]


class StubUsed(Exception):
    """The library used a module that was left out; ask again with everything imported."""


def main() -> None:
    """Answer one question."""
    question = json.load(sys.stdin)
    if limit := question.get("limit_bytes"):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    answered = answer(question, LIBRARIES[sys.argv[1]])
    json.dump(answered, sys.stdout)


@importing()
def answer(question: dict[str, Any], library: Library) -> dict[str, Any]:
    """Answer a question; what is replaced meanwhile is put back. No model may run beside it."""
    import mlx.core as mx

    patched = (mx, "load stack concatenate"), (mx.random, "uniform normal")
    functions = [(m, name, getattr(m, name)) for m, names in patched for name in names.split()]
    printed = io.StringIO()  # standard output is the answer's
    modules = {n: sys.modules.pop(n) for n in list(sys.modules) if _is_replaced(n, library)}
    try:
        if question["light"]:
            _leave_out_heavy_modules(library)
        with contextlib.redirect_stdout(printed):
            for name in library.MODULES:
                importlib.import_module(name)
            return _answer(question, library, mx)
    except SystemExit as error:  # a model's module that lacks a package says so and leaves
        said = printed.getvalue().strip()
        return {"error": f"{said or 'nothing'} (exit status {error.code}).", "kind": "SystemExit"}
    except Exception as error:  # whatever the library raises is its verdict on the checkpoint
        return {"error": str(error), "kind": type(error).__name__}
    finally:
        for module, name, original in functions:
            setattr(module, name, original)
        for name in list(sys.modules):
            if _is_replaced(name, library):
                del sys.modules[name]
        sys.modules.update(modules)


def _is_replaced(name: str, library: Library) -> bool:
    return name in library.STUBS or name.partition(".")[0] == library.PACKAGE


def _answer(question: dict[str, Any], library: Library, mx: Any) -> dict[str, Any]:
    tensors = {name: (dtype, shape) for name, dtype, shape in question["tensors"]}
    given = {name: hollow(mx, dtype, shape) for name, (dtype, shape) in tensors.items()}
    compute = question.get("compute")
    if compute:  # in a process of its own
        mx.set_default_device(getattr(mx, compute["device"]))
        for name, parts in compute["inputs"].items():
            given[name] = _read(parts, *tensors[name])
    values = question.get("values", {})
    given |= {name: _valued(mx, text, *tensors[name]) for name, text in values.items()}
    kept = {name: a.astype(a.dtype) for name, a in given.items()}  # stay as they are
    joins = _record_joins(mx)
    _leave_out_noise(mx)
    try:
        model, config = _load(question["files"], given, library, mx)
    except Exception:
        if not compute and (unread := _looked_at(mx, kept) - values.keys()):
            return {"looked_at": sorted(unread)}
        raise
    if not compute and (unread := _looked_at(mx, kept) - values.keys()):
        return {"looked_at": sorted(unread)}
    if compute:
        return _write(dict(_flat(model.parameters())), compute["outputs"])
    parameters, factors = _parameters(model, library, _Tensors(given, kept, joins), mx)
    leaves = _leaves(model)
    used = {name for parameter in parameters for name in parameter[4]} | values.keys()
    return {
        "parameters": parameters,
        "modules": _modules(model, leaves, library, mx),
        "recipes": library.recipes(model, leaves),
        "config": library.encode_config(config),
        "keep_vision_config": library.keeps_vision_config(model),
        "dropped": sorted(set(tensors) - used),
        "factors": factors,
    }


def _load(
    files: dict[str, str], given: dict[str, Any], library: Library, mx: Any
) -> tuple[Any, dict[str, Any]]:
    """Have the library load a folder of small files whose weights are the arrays given."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in files.items():
            (folder / file).write_text(text)
        (folder / "model.safetensors").touch()
        mx.load = lambda *_, **__: dict(given)  # the only reader that it knows
        return library.load(folder)


class _Tensors(NamedTuple):
    """The checkpoint's tensors.

    Attributes:
        given: to the library, which may have changed them in place.
        kept: the same, as they were.
        joins: what it made of several at once.
    """

    given: dict[str, Any]
    kept: dict[str, Any]
    joins: Joins


def _parameters(
    model: Any, library: Library, tensors: _Tensors, mx: Any
) -> tuple[list[list[Any]], list[str]]:
    """Return each parameter: name, dtype, shape, whether it is cast, its tensors, the steps.

    And the tensors of bytes that are multiplied as they are, as if they were whole numbers.
    """
    changed = _changed(mx, tensors.given, tensors.kept)
    names = {id(a): name for name, a in tensors.given.items() if name not in changed}
    parameters: list[list[Any]] = []
    computed: dict[str, Any] = {}
    for name, array in _flat(model.parameters()):
        inputs: list[str] = []
        steps: list[Any] = []
        if (origin := names.get(id(array))) is not None:
            inputs = [origin]
        elif (join := tensors.joins.get(id(array))) and all(
            id(a) in names and a.dtype == array.dtype for a in join[2]
        ):
            inputs, steps = [names[id(a)] for a in join[2]], [[join[0], join[1]]]
        else:
            computed[name] = array
        dtype = str(array.dtype).removeprefix("mlx.core.")
        floating = bool(mx.issubdtype(array.dtype, mx.floating))
        cast = floating and library.casts(model, name)
        parameters.append([name, dtype, list(array.shape), cast, inputs, steps])
    reach, factors = inputs_reached(mx, tensors.kept, computed) if computed else ({}, [])
    for parameter in parameters:
        if (name := parameter[0]) in computed:
            parameter[4], parameter[5] = reach[name], [["sanitize", name]]
    return parameters, factors


def _leaves(model: Any) -> list[tuple[str, Any]]:
    nn: Any = importlib.import_module("mlx.nn")
    return _flat(model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module))


def _modules(
    model: Any, leaves: Iterable[tuple[str, Any]], library: Library, mx: Any
) -> list[list[Any]]:
    """Return each leaf module: path, its parameters, these once quantized, verdict, weights."""
    modules: list[list[Any]] = []
    for path, module in leaves:
        held = [name for name, _ in _flat(module.parameters())]
        after = _after_quantizing(mx, module) if hasattr(module, "to_quantized") else None
        verdict = library.quantizes(model, path, module) if after is not None else True
        modules.append([path, held, after, verdict, _count(module)])
    if sum(m[4] for m in modules) != library.count_weights(model):
        raise AssertionError(f"{library.PACKAGE} counts parameters in another way than expected")
    return modules


def _flat(tree: Any, **options: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(cast("list[tuple[str, Any]]", tree_flatten(tree, **options)))


def _leave_out_heavy_modules(library: Library) -> None:
    """Have the library's package without what its ``__init__`` imports, and with stubs."""
    spec = importlib.util.find_spec(library.PACKAGE)  # finds the package without running it
    if spec is None or spec.submodule_search_locations is None:
        name = library.DISTRIBUTION
        raise ImportError(f"{name} is not installed: pip install {name}")
    package = types.ModuleType(library.PACKAGE)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[library.PACKAGE] = package
    for stub in library.STUBS:
        sys.modules[stub] = _Stub(stub)


class _Stub(types.ModuleType):
    """A module whose names can be imported but not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def used(*_: Any, **__: Any) -> Any:
            raise StubUsed(f"{self.__name__}.{name}")

        return used


def hollow(mx: Any, dtype: str, shape: Sequence[int]) -> Any:
    """Return an array of this shape that takes no memory, even if it is evaluated.

    What makes it is an operation that no model uses, by which a graph shows where its inputs are.
    """
    return mx.stop_gradient(_zeros(getattr(mx, dtype), tuple(shape)))


def _valued(mx: Any, text: str, dtype: str, shape: Sequence[int]) -> Any:
    """Return a tensor with its values, given in base64, which a graph shows as a hollow one."""
    from tasks.tensors import arrays

    data = base64.b64decode(text)
    memory = arrays.blank(len(data))
    memoryview(cast(bytearray, memory))[:] = data
    return mx.stop_gradient(memory.view(getattr(mx, dtype)).reshape(shape))


def _looked_at(mx: Any, kept: dict[str, Any]) -> set[str]:
    """Return the tensors that were evaluated: their zeros may have decided something.

    What is evaluated is no longer made of anything: in a graph it is a source.
    """
    names = set()
    for batch in _batches(kept):
        graph = _graph(mx, {f"in{i}": kept[name] for i, name in enumerate(batch)})
        names |= {batch[int(i)] for i in re.findall(r'rank=source; "in(\d+)"', graph)}
    return names


@functools.cache
def _zeros(dtype: Any, shape: tuple[int, ...]) -> Any:
    import mlx.core as mx

    return mx.broadcast_to(mx.array(0, dtype), shape)


def _read(parts: list[list[Any]], dtype: str, shape: Sequence[int]) -> Any:
    from cache.blobs import Blobs, Part
    from cache.files.stamp import Stamp
    from tasks.tensors import arrays

    located = [Part(p, at, n, Stamp(*stamp) if stamp else None) for p, at, n, *stamp in parts]
    return arrays.read(Blobs(Path()), located, dtype, shape)


def _write(parameters: dict[str, Any], outputs: dict[str, str]) -> dict[str, Any]:
    from tasks.tensors import arrays

    for name, path in outputs.items():
        Path(path).write_bytes(arrays.view(parameters.pop(name)))
    return {"written": len(outputs)}


def _record_joins(mx: Any) -> Joins:
    """Watch ``mx.stack`` and ``mx.concatenate``: a join of whole tensors needs no computing.

    The results are held, so that no other array gets the ``id`` of one.
    """
    seen: Joins = {}

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def joined(arrays: Sequence[Any], axis: int = 0, **more: Any) -> Any:
            arrays = list(arrays)
            result = original(arrays, axis, **more)
            seen[id(result)] = (name, axis, arrays, result)
            return result

        return joined

    mx.stack = watch("stack", mx.stack)
    mx.concatenate = watch("concatenate", mx.concatenate)
    return seen


def _leave_out_noise(mx: Any) -> None:
    """Have modules begin with zeros: the checkpoint's tensors take their place.

    MLX's generator would hold on to the graph of every random number that was asked for.
    """

    def quiet(original: Callable[..., Any]) -> Callable[..., Any]:
        def zeros(*args: Any, **named: Any) -> Any:
            if args or "shape" not in named:
                return original(*args, **named)
            dtype = named.get("dtype") or mx.float32
            return _zeros(dtype, tuple(named["shape"])).astype(dtype)  # an object of its own

        return zeros

    mx.random.uniform = quiet(mx.random.uniform)
    mx.random.normal = quiet(mx.random.normal)


def _count(module: Any) -> int:
    """Count a module's weights as MLX's libraries do, those already packed included."""
    if hasattr(module, "bits"):
        bias = module.bias.size if hasattr(module, "bias") else 0
        return int(bias + module.weight.size * 32 // module.bits)
    return sum(value.size for _, value in _flat(module.parameters()))


def _after_quantizing(mx: Any, module: Any) -> list[str]:
    """Return the names of a module's parameters once quantized, in order, biases included.

    Empty if it would not be quantized as ``mx.quantize`` of its weight: not ours to guess.
    """
    if not mx.issubdtype(module.weight.dtype, mx.floating):
        return []
    if module.weight.ndim < 2 or module.weight.shape[-1] % 32:
        names = [n for n, _ in _flat(module.parameters())]
        at = names.index("weight") + 1
        return [*names[:at], "scales", "biases", *names[at:]]
    try:  # as mlx.nn.quantize calls it, by convert and again by load
        quantized = module.to_quantized(group_size=32, bits=4, mode="affine")
    except TypeError:  # one that was written before there were modes
        return []
    names = [n for n, _ in _flat(quantized.parameters())]
    held = {n for n, _ in _flat(module.parameters())}
    return names if set(names) == held | {"scales", "biases"} else []


def _changed(mx: Any, given: dict[str, Any], kept: dict[str, Any]) -> set[str]:
    """Return the tensors that ``sanitize`` changed in place: the objects are the same still.

    A cast to its own dtype is the array itself under another Python object, and an array has one
    label, the last that it is given: where ``now`` is left, the two have parted.
    """
    changed = set()
    for batch in _batches(given):
        labels = {f"now{i}": given[name] for i, name in enumerate(batch)}
        labels |= {f"in{i}": kept[name] for i, name in enumerate(batch)}
        seen = set(re.findall(r"\bnow\d+\b", _graph(mx, labels)))
        changed |= {name for i, name in enumerate(batch) if f"now{i}" in seen}
    return changed


def inputs_reached(
    mx: Any, given: dict[str, Any], computed: dict[str, Any]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return, for each computed array, the checkpoint's tensors it is made of.

    And those of bytes that are factors of a product.
    """
    place = {name: i for i, name in enumerate(given)}
    layer_of = layer_names([*given, *computed])
    layers: dict[str, list[str]] = {}
    for name in computed:
        layers.setdefault(layer_of[name], []).append(name)
    made_of: dict[str, set[str]] = {name: set() for name in computed}
    octets = {name for name, array in given.items() if array.dtype == mx.uint8}
    factors: set[str] = set()
    for layer, names in layers.items():
        # Most layers are made of themselves: label those first, and others only as needed.
        own = [name for name in given if layer_of[name] == layer]
        likely = [*own, *(name for name in given if layer_of[name] != layer)]
        for outputs in _batches(names):
            left = {f"out{i}": name for i, name in enumerate(outputs)}
            for batch in _batches(likely):
                name_of = {f"in{place[name]}": name for name in batch}
                inputs = {label: given[name] for label, name in name_of.items()}
                arrays = {label: computed[name] for label, name in left.items()}
                graph = _Graph(_graph(mx, arrays | inputs))
                likely_factors = (label for label, name in name_of.items() if name in octets)
                factors |= {name_of[label] for label in likely_factors if graph.is_factor(label)}
                for label, array in arrays.items():
                    if label in graph.labels:
                        reached, whole = graph.reach(label, inputs)
                    else:  # another's array by a second name: it takes the label if it comes last
                        other = _Graph(_graph(mx, {**inputs, label: array}))
                        reached, whole = inputs.keys() - other.labels, True
                        if not reached:  # not an input's
                            reached, whole = other.reach(label, inputs)
                    made_of[left[label]] |= {name_of[i] for i in reached}
                    if whole:
                        del left[label]
                if not left:
                    break
    return {n: sorted(names, key=place.__getitem__) for n, names in made_of.items()}, sorted(
        factors
    )


def _batches(names: Iterable[str]) -> Iterator[list[str]]:
    names = list(names)
    for start in range(0, len(names), LABELS):
        yield names[start : start + LABELS]


class _Graph:
    """A graph as ``mx.export_to_dot`` writes it."""

    def __init__(self, text: str) -> None:
        self.sources: dict[str, list[str]] = {}
        for source, target in re.findall(r'^"?(\w+)"? -> "?(\w+)"?$', text, re.M):
            self.sources.setdefault(target, []).append(source)
        self.targets: dict[str, list[str]] = {}
        for target, sources in self.sources.items():
            for source in sources:
                self.targets.setdefault(source, []).append(target)
        self.operations = dict(re.findall(r'(\d+) \[label ="(\w+)"', text))
        self.labels = {*self.sources, *(s for sources in self.sources.values() for s in sources)}
        self.hollow = set(re.findall(r'(\d+) \[label ="StopGradient"', text))

    def reach(self, label: str, inputs: Container[str]) -> tuple[set[str], bool]:
        """Return the inputs that an array is made of, and whether there are no others."""
        stack, seen = [label], {label}
        while stack:
            node = stack.pop()
            if node not in inputs:
                new = [source for source in self.sources.get(node, ()) if source not in seen]
                seen.update(new)
                stack += new
        return {node for node in seen if node in inputs}, not seen & self.hollow

    def is_factor(self, label: str) -> bool:
        """Tell whether an array is multiplied once it was cast, and nothing else done to it."""
        stack = list(self.targets.get(label, ()))
        while stack:
            node = stack.pop()
            operation = self.operations.get(node)
            if operation == "Multiply":
                return True
            if operation in (None, *_SAME_NUMBERS):
                stack += self.targets.get(node, ())
        return False


def _graph(mx: Any, labels: dict[str, Any]) -> str:
    """Return the graph that computes arrays, in DOT; each has the last label that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        dot = Path(folder) / "graph.dot"
        mx.export_to_dot(str(dot), *labels.values(), **labels)
        return dot.read_text()


if __name__ == "__main__":
    main()
