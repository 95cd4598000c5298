"""What is told of a checkpoint that mlx-lm refuses."""

import pytest

from tasks.layouts import verdict

NEWER = "newer one may know it: pip install -U mlx-lm"
TOWERS = 'layout = "mlx-vlm"'
MANY = (
    "Received 36000 parameters not in model: \n" + ",\n".join(f"a.{i}" for i in range(36000)) + "."
)


@pytest.mark.parametrize(
    ("config", "kind", "text", "said"),
    [
        (
            {},
            "ValueError",
            MANY,
            "mlx-lm 1 says: Received 36000 parameters not in model: a.0, a.1, a.2 and 35997 more. "
            f"If the checkpoint is whole, a {NEWER}",
        ),
        (
            {"quantization_config": {"quant_method": "vptq"}},
            "ValueError",
            MANY,
            "config.json has quant_method = 'vptq'. VPTQ is read neither by mlx-lm 1 nor unpacked "
            "here: it has no numbers, but the entries of codebooks. Get the checkpoint in "
            "bfloat16, or have transformers write it where it runs: "
            "model.dequantize().save_pretrained(FOLDER)",
        ),
        (
            {"quantization_config": {"quant_method": "new"}},
            "ValueError",
            MANY,
            "config.json has quant_method = 'new'. mlx-lm 1 says: Received 36000 parameters not in "
            "model: a.0, a.1, a.2 and 35997 more. If that is no format that mlx-lm reads, get the "
            "checkpoint in bfloat16.",
        ),
        (
            {},
            "ValueError",
            "Model type x not supported.",
            f"mlx-lm 1 says: Model type x not supported. A {NEWER}",
        ),
        (
            {"model_type": "x", "vision_config": {}},
            "ValueError",
            "Model type x not supported.",
            "mlx-lm 1 says: Model type x not supported. The model sees or hears, and layout = "
            f'"mlx-vlm" may know it. A {NEWER}',
        ),
        (
            {"model_type": "x", "auto_map": {"AutoModel": "x.Y"}},
            "ValueError",
            "Model type x not supported.",
            "mlx-lm 1 has no class for model_type = 'x', and the code that the checkpoint brings "
            f"for it (auto_map) is never run here. A {NEWER}",
        ),
        (
            {},
            "KeyError",
            "'head_dim'",
            "mlx-lm 1 says: KeyError: 'head_dim'. config.json does not say what this class reads "
            "in it: fetch it again.",
        ),
        (
            {},
            "KeyError",
            "'model.norm.weight'",
            "mlx-lm 1 says: KeyError: 'model.norm.weight'. Its config.json and its weights do not "
            "go together: fetch both again.",
        ),
        (
            {"model_type": "Llama"},
            "ValueError",
            "Model type Llama not supported.",
            "mlx-lm 1 says: Model type Llama not supported. It has llama: if that is meant, write "
            f"it so. A {NEWER}",
        ),
        (
            {},
            "ValueError",
            "Unsupported RoPE type wobble",
            f"mlx-lm 1 says: Unsupported RoPE type wobble. A {NEWER}",
        ),
        ({}, "SystemExit", "pip install a", "mlx-lm 1 says: pip install a."),
    ],
)
def test_what_is_told(config: dict, kind: str, text: str, said: str) -> None:
    known = ["llama", "gemma3", "falcon_h1"]
    another = verdict.elsewhere(config, "mlx-lm", (), TOWERS)
    assert verdict.explained(config, kind, text, "mlx-lm 1", "mlx-lm", another, known) == said
