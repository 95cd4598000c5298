"""awq_quantize: quantize weights that are scaled and clipped as ``awq`` found it best."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

from msgspec import structs

from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import BuildError
from tasks.layouts.model import Parameter
from tasks.stages.awq import CLIP, INPUT_SCALE, OUTPUT_SCALE, Awq, AwqParams
from tasks.stages.quantize import Quantize, Quantized, QuantizeParams, quantize_block, write_parts
from tasks.stages.quantize_scheme import Setting, parts
from tasks.stages.stage import (
    Context,
    Inputs,
    Key,
    Need,
    Origin,
    Output,
    Planned,
    Result,
    TargetModel,
)
from tasks.tensors import arrays, blas, mx, rows
from tasks.tensors.device import BLOCK_BYTES, device_of
from tasks.tensors.rows import Rows

METHOD = "awq"


class AwqQuantizeParams(QuantizeParams, frozen=True, kw_only=True):
    """What is quantized, with something of it scaled or clipped.

    Attributes:
        method: ``awq``.
        numpy: NumPy's version, which scales and clips.
        scaled: what is told of each matrix, by its name: see ``awq``.
        vectors: norms and biases that are as ``awq`` made them.
    """

    method: str
    numpy: str
    scaled: dict[str, list[str]]
    vectors: list[str]


class AwqQuantize(Quantize):
    """Quantize each layer, scaled and clipped."""

    one_by_one = False

    def plan(self, target: TargetModel) -> Mapping[str, Planned[QuantizeParams]]:
        """Plan what the target's settings say, and what there is to scale.

        Raises:
            BuildError: the model cannot be run.
        """
        if target.settings and not target.model.runs:
            raise BuildError(
                f'method = "{METHOD}" runs the model, and layout {target.layout!r} is of no '
                "library that can be asked to. Leave method out, or take another layout."
            )
        found = {name: spec.params for name, spec in target.planned[Awq.name].items()}
        segments: dict[str, tuple[str, AwqParams]] = {}
        for segment, params in found.items():
            for name in (*params.scaled, *params.vectors):
                segments[name] = segment, params
        return {
            layer: self._with_scales(planned, segments, target.layers[layer])
            for layer, planned in super().plan(target).items()
        }

    def _with_scales(
        self,
        planned: Planned[QuantizeParams],
        segments: Mapping[str, tuple[str, AwqParams]],
        parameters: Sequence[Parameter],
    ) -> Planned[QuantizeParams]:
        own = [p.name for p in parameters if p.name in segments]
        if not own:
            return planned
        scaled = {n: segments[n][1].scaled[n] for n in own if n in segments[n][1].scaled}
        params = AwqQuantizeParams(
            **structs.asdict(planned.params),
            method=METHOD,
            numpy=blas.version(),
            scaled=scaled,
            vectors=[name for name in own if name not in scaled],
        )
        needs = (Need(Awq.name, each) for each in dict.fromkeys(segments[n][0] for n in own))
        told = (f"{name}.{kind}" for name, kinds in scaled.items() for kind in kinds)
        reads = frozenset((*(p.name for p in parameters), *told))
        return Planned(params, (*planned.needs, *needs), reads)

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return a digest of the settings, and what scales depend on."""
        return METHOD, super().plan_key(target), target.dtype, target.quality

    def outputs(
        self, params: QuantizeParams, inputs: Mapping[Key, TensorSpec]
    ) -> dict[str, Output]:
        """Return each weight's parts, and what is scaled; the rest is passed on."""
        weights = {key: spec for key, spec in inputs.items() if key.stage != Awq.name}
        outputs = super().outputs(params, weights)
        if not isinstance(params, AwqQuantizeParams):
            return outputs
        spec_of = {key.name: spec for key, spec in weights.items()}
        for name in params.vectors:
            outputs[name] = Output(spec_of[name], Origin.PASSED_ON, (Key(Awq.name, name),))
        for name, kinds in params.scaled.items():
            told = [Key(Awq.name, f"{name}.{kind}") for kind in kinds]
            setting = params.settings.get(name)
            for part in parts(name, setting) if setting else [name]:
                made_of = (*outputs[part].inputs, *told)
                outputs[part] = outputs[part]._replace(origin=Origin.STORED, inputs=made_of)
        return outputs

    def run(self, params: QuantizeParams, inputs: Inputs, context: Context) -> Result:
        """Quantize a layer."""
        weights = {key: each for key, each in inputs.items() if key.stage != Awq.name}
        return super().run(params, weights, context)

    def leave(self, key: Key, params: QuantizeParams, context: Context) -> Tensor:
        """Return a tensor that is not quantized: scaled, if it is to be."""
        if not isinstance(params, AwqQuantizeParams):
            return super().leave(key, params, context)
        if key.name in params.vectors:
            return context.pass_on(Key(Awq.name, key.name))
        if key.name not in params.scaled:
            return super().leave(key, params, context)
        weight = context.rows(key)
        nbytes = TensorSpec(weight.dtype, weight.shape).nbytes
        with context.writer(key.name, nbytes) as writer:
            for block in _blocks(key, weight, params, context):
                writer.write(arrays.view(block))
        return Tensor(weight.dtype, weight.shape, writer.digest)

    def quantize(
        self, key: Key, setting: Setting, params: QuantizeParams, context: Context
    ) -> tuple[dict[str, Tensor], bool]:
        """Quantize a weight, scaled and clipped if it is to be."""
        if not isinstance(params, AwqQuantizeParams) or key.name not in params.scaled:
            return super().quantize(key, setting, params, context)
        weight = context.rows(key)
        made = _quantized(_blocks(key, weight, params, context), setting, params.device, context)
        return write_parts(context, key.name, weight, setting, made)

    def memory(self, params: QuantizeParams, checkpoint: Checkpoint) -> int:
        """Return the size of a few blocks, also in float32."""
        device = device_of(params.device) if params.device else "cpu"
        return super().memory(params, checkpoint) + 6 * BLOCK_BYTES[device]

    def describe(self, params: QuantizeParams) -> str:
        """Return the settings, and the method."""
        words = super().describe(params)
        return f"{words} by AWQ" if isinstance(params, AwqQuantizeParams) else words


