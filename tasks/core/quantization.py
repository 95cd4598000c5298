"""quantization: what models.toml asks of how models are quantized: rules, budgets, methods."""

# Annotations are evaluated here, as in ``spec``.
from math import isfinite
from typing import Annotated, Literal

from msgspec import Meta, Struct

from tasks.core.kinds import Dtype, Mistake, Mistakes, Size, key

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
Recipe = Literal[
    "mixed_2_6", "mixed_3_4", "mixed_3_5", "mixed_3_6", "mixed_3_8", "mixed_4_6", "mixed_4_8"
]
Method = Literal["gptq", "awq"]

# What mx.quantize takes: mode -> (group sizes, bits), the first of each being MLX's default. The
# installed MLX may take more: ``tasks.tensors.modes``.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
RECIPES: tuple[str, ...] = Recipe.__args__  # type: ignore[attr-defined]

CHOSEN = "sensitivity, for what was not tried; quantize, for modules that change; and pack"
QUANTIZED = "quantize, for the layers that it concerns, and pack"


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """How the modules that match are cast and quantized, where they are an exception."""

    match: Annotated[
        str,
        Meta(min_length=1),
        key(
            "The modules that the rule is for: a shell pattern (`*`, `?`, `[…]`) over the whole "
            "path of a module, such as `model.layers.0.mlp.down_proj`. One that matches none is "
            "matched with the checkpoint's names, such as `*.experts.*` of what MLX has in one as "
            "`switch_mlp`.",
            default="none, it must be given",
            change=QUANTIZED,
            example="*.mlp.down_proj",
        ),
    ]
    bits: Annotated[
        int | None,
        key("Bits per weight.", default="the target's", change=QUANTIZED, example=6),
    ] = None
    group_size: Annotated[
        int | None,
        key("Weights that share a scale.", default="the target's", change=QUANTIZED, example=32),
    ] = None
    mode: Annotated[
        Mode | None,
        key(
            "The format of the quantized weights.",
            default="the target's",
            change=QUANTIZED,
            example="mxfp8",
        ),
    ] = None
    skip: Annotated[
        bool,
        key(
            "Whether the modules stay unquantized; then the rule says no bits, group size or mode.",
            change=QUANTIZED,
            example=True,
        ),
    ] = False
    dtype: Annotated[
        Dtype | None,
        key(
            "What floating-point tensors of the modules are cast to: of those that are quantized, "
            "before that, and so their scales and biases. Such a rule is for modules of any kind, "
            "norms and routers too; alone, it says nothing of quantizing them.",
            default="the target's",
            change="cast, for the layers that it concerns, and the later stages",
            example="float32",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse keys that do not go together.

        Raises:
            Mistakes: there are such.
        """
        if self.skip and self.says_how:
            raise Mistakes(
                Mistake(f"({self.match!r}) skips and quantizes", "drop skip or the rest")
            )
        if not self.is_of_quantizing and self.dtype is None:
            mend = "add bits, group_size, mode, dtype or skip = true"
            raise Mistakes(Mistake(f"({self.match!r}) changes nothing", mend))

    @property
    def says_how(self) -> bool:
        """Whether it says how modules are quantized."""
        return (self.bits, self.group_size, self.mode) != (None, None, None)

    @property
    def is_of_quantizing(self) -> bool:
        """Whether it says that modules are quantized, or are not."""
        return self.skip or self.says_how


class Candidate(Struct, frozen=True, forbid_unknown_fields=True):
    """A way to quantize a module, of which a budget's are chosen."""

    bits: Annotated[
        int | None, key("Bits per weight.", default="the mode's", change=CHOSEN, example=5)
    ] = None
    group_size: Annotated[
        int | None,
        key(
            "Weights that share a scale.",
            default="the target's, where the mode is its own; else the mode's",
            change=CHOSEN,
            example=32,
        ),
    ] = None
    mode: Annotated[
        Mode | None,
        key(
            "The format of the quantized weights.",
            default="the target's",
            change=CHOSEN,
            example="mxfp4",
        ),
    ] = None


class Quantize(Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is quantized."""

    bits: Annotated[
        int | None, key("Bits per weight.", default="the mode's", change=QUANTIZED, example=8)
    ] = None
    group_size: Annotated[
        int | None,
        key("Weights that share a scale.", default="the mode's", change=QUANTIZED, example=32),
    ] = None
    mode: Annotated[
        Mode,
        key(
            "The format of the quantized weights, as MLX spells it.",
            change=QUANTIZED,
            example="mxfp4",
        ),
    ] = "affine"
    recipe: Annotated[
        Recipe | None,
        key(
            "One of mlx-lm's mixtures of bits, for mode affine (`mixed_3_5`, `mixed_3_8` and "
            "`mixed_4_8` are of layout mlx-vlm alone). `bits` beside it is only what `config.json` "
            "says, as with `mlx_lm.convert`.",
            default="none",
            change=QUANTIZED,
            example="mixed_3_6",
        ),
    ] = None
    target_bpw: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        key(
            "Bits per weight of the whole model, as mlx-lm counts them, in place of `bits`: each "
            "module's are chosen, so that what the model makes is changed least.",
            default="none",
            change=CHOSEN,
            example=4.5,
        ),
    ] = None
    fit: Annotated[
        Size | None,
        key(
            "The same, by the size of the whole model in memory, with its cache of `context` "
            "tokens.",
            default="none",
            change=CHOSEN,
            example="16GB",
        ),
    ] = None
    context: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        key(
            "Tokens of the cache that `fit` leaves room for.",
            default="4096, with `fit`",
            change=CHOSEN,
            example=32768,
        ),
    ] = None
    candidates: Annotated[
        Annotated[tuple[Candidate, ...], Meta(min_length=1)],
        key(
            "What `target_bpw` and `fit` choose of.",
            default="all bits of the mode, in groups of `group_size`, or without it of all sizes "
            "that the mode has",
            change=CHOSEN + "; what was tried before is not tried again",
            example=[{"bits": 4}, {"bits": 4, "group_size": 32}, {"bits": 6}],
        ),
    ] = ()
    exact: Annotated[
        bool,
        key(
            "Whether it is measured what each candidate costs each module, by a run of the model "
            "with that module alone quantized, and not estimated: hours in place of minutes.",
            change=CHOSEN,
            example=True,
        ),
    ] = False
    min_bits: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        key(
            "The fewest bits per weight that are chosen of the candidates.",
            default="none",
            change=CHOSEN,
            example=3,
        ),
    ] = None
    method: Annotated[
        Method | None,
        key(
            "How weights are rounded, so that what the model makes of calibration text changes "
            "least (mode affine): `gptq`, each error made good by the weights to come, or `awq`, "
            "scaled and clipped before. Embeddings are rounded to nearest.",
            default="each to nearest",
            change=QUANTIZED,
            example="gptq",
        ),
    ] = None
    rules: Annotated[
        tuple[Rule, ...],
        key(
            "Exceptions for single modules; the first that matches a module wins.",
            change=QUANTIZED,
            example=[
                {"match": "lm_head", "skip": True},
                {"match": "*.mlp.down_proj", "bits": 6},
            ],
        ),
    ] = ()

    def __post_init__(self) -> None:
        """Refuse keys that do not go together.

        Raises:
            Mistakes: there are such.
        """
        if self.recipe and self.mode != "affine":
            fact = f"has recipe {self.recipe!r} with mode {self.mode!r}"
            raise Mistakes(Mistake(fact, "drop one: recipes are for mode 'affine'"))
        given = [name for name in ("target_bpw", "fit") if getattr(self, name) is not None]
        fixed = [name for name in ("bits", "recipe") if getattr(self, name) is not None]
        if len(given) > 1 or (given and fixed):
            both = " and ".join([*given, *fixed][:2])
            raise Mistakes(Mistake(f"has {both}, which both say how many bits", "drop one"))
        if self.target_bpw is not None and not isfinite(self.target_bpw):
            raise Mistakes(Mistake(f"has target_bpw = {self.target_bpw}", "give a number"))
        budget = [name for name in ("candidates", "exact", "min_bits") if getattr(self, name)]
        if budget and not given:
            mend = "add target_bpw or fit, or drop it"
            raise Mistakes(Mistake(f"has {budget[0]}, but nothing to choose for", mend))
        if self.context and self.fit is None:
            raise Mistakes(Mistake("has context, which is fit's", "add fit, or drop it"))
        modes = {self.mode, *(r.mode for r in self.rules), *(c.mode for c in self.candidates)}
        for mode in sorted(filter(None, modes)):
            if self.method and mode != "affine":
                fact = f"has method {self.method!r} with mode {mode!r}"
                raise Mistakes(
                    Mistake(fact, "drop one: it rounds to integers, as 'affine' has them")
                )

    @property
    def chooses(self) -> bool:
        """Whether each module's setting is chosen within a budget."""
        return self.target_bpw is not None or self.fit is not None
