"""The slow way: numpy, sorting, one entry at a time."""

import numpy as np


def keep_largest(scores, k):
    """The k largest, the earlier of equals; NaN lowest, -0.0 equal to 0.0."""
    flat = np.asarray(scores, np.float64).reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-np.nan_to_num(flat[i], nan=-np.inf,
                   posinf=np.inf, neginf=-1e300), i))  # fmt: skip
    mask = np.zeros(flat.size, bool)
    mask[order[: int(k)]] = True
    return mask.reshape(np.shape(scores))


def n_of_m(scores, n, m):
    """n of every m along the first of two axes."""
    out = np.zeros(scores.shape, bool)
    for g in range(0, scores.shape[0], m):
        for j in range(scores.shape[1]):
            out[g : g + m, j] = keep_largest(scores[g : g + m, j], n)
    return out
