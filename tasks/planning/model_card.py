"""model_card: README.md of a built model, from the package's template or the project's own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache.digest import digest, digest_list, digest_record
from cache.errors import printable
from cache.records.manifests import Tensor
from cache.records.memos import Memos
from tasks.checkpoints import sources
from tasks.checkpoints.small_files import check_regular
from tasks.core import text
from tasks.core.errors import CheckpointError, ConfigError
from tasks.core.spec import Target
from tasks.layouts import asking, card
from tasks.layouts.libraries import MLX_LM
from tasks.layouts.limited import Refused
from tasks.layouts.registry import LAYOUTS
from tasks.planning import card_lines, card_template
from tasks.planning.plan import Plan
from tasks.quality.divergence import ModelQuality

TEMPLATE = Path(__file__).with_name("card.md.j2")
VERSION = 3  # raised when a template is given other variables
ROUNDING = ("numpy", "transformers", "tokenizers")  # what a text is cut by, and weights rounded
KIND = "project cards"  # of memos
MAX_TEMPLATE_BYTES = 1 << 20
SOME_QUALITY = ModelQuality(1, *[1.0] * 8)  # to try a template with


def params(plan: Plan) -> str:
    """Return a digest of what a target's card says, but for what its tensors say."""
    if not LAYOUTS[plan.target.layout].loading:
        return ""
    template, facts = digest(_template(plan.target).encode()), _facts(plan)
    if plan.target.card is None:  # targets of any name share what is packed
        del facts["name"]
    return digest_record([VERSION, template, facts, plan.target.tags])


@cache
def program() -> list[Any]:
    """Return what any target's card depends on beside the target and its library's versions."""
    return [
        VERSION,
        digest(_default_template().encode()),
        {name: version(name) for name in ("mlx-make", *ROUNDING)},
    ]


def render(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    memos: Memos,
    *,
    error: float | None = None,
    quality: ModelQuality | None = None,
) -> dict[str, bytes]:
    """Return a target's card by its file's name; nothing, if its layout has none.

    Args:
        plan: the target.
        tensors: what it is built to, by name; their digests may not be known yet.
        memos: where the checkpoint's own card is remembered.
        error: the relative error of its quantized weights together, if that is known.
        quality: how good it is, if that is known.

    Raises:
        ConfigError: the project's template is wrong.
    """
    if not LAYOUTS[plan.target.layout].loading:
        return {}
    variables = {**_variables(plan, tensors, memos), "error": error, "quality": quality}
    (text,) = _rendered(plan.target, [variables], memos)
    return {card.CARD: text.encode()}


def check(plan: Plan, memos: Memos) -> None:
    """Refuse a project's template that is wrong, before anything is made.

    Raises:
        ConfigError: it is.
    """
    if plan.target.card and LAYOUTS[plan.target.layout].loading:
        tensors = {name: Tensor("uint8", (), "") for name in plan.names}
        variables = _variables(plan, tensors, memos)
        known: list[dict[str, Any]] = [
            {"error": None, "quality": None},
            {"error": 0.1, "quality": SOME_QUALITY},
        ]
        _rendered(plan.target, [{**variables, **each} for each in known], memos)


def _variables(plan: Plan, tensors: Mapping[str, Tensor], memos: Memos) -> dict[str, Any]:
    """Return what a template is given but for how good the model is."""
    facts = _facts(plan)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return {
        **facts,
        "front_matter": card.to_yaml(_fields(plan, facts["base"], memos)),
        "weights": text.count(plan.weights),
        "size": text.size(nbytes),
        "bits_per_weight": f"{8 * nbytes / plan.weights:.3g}" if plan.weights else "",
        "digest": digest_list([name, *tensors[name].record] for name in plan.names),
    }


