"""Writes the packaged SmolLM2 without most of its layers: nonsense with a real vocabulary, for what is slow by itself.

.venv/bin/python scripts/shallow-model.py build/shallow.gguf 2
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

from depthkv_edge.modelfile.packaged import resolve_model


def write(path: Path, n_layers: int) -> None:
    """Keep the first `n_layers` layers."""
    reader = GGUFReader(resolve_model("smollm2"))
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        item_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        value = n_layers if name.endswith(".block_count") else field.contents()
        writer.add_key_value(name, value, field.types[0], item_type)
    for tensor in reader.tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer is None or int(layer[1]) < n_layers:
            writer.add_tensor(tensor.name, tensor.data, tensor.data.shape, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
