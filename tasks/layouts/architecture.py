"""architecture: the plan of a Hugging Face model, as a library's own classes give it."""

from __future__ import annotations

import base64
import math
import re
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.stored import TORCH
from tasks.core.errors import ArchitectureError, CheckpointError
from tasks.core.text import listed, plural
from tasks.layouts import asking
from tasks.layouts.libraries import LIBRARIES
from tasks.layouts.llama_names import rope
from tasks.layouts.model import Model, Module, Parameter, Unpacked, Verdict
from tasks.unpack import registry as unpack
from tasks.unpack.packed import Found

KEPT_SETTINGS = ("quantization_config", "text_config")  # what libraries leave there
SCALES = re.compile(r"(weight_scale(_inv|_2)?|scale_inv|\.scales|\.qzeros)$")  # of packed weights
# What a model sees and hears with, by names of its parts; see also what mlx-vlm does not quantize.
TOWERS = re.compile(
    r"(^|[._])(vision|visual|audio|vit|image_newline|img_\w+|mm_projector|multi_modal_projector|"
    r"vpm|apm|resampler|connector|aligner|sam_model|speech|sound)([._]|$)|embed_(vision|audio)"
)
MAX_VALUES_BYTES = 64 << 20  # of tensors whose values a library looks at


class Answer(msgspec.Struct, frozen=True):
    """What a library says of a checkpoint, see ``tasks.layouts.probe``.

    Attributes:
        parameters: name, dtype, shape, whether it may be cast, inputs, steps.
        modules: path, parameters' names, those once quantized, verdict, weights.
        recipes: per mixed recipe, its word by module path, or why it does not fit.
        config: config.json.
        keep_vision_config: whether the model has a vision tower.
        dropped: the checkpoint's tensors that belong to no part of the model.
        factors: those of bytes that are multiplied as they are, as if they were whole numbers.
    """

    parameters: list[tuple[str, str, tuple[int, ...], bool, list[str], list[Any]]]
    modules: list[tuple[str, list[str], list[str] | None, Verdict, int]]
    recipes: dict[str, dict[str, int | Verdict] | str]
    config: dict[str, Any]
    keep_vision_config: bool
    dropped: list[str]
    factors: list[str] = []


class LookedAt(msgspec.Struct, frozen=True):
    """What a library says that cannot tell without the values of some tensors.

    Attributes:
        looked_at: their names.
    """

    looked_at: list[str]


def model(checkpoint: Checkpoint, memos: Memos, library: str) -> Model:
    """Return what a library makes of a checkpoint with Hugging Face's names.

    It is asked once for a checkpoint: ``memos`` keeps the answer. What it does not read as it is,
    is unpacked if that can be.

    Raises:
        ArchitectureError: it does not know the architecture or refuses the checkpoint.
    """
    try:
        found = unpack.found(checkpoint)
    except CheckpointError:
        found = None
        with suppress(ArchitectureError):  # a library may have more to say of it
            return _model(checkpoint, checkpoint, memos, library)
        raise
    if found is None:
        return _model(checkpoint, checkpoint, memos, library)
    reads = _reads(checkpoint, found, memos, library)
    if reads.as_it_is:
        return _model(checkpoint, checkpoint, memos, library)
    told = unpack.unpacked(checkpoint, found, reads.dtype)
    made = _model(checkpoint, told, memos, library)
    if reads.config is None:
        note = _unpacked_note(checkpoint, found, library)
        known = Unpacked(note, unpack.repackings(checkpoint, found))
        return structs.replace(made, told=told, unpacked=known)
    config = {key: value for key, value in reads.config.items() if key in KEPT_SETTINGS}
    return structs.replace(made, config={**made.config, **config}, told=told)


class Reads(msgspec.Struct, frozen=True):
    """How a library takes a checkpoint that could be unpacked.

    Attributes:
        as_it_is: whether it is to be left to the library.
        dtype: otherwise, what is to be made of it.
        config: the library's configuration, where what it makes of it is known to be the same.
    """

    as_it_is: bool
    dtype: str = "float32"
    config: dict[str, Any] | None = None