def _facts(plan: Plan) -> dict[str, Any]:
    """Return what a template is given but for what takes long, or depends on the tensors."""
    target, computer = plan.target, plan.computer or {}
    base = sources.on_hub(target.source)
    if base:
        base = base._replace(revision=plan.checkpoint.source.revision)
    fused = plan.model.adapter
    adapter = sources.on_hub(target.adapter) if target.adapter else None
    if adapter and fused:
        adapter = adapter._replace(revision=fused.source.revision)
    counts: dict[str, int] = {}
    for setting in plan.model.settings.values():
        words = f"{setting.bits} bits, {setting.mode}, groups of {setting.group_size}"
        counts[words] = counts.get(words, 0) + 1
    repository = target.repository
    return {
        "name": target.name,  # not in our own template
        "repository": repository,
        "base": base and base.repository,
        "commit": base and base.revision,
        "adapter": adapter.repository if adapter else fused and fused.file,
        "adapter_commit": adapter and adapter.revision,
        "loading": LAYOUTS[target.layout].loading.format(model=repository or "path/to/this/folder"),
        "quantized": [f"{words}: {text.plural(n, 'module')}" for words, n in counts.items()],
        "dtype": plan.model.dtype,
        "versions": _versions(
            plan.model.model.library or MLX_LM,
            computed=bool(computer),
            rounded=bool(target.quantize and target.quantize.method),
        ),
        "computer": [computer[key] for key in ("device", "machine") if key in computer],
        "toml": card_lines.lines(plan, base, adapter),
    }


def _fields(plan: Plan, base: str | None, memos: Memos) -> card.Fields:
    """Return the card's front matter: the checkpoint's, and what is this model's own."""
    fields, _ = card.front_matter(plan.checkpoint.folder, memos)
    tag = LAYOUTS[plan.target.layout].pipeline_tag
    fields = {k: tag if k == "pipeline_tag" else v for k, v in fields.items()}
    if not tag:
        del fields["pipeline_tag"]
    if base:
        fields["base_model"] = base
        if plan.model.adapter:  # of which it is a quantized one, if that is on no hub
            fields["base_model_relation"] = "finetune"
        elif plan.model.settings:
            fields["base_model_relation"] = "quantized"
    fields["tags"] = list(dict.fromkeys([*fields["tags"], *plan.target.tags]))
    return fields


def _template(target: Target) -> str:
    """Return the text of the template.

    Raises:
        ConfigError: the project's own cannot be read.
    """
    if target.card is None:
        return _default_template()
    try:
        check_regular(target.card)
        with target.card.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise OSError(f"it has over {MAX_TEMPLATE_BYTES:,} bytes")
        return data.decode("utf-8")
    except CheckpointError as error:
        raise ConfigError(f"card: {error} Write the template, or drop the key.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"card is {target.card}, which cannot be read: {error}. Write the template, or drop "
            "the key."
        ) from error


@cache
def _default_template() -> str:
    return TEMPLATE.read_text(encoding="utf-8")


def _rendered(target: Target, variables: list[dict[str, Any]], memos: Memos) -> list[str]:
    """Fill in a target's template: the project's own in a process that ends, and not again.

    Raises:
        ConfigError: it is wrong.
    """
    template = _template(target)
    if target.card is None:
        return [card_template.compiled(template).render(each) for each in variables]
    given = [
        {**each, "quality": each["quality"] and each["quality"]._asdict()} for each in variables
    ]
    question = [VERSION, digest(template.encode()), digest_record(given)]
    if known := memos.get(KIND, question, list[str]):
        return known
    texts = card_template.fill_in(template, given)
    if isinstance(texts, Refused):
        raise ConfigError(
            f"card {target.card}: {printable(texts)}. A card's template is Jinja, and knows "
            f"{', '.join(sorted(variables[0]))}."
        )
    memos.put(KIND, question, texts)
    return texts


@cache
def _versions(library: str, *, computed: bool, rounded: bool) -> dict[str, str]:
    """Return the versions of what made a model.

    Args:
        library: whose classes it is of.
        computed: whether anything was computed; else MLX's is no matter.
        rounded: whether weights were rounded by what a model made of a text.
    """
    versions = asking.versions(library) | {"mlx-make": version("mlx-make")}
    versions |= {name: version(name) for name in ROUNDING if rounded}
    return versions if computed else {name: versions[name] for name in versions if name != "mlx"}
