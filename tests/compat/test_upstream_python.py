"""llama-cpp-python's own tests, from the archive that the engine is built from, on our library and with our `Llama`.

Most of them load models from a hub. What only compares a model with itself runs on the packaged SmolLM2 instead; what
expects the tokens or the answer of one certain model, or needs another architecture, cannot run without a network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "native" / "llama.cpp.lock"

# repositories on the hub that the tests name, and why SmolLM2 cannot take their place
NOT_REPLACED = {
    "lmstudio-community/Qwen3.5-0.8B-GGUF": "expects this model's tokens and answers",
    "CompendiumLabs/bge-small-en-v1.5-gguf": "an encoder",
    "QuantFactory/mamba-130m-hf-GGUF": "a recurrent model",
    "tiiuae/Falcon-H1-Tiny-90M-Instruct-GGUF": "a hybrid model",
}
REPLACED = "ggml-org/models"  # tinyllamas/stories15M-q4_0.gguf

# the class is replaced before a test imports it, and so is the download
CONFTEST = f"""
import os

import huggingface_hub
import pytest

import depthkv_edge.compat.llama_cpp


def download(repo_id, filename):
    if repo_id == {REPLACED!r}:
        return os.environ["UPSTREAM_MODEL"]
    pytest.skip("needs a network: " + {NOT_REPLACED!r}[repo_id])


huggingface_hub.hf_hub_download = download
"""

PASS = {
    "test_llama": {
        "test_llama_cpp_version",
        "test_llama_cpp_tokenization",
        *(
            f"test_{name}_matches_fresh[llama_cpp_transformer_model_path-False-False]"
            for name in (
                "exact_cached_prompt_reuse",
                "loaded_exact_cached_prompt_reuse",
                "ram_cache_exact_prompt_hit",
                "shorter_prompt_prefix_reuse",
            )
        ),
    },
    "test_llama_chat_format": {"test_mistral_instruct", "test_hf_tokenizer_config_str_to_chat_formatter"},
    "test_llama_grammar": {"test_grammar_from_string", "test_composed_pydantic_grammar", "test_grammar_anyof"},
    "test_llama_speculative": {"test_find_candidate_pred_tokens"},
}


@pytest.fixture(scope="module")
def results(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Why each test did not pass, by file and test; empty if it did."""
    directory = tmp_path_factory.mktemp("upstream")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthkv-edge"
    fetch = [sys.executable, ROOT / "cmake" / "llama_source.py", "fetch", "--lock", LOCK, "--cache", cache]
    archive = subprocess.run(fetch, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(*Path(member.name).parts[1:])  # without the archive's own directory
            wanted = path.parent == Path("tests") or path == Path("vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf")
            if member.isfile() and wanted:
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                (directory / path).write_bytes(tar.extractfile(member).read())
    (directory / "conftest.py").write_text(CONFTEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml"],
        cwd=directory,
        env=os.environ | {"UPSTREAM_MODEL": str(smollm2), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (directory / "report.xml").is_file(), done.stdout + done.stderr
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(directory / "report.xml").iter("testcase"):
        reason = "".join(f"{child.tag}: {child.get('message')}" for child in case if child.tag != "system-err")
        found.setdefault(case.get("classname", "").removeprefix("tests."), {})[case.get("name", "")] = reason
    return found


def test_all_files_ran(results):
    assert results.keys() == PASS.keys()


@pytest.mark.parametrize("file", PASS)
def test_passes(results, file):
    not_passed = {name: reason for name, reason in results[file].items() if reason}
    assert results[file].keys() - not_passed.keys() == PASS[file], not_passed


def test_the_rest_needs_a_model_from_the_hub(results):
    reasons = [reason for tests in results.values() for reason in tests.values() if reason]
    assert len(reasons) == 14
    assert {reason.removeprefix("skipped: needs a network: ") for reason in reasons} == set(NOT_REPLACED.values())
