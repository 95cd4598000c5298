"""forward: the teacher, and what it was quantized to, run segment by segment and compared."""

from __future__ import annotations

from collections.abc import Mapping

from cache.records.manifests import TensorSpec
from tasks.quality import divergence
from tasks.quality.divergence import Comparison, ModelQuality, TopPredictions
from tasks.stages.forward_params import ForwardParams
from tasks.stages.running import (
    ModelStage,
    UnquantizedStage,
    of_all_samples,
    plan_segments,
    specs_of,
    stored,
)
from tasks.stages.segment_runner import SegmentRunner
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
)  # fmt: skip

TOP_PREDICTIONS = TopPredictions._fields  # what the last segment of a teacher makes
COMPARISON = Comparison._fields  # what it makes of a quantized model, beside the teacher's loss


class Teacher(UnquantizedStage):
    """Run each model as it is before it is quantized, and keep what it says."""

    name = "teacher"

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ForwardParams]]:
        """Plan all segments; none where the model cannot be run."""
        return plan_segments(self, target, before=self.name)

    def outputs(self, params: ForwardParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the state; of the last segment, what is kept: see ``TopPredictions``."""
        if not params.top_logits:
            return super().outputs(params, inputs)
        number = of_all_samples(TensorSpec("float32", params.shape[:2]), inputs)
        best_shape = (*number.shape, params.top_logits)
        best = {
            "ids": TensorSpec("uint32", best_shape),
            "logits": TensorSpec(params.dtype, best_shape),
        }
        return stored({**best, "rest": number, "loss": number}, inputs)

    def run(self, params: ForwardParams, inputs: Inputs, context: Context) -> Result:
        """Run a segment on one sequence after another."""
        if not params.top_logits:
            return super().run(params, inputs, context)
        runner = SegmentRunner(self, params, inputs, context)

        def predict(index: int) -> TopPredictions:
            return divergence.top_predictions(
                runner.run(index)[0], runner.following(index), params.top_logits
            )

        return Result(runner.write(self.outputs(params, specs_of(inputs)), predict), runner.notes)


class Forward(ModelStage):
    """Run each quantized model on the text, up to its last block."""

    name = "forward"

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ForwardParams]]:
        """Plan all segments but the last; none of a model that is its own teacher."""
        if _is_own_teacher(target):
            return {}
        planned = plan_segments(self, target, before=self.name)
        return {name: each for name, each in planned.items() if not each.params.top_logits}


class Evaluate(ModelStage):
    """Compare what each model says with what it said before it was quantized."""

    name = "evaluate"

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ForwardParams]]:
        """Plan the last segment; of its own teacher, on what the teacher's blocks left."""
        before = Teacher.name if _is_own_teacher(target) else Forward.name
        planned = {}
        for name, each in plan_segments(self, target, before=before).items():
            if each.params.top_logits:
                needs = (*each.needs, Need(Teacher.name, name))
                planned[name] = Planned(
                    each.params, needs, (each.reads or frozenset()).union(TOP_PREDICTIONS)
                )
        return planned

    def outputs(self, params: ForwardParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return a number a token: see ``Comparison``; and the teacher's loss."""
        number = of_all_samples(TensorSpec("float32", params.shape[:2]), inputs)
        agrees = TensorSpec("uint8", number.shape)
        specs = {"loss": number, "divergence": number, "agrees": agrees}
        passed = Output(number, Origin.PASSED_ON, (_TEACHER_LOSS,))
        return {**stored(specs, inputs), "teacher_loss": passed}

    def run(self, params: ForwardParams, inputs: Inputs, context: Context) -> Result:
        """Run the last segment on one sequence after another."""
        runner = SegmentRunner(self, params, inputs, context)
        outputs = self.outputs(params, specs_of(inputs))

        def compare(index: int) -> Comparison:
            teacher = TopPredictions(
                *(runner.read(Key(Teacher.name, name), index) for name in TOP_PREDICTIONS)
            )
            return divergence.compare(runner.run(index)[0], runner.following(index), teacher)

        tensors = runner.write({name: outputs[name] for name in COMPARISON}, compare)
        return Result({**tensors, "teacher_loss": context.pass_on(_TEACHER_LOSS)}, runner.notes)

    def summary(self, read: Mapping[str, bytes]) -> str:
        """Return how good the model is."""
        return str(figures(read))


def figures(read: Mapping[str, bytes]) -> ModelQuality:
    """Return how good a model is, given the bytes of what ``Evaluate`` made."""
    return ModelQuality.of(read["loss"], read["teacher_loss"], read["divergence"], read["agrees"])


_TEACHER_LOSS = Key(Teacher.name, "loss")


def _is_own_teacher(target: TargetModel) -> bool:
    """Tell whether what is packed is the model as it is before it is quantized."""
    return not target.settings and target.roles.packed == target.roles.quantized
