"""stage: the contract between a stage and whoever plans, runs, forecasts or explains it.

A stage turns a layer's tensors into others. It never sees the build: what it may do is its
``Context``, and all that is known of it before it runs is what ``Stage.outputs`` says.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from functools import cached_property
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import Struct, field

from cache.blobs import Blobs, Part, Writer
from cache.digest import digest_record
from cache.records.manifests import Tensor, TensorSpec
from cache.records.memos import Memos
from tasks.checkpoints.adapter import Adapter
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.spec import Quality, Target
from tasks.layouts.model import Model, Parameter
from tasks.stages.reasons import Reason, changed_values
from tasks.tensors.arrays import Streams
from tasks.tensors.rows import IN_FLIGHT_BYTES, Rows

# The parameters that say what computes, by name; "sanitize" covers the library's version.
COMPUTER = ("mlx", "device", "machine", "sanitize", "numpy")
FLOATING = ("float16", "bfloat16", "float32")  # dtypes that there are casts to
PROGRAMS = (*COMPUTER, "transformers", "versions")  # and of what else, by its name


class Key(NamedTuple):
    """A tensor that a stage makes, or reads: the stage that makes it, and its name there."""

    stage: str
    name: str


class Origin(Enum):
    """Where the bytes of a stage's output come from."""

    PASSED_ON = "passed on"  # an input, as it is
    REFERENCE = "reference"  # inputs, one after another: the bytes lie there already
    VIEW = "view"  # made as it is read; written only if the stage's results are kept
    STORED = "stored"  # written by ``run``, whether results are kept or not


class Output(NamedTuple):
    """A tensor that a stage will make.

    Attributes:
        spec: its dtype and shape.
        origin: where its bytes come from.
        inputs: the tensors it is made of.
    """

    spec: TensorSpec
    origin: Origin
    inputs: tuple[Key, ...] = ()


class Keep(Enum):
    """Whether the cache keeps what a stage makes."""

    ALWAYS = "always"
    CONFIGURED = "configured"  # if models.toml's [cache] keep names the stage


class Need(NamedTuple):
    """A node that another one reads: a stage of a layer, of the same target."""

    stage: str
    layer: str


