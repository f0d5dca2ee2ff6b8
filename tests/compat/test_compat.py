"""Programs written for `llama_cpp.Llama` run with a budget, and without one as they always did."""

from __future__ import annotations

import inspect
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import Outcome, run_python
from support.outcome import refused
from support.tiny import write_llama

import depthkv_edge
from depthkv_edge import DepthKVError
from depthkv_edge.engine import library
from depthkv_edge.engine.capi import llama_cpp

Stock = depthkv_edge.Llama.__base__
SMALL: dict[str, Any] = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "n_threads": 2, "n_threads_batch": 2}
QUIET = SMALL | {"verbose": False}


@pytest.fixture(scope="module")
def compat() -> Iterator[ModuleType]:
    """The module, imported; afterwards the process is as it was before."""
    name = "depthkv_edge.compat.llama_cpp"
    saved = llama_cpp.Llama, llama_cpp.llama.Llama
    assert saved == (Stock, Stock)
    yield import_module(name)
    llama_cpp.Llama, llama_cpp.llama.Llama = saved
    # not deleted: CPython leaves a slot behind that refuses every argument a constructor is called with
    Stock.__new__ = staticmethod(lambda cls, *args, **kwargs: object.__new__(cls))
    del sys.modules[name]


@pytest.fixture(autouse=True)
def nothing_configured(compat: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_configured", None)
    monkeypatch.delenv("DEPTHKV_KV_BUDGET", raising=False)


@pytest.fixture
def make(smollm2: Path) -> Iterator[Callable[..., Any]]:
    """Call `llama_cpp.Llama`, or `cls`, as a program would; all instances are closed at the end of the test."""
    opened: list[Any] = []

    def call(path: Path = smollm2, cls: type | None = None, **kwargs: Any) -> Any:
        opened.append((cls or llama_cpp.Llama)(model_path=str(path), **(QUIET | kwargs)))
        return opened[-1]

    yield call
    for llama in opened:
        llama.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("compat") / "m.gguf")


def stock(path: Path, **kwargs: Any) -> Any:
    """An instance of the class that the bindings bring."""
    llama = object.__new__(Stock)
    Stock.__init__(llama, str(path), **(QUIET | kwargs))
    return llama


# --- who gets the budget ----------------------------------------------------------------------------------------------


def test_names(compat):
    assert llama_cpp.Llama is llama_cpp.llama.Llama is compat.Llama
    assert issubclass(compat.Llama, Stock) and issubclass(compat.Llama, depthkv_edge.Llama)


def test_every_keyword_and_default(compat):
    ours = inspect.signature(llama_cpp.Llama)
    for name, parameter in inspect.signature(Stock.__init__).parameters.items():
        if name != "self":
            assert ours.parameters[name].kind == parameter.kind
            assert ours.parameters[name].default == parameter.default
    assert {"kv_budget", "scorer", "rule", "n_sink", "n_recent"} < set(ours.parameters)
    assert set(inspect.signature(Stock).parameters) == set(inspect.signature(Stock.__init__).parameters) - {"self"}


def test_a_class_taken_before_the_import(compat, make, tiny):
    compat.configure(kv_budget=0.5)
    llama = make(tiny, cls=Stock)
    assert type(llama) is compat.Llama
    assert llama.kv_stats().budget == 0.5


def test_a_class_derived_before_the_import(compat, tiny):
    class Derived(Stock):
        pass

    with closing(Derived(str(tiny), **QUIET)) as llama:
        assert type(llama) is Derived
    compat.configure(kv_budget=0.5)
    with pytest.warns(UserWarning, match="Derived was derived from llama_cpp.Llama before .* no KV budget"):
        Derived(str(tiny), **QUIET).close()


def test_a_class_derived_after_the_import(compat, make, tiny):
    class Derived(llama_cpp.Llama):
        pass

    compat.configure(kv_budget=0.5)
    assert make(tiny, cls=Derived).kv_stats().budget == 0.5


def test_our_own_class_is_left_alone(compat, tiny):
    compat.configure(kv_budget=0.5)
    with closing(depthkv_edge.Llama(tiny, **QUIET)) as llama:
        assert type(llama) is depthkv_edge.Llama
        assert not llama.kv_stats().active


