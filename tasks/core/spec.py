"""What models.toml asks for: the keys of a model, each declared once, and the targets they make.

A key is a field of a struct. Its type says what may stand there and its default what holds without
it; ``key`` says the rest. Messages, the JSON Schema and the reference page all come of that.
"""

# Annotations are evaluated here, not left as text: msgspec would evaluate them in every run.
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
Recipe = Literal[
    "mixed_2_6", "mixed_3_4", "mixed_3_5", "mixed_3_6", "mixed_3_8", "mixed_4_6", "mixed_4_8"
]
Dtype = Literal["float16", "bfloat16", "float32"]
Device = Literal["cpu", "gpu"]
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

At = tuple[str | int, ...]  # where in a table: keys, and indices of a list's elements


class Word(str):
    """A word that must be one of a registry's, by its subclass; registries lie in rooms above."""

    __slots__ = ()


class LoaderName(Word):
    """One of ``tasks.checkpoints.loaders``."""

    __slots__ = ()


class LayoutName(Word):
    """One of ``tasks.layouts.registry``."""

    __slots__ = ()


class StageName(Word):
    """A stage whose results the cache keeps if it is told to."""

    __slots__ = ()


class SourceName(str):
    """A source as models.toml names it."""

    __slots__ = ()


class TextFile(str):
    """The path of a file of text."""

    __slots__ = ()


class TextFiles(tuple[str, ...]):
    """The paths of files of text; models.toml may give one without a list."""

    __slots__ = ()


class RepositoryName(str):
    """A repository on a model hub, ORG/NAME; ``{target}`` in it is the target's name."""

    __slots__ = ()

    def of(self, target: str) -> str:
        """Return the repository of a target."""
        return self.replace("{target}", target)


class Size(int):
    """A number of bytes; models.toml may give it a unit."""

    __slots__ = ()


class Mistake(ValueError):
    """One thing that is wrong with a table or a value.

    Attributes:
        fact: what is wrong, to follow the key's name.
        mend: what to do about it, if that can be said.
        at: where, below what was read.
    """

    def __init__(self, fact: str, mend: str = "", at: At = ()) -> None:
        super().__init__(fact)
        self.fact = fact
        self.mend = mend
        self.at = at


class Mistakes(ValueError):
    """All that is wrong with a table or a value.

    Attributes:
        mistakes: one by one.
    """

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__("; ".join(mistake.fact for mistake in mistakes))
        self.mistakes = mistakes


def key(meaning: str, *, change: str, example: Any, default: str = "") -> Meta:
    """Describe a key of models.toml, for people.

    Args:
        meaning: one sentence on what it is for.
        change: what is done again when it changes.
        example: a value.
        default: what holds without it, where the field's default does not say it.
    """
    extra = {"change": change, "default": default}
    return Meta(description=meaning, examples=[example], extra=extra)


