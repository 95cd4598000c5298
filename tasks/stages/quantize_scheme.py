"""quantize_scheme: which modules are quantized, and how: the target's wish, mlx-lm's verdict."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import Any, NamedTuple

from msgspec import Struct, convert, structs

from cache.errors import printable
from tasks.core.errors import CheckpointError, ConfigError
from tasks.core.quantization import MODES, Quantize, Rule
from tasks.core.text import listed, plural
from tasks.layouts.model import Model, Module, Verdict
from tasks.stages import rules

FALLBACK = "fallback_group_size"  # a key of a model's word on a module
PARTS = ("weight", "scales", "biases")  # what mx.quantize returns, as the modules name them


class Setting(NamedTuple):
    """How one weight is quantized: ``mx.quantize``'s arguments."""

    group_size: int
    bits: int
    mode: str


_NOTHING: Mapping[str, Setting] = {}


class Scheme(Struct, frozen=True):
    """What is quantized, and what config.json says of it.

    Attributes:
        settings: by the module's path; modules that stay as they are have none.
        config: the table ``quantization``, None if nothing is to be quantized.
        notes: what people should know: modules that were to be quantized and cannot be.
    """

    settings: dict[str, Setting]
    config: dict[str, Any] | None
    notes: tuple[str, ...] = ()


class _Outcome(NamedTuple):
    """What is done with a module.

    Attributes:
        setting: how it is quantized, if it is.
        config: what config.json says of it beside what holds for all, if anything.
        misfit: the width and the group size that it is no multiple of, where that is why not.
    """

    setting: Setting | None = None
    config: dict[str, Any] | None = None
    misfit: tuple[int, int] | None = None


class _WithoutRules(NamedTuple):
    """What a model's modules are to be, but for rules.

    Attributes:
        verdicts: the modules that can be quantized, by path, with the recipe's word on each or the
            model's own.
        outcomes: what is done with each.
    """

    verdicts: dict[str, tuple[Module, Verdict]]
    outcomes: dict[str, _Outcome]

    @classmethod
    def of(cls, model: Model, quantize: Quantize) -> _WithoutRules:
        """Work it out.

        Raises:
            ConfigError: the recipe does not fit the model.
        """
        verdicts = {module.path: (module, word) for module, word in _verdicts(model, quantize)}
        outcomes = {path: _decide(model, *of, quantize) for path, of in verdicts.items()}
        return cls(verdicts, outcomes)


UNPACKED = (
    "Build from the checkpoint that was not quantized, or say dequantize = true: its weights go "
    "back to floats first"
)


