"""Exact decoding of a CRF over k-mer states: the most likely path, and how sure each base of it is.

A state is the last k bases, oldest first, as a number in base 4. At each frame the path stays in its state, or a base b
comes: state s then was entered from j·4^(k-1) + s // 4, where j is the base that left, and b = s % 4. The score of
staying is fixed. This is the model of bonito's CRF (nanoporetech/bonito, crf model; Silvestre-Ryan & Holmes 2021 for
the decoding); the network gives the scores of the moves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
#: Frames between rescalings of the path scores, which only grow.
RESCALE = 64


def decode(scores: Floats, stay: float) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Decode a batch.

    Args:
        scores: Of moves, shape (frames, batch, 4^(k+1)): for each state, the four states that it may be entered from.
        stay: Score of staying.

    Returns:
        Bases, uint8, shape (batch, frames): 0 where the best path stays, 1 to 4 (ACGT) where a base comes; and of each
        such place the probability, over all paths, that the newest base is that one, the highest until the next base
        comes (at the border of two bases paths differ in when, not in what); 0 where the path stays.
    """
    frames, batch, size = scores.shape
    # By the base that left, the base that comes, read, and the bases between: what a frame adds up lies apart, in rows.
    moves = np.ascontiguousarray(scores.reshape(frames, batch, size // 16, 4, 4).transpose(0, 4, 3, 1, 2))
    bases, newest = _best_path(moves, np.float32(stay))
    sure = np.take_along_axis(_newest_base(moves, np.float32(stay)), newest[:, None], axis=1)[:, 0].T
    return bases, _most_until_next(sure, bases > 0)


def _by_oldest(states: Floats) -> Floats:
    """Arrange states by their oldest base that were arranged by their newest one: (4, batch, rest) both."""
    _, batch, rest = states.shape
    return np.ascontiguousarray(states.transpose(1, 2, 0)).reshape(batch, 4, rest).transpose(1, 0, 2)


def _best_path(moves: Floats, stay: np.float32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Viterbi: bases (batch, frames), and the newest base of the path's state after each frame (frames, batch)."""
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
    newest = np.empty((frames, batch), np.int64)
    for t in range(frames - 1, -1, -1):
        middle, newest[t] = state // 4, state % 4
        sources = left * rest + middle
        candidates = before[t, sources % 4, rows, sources // 4] + moves[t, left, newest[t], rows, middle]
        base_left = candidates.argmax(axis=0)
        moved_here = candidates[base_left, rows] > before[t, newest[t], rows, middle] + stay
        bases[:, t] = np.where(moved_here, newest[t] + 1, 0)
        state = np.where(moved_here, base_left * rest + middle, state)
    return bases, newest


def _newest_base(moves: Floats, stay: np.float32) -> Floats:
    """Forward-backward: probability of each newest base after each frame, (frames, 4, batch). Overwrites moves."""
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
    newest = np.empty((frames, 4, batch), np.float32)
    beta = np.full((4, batch, rest), 1.0 / (4 * rest), np.float32)
    for t in range(frames - 1, -1, -1):
        newest[t] = (forward[t] * beta).sum(axis=2)
        leaving = (beta * moves[t]).sum(axis=1)
        by_newest = leaving.transpose(1, 0, 2).reshape(batch, rest, 4).transpose(2, 0, 1)
        beta = beta * stays[t] + by_newest
        beta /= beta.sum(axis=(0, 2))[:, None]
    newest /= newest.sum(axis=1, keepdims=True)
    return newest


def _most_until_next(values: Floats, starts: npt.NDArray[np.bool_]) -> Floats:
    """Take the highest of values (batch, frames) from each start to the next; 0 elsewhere than at starts."""
    out = np.zeros_like(values)
    for row in range(len(values)):
        places = np.flatnonzero(starts[row])
        if len(places):
            out[row, places] = np.maximum.reduceat(values[row], places)
    return out
