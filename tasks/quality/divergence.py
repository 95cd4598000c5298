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


class Said(NamedTuple):
    """What a teacher says of some tokens.

    Attributes:
        ids: its most likely next tokens, (tokens, kept), uint32.
        logits: theirs, (tokens, kept), in the model's dtype.
        rest: the logarithm of the sum of the exponentials of all others, (tokens,), float32.
        loss: of the token that does come next, its negative log-likelihood, (tokens,), float32.
    """

    ids: mx.array
    logits: mx.array
    rest: mx.array
    loss: mx.array


class Compared(NamedTuple):
    """What another model says of them.

    Attributes:
        loss: as the teacher's.
        divergence: Kullback-Leibler divergence from the teacher, nats, (tokens,), float32.
        agrees: whether the most likely token is the teacher's, (tokens,), uint8.
    """

    loss: mx.array
    divergence: mx.array
    agrees: mx.array


def say(logits: mx.array, following: mx.array, kept: int) -> Said:
    """Return what a teacher says.

    Args:
        logits: (tokens, vocabulary).
        following: the tokens that come next, (tokens,).
        kept: how many of the most likely are kept.
    """
    parts = []
    for start in range(0, len(logits), ROWS):
        block, ids = logits[start:][:ROWS], following[start:][:ROWS]
        wide = block.astype(mx.float32)
        best = _best(wide, kept)
        said = Said(best, mx.take_along_axis(block, best, -1), _rest(wide, best), _loss(wide, ids))
        mx.eval(said)
        parts.append(said)
    return Said(*(mx.concatenate([*part]) for part in zip(*parts, strict=True)))


def compare(logits: mx.array, following: mx.array, teacher: Said) -> Compared:
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
        expected = _log_shares(best.astype(mx.float32), rest)
        found = _log_shares(own, _rest(wide, ids))
        terms = mx.where(expected == -mx.inf, 0, mx.exp(expected) * (expected - found))
        agrees = own[:, 0] == mx.max(wide, axis=-1)
        compared = Compared(
            _loss(wide, following[start:][:ROWS]), mx.sum(terms, axis=-1), agrees.astype(mx.uint8)
        )
        mx.eval(compared)
        parts.append(compared)
    return Compared(*(mx.concatenate([*part]) for part in zip(*parts, strict=True)))


def _best(wide: mx.array, kept: int) -> mx.array:
    """Return the ids of the highest logits, the highest first, (tokens, kept)."""
    if kept < wide.shape[-1]:
        ids = mx.argpartition(-wide, kept - 1, axis=-1)[:, :kept]
    else:
        ids = mx.broadcast_to(mx.arange(kept, dtype=mx.uint32), wide.shape)
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
    """Return the log-probabilities of tokens, and of all others as the last: (tokens, kept + 1)."""
    every = mx.concatenate([logits, rest[:, None]], axis=-1)
    return every - mx.logsumexp(every, axis=-1, keepdims=True)


class Quality(NamedTuple):
    """How good a model is.

    Attributes:
        tokens: how many were predicted.
        perplexity: of the model.
        teacher_perplexity: of the teacher.
        mean: of the divergence, nats; the next are of the same.
        median: half of the tokens have less.
        high: 95 % have less.
        higher: 99 % have less.
        most: of any token.
        agreement: part of the tokens of which the most likely next is the teacher's.
    """

    tokens: int
    perplexity: float
    teacher_perplexity: float
    mean: float
    median: float
    high: float
    higher: float
    most: float
    agreement: float

    @classmethod
    def of(cls, loss: bytes, teacher_loss: bytes, divergence: bytes, agrees: bytes) -> Quality:
        """Return what the bytes of vectors say, one number a token."""
        import numpy as np

        own, theirs, nats = (
            np.frombuffer(data, np.float32).astype(np.float64)
            for data in (loss, teacher_loss, divergence)
        )
        median, high, higher, most = np.quantile(nats, (0.5, 0.95, 0.99, 1.0)).tolist()
        return cls(
            own.size,
            float(np.exp(own.mean())),
            float(np.exp(theirs.mean())),
            float(nats.mean()),
            median,
            high,
            higher,
            most,
            float(np.frombuffer(agrees, np.uint8).mean()),
        )

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f}, of the teacher {self.teacher_perplexity:.4f}; "
            f"KL divergence mean {self.mean:.5f}, median {self.median:.5f}, 95 % {self.high:.5f}, "
            f"99 % {self.higher:.5f}, max {self.most:.4f}; same top token "
            f"{100 * self.agreement:.2f} %; {self.tokens:,} tokens"
        )
