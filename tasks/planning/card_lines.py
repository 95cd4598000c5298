"""card_lines: the lines of models.toml with which anybody makes the very same tensors.

Nothing that is known on this machine alone is left to chance: a hub's repository stands at its
commit, what a budget chose stands module by module, and what weights were rounded on by its size
and SHA-256. Paths of this machine do not stand there.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any, cast

from msgspec import structs, to_builtins

from tasks.checkpoints import file_digests
from tasks.checkpoints.hub_name import HubName
from tasks.core import text
from tasks.core.errors import ConfigError
from tasks.core.quantization import MODES, Mode, Quantize, Rule
from tasks.core.spec import Settings
from tasks.layouts.registry import LAYOUTS
from tasks.planning.plan import Plan
from tasks.stages.quantize_scheme import Setting
from tasks.stages.rules import holder_of

# How what Python's help the weights were rounded on is found again in a card.
OF_PYTHON = re.compile(r"^# text: the help of Python (\S+)$", re.MULTILINE)
FOLDER, ADAPTER = "FOLDER OF THE CHECKPOINT", "FOLDER OF THE ADAPTER"  # what is on no hub


def lines(plan: Plan, base: HubName | None, adapter: HubName | None) -> str:
    """Return the lines.

    Args:
        plan: the target.
        base: its source, if that is on a hub.
        adapter: its adapter, if that is.

    Raises:
        ConfigError: the text that it is calibrated on cannot be read.
    """
    target, computer = plan.target, plan.computer or {}
    name = (target.repository or (base and base.repository) or "model").rpartition("/")[2]
    name = name if re.fullmatch(r"[\w-]+", name, re.ASCII) else text.toml(name)
    quantize = target.quantize and _spelled_out(plan, target.quantize)
    keys: dict[str, Any] = {
        "source": text.toml(str(base) if base else FOLDER),
        "loader": target.loader and text.toml(target.loader),
        "layout": target.layout != Settings().layout and text.toml(target.layout),
        "dtype": target.dtype and text.toml(target.dtype),
        "adapter": target.adapter and text.toml(str(adapter or ADAPTER)),
        "dequantize": target.dequantize and text.toml(True),
        "quantize": _table(quantize) if quantize else target.keep and text.toml("keep"),
        "device": computer.get("device") and text.toml(_device(computer["device"])),
        "max_shard_size": target.max_shard_bytes != LAYOUTS[target.layout].default_shard_bytes
        and text.toml(target.max_shard_bytes),
    }
    said = [f"{key} = {value}" for key, value in keys.items() if value]
    # What was chosen stands above; what was rounded on a text depends on that still.
    quality = _quality(plan) if quantize and quantize.method else ()
    return "\n".join([f"[models.{name}]", *said, *quality])


def of_card(card: str) -> str | None:
    """Return the lines that a card has, if any; anybody may have written it, of any length."""
    _, begin, rest = f"\n{card}\n".partition("\n```toml\n")
    said, end, _ = f"\n{rest}".partition("\n```\n")
    return f"{said}\n" if begin and end else None


def _device(backend: str) -> str:
    return "cpu" if backend == "cpu" else "gpu"


def _spelled_out(plan: Plan, asked: Quantize) -> Quantize:
    """Return how a target is quantized, with what a budget chose as rules."""
    if plan.choice is None or plan.choice.settings is None:
        return asked
    schemes, chosen = plan.shared.schemes, plan.choice.settings
    rule_of = schemes.rule_of(asked)
    rules = {}
    for path in schemes.choosable(asked):
        own = rule_of.get(path)  # of its dtype alone: else nothing is chosen for it
        dtype, match = own.dtype if own else None, escape(path)
        if setting := chosen.get(path):
            rules[path] = Rule(match, *_but_usual(setting, asked), dtype=dtype)
        else:  # no candidate fits it
            rules[path] = Rule(match, skip=True, dtype=dtype)
    # One that casts nothing of what is left would be refused, and does nothing there.
    castable = {holder_of(p.name) for p in plan.shared.model.parameters.values() if p.castable}
    left = [(path, rule) for path, rule in rule_of.items() if path not in rules]
    others = {rule for path, rule in left if rule.is_of_quantizing or path in castable}
    rules_left = [rule for rule in asked.rules if rule in others]
    return structs.replace(
        asked, target_bpw=None, fit=None, context=None, candidates=(), exact=False, min_bits=None,
        rules=(*rules.values(), *rules_left),
    )  # fmt: skip


def _but_usual(setting: Setting, asked: Quantize) -> tuple[int, int | None, Mode | None]:
    """Return a module's bits, and its group size and mode where they are not the target's."""
    if setting.mode != asked.mode:
        return setting.bits, setting.group_size, cast(Mode, setting.mode)
    usual = asked.group_size or MODES[asked.mode][0][0]
    return setting.bits, None if setting.group_size == usual else setting.group_size, None


def _table(quantize: Quantize) -> str:
    """Return what a table says that is not its default; a rule a line, where there are many."""
    usual = to_builtins(Quantize())
    said = {k: v for k, v in to_builtins(quantize, enc_hook=int).items() if v != usual[k]}
    rules = [
        text.toml({k: v for k, v in rule.items() if v not in (None, False)})
        for rule in said.pop("rules", ())
    ]
    pairs = [f"{key} = {text.toml(value)}" for key, value in said.items()]
    if len(rules) > 1:
        pairs.append("\n".join(["rules = [", *(f"    {rule}," for rule in rules), "]"]))
    elif rules:
        pairs.append(f"rules = [{rules[0]}]")
    return f"{{ {', '.join(pairs)} }}" if pairs else "{}"


def _quality(plan: Plan) -> Iterator[str]:
    """Yield the lines of [quality], as far as the tensors depend on them."""
    quality = plan.model.quality
    yield ""
    yield "[quality]"
    if quality.text is None:
        yield f"# text: the help of Python {platform.python_version()}"
    else:
        names = [Path(name).name for name in quality.text]
        yield f"text = {text.toml(names[0] if len(names) == 1 else names)}"
        for name, path in zip(names, quality.text, strict=True):
            yield f"# {text.toml(name)}: SHA-256 {_sha256(plan, Path(path))}"
    for key in ("samples", "sequence_length", "seed"):
        yield f"{key} = {getattr(quality, key)}"


def _sha256(plan: Plan, path: Path) -> str:
    try:
        return file_digests.of_file(path, file_digests.SHA256, plan.model.memos)
    except OSError as error:
        raise ConfigError(f"[quality] text: {path} cannot be read: {error.strerror}.") from error