class Params(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one stage of one layer is asked to do: a part of its action's key, as JSON.

    Each stage has a subclass. A field's name and form stay as they are: they are in every key.
    """

    @property
    def encoded(self) -> bytes:
        """The parameters as JSON, quickly: to compare them with others of this process."""
        try:
            return msgspec.json.encode(self)
        except UnicodeEncodeError:
            return json.dumps(msgspec.to_builtins(self)).encode()

    @property
    def record(self) -> dict[str, Any]:
        """The parameters as they are read back from JSON: lists, not tuples."""
        try:
            record: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        except UnicodeEncodeError:  # a name with half a surrogate pair, which JSON may hold
            record = json.loads(json.dumps(msgspec.to_builtins(self)))
        return record


class Computer(NamedTuple):
    """What computes: results may differ in the last bit from one to the next.

    Attributes:
        mlx: MLX's version.
        device: ``cpu``, ``metal`` or ``cuda``.
        machine: the processor: compilers need not round alike on x86-64 and arm64.
    """

    mlx: str
    device: str
    machine: str


P = TypeVar("P", bound=Params)


class Planned(Struct, Generic[P], frozen=True):
    """One stage of one layer, as the stage plans it.

    Attributes:
        params: what it is asked to do.
        needs: the nodes it reads.
        reads: names of the tensors it reads of these, or None for all.
        fingerprint: what else decides whether to scan again (stamps of files), JSON.
    """

    params: P
    needs: tuple[Need, ...] = ()
    reads: frozenset[str] | None = None
    fingerprint: Any = None


class ActionSpec(Struct, Generic[P], frozen=True, dict=True):
    """One stage of one layer. Targets that have it in common share it.

    Attributes:
        stage: the stage.
        layer: the layer's name.
        planned: what the stage planned.
    """

    stage: Stage[P]
    layer: str
    planned: Planned[P]

    @property
    def params(self) -> P:
        """What the stage is asked to do."""
        return self.planned.params

    @property
    def fingerprint(self) -> Any:
        """What else decides whether to scan again."""
        return self.planned.fingerprint

    @cached_property
    def outputs_of_leaf(self) -> dict[str, Output]:
        """What a leaf makes, which depends on its parameters alone: thousands of tensors."""
        return self.stage.outputs(self.params, {})

    @cached_property
    def bytes_of_leaf(self) -> int:
        """The size of what a leaf makes."""
        return sum(output.spec.nbytes for output in self.outputs_of_leaf.values())

    @cached_property
    def digest(self) -> str:
        """Digest of the stage's version, the parameters and the fingerprint."""
        params = msgspec.to_builtins(self.params)  # tuples: in JSON, lists
        return digest_record([self.stage.version, params, self.fingerprint])


class Roles(NamedTuple):
    """The stages on the way to what is packed, by what they do for it: their names.

    Attributes:
        unquantized: makes the weights as they are before they are quantized.
        quantized: quantizes them.
        packed: makes what is packed.
    """

    unquantized: str
    quantized: str
    packed: str


class TargetModel(Struct, frozen=True):
    """A target as its stages plan it.

    Attributes:
        checkpoint: what it is made of.
        model: the model in the target's layout.
        stored_layers: keys of stored tensors that are used, by layer of the checkpoint.
        layers: parameters by layer of the model.
        dtype: what floating-point parameters are cast to, or None.
        settings: how each weight is quantized, by its name; others are not.
        computer: what computes.
        layout: its layout's name.
        config: config.json of the built model.
        quality: on what text models are run, and how much of it.
        candidates: the ways to quantize a module that are tried, where that is asked for.
        memos: where answers are kept that are worth remembering.
        exact: the modules of which it is measured what each of these costs, and not estimated, by
            path.
        roles: which stages do what.
        adapter: what is fused with the weights, if anything is.
        fused: the dtypes of the weights that this changes, once it is, by name.
        dtypes: what rules cast other parameters to than ``dtype``, by name.
        planned: what the stages before planned, by stage and layer.
        previous: the name of the stage before, "" for the first.
    """

    checkpoint: Checkpoint
    model: Model
    stored_layers: Mapping[str, Sequence[str]]
    layers: Mapping[str, Sequence[Parameter]]
    dtype: str | None
    settings: Mapping[str, Any]
    computer: Computer
    layout: str
    config: Mapping[str, Any]
    quality: Quality
    candidates: tuple[Any, ...]
    memos: Memos
    roles: Roles
    exact: frozenset[str] = frozenset()
    adapter: Adapter | None = None
    fused: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    planned: Mapping[str, Mapping[str, ActionSpec[Any]]] = field(default_factory=dict)
    previous: str = ""

    def dtype_after_cast(self, parameter: Parameter) -> str:
        """Return the dtype of a parameter once it is cast, if it is."""
        dtype = self.dtypes.get(parameter.name, self.dtype)
        return dtype if dtype in FLOATING and parameter.castable else parameter.dtype

    def same_layer(self, layer: str) -> tuple[Need, ...]:
        """Return what a stage needs that reads the stage before, layer by layer."""
        return (Need(self.previous, layer),)


class Result(Struct, frozen=True):
    """What a stage made.

    Attributes:
        tensors: by name.
        notes: what people should know.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


T = TypeVar("T")
Inputs = Mapping[Key, Tensor]


class Context(Protocol):
    """What a stage may do while it runs. One for each node that runs."""

    target: Target
    checkpoint: Checkpoint
    model: Model
    planned: TargetModel
    blobs: Blobs
    memos: Memos
    streams: Streams
    keeps: bool  # whether the cache is to keep what the stage makes

    def rows(self, key: Key) -> Rows:
        """Return an input, to be read by rows.

        Raises:
            BuildError: it is lost, and cannot be made again.
        """

    def parts(self, key: Key) -> Sequence[Part]:
        """Return where the bytes of an input lie; if they are lost, it is made again first.

        Raises:
            BlobLost: they are not those of its digest.
        """

    def pass_on(self, key: Key) -> Tensor:
        """Return an input as it is; from now on the cache has its bytes."""

    def fetch(
        self, keys: Sequence[str], known: Mapping[str, str], *, reread: bool
    ) -> dict[str, str]:
        """Have the cache hold stored tensors whose bytes come from elsewhere; return the digests.

        Args:
            keys: of the checkpoint's stored tensors.
            known: the digests of others, that need not be fetched, by key.
            reread: whether they are to be read, and not only digested.

        Raises:
            CheckpointError: they cannot be read.
            NoRoom: the disk is full.
        """

    def made(self, key: Key) -> Result | None:
        """Return what ``Stage.make`` made of an input while it was read before, if it did."""

    def read(self, name: str, view: Rows) -> Tensor:
        """Read all of an output that is made as it is read; the cache has its bytes if it keeps it.

        Whoever reads the output next may do so meanwhile, see ``Stage.make``.

        Raises:
            NoRoom: the disk is full.
        """

    def writer(self, name: str, nbytes: int) -> AbstractContextManager[Writer]:
        """Give a writer for an output of ``nbytes`` bytes; it knows the digest at the end.

        Raises:
            NoRoom: the disk is full.
        """

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Fetch inputs that only a remote store has, all at once."""

    def verify(self, keys: Iterable[Key]) -> None:
        """Forget where inputs lie whose bytes no longer match their digests."""

    def once(self, question: Hashable, work: Callable[[], T]) -> T:
        """Return what ``work`` returns for a question; it is called once in a run of the build."""


class Stage(ABC, Generic[P]):
    """A stage.

    Attributes:
        name: its name: in its manifests and its tensors' keys.
        version: raised when it makes other bytes of the same inputs.
        keep: whether the cache keeps what it makes.
        params: the type of its parameters.
        one_by_one: whether what it does not pass on is made of one input each, see ``make``.
    """

    name: str
    version: int
    keep: Keep
    params: type[P]
    one_by_one: bool = False

    @property
    def group(self) -> str:
        """The group that its tasks are named by: its name, unless people know it by another."""
        return self.name

    @abstractmethod
    def plan(self, target: TargetModel) -> Mapping[str, Planned[P]]:
        """Return what is to be done, by layer: of a target that the stage is nothing for, nothing.

        Raises:
            BuildError: the target cannot be made.
        """

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what the plan depends on besides checkpoint, layout, device and earlier stages."""
        return None

    @abstractmethod
    def outputs(self, params: P, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return what ``run`` will make of inputs of these dtypes and shapes, by name, in order."""

    @abstractmethod
    def run(self, params: P, inputs: Inputs, context: Context) -> Result:
        """Make a layer's tensors.

        Raises:
            BuildError: they cannot be made.
        """

    def make(self, params: P, key: Key, source: Rows, context: Context) -> Result:
        """Make what is made of one input, reading it once, its rows in order.

        ``run`` makes what ``Context.made`` has not. Only of a stage that works ``one_by_one``, and
        an input that it does not pass on.
        """
        raise NotImplementedError(f"{self.name} does not work one by one")

    def view(self, params: P, inputs: Inputs, context: Context, name: str) -> Rows | None:
        """Return an output as rows that are made as they are read; None if it is stored."""
        return None

    def memory(self, params: P, checkpoint: Checkpoint) -> int:
        """Return the bytes that ``run`` holds at once."""
        return IN_FLIGHT_BYTES

    def runs_alone(self, params: P) -> bool:
        """Tell whether no other action may run meanwhile."""
        return False

    def view_memory(self, params: P, checkpoint: Checkpoint) -> int:
        """Return the bytes that reading a view holds at once, besides blocks of rows."""
        return 0

    def summary(self, read: Mapping[str, bytes]) -> str:
        """Return what to tell people of what was made, in a line; by default nothing.

        Args:
            read: the bytes of its outputs, read as they are asked for.
        """
        return ""

    def describe(self, params: P) -> str:
        """Return in a few words what is done, for ``doit graph``."""
        return ""

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Return how parameters differ, as records have them; the old may be of any version.

        Never empty where a parameter that both have changed.
        """
        return changed_values(old, new)


class LeafStage(Stage[P]):
    """A stage that reads the checkpoint and no other stage.

    What it reads is what it makes: its action is known only once it has scanned the files. So it
    has ``scan`` in place of ``run``.
    """

    @abstractmethod
    def planned(self, checkpoint: Checkpoint, keys: Sequence[str]) -> Planned[P]:
        """Plan to read the stored tensors of these keys, whatever layer they are of."""

    @abstractmethod
    def scan(self, spec: ActionSpec[P], context: Context, *, reread: bool) -> dict[str, Tensor]:
        """Return a layer's tensors, digested.

        Args:
            spec: what is asked for.
            context: the build.
            reread: read them even if files of these stamps were digested before.

        Raises:
            BuildError: they cannot be read.
        """

    @abstractmethod
    def recall(self, spec: ActionSpec[P], context: Context) -> dict[str, Tensor] | None:
        """Return what ``scan`` would, without reading anything, or None if that is not known.

        Raises:
            BuildError: the checkpoint is not here, and what is wanted of it is not on record.
        """

    @abstractmethod
    def forget(self, spec: ActionSpec[P], context: Context) -> None:
        """Have nothing on record of what ``scan`` found: it is not to be believed."""

    @abstractmethod
    def note(self, spec: ActionSpec[P], context: Context, tensors: Mapping[str, Tensor]) -> None:
        """Put on record what another machine's ``scan`` found in the same files."""

    @abstractmethod
    def watched(self, spec: ActionSpec[P]) -> Any:
        """Return what the build tool compares to tell whether to scan again, JSON."""

    @abstractmethod
    def explain_watched(self, old: Any, new: Any) -> list[Reason]:
        """Return how two values of ``watched`` differ."""

    def run(self, params: P, inputs: Inputs, context: Context) -> Result:
        """Return the inputs: nothing is made."""
        return Result(dict(zip((key.name for key in inputs), inputs.values(), strict=True)))
