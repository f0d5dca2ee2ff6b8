"""Load the model that is calibrated: a directory, a hub id, a GGUF file (dequantised) or a packaged model."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from depthkv_edge.assets import MODELS
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.packaged import check_gguf, resolve_model

_WITH_HEAD = ("CausalLM", "ConditionalGeneration", "LMHead")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        repo: directory or hub id.
        gguf: the GGUF file in that directory, or none.
    """

    name: str
    repo: str
    gguf: Path | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained`. Code that comes with a model is not run, nor asked about."""
        return {"trust_remote_code": False} | ({} if self.gguf is None else {"gguf_file": self.gguf.name})


def find_source(name: str) -> Source:
    """Tell a packaged model, a GGUF file, a directory and a hub id apart.

    Raises:
        DepthKVError: the file is missing or no GGUF, or the directory holds no model.
    """
    path = Path(name)
    if name in MODELS or path.is_file() or path.suffix == ".gguf":
        gguf = resolve_model(name)
        check_gguf(gguf)
        return Source(name, str(gguf.resolve().parent), gguf.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DepthKVError(f"model {name} has no config.json: give a Hugging Face model directory or a .gguf file")
    elif path.is_absolute() or name.startswith("."):
        ways = ", ".join(MODELS)
        raise DepthKVError(f"model {name} does not exist: give a directory, a hub id, a .gguf file or {ways}")
    return Source(name, name)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        DepthKVError: there is none, or it cannot be loaded.
    """
    with _one_line(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.repo, **source.arguments)


def load_model(source: Source, device: str, dtype: str) -> PreTrainedModel:
    """The model, in evaluation mode.

    Args:
        device: `cpu`, `cuda`, `mps`, `cuda:1` .., or `auto` to spread it over what there is (accelerate's device map).
        dtype: one of `DTYPES`.

    Raises:
        DepthKVError: it cannot be loaded, weights of it are missing, or the device is.
    """
    check_device(device)
    arguments = source.arguments | ({"device_map": "auto"} if device == "auto" else {})
    if source.gguf is not None:
        # where a kernel package is installed, transformers would leave the weights quantised
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    with _one_line(source, "model"):
        model, found = AutoModelForCausalLM.from_pretrained(
            source.repo, dtype=DTYPES[dtype], output_loading_info=True, **arguments
        )
        if missing := sorted(found["missing_keys"]):  # transformers draws random ones
            raise DepthKVError(
                f"the model of {source.name} is incomplete: weight {missing[0]} is missing, {len(missing)} in all; "
                "get it again"
            )
        return (model if device == "auto" else model.to(device)).eval()


def check_device(device: str) -> None:
    """Check that there is such a device.

    Raises:
        DepthKVError: there is none, or calibration does not know its kind.
    """
    match = re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", device)
    if match is None:
        raise DepthKVError(f"device {device} is not known: use cpu, cuda, cuda:1, mps, or auto for what there is")
    kind = match[1]
    here = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind in here and not here[kind]():
        raise DepthKVError(f"device {device} is not there: use cpu, or auto for what there is")


def fingerprint_weights(model: PreTrainedModel) -> str:
    """A hash of the configuration and of a few values of every parameter: enough to tell two models apart."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)]
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what transformers says besides errors, and its progress bars where standard error is no terminal."""
    verbosity = transformers_logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    transformers_logging.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    # some bars ask neither the library nor the terminal
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)


@contextlib.contextmanager
def _one_line(source: Source, what: str) -> Iterator[None]:
    try:
        with quiet():
            yield
    except DepthKVError:
        raise
    except Exception as error:  # whatever a damaged file makes the libraries below raise: some of it has no other base
        text = " ".join(str(error).split())[:240] or type(error).__name__
        raise DepthKVError(f"the {what} of {source.name} cannot be loaded: {text}") from None


def check_config(source: Source) -> None:
    """Check that this is a causal language model, as far as its configuration says.

    Raises:
        DepthKVError: it is not, or its configuration cannot be loaded.
    """
    with _one_line(source, "configuration"):
        config = AutoConfig.from_pretrained(source.repo, **source.arguments)
        embeds = source.gguf is None and cached_file(
            source.repo,
            "modules.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,  # what is needed of it is there already
        )
    if embeds:
        raise DepthKVError(
            f"calibration is not defined for {source.name}: it is an embedding model (it has a modules.json)"
        )
    name = (config.architectures or [config.model_type])[0]
    if config.is_encoder_decoder:
        raise DepthKVError(f"calibration is not defined for architecture {name}: it has an encoder")
    if not any(kind in name for kind in _WITH_HEAD) and config.architectures:
        raise DepthKVError(
            f"calibration is not defined for architecture {name}: it has no language-model head (an embedding model?)"
        )