class Schemes:
    """Decides how a model is quantized, for many targets: what is not of a rule is decided once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._without_rules: dict[Quantize, _WithoutRules] = {}

    def choosable(self, quantize: Quantize) -> list[str]:
        """Return the paths of the modules whose settings are to be chosen within a budget.

        Those are the modules that the model has no word of its own on, and no rule.

        Raises:
            ConfigError: a rule matches nothing.
        """
        ruled = self._ruled(quantize)
        verdicts = _verdicts(self._model, quantize)
        return [m.path for m, word in verdicts if word is True and m.path not in ruled]

    def dtypes(self, quantize: Quantize | None) -> dict[str, str]:
        """Return what rules cast parameters to, by name.

        Raises:
            ConfigError: a rule matches nothing.
        """
        if quantize is None:
            return {}
        return rules.dtypes(self._model, self.rule_of(quantize))

    def rule_of(self, quantize: Quantize) -> dict[str, Rule]:
        """Return the rule of each module that has one, by path.

        Raises:
            ConfigError: a rule matches nothing.
        """
        return rules.of_modules(self._model, quantize.rules, lambda: why_none(self._model))

    def _ruled(self, quantize: Quantize) -> dict[str, Rule]:
        """Return the rules of modules that can be quantized, those that say something of that."""
        can = {m.path for m in self._model.modules if m.quantized_names is not None}
        rule_of = self.rule_of(quantize).items()
        return {path: rule for path, rule in rule_of if rule.is_of_quantizing and path in can}

    def plan(self, quantize: Quantize | None, chosen: Mapping[str, Setting] = _NOTHING) -> Scheme:
        """Decide how each module is quantized, as ``mlx_lm.utils.quantize_model`` does.

        Within a budget, as it was ``chosen``, by path: it is written as a recipe's would be. On top
        of mlx-lm's verdict (the model's own or the recipe's) the first rule that matches a module's
        path wins. A rule that matches none may have the checkpoint's own names instead.

        Raises:
            ConfigError: the recipe does not fit the model, or a rule matches nothing.
            CheckpointError: its config.json says that it is quantized as nothing can be.
        """
        if quantize is None:
            return Scheme({}, None)
        given = _given(self._model.config)
        default = _default(quantize)
        outcomes, skipped = self._outcomes(quantize)
        if quantize.chooses:
            outcomes |= self._chosen(quantize, chosen)
        settings = {path: o.setting for path, o in outcomes.items() if o.setting}
        narrow: dict[tuple[int, int], list[str]] = {}
        for misfit, path in [(o.misfit, path) for path, o in outcomes.items() if o.misfit]:
            narrow.setdefault(misfit, []).append(path)
        # A checkpoint that is quantized already keeps its settings; the new ones stand per module.
        config: dict[str, Any] = dict(given) if given else default._asdict()
        config |= {path: o.config for path, o in outcomes.items() if o.config is not None}
        already = _already(self._model, given, quantize)
        packed = bool(given and _packed_modules(self._model))
        return Scheme(settings, config, _notes(already, settings, narrow, skipped, packed=packed))

    def _chosen(self, quantize: Quantize, chosen: Mapping[str, Setting]) -> dict[str, _Outcome]:
        """Return what is done with modules that a choice is for; what fits no candidate stays."""
        outcomes = {}
        for path in self.choosable(quantize):
            width = self._model.parameters[weight_name(path)].shape[-1]
            if setting := chosen.get(path):
                outcomes[path] = _Outcome(setting, setting._asdict())
            else:
                outcomes[path] = _Outcome(misfit=(width, candidates(quantize)[0].group_size))
        return outcomes

    def float32_scales(
        self, settings: Mapping[str, Setting], dtype: str | None, by_rule: Mapping[str, str]
    ) -> list[str]:
        """Return the note on scales that are as large as float32 has them.

        Args:
            settings: how modules are quantized, by path.
            dtype: what the target casts to, if anything.
            by_rule: what rules cast parameters to, by name.
        """
        large = [
            path
            for path, castable in self._float32.items()
            if path in settings and settings[path].mode == "affine" and not (dtype and castable)
            if weight_name(path) not in by_rule
        ]
        if dtype == "float32" or not large:
            return []
        return [
            f"scales and biases of {plural(len(large), 'module')} are float32, as the checkpoint's "
            f'weights are ({listed(large)}): dtype = "bfloat16" has them half as large'
        ]

    @cached_property
    def _float32(self) -> dict[str, bool]:
        """The modules whose weights are float32, by path, and whether that may be changed."""
        weights = {
            module.path: self._model.parameters[weight_name(module.path)]
            for module in self._model.modules
            if module.quantized_names is not None
        }
        return {p: weight.castable for p, weight in weights.items() if weight.dtype == "float32"}

    def _outcomes(self, quantize: Quantize) -> tuple[dict[str, _Outcome], int]:
        """Return what is done with each module, and how many are skipped.

        Raises:
            ConfigError: the recipe does not fit the model, or a rule matches nothing.
        """
        ruled = self._ruled(quantize)
        quantize = structs.replace(quantize, rules=())
        if quantize not in self._without_rules:
            self._without_rules[quantize] = _WithoutRules.of(self._model, quantize)
        verdicts, outcomes = self._without_rules[quantize]
        changed = {
            path: _decide(self._model, *verdicts[path], quantize, rule)
            for path, rule in ruled.items()
            if not rule.skip
        }
        outcomes = outcomes | changed
        for path in ruled.keys() - changed.keys():
            del outcomes[path]
        for module in self._model.modules:
            if not module.quantized_names and module.path in outcomes:
                _check_known(self._model, module, outcomes[module.path])
        return outcomes, sum(rule.skip for rule in ruled.values())


def candidates(quantize: Quantize | None) -> tuple[Setting, ...]:
    """Return the ways to quantize a module of which those of a budget are chosen.

    Raises:
        ConfigError: there is none.
    """
    quantize = quantize or Quantize()
    if quantize.candidates:
        found = [
            _complete(
                mode := each.mode or quantize.mode,
                each.group_size or (quantize.group_size if mode == quantize.mode else None),
                each.bits,
            )
            for each in quantize.candidates
        ]
    else:
        sizes, all_bits = MODES[quantize.mode]
        found = [
            Setting(size, bits, quantize.mode)
            for size in ([quantize.group_size] if quantize.group_size else sizes)
            for bits in all_bits
        ]
    kept = sorted({each for each in found if each.bits >= (quantize.min_bits or 0)})
    if not kept:
        raise ConfigError(
            f"min_bits = {quantize.min_bits} leaves none of the candidates, which have at most "
            f"{max(each.bits for each in found)} bits. Lower it, or add candidates."
        )
    return tuple(kept)


def _default(quantize: Quantize) -> Setting:
    return _complete(quantize.mode, quantize.group_size, quantize.bits)


def _decide(
    model: Model,
    module: Module,
    verdict: Verdict,
    quantize: Quantize,
    rule: Rule | None = None,
) -> _Outcome:
    """Return what is done with a module, given the model's or the recipe's word on it."""
    default = _default(quantize)
    width = model.parameters[weight_name(module.path)].shape[-1]
    falls_back = isinstance(verdict, dict) and FALLBACK in verdict
    if isinstance(verdict, dict) and falls_back:
        verdict = _fallen_back(verdict, default, width)
    if rule:
        verdict = _apply(rule, verdict, default)
    setting = default
    if isinstance(verdict, dict):
        setting = _complete(
            verdict.get("mode", "affine"), verdict.get("group_size"), verdict.get("bits")
        )
    # mlx-lm asks this of the target's own group size first, unless a rule brings another.
    own = rule is not None or falls_back
    group_sizes = {setting.group_size} if own else {default.group_size, setting.group_size}
    if misfits := [size for size in group_sizes if width % size]:
        return _Outcome(misfit=(width, misfits[0]))
    if not verdict:
        return _Outcome()
    if isinstance(verdict, dict):
        return _Outcome(setting, verdict)
    return _Outcome(setting, default._asdict() if model.config.get("quantization") else None)


def _fallen_back(verdict: Mapping[str, Any], default: Setting, width: int) -> dict[str, Any]:
    """Return the settings of a module that has another group size where the target's does not fit.

    As ``mlx_vlm.quant_utils.quantize_model`` has it.
    """
    said = {**default._asdict(), **verdict}
    other = said.pop(FALLBACK)
    if other is not None and width % said["group_size"] and width % other == 0:
        said["group_size"] = other
    return said


def _verdicts(model: Model, quantize: Quantize) -> Iterator[tuple[Module, Verdict]]:
    """Yield the modules that can be quantized, with the recipe's word on each or the model's own.

    Raises:
        ConfigError: the recipe does not fit the model.
    """
    recipe = model.recipes.get(quantize.recipe) if quantize.recipe else None
    if quantize.recipe and recipe is None:
        has = f"s, which are {', '.join(model.recipes)}. Use one of these, or bits."
        raise ConfigError(
            f"recipe {quantize.recipe!r} is none of {model.library}'"
            + (has if model.recipes else "s, which has none. Use bits instead.")
        )
    if isinstance(recipe, str):
        raise ConfigError(
            f"recipe {quantize.recipe!r} does not fit the model: {recipe} Use bits instead."
        )
    for module in model.modules:
        if module.quantized_names is None:
            continue
        if recipe is None:
            yield module, module.verdict
        else:
            word = recipe[module.path]
            if isinstance(word, int) and not isinstance(word, bool):
                # mlx_lm.convert writes a group size that nobody gave as null, and reads it so.
                word = {"group_size": quantize.group_size, "bits": word, "mode": "affine"}
            yield module, word


def _check_known(model: Model, module: Module, outcome: _Outcome) -> None:
    if outcome.setting:
        raise ConfigError(
            f"{module.path} is quantized by {model.library} in a way of its own, which mlx-make "
            f'does not know. Skip it: rules = [{{ match = "{module.path}", skip = true }}]'
        )


def _given(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a checkpoint is quantized already, by its config.json.

    Raises:
        CheckpointError: nothing can be quantized so.
    """
    given = config.get("quantization")
    if not given:
        return None
    try:
        said = convert(given, _Given)
        if said.mode in MODES:
            return dict(given)
        cause = f"mode is none of {', '.join(MODES)}"
    except ValueError as error:  # msgspec's, or of half a character in a text
        cause = str(error)
    raise CheckpointError(
        f"config.json has quantization = {printable(repr(given))}: {cause}. Fetch it again."
    )


