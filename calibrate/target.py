"""The model that is calibrated: its parts, found by watching one forward pass, and refused if it cannot work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from depthkv_edge.calibrate.attention import NAME, AttentionCall, attend, observe
from depthkv_edge.errors import DepthKVError

_PROBE_TOKENS = 24
# largest difference of a logit, relative to the largest logit, that a rerun of some layers may make
_PROBE_TOLERANCE = {torch.float32: 1e-4}
_PROBE_TOLERANCE_HALF = 3e-2


@dataclass(frozen=True)
class Target:
    """A causal language model and its layers.

    Attributes:
        model: the whole model, on its devices, in evaluation mode.
        decoder: the part that maps tokens to hidden states.
        layers: decoder layers, by layer index.
        layer_ids: indices of the layers with a growing KV cache.
        tuples: whether a layer returns a tuple around its hidden states.
    """

    model: PreTrainedModel
    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    layer_ids: tuple[int, ...]
    tuples: bool

    @property
    def device(self) -> torch.device:
        """Where the tokens go."""
        return _input_device(self.model)

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def hidden(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Hidden states [n, n_embd] after the final norm, of tokens int64 [1, n] that follow what the cache holds."""
        return self.decoder(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own logits [n, n_vocab] of hidden states [n, n_embd], scaled and capped as the family does."""
        output = MoeModelOutputWithPast(last_hidden_state=hidden[None])  # every field that some family asks for
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        with _forward_of(self.decoder, lambda *args, **kwargs: output):
            return self.model(input_ids=tokens, use_cache=False).logits[0]

    @contextlib.contextmanager
    def starting_at(self, index: int, hidden: torch.Tensor) -> Iterator[None]:
        """Skip the layers below `index`: that layer gets `hidden` [1, n, n_embd] as its input."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers[:index]:
                stack.enter_context(_forward_of(layer, lambda *args, **kwargs: (hidden,) if self.tuples else hidden))
            yield


def _input_device(model: PreTrainedModel) -> torch.device:
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate moves the tokens


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate keeps its own there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def layer_inputs(layers: tuple[nn.Module, ...]) -> Iterator[list[torch.Tensor]]:
    """The hidden states [1, n, n_embd] that enter each layer, once a forward pass has run in the block."""
    inputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def inspect_model(model: PreTrainedModel) -> Target:
    """Find the layers of a model, and check on a few tokens that they can be pruned and rerun one by one.

    Raises:
        DepthKVError: calibration is not defined for the architecture; the message names it and says why.
    """
    config = model.config.get_text_config()
    name = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]

    def refuse(why: str) -> DepthKVError:
        return DepthKVError(f"calibration is not defined for architecture {name}: {why}")

    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse("it has an encoder")
    if model.get_output_embeddings() is None:
        raise refuse("it has no language-model head (an embedding model?)")
    if not getattr(config, "is_causal", True):
        raise refuse("its attention is not causal")
    if getattr(config, "kv_lora_rank", None):
        raise refuse("its keys and values are compressed together (MLA)")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        raise refuse("ALiBi biases depend on every cached position")
    with _refusing(refuse, "its attention cannot be observed"):
        model.set_attn_implementation(NAME)

    model.eval().requires_grad_(False)
    decoder = model.get_decoder()
    cache = DynamicCache(config=model.config)
    calls: dict[int, list[nn.Module]] = {}
    n_cells: dict[int, int] = {}

    def record(call: AttentionCall) -> torch.Tensor:
        calls.setdefault(call.layer, []).append(call.module)
        n_cells[call.layer] = call.key.shape[2]
        return attend(call)

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(1000, config.vocab_size), (1, _PROBE_TOKENS), generator=generator)
    tokens = tokens.to(_input_device(model))
    with torch.inference_mode(), observe(record):
        with _refusing(refuse, "it does not run with a KV cache"):
            reference = decoder(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state

    n_layers = config.num_hidden_layers
    if not calls and all(type(layer) is DynamicLayer for layer in cache.layers):
        raise refuse("it does not use transformers' attention interface, so its attention cannot be observed")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise refuse(f"a layer keeps its state in a {type(layer).__name__}, not in KV cells of its own")
    if sorted(calls) != list(range(n_layers)) or any(len(modules) != 1 for modules in calls.values()):
        raise refuse(f"attention ran {sum(map(len, calls.values()))} times in {n_layers} layers, not once in each")
    growing = tuple(i for i in range(n_layers) if type(cache.layers[i]) is DynamicLayer)
    if not growing:
        raise refuse("all of its layers have a sliding window, their cache is bounded already")
    if any(n_cells[i] != _PROBE_TOKENS for i in growing):
        raise refuse("a layer does not keep every token")
    layers = _decoder_layers(decoder, [calls[i][0] for i in range(n_layers)])
    if layers is None:
        raise refuse("its attention modules are not inside one list of layers")

    with _refusing(refuse, "its layers cannot be run again one by one"):
        target = Target(model, decoder, layers, growing, _returns_tuples(layers[0], decoder, tokens))
        _check_rerun(target, tokens, reference[0])
    return target


@contextlib.contextmanager
def _refusing(refuse: Callable[[str], DepthKVError], what: str) -> Iterator[None]:
    """Refuse by name, whatever a model raises when it runs in a way that its authors may not have thought of."""
    try:
        yield
    except DepthKVError as error:
        raise refuse(str(error)) from None
    except Exception as error:
        raise refuse(f"{what} ({_one_line(error)})") from None


def _decoder_layers(decoder: nn.Module, attentions: list[nn.Module]) -> tuple[nn.Module, ...] | None:
    for candidate in decoder.modules():
        if isinstance(candidate, nn.ModuleList) and len(candidate) >= len(attentions):
            layers = tuple(candidate)[: len(attentions)]
            if all(any(m is a for m in layer.modules()) for layer, a in zip(layers, attentions, strict=True)):
                return layers
    return None


def _returns_tuples(layer: nn.Module, decoder: nn.Module, tokens: torch.Tensor) -> bool:
    kinds: list[bool] = []
    handle = layer.register_forward_hook(lambda module, args, output: kinds.append(isinstance(output, tuple)))
    try:
        with torch.inference_mode():
            decoder(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return kinds[0]


def _check_rerun(target: Target, tokens: torch.Tensor, reference: torch.Tensor) -> None:
    """A rerun from some layer on must give what a whole pass gives: nothing may travel beside the hidden states.

    Raises:
        DepthKVError: it does not; the message says why, and does not name the model.
    """
    with torch.inference_mode():
        with layer_inputs(target.layers) as inputs:
            target.hidden(tokens, target.new_cache())
        if len(inputs) != len(target.layers) or any(x.shape[:2] != tokens.shape for x in inputs):
            raise DepthKVError("its layers do not pass on one hidden state for each token")
        full = target.logits(reference)
        if full.isnan().any():
            raise DepthKVError("its logits are not numbers; try --dtype float32, or check its weights")
        tolerance = _PROBE_TOLERANCE.get(full.dtype, _PROBE_TOLERANCE_HALF) * float(full.abs().max())
        for index in {0, len(inputs) // 2, len(inputs) - 1}:
            with target.starting_at(index, inputs[index]):
                rerun = target.logits(target.hidden(tokens, target.new_cache()))
            if not float((rerun - full).abs().max()) <= tolerance:
                raise DepthKVError(f"a rerun from layer {index} on does not give the same logits")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