def _reads(checkpoint: Checkpoint, found: Found, memos: Memos, library: str) -> Reads:
    """Tell how a library takes a checkpoint, which is remembered."""
    question = {"packed": asking.question(checkpoint, library, {}, ()), "format": found.format}
    remembered = memos.get("architectures", question, Reads)
    if remembered is not None:
        return remembered
    reads = _try(checkpoint, found, memos, library)
    memos.put("architectures", question, msgspec.to_builtins(reads))
    return reads


def _try(checkpoint: Checkpoint, found: Found, memos: Memos, library: str) -> Reads:
    """Have a library read a checkpoint as it is.

    Where it unpacks a weight of each shape of its own accord as we do, to the bit, we do: block by
    block, where it would make whole layers at once.
    """
    if trial := unpack.trial(found):
        for left_out in dict.fromkeys(((), predictors(checkpoint))):
            question = {**asking.question(checkpoint, library, {}, left_out), "trial": trial}
            with suppress(ArchitectureError):
                said = asking.ask(question, library, checkpoint)
                if said["dtype"]:
                    return Reads(False, said["dtype"], said["config"])
                break
    try:
        made = _model(checkpoint, checkpoint, memos, library)
    except (ArchitectureError, CheckpointError):
        return Reads(False)
    used = {key for parameter in made.parameters.values() for key in parameter.inputs}
    packed = [
        {key for part in each.inputs for key in checkpoint.tensors[part].inputs}
        for each in found.packed.values()
    ]
    if not LIBRARIES[library].PREDICTORS:  # the rest is of the model, and not of the drafter
        packed = [keys for keys in packed if keys & used]
    return Reads(as_it_is=all(keys <= used for keys in packed))


def _unpacked_note(checkpoint: Checkpoint, found: Found, library: str) -> str:
    method, form = unpack.settings_of(checkpoint).get("quant_method"), found.called or found.format
    return (
        f"{plural(len(found.packed), 'weight')} unpacked, of {form}: config.json has "
        f"quant_method = {method!r}, for which {library}'s class of this model has no code"
    )


def _model(checkpoint: Checkpoint, told: Checkpoint, memos: Memos, library: str) -> Model:
    """Return what a library makes of a checkpoint that it is ``told`` of in this way."""
    answer, values, left_out = _fitting_answer(told, memos, library)
    parameters = {}
    for name, dtype, shape, cast, inputs, steps in answer.parameters:
        tensors = [told.tensors[i] for i in inputs]
        computed = bool(steps) and steps[0][0] == "sanitize"
        name = sys.intern(name)  # as in the checkpoint, in manifests, and of what is quantized
        parameters[name] = Parameter(
            name,
            sys.intern(dtype),
            shape,
            tuple(key for tensor in tensors for key in tensor.inputs),
            (*_own_steps(told, name, tensors, computed=computed), *steps),
            cast,
        )
    modules = tuple(
        Module(path, _names(*names), None if after is None else _names(*after), verdict, count)
        for path, names, after, verdict, count in answer.modules
    )
    _refuse_integers(checkpoint.folder, modules, parameters, answer.factors, library)
    config = {key: value for key, value in answer.config.items() if key != "_name_or_path"}
    if not answer.keep_vision_config:
        config.pop("vision_config", None)
    notes = (
        *told.notes,
        *_written_out(told.config, library),
        *_predictors_note(left_out, library),
        *_dropped(answer.dropped, {*predictors(told)}, library),
    )
    runs = LIBRARIES[library].RUNS
    return Model(
        parameters, modules, config, answer.recipes, notes, library, values, left_out, runs=runs
    )


def _own_steps(
    told: Checkpoint, name: str, tensors: Sequence[LogicalTensor], *, computed: bool
) -> tuple[Any, ...]:
    """Return the steps that make the tensors that a parameter is made of.

    Raises:
        ArchitectureError: they are not made alike.
    """
    if computed and any(step[0] == "unpack" for tensor in tensors for step in tensor.steps):
        return ()  # done to each before the library is given it
    if len(tensors) == 1:
        return tensors[0].steps
    try:
        step = unpack.joined(tensors)
    except ValueError:
        raise ArchitectureError(
            f"{told.folder}: {name} joins tensors that are themselves made of shards, or only some "
            "of which are packed, which is not supported. Use the model's checkpoint in bfloat16."
        ) from None
    return () if step is None else (step,)


