"""packed: the contract of a format, and what a checkpoint holds in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tasks.checkpoints.checkpoint import LogicalTensor
from tasks.core.errors import CheckpointError
from tasks.tensors.rows import Rows

Tensors = Mapping[str, LogicalTensor]
Read = Callable[[str], bytes]
FLOATS = ("float32", "bfloat16", "float16")
WORDS = ("int32", "uint32")
LARGEST_GROUP = 1 << 30  # of any weight's columns; beyond it numbers are none of MLX's
ACTIVATIONS = (
    ".input_scale", ".activation_scale", "_activation_scale", ".output_scale", ".k_scale",
    ".v_scale", ".q_scale", ".input_global_scale", ".input_zero_point", ".input_scale_ub",
)  # fmt: skip


class Repacking(NamedTuple):
    """How MLX holds the very numbers of a weight in a packing of its own.

    Attributes:
        group_size: as ``mx.quantize`` has it, and so have the next two.
        bits: of a number.
        mode: one of ``tasks.core.quantization.MODES``.
        scales: the dtype of the format's scales; "" in modes of floats.
        centred: whether the zero points are known to be half of the range: then no bias is rounded.
    """

    group_size: int
    bits: int
    mode: str
    scales: str = ""
    centred: bool = True

    def is_exact(self, dtype: str | None) -> bool:
        """Tell whether values are the very same once scales and biases are of ``dtype``.

        Numbers, scales and zero points have no more than 24 bits together unless scales are
        float32.
        """
        if self.mode != "affine":
            return True
        if self.scales == "float32":
            return False
        if dtype == "float32":
            return True
        return self.centred and dtype in (None, self.scales)


class Packed(NamedTuple):
    """A weight that is stored in several tensors.

    Attributes:
        shape: of the weight.
        inputs: the names of the tensors that it is made of, in the format's order.
        settings: what else it takes to unpack it, JSON.
        repacking: how MLX holds it, if it can.
        format: its name, a key of ``registry.FORMATS``; "", that of all that was found.
    """

    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    settings: dict[str, Any]
    repacking: Repacking | None = None
    format: str = ""


class Found(NamedTuple):
    """What a checkpoint holds in a format, or in several.

    Attributes:
        format: its name, a key of ``registry.FORMATS``; of several, their names.
        packed: the weights, by the name that each has once it is unpacked.
        left_out: tensors that are of no weight, such as scales of activations.
        used_up: others that say no more than headers do.
        called: what people call it, if that is not its name.
    """

    format: str
    packed: dict[str, Packed]
    left_out: tuple[str, ...] = ()
    used_up: tuple[str, ...] = ()
    called: str = ""


class Format(Protocol):
    """What a format's module has.

    Attributes:
        METHODS: the values of ``quant_method`` that it may be of.
    """

    METHODS: tuple[str, ...]

    def found(self, settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
        """Return what a checkpoint holds in the format; None if that is another.

        Args:
            settings: what config.json says of its quantization.
            tensors: the checkpoint's.
            read: returns a small tensor's bytes, by its name.

        Raises:
            CheckpointError: it is of a variant that is not unpacked, or its tensors do not fit.
        """

    def rows(self, sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
        """Return a weight, float32, that is unpacked as it is read.

        Args:
            sources: the tensors that it is made of.
            shape: of the weight.
            settings: as of ``Packed``.
        """

    def held_bytes(self, nbytes: Sequence[int]) -> int:
        """Return the bytes that are held while a weight is read, besides blocks of its rows.

        Args:
            nbytes: of each of the tensors that it is made of.
        """


def activations(tensors: Tensors) -> tuple[str, ...]:
    """Return the tensors that are for quantizing what a model computes, and not its weights."""
    return tuple(name for name in tensors if name.endswith(ACTIVATIONS))


def groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what compressed-tensors says of the weights of each of its groups."""
    tables = settings.get("config_groups")
    found = [table.get("weights") for table in tables.values()] if isinstance(tables, dict) else []
    return [weights for weights in found if isinstance(weights, dict)]


def paths(tensors: Tensors, suffix: str) -> list[str]:
    """Return the paths of the modules that have a tensor of ``suffix``, such as ``.qweight``."""
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def whole_number(settings: Mapping[str, Any], key: str, default: int) -> int:
    """Return a whole number of a checkpoint's settings; the default if it says null or nothing.

    Raises:
        CheckpointError: it is something else.
    """
    value = settings.get(key)
    value = default if value is None else value
    if type(value) is not int:
        raise CheckpointError(
            f"config.json has {key} = {value!r}, which is no whole number. Fetch it again."
        )
    return value


def group_size(settings: Mapping[str, Any], key: str, default: int) -> int:
    """Return how many columns share a scale, or -1: all of a row.

    Raises:
        CheckpointError: it is neither.
    """
    size = whole_number(settings, key, default)
    if size != -1 and not 0 < size <= LARGEST_GROUP:
        raise CheckpointError(
            f"config.json has {key} = {size}, which is no size of a group. Fetch it again."
        )
    return size


def require(name: str, tensors: Tensors, shape: Sequence[int], *dtypes: str) -> None:
    """Refuse a tensor that is not what its format has in its place.

    Raises:
        CheckpointError: it is missing, or of another shape or dtype.
    """
    if name not in tensors:
        raise CheckpointError(f"{name} is missing. Fetch the checkpoint again.")
    tensor = tensors[name]
    if tuple(tensor.shape) != tuple(shape) or (dtypes and tensor.dtype not in dtypes):
        wanted = f"{' or '.join(dtypes)} {tuple(shape)}"
        raise CheckpointError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and not {wanted}, which its format "
            "has in this place. Fetch the checkpoint again, or get it in bfloat16."
        )
