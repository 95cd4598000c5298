"""verdict: what a library says of a checkpoint that it refuses, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.core.text import some

MAX_NAMES = 3  # names of a list
SEES = re.compile("vision|visual|vit_|image|audio|speech")  # keys of what sees and hears
# What is said by a class that reads files of its own, or asks the hub for another model.
ELSEWHERE = re.compile(r"(FileNotFound|NotFoundError|No such file|Failed to open|huggingface\.co)")
# Formats that are not unpacked here, by quant_method: their names, and why not.
CODEBOOKS = "it has no numbers, but the entries of codebooks"
OWN_LAYOUT = "it lies as the kernels of one kind of processor take it"
NOT_UNPACKED = {
    "aqlm": ("AQLM", CODEBOOKS),
    "quip": ("QuIP#", CODEBOOKS),
    "quip_sharp": ("QuIP#", CODEBOOKS),
    "vptq": ("VPTQ", CODEBOOKS),
    "exl2": ("ExLlamaV2", "groups have bits of their own"),
    "exl3": ("ExLlamaV3", CODEBOOKS),
    "higgs": ("HIGGS", CODEBOOKS),
    "spqr": ("SpQR", "outliers are kept apart from the rest"),
    "eetq": ("EETQ", OWN_LAYOUT),
    "quark": ("Quark", OWN_LAYOUT),
    "fp_quant": ("FP-Quant", "weights are rotated"),
}


def explained(
    config: Mapping[str, Any],
    kind: str,
    text: str,
    library: str,
    distribution: str,
    another: str = "",
    known: Sequence[str] = (),
) -> str:
    """Return a library's error with what config.json says about its cause, and the mend.

    Args:
        config: the checkpoint's.
        kind: the error's class.
        text: its message.
        library: the library's name and version.
        distribution: what is installed by pip.
        another: see ``elsewhere``.
        known: the model types that the library has.
    """
    quantized = config.get("quantization_config") or {}
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    first = f"config.json has quant_method = {method!r}. " if method else ""
    what = _shortened(text) if kind in ("ValueError", "SystemExit") else f"{kind}: {text}"
    what = what.removesuffix(": ")
    another = another or _newer(distribution)
    if str(method).lower() in NOT_UNPACKED:
        return first + _not_unpacked(str(method).lower(), library)
    if "not supported" in text and config.get("auto_map"):
        return (
            f"{first}{library} has no class for model_type = {config.get('model_type')!r}, and the "
            f"code that the checkpoint brings for it (auto_map) is never run here. {another}"
        )
    if "not supported" in text:
        near = _near(str(config.get("model_type")), known)
        mend = f"It has {near}: if that is meant, write it so. {another}" if near else another
    else:
        mend = _mend(kind, text, distribution, quantized=bool(method))
    stop = "" if what.endswith(".") else "."
    return f"{first}{library} says: {what}{stop} {mend}".rstrip()


def _mend(kind: str, text: str, distribution: str, *, quantized: bool) -> str:
    """Return what to do about an error of a class that a library has."""
    newer = _newer(distribution)
    if re.search(r"[Uu]nsupported|[Uu]nknown", text) and not quantized:
        return newer
    if re.search(r"\.(lora_[AB]|base_layer)\.", text):
        return (
            "It was saved with a LoRA adapter on it: fuse that (peft's merge_and_unload), and save "
            "it again."
        )
    if "not in model" in text and not quantized:
        return f"If the checkpoint is whole, {newer[0].lower()}{newer[1:]}"
    if ELSEWHERE.search(f"{kind}: {text}"):
        return (
            "As it is made, its class reads more than config.json and the weights, which is not "
            f"done while a build is planned: {distribution.replace('-', '_')}.convert may take it."
        )
    if kind == "SystemExit":
        return ""
    if quantized:
        return f"If that is no format that {distribution} reads, get the checkpoint in bfloat16."
    if (kind == "KeyError" and "." not in text) or "required positional argument" in text:
        return "config.json does not say what this class reads in it: fetch it again."
    return "Its config.json and its weights do not go together: fetch both again."


def elsewhere(
    config: Mapping[str, Any], distribution: str, having: Sequence[str], towers: str = ""
) -> str:
    """Return what may know a model that a library has no class for.

    Args:
        config: the checkpoint's config.json.
        distribution: what is installed by pip of the library.
        having: the layouts whose libraries have a class for it, as models.toml says them.
        towers: the layout to take for a model that sees or hears, if not this library's.
    """
    said = (
        [f"{' and '.join(having)} {'have' if having[1:] else 'has'} a class for it."]
        if having
        else []
    )
    if towers and not any(towers in each for each in having) and any(map(SEES.search, config)):
        said.append(f"The model sees or hears, and {towers} may know it.")
    return " ".join(said if having else [*said, _newer(distribution)])


def _newer(distribution: str) -> str:
    return f"A newer one may know it: pip install -U {distribution}"


def _not_unpacked(method: str, library: str) -> str:
    """Return what to say of a format that is known, and is not unpacked."""
    name, why = NOT_UNPACKED[method]
    return (
        f"{name} is read neither by {library} nor unpacked here: {why}. Get the checkpoint in "
        "bfloat16, or have transformers write it where it runs: "
        "model.dequantize().save_pretrained(FOLDER)"
    )


def _near(model_type: str, known: Sequence[str]) -> str:
    """Return the model type that may be meant, "" if none is like it; another number is none."""
    from difflib import get_close_matches  # that only a mistake pays

    number = re.sub(r"\D", "", model_type)
    same = [name for name in known if re.sub(r"\D", "", name) == number]
    return (get_close_matches(model_type.lower(), same, 1, 0.85) or [""])[0]


def _shortened(text: str) -> str:
    """Return a message with the first few names of its list, which may have thousands."""
    head, *names = re.split(r",?\s*\n", text.strip())
    if not names:
        return text
    return f"{head.rstrip()} {some([name.rstrip('.') for name in names], MAX_NAMES)}."
