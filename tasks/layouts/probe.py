"""probe: what a library would do with a checkpoint, worked out from its headers alone.

It gives the library's own loading function arrays that hold no data, and asked for a ``light``
answer it leaves out modules that a conversion does not need and that take seconds to import.
Question and answer are JSON; see ``tasks.layouts.asking`` for what they hold, and
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
import importlib
import importlib.util
import io
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from tasks.layouts.answers import claim_stdout
from tasks.layouts.array_graph import ArrayGraph, hollow
from tasks.layouts.importing import importing
from tasks.layouts.libraries import LIBRARIES, Library, missing
from tasks.layouts.limited import Limits, within
from tasks.layouts.model import layer_names
from tasks.layouts.sanitizing import Files, serve
from tasks.layouts.stubs import is_below, stubs
from tasks.tensors import rows
from tasks.unpack import registry as unpack

AT_ONCE = 10_000  # arrays in one graph: it takes 4 kB of memory for each
# By the ``id`` of a joined array: what was done, the axis, the arrays joined, and the result.
Joins = dict[int, tuple[str, int, list[Any], Any]]


def main() -> None:
    """Answer one question, or begin to compute."""
    answers = claim_stdout()
    question = json.loads(sys.stdin.readline())
    if limits := question.get("limits"):
        Limits(*limits).begin()
    answered = answer(question, LIBRARIES[sys.argv[1]], answers)
    with answers:
        json.dump(answered, answers)


@importing()
def answer(
    question: dict[str, Any],
    library: Library,
    answers: TextIO | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Answer a question; what is replaced meanwhile is put back. No model may run beside it.

    Args:
        question: see ``tasks.layouts.asking``.
        library: that is asked.
        answers: asked to compute, it writes further answers there, until there are no more
            requests.
        seconds: of processors, that it may take besides being imported; without, any.

    Raises:
        TooLong: it takes longer.
    """
    import mlx.core as mx

    patched = (mx, "load stack concatenate quantize"), (mx.random, "uniform normal")
    functions = [(m, name, getattr(m, name)) for m, names in patched for name in names.split()]
    printed = io.StringIO()
    modules = {n: sys.modules.pop(n) for n in list(sys.modules) if _is_replaced(n, library)}
    light = stubs(library.STUBS) if question["light"] else contextlib.nullcontext()
    try:
        mx.quantize = _of_groups(mx.quantize)
        if question["light"]:
            _leave_out_packages(library)
        with light, contextlib.redirect_stdout(printed):
            for name in library.MODULES:
                importlib.import_module(name)
            asked = question, library, mx, answers
            return within(seconds, _answer, *asked) if seconds else _answer(*asked)
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


