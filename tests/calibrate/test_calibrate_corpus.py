"""What calibration reads: distinct windows of several kinds, the same every time, or one line on what is wrong."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from depthkv_edge.calibrate.corpus import build_corpus
from depthkv_edge.errors import DepthKVError


def characters(text: str) -> list[int]:
    return [ord(c) for c in text]


def build(names=(), first_token=None, **kwargs):
    return build_corpus(
        [str(name) for name in names],
        characters,
        first_token,
        **({"n_windows": 4, "n_held_out": 2, "window_tokens": 100, "seed": 0} | kwargs),
    )


def write(path, n, start=0):
    path.write_text("".join(chr(1000 + start + i) for i in range(n)), encoding="utf-8")
    return path


def test_default_alternates_two_kinds():
    corpus = build()
    assert corpus.texts == ("documentation", "source")
    assert [w.text for w in corpus.held_out] == [0, 1]
    assert [w.text for w in corpus.windows] == [0, 1, 0, 1]
    assert "sha256:" in corpus.name and corpus.name.startswith("Python ")
    assert all(len(w.tokens) == 100 for w in (*corpus.windows, *corpus.held_out))
    assert build() == corpus != build(seed=1)


def test_no_token_is_read_twice(tmp_path):
    corpus = build([write(tmp_path / "a.txt", 300), write(tmp_path / "b.txt", 350, 5000)])
    tokens = [token for w in (*corpus.windows, *corpus.held_out) for token in w.tokens]
    assert len(tokens) == len(set(tokens)) == 600


@pytest.mark.parametrize("n", [700, 4000, 50_000])
def test_more_windows_and_other_seeds_leave_the_held_out_ones_alone(tmp_path, n):
    files = [write(tmp_path / "a.txt", n), write(tmp_path / "b.txt", n - 1, 70_000)]
    held_out = build(files).held_out
    for n_windows in (1, 2, 5, 9):
        corpus = build(files, n_windows=n_windows)
        assert corpus.held_out == held_out == build(files, n_windows=n_windows, seed=7).held_out
        tokens = [token for w in (*corpus.windows, *corpus.held_out) for token in w.tokens]
        assert len(tokens) == len(set(tokens)) == 100 * (n_windows + 2)


def test_windows_come_from_all_of_the_text(tmp_path):
    path = write(tmp_path / "a.txt", 50_000)
    corpora = [build([path], seed=seed) for seed in range(8)]
    assert max(token for corpus in corpora for w in corpus.windows for token in w.tokens) > 1000 + 64 * 2 * 100


def test_tokens_of_many_characters(tmp_path):
    """The beginning that is held out from has too few of them: the rest of the text helps out."""
    path = tmp_path / "a.txt"
    path.write_text("x" * 10**6)
    sizes = {"n_windows": 1, "n_held_out": 2, "window_tokens": 90, "seed": 0}
    corpus = build_corpus([str(path)], lambda text: list(range(len(text) // 64)), None, **sizes)
    assert (len(corpus.held_out), len(corpus.windows)) == (2, 1)


def test_a_short_text_leaves_its_turns_to_the_others(tmp_path):
    corpus = build([write(tmp_path / "short.txt", 120), write(tmp_path / "long.txt", 900, 5000)])
    assert sorted(w.text for w in (*corpus.windows, *corpus.held_out)) == [0, 1, 1, 1, 1, 1]


def test_first_token_begins_every_window(tmp_path):
    corpus = build([write(tmp_path / "a.txt", 700)], first_token=7)
    for window in (*corpus.windows, *corpus.held_out):
        assert window.tokens[0] == 7 and len(window.tokens) == 100 and 7 not in window.tokens[1:]


def test_hash_is_that_of_the_text(tmp_path):
    a, b = write(tmp_path / "a.txt", 700), write(tmp_path / "b.txt", 700, 1)
    digests = [build([path]).name.split("sha256:")[1] for path in (a, b, a)]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines(tmp_path, field):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({field: chr(97 + i) * 100, "n": i}) for i in range(8)) + "\n\n")
    tokens = {token for w in build([path], n_windows=2).windows for token in w.tokens}
    assert len(tokens) > 1 and tokens <= {*range(97, 105), 10}


def test_half_a_character(tmp_path):
    """JSON may escape one half of a surrogate pair, and UTF-8 has no bytes for that."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "\\ud83d" * 700 + '"}')
    corpus = build([path])
    assert {token for w in corpus.windows for token in w.tokens} == {0xFFFD}


def test_too_little_text_says_how_much_is_missing(tmp_path):
    with pytest.raises(DepthKVError, match="short of 250 tokens") as error:
        build([write(tmp_path / "a.txt", 350)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.txt", None, ["none.txt", "does not exist"]),
        ("bytes.txt", b"abc\xff", ["bytes.txt", "not UTF-8", "byte 3"]),
        ("bad.jsonl", b'{"text": "a"}\n{', ["bad.jsonl", "line 2", "not JSON"]),
        ("fields.jsonl", b'{"words": "a"}', ["fields.jsonl", "line 1", "text or content"]),
        ("list.jsonl", b"[1]", ["list.jsonl", "line 1", "text or content"]),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, parts):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DepthKVError) as error:
        build([path])
    assert all(part in str(error.value) for part in parts), error.value


def test_a_directory_is_no_corpus(tmp_path):
    with pytest.raises(DepthKVError, match="cannot be read"):
        build([tmp_path])


def test_a_data_set(monkeypatch):
    """What loads it, what it holds, and what goes wrong in it is the package's."""
    loaded = []

    def load_dataset(name, split, streaming):
        loaded.append((name, split, streaming))
        if len(loaded) > 1:
            raise AssertionError("two\nlines")
        return iter([{"text": "x" * 400}, {"text": "y" * 400}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert {token for w in build(["owner/texts"]).windows for token in w.tokens} <= {ord("x"), ord("y"), 10}
    assert loaded == [("owner/texts", "train", True)]
    with pytest.raises(DepthKVError, match="corpus owner/texts cannot be loaded: two lines"):
        build(["owner/texts"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DepthKVError, match="pip install datasets"):
        build(["owner/texts"])
