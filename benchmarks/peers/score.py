"""The metrics, for both environments: they see logits and tokens, whoever made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.peers.plan import Retrieval
from depthkv_edge.calibrate.divergence import divergence
from depthkv_edge.quality.metrics.log_prob import answer_log_prob
from depthkv_edge.quality.store import Record

_CHUNK = 128  # rows of logits at once: bounds the temporaries


def score_tail(full: torch.Tensor, pruned: torch.Tensor, tokens: Sequence[int]) -> Record:
    """How predictions differ from those of the full cache.

    Args:
        full, pruned: logits, or log-probabilities, [n, n_vocab] of what follows each token.
        tokens: [n]; the last one has no known next one, and is not scored.

    Returns:
        kl: nats, nll: nats of the true next token, top1: whether the most likely token is the same; [n - 1] each.
    """
    following = torch.tensor(tokens[1:], device=pruned.device)
    kl, nll, top1 = [], [], []
    for at in range(0, len(following), _CHUNK):
        rows = slice(at, min(at + _CHUNK, len(following)))
        p, q = full[rows].float(), pruned[rows].float()
        kl += divergence(p, q).tolist()
        nll += torch.nn.functional.cross_entropy(q, following[rows], reduction="none").tolist()
        top1 += (p.argmax(dim=-1) == q.argmax(dim=-1)).int().tolist()
    return {"kl": kl, "nll": nll, "top1": top1}


def ask(item: Retrieval, predict: Callable[[Sequence[int]], torch.Tensor]) -> Record:
    """Ask every question of the same cache.

    Args:
        predict: logits, or log-probabilities, [n, n_vocab] of what follows each token of a question and its answer.

    Returns:
        log_prob: summed, of each answer, in nats; exact: whether each of its tokens is the most likely one.
    """
    answers = []
    for question in item.questions:
        rows = predict(question.tokens)[-len(question.answer) - 1 : -1]
        answers.append(answer_log_prob(rows.float().log_softmax(dim=-1).cpu().numpy(), question.answer))
    return {"log_prob": [log_prob for log_prob, _ in answers], "exact": [exact for _, exact in answers]}
