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
    moves = scores.reshape(frames, batch, size // 4, 4)
    bases, states = _best_path(moves, np.float32(stay))
    newest = _newest_base(moves, np.float32(stay))
    chosen = np.take_along_axis(newest, (states % 4)[:, :, None], axis=2)[:, :, 0].T
    return bases, _most_until_next(chosen, bases > 0)


def _entering(values: Floats) -> Floats:
    """Return, for each state, the values (batch, states) of the four states it may be entered from."""
    batch, states = values.shape
    by_predecessor = values.reshape(batch, 4, states // 4).transpose(0, 2, 1)  # batch, s // 4, j
    return np.repeat(by_predecessor, 4, axis=1)


def _leaving(values: Floats) -> Floats:
    """Sum values (batch, states, 4), which belong to moves into states, over the moves out of each state."""
    batch, states, _ = values.shape
    by_source = values.reshape(batch, states // 4, 4, 4).sum(axis=2)  # batch, s // 4, j
    return np.ascontiguousarray(by_source.transpose(0, 2, 1)).reshape(batch, states)


def _best_path(moves: Floats, stay: np.float32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Viterbi: bases (batch, frames), and the path's state after each frame (frames, batch)."""
    frames, batch, states, _ = moves.shape
    best = np.zeros((batch, states), np.float32)
    came = np.empty((frames, batch, states), np.int8)
    for t in range(frames):
        candidates = _entering(best) + moves[t]
        from_ = candidates.argmax(axis=2)
        moved = np.take_along_axis(candidates, from_[:, :, None], axis=2)[:, :, 0]
        stayed = best + stay
        came[t] = np.where(moved > stayed, from_, -1)
        best = np.maximum(moved, stayed)
        if t % RESCALE == 0:
            best -= best.max(axis=1, keepdims=True)
    state = best.argmax(axis=1)
    rows = np.arange(batch)
    bases = np.zeros((batch, frames), np.uint8)
    visited = np.empty((frames, batch), np.int64)
    for t in range(frames - 1, -1, -1):
        visited[t] = state
        j = came[t, rows, state].astype(np.int64)
        moved_here = j >= 0
        bases[:, t] = np.where(moved_here, state % 4 + 1, 0)
        state = np.where(moved_here, j * (states // 4) + state // 4, state)
    return bases, visited


def _newest_base(moves: Floats, stay: np.float32) -> Floats:
    """Forward-backward: probability of each newest base after each frame, shape (frames, batch, 4)."""
    frames, batch, states, _ = moves.shape
    top = np.maximum(moves.max(axis=(2, 3)), stay)[:, :, None]
    stays = np.exp(stay - top)
    forward = np.empty((frames, batch, states), np.float32)
    alpha = np.full((batch, states), 1.0 / states, np.float32)
    for t in range(frames):
        alpha = alpha * stays[t] + (_entering(alpha) * np.exp(moves[t] - top[t, :, :, None])).sum(axis=2)
        alpha /= alpha.sum(axis=1, keepdims=True)
        forward[t] = alpha
    newest = np.empty((frames, batch, 4), np.float32)
    beta = np.full((batch, states), 1.0 / states, np.float32)
    for t in range(frames - 1, -1, -1):
        shares = (forward[t] * beta).reshape(batch, states // 4, 4).sum(axis=1)
        newest[t] = shares / shares.sum(axis=1, keepdims=True)
        beta = beta * stays[t] + _leaving(beta[:, :, None] * np.exp(moves[t] - top[t, :, :, None]))
        beta /= beta.sum(axis=1, keepdims=True)
    return newest


def _most_until_next(values: Floats, starts: npt.NDArray[np.bool_]) -> Floats:
    """Take the highest of values (batch, frames) from each start to the next; 0 elsewhere than at starts."""
    out = np.zeros_like(values)
    for row in range(len(values)):
        places = np.flatnonzero(starts[row])
        if len(places):
            out[row, places] = np.maximum.reduceat(values[row], places)
    return out
