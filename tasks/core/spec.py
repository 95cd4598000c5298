"""What models.toml asks for: the keys of a model, each declared once, and the targets they make.

A key is a field of a struct. Its type says what may stand there and its default what holds without
it; ``key`` says the rest. Messages, the JSON Schema and the reference page all come of that.
"""

# Annotations are evaluated here, not left as text: msgspec would evaluate them in every run.
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from tasks.core.kinds import (
    Dtype,
    LayoutName,
    LoaderName,
    RepositoryName,
    Size,
    SourceName,
    TextFile,
    TextFiles,
    key,
)
from tasks.core.quantization import QUANTIZED, Quantize

Device = Literal["cpu", "gpu"]

_CALIBRATED = "tokens, activations and all that comes of them"
_RUN = "tokens, teacher, forward and evaluate; and activations"


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
            change=QUANTIZED,
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