def _of_groups(quantize: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``mx.quantize``, which divides by the group size: by 0 it ends the process.

    Libraries work that out of shapes, and a checkpoint's need not fit its config.json.
    """

    def checked(weight: Any, group_size: int | None = None, *args: Any, **named: Any) -> Any:
        if group_size is not None and group_size < 1:
            raise ValueError(f"{group_size} is no size of a group of weights")
        return quantize(weight, group_size, *args, **named)

    return checked


def _is_replaced(name: str, library: Library) -> bool:
    return is_below(name, (*library.STUBS, library.PACKAGE, *library.BUILDS_ON))


def _answer(
    question: dict[str, Any], library: Library, mx: Any, answers: TextIO | None
) -> dict[str, Any]:
    tensors = {name: (dtype, shape) for name, dtype, shape in question["tensors"]}
    given = {name: hollow(mx, dtype, shape) for name, (dtype, shape) in tensors.items()}
    if "trial" in question:
        return _try(question, given, library, mx)
    files = None
    if compute := question.get("compute"):  # in a process of its own
        mx.set_default_device(getattr(mx, compute["device"]))
        lazy = {name: tensors[name] for name in compute["tensors"]}
        files = Files(mx, lazy, Path(compute["folder"]))
        given |= files.tensors
        files.tensors.clear()
    values = question.get("values", {})
    given |= {name: _valued(mx, text, *tensors[name]) for name, text in values.items()}
    kept = {name: a.astype(a.dtype) for name, a in given.items()}  # stay as they are
    joins = _record_joins(mx)
    _leave_out_noise(mx)
    try:
        model, config = _load(question["files"], given, library, mx)
    except Exception:
        if files is None and (unread := _done_to(mx, given, kept).looked_at - values.keys()):
            return {"looked_at": sorted(unread)}
        raise
    if files is not None:
        for arrays in (given, kept, joins):
            arrays.clear()
        parameters_of = dict(_flat(model.parameters()))
        del model
        serve(parameters_of, files, answers)
        return {}
    done = _done_to(mx, given, kept)
    if unread := done.looked_at - values.keys():
        return {"looked_at": sorted(unread)}
    tensors_given = _Tensors(given, kept, joins, done.changed)
    parameters, factors = _parameters(model, library, tensors_given, mx)
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
        changed: the names of those that it changed.
    """

    given: dict[str, Any]
    kept: dict[str, Any]
    joins: Joins
    changed: set[str]


def _parameters(
    model: Any, library: Library, tensors: _Tensors, mx: Any
) -> tuple[list[list[Any]], list[str]]:
    """Return each parameter: name, dtype, shape, whether it is cast, its tensors, the steps.

    And the tensors of bytes that are multiplied as they are, as if they were whole numbers.
    """
    names = {id(a): name for name, a in tensors.given.items() if name not in tensors.changed}
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
    if nothing := {name: array for name, array in computed.items() if not reach[name]}:
        _refuse_noise(mx, nothing)
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
    known = {name for name, _ in _flat(model.parameters())}
    for path, module in leaves:
        held = [name for name, _ in _flat(module.parameters())]
        if not known.issuperset(f"{path}.{name}" if path else name for name in held):
            held, can = [], False  # of a module that is private: counted, and not saved
        else:
            can = hasattr(module, "to_quantized")
        after = _after_quantizing(mx, module) if can else None
        verdict = library.quantizes(model, path, module) if after is not None else True
        modules.append([path, held, after, verdict, _count(module)])
    if library.count_weights(model) not in (None, sum(m[4] for m in modules)):
        raise AssertionError(f"{library.PACKAGE} counts parameters in another way than expected")
    return modules


def _flat(tree: Any, **options: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(cast("list[tuple[str, Any]]", tree_flatten(tree, **options)))


def _leave_out_packages(library: Library) -> None:
    """Have the library's package, and those that it builds on, without what they import."""
    for name in (library.PACKAGE, *library.BUILDS_ON):
        spec = importlib.util.find_spec(name)  # finds the package without running it
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(missing(library))
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package


def _valued(mx: Any, text: str, dtype: str, shape: Sequence[int]) -> Any:
    """Return a tensor with its values, given in base64, which a graph shows as a hollow one."""
    from tasks.tensors import arrays

    data = base64.b64decode(text)
    memory = arrays.blank(len(data))
    memoryview(cast(bytearray, memory))[:] = data
    return mx.stop_gradient(memory.view(getattr(mx, dtype)).reshape(shape))


def _try(
    question: dict[str, Any], given: dict[str, Any], library: Library, mx: Any
) -> dict[str, Any]:
    """Tell of which dtype a library makes what we unpack, if it makes the same to the bit.

    It is given numbers for a few weights of each kind, of those that it neither joins nor renames.
    """
    trial = question["trial"]
    weights = sorted(trial["weights"], key=lambda each: prod(each["shape"]))
    for each in weights:  # numbers that are made only of those that are chosen
        for number, name in enumerate(each["inputs"]):
            given[name] = _numbers(mx, given[name], number)
    model, config = _load(question["files"], given, library, mx)
    parameters = dict(_flat(model.parameters()))
    chosen: dict[str, dict[str, Any]] = {}
    for each in weights:
        found = parameters.get(each["name"])
        if each["kind"] not in chosen and found is not None and found.shape == tuple(each["shape"]):
            chosen[each["kind"]] = each
    dtypes = set()
    if {each["kind"] for each in weights} <= chosen.keys():
        for each in chosen.values():
            theirs = parameters[each["name"]]
            dtypes.add(str(theirs.dtype).removeprefix("mlx.core."))
            sources = [rows.Held(given[name]) for name in each["inputs"]]
            step = unpack.FORMATS[trial["format"]]
            ours = step.rows(sources, tuple(each["shape"]), each["settings"])
            same = ours.read(0, rows.count(ours)).reshape(theirs.shape).astype(theirs.dtype)
            if not mx.array_equal(same, theirs):
                dtypes.add("")
    (dtype,) = dtypes if len(dtypes) == 1 else ("",)
    return {"dtype": dtype, "config": library.encode_config(config)}


def _numbers(mx: Any, like: Any, number: int) -> Any:
    """Return numbers for a trial: all bytes but those that stand for none, or what floats hold."""
    count = mx.arange(like.size, dtype=mx.uint32) * (2 * number + 13)
    if mx.issubdtype(like.dtype, mx.floating):
        return ((count % 1021 + 1) / 3072).astype(like.dtype).reshape(like.shape)
    octets = count % 251
    return mx.where(octets % 128 == 127, 0, octets).astype(like.dtype).reshape(like.shape)


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
    """Have modules begin with hollow arrays: the checkpoint's tensors take their place.

    MLX's generator would hold on to the graph of every random number that was asked for.
    """

    def quiet(original: Callable[..., Any]) -> Callable[..., Any]:
        def begun(*args: Any, **named: Any) -> Any:
            if args or "shape" not in named:
                return original(*args, **named)
            dtype = named.get("dtype") or mx.float32
            return hollow(mx, str(dtype).removeprefix("mlx.core."), named["shape"])

        return begun

    mx.random.uniform = quiet(mx.random.uniform)
    mx.random.normal = quiet(mx.random.normal)


def _refuse_noise(mx: Any, made_of_nothing: dict[str, Any]) -> None:
    """Refuse parameters that are made of no tensor, unless they are the same in every run.

    A library that asks for every parameter, as most do, refuses them itself.

    Raises:
        ValueError: they are what a class begins with, at random.
    """
    graph = ArrayGraph(mx, made_of_nothing.values())
    nodes = zip(made_of_nothing, graph.nodes, strict=True)
    if left := [name for name, node in nodes if not graph.reach(node, ())[1]]:
        listed = ",\n".join(left)
        raise ValueError(f"Missing {len(left)} parameters, which would stay random: \n{listed}.")


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


class _Done(NamedTuple):
    """What a library did to the checkpoint's tensors, besides making others of them.

    Attributes:
        looked_at: those that were evaluated: their zeros may have decided something.
        changed: those that were changed in place: the objects are the same still.
    """

    looked_at: set[str]
    changed: set[str]


def _done_to(mx: Any, given: dict[str, Any], kept: dict[str, Any]) -> _Done:
    """Tell what was done to tensors.

    A cast to its own dtype is the array itself under another Python object: where the two are not
    one node of a graph, they have parted.
    """
    done = _Done(set(), set())
    names = list(kept)
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        graph = ArrayGraph(mx, [*(kept[name] for name in some), *(given[name] for name in some)])
        now = graph.nodes[len(some) :]
        pairs = list(zip(some, graph.nodes, strict=False))
        done.looked_at.update(name for name, node in pairs if graph.operation(node) is None)
        changed = zip(pairs, now, strict=True)
        done.changed.update(name for (name, was), node in changed if was != node)
    return done


def inputs_reached(
    mx: Any, given: dict[str, Any], computed: dict[str, Any]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return, for each computed array, the checkpoint's tensors it is made of.

    And those of bytes that are factors of a product.
    """
    place = {name: i for i, name in enumerate(given)}
    layer_of = layer_names([*given, *computed])
    own: dict[str, list[str]] = {}
    for name in given:
        own.setdefault(layer_of[name], []).append(name)
    made_of: dict[str, list[str]] = {}
    factors: set[str] = set()

    def trace(names: Iterable[str], inputs: Sequence[str]) -> list[str]:
        """Trace these in a graph; return those that are made of other inputs, too."""
        names = list(names)
        graph = ArrayGraph(mx, [*(given[i] for i in inputs), *(computed[n] for n in names)])
        input_of = dict(zip(graph.nodes, inputs, strict=False))
        multiplied = graph.factors()
        factors.update(
            name
            for node, name in input_of.items()
            if node in multiplied and given[name].dtype == mx.uint8
        )
        others = []
        for name, node in zip(names, graph.nodes[len(inputs) :], strict=True):
            reached, whole = graph.reach(node, input_of)
            made_of[name] = sorted((input_of[each] for each in reached), key=place.__getitem__)
            if not whole:
                others.append(name)
        return others

    layers: dict[str, list[str]] = {}
    for name in computed:
        layers.setdefault(layer_of[name], []).append(name)
    # Most layers are made of themselves: a graph of all tensors is for the others alone.
    others = [name for layer, names in layers.items() for name in trace(names, own.get(layer, ()))]
    if others:
        trace(others, [*given])
    return made_of, sorted(factors)


if __name__ == "__main__":
    main()
