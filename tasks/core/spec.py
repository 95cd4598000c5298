"""spec: what models.toml asks for, worked out: targets, sources, quantization."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    """How the modules whose path ``match`` covers are quantized, where it differs.

    Attributes:
        match: shell pattern (``*``, ``?``, ``[…]``) over the whole module path.
        bits: bits per weight, or None for the target's.
        group_size: weights that share a scale, or None for the target's.
        mode: quantization mode, or None for the target's.
        skip: leave the module unquantized.
    """

    match: str
    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None
    skip: bool = False


@dataclass(frozen=True)
class Quantize:
    """What ``quantize`` asks for; None is MLX's default for the mode.

    Attributes:
        bits: bits per weight.
        group_size: weights that share a scale.
        mode: quantization mode, as MLX spells it.
        recipe: one of mlx-lm's mixed recipes, in place of ``bits``.
        rules: exceptions, the first that matches wins.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class SourceSpec:
    """Where a checkpoint is to be had.

    Attributes:
        kind: the type of source, a key of ``tasks.checkpoints.sources.SOURCES``.
        location: where, as that type has it: of a folder, its absolute path.
    """

    kind: str
    location: str

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True)
class Target:
    """One model, or one variant of it, to build.

    Attributes:
        name: name of its folder under build/.
        source: where the checkpoint is to be had.
        source_name: what models.toml calls it, with the loader if it names one.
        loader: which loader reads it, or None to tell from the folder.
        layout: how the built model's files are laid out.
        dtype: what floating tensors are cast to, or None for the layout's default.
        quantize: how it is quantized, or None.
        device: where quantize computes, or None for MLX's default device.
        max_shard_bytes: largest size of a weight file's tensors together, in bytes.
        where: the file and the line that ask for it, for messages.
    """

    name: str
    source: SourceSpec
    source_name: str
    loader: str | None
    layout: str
    dtype: str | None
    quantize: Quantize | None
    device: str | None
    max_shard_bytes: int
    where: str = field(default="", compare=False)


# What mx.quantize takes: mode -> (group sizes, bits), the first of each being MLX's default.
MODES = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