class _Given(Struct):
    mode: str = "affine"
    group_size: int | None = None
    bits: int | None = None


def why_none(model: Model) -> str:
    """Return why a model has no module that can be quantized."""
    packed = _packed(model)
    return f"the checkpoint is {packed}. {UNPACKED}." if packed else "the checkpoint has none."


def _packed(model: Model) -> str:
    """Return in words how modules are quantized already, "" if none is."""
    given, packed = _given(model.config), _packed_modules(model)
    if not (given and packed):
        return ""
    return f"quantized already, {_words(_was(given))}, {plural(len(packed), 'module')} of it"


def _packed_modules(model: Model) -> list[Module]:
    return [m for m in model.modules if m.quantized_names is None and "scales" in m.names]


def _was(given: Mapping[str, Any]) -> Setting:
    return _complete(given.get("mode", "affine"), given.get("group_size"), given.get("bits"))


def _already(model: Model, given: Mapping[str, Any] | None, asked: Quantize) -> list[str]:
    """Return what to say of modules that are quantized already and stay as they are."""
    packed, default = _packed_modules(model), _default(asked)
    if not (given and packed):
        return []
    was = _was(given)
    said = [_words(default)] if was != default else []
    said += [f"recipe {asked.recipe}"] if asked.recipe else []
    said += [f"method {asked.method}"] if asked.method else []
    if not said:
        return []
    return [
        f"the checkpoint is quantized already, {_words(was)}, and {plural(len(packed), 'module')} "
        f"of it stay so: {', '.join(said)} is only for those that are not. {UNPACKED}"
    ]


