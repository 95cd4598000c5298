"""divergence: how far what one model says is from what another does, token by token.

The *teacher* is the model before quantizing. Of what it says of a token, its most likely ones are
kept and all others' mass together, so that no other variant needs it again. What ``compare`` makes
of that is the Kullback-Leibler divergence of two distributions in which those others are one event:
it is never more than that of the whole ones, and the same where all tokens are kept.
"""

from __future__ import annotations

from typing import NamedTuple

from tasks.tensors import mx

ROWS = 64  # tokens that are worked on at once


class TopPredictions(NamedTuple):
    """What is kept of a teacher's predictions of some tokens.

    Attributes:
        ids: its most likely next tokens, (tokens, count), uint32.
        logits: theirs, (tokens, count), in the model's dtype.
        rest: the logarithm of the sum of the exponentials of all others, (tokens,), float32.
        loss: of the token that does come next, its negative log-likelihood, (tokens,), float32.
    """

    ids: mx.array
    logits: mx.array
    rest: mx.array
    loss: mx.array


class Comparison(NamedTuple):
    """How another model predicts them.

    Attributes:
        loss: as the teacher's.
        divergence: Kullback-Leibler divergence from the teacher, nats, (tokens,), float32.
        agrees: whether the most likely token is the teacher's, (tokens,), uint8.
    """

    loss: mx.array
    divergence: mx.array
    agrees: mx.array


def top_predictions(logits: mx.array, following: mx.array, count: int) -> TopPredictions:
    """Return what is kept of what a teacher says.

    Args:
        logits: (tokens, vocabulary).
        following: the tokens that come next, (tokens,).
        count: how many of the most likely are kept.
    """
    parts = []
    for start in range(0, len(logits), ROWS):
        block, ids = logits[start:][:ROWS], following[start:][:ROWS]
        wide = block.astype(mx.float32)
        best = _best(wide, count)
        logits_of_best = mx.take_along_axis(block, best, -1)
        part = TopPredictions(best, logits_of_best, _rest(wide, best), _loss(wide, ids))
        mx.eval(part)
        parts.append(part)
    return TopPredictions(*(mx.concatenate([*part]) for part in zip(*parts, strict=True)))


def compare(logits: mx.array, following: mx.array, teacher: TopPredictions) -> Comparison:
    """Return what another model says, beside the teacher.

    Args:
        logits: (tokens, vocabulary).
        following: the tokens that come next, (tokens,).
        teacher: what it says of the same tokens.
    """
    parts = []
    for start in range(0, len(logits), ROWS):
        wide = logits[start:][:ROWS].astype(mx.float32)
        ids, best, rest, _ = (part[start:][:ROWS] for part in teacher)
        own = mx.take_along_axis(wide, ids, -1)
        teacher_shares = _log_shares(best.astype(mx.float32), rest)
        own_shares = _log_shares(own, _rest(wide, ids))
        weighted = mx.exp(teacher_shares) * (teacher_shares - own_shares)
        terms = mx.where(teacher_shares == -mx.inf, 0, weighted)
        agrees = own[:, 0] == mx.max(wide, axis=-1)
        part = Comparison(
            _loss(wide, following[start:][:ROWS]), mx.sum(terms, axis=-1), agrees.astype(mx.uint8)
        )
        mx.eval(part)
        parts.append(part)
    return Comparison(*(mx.concatenate([*part]) for part in zip(*parts, strict=True)))


def _best(wide: mx.array, count: int) -> mx.array:
    """Return the ids of the highest logits, the highest first, (tokens, count)."""
    if count < wide.shape[-1]:
        ids = mx.argpartition(-wide, count - 1, axis=-1)[:, :count]
    else:
        ids = mx.broadcast_to(mx.arange(count, dtype=mx.uint32), wide.shape)
    order = mx.argsort(-mx.take_along_axis(wide, ids, -1), axis=-1)
    return mx.take_along_axis(ids, order, -1).astype(mx.uint32)


def _rest(wide: mx.array, ids: mx.array) -> mx.array:
    """Return the logarithm of the mass of all tokens but ``ids``, (tokens,)."""
    return mx.logsumexp(mx.put_along_axis(wide, ids, mx.array(-mx.inf), axis=-1), axis=-1)


def _loss(wide: mx.array, following: mx.array) -> mx.array:
    """Return negative log-likelihoods, as ``mlx.nn.losses.cross_entropy`` computes them."""
    score = mx.take_along_axis(wide, following[:, None], -1).squeeze(-1)
    return mx.logsumexp(wide, axis=-1) - score


def _log_shares(logits: mx.array, rest: mx.array) -> mx.array:
    """Return log-probabilities of tokens, and of all others as the last: (tokens, count + 1)."""
    every = mx.concatenate([logits, rest[:, None]], axis=-1)
    return every - mx.logsumexp(every, axis=-1, keepdims=True)


class ModelQuality(NamedTuple):
    """How good a model is.

    Attributes:
        tokens: how many were predicted.
        perplexity: of the model.
        teacher_perplexity: of the teacher.
        mean: of the divergence, nats; the next are of the same.
        median: half of the tokens have less.
        percentile_95: 95 % have less.
        percentile_99: 99 % have less.
        maximum: of any token.
        agreement: part of the tokens of which the most likely next is the teacher's.
    """

    tokens: int
    perplexity: float
    teacher_perplexity: float
    mean: float
    median: float
    percentile_95: float
    percentile_99: float
    maximum: float
    agreement: float

    @classmethod
    def of(cls, loss: bytes, teacher_loss: bytes, divergence: bytes, agrees: bytes) -> ModelQuality:
        """Return what the bytes of vectors say, one number a token."""
        import numpy as np

        own, theirs, nats = (
            np.frombuffer(data, np.float32).astype(np.float64)
            for data in (loss, teacher_loss, divergence)
        )
        median, percentile_95, percentile_99 = np.quantile(nats, (0.5, 0.95, 0.99)).tolist()
        return cls(
            own.size,
            float(np.exp(own.mean())),
            float(np.exp(theirs.mean())),
            float(nats.mean()),
            median,
            percentile_95,
            percentile_99,
            float(nats.max()),
            float(np.frombuffer(agrees, np.uint8).mean()),
        )

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f}, of the teacher {self.teacher_perplexity:.4f}; "
            f"KL divergence mean {self.mean:.5f}, median {self.median:.5f}, "
            f"95 % {self.percentile_95:.5f}, 99 % {self.percentile_99:.5f}, "
            f"max {self.maximum:.4f}; same top token {100 * self.agreement:.2f} %; "
            f"{self.tokens:,} tokens"
        )
