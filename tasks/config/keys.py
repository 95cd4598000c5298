"""keys: what models.toml may say, key by key; its checks, JSON Schema and reference come of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tasks.core.spec import MODES, RECIPES

MAX_SHARD = {"mlx-lm": 5 << 30, "mlx-examples": 15 << 30}  # bytes: the peers' own limits
UNITS = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30,
}  # fmt: skip
NUMBER = r"\s*([0-9]{1,18})(?:\.([0-9]{1,18}))?\s*"  # of a size; its unit follows
MAX_NAME_BYTES = 200  # file systems take 255, and temporary names are longer
# What a remote may be, by its URL's scheme.
REMOTES = {
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "az": "az://CONTAINER/PREFIX",
    "https": "https://HOST/PATH",
    "http": "http://HOST/PATH",
    "file": "file:///ABSOLUTE/PATH",
}
# Credentials and tokens (``user:password@``, ``?sig=``) have no place in it.
_HOST = r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_PATH = r"/[^\x00-\x20\x7f?#]*"
REMOTE = rf"(?:(?:s3|gs|az)://[A-Za-z0-9_.-]+|https?://{_HOST})(?:{_PATH})?|file://{_PATH}"

Kind = Literal[
    "folder", "word", "words", "size", "URL", "number", "text", "switch", "quantize", "rules"
]


@dataclass(frozen=True)
class Key:
    """One key of models.toml.

    Attributes:
        name: as the file spells it.
        kind: what its value is.
        meaning: one sentence on what it is for.
        default: what holds without it, for people; a value of TOML where it is all in backticks.
        change: what is done again when it changes, for people.
        example: a value, as TOML spells it.
        valid: the words that a word, or one of several, may be.
    """

    name: str
    kind: Kind
    meaning: str
    default: str
    change: str
    example: str
    valid: tuple[str, ...] = ()


_QUANTIZED = "quantize, for the layers that it concerns, and pack"


def variable(table: str, key: str) -> str:
    """Return the environment variable that wins over a key of [cache] or [build]."""
    return f"MLX_MAKE_{table}_{key}".upper()


def _table(*keys: Key) -> dict[str, Key]:
    return {key.name: key for key in keys}


CACHE = _table(
    Key(
        "dir",
        "folder",
        "Where results are kept; several projects, and several checkouts of one, may share it.",
        '`".mlx-make/cache"`',
        "what the new folder does not hold",
        '"~/.cache/mlx-make"',
    ),
    Key(
        "keep",
        "words",
        "The stages whose intermediate results are kept; those of quantize always are.",
        '`["cast"]`',
        "nothing at once; what was not kept is made again when it is wanted",
        '["unshard", "cast"]',
        ("unshard", "cast"),
    ),
    Key(
        "remote",
        "URL",
        "A store shared with other machines, from which results are fetched in place of being "
        "computed; credentials come from the environment and never stand here.",
        "none",
        "nothing; what this machine has is not fetched again",
        '"s3://bucket/prefix"',
    ),
    Key(
        "mode",
        "word",
        "What is done with the remote: fetch and upload, only fetch, or leave it alone.",
        '`"read-write"`',
        "nothing",
        '"read-only"',
        ("read-write", "read-only", "off"),
    ),
    Key(
        "max_size",
        "size",
        "What `doit cache gc` shrinks the cache to.",
        "no bound",
        "nothing; what `doit cache gc` removed is made again, or fetched, when it is wanted",
        '"100GB"',
    ),
)
BUILD = _table(
    Key(
        "memory",
        "size",
        "What the layers that are worked on at one time may take together.",
        "a share of the machine's memory",
        "nothing; results do not depend on it",
        '"4GiB"',
    ),
)
MODEL = _table(
    Key(
        "source",
        "folder",
        "The checkpoint: Meta's folder (`consolidated.*.pth`, `params.json`, `tokenizer.model`) or "
        "Hugging Face's (`*.safetensors` or `pytorch_model*.bin`, `config.json`).",
        "none, it must be given",
        "extract, the other stages for layers whose tensors are others, and pack",
        '"checkpoints/llama-7b"',
    ),
    Key(
        "loader",
        "word",
        "What reads the checkpoint: `llama` Meta's, `transformers` Hugging Face's.",
        "told from what the folder holds",
        "the same as another `source`",
        '"transformers"',
        ("llama", "transformers"),
    ),
    Key(
        "layout",
        "word",
        "What the built model is for: `mlx-lm`, or mlx-examples' `llama.py` (Llama only).",
        '`"mlx-lm"`',
        "unshard, the later stages for layers that come out differently, and pack",
        '"mlx-examples"',
        ("mlx-lm", "mlx-examples"),
    ),
    Key(
        "dtype",
        "word",
        "What floating-point tensors are cast to.",
        'what `config.json` says, as `mlx_lm.convert`; in layout mlx-examples `"float16"`',
        "cast, quantize and pack",
        '"bfloat16"',
        ("float16", "bfloat16", "float32"),
    ),
    Key(
        "quantize",
        "quantize",
        "How the model is quantized; `false`, not at all.",
        "`false`",
        _QUANTIZED,
        "{ bits = 4, group_size = 64 }",
    ),
    Key(
        "device",
        "word",
        "Where quantize computes, and mlx-lm's own `sanitize`; a CPU and a GPU need not agree to "
        "the bit.",
        "MLX's default device",
        "what `sanitize` computes, quantize and pack",
        '"cpu"',
        ("cpu", "gpu"),
    ),
    Key(
        "max_shard_size",
        "size",
        "The largest size of one weight file.",
        ", ".join(f'in layout {name} `"{size >> 30}GiB"`' for name, size in MAX_SHARD.items()),
        "pack alone, which computes nothing",
        '"2GiB"',
    ),
)
QUANTIZE = _table(
    Key("bits", "number", "Bits per weight.", "the mode's", _QUANTIZED, "8"),
    Key("group_size", "number", "Weights that share a scale.", "the mode's", _QUANTIZED, "32"),
    Key(
        "mode",
        "word",
        "The format of the quantized weights, as MLX spells it.",
        '`"affine"`',
        _QUANTIZED,
        '"mxfp4"',
        tuple(MODES),
    ),
    Key(
        "recipe",
        "word",
        "One of mlx-lm's mixtures of bits, in place of `bits`; for mode affine.",
        "none",
        _QUANTIZED,
        '"mixed_3_6"',
        RECIPES,
    ),
    Key(
        "rules",
        "rules",
        "Exceptions for single modules; the first that matches a module wins.",
        "`[]`",
        _QUANTIZED,
        '[{ match = "lm_head", skip = true }, { match = "*.mlp.down_proj", bits = 6 }]',
    ),
)
_TARGETS = "the target's"
RULE = _table(
    Key(
        "match",
        "text",
        "The modules that the rule is for: a shell pattern (`*`, `?`, `[…]`) over the whole path "
        "of a module, such as `model.layers.0.mlp.down_proj`.",
        "none, it must be given",
        _QUANTIZED,
        '"*.mlp.down_proj"',
    ),
    Key("bits", "number", "Bits per weight.", _TARGETS, _QUANTIZED, "6"),
    Key("group_size", "number", "Weights that share a scale.", _TARGETS, _QUANTIZED, "32"),
    Key(
        "mode",
        "word",
        "The format of the quantized weights.",
        _TARGETS,
        _QUANTIZED,
        '"mxfp8"',
        tuple(MODES),
    ),
    Key(
        "skip",
        "switch",
        "Whether the modules stay unquantized; then the rule says nothing else.",
        "`false`",
        _QUANTIZED,
        "true",
    ),
)