def _quantized(
    blocks: Iterator[mx.array], setting: Setting, backend: str, context: Context
) -> Iterator[Quantized]:
    device = device_of(backend)
    for block in blocks:
        if device == "gpu":
            arrays.share(block)
        yield quantize_block(block, setting, device, context.streams.get(device))


def _blocks(
    key: Key, weight: Rows, params: AwqQuantizeParams, context: Context
) -> Iterator[mx.array]:
    """Yield a weight's rows, scaled and clipped, in its dtype: by the CPU."""
    import numpy as np

    from tasks.quality import awq

    told = {
        kind: context.rows(Key(Awq.name, f"{key.name}.{kind}")) for kind in params.scaled[key.name]
    }
    scales = {
        kind: np.array(told[kind].read(0, rows.count(told[kind])))
        for kind in (INPUT_SCALE, OUTPUT_SCALE)
        if kind in told
    }
    count, columns = weight.shape[-2:]
    step = max(1, BLOCK_BYTES["cpu"] // (4 * columns * weight.unit)) * weight.unit
    for first in range(0, rows.count(weight), count):
        for start in range(first, first + count, step):
            stop = min(start + step, first + count)
            block = np.array(weight.read(start, stop).astype(mx.float32))
            if INPUT_SCALE in scales:
                block *= scales[INPUT_SCALE][first // count]
            if OUTPUT_SCALE in scales:
                block /= scales[OUTPUT_SCALE][first // count, start - first : stop - first, None]
            if CLIP in told:
                block = awq.clip(block, np.array(told[CLIP].read(start, stop)))
            made = mx.array(block).astype(getattr(mx, weight.dtype))
            mx.eval(made)
            yield made