def test_precedence(compat, make, tiny, monkeypatch):
    """The argument, then the program's key-value override, then what is configured, then the environment."""
    override = {"depthkv.budget": 0.75}
    assert not make(tiny).kv_stats().active
    monkeypatch.setenv("DEPTHKV_KV_BUDGET", "")
    assert not make(tiny).kv_stats().active
    monkeypatch.setenv("DEPTHKV_KV_BUDGET", "50%")
    assert make(tiny).kv_stats().budget == 0.5
    compat.configure(kv_budget="192t", scorer="window", n_recent=48)
    stats = make(tiny).kv_stats()
    assert (stats.budget, stats.scorer) == (0.75, "window")
    assert make(tiny).kv_overrides["depthkv.recent_tokens"] == 48
    compat.configure(kv_budget=0.25)
    assert make(tiny, kv_overrides=override).kv_stats().budget == 0.75
    assert make(tiny, kv_overrides=override, kv_budget=0.5).kv_stats().budget == 0.5
    compat.configure(kv_budget=None)
    assert not make(tiny).kv_stats().active


def test_the_budget_of_the_file(compat, make, tmp_path):
    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_float32("depthkv.budget", 0.5))
    assert make(path).kv_stats().budget == 0.5
    compat.configure(kv_budget=0.75)
    assert make(path).kv_stats().budget == 0.75


def test_malformed(compat, tiny, monkeypatch):
    with pytest.raises(DepthKVError, match="^KV budget 'abc'"):
        compat.configure(kv_budget="abc")
    monkeypatch.setenv("DEPTHKV_KV_BUDGET", "abc")
    with pytest.raises(DepthKVError, match="^DEPTHKV_KV_BUDGET: KV budget 'abc'"):
        llama_cpp.Llama(str(tiny), **QUIET)


def test_what_the_engine_refuses_is_a_value_error(compat, tiny):
    compat.configure(kv_budget="1KiB")
    with pytest.raises(ValueError, match="floor"):
        llama_cpp.Llama(str(tiny), **QUIET)


# --- without a budget -------------------------------------------------------------------------------------------------


def test_without_a_budget_nothing_differs(make, smollm2, tokens):
    options = {"n_ctx": 64, "n_ubatch": 32, "type_k": 8, "logits_all": True}
    with closing(stock(smollm2, **options)) as theirs:
        ours = make(**options)
        for name, _ in type(theirs.context_params)._fields_:
            value = getattr(theirs.context_params, name)
            if isinstance(value, (bool, int, float)):
                assert getattr(ours.context_params, name) == value, name
        asked = {"flash_attn": False, "swa_full": None}  # ours keep what was asked for, theirs what came of it
        assert ours.__getstate__() | asked == theirs.__getstate__() | asked
        for llama in (ours, theirs):
            llama.eval(tokens[:48])
        assert np.array_equal(ours.scores[:48], theirs.scores[:48])


@pytest.mark.parametrize("kwargs", [{"type_v": 8}, {"n_ctx": 64, "type_k": 8, "type_v": 8, "flash_attn": False}])
def test_without_a_budget_errors_are_the_same(smollm2, kwargs):
    raised = []
    for call in (llama_cpp.Llama, stock):
        with pytest.raises(ValueError) as caught:
            call(str(smollm2), **(QUIET | kwargs))
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]


def test_without_a_budget_a_missing_file_is_the_same_error(tmp_path):
    path = tmp_path / "none.gguf"
    with pytest.raises(ValueError) as caught:
        llama_cpp.Llama(str(path), **QUIET)
    assert type(caught.value) is ValueError
    assert str(caught.value) == f"Model path does not exist: {path}"


def test_embedding(compat, make, smollm2):
    assert len(make(n_ctx=64, embedding=True).embed("hello")[0]) == 576
    compat.configure(kv_budget=0.5)
    with pytest.raises(DepthKVError, match=r"embedding=True cannot have a KV budget.*configure\(None\)"):
        llama_cpp.Llama(str(smollm2), embedding=True, **QUIET)
    with pytest.raises(DepthKVError, match="embedding"):
        llama_cpp.Llama(str(smollm2), embedding=True, kv_overrides={"depthkv.budget": 0.5}, **QUIET)


# --- with a budget, everything that the class can do ------------------------------------------------------------------


