"""libraries: whose classes make the models. A new one is one module and one line here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from tasks.layouts import (
    mlx_audio_library,
    mlx_embeddings_library,
    mlx_lm_library,
    mlx_vlm_library,
    mlx_vlm_mtp_library,
)
from tasks.layouts.model import Verdict


class Library(Protocol):
    """What a library's module has; nothing of the library is imported before it is asked.

    Attributes:
        DISTRIBUTION: its name on the package index, whose version an answer depends on.
        PACKAGE: what it is imported as.
        BUILDS_ON: packages of other libraries that it imports: like its own, they are imported
            without what their ``__init__`` imports.
        MODULES: those of its modules that are to be imported before MLX's functions are watched.
        STUBS: modules that it imports, with all below them, that take seconds and that it can do
            without here.
        MODELS: the folders in its package that have a module, or a package, for each model.
        KNOWS: models that it is known to have, by the names of these modules or by others that it
            takes for one of them: what is said of a checkpoint where it is not installed.
        EXTRA: mlx-make's extra that installs it; "", mlx-make itself does.
        TOWERS: what keeps the parts of a model that see and hear, if not this library; "", it does.
        PREDICTORS: what makes a drafter of the tensors that predict further tokens, if not this
            library; "", it does, and takes no others.
        RUNS: whether its models can be run on text, to calibrate and to evaluate.
        PARTS: whether it takes what follows a model, whose weights lie in folders of their own.
    """

    DISTRIBUTION: str
    PACKAGE: str
    BUILDS_ON: tuple[str, ...]
    MODULES: tuple[str, ...]
    STUBS: tuple[str, ...]
    MODELS: tuple[str, ...]
    KNOWS: tuple[str, ...]
    EXTRA: str
    TOWERS: str
    PREDICTORS: str
    RUNS: bool
    PARTS: bool

    def load(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Return the model that a folder holds, and its configuration.

        Nothing is evaluated. ``probe`` has ``mx.load`` give the weights: its folder's own weight
        file is empty.
        """

    def casts(self, model: Any, name: str) -> bool:
        """Tell whether a parameter is cast where a dtype is asked for."""

    def quantizes(self, model: Any, path: str, module: Any) -> Verdict:
        """Return the model's own word on quantizing a module: yes, no, or with which settings."""

    def count_weights(self, model: Any) -> int | None:
        """Return how many weights a model has; None, the library counts none."""

    def recipes(
        self, model: Any, leaves: Iterable[tuple[str, Any]]
    ) -> dict[str, dict[str, int | Verdict] | str]:
        """Return each mixed recipe's word by module path, or why it does not fit the model.

        A number is bits, in groups of the target's size.
        """

    def on_text(self, model: Any) -> Any:
        """Return the same model such that, called with tokens, it makes logits, if it runs.

        Its parameters keep their names, and its blocks are its ``layers``.
        """

    def prompt_cache(self, model: Any) -> list[Any]:
        """Return an empty cache for a model to go on with a text, a part a layer, if it runs."""

    def encode_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a configuration as JSON has it."""

    def keeps_vision_config(self, model: Any) -> bool:
        """Tell whether the built model's config.json keeps ``vision_config``."""


MLX_LM, MLX_VLM, MLX_VLM_MTP = "mlx-lm", "mlx-vlm", "mlx-vlm-mtp"
MLX_EMBEDDINGS, MLX_AUDIO = "mlx-embeddings", "mlx-audio"
# The layout of each has the same name.
LIBRARIES: dict[str, Library] = {
    MLX_LM: mlx_lm_library,
    MLX_VLM: mlx_vlm_library,
    MLX_VLM_MTP: mlx_vlm_mtp_library,
    MLX_EMBEDDINGS: mlx_embeddings_library,
    MLX_AUDIO: mlx_audio_library,
}


def packages(library: str) -> tuple[str, ...]:
    """Return the packages whose versions a library's answers depend on."""
    asked = LIBRARIES[library]
    others = (package.replace("_", "-") for package in asked.BUILDS_ON)
    return ("mlx", asked.DISTRIBUTION, *others)


def missing(library: Library) -> str:
    """Return what to say of a library that is not installed."""
    install = f"'mlx-make[{library.EXTRA}]'" if library.EXTRA else library.DISTRIBUTION
    return f"{library.DISTRIBUTION} is not installed: pip install {install}"
