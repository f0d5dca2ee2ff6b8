"""What `doctor` says of the build, the machine and a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from support.outcome import refused
from support.tiny import write_llama, write_mamba

from depthkv_edge import DepthKVError, __version__
from depthkv_edge.cli.doctor import doctor as command
from depthkv_edge.cli.doctor import print_cases
from depthkv_edge.engine import capi, library
from depthkv_edge.sizing import diagnosis
from depthkv_edge.sizing.diagnosis import BUDGETS, devices, diagnose
from depthkv_edge.sizing.fit import measuring


def doctor(*arguments: object) -> str:
    """Standard output."""
    outcome = CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=False)
    assert outcome.exit_code == 0 and outcome.stderr == ""
    return outcome.stdout


def test_the_installation():
    result = json.loads(doctor("--json"))
    names = ["version", "python", "engine", "library", "system_info", "devices", "machine", "threads", "memory_free"]
    assert list(result) == [*names, "memory_usable", "model"]
    assert result["version"] == __version__
    assert result["library"] == str(library.library_dir())
    file = Path(capi.llama_cpp.llama_cpp._lib._name)
    assert result["engine"]["library_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert result["engine"]["llama_depthkv_version"] == capi.VERSION
    assert result["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert 0 < result["memory_free"] <= result["machine"]["memory_bytes"]
    assert result["model"] is None


def test_devices():
    found = devices()
    assert any(device.type == "CPU" and device.backend == "CPU" for device in found)
    for device in found:
        assert device.name and device.description
        assert 0 <= device.memory_free <= device.memory_total or device.memory_total == 0


def test_what_does_not_fit_is_in_brackets(smollm2, monkeypatch, capsys):
    report = diagnose(smollm2).model
    assert report.refusal == "" and report.trained_ctx == 8192
    assert [(case.n_ctx, case.budget) for case in report.cases] == [
        (n_ctx, budget) for n_ctx in (2048, 4096, 8192) for budget in BUDGETS
    ]
    with measuring(smollm2) as need_of:
        for case in report.cases:
            assert case.need.kv == need_of(case.n_ctx, case.budget, 512).kv
    totals = [case.need.total for case in report.cases]
    least, most = totals[3], totals[8]
    assert (least, most) == (min(totals), max(totals))

    monkeypatch.setattr(diagnosis, "free_memory", lambda: (least + most) // 2)
    report = diagnose(smollm2).model
    assert report.cases[3].fits and not report.cases[8].fits
    monkeypatch.setenv("COLUMNS", "20")
    print_cases(report)
    header, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3, "a row for each context, however narrow the terminal is"
    assert header.split() == ["context", "100%", "60%", "40%", "20%"]
    assert {len(row) for row in (header, *rows)} == {len(header)}, "a table"
    assert rows[-1].split()[:2] == ["8192", f"[{report.cases[8].need.total / 2**20:.1f}]"]
    assert rows[0].split()[4] == f"{report.cases[3].need.total / 2**20:.1f}"


def test_as_text(smollm2):
    lines = [line for line in doctor(smollm2).splitlines() if line.strip()]
    names = {line.split()[0] for line in lines}
    assert names >= {"depthkv-edge", "llama.cpp", "library", "sha256", "device", "memory", "model", "calibration"}
    assert any("none: all layers get the same number of cells" in line for line in lines)
    assert [line.split()[0] for line in lines[-3:]] == ["2048", "4096", "8192"]


def test_a_model_that_is_refused(tmp_path):
    path = write_mamba(tmp_path / "mamba.gguf")
    report = json.loads(doctor(path, "--json"))["model"]
    assert "'mamba'" in report["refusal"] and "recurrent" in report["refusal"]
    assert all(case["need"] is None and not case["fits"] for case in report["cases"])
    said = doctor(path)
    assert "refused: " in said and "too small" not in said
    rows = said.splitlines()[-len(report["cases"]) :]
    assert [row.split() for row in rows] == [[str(case["n_ctx"]), "-"] for case in report["cases"]] != []


def test_a_budget_below_the_floor(tmp_path):
    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_uint32("depthkv.recent_tokens", 200))
    cases = {case.budget: case for case in diagnose(path).model.cases}
    assert cases[0.6].need is not None
    assert cases[0.2].need is None and not cases[0.2].fits, "102 cells, and 200 recent tokens"
    assert "too small" in doctor(path)


def test_not_a_model(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4")
    with pytest.raises(DepthKVError, match="is not a GGUF file"):
        doctor(tmp_path / "m.gguf")


def test_engine_not_built(cli, tmp_path):
    assert "DEPTHKV_LIB_PATH" in refused(cli("doctor", DEPTHKV_LIB_PATH=str(tmp_path)))
