"""fusions: which of a model's parameters an adapter changes, and by which of its tensors."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import msgspec

from tasks.checkpoints import adapter as adapters
from tasks.checkpoints.adapter import Adapter
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError
from tasks.core.text import listed, plural
from tasks.layouts.model import Model, Parameter
from tasks.layouts.peft_experts import Experts

PREFIX = "base_model.model."
PARTS = re.compile(
    r"(?P<path>.*?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|lora_B\.bias)"
)
ROLES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a",
         "lora_embedding_B": "b", "lora_magnitude_vector": "m",
         "lora_magnitude_vector.weight": "m"}  # fmt: skip


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What an adapter does to a weight, or to one expert's of a stack of them.

    Attributes:
        kind: ``lora``, ``dora`` or ``replace``; with ``peft_`` before it, by PEFT's arithmetic, of
            which some are of all experts of a stack (``peft_experts.OF_STACKS``).
        transposed: whether the factors make the transposed weight, as those of embeddings do not.
        scale: of the factors' product.
        expert: the first axis' index that it is for; None, all of the weight.
        tensors: by role (``a``, ``b``, ``m``, or ``weight``): name, dtype, shape, digest.
    """

    kind: str
    transposed: bool
    scale: float
    expert: int | None
    tensors: dict[str, tuple[str, str, tuple[int, ...], str]]


Deltas = dict[str, list[Delta]]
Part = tuple[str, str, tuple[int, ...], str]
MERGED = "Have PEFT merge it (merge_and_unload), and name the folder that this makes as source."
FLOATS = ("float32", "bfloat16", "float16")
OTHERS = (
    "fan_in_fan_out", "trainable_token_indices", "layer_replication", "use_qalora", "use_bdlora",
    "kasa_config", "monteclora_config", "arrow_config",
)  # fmt: skip
# Unless PEFT converted them as it saved them: then it says so no more.
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PATTERN_SECONDS = 5  # that an adapter's patterns may take in all
MOST_PATTERNS, LONGEST_PATTERN = 10_000, 1000


def deltas(adapter: Adapter, model: Model, checkpoint: Checkpoint) -> Deltas:
    """Return what an adapter does to a model, by the parameter's name.

    Raises:
        CheckpointError: some of its tensors fit nowhere, or it is of a kind that is not fused.
    """
    checkpoint = model.told or checkpoint  # by plain names, whatever they are packed as
    if adapter.file == adapters.MLX_LM:
        found = dict(_of_mlx_lm(adapter, model))
    else:
        found = _of_peft(adapter, model, checkpoint)
    used = {part[0] for each in found.values() for delta in each for part in delta.tensors.values()}
    if left := [name for name in adapter.tensors if name not in used]:
        mend = _mend(left, model, checkpoint)
        raise CheckpointError(
            f"adapter {adapter.source.location}: {plural(len(left), 'tensor')} of it fit nowhere "
            f"in the model ({listed(left)}). {mend}"
        )
    for name, each in found.items():
        of = Counter(
            (delta.expert, "replace" if delta.kind == "replace" else "add") for delta in each
        )
        if any(count > 1 for count in of.values()):
            raise CheckpointError(
                f"adapter {adapter.source.location} says twice what becomes of {name}. Have it "
                "saved anew."
            )
    return found


def _mend(left: Sequence[str], model: Model, checkpoint: Checkpoint) -> str:
    """Return what to do about tensors that fit nowhere."""
    if any(_is_packed(model, name) for name in left):
        return "The model's own are quantized: add dequantize = true, and quantize = … for bits."
    modules = {match["path"] for name in left if (match := PARTS.fullmatch(_plain(name)))}
    if any(f"{module}.weight" in checkpoint.tensors for module in modules):
        return f"{model.library or 'The model'} makes others of these weights. {MERGED}"
    return "Is it of another model, or of another version of it?"


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _is_packed(model: Model, name: str) -> bool:
    path, *_ = re.split(r"\.lora_[abAB]", _plain(name), maxsplit=1)
    path = path.removesuffix(".m")
    return f"{path}.scales" in model.parameters


