"""adapter: what was trained on top of a model, as mlx-lm and PEFT save it.

Both have an adapter_config.json. mlx-lm's weights are in adapters.safetensors, by the model's own
names; PEFT's are in adapter_model.safetensors, by the checkpoint's, behind ``base_model.model.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from cache.digest import digest_parts
from cache.records.memos import Memos
from tasks.checkpoints.small_files import read_json
from tasks.checkpoints.source import ReadableSource
from tasks.checkpoints.stored import Stored
from tasks.core.errors import CheckpointError

CONFIG = "adapter_config.json"
MLX_LM, PEFT = "adapters.safetensors", "adapter_model.safetensors"
DIGESTS = "adapter digests"


class Adapter(Struct, frozen=True):
    """An adapter, of which the headers are read and all bytes digested.

    Attributes:
        source: where its bytes come from.
        file: its weight file's name, which tells whose it is.
        config: what adapter_config.json says.
        tensors: by name.
        digests: of the tensors' bytes, by name.
    """

    source: ReadableSource
    file: str
    config: dict[str, Any]
    tensors: Mapping[str, Stored]
    digests: Mapping[str, str]

    def read(self, name: str) -> bytes:
        """Return a tensor's bytes.

        Raises:
            CheckpointError: they are others than when the build was planned.
        """
        data = _read(self.source, self.tensors[name])
        if digest_parts([memoryview(data)]) != self.digests[name]:
            raise CheckpointError(
                f"{self.source.location}: {name} is another than when the build was planned. Run "
                "it again."
            )
        return data


def read(source: ReadableSource, memos: Memos) -> Adapter:
    """Read an adapter.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    folder = source.small_files
    if not source.has(CONFIG):
        raise CheckpointError(
            f"adapter {source.location} has no {CONFIG}. Name the folder that mlx_lm.lora or peft "
            "saved the adapter to."
        )
    file = next((name for name in (MLX_LM, PEFT) if source.has(name)), None)
    if file is None:
        raise CheckpointError(
            f"adapter {source.location} has neither {MLX_LM} (mlx-lm) nor {PEFT} (peft). If it has "
            "adapter_model.bin, save it anew as safetensors: "
            "PeftModel.save_pretrained(…, safe_serialization=True)."
        )
    config = read_json(folder / CONFIG, "it describes the adapter")
    ((stamp, stored),) = source.headers([file], memos).values()
    tensors = {tensor.name: tensor for tensor in stored}
    question = [source.location, source.identity, file, [*stamp]]
    digests: dict[str, str] | None = memos.get(DIGESTS, question, dict[str, str])
    if digests is None or digests.keys() != tensors.keys():
        digests = {
            name: digest_parts([memoryview(_read(source, tensor))])
            for name, tensor in tensors.items()
        }
        memos.put(DIGESTS, question, digests)
    return Adapter(source, file, config, tensors, digests)


def _read(source: ReadableSource, tensor: Stored) -> bytes:
    return b"".join(map(bytes, source.read(tensor.file, tensor.offset, tensor.nbytes)))
