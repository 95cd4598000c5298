"""gptq: quantize as GPTQ does, by what the model's layers are given on calibration text."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import structs

from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import BuildError
from tasks.quality import gptq
from tasks.stages import hessians
from tasks.stages.hessians import Hessians
from tasks.stages.quantize import Quantize, Quantized, QuantizeParams, Quantizer, write_parts
from tasks.stages.quantize_scheme import Setting, parts
from tasks.stages.reasons import Reason
from tasks.stages.stage import Context, Inputs, Key, Need, Output, Planned, Result, TargetModel
from tasks.tensors import arrays, blas, kernels, rows
from tasks.tensors.rows import Rows

if TYPE_CHECKING:
    import numpy as np

METHOD = "gptq"
BLOCK_BYTES = 8 << 20  # of rows that are rounded together, in float32


class GptqParams(QuantizeParams, frozen=True, kw_only=True):
    """What is quantized, with at least one weight by its Hessian.

    Attributes:
        method: ``gptq``.
        numpy: NumPy's version, which factors the Hessians.
        hessians: the name of each weight's, by the weight's; others are rounded to nearest.
        channels: of the largest.
        rounding: the version of what rounds.
    """

    method: str
    numpy: str
    hessians: dict[str, str]
    channels: int
    rounding: int


class Gptq(Quantize):
    """Quantize each layer, errors made good."""

    one_by_one = False

    def plan(self, target: TargetModel) -> Mapping[str, Planned[QuantizeParams]]:
        """Plan what the target's settings say, and the Hessians that there are.

        Raises:
            BuildError: the model cannot be run.
        """
        specs = target.planned[Hessians.name]
        if target.settings and not target.model.runs:
            raise BuildError(
                f'method = "{METHOD}" runs the model, and layout {target.layout!r} is of no '
                "library that can be asked to. Leave method out, or take another layout."
            )
        of_weight = hessians.by_weight({name: spec.params for name, spec in specs.items()})
        return {
            layer: self._with_hessians(planned, of_weight, target, layer)
            for layer, planned in super().plan(target).items()
        }

    def _with_hessians(
        self,
        planned: Planned[QuantizeParams],
        of_weight: Mapping[str, tuple[str, str]],
        target: TargetModel,
        layer: str,
    ) -> Planned[QuantizeParams]:
        params = planned.params
        given = {w: of_weight[w] for w in params.settings if w in of_weight}
        if not given:
            return planned
        parameters = target.layers[layer]
        channels = max(p.shape[-1] for p in parameters if p.name in given)
        params = GptqParams(
            **structs.asdict(params),
            method=METHOD,
            numpy=blas.version(),
            hessians={weight: name for weight, (_, name) in given.items()},
            channels=channels,
            rounding=gptq.VERSION,
        )
        segments = dict.fromkeys(segment for segment, _ in given.values())
        reads = frozenset((*(p.name for p in parameters), *params.hessians.values()))
        needs = (*planned.needs, *(Need(Hessians.name, segment) for segment in segments))
        return Planned(params, needs, reads)

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return a digest of the settings, and what the Hessians depend on."""
        return METHOD, super().plan_key(target), target.dtype, target.quality

    def outputs(
        self, params: QuantizeParams, inputs: Mapping[Key, TensorSpec]
    ) -> dict[str, Output]:
        """Return each weight's parts; the rest is passed on."""
        outputs = super().outputs(params, {k: v for k, v in inputs.items() if _is_weight(k)})
        named = params.hessians if isinstance(params, GptqParams) else {}
        for weight, name in named.items():
            for part in parts(weight, params.settings[weight]):
                made_of = (*outputs[part].inputs, Key(Hessians.name, name))
                outputs[part] = outputs[part]._replace(inputs=made_of)
        return outputs

    def run(self, params: QuantizeParams, inputs: Inputs, context: Context) -> Result:
        """Quantize a layer."""
        made = super().run(params, {k: v for k, v in inputs.items() if _is_weight(k)}, context)
        if not isinstance(params, GptqParams):
            return made
        note = "{} is rounded to nearest: what it is given cannot be told"
        rounded = params.settings.keys() - params.hessians.keys()
        return structs.replace(made, notes=(*made.notes, *map(note.format, sorted(rounded))))

    def quantizer(self, params: QuantizeParams, context: Context) -> Quantizer:
        """Return what quantizes a weight by its Hessian, if it has one."""
        nearest = super().quantizer(params, context)
        return _Rounding(nearest, params, context) if isinstance(params, GptqParams) else nearest

    def memory(self, params: QuantizeParams, checkpoint: Checkpoint) -> int:
        """Return the size of a few blocks, and of a Hessian that is factored."""
        nbytes = super().memory(params, checkpoint)
        if isinstance(params, GptqParams):
            nbytes += gptq.order_memory(params.channels) + 4 * BLOCK_BYTES
        return nbytes

    def describe(self, params: QuantizeParams) -> str:
        """Return the settings, and the method."""
        return f"{super().describe(params)} by GPTQ"

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare as other methods do, and the version of what rounds."""
        reasons = super().explain(old, new)
        was, now = (each.get("rounding", 1) for each in (old, new))
        if was != now and old.get("method") == new.get("method"):
            reasons.append(Reason(f"mlx-make's {METHOD} {was} → {now}"))
        return reasons


def _is_weight(key: Key) -> bool:
    return key.stage != Hessians.name


class _Rounding:
    """Rounds one weight of a layer after another: those that share a Hessian, by one factor."""

    def __init__(self, nearest: Quantizer, params: GptqParams, context: Context) -> None:
        self._nearest = nearest
        self._params = params
        self._context = context
        self._last: tuple[str, int] | None = None
        self._orders: list[gptq.Order] = []

    def __call__(self, key: Key, setting: Setting) -> tuple[dict[str, Tensor], bool]:
        if key.name not in self._params.hessians:
            return self._nearest(key, setting)
        weight = self._context.rows(key)
        of = self._params.hessians[key.name], setting.group_size
        orders: Iterable[gptq.Order] = self._orders
        if self._last != of:
            self._last, self._orders = None, []  # before the next takes its memory
            given = self._context.rows(Key(Hessians.name, of[0]))
            orders = _orders(key.name, given, weight.shape[-1], setting.group_size)
            if rows.count(given) == weight.shape[-1]:
                self._last, self._orders = of, [*orders]
                orders = self._orders
        return write_parts(
            self._context, key.name, weight, setting, _blocks(weight, orders, setting)
        )


def _orders(name: str, given: Rows, channels: int, group_size: int) -> Iterator[gptq.Order]:
    """Yield the order in which the channels of each of a weight's matrices are rounded."""
    import numpy as np

    def read(first: int) -> Iterator[np.ndarray]:
        step = max(1, BLOCK_BYTES // (4 * channels))
        for start in range(first, first + channels, step):
            block = np.array(given.read(start, min(start + step, first + channels)))
            if not np.isfinite(block).all():
                raise BuildError(
                    f"{name} cannot be rounded by {METHOD}: what it is given on the calibration "
                    "text holds NaN or infinity, by weights that do, or a dtype that overflows. "
                    'Try dtype = "float32" or "bfloat16", or leave method out.'
                )
            yield block

    for first in range(0, rows.count(given), channels):
        yield gptq.order(partial(read, first), channels, group_size)


def _blocks(weight: Rows, orders: Iterable[gptq.Order], setting: Setting) -> Iterator[Quantized]:
    """Yield a weight's rows, quantized: of each of its matrices by its own Hessian.

    By the CPU: for a GPU there is too little to do at once.
    """
    channels = weight.shape[-1]
    step = max(1, BLOCK_BYTES // (4 * channels * weight.unit)) * weight.unit
    for matrix, order in enumerate(orders):
        first = matrix * weight.shape[-2]
        for start in range(first, first + weight.shape[-2], step):
            block = weight.read(start, min(start + step, first + weight.shape[-2]))
            packed = gptq.quantize(block, order, group_size=setting.group_size, bits=setting.bits)
            not_finite = kernels.not_finite(block)
            pieces = arrays.views(packed, not_finite, together=False)
            yield packed, pieces, not not_finite.item()
