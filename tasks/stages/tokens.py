"""tokens: the texts that models are run on, as the model's own tokenizer has them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Hashable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from cache.digest import digest, digest_record
from cache.records.manifests import Tensor, TensorSpec
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.layouts import chats
from tasks.layouts.registry import LAYOUTS
from tasks.quality import cutting, text
from tasks.quality.text import Document
from tasks.stages.reasons import Reason, changed_values
from tasks.stages.stage import (
    Context,
    Inputs,
    Keep,
    Key,
    Origin,
    Output,
    Params,
    Planned,
    Result,
    Stage,
    TargetModel,
)  # fmt: skip

EVALUATION_TEXT, CALIBRATION_TEXT = "evaluation", "calibration"  # the nodes: what texts are for
TEXTS = {EVALUATION_TEXT: text.evaluation, CALIBRATION_TEXT: text.calibration}
TOKENS = "tokens"


WITH = ("tokenizers", "jinja2")


class TokensParams(Params, frozen=True):
    """What is cut into tokens.

    Attributes:
        text: digest of the text.
        samples: how many runs of tokens.
        sequence_length: tokens of each.
        seed: which runs of the text.
        tokenizer: digest of the tokenizer's files.
        transformers: its version, and those of what it cuts and renders chats with.
    """

    text: str
    samples: int
    sequence_length: int
    seed: int
    tokenizer: str
    transformers: str


class Tokens(Stage[TokensParams]):
    """Cut the texts to calibrate and evaluate on into tokens."""

    name = "tokens"
    version = 1
    keep = Keep.ALWAYS
    params = TokensParams

    def plan(self, target: TargetModel) -> Mapping[str, Planned[TokensParams]]:
        """Plan a node a text, where the model can be run at all.

        Raises:
            BuildError: a text cannot be read.
        """
        if not target.model.runs:
            return {}
        quality = target.quality
        tokenizer = digest_record({name: digest(data) for name, data in _files(target).items()})
        return {
            name: Planned(
                TokensParams(
                    text.digest(read(quality)),
                    quality.samples,
                    quality.sequence_length,
                    quality.seed,
                    tokenizer,
                    ", ".join([version("transformers"), *map(_named_version, WITH)]),
                )
            )
            for name, read in TEXTS.items()
        }

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what [quality] says."""
        return target.quality

    def outputs(self, params: TokensParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the tokens: (samples, sequence_length)."""
        shape = (params.samples, params.sequence_length)
        return {TOKENS: Output(TensorSpec("int32", shape), Origin.STORED)}

    def run(self, params: TokensParams, inputs: Inputs, context: Context) -> Result:
        """Read the text, and cut it."""
        quality = context.planned.quality
        texts = {text.digest(each): each for each in (read(quality) for read in TEXTS.values())}
        if params.text not in texts:
            raise BuildError(f"a text of [quality] changed meanwhile. Run {COMMAND} again.")
        files = _files(context.planned)
        documents = _rendered(texts[params.text], files)
        ids = cutting.windows(
            files,
            documents,
            samples=params.samples,
            length=params.sequence_length,
            seed=params.seed,
        )
        data = memoryview(array("i", [token for run in ids for token in run])).cast("B")
        with context.writer(TOKENS, data.nbytes) as writer:
            writer.write(data)
        return Result({TOKENS: Tensor("int32", (len(ids), len(ids[0])), writer.digest)})

    def describe(self, params: TokensParams) -> str:
        """Return how many."""
        return f"{params.samples} × {params.sequence_length}"

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare one by one."""
        return changed_values(old, new)


def _named_version(name: str) -> str:
    return f"{name} {version(name)}"


def _files(target: TargetModel) -> dict[str, bytes]:
    """Return the files that the built model's tokenizer is made of, by name."""
    files = LAYOUTS[target.layout].tokenizer_files(target.checkpoint, target.memos)
    # By which transformers tells what kind of tokenizer it is, where its own files do not say.
    kind = {"model_type": target.model.config.get("model_type")}
    return {**files, "config.json": json.dumps(kind).encode()}


def _rendered(documents: Sequence[Document], files: Mapping[str, bytes]) -> list[str]:
    """Return documents as texts."""
    texts = iter(chats.render(files, [each for each in documents if not isinstance(each, str)]))
    return [each if isinstance(each, str) else next(texts) for each in documents]