def _words(setting: Setting) -> str:
    """Return a setting in words."""
    mode = "" if setting.mode == "affine" else f" {setting.mode}"
    return f"to {setting.bits} bits{mode} in groups of {setting.group_size}"


def _notes(
    already: list[str],
    settings: Mapping[str, Setting],
    narrow: Mapping[tuple[int, int], list[str]],
    skipped: int,
    *,
    packed: bool,
) -> tuple[str, ...]:
    """Return what people should know of modules that are left as they are."""
    notes = already + [
        f"{plural(len(paths), 'module')} left unquantized: a last axis of {width} is no multiple "
        f"of the group size, {size} ({listed(paths)})"
        for (width, size), paths in narrow.items()
    ]
    if not settings and skipped:
        notes.append(f"nothing is quantized: rules skip {plural(skipped, 'module')}")
    elif not settings and not notes and not packed:
        notes.append("nothing is quantized: the checkpoint has no module that can be")
    return tuple(notes)


def names(module: Module, setting: Setting | None) -> tuple[str, ...]:
    """Return a module's parameters in the order of the built model, quantized or not."""
    held = module.names if setting is None else module.quantized_names or ()
    if setting is not None and setting.mode != "affine":
        held = tuple(name for name in held if name != "biases")
    return _below(module.path, held)


@cache  # all targets of a model ask for the same
def _below(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sys.intern(f"{path}.{name}") if path else name for name in names)


def parts(weight: str, setting: Setting) -> list[str]:
    """Return the names of what a weight is quantized to."""
    prefix = weight.removesuffix("weight")
    return [prefix + part for part in PARTS[: 3 if setting.mode == "affine" else 2]]


@cache  # all targets of a model ask for the same
def weight_name(path: str) -> str:
    """Return the name of the weight of the module at ``path``."""
    return f"{path}.weight" if path else "weight"


def module_path(weight: str) -> str:
    """Return the path of the module that a weight of this name is of."""
    return weight.removesuffix("weight").removesuffix(".")


def _complete(mode: str, group_size: int | None, bits: int | None) -> Setting:
    group_sizes, all_bits = MODES[mode]
    return Setting(group_size or group_sizes[0], bits or all_bits[0], mode)


def _apply(rule: Rule, verdict: Verdict, default: Setting) -> dict[str, Any]:
    base = dict(verdict) if isinstance(verdict, dict) else default._asdict()
    mode = rule.mode or default.mode  # what the rule's numbers were checked against
    if mode != base.get("mode", "affine"):
        base = {}  # another mode's numbers mean nothing here
    return _complete(
        mode, rule.group_size or base.get("group_size"), rule.bits or base.get("bits")
    )._asdict()
