"""gptq: quantize as GPTQ does, by what the model's layers are given on calibration text."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

from msgspec import structs

from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import BuildError
from tasks.quality import gptq
from tasks.stages import hessians
from tasks.stages.hessians import Hessians
from tasks.stages.quantize import Quantize, Quantized, QuantizeParams, write_parts
from tasks.stages.quantize_scheme import Setting, parts
from tasks.stages.stage import Context, Inputs, Key, Need, Output, Planned, Result, TargetModel
from tasks.tensors import arrays, blas, kernels, rows
from tasks.tensors.rows import Rows

METHOD = "gptq"
BLOCK_BYTES = 16 << 20  # of rows that are rounded together, in float32
FACTORING = 4 * 8  # bytes for each number of a Hessian, while it is factored


class GptqParams(QuantizeParams, frozen=True, kw_only=True):
    """What is quantized, with at least one weight by its Hessian.

    Attributes:
        method: ``gptq``.
        numpy: NumPy's version, which factors the Hessians.
        hessians: the name of each weight's, by the weight's; others are rounded to nearest.
        channels: of the largest.
    """

    method: str
    numpy: str
    hessians: dict[str, str]
    channels: int


class Gptq(Quantize):
    """Quantize each layer, errors made good."""

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
        params = GptqParams(
            **structs.asdict(params),
            method=METHOD,
            numpy=blas.version(),
            hessians={weight: name for weight, (_, name) in given.items()},
            channels=max(p.shape[-1] for p in parameters if p.name in given),
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

    def quantize(
        self, key: Key, setting: Setting, params: QuantizeParams, context: Context
    ) -> tuple[dict[str, Tensor], bool]:
        """Quantize a weight by its Hessian, if it has one."""
        if not isinstance(params, GptqParams) or key.name not in params.hessians:
            return super().quantize(key, setting, params, context)
        of = Key(Hessians.name, params.hessians[key.name])
        weight = context.rows(key)
        blocks = _blocks(key.name, weight, context.rows(of), setting)
        return write_parts(context, key.name, weight, setting, blocks)

    def memory(self, params: QuantizeParams, checkpoint: Checkpoint) -> int:
        """Return the size of a few blocks, and of a Hessian that is factored."""
        nbytes = super().memory(params, checkpoint)
        if isinstance(params, GptqParams):
            nbytes += FACTORING * params.channels**2 + 4 * BLOCK_BYTES
        return nbytes

    def describe(self, params: QuantizeParams) -> str:
        """Return the settings, and the method."""
        return f"{super().describe(params)} by GPTQ"


def _is_weight(key: Key) -> bool:
    return key.stage != Hessians.name


def _blocks(name: str, weight: Rows, given: Rows, setting: Setting) -> Iterator[Quantized]:
    """Yield a weight's rows, quantized: of each of its matrices by its own Hessian.

    By the CPU: for a GPU there is too little to do at once.
    """
    import numpy as np

    channels = weight.shape[-1]
    matrices = rows.count(given) // channels
    per_matrix = rows.count(weight) // matrices
    for matrix in range(matrices):
        hessian = np.array(given.read(matrix * channels, (matrix + 1) * channels))
        if not np.isfinite(hessian).all():
            raise BuildError(
                f"{name} cannot be rounded by {METHOD}: what it is given on the calibration "
                "text holds NaN or infinity, by weights that do, or a dtype that overflows. Try "
                'dtype = "float32" or "bfloat16", or leave method out.'
            )
        order = gptq.order(hessian, setting.group_size)
        first = matrix * per_matrix
        step = max(1, BLOCK_BYTES // (4 * channels * weight.unit)) * weight.unit
        for start in range(first, first + per_matrix, step):
            block = weight.read(start, min(start + step, first + per_matrix))
            packed = gptq.quantize(block, order, group_size=setting.group_size, bits=setting.bits)
            not_finite = kernels.not_finite(block)
            pieces = arrays.views(packed, not_finite, together=False)
            yield packed, pieces, not not_finite.item()
