"""llama-server from the patched tree, on the packaged model: what a KV budget means for slots, prompts and drafts."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from support.native_server import PATIENCE, SYSTEM, Server, program

N_LAYERS, ROW_BYTES = 30, 3 * 64 * 2  # SmolLM2-135M: K or V of one token in one layer, F16
N_CTX, N_SLOTS, BUDGET = 512, 2, 0.4  # positions of a slot
N_STRIP = 64


@pytest.fixture(scope="module")
def slots_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slots")


@pytest.fixture(scope="module")
def server(start: Callable[..., Server], smollm2: Path, slots_dir: Path) -> Server:
    """Two slots that share the cells, with everything on that can be."""
    return start(
        "-m", smollm2, "-c", N_CTX * N_SLOTS, "-np", N_SLOTS, "--kv-budget", BUDGET, "--metrics", "--context-shift",
        "--cache-ram", 0, "--slot-save-path", slots_dir,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter for SmolLM2 that changes what it says."""
    path = tmp_path_factory.mktemp("lora") / "adapter.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    rng = np.random.default_rng(0)
    for layer in range(N_LAYERS):
        for part, shape in {"a": (1, 576), "b": (576, 1)}.items():
            writer.add_tensor(
                f"blk.{layer}.attn_output.weight.lora_{part}", rng.normal(0, 0.3, shape).astype(np.float32)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def other(start: Callable[..., Server], smollm2: Path, slots_dir: Path, adapter: Path) -> Server:
    """One slot, a draft model, an adapter, another budget, nothing pinned."""
    return start(
        "-m", smollm2, "-c", N_CTX, "-np", 1, "--kv-budget", 0.5, "--no-kv-pin", "--slot-save-path", slots_dir,
        "-md", smollm2, "--spec-type", "draft-simple", "--lora-scaled", f"{adapter}:0", "--cache-ram", 0,
        "-lv", 4, "--fit", "off",
    )  # fmt: skip


@pytest.fixture
def single(start: Callable[..., Server], smollm2: Path) -> Iterator[Callable[..., Server]]:
    """A server of one slot, for one test."""
    started: list[Server] = []

    def make(n_ctx: int, budget: float, *arguments: Any, model: Path = smollm2) -> Server:
        started.append(start("-m", model, "-c", n_ctx, "-np", 1, "--kv-budget", budget, *arguments))
        return started[-1]

    yield make
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def words(server: Server, text: str) -> list[int]:
    return server.tokens(text[:8000])


@pytest.fixture
def fresh(server: Server) -> Server:
    for slot in range(N_SLOTS):
        server.post(f"/slots/{slot}?action=erase")
    return server


def held(kv: dict[str, Any]) -> list[tuple[int, int]]:
    return [(layer["used"], layer["evicted"]) for layer in kv["layers"]]


def parts(n_pos: int) -> list[tuple[int, int]]:
    """[p0, p1) of the parts of a strip."""
    spans = [(i * n_pos // N_STRIP, (i + 1) * n_pos // N_STRIP) for i in range(N_STRIP)]
    return [(p0, max(p1, p0 + 1)) for p0, p1 in spans]


def pinned_parts(slot: dict[str, Any], n_pinned: int) -> list[list[float]]:
    """What each layer holds of the parts that lie within the first positions."""
    n = sum(p1 <= n_pinned for _, p1 in parts(slot["n_prompt_tokens"]))
    assert n > 0
    return [strip[:n] for strip in slot["kv"]["strips"]]


def test_health(server: Server):
    assert server.get("/health") == (200, {"status": "ok"})
    assert server.get("/")[0] == 404  # upstream's web UI is not built in


def test_the_facts_of_a_slot_add_up(fresh: Server, text: str):
    answer = fresh.chat(text[:1400], 8)
    slot = fresh.slot()
    kv = slot["kv"]
    n_pos = slot["n_prompt_tokens"]
    assert n_pos == answer["usage"]["total_tokens"] - 1  # the last token was sampled, and not decoded
    assert (kv["active"], kv["budget"], kv["scorer"], kv["rule"]) == (True, BUDGET, "attention", "uniform")
    assert [layer["layer"] for layer in kv["layers"]] == list(range(N_LAYERS))
    for layer in kv["layers"]:
        assert layer["used"] <= layer["cells"] and layer["cells"] in (192, 224)  # steps of 32 around 204
        assert layer["used"] + layer["evicted"] == n_pos > layer["cells"]
        assert layer["bytes"] == layer["cells"] * 2 * ROW_BYTES
    assert kv["bytes"] == sum(layer["bytes"] for layer in kv["layers"])
    assert kv["bytes_full"] == N_CTX * N_LAYERS * 2 * ROW_BYTES
    assert 0.95 * BUDGET < kv["bytes"] / kv["bytes_full"] <= BUDGET
    # what is held, by position
    assert len(kv["strips"]) == N_LAYERS and fresh.slot(1)["kv"]["strips"] == [[]] * N_LAYERS
    for layer, strip in zip(kv["layers"], kv["strips"], strict=True):
        assert len(strip) == N_STRIP and all(0 <= share <= 1 for share in strip)
        total = sum(share * (p1 - p0) for share, (p0, p1) in zip(strip, parts(n_pos), strict=True))
        assert total == pytest.approx(layer["used"], abs=0.001 * n_pos)
    status, slots = fresh.get("/slots")
    assert status == 200 and "strips" not in slots[0]["kv"], "unless it is asked for"
    # the system prompt is pinned, and the marks around it, not the message that follows
    n_system = len(fresh.tokens(SYSTEM))
    assert n_system < kv["pinned"] < n_system + 16
    assert all(share == 1 for shares in pinned_parts(slot, kv["pinned"]) for share in shares)


@pytest.mark.parametrize("n", [298, 75])
def test_the_front_of_an_old_prompt_is_answered_as_if_it_were_new(fresh: Server, words: list[int], n: int):
    before = fresh.metrics()["kv_tokens_reevaluated_total"]
    fresh.complete(words[:430], 60)
    again = fresh.complete(words[:n], 20)
    assert fresh.metrics()["kv_tokens_reevaluated_total"] - before == n - 1 - again["timings"]["cache_n"] > 0
    assert again["tokens"] == fresh.complete(words[:n], 20, cache_prompt=False)["tokens"]


@pytest.mark.parametrize(("n", "body"), [(150, {}), (430, {"temperature": 0.9, "seed": 3})])
def test_equal_requests_get_equal_text(fresh: Server, words: list[int], n: int, body: dict[str, Any]):
    first = fresh.complete(words[:n], 60, **body)["tokens"]
    assert [fresh.complete(words[:n], 60, **body)["tokens"] for _ in range(2)] == [first, first]
    fresh.complete(words[800:1100], 20)
    assert fresh.complete(words[:n], 60, **body)["tokens"] == first


def test_equal_chats_get_equal_text(single: Callable[..., Server], text: str):
    """The system prompt is kept: it is pinned, so nothing of it is missing."""
    server = single(1024, BUDGET)
    first, *others = (server.chat(text[:1200], 60, SYSTEM * 4) for _ in range(3))
    assert server.slot()["kv"]["layers"][0]["evicted"] > 0
    answers = [answer["choices"][0]["message"]["content"] for answer in (first, *others)]
    assert answers == [answers[0]] * 3
    assert all(answer["timings"]["cache_n"] >= 128 for answer in others)


def test_a_prompt_that_only_grows_is_evaluated_once(fresh: Server, words: list[int]):
    before = fresh.metrics()["kv_tokens_reevaluated_total"]
    prompt: list[int] = []
    for turn in range(4):
        prompt += words[turn * 90 : turn * 90 + 90]
        answer = fresh.complete(prompt, 10)
        assert answer["timings"]["cache_n"] == (0 if turn == 0 else len(prompt) - 91)
        prompt += answer["tokens"]
    assert fresh.metrics()["kv_tokens_reevaluated_total"] == before


def test_metrics_are_the_sum_of_the_slots(fresh: Server, text: str):
    before = fresh.metrics()
    fresh.chat(text[:1400], 1)
    fresh.chat("Who are you?", 1, id_slot=1)
    metrics = fresh.metrics()
    slots = [fresh.slot(i)["kv"] for i in range(N_SLOTS)]
    layers = [layer for kv in slots for layer in kv["layers"]]
    assert metrics["kv_bytes"] == sum(kv["bytes"] for kv in slots)
    assert metrics["kv_bytes_full"] == sum(kv["bytes_full"] for kv in slots)
    assert metrics["kv_cells"] == sum(layer["cells"] for layer in layers)
    assert metrics["kv_cells_used"] == sum(layer["used"] for layer in layers)
    assert metrics["kv_cells_pinned"] == N_LAYERS * sum(kv["pinned"] for kv in slots)
    assert metrics["kv_cells_evicted_total"] - before["kv_cells_evicted_total"] == sum(
        layer["evicted"] for layer in layers
    )
    assert metrics["kv_evict_seconds_total"] > before["kv_evict_seconds_total"] >= 0


def test_no_kv_pin(other: Server, text: str):
    other.chat(text[:1500], 1)
    slot = other.slot()
    assert slot["kv"]["pinned"] == 0
    assert any(share < 1 for shares in pinned_parts(slot, 40) for share in shares)


def test_a_pin_ends_with_its_prompt(fresh: Server, words: list[int]):
    fresh.chat("Who are you?", 1)
    assert fresh.slot()["kv"]["pinned"] > 0
    fresh.complete(words[:40], 1)
    assert fresh.slot()["kv"]["pinned"] == 0


def test_a_system_prompt_without_room_is_answered_unpinned(fresh: Server, text: str):
    answer = fresh.chat("Who are you?", 4, system=text[:1000])
    assert answer["usage"]["completion_tokens"] == 4
    assert fresh.slot()["kv"]["pinned"] == 0
    assert re.search(r"the system prompt \(\d+ tokens\) is not pinned: layer capacity", fresh.log.read_text())


def test_save_erase_restore(fresh: Server, words: list[int]):
    fresh.complete(words[:330], 1)
    before = fresh.slot()["kv"]
    saved = fresh.post("/slots/0?action=save", filename="slot.bin")
    assert saved["n_saved"] == 330
    expected = fresh.complete(words[:350], 16)
    fresh.post("/slots/0?action=erase")
    assert set(held(fresh.slot()["kv"])) == {(0, 0)}
    fresh.post("/slots/0?action=restore", filename="slot.bin")
    after = fresh.slot()["kv"]
    assert held(after) == held(before) and after["strips"] == before["strips"]
    answer = fresh.complete(words[:350], 16)
    assert answer["timings"]["cache_n"] == 330
    assert answer["tokens"] == expected["tokens"]
    fresh.post("/slots/1?action=restore", filename="slot.bin")
    assert held(fresh.slot(1)["kv"]) == held(before), "in another slot too"


def test_restore_refuses_a_smaller_cache(
    fresh: Server, single: Callable[..., Server], slots_dir: Path, words: list[int]
):
    fresh.complete(words[:330], 1)
    fresh.post("/slots/0?action=save", filename="large.bin")
    small = single(N_CTX, 0.2, "--slot-save-path", slots_dir)
    status, answer = small.request("/slots/0?action=restore", json.dumps({"filename": "large.bin"}).encode())
    assert status == 400 and "Unable to restore slot" in answer["error"]["message"]
    assert "use the same KV budget" in small.log.read_text()
    assert small.complete(words[:5], 2)["timings"]["predicted_n"] == 2  # it lives


def test_context_shift_keeps_the_system_prompt(fresh: Server, text: str):
    answer = fresh.chat(text[:1500], 220)
    slot = fresh.slot()
    kv = slot["kv"]
    assert answer["usage"]["prompt_tokens"] + 220 > N_CTX
    assert answer["usage"]["completion_tokens"] == 220
    assert slot["n_prompt_tokens"] < answer["usage"]["prompt_tokens"] + 219  # half of the rest is gone
    assert kv["pinned"] > len(fresh.tokens(SYSTEM))
    assert all(share == 1 for shares in pinned_parts(slot, kv["pinned"]) for share in shares)


def test_cache_reuse_moves_a_chunk(fresh: Server, words: list[int]):
    start, dropped, chunk, end = words[:60], words[100:160], words[200:320], words[400:410]
    fresh.complete(start + dropped + chunk, 1)
    plain = fresh.complete(start + dropped + chunk, 1)
    assert plain["timings"]["prompt_n"] == 1
    answer = fresh.complete(start + chunk + end, 8, n_cache_reuse=32)
    assert answer["timings"]["cache_n"] == len(start + chunk)
    assert answer["timings"]["prompt_n"] == len(end)
    slot = fresh.slot()
    assert all(layer["used"] <= layer["cells"] for layer in slot["kv"]["layers"])
    assert all(strip[-6:] == [1] * 6 for strip in slot["kv"]["strips"])


def test_the_facts_hold_while_a_slot_decodes(fresh: Server, words: list[int]):
    seen = []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fresh.complete, words[:250], 80)
        while not answer.done():
            seen.append(fresh.slot())
            fresh.metrics()
        assert answer.result()["timings"]["predicted_n"] == 80
    assert sum(slot["is_processing"] for slot in seen) > 3
    for slot in seen:
        for layer in slot["kv"]["layers"]:
            assert layer["used"] <= layer["cells"]
            assert layer["used"] + layer["evicted"] <= slot.get("n_prompt_tokens", 0)  # none before the first batch
    assert len({json.dumps(held(slot["kv"])) for slot in seen}) > 3  # and they move


@contextmanager
def leaving(server: Server, prompt: list[int], slot: int) -> Iterator[None]:
    """Ask for a long answer, and hang up at its beginning."""
    body = json.dumps({"prompt": prompt, "n_predict": 5000, "ignore_eos": True, "stream": True, "id_slot": slot})
    head = f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall((head + body).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        yield


def test_a_client_that_leaves_frees_its_slot(fresh: Server, words: list[int]):
    with leaving(fresh, words[:50], 0):
        assert fresh.slot()["is_processing"]
    give_up = time.monotonic() + 3 * PATIENCE
    while fresh.slot()["is_processing"]:
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_four_clients_at_once(start: Callable[..., Server], smollm2: Path, words: list[int]):
    """Each reads beyond its cells, goes back, looks at the slots, leaves, and asks once more."""
    arguments = ("-c", 4 * N_CTX, "-np", 4, "-b", 64, "-ub", 64, "--kv-budget", BUDGET, "--slots", "--metrics")
    server = start("-m", smollm2, *arguments)

    def talk(slot: int) -> list[int]:
        own = words[20 * slot :]
        for n_prompt in (300, 120, 200):
            answer = server.complete(own[:n_prompt], 8, id_slot=slot)
            assert len(answer["tokens"]) == 8
            assert all(layer["used"] <= layer["cells"] for layer in server.slot(slot)["kv"]["layers"])
            server.metrics()
        with leaving(server, own[:100], slot):
            server.get("/slots")
        return server.complete(own[:50], 8, id_slot=slot)["tokens"]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(talk, range(4)))
    assert all(len(tokens) == 8 for tokens in answers)
    assert server.metrics()["kv_tokens_reevaluated_total"] > 0
    assert not any(server.slot(slot)["is_processing"] for slot in range(4))


def test_n_completions_of_one_prompt(fresh: Server, text: str):
    answer = fresh.chat(text[:1200], 12, n=2)
    first, second = (choice["message"]["content"] for choice in answer["choices"])
    assert first == second != ""


def test_a_draft_model_keeps_its_full_cache(other: Server, text: str):
    words = other.tokens(text[:3000])
    answer = other.complete(words[:330], 40)
    assert answer["timings"]["predicted_n"] == 40
    assert answer["timings"]["draft_n_accepted"] > 0
    slot = other.slot()
    assert all(0 < layer["used"] <= layer["cells"] for layer in slot["kv"]["layers"])
    assert len(re.findall(r"llama_kv_cache_depth: size =", other.log.read_text())) == 1
    again = other.complete(words[:330] + answer["tokens"] + words[330:340], 8)
    assert again["timings"]["prompt_n"] <= 11


def test_a_budget_that_is_overridden_is_not_that_of_the_draft(start: Callable[..., Server], smollm2: Path):
    draft = ("-md", smollm2, "--spec-type", "draft-simple")
    override = ("--override-kv", "depthkv.budget=float:0.5")
    server = start("-m", smollm2, *draft, "-np", 1, "-c", 512, "-lv", 4, *override)
    assert server.slot()["kv"]["budget"] == 0.5
    assert len(re.findall(r"llama_kv_cache_depth: size =", server.log.read_text())) == 1
    server.close()


def test_a_long_draft_can_be_taken_back(single: Callable[..., Server], words: list[int]):
    """A draft is as long as it may be, and most of it is wrong: what it pushed out could not come back."""
    size = ("--spec-ngram-simple-size-n", 2, "--spec-ngram-simple-size-m", 64)
    server = single(N_CTX, 0.25, "--spec-type", "ngram-simple", *size)
    answer = server.complete(words[:300], 150, temperature=1.5, seed=1)
    assert answer["timings"]["draft_n"] > answer["timings"]["draft_n_accepted"]
    assert answer["timings"]["predicted_n"] == 150


def test_lora(other: Server, text: str):
    words = other.tokens(text[:3000])[:300]
    with_adapter = other.complete(words, 8, lora=[{"id": 0, "scale": 1.0}])
    without = other.complete(words, 8, lora=[{"id": 0, "scale": 0.0}])
    assert with_adapter["tokens"] != without["tokens"]
    assert without["timings"]["cache_n"] == 0  # other weights, other cache
    assert all(layer["evicted"] > 0 for layer in other.slot()["kv"]["layers"])


def test_cache_types(single: Callable[..., Server], text: str):
    server = single(256, 0.5, "-ctk", "q8_0", "-ctv", "q8_0", "--context-shift")
    answer = server.complete(server.tokens(text[:2000])[:200], 80)  # evicts, and shifts quantised keys
    assert answer["timings"]["predicted_n"] == 80 and answer["truncated"]
    assert server.slot()["kv"]["layers"][0]["bytes"] == 128 * 2 * 192 // 32 * 34


def test_slots_of_a_unified_cache_have_every_position(start: Callable[..., Server], smollm2: Path, text: str):
    server = start("-m", smollm2, "-c", 512, "-np", 2, "--kv-unified", "--kv-budget", 0.5, "--cache-ram", 64)
    words = server.tokens(text[:3000])
    server.complete(words[:400], 1)
    server.complete(words[:400], 1, id_slot=1)
    kvs = [server.slot(i) for i in range(2)]
    for slot in kvs:
        assert slot["n_ctx"] == 512 and slot["n_prompt_tokens"] == 400
        assert {layer["cells"] for layer in slot["kv"]["layers"]} == {128}
    # neither was cleared to make room for the other
    assert held(kvs[0]["kv"]) == held(kvs[1]["kv"])
    server.close()


def test_the_prompt_cache_brings_a_slot_back(single: Callable[..., Server], text: str):
    server = single(512, 0.4, "--cache-ram", 256)
    words = server.tokens(text[:4000])
    server.complete(words[:330], 1)
    before = held(server.slot()["kv"])
    server.complete(words[400:500], 1)
    assert held(server.slot()["kv"]) != before
    back = server.complete(words[:340], 1)
    assert back["timings"]["prompt_n"] == 10
    assert [used + evicted for used, evicted in held(server.slot()["kv"])] == [340] * N_LAYERS


def test_a_sliding_window(single: Callable[..., Server], gemma3: Path, text: str):
    server = single(1024, 0.5, model=gemma3)
    words = server.tokens(text[:6000])
    first = server.complete(words[:900], 8)
    assert len(server.slot()["kv"]["layers"]) == 3  # of 18: the others have a window
    again = server.complete(words[:900] + first["tokens"] + words[900:920], 4)
    assert again["timings"]["prompt_n"] == 21
    back = server.complete(words[:600], 4)  # further back than the window reaches, and than any checkpoint
    assert back["timings"]["prompt_n"] == 600
    assert back["timings"]["predicted_n"] == 4
    kv = server.slot()["kv"]
    assert kv["bytes"] > sum(layer["bytes"] for layer in kv["layers"])  # the windows count too


def test_the_beginning_of_a_prompt_whose_window_has_moved_on(single: Callable[..., Server], gemma3: Path, text: str):
    """It ends where a checkpoint does, and its last token is evaluated again, one position before that."""
    server = single(2048, 0.5, "-b", 64, "-ub", 64, model=gemma3)
    words = server.tokens(text[:6000])[:900]
    server.complete(words, 300)
    for n_back in (4, 5, 6, 4 + 64, 5 + 64):
        again = server.complete(words[:-n_back], 2)
        assert again["timings"]["predicted_n"] == 2, n_back


def test_without_a_budget_the_stock_cache_is_reported(start: Callable[..., Server], smollm2: Path):
    server = start("-m", smollm2, "-c", 256, "-np", 1, "--metrics")
    server.chat("Who are you?", 2)
    slot = server.slot()
    kv = slot["kv"]
    assert (kv["active"], kv["budget"], kv["pinned"]) == (False, 1, 0)
    assert kv["bytes"] == kv["bytes_full"] == 256 * N_LAYERS * 2 * ROW_BYTES == server.metrics()["kv_bytes"]
    assert set(held(kv)) == {(slot["n_prompt_tokens"], 0)}
    server.close()


def test_the_budget_from_the_environment(start: Callable[..., Server], smollm2: Path):
    server = start("-m", smollm2, "-c", 256, "-np", 1, environment={"LLAMA_ARG_KV_BUDGET": "0.5"})
    assert server.slot()["kv"]["budget"] == 0.5
    server.close()


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"messages": [{"content": "no role"}]}'])
def test_a_bad_request_is_the_fault_of_the_client(server: Server, body: bytes):
    """More of them are in test_serve.py; this file also runs under sanitizers."""
    status, answer = server.request("/v1/chat/completions", body)
    assert 400 <= status < 500
    assert answer["error"]["code"] == status and answer["error"]["message"] and answer["error"]["type"]
    assert server.get("/health")[0] == 200


REFUSED = {
    "--embedding": ["--embedding"],
    "--rerank": ["--rerank"],
    "--swa-full": ["--swa-full"],
    "--mmproj": ["--mmproj", "projector.gguf"],
    "--spec-type draft-mtp": ["--spec-type", "draft-mtp"],
    "--spec-type draft-eagle3": ["--spec-type", "draft-eagle3"],
    "--spec-draft-model and a unified KV cache": ["-md", "draft.gguf"],
}


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(), *map(str, arguments)], capture_output=True, text=True, timeout=60 * PATIENCE)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(smollm2: Path, name: str):
    done = run("-m", smollm2, "--kv-budget", 0.5, *REFUSED[name])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: --kv-budget does not go with {name}: ")
    assert done.stderr.count("\n") == 1


def test_a_full_budget_refuses_nothing(tmp_path: Path):
    done = run("-m", tmp_path / "missing.gguf", "--port", 0, "--kv-budget", 1, "--swa-full")
    assert done.returncode == 1
    assert "does not go with" not in done.stderr and "missing.gguf" in done.stderr