_CALIBRATED = "tokens, activations and all that comes of them"
_RUN = "tokens, teacher, forward and evaluate; and activations"
_CHOSEN = "sensitivity, for what was not tried; quantize, for modules that change; and pack"
_QUANTIZED = "quantize, for the layers that it concerns, and pack"


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
            change=_QUANTIZED,
            example="*.mlp.down_proj",
        ),
    ]
    bits: Annotated[
        int | None,
        key("Bits per weight.", default="the target's", change=_QUANTIZED, example=6),
    ] = None
    group_size: Annotated[
        int | None,
        key("Weights that share a scale.", default="the target's", change=_QUANTIZED, example=32),
    ] = None
    mode: Annotated[
        Mode | None,
        key(
            "The format of the quantized weights.",
            default="the target's",
            change=_QUANTIZED,
            example="mxfp8",
        ),
    ] = None
    skip: Annotated[
        bool,
        key(
            "Whether the modules stay unquantized; then the rule says no bits, group size or mode.",
            change=_QUANTIZED,
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
        int | None, key("Bits per weight.", default="the mode's", change=_CHOSEN, example=5)
    ] = None
    group_size: Annotated[
        int | None,
        key(
            "Weights that share a scale.",
            default="the target's, where the mode is its own; else the mode's",
            change=_CHOSEN,
            example=32,
        ),
    ] = None
    mode: Annotated[
        Mode | None,
        key(
            "The format of the quantized weights.",
            default="the target's",
            change=_CHOSEN,
            example="mxfp4",
        ),
    ] = None


class Quantize(Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is quantized."""

    bits: Annotated[
        int | None, key("Bits per weight.", default="the mode's", change=_QUANTIZED, example=8)
    ] = None
    group_size: Annotated[
        int | None,
        key("Weights that share a scale.", default="the mode's", change=_QUANTIZED, example=32),
    ] = None
    mode: Annotated[
        Mode,
        key(
            "The format of the quantized weights, as MLX spells it.",
            change=_QUANTIZED,
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
            change=_QUANTIZED,
            example="mixed_3_6",
        ),
    ] = None
    target_bpw: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        key(
            "Bits per weight of the whole model, as mlx-lm counts them, in place of `bits`: each "
            "module's are chosen, so that what the model makes is changed least.",
            default="none",
            change=_CHOSEN,
            example=4.5,
        ),
    ] = None
    fit: Annotated[
        Size | None,
        key(
            "The same, by the size of the whole model in memory, with its cache of `context` "
            "tokens.",
            default="none",
            change=_CHOSEN,
            example="16GB",
        ),
    ] = None
    context: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        key(
            "Tokens of the cache that `fit` leaves room for.",
            default="4096, with `fit`",
            change=_CHOSEN,
            example=32768,
        ),
    ] = None
    candidates: Annotated[
        Annotated[tuple[Candidate, ...], Meta(min_length=1)],
        key(
            "What `target_bpw` and `fit` choose of.",
            default="all bits of the mode, in groups of `group_size`, or without it of all sizes "
            "that the mode has",
            change=_CHOSEN + "; what was tried before is not tried again",
            example=[{"bits": 4}, {"bits": 4, "group_size": 32}, {"bits": 6}],
        ),
    ] = ()
    exact: Annotated[
        bool,
        key(
            "Whether it is measured what each candidate costs each module, by a run of the model "
            "with that module alone quantized, and not estimated: hours in place of minutes.",
            change=_CHOSEN,
            example=True,
        ),
    ] = False
    min_bits: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        key(
            "The fewest bits per weight that are chosen of the candidates.",
            default="none",
            change=_CHOSEN,
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
            change=_QUANTIZED,
            example="gptq",
        ),
    ] = None
    rules: Annotated[
        tuple[Rule, ...],
        key(
            "Exceptions for single modules; the first that matches a module wins.",
            change=_QUANTIZED,
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


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys of a model."""

    source_name: Annotated[
        SourceName | None,
        key(
            "The checkpoint: Meta's folder (`consolidated.*.pth`, `params.json`, "
            "`tokenizer.model`) or Hugging Face's (`*.safetensors` or `pytorch_model*.bin`, "
            "`config.json`); or such a folder on the hub, `hf:ORG/NAME`, with `@` a branch, tag or "
            "commit and `/` a subfolder behind it: `hf:ORG/NAME@main/original`.",
            default="none, it must be given",
            change="extract, the other stages for layers whose tensors are others, and pack",
            example="checkpoints/llama-7b",
        ),
    ] = field(name="source", default=None)
    loader: Annotated[
        LoaderName | None,
        key(
            "What reads the checkpoint: `llama` Meta's, `transformers` Hugging Face's, `mistral` "
            "`consolidated*.safetensors`, whatever lies beside them.",
            default="told from what the folder holds",
            change="the same as another `source`",
            example="transformers",
        ),
    ] = None
    layout: Annotated[
        LayoutName,
        key(
            "What the built model is for: `mlx-lm`; `mlx-vlm`, which keeps what a model sees and "
            "hears with (`pip install 'mlx-make[vlm]'`); `mlx-vlm-mtp`, the drafter that mlx-vlm "
            "splits off it; `mlx-audio`, of what speaks and hears (`'mlx-make[audio]'`); "
            "`mlx-embeddings` (`'mlx-make[embeddings]'`); or mlx-examples' `llama.py` (Llama "
            "only).",
            change="unshard, the later stages for layers that come out differently, and pack",
            example="mlx-examples",
        ),
    ] = field(default_factory=lambda: LayoutName("mlx-lm"))
    dtype: Annotated[
        Dtype | None,
        key(
            "What floating-point tensors are cast to.",
            default="what `config.json` says, as `mlx_lm.convert`; in layouts mlx-examples and "
            'mlx-embeddings `"float16"`',
            change="cast, quantize and pack",
            example="bfloat16",
        ),
    ] = None
    adapter_name: Annotated[
        SourceName | None,
        key(
            "What was trained on top of the model, and is fused with it: the folder of an adapter "
            "of mlx-lm (`adapters.safetensors`) or PEFT (`adapter_model.safetensors`), or such a "
            "folder on the hub, `hf:ORG/NAME`.",
            default="none",
            change="fuse, quantize for the layers that it changes, and pack",
            example="adapters/mine",
        ),
    ] = field(name="adapter", default=None)
    dequantize: Annotated[
        bool,
        key(
            "Whether a checkpoint that is quantized goes back to floats, as with "
            "`mlx_lm.convert -d`; beside `quantize`, before that.",
            change="unshard and the later stages",
            example=True,
        ),
    ] = False
    quantize: Annotated[
        Quantize | Literal[False, "keep"],
        key(
            'How the model is quantized; `false`, not at all; `"keep"`, as its author packed it: '
            "repacked for MLX, and not rounded again. Of a checkpoint that is packed so that MLX "
            "holds the very same values, that is so without being asked for.",
            change=_QUANTIZED,
            example={"bits": 4},
        ),
    ] = False
    device: Annotated[
        Device | None,
        key(
            "Where quantize computes, and the library's own `sanitize`; a CPU and a GPU need not "
            "agree to the bit.",
            default="MLX's default device",
            change="what `sanitize` computes, quantize and pack",
            example="cpu",
        ),
    ] = None
    max_shard_bytes: Annotated[
        Size | None,
        key(
            "The largest size of one weight file.",
            default="the layout's own",
            change="pack alone, which computes nothing",
            example="2GiB",
        ),
    ] = field(name="max_shard_size", default=None)
    files: Annotated[
        Path | None,
        key(
            "A folder of files that are laid over the built model: a README.md, a chat template, "
            "a tokenizer or config.json of your own; files in its folders too.",
            default="none",
            change="pack alone, which computes nothing",
            example="extra",
        ),
    ] = None
    card_name: Annotated[
        TextFile | None,
        key(
            "The Jinja template of the built model's README.md.",
            default="mlx-make's own",
            change="pack alone, which computes nothing",
            example="card.md.j2",
        ),
    ] = field(name="card", default=None)
    tags: Annotated[
        tuple[str, ...],
        key(
            "Words for the front matter of the built model's README.md, beside those of the "
            "checkpoint's own.",
            change="pack alone, which computes nothing",
            example=["chat", "legal"],
        ),
    ] = ()
    publish: Annotated[
        RepositoryName | None,
        key(
            "The repository on the hub that `mlx-make publish` uploads the model to, `ORG/NAME`; "
            "`{target}` in it is the target's name.",
            default="none",
            change="pack, since README.md names it, and publish",
            example="my-org/{target}",
        ),
    ] = None
    create: Annotated[
        bool,
        key(
            "Whether `publish` makes the repository where there is none.",
            change="publish",
            example=False,
        ),
    ] = True
    private: Annotated[
        bool,
        key(
            "Whether the repository that `publish` makes is private; one that all can see is then "
            "an error.",
            change="publish",
            example=True,
        ),
    ] = False
    collection: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        key(
            "The title of a collection on the hub, of the same owner, that `publish` puts the "
            "repository into; it is made where there is none.",
            default="none",
            change="publish",
            example="Our models",
        ),
    ] = None


MAX_SEQUENCE = 1 << 20  # tokens: MLX counts what they are times each other in 64 bits, along one 32


class Quality(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """On what text models are run, and how much of it."""

    text: Annotated[
        TextFiles | None,
        key(
            "The text that models are calibrated on, a file or several: plain text, or `.jsonl` "
            'with a `{"text": "…"}` or a `{"messages": […]}` a line.',
            default="a part of Python's own help, which every machine has",
            change=_CALIBRATED,
            example="calibration.txt",
        ),
    ] = None
    imatrix: Annotated[
        TextFile | None,
        key(
            "An importance matrix of llama.cpp's (GGUF), of the very model, to choose within a "
            "budget by: no model is run for it.",
            default="none: what the model is given on `text`, and how much that matters",
            change="sensitivity, quantize for modules whose settings change, and pack",
            example="model.imatrix.gguf",
        ),
    ] = None
    evaluate_text: Annotated[
        TextFile | None,
        key(
            "The text that models are evaluated on, a file of such text: another than they are "
            "calibrated on.",
            default="another part of Python's own help",
            change="tokens, teacher, forward and evaluate",
            example="held-out.txt",
        ),
    ] = None
    samples: Annotated[
        int,
        Meta(ge=1),
        key("How many sequences of a text.", change=_RUN, example=128),
    ] = 32
    sequence_length: Annotated[
        int,
        Meta(ge=2, le=MAX_SEQUENCE),
        key("Tokens of each sequence.", change=_RUN, example=2048),
    ] = 512
    seed: Annotated[
        int, Meta(ge=0), key("Which sequences of the text are taken.", change=_RUN, example=7)
    ] = 0
    top_logits: Annotated[
        int,
        Meta(ge=1),
        key(
            "How many of the most likely next tokens of the unquantized model are kept to compare "
            "with; all others count as one.",
            change="the last segment of teacher, and evaluate; of exact sensitivities, "
            "baseline, divergence and sensitivity",
            example=4096,
        ),
    ] = 1024


class SourceSpec(Struct, frozen=True):
    """Where a checkpoint is to be had.

    Attributes:
        prefix: of the type of source, a key of ``tasks.checkpoints.sources.SOURCES``.
        location: where, as that type has it: of a folder, its absolute path.
    """

    prefix: str
    location: str

    def __str__(self) -> str:
        return self.prefix + self.location


class Target(Settings, frozen=True, kw_only=True):
    """One model, or one variant of it, to build: the keys that hold for it, and what it is called.

    Attributes:
        name: name of its folder under build/.
        source: where the checkpoint is to be had.
        source_name: what models.toml calls it, with the loader if it names one.
        adapter: where its adapter is to be had, if it has one.
        max_shard_bytes: largest size of a weight file's tensors together, in bytes.
        card: the template of README.md, if it is the project's own.
        keep: whether ``quantize = "keep"``; then ``quantize`` is False.
        where: what in the file asks for it, for messages.
    """

    name: str
    source: SourceSpec = field(name="source_spec")  # no key: "source" is what the file says
    source_name: SourceName
    adapter: SourceSpec | None = field(name="adapter_spec", default=None)
    max_shard_bytes: Size
    card: Path | None = field(name="card_path", default=None)
    keep: bool = False
    quantize: Quantize | Literal[False] = False
    where: object

    @property
    def repository(self) -> str | None:
        """The repository that it is published to, if it is to be."""
        return self.publish and self.publish.of(self.name)
