"""mlx_audio_library: how mlx-audio is asked what it makes of a checkpoint."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tasks.layouts import mixed_recipes
from tasks.layouts.model import Verdict
from tasks.layouts.stubs import is_stub

DISTRIBUTION = "mlx-audio"
PACKAGE = "mlx_audio"
BUILDS_ON: tuple[str, ...] = ()
MODULES: tuple[str, ...] = ("mlx_audio.convert", "mlx_audio.lm.convert")
# Of what sounds and texts are made ready with. SNAC is fetched from the hub by a module of a model
# that has no place for it.
STUBS: tuple[str, ...] = (
    "transformers", "huggingface_hub", "torch", "scipy", "sentencepiece", "miniaudio",
    "sounddevice", "mlx_audio.codec.models.snac",
)  # fmt: skip
MODELS: tuple[str, ...] = tuple(f"{each}/models" for each in ("tts", "stt", "sts", "lid", "music"))
KNOWS: tuple[str, ...] = (
    "csm", "granite_speech_plus", "higgs_multimodal_qwen3", "lfm2_audio", "parakeet_tdt",
    "arktts", "bailingmm", "bark", "breeze_tts", "canary", "chatterbox", "chatterbox_turbo",
    "cohere_asr", "confucius4", "deepfilternet", "dia", "dialogue_sidon", "dramabox",
    "ecapa_tdnn", "echo_tts", "fireredasr2", "fish_drama3", "fish_qwen3_omni", "fun_asr_nano",
    "glmasr", "granite_speech", "granite_speech5_ctc", "granite_speech_nar", "higgs_audio",
    "higgs_audio_3", "higgs_audio_v3", "indextts", "irodori_tts", "kitten_tts", "kokoro",
    "kugelaudio", "lasr_ctc", "lfm_audio", "lingv3_tts", "longcat_audiodit", "mega_asr",
    "melotts", "mimo_audio", "mimo_v2_asr", "ming_v3_asr", "ming_v3_audio", "minimax_music3",
    "mms", "moonshine", "moss_music", "moss_transcribe_diarize", "moss_tts", "moss_tts_delay",
    "moss_tts_local", "moss_tts_nano", "mossformer2_se", "nemotron_asr", "nemotron_voicechat",
    "omnivoice", "outetts", "parakeet", "phonon", "phonon2", "pocket_tts", "qwen2_audio",
    "qwen3_asr", "qwen3_forced_aligner", "qwen3_tts", "rumik_oss", "sam_audio", "sensevoice",
    "sesame", "soprano", "spark", "tada", "vibevoice", "vibevoice_asr", "voxcpm", "voxcpm2",
    "voxtral", "voxtral_realtime", "voxtral_tts", "wav2vec", "wav2vec2", "whisper", "zonos2",
)  # fmt: skip
EXTRA = "audio"
# What some models' modules write beside the weights themselves, of other repositories, too.
COPIES = "copy_supporting_files"
OWN_WRITERS = (COPIES, "write_model_card")
TOKENIZERS = (("transformers", "AutoTokenizer"), ("sentencepiece", "SentencePieceProcessor"))
TOWERS = ""
PREDICTORS = 'layout = "mlx-vlm-mtp"'
RUNS = False
PARTS = False


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model in a folder and its configuration, as ``mlx_audio.convert`` writes them.

    It has no loader: convert itself is asked, but for casting and writing. What kind of model it is
    convert tells from the path first; here it is told.
    """
    module = importlib.import_module("mlx_audio.convert")
    writing = importlib.import_module("mlx_audio.lm.convert")
    made: dict[str, Any] = {}
    replaced: dict[tuple[Any, str], Any] = {
        (module, "MODEL_CONVERSION_DTYPES"): (),
        (module, "copy_model_files"): lambda *_: None,
        (writing, "save_model"): lambda _, model, **__: made.update(model=model),
        (writing, "save_config"): lambda config, **_: made.update(config=config),
    }
    for package, name in TOKENIZERS:
        tokenizers = importlib.import_module(package)
        if is_stub(tokenizers):
            replaced[tokenizers, name] = _Tokenizer
    find = module.get_model_class

    def found(*asked: Any) -> Any:
        of_model = find(*asked)
        for name in OWN_WRITERS:
            if hasattr(of_model, name):
                setattr(of_model, name, lambda *_: None)
        return of_model

    replaced[module, "get_model_class"] = found
    mimi = importlib.import_module("mlx_audio.codec.models.mimi.mimi")
    # Of random weights: of a model that has a place for it, these are then missing.
    replaced[mimi.Mimi, "from_pretrained"] = lambda *_: mimi.Mimi(mimi.mimi_202407(32))
    for (of, name), value in replaced.items():  # modules are imported for one answer
        setattr(of, name, value)
    domain = _name(folder, module)
    module.convert(str(folder), str(folder / "built"), model_domain=domain)
    return made["model"], made["config"]


