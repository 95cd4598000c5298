"""recorded: what is on record of a target's sensitivities, before it is planned to the end."""

from __future__ import annotations

from collections.abc import Mapping

from cache.digest import digest
from cache.errors import BlobLost, FileChanged
from cache.records.manifests import Manifest
from tasks.core.errors import ConfigError
from tasks.execution.builder import Builder
from tasks.planning.plan import Plan
from tasks.stages import quantize_scheme, sensitivity
from tasks.stages.quantize_scheme import Setting
from tasks.stages.sensitivity import Sensitivity


def sensitivities(
    builder: Builder, plan: Plan, *, recovers: bool = False
) -> dict[str, dict[Setting, float]] | None:
    """Return the sensitivities of a target's weights, by name; None if some are not on record.

    Args:
        builder: gives the cache.
        plan: the target.
        recovers: whether those that are on record, and lost, are made again.

    Raises:
        ConfigError: no library runs the model.
    """
    nodes = plan.nodes(Sensitivity.name)
    if not nodes:
        if not plan.why_not_run:
            raise ConfigError(
                "target_bpw and fit choose among modules that can be quantized, and "
                f"{quantize_scheme.why_none(plan.model.model)}"
            )
        raise ConfigError(
            f"target_bpw and fit need to run the model: {plan.why_not_run.rstrip('.')}. Use bits, "
            'or layout = "mlx-lm".'
        )
    found: dict[str, dict[Setting, float]] = {}
    for node, manifest in zip(nodes, builder.on_record(plan, nodes), strict=True):
        if manifest is None:
            return None
        contents = builder.contents(plan, node, manifest) if recovers else _here(builder, manifest)
        if contents is None:
            return None
        for name, number in sensitivity.figures(manifest, contents).items():
            found.setdefault(name, {})[node.params.setting] = number
    return found


def _here(builder: Builder, manifest: Manifest) -> Mapping[str, bytes] | None:
    """Return the bytes of what was made, if the cache has them as they were: none is made again."""
    blobs = builder.store.blobs
    contents: dict[str, bytes] = {}
    for name, tensor in manifest.tensors.items():
        try:
            parts = blobs.locate(tensor.digest, tensor.nbytes)
            contents[name] = b"".join(map(bytes, blobs.chunks(parts)))
        except (BlobLost, FileChanged, FileNotFoundError):
            return None
        if digest(contents[name]) != tensor.digest:
            return None
    return contents
