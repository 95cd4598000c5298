"""The lines of a card can be asked for again, whatever a budget and rules were."""

from types import SimpleNamespace
from typing import Any, cast

from tasks.core.quantization import Quantize, Rule
from tasks.layouts.model import Model, Module, Parameter
from tasks.planning import card_lines
from tasks.planning.plan import Plan
from tasks.stages.quantize_scheme import Schemes, Setting


def test_a_rule_that_casts_nothing_of_what_is_left_is_left_out() -> None:
    """Of a dtype alone: the router's bias stays as the checkpoint has it, by the model's word."""
    up, bias, norm = "l.mlp.up.weight", "l.mlp.router_bias", "l.norm.weight"
    quantized = ("weight", "scales", "biases")
    modules = (
        Module("l.mlp.up", ("weight",), quantized, True, 64 * 64),
        Module("l.norm", ("weight",), None, False, 64),
    )
    parameters = {
        up: Parameter(up, "bfloat16", (64, 64), (up,), (), castable=True),
        bias: Parameter(bias, "float32", (64,), (bias,), (), castable=False),
        norm: Parameter(norm, "bfloat16", (64,), (norm,), (), castable=True),
    }
    model = cast(Model, _model(parameters, modules))
    schemes = Schemes(model)
    rules = (Rule("*mlp*", dtype="float16"), Rule("*norm", dtype="float32"))
    asked = Quantize(target_bpw=4.5, rules=rules)
    chosen = {"l.mlp.up": Setting(64, 4, "affine")}
    shared = SimpleNamespace(schemes=schemes, model=model)
    plan = SimpleNamespace(shared=shared, choice=SimpleNamespace(settings=chosen))
    said = card_lines._spelled_out(cast(Plan, plan), asked)
    assert schemes.dtypes(said) == schemes.dtypes(asked) == {up: "float16", norm: "float32"}
    assert said.rules == (Rule("l.mlp.up", bits=4, dtype="float16"), rules[1])


def _model(parameters: dict[str, Parameter], modules: tuple[Module, ...]) -> Any:
    return SimpleNamespace(parameters=parameters, modules=modules, library="mlx-lm", config={})
