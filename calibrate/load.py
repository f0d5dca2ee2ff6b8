"""Load the model that is calibrated: a directory, a hub id, a GGUF file (dequantised) or a packaged model."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from depthkv_edge.errors import DepthKVError
from depthkv_edge.models import PACKAGED, check_gguf, resolve_model

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
        """Arguments of transformers' `from_pretrained`."""
        return {} if self.gguf is None else {"gguf_file": self.gguf.name}


def find_source(name: str) -> Source:
    """Tell a packaged model, a GGUF file, a directory and a hub id apart.

    Raises:
        DepthKVError: the file is missing or no GGUF, or the directory holds no causal language model.
    """
    path = Path(name)
    if name in PACKAGED or path.is_file() or path.suffix == ".gguf":
        gguf = resolve_model(name)
        check_gguf(gguf)
        return Source(name, str(gguf.resolve().parent), gguf.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DepthKVError(f"model {name} has no config.json: give a Hugging Face model directory or a .gguf file")
        if (path / "modules.json").is_file():
            raise DepthKVError(
                f"calibration is not defined for {name}: it is an embedding model (it has a modules.json)"
            )
    elif path.is_absolute() or name.startswith("."):
        ways = ", ".join(PACKAGED)
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
        DepthKVError: it cannot be loaded, it is no causal language model, or the device is missing.
    """
    check_device(device)
    with _one_line(source, "model"):
        _check_config(source)
        placement = {"device_map": "auto"} if device == "auto" else {}
        model = AutoModelForCausalLM.from_pretrained(source.repo, dtype=DTYPES[dtype], **source.arguments, **placement)
        return (model if device == "auto" else model.to(device)).eval()


def check_device(device: str) -> None:
    """Check that there is such a device.

    Raises:
        DepthKVError: there is none.
    """
    kind = device.split(":")[0]
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
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, TypeError) as error:
        text = " ".join(str(error).split())[:240] or type(error).__name__
        raise DepthKVError(f"the {what} of {source.name} cannot be loaded: {text}") from None


def _check_config(source: Source) -> None:
    config = AutoConfig.from_pretrained(source.repo, **source.arguments)
    name = (config.architectures or [config.model_type])[0]
    if config.is_encoder_decoder:
        raise DepthKVError(f"calibration is not defined for architecture {name}: it has an encoder")
    if not any(kind in name for kind in _WITH_HEAD) and config.architectures:
        raise DepthKVError(
            f"calibration is not defined for architecture {name}: it has no language-model head (an embedding model?)"
        )
