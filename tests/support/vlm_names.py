"""vlm_names: what mlx-vlm's classes do not tell of a checkpoint: the hub's names, some settings."""

from typing import Any, NamedTuple


class Renamed(NamedTuple):
    """What the hub has instead of parameters of mlx-vlm's.

    Attributes:
        pattern: over mlx-vlm's names.
        name: what the match is on the hub; with `{expert}` in it, each of a stack by itself. None:
            nothing, since it is a half of another.
        halves: how many of such a stack of experts are in one, turned, as (expert, in, out).
    """

    pattern: str
    name: str | None
    halves: int = 0


LM_HEAD = Renamed(r"^language_model\.lm_head", "lm_head")
QWEN_2 = (
    Renamed(r"^vision_tower\.", "visual."),
    Renamed(r"^language_model\.model\.", "model."),
    LM_HEAD,
)
QWEN_3 = (
    Renamed(r"^language_model\.model\.", "model.language_model."),
    Renamed(r"^vision_tower\.", "model.visual."),
    LM_HEAD,
)
EXPERTS = Renamed(r"switch_mlp\.(\w+)\.weight$", r"experts.{expert}.\1.weight")
PIXTRAL = (Renamed(r"^vision_tower\.vision_model\.", "vision_tower."),)


def fused(prefix: str, path: str, hub: str = "") -> tuple[Renamed, ...]:
    """Experts whose gates and ups are one tensor: the hub's names of them begin with `hub`."""
    start = rf"^{prefix}(.*){path}\."
    to = rf"{hub or prefix}\1experts."
    return (
        Renamed(start + r"gate_proj(\.weight)?$", to + "gate_up_proj", halves=2),
        Renamed(start + r"up_proj(\.weight)?$", None),
        Renamed(start + r"down_proj(\.weight)?$", to + "down_proj", halves=1),
    )


# By architecture; of those that have the same names as the hub, convolutions are turned alone.
HUB: dict[str, tuple[Renamed, ...]] = {
    "deepseek_vl_v2": (
        Renamed(r"^language_model(.*)switch_mlp\.(\w+)\.", r"language\1experts.{expert}.\2."),
        Renamed(r"^language_model\.", "language."),
        Renamed(r"^vision\.vision_tower\.", "vision."),
    ),
    "gemma3": (),
    "gemma4": (
        Renamed(r"^language_model\.model\.", "model.language_model."),
        Renamed("^", "model."),
    ),
    "idefics3": (
        LM_HEAD,
        Renamed(r"^language_model\.", "model.text_model."),
        Renamed("^", "model."),
    ),
    "internvl_chat": (),
    "kimi_vl": (
        EXPERTS,
        Renamed(r"^vision_tower\.blocks\.(\d+)\.attn\.", r"vision_tower.encoder.blocks.\1."),
        Renamed(r"^vision_tower\.blocks", "vision_tower.encoder.blocks"),
    ),
    "llama4": fused(r"language_model\.model\.layers\.", r"experts", "language_model.model.layers."),
    "llava": (),
    "mistral3": PIXTRAL,
    "molmo": (
        Renamed(r"^language_model\.model\.", "model.transformer."),
        Renamed(r"^vision_tower\.", "model.vision_backbone."),
    ),
    "paligemma": (),
    "phi3_v": (),
    "pixtral": PIXTRAL,
    "qwen2_5_vl": QWEN_2,
    "qwen2_vl": QWEN_2,
    "qwen3_omni_moe": (EXPERTS,),
    "qwen3_vl": QWEN_3,
    "qwen3_vl_moe": (
        *fused(r"language_model\.model\.", r"(?:switch_mlp|experts)", "model.language_model."),
        *QWEN_3,
    ),
}

# By architecture: what its configuration must say besides small sizes.
SETTINGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
    },
}
