"""The tables of models.toml; the keys of a model are ``core.spec``'s, which ``kinds`` declares."""

# Annotations are evaluated here, not left as text: msgspec would evaluate them in every run.
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from tasks.core.kinds import Size, StageName, key
from tasks.core.spec import Quality, Settings
from tasks.core.workspace import CACHE_DIR


class RemoteURL(str):
    """The URL of a store shared with other machines."""

    __slots__ = ()


class ClusterAddress(str):
    """Where a Dask scheduler is reached, or the file of Dask's that says so."""

    __slots__ = ()


class Cache(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where results are kept."""

    dir: Annotated[
        Path,
        key(
            "Where results are kept; several projects, and several checkouts of one, may share it.",
            change="what the new folder does not hold",
            example="~/.cache/mlx-make",
        ),
    ] = field(default_factory=lambda: Path(CACHE_DIR))
    keep: Annotated[
        tuple[StageName, ...] | None,
        key(
            "The stages whose intermediate results are kept; those of quantize always are. Of a "
            "checkpoint that comes from a hub none are, unless `extract` is named: its own bytes "
            "are kept then, too.",
            default='`["cast"]`, unless that is larger than what of the checkpoint it is made of',
            change="nothing at once; what was not kept is made again when it is wanted",
            example=["unshard", "cast"],
        ),
    ] = None
    remote: Annotated[
        RemoteURL | None,
        key(
            "A store shared with other machines, from which results are fetched in place of being "
            "computed; credentials come from the environment and never stand here.",
            default="none",
            change="nothing; what this machine has is not fetched again",
            example="s3://bucket/prefix",
        ),
    ] = None
    mode: Annotated[
        Literal["read-write", "read-only", "off"],
        key(
            "What is done with the remote: fetch and upload, only fetch, or leave it alone.",
            change="nothing",
            example="read-only",
        ),
    ] = "read-write"
    max_bytes: Annotated[
        Size | None,
        key(
            "What `mlx-make cache gc` shrinks the cache to.",
            default="no bound",
            change="nothing; what `mlx-make cache gc` removed is made again, or fetched, when it "
            "is wanted",
            example="100GB",
        ),
    ] = field(name="max_size", default=None)


class Build(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the work is done."""

    cluster: Annotated[
        ClusterAddress | None,
        key(
            "The scheduler of a Dask [cluster](cluster.md) whose workers make the layers, or a "
            "scheduler file.",
            default="none",
            change="nothing; results do not depend on it",
            example="tcp://10.0.0.2:8786",
        ),
    ] = None
    cluster_lost: Annotated[
        Literal["alone", "stop"],
        key(
            "What becomes of a build whose cluster does not answer, or has nobody left: it goes on "
            "alone, or it stops and can be taken up again.",
            change="nothing; results do not depend on it",
            example="stop",
        ),
    ] = "alone"
    disk_bytes: Annotated[
        Size | None,
        key(
            "What may lie on the disk at once where a checkpoint comes from a hub: the cache, what "
            "is built, and the layers that are being fetched or worked on.",
            default="what is free, less a margin",
            change="nothing; results do not depend on it",
            example="12GB",
        ),
    ] = field(name="disk", default=None)
    memory_bytes: Annotated[
        Size | None,
        key(
            "What the layers that are worked on at one time may take together; a quarter of it, or "
            "50 MB if that is more, is for what is fetched for them. Uploads take up to 100 MB "
            "besides.",
            default="a share of the machine's memory",
            change="nothing; results do not depend on it",
            example="4GiB",
        ),
    ] = field(name="memory", default=None)


class Matrix(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Variants by what they quantize to."""

    bits: Annotated[
        tuple[int, ...],
        key(
            "Bits per weight, for a variant each.",
            default="none, it must be given",
            change="what a variant of that many bits lacks",
            example=[3, 4, 6, 8],
        ),
    ]


class Model(Settings, frozen=True, kw_only=True):
    """A model to build."""

    matrix: Annotated[
        Matrix | None,
        key(
            "More targets, MODEL-3bit, MODEL-4bit and so on: the model, quantized to so many bits "
            "per weight; what else its `quantize` says holds for each.",
            default="none",
            change="what a variant of that many bits lacks",
            example={"bits": [3, 4, 6, 8]},
        ),
    ] = None

    variants: Annotated[
        dict[str, Settings],
        Meta(
            description="More targets, MODEL-VARIANT each: the model with these keys laid over it."
        ),
    ] = {}  # noqa: RUF012 - msgspec makes a new one for each


class Document(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The models that mlx-make builds."""

    cache: Cache = field(default_factory=Cache)
    build: Build = field(default_factory=Build)
    quality: Quality = field(default_factory=Quality)
    defaults: Annotated[Settings, Meta(description="Keys for all models.")] = field(
        default_factory=Settings
    )
    models: Annotated[dict[str, Model], Meta(description="The models to build, by name.")]


def variable(table: str, key: str) -> str:
    """Return the environment variable that wins over a key of [cache] or [build]."""
    return f"MLX_MAKE_{table}_{key}".upper()