def copies_itself(model_type: str) -> bool:
    """Tell whether a model's module copies what it needs beside its weights in a way of its own.

    Told from its source: nothing is imported.
    """
    spec = find_spec(PACKAGE)
    folders = [Path(each) for each in (spec and spec.submodule_search_locations) or ()]
    paths = (folder / each / model_type / "__init__.py" for folder in folders for each in MODELS)
    return any(COPIES in path.read_text(encoding="utf-8") for path in paths if path.is_file())


class _Tokenizer:
    """Stands for the tokenizer that a model's class makes itself: it decides nothing of weights."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.bos_token, self.eos_token = "<s>", "</s>"
        self.bos_token_id, self.eos_token_id = 1, 2
        self._tokenizer = SimpleNamespace()

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> _Tokenizer:
        """Return one, of whichever name."""
        return cls()


def _name(folder: Path, module: Any) -> str:
    """Have config.json name the model as mlx-audio's module for it is called; return its domain.

    Other names for it its loaders know; for convert they have to be in the path.

    Raises:
        ValueError: it is none of mlx-audio's.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    registry = importlib.import_module("mlx_audio.registry")
    said = str(registry.model_type_from_config(config)).lower()
    domains = [domain.value for domain in module.Domain]
    names = {domain: registry._remapping(domain).get(said) for domain in domains}
    for named in (dict.fromkeys(domains, said), names):
        for domain, name in named.items():
            if name in registry._families(domain):
                if name != said:
                    path.write_text(json.dumps({**config, "model_type": name}))
                return str(domain)
    raise ValueError(f"Model type {said} not supported.")


def casts(model: Any, name: str) -> bool:
    """Tell that ``mlx_audio.convert`` casts every parameter."""
    return True


def quantizes(model: Any, path: str, module: Any) -> Verdict:
    """Return the word of ``mlx_audio.convert`` and of the model on quantizing a module."""
    said: Verdict = _convert().build_quant_predicate(model)(path, module)
    return said


def count_weights(model: Any) -> None:
    """Return nothing: mlx-audio counts none."""


def recipes(model: Any, leaves: Iterable[tuple[str, Any]]) -> mixed_recipes.Words:
    """Return each mixed recipe's word by module path, or why it does not fit the model.

    Their groups are of 64 weights, whatever the target's are.
    """
    convert = _convert()
    return mixed_recipes.words(
        convert.QUANT_RECIPES,
        lambda recipe: convert.build_quant_predicate(model, recipe),
        leaves,
    )


def on_text(model: Any) -> Any:
    """Return the model, which is not run."""
    return model


def prompt_cache(model: Any) -> list[Any]:
    """Return none: its models are not run."""
    return []


def encode_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON has it."""
    return config


def keeps_vision_config(model: Any) -> bool:
    """Tell that ``mlx_audio.convert`` takes ``vision_config`` out of config.json."""
    return False


def _convert() -> Any:
    return importlib.import_module("mlx_audio.convert")
