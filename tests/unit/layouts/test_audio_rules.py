"""Rules that would make a model which mlx-audio's own loader has no place for."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tasks.core.errors import ConfigError
from tasks.core.quantization import Quantize, Rule
from tasks.core.spec import Target
from tasks.layouts import mlx_audio
from tasks.layouts.model import Model, Module, Parameter, Verdict
from tasks.stages.quantize_scheme import Schemes

OWN = {"group_size": 64, "bits": 8}


def _config(verdict: Verdict, width: int, rule: Rule, group_size: int | None = None) -> Any:
    weight = "proj.weight"
    model = SimpleNamespace(
        parameters={weight: Parameter(weight, "bfloat16", (64, width), (weight,), (), True)},
        modules=(Module("proj", ("weight",), ("weight", "scales", "biases"), verdict, 64 * width),),
        library="mlx-audio",
        config={},
        recipes={},
    )
    quantize = Quantize(bits=4, group_size=group_size, rules=(rule,))
    scheme = Schemes(cast(Model, model)).plan(quantize)
    target = cast(Target, SimpleNamespace(quantize=quantize))
    return mlx_audio.config(target, cast(Model, model), scheme.config)


@pytest.mark.parametrize(
    ("verdict", "width", "rule", "words"),
    [
        (False, 128, Rule("proj", bits=8), "class in mlx-audio does not"),
        (False, 96, Rule("proj", group_size=32), "width 96 is no multiple .* Set group_size = 32"),
        (OWN, 128, Rule("proj", bits=6), "as its model's class says alone"),
        (OWN, 128, Rule("proj", skip=True), "as its model's class says alone"),
    ],
)
def test_what_the_loader_passes_over_is_refused(
    verdict: Verdict, width: int, rule: Rule, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"proj: .*{words}"):
        _config(verdict, width, rule)


def test_what_it_loads_is_built() -> None:
    for verdict, skip in ((True, False), (True, True), (False, True)):
        rule = Rule("proj", skip=True) if skip else Rule("proj", bits=8)
        assert ("proj" in _config(verdict, 128, rule)["quantization"]) is not skip
    assert _config(OWN, 128, Rule("proj", bits=8))["quantization"]["proj"]["bits"] == 8
    assert _config(False, 96, Rule("proj", bits=8), group_size=32)["quantization"]["proj"]
