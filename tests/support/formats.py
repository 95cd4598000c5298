"""formats: the formats of packed checkpoints, each with what `config.json` says of it."""

from support import packed

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FORMATS: dict[str, tuple[packed.Packer, dict]] = {
    "block-fp8": (packed.block_fp8(32), {**packed.BLOCK_FP8, "weight_block_size": [32, 32]}),
    "powers-fp8": (packed.block_fp8(powers=True), packed.BLOCK_FP8),
    "fbgemm": (packed.scaled_fp8(), {"quant_method": "fbgemm_fp8"}),
    "modelopt-fp8": (
        packed.scaled_fp8(whole=True),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "float-quantized": (packed.scaled_fp8(), packed.compressed("float-quantized", type="float")),
    "nvfp4": (packed.nvfp4(), packed.compressed("nvfp4-pack-quantized", type="float")),
    "modelopt-nvfp4": (
        packed.nvfp4(modelopt=True),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ),
    "mxfp4": (packed.mxfp4(), packed.compressed("mxfp4-pack-quantized", type="float")),
    "mxfp8": (packed.mxfp8(), packed.compressed("mxfp8-quantized", type="float")),
    "pack-quantized": (
        packed.compressed_integers(4, packs=True, zeros=True),
        packed.compressed("pack-quantized", **INT4, symmetric=False),
    ),
    "pack-quantized-3": (
        packed.compressed_integers(3, packs=True, zeros=True),
        packed.compressed("pack-quantized", **{**INT4, "num_bits": 3}, symmetric=False),
    ),
    "pack-quantized-8": (
        packed.compressed_integers(8, packs=True, zeros=False),
        packed.compressed("pack-quantized", **{**INT4, "num_bits": 8}),
    ),
    "int-quantized": (
        packed.compressed_integers(8, packs=False, zeros=True),
        packed.compressed("int-quantized", **{**INT4, "num_bits": 8}),
    ),
    **{
        f"gptq-{bits}": (
            packed.gptq(bits, shuffled=bits == 4, v2=bits == 2),
            {"quant_method": "gptq", "bits": bits, "group_size": 32,
             "checkpoint_format": "gptq_v2" if bits == 2 else "gptq"},
        )
        for bits in (2, 3, 4)
    },
    "awq": (
        packed.awq(),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    ),
    **{f"hqq-{bits}": (packed.hqq(bits), {"quant_method": "hqq"}) for bits in (3, 4)},
    **{
        f"torchao-{kind}": (
            packed.torchao(kind),
            {"quant_method": "torchao", "quant_type": {"default": {"_type": f"{kind}Config"}}},
        )
        for kind in ("Int4", "Int8", "fp8")
    },
    "quanto": (packed.quanto(), {"quant_method": "quanto"}),
    "nf4": (packed.bitsandbytes("nf4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp4-nested": (packed.bitsandbytes("fp4", nested=True), {"quant_method": "bitsandbytes"}),
    "int8": (packed.bitsandbytes("int8"), {"quant_method": "bitsandbytes"}),
    "several-formats": (
        packed.by_path(
            {
                "self_attn.[qk]_proj": packed.scaled_fp8(),
                "self_attn": packed.nvfp4(),
                "down_proj": packed.compressed_integers(8, packs=True, zeros=False),
                "": packed.compressed_integers(4, packs=True, zeros=True, size=64),
            }
        ),
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "ignore": ["lm_head", "re:.*norm"],
            "config_groups": {
                name: {"targets": [target], "weights": weights}
                for name, target, weights in (
                    ("group_0", "re:.*q_proj", {"num_bits": 8, "type": "float"}),
                    ("group_1", "re:.*down_proj", {"num_bits": 8, "type": "int", "group_size": 32}),
                    ("group_2", "Linear", {"num_bits": 4, "type": "int", "group_size": 64}),
                )
            },
        },
    ),
    "gptq-dynamic": (
        packed.by_path({"down_proj": packed.gptq(8), "": packed.gptq(4, shuffled=True)}),
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "dynamic": {"+:.*down_proj": {"bits": 8}},
        },
    ),
}  # fmt: skip


def gptq_settings(bits: int, **more: object) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, **more}


INT8 = {**INT4, "num_bits": 8, "strategy": "channel", "group_size": None}
KEPT = {
    "pack-quantized": (
        packed.compressed_integers(4, packs=True, zeros=False),
        packed.compressed("pack-quantized", **INT4),
        (32, 4, "affine"),
    ),
    "int-quantized": (
        packed.compressed_integers(8, packs=False, zeros=False, size=0),
        packed.compressed("int-quantized", **INT8),
        (64, 8, "affine"),
    ),
    "gptq-3": (
        packed.gptq(3, symmetric=True), gptq_settings(3, sym=True), (32, 3, "affine"),
    ),
    "gptq-dynamic": (
        packed.by_path(
            {"down_proj": packed.gptq(8, symmetric=True), "": packed.gptq(4, symmetric=True)}
        ),
        gptq_settings(4, sym=True, dynamic={"+:.*down_proj": {"bits": 8}, "-:.*gate$": {}}),
        (32, 8, "affine"),
    ),
    "quanto": (packed.quanto(), {"quant_method": "quanto"}, (32, 4, "affine")),
    "mxfp4": (
        packed.mxfp4(), packed.compressed("mxfp4-pack-quantized", type="float"), (32, 4, "mxfp4"),
    ),
    "mxfp8": (
        packed.mxfp8(), packed.compressed("mxfp8-quantized", type="float"), (32, 8, "mxfp8"),
    ),
    "nvfp4": (
        packed.nvfp4(whole=False),
        packed.compressed("nvfp4-pack-quantized", type="float"),
        (16, 4, "nvfp4"),
    ),
}  # fmt: skip
