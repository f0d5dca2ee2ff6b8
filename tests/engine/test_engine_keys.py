"""A file whose keys are wrong is refused by the engine as by everything that reads them."""

from __future__ import annotations

import pytest
from support.keys import HOSTILE, N_LAYERS, hostile
from support.tiny import write_llama

from depthkv_edge import DepthKVError, Llama


@pytest.mark.parametrize("name", ["layers missing", "curves nan", "scorer bytes", "sinks 0"])
def test_hostile_keys(tmp_path, name):
    def extra(writer) -> None:
        for key in hostile(name):
            writer.add_key_value(key.name, key.value, key.type, key.item_type)

    path = write_llama(tmp_path / "m.gguf", extra, n_layers=N_LAYERS)
    with pytest.raises(DepthKVError) as caught:
        Llama(path, verbose=False)
    message = str(caught.value)
    assert f"depthkv.{HOSTILE[name][0]}" in message and HOSTILE[name][2] in message
    assert "m.gguf" in message and "\n" not in message