def _fitting_answer(
    checkpoint: Checkpoint, memos: Memos, library: str
) -> tuple[Answer, dict[str, str], tuple[str, ...]]:
    """Return what a library says, the values that it took, and the tensors that are left out.

    These are the layers of multi-token prediction, where its class fails on them.
    """
    drops = predictors(checkpoint) if LIBRARIES[library].PREDICTORS else ()
    for left_out in dict.fromkeys(((), drops)):
        if answer := _answer(checkpoint, memos, library, left_out, ask=False):
            return *answer, left_out
    for left_out in dict.fromkeys(((), drops)):
        try:
            if answer := _answer(checkpoint, memos, library, left_out, ask=True):
                return *answer, left_out
        except ArchitectureError:
            if left_out == drops:
                raise
    raise AssertionError("an answer, or an error")


def predictors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the tensors that predict further tokens: by name, or in layers beyond the last.

    The latter only where config.json speaks of them: it may be wrong about the number of layers.
    """
    config = checkpoint.config
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    layers = config.get("num_hidden_layers")
    speaks = any(value for key, value in config.items() if re.search("mtp|nextn", key))
    beyond = layers if speaks and isinstance(layers, int) else math.inf

    def predicts(name: str) -> bool:
        if ("mtp" in name or "nextn" in name) and re.search(r"(^|\.)(mtp|nextn)(_\w+)?\.", name):
            return True
        if beyond == math.inf:
            return False
        match = re.match(r"((?:\w+\.)*?)layers\.(\d{1,9})\.", name)
        return (
            match is not None and not re.search("vis|audio", match[1]) and int(match[2]) >= beyond
        )

    return tuple(name for name in checkpoint.tensors if predicts(name))


def _predictors_note(left_out: Sequence[str], library: str) -> tuple[str, ...]:
    if not left_out:
        return ()
    return (
        f"{plural(len(left_out), 'tensor')} of multi-token prediction left out: "
        f"{LIBRARIES[library].PACKAGE}.convert fails on them, since its class of this model has no "
        f"place for them ({listed(left_out)}). {_drafter(library)}",
    )


def _drafter(library: str) -> str:
    return (
        f"{LIBRARIES[library].PREDICTORS} makes a drafter of such tensors, for speculative "
        "decoding, of architectures that have one"
    )


def _answer(
    checkpoint: Checkpoint, memos: Memos, library: str, left_out: Sequence[str], *, ask: bool
) -> tuple[Answer, dict[str, str]] | None:
    """Return what a library says of a checkpoint, and the values that it had to be given.

    None if that is not remembered, and it is not to be asked.

    Raises:
        ArchitectureError: see ``model``.
    """
    values: dict[str, str] = {}
    while True:
        question = asking.question(checkpoint, library, values, left_out)
        # A checkpoint without these tensors is another: of that, nothing was found to fail.
        known = {**question, "left_out": list(left_out)} if left_out else question
        answer: Answer | LookedAt | None = memos.get("architectures", known, Answer)
        answer = answer or memos.get("architectures", known, LookedAt)
        if answer is None:
            if not ask:
                return None
            asked = asking.ask(question, library, checkpoint)
            memos.put("architectures", known, asked)
            if "looked_at" in asked:
                answer = msgspec.convert(asked, LookedAt)
            else:
                answer = msgspec.convert(asked, Answer)
        if isinstance(answer, Answer):
            return answer, values
        values |= _values(checkpoint, answer.looked_at, library)


def _values(checkpoint: Checkpoint, names: Iterable[str], library: str) -> dict[str, str]:
    """Return the values of tensors, in base64.

    Raises:
        ArchitectureError: they are too many, or no plain bytes of a file.
    """
    values: dict[str, str] = {}
    left = MAX_VALUES_BYTES
    for name in names:
        tensor = checkpoint.tensors[name]
        stored = checkpoint.stored[tensor.inputs[0]]
        left -= stored.nbytes
        if left < 0 or tensor.steps or len(tensor.inputs) > 1 or stored.offset == TORCH:
            raise ArchitectureError(
                f"{checkpoint.folder}: {library} decides by the values of {name}, which cannot be "
                "read while a build is planned. Use the model's safetensors, unsharded."
            )
        data = checkpoint.source.read(stored.file, stored.offset, stored.nbytes)
        values[name] = base64.b64encode(b"".join(data)).decode()
    return values


@cache
def _names(*names: str) -> tuple[str, ...]:
    """Return the names, one object for all modules that have the same."""
    return names


def _written_out(config: dict[str, Any], library: str) -> tuple[str, ...]:
    """Return the note on what ``llama_names.rope`` adds to config.json."""
    package = LIBRARIES[library].PACKAGE
    settings = rope(config, package)
    inner = settings.get("text_config", {}).keys() - (config.get("text_config") or {}).keys()
    added = sorted({*settings, *inner} - {"text_config"})
    if not added:
        return ()
    return (
        f"config.json gains {', '.join(added)}: it has them under rope_parameters alone, as "
        f"transformers 5 saves them, where this class of {library} does not look "
        f"({package}.convert leaves them there, and the model speaks nonsense)",
    )


def _refuse_integers(
    folder: Path,
    modules: Iterable[Module],
    parameters: Mapping[str, Parameter],
    factors: Sequence[str],
    library: str,
) -> None:
    """Refuse weights whose bytes would be taken for integers: FP8 that is not decoded.

    Raises:
        CheckpointError: there are such.
    """
    convert = f"{LIBRARIES[library].PACKAGE}.convert"
    if factors:
        raise CheckpointError(
            f"{folder}: {plural(len(factors), 'tensor')} of 8-bit floats ({listed(factors)}) would "
            f"be bytes taken for numbers, as {convert} takes them: this class of {library} "
            "multiplies them without decoding them. Get the checkpoint in bfloat16."
        )
    weights = [f"{m.path}.weight" for m in modules if m.quantized_names is not None]
    dtypes = {name: parameters[name].dtype for name in weights}
    floats_or_bytes = ("float32", "bfloat16", "float16", "uint8", "int8")
    if odd := [name for name in weights if dtypes[name] not in floats_or_bytes]:
        raise CheckpointError(
            f"{folder}: {plural(len(odd), 'weight')} ({listed(odd)}) would be {dtypes[odd[0]]}, as "
            f"{convert} builds them, of which no model makes sense: the bits of bfloat16, perhaps, "
            "as what knows none saves them. Get the checkpoint in bfloat16."
        )
    packed = [name for name in weights if dtypes[name] in ("uint8", "int8")]
    if packed:
        raise CheckpointError(
            f"{folder}: {plural(len(packed), 'weight')} ({', '.join(packed[:3])}) would be bytes "
            f"taken for numbers ({parameters[packed[0]].dtype}), as {convert} builds them: FP8 "
            f"or the like, without scales (weight_scale_inv) that this class of {library} applies. "
            "Get the checkpoint with its scales, or in bfloat16."
        )


def _dropped(names: list[str], drafts: Container[str], library: str) -> tuple[str, ...]:
    """Return what to say of tensors that belong to no part of the model that a library knows.

    Args:
        names: theirs.
        drafts: those that predict further tokens.
        library: which; one that makes a drafter takes nothing else.
    """
    if not LIBRARIES[library].PREDICTORS:
        return ()
    left = [name for name in names if "rotary_emb" not in name]  # these are buffers
    scales = [name for name in left if SCALES.search(name)]
    left = [name for name in left if name not in scales]
    convert = f"{LIBRARIES[library].PACKAGE}.convert"
    notes = []
    if scales:
        notes.append(
            f"{plural(len(scales), 'tensor')} that {library} leaves out, as {convert} does, would "
            "be scales: unless they are left over, the weights that they are of are wrong by "
            f"them: {listed(scales)}"
        )
    if elsewhere := LIBRARIES[library].TOWERS:
        towers = [name for name in left if TOWERS.search(name)]
        left = [name for name in left if name not in {*towers}]
        if towers:
            notes.append(
                f"{plural(len(towers), 'tensor')} of what the model sees and hears with left out, "
                f"as {convert} does: {elsewhere} keeps them ({listed(towers)})"
            )
    if ahead := [name for name in left if name in drafts]:
        left = [name for name in left if name not in drafts]
        notes.append(
            f"{plural(len(ahead), 'tensor')} of multi-token prediction left out, as {convert} does "
            f"({listed(ahead)}). {_drafter(library)}"
        )
    if left:
        notes.append(
            f"{len(left)} tensors of the checkpoint belong to no part of the model that {library} "
            f"knows and are left out, as {convert} does: {listed(left)}"
        )
    return tuple(notes)