def _part(adapter: Adapter, name: str) -> Part:
    tensor = adapter.tensors[name]
    return name, tensor.dtype, tensor.shape, adapter.digests[name]


def _of_mlx_lm(adapter: Adapter, model: Model) -> Iterator[tuple[str, list[Delta]]]:
    """Yield what ``mlx_lm.fuse`` would make of an adapter."""
    config = adapter.config
    if config.get("fine_tune_type") == "full":
        for name in adapter.tensors:
            if name in model.parameters and adapter.tensors[name].shape == _shape(model, name):
                delta = Delta("replace", False, 1.0, None, {"weight": _part(adapter, name)})
                yield name, [delta]
        return
    settings = config.get("lora_parameters")
    scale = settings.get("scale") if isinstance(settings, dict) else None
    scale = _number(adapter, "scale among lora_parameters, by which mlx-lm multiplies,", scale)
    kind = "dora" if config.get("fine_tune_type") == "dora" else "lora"
    parts = {"a": "lora_a", "b": "lora_b"} | ({"m": "m"} if kind == "dora" else {})
    for path in (
        name.removesuffix(".lora_a") for name in adapter.tensors if name.endswith("lora_a")
    ):
        weight = f"{path}.weight"
        names = {role: f"{path}.{part}" for role, part in parts.items()}
        tensors = {r: _part(adapter, name) for r, name in names.items() if name in adapter.tensors}
        if weight not in model.parameters or "b" not in tensors or _is_packed(model, weight[:-7]):
            continue
        shape = _shape(model, weight)
        transposed = _transposed(shape, tensors["a"][2], tensors["b"][2])
        if transposed is None or not _all_floats(tensors):
            continue
        if kind == "dora" and not _is_magnitude(tensors, shape[0], len(shape)):
            raise CheckpointError(
                f"adapter {adapter.source.location}: fine_tune_type is dora, and {path}.m is "
                f"missing or not one number a row ({shape[0]}). Have it saved anew."
            )
        yield weight, [Delta(kind, transposed, scale, None, tensors)]


def _number(adapter: Adapter, what: str, value: Any) -> float:
    """Return a number that an adapter is multiplied by.

    Raises:
        CheckpointError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise CheckpointError(
            f"adapter {adapter.source.location}: {adapters.CONFIG} has no {what} that is a number "
            f"(it is {value!r}). Fetch it again."
        )
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float is as large as
        return False


def _all_floats(tensors: Mapping[str, Part]) -> bool:
    return all(part[1] in FLOATS for part in tensors.values())


def _is_magnitude(tensors: Mapping[str, Part], rows: int, axes: int) -> bool:
    """Tell whether there are DoRA's magnitudes: a number for each row of a matrix."""
    return axes == 2 and "m" in tensors and tensors["m"][2] == (rows,)


def _shape(model: Model, name: str) -> tuple[int, ...]:
    return tuple(model.parameters[name].shape)