@pytest.fixture
def budget(compat: ModuleType) -> None:
    """128 of 256 cells in each layer."""
    compat.configure(kv_budget=0.5)


def evicted(llama: Any) -> int:
    return llama.kv_stats().n_evict


@pytest.mark.usefixtures("budget")
class TestWithABudget:
    def test_pickle(self, compat, make, tiny):
        """Whatever is configured when it is read again."""
        llama = make(tiny, scorer="window", n_sink=8, n_recent=40)
        data = pickle.dumps(llama)
        compat.configure(kv_budget=None)
        with closing(pickle.loads(data)) as again:
            assert type(again) is type(llama)
            assert again.kv_stats().to_dict() == llama.kv_stats().to_dict()
            assert again.context_params.flash_attn_type == llama.context_params.flash_attn_type

    @pytest.mark.parametrize("taken", ["before", "after"])
    def test_from_pretrained(self, compat, tiny, taken, monkeypatch):
        import huggingface_hub as hub

        monkeypatch.setattr(hub, "hf_hub_download", lambda **kwargs: str(tiny))
        monkeypatch.setattr(hub.HfFileSystem, "ls", lambda self, path, recursive: [f"{path}/{tiny.name}"])
        cls = {"before": Stock, "after": llama_cpp.Llama}[taken]
        with closing(cls.from_pretrained("owner/model", "*.gguf", **QUIET)) as llama:
            assert type(llama) is compat.Llama
            assert llama.kv_stats().budget == 0.5

    @pytest.mark.parametrize("chat_format", [None, "chatml-function-calling"])
    def test_chat_formats(self, make, document, chat_format):
        llama = make(chat_format=chat_format)
        question = [{"role": "user", "content": document(150) + "\n\nWhat is this?"}]
        answer = llama.create_chat_completion(question, max_tokens=8, temperature=0.0)
        assert answer["choices"][0]["message"]["content"]
        assert evicted(llama) > 0

    def test_streaming_with_a_json_schema(self, make, document):
        llama = make()
        schema = {"type": "object", "properties": {"page": {"type": "boolean"}}, "required": ["page"]}
        stream = llama.create_chat_completion(
            [{"role": "user", "content": document(150)}],
            response_format={"type": "json_object", "schema": schema},
            max_tokens=24,
            temperature=0.0,
            stream=True,
        )
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in stream)
        assert text.replace(" ", "").startswith('{"page":')
        assert evicted(llama) > 0

    def test_logits_all(self, make, tokens):
        llama = make(logits_all=True)
        answer = llama.create_completion(tokens[:160], max_tokens=2, temperature=0.0, logprobs=2)
        assert all(value <= 0 for value in answer["choices"][0]["logprobs"]["token_logprobs"])
        assert np.isfinite(llama._scores).all() and len(llama._scores) >= 160
        assert evicted(llama) > 0

    def test_draft_model(self, make):
        """Drafted tokens that are rejected are taken back; without eviction the text is the one without drafts."""
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        prompt = "one two three four, one two three four, one two three"
        plain = make().create_completion(prompt, max_tokens=24, temperature=0.0)
        drafting = make(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
        drafted = drafting.create_completion(prompt, max_tokens=24, temperature=0.0)
        assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
        assert evicted(drafting) == 0

    def test_draft_model_while_evicting(self, make, tokens):
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        # without logits_all the bindings have room for the logits of one batch only, and fail with or without a budget
        llama = make(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4), logits_all=True)
        answer = llama.create_completion(tokens[:150], max_tokens=48, temperature=0.0)
        assert answer["usage"]["completion_tokens"] == 48
        assert evicted(llama) > 0
        newest = max(llama.kv_positions(0))
        assert newest == llama.n_tokens - 1

    @pytest.mark.parametrize(("kind", "n_prompt"), [("RAM", 60), ("Disk", 160)])
    def test_cache(self, make, tokens, kind, n_prompt, tmp_path, monkeypatch):
        """The second instance evaluates no prompt, unless the first had to evict from it while it answered."""
        cache = llama_cpp.LlamaRAMCache() if kind == "RAM" else llama_cpp.LlamaDiskCache(str(tmp_path))
        writer, reader = make(), make()
        writer.set_cache(cache)
        reader.set_cache(cache)
        evaluated = []
        evaluate = reader.eval
        monkeypatch.setattr(reader, "eval", lambda tokens: (evaluated.extend(tokens), evaluate(tokens)))
        answers = [
            llama.create_completion(tokens[:n_prompt], max_tokens=8, temperature=0.0)["choices"][0]["text"]
            for llama in (writer, reader)
        ]
        assert answers[0] == answers[1] != ""
        if n_prompt == 60:
            assert evicted(writer) == 0 and len(evaluated) <= 8
        else:
            assert evicted(writer) > 0 and len(evaluated) >= n_prompt

    def test_vocab_only(self, make):
        assert make(vocab_only=True).tokenize(b"Hello", add_bos=False)

    def test_quantised_without_flash_attention(self, make, tokens):
        """What programs say that say nothing is no wish: a quantised V works, with flash attention."""
        llama = make(type_k=8, type_v=8, flash_attn=False)
        llama.eval(tokens[:160])
        assert evicted(llama) > 0

    def test_n_ctx_of_the_model(self, make, tiny):
        stats = make(tiny, n_ctx=0).kv_stats()
        assert stats.budget == 0.5 and stats.layers[0].cells == 256  # of 512


