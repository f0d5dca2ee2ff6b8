"""What the engine makes of a calibrated file: it obeys the curves, and names the key that it cannot use."""

from __future__ import annotations

import pytest
from gguf import GGUFWriter
from support.tiny import write_llama
from test_calibration_keys import HOSTILE, example

from depthkv_edge import DepthKVError, Llama
from depthkv_edge.modelfile.keys import KeyValue, to_keys

# the engine allocates by the curves, it does not ask how they were measured
NOT_READ = {"tokens type", "gain inf"}
N_LAYERS = 4


def write(path, keys: list[KeyValue]):
    def extra(writer: GGUFWriter) -> None:
        for key in keys:
            writer.add_key_value(key.name, key.value, key.type, key.item_type)

    return write_llama(path, extra, n_layers=N_LAYERS)


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - NOT_READ))
def test_hostile_keys(tmp_path, name):
    key, edit, _ = HOSTILE[name]
    keys = {entry.name: entry for entry in to_keys(example())}
    edit(keys)
    path = write(tmp_path / "m.gguf", list(keys.values()))
    with pytest.raises(DepthKVError) as caught:
        Llama(path, verbose=False)
    message = str(caught.value)
    assert f"depthkv.{key}" in message, message
    assert "m.gguf" in message and "\n" not in message
