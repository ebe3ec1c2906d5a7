"""Exact decoding of a CRF over k-mer states: the most likely path, and how sure each base of it is.

A state is the last k bases, oldest first, as a number in base 4. At each frame the path stays in its state, or a base b
comes: state s then was entered from j·4^(k-1) + s // 4, where j is the base that left, and b = s % 4. The score of
staying is fixed. This is the model of bonito's CRF (nanoporetech/bonito, crf model; Silvestre-Ryan & Holmes 2021 for
the decoding); the network gives the scores of the moves.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
#: Frames between rescalings of the path scores, which only grow.
RESCALE = 64
#: See `decode`.
POWER = np.float32(0.4)


def decode(scores: Floats, stay: float) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Decode a batch.

    Args:
        scores: Of moves, shape (frames, batch, 4^(k+1)): for each state, the four states that it may be entered from.
        stay: Score of staying.

    Returns:
        Bases, uint8, shape (batch, frames): 0 where the best path stays, 1 to 4 (ACGT) where a base comes; and of each
        such place how sure the base is, 0 to 1; 0 where the path stays.

    How sure a base is, is what dorado takes its qscore from (nanoporetech/dorado, decode/beam_search.cpp), and what the
    line `qscore` of a model's config.toml is made for: the mean, until the next base comes, of p^0.4, where p is the
    probability of the path's state or one that comes right before or after it, over all paths.
    """
    frames, batch, size = scores.shape
    # By the base that left, the base that comes, read, and the bases between: what a frame adds up lies apart, in rows.
    moves = np.ascontiguousarray(scores.reshape(frames, batch, size // 16, 4, 4).transpose(0, 4, 3, 1, 2))
    bases, states = _best_path(moves, np.float32(stay))
    near = _probability_near(states, moves, np.float32(stay))
    return bases, _mean_until_next(near.T**POWER, bases > 0)


def _by_oldest(states: Floats) -> Floats:
    """Arrange states by their oldest base that were arranged by their newest one: (4, batch, rest) both."""
    _, batch, rest = states.shape
    return np.ascontiguousarray(states.transpose(1, 2, 0)).reshape(batch, 4, rest).transpose(1, 0, 2)


def _best_path(moves: Floats, stay: np.float32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Viterbi: bases (batch, frames), and the path's state after each frame (frames, batch)."""
    frames, _, _, batch, rest = moves.shape
    best = np.zeros((4, batch, rest), np.float32)
    before = np.empty((frames, 4, batch, rest), np.float32)
    for t in range(frames):
        before[t] = best
        moved = (_by_oldest(best)[:, None] + moves[t]).max(axis=0)
        best = np.maximum(moved, best + stay)
        if t % RESCALE == 0:
            best -= best.max(axis=(0, 2))[:, None]
    # Where the path came from is worked out again for the states on it alone.
    rows, left = np.arange(batch), np.arange(4)[:, None]
    state = best.transpose(1, 2, 0).reshape(batch, 4 * rest).argmax(axis=1)
    bases = np.zeros((batch, frames), np.uint8)
    states = np.empty((frames, batch), np.int64)
    for t in range(frames - 1, -1, -1):
        states[t] = state
        middle, newest = state // 4, state % 4
        sources = left * rest + middle
        candidates = before[t, sources % 4, rows, sources // 4] + moves[t, left, newest, rows, middle]
        base_left = candidates.argmax(axis=0)
        moved_here = candidates[base_left, rows] > before[t, newest, rows, middle] + stay
        bases[:, t] = np.where(moved_here, newest + 1, 0)
        state = np.where(moved_here, base_left * rest + middle, state)
    return bases, states


def _probability_near(states: npt.NDArray[np.int64], moves: Floats, stay: np.float32) -> Floats:
    """Forward-backward: after each frame, the probability of a state or one right before or after it. Overwrites moves.

    States and result have the shape (frames, batch).
    """
    frames, _, _, batch, rest = moves.shape
    top = np.maximum(moves.max(axis=(1, 2, 4)), stay)[:, :, None]
    stays = np.exp(stay - top)
    moves -= top[:, None, None]
    np.exp(moves, out=moves)
    forward = np.empty((frames, 4, batch, rest), np.float32)
    alpha = np.full((4, batch, rest), 1.0 / (4 * rest), np.float32)
    for t in range(frames):
        alpha = alpha * stays[t] + (_by_oldest(alpha)[:, None] * moves[t]).sum(axis=0)
        alpha /= alpha.sum(axis=(0, 2))[:, None]
        forward[t] = alpha
    near = np.empty((frames, batch), np.float32)
    rows, (neighbours, counts) = np.arange(batch), _neighbours(4 * rest)
    beta = np.full((4, batch, rest), 1.0 / (4 * rest), np.float32)
    for t in range(frames - 1, -1, -1):
        both = forward[t] * beta
        here = neighbours[states[t]].T
        near[t] = (both[here % 4, rows, here // 4] * counts[states[t]].T).sum(axis=0) / both.sum(axis=(0, 2))
        leaving = (beta * moves[t]).sum(axis=1)
        by_newest = leaving.transpose(1, 0, 2).reshape(batch, rest, 4).transpose(2, 0, 1)
        beta = beta * stays[t] + by_newest
        beta /= beta.sum(axis=(0, 2))[:, None]
    return np.minimum(near, np.float32(1))


@cache
def _neighbours(states: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return of each state itself and what comes right before or after it, nine in all, and 1 for new ones, else 0."""
    all_states, bases = np.arange(states)[:, None], np.arange(4)
    before, after = all_states // 4 + states // 4 * bases, all_states * 4 % states + bases
    neighbours = np.hstack((all_states, before, after))
    new = [[state not in row[:i] for i, state in enumerate(row)] for row in neighbours.tolist()]
    return neighbours, np.array(new, np.float32)


def _mean_until_next(values: Floats, starts: npt.NDArray[np.bool_]) -> Floats:
    """Take the mean of values (batch, frames) from each start to the next; 0 elsewhere than at starts."""
    out = np.zeros_like(values)
    for row in range(len(values)):
        places = np.flatnonzero(starts[row])
        if len(places):
            lengths = np.diff(places, append=values.shape[1])
            out[row, places] = np.add.reduceat(values[row], places) / lengths
    return out