# --- programs of somebody else ----------------------------------------------------------------------------------------

PROGRAM = """
import sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=512, n_batch=64, n_threads=2, verbose=False)
print(len(sys.argv), __name__, llama.kv_stats().budget)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "app.py"
    path.write_text(PROGRAM)
    return path


def run(*arguments: Any, **environment: str) -> Outcome:
    return run_python("-m", "depthkv_edge.compat.llama_cpp", *map(str, arguments), **environment)


def test_a_program(program, tiny):
    outcome = run(program, tiny, "-m", "--kv-budget", DEPTHKV_KV_BUDGET="0.5")
    assert (outcome.code, outcome.out) == (0, "4 __main__ 0.5\n"), outcome.err


def test_a_module(program, tiny):
    path = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    outcome = run("--kv-budget", "0.25", "-m", "app", tiny, PYTHONPATH=path, DEPTHKV_KV_BUDGET="0.5")
    assert (outcome.code, outcome.out) == (0, "2 __main__ 0.25\n"), outcome.err


def test_a_program_that_exits(tmp_path):
    (tmp_path / "app.py").write_text("import sys\nsys.exit(7)\n")
    assert run(tmp_path / "app.py").code == 7


@pytest.mark.parametrize(("arguments", "parts"), [(["none.py"], ["none.py", "-m"]), ([], ["PROGRAM"])])
def test_one_line_and_exit_code_2(arguments, parts):
    line = refused(run(*arguments))
    assert all(part in line for part in parts), line


def test_a_module_that_cannot_be_run(tmp_path):
    for name, code in (("failing", "raise OSError('not\\ntoday')"), ("plain", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for module, says in {
        "no_such_package.module": "no_such_package",
        "plain": "plain.__main__ does not exist",
        "failing.module": "OSError: not today",
        "": "python -m",
    }.items():
        assert says in refused(run("-m", module, PYTHONPATH=path))


def test_what_is_wrong_with_the_environment_is_said_first(program, tiny):
    assert refused(run(program, tiny, DEPTHKV_KV_BUDGET="1.5")) == (
        'DEPTHKV_KV_BUDGET: KV budget 1.5 is above the full cache: give a fraction in (0, 1], "60%", "96MiB", "4096t" '
        '(tokens per layer on average) or "auto"'
    )


def test_what_the_engine_refuses_is_one_line(program, tiny):
    assert "floor" in refused(run("--kv-budget", "1KiB", program, tiny))


def test_one_import_in_a_program(tmp_path, tiny):
    """Wherever it stands, as long as the bindings run on our library."""
    code = f"""
import llama_cpp
from llama_cpp import Llama
import depthkv_edge.compat.llama_cpp
llama = Llama({str(tiny)!r}, n_ctx=512, verbose=False)
assert isinstance(llama, llama_cpp.Llama) and isinstance(llama, Llama)
print(llama.kv_stats().budget)
"""
    lib_dir = str(library.library_dir())
    outcome = run_python("-c", code, DEPTHKV_KV_BUDGET="0.5", LLAMA_CPP_LIB_PATH=lib_dir)
    assert outcome.out == "0.5\n", outcome.err
