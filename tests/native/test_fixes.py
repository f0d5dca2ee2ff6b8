"""What native/fixes mends in upstream's code, as the compiler of this machine translates it."""

import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2] / "build" / "engine" / "llama.cpp"

# palette, first row, 14 reserved bytes, bytes a row of 8 tiles, 16 reserved bytes, rows of 8 tiles, 8 reserved bytes
TILE_CONFIG = struct.pack("<2B14x8H16x8B8x", 1, 0, 64, 64, 32, 32, 64, 64, 64, 64, 8, 8, 16, 16, 16, 16, 16, 16)

PROGRAM = """
#include <cstdint>
#include <cstdio>
#include <immintrin.h>
{code}
extern "C" unsigned char seen[64];
unsigned char seen[64];
__attribute__((noinline)) void init(int n) {{
    for (int i = 0; i < n; ++i) {{
        ggml_tile_config_init();
        _tile_zero(4);
    }}
}}
int main() {{ init(1); fwrite(seen, 1, sizeof(seen), stdout); }}
"""


def definition(source: str, start: str) -> str:
    """From a line to the closing brace at the same depth."""
    return re.search(rf"^{start}.*?^}};?$", source, re.MULTILINE | re.DOTALL)[0]


def copying(match: re.Match) -> str:
    """What `ldtilecfg address` would read, copied to `seen`: runs on processors without AMX."""
    offset, register = int(match[1] or 0), match[2]
    moves = [f"movups {offset + i}({register}), %xmm15\n\tmovups %xmm15, {f'seen+{i}'}(%rip)" for i in range(0, 64, 16)]
    return "\t" + "\n\t".join(moves)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86-64")
@pytest.mark.parametrize("level", ["-O2", "-O3"])
def test_amx_tile_configuration_is_stored_before_it_is_loaded(level, tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    source = (TREE / "ggml/src/ggml-cpu/amx/mmq.cpp").read_text()
    code = definition(source, r"struct tile_config_t") + "\n" + definition(source, r"inline void ggml_tile_config_init")
    program, assembly, binary = tmp_path / "amx.cpp", tmp_path / "amx.s", tmp_path / "amx"
    program.write_text(PROGRAM.format(code=code))
    subprocess.run([compiler, level, "-mamx-tile", "-S", program, "-o", assembly], check=True)
    text, loads = re.subn(r"^\s*ldtilecfg\s+(-?\d+)?\((%\w+)\)$", copying, assembly.read_text(), flags=re.MULTILINE)
    text, zeros = re.subn(r"^\s*tilezero\s.*$", "", text, flags=re.MULTILINE)
    assert loads and zeros
    assembly.write_text(text)
    subprocess.run([compiler, assembly, "-o", binary], check=True)
    assert subprocess.run([binary], capture_output=True, check=True).stdout == TILE_CONFIG