def _transposed(weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool | None:
    """Tell whether a · b is the transposed weight, as of a linear layer; None, it is neither."""
    if len(weight) == 3:  # experts: b · a of each
        fits = len(b) == 3 and b[:2] == weight[:2] and len(a) in (2, 3) and a[-1] == weight[2]
        return False if fits and prod(a[:-1]) == weight[0] * b[2] else None
    if len(weight) != 2 or len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        return None
    if (b[1], a[0]) == weight:
        return True
    return False if (a[0], b[1]) == weight else None


def _of_peft(adapter: Adapter, model: Model, checkpoint: Checkpoint) -> Deltas:
    """Return what PEFT's ``merge_and_unload`` would make of an adapter.

    Raises:
        CheckpointError: it is of a kind that is not fused.
    """
    _refuse_others(adapter)
    scales = _Scales(adapter)
    places = _Places(model, checkpoint)
    experts = Experts(model)
    found: Deltas = {}
    for name in adapter.tensors:
        plain = _plain(name)
        if not PARTS.fullmatch(plain):  # modules_to_save, and biases that were trained
            plain = plain.replace(".modules_to_save", "").replace(".base_layer", "")
            for parameter, expert in places.of(plain):
                shape = parameter.shape if expert is None else parameter.shape[1:]
                part = {"weight": _part(adapter, name)}
                if shape == adapter.tensors[name].shape and _all_floats(part):
                    delta = Delta("replace", False, 1.0, expert, part)
                    found.setdefault(parameter.name, []).append(delta)
    for path, tensors, embeds in _factors(adapter):
        a, b = tensors["a"][2], tensors["b"][2]
        made = (a[1], b[0]) if embeds else (b[0], a[1])
        for parameter, expert in places.of(f"{path}.weight"):
            if made == (parameter.shape if expert is None else parameter.shape[1:]):
                scale = scales.of(path + ".weight" * _is_target(adapter, path), a[0])
                kind = "peft_dora" if _has_magnitude(adapter, path, tensors) else "peft_lora"
                delta = Delta(kind, embeds, scale, expert, tensors)
                found.setdefault(parameter.name, []).append(delta)
        module = path.replace(".base_layer", "")
        for parameter, kind, named, rank in experts.of(module, a, b):
            scale = scales.of(f"{module}.{named}", rank)
            found.setdefault(parameter.name, []).append(Delta(kind, False, scale, None, tensors))
    return found


def _factors(adapter: Adapter) -> Iterator[tuple[str, dict[str, Part], bool]]:
    """Yield each module's path, its factors by role, and whether they are an embedding's."""
    by_path: dict[str, dict[str, str]] = {}
    for name in adapter.tensors:
        if match := PARTS.fullmatch(_plain(name)):
            by_path.setdefault(match["path"], {})[match["part"]] = name
    for path, parts in by_path.items():
        tensors = {
            ROLES[part]: _part(adapter, name) for part, name in parts.items() if part in ROLES
        }
        if {"a", "b"} <= tensors.keys() and _all_floats(tensors):
            a, b = tensors["a"][2], tensors["b"][2]
            if len(a) == len(b) == 2 and a[0] == b[1]:
                yield path, tensors, "lora_embedding_A" in parts


def _is_target(adapter: Adapter, path: str) -> bool:
    """Tell whether PEFT adapted a module's weight as a parameter, by that name."""
    targets = adapter.config.get("target_parameters") or ()
    return any(f".{path}.weight".endswith(f".{target}") for target in targets)


def _refuse_others(adapter: Adapter) -> None:
    """Refuse what PEFT has that is not fused here.

    Raises:
        CheckpointError: it is such.
    """
    config = adapter.config
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        what = f"peft_type = {kind!r}"
    elif others := [key for key in OTHERS if config.get(key)]:
        what = f"{others[0]} = {str(config[others[0]])[:100]}"
    elif (begun := str(config.get("init_lora_weights"))).startswith(CHANGE_BASE):
        what = f"init_lora_weights = {begun!r}, of a base model that PEFT changed with it"
    elif any(name.endswith("lora_B.bias") for name in adapter.tensors):
        what = "lora_bias = true"
    elif config.get("alora_invocation_tokens"):
        what = "alora_invocation_tokens, which no merged model has"
    else:
        return
    raise CheckpointError(
        f"adapter {adapter.source.location} has {what}: that is not fused here. {MERGED}"
    )


def _has_magnitude(adapter: Adapter, path: str, tensors: Mapping[str, Part]) -> bool:
    """Tell whether a module has DoRA's magnitudes.

    Raises:
        CheckpointError: its tensors and its configuration do not agree on that.
    """
    wanted = bool(adapter.config.get("use_dora"))
    rows = tensors["b"][2][0]
    if wanted != ("m" in tensors) or (wanted and not _is_magnitude(tensors, rows, 2)):
        raise CheckpointError(
            f"adapter {adapter.source.location}: use_dora is {str(wanted).lower()}, and {path} has "
            f"{'no' if 'm' not in tensors else 'a'} lora_magnitude_vector"
            f"{f' of {rows} numbers' if wanted else ''}. Have it saved anew."
        )
    return wanted


class _Scales:
    """What PEFT multiplies modules' products by, as its configuration says."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._end = time.monotonic() + PATTERN_SECONDS
        self._rank_of = self._by_pattern("rank_pattern", "r")
        self._alpha_of = self._by_pattern("alpha_pattern", "lora_alpha")
        self._root = bool(adapter.config.get("use_rslora"))

    def of(self, path: str, rank: int) -> float:
        """Return a module's.

        Args:
            path: the module's.
            rank: of its factors.

        Raises:
            CheckpointError: the configuration says another rank, or no number.
        """
        if (said := self._rank_of(path)) != rank or isinstance(said, bool) or not rank:
            raise CheckpointError(
                f"adapter {self._adapter.source.location}: {path} has rank {rank}, and "
                f"{adapters.CONFIG} says {said!r}. Is it of another training run?"
            )
        alpha = _number(self._adapter, f"lora_alpha of {path}", self._alpha_of(path))
        return alpha / (math.sqrt(rank) if self._root else rank)

    def _by_pattern(self, patterns: str, otherwise: str) -> Callable[[str], Any]:
        """Return what says a module's value: the first pattern that its path ends with, if any.

        (``get_pattern_key`` of PEFT.) Patterns are anybody's, and some take for ever.
        """
        table = self._adapter.config.get(patterns) or {}
        default = self._adapter.config.get(otherwise, 8)
        if not isinstance(table, dict) or len(table) > MOST_PATTERNS:
            raise self._odd(patterns, "is no table, or a very long one")
        if not table:
            return lambda _: default
        import regex  # which knows an end, and comes with transformers

        compiled = []
        for pattern, value in table.items():
            if len(pattern) > LONGEST_PATTERN or re.search(r"\(\?(?!:)", pattern):
                raise self._odd(patterns, f"has {pattern[:100]!r}, which is no module's name")
            try:
                compiled.append((regex.compile(rf"(.*\.)?({pattern})$"), value))
            except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                raise self._odd(patterns, f"has {pattern!r}: {error}") from error

        def value_of(path: str) -> Any:
            try:
                for pattern, value in compiled:
                    left = max(self._end - time.monotonic(), 0.001)
                    if pattern.match(path, timeout=left):
                        return value
            except TimeoutError as error:
                raise self._odd(patterns, f"takes over {PATTERN_SECONDS} s to match") from error
            return default

        return value_of

    def _odd(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"adapter {self._adapter.source.location}: {key} {what}. {MERGED}")


class _Places:
    """Finds what a checkpoint's tensors are in the model."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._made_of: dict[str, list[Parameter]] = {}
        for parameter in model.parameters.values():
            for key in parameter.inputs:
                self._made_of.setdefault(key, []).append(parameter)

    def of(self, name: str) -> Iterator[tuple[Parameter, int | None]]:
        """Yield the parameters that a tensor is, and as which expert's of a stack."""
        if name not in self._tensors:  # Mixtral's, which transformers 5 calls otherwise
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if name not in self._tensors:
            return
        key = self._tensors[name].inputs[0]
        for parameter in self._made_of.get(key, ()):
            steps = [list(step) for step in parameter.steps if step[0] != "unpack"]
            if not steps:
                yield parameter, None
            elif steps == [["stack", 0]]:
                each = len(parameter.inputs) // parameter.shape[0]
                yield parameter, parameter.inputs.index(key) // each
