"""Weighted k-means in numpy: k-means++ start, Lloyd's rounds; the same points and seed give the same centres.

Shapes: N points, D dimensions, K clusters.
"""

from dataclasses import dataclass

import numpy as np

from btm.corpus.randomness import hash_positions

_CHUNK_ENTRIES = 1 << 22
"""Distances held at a time."""
_START_POINTS_PER_CLUSTER = 64


@dataclass(frozen=True, slots=True)
class Clusters:
    """Result of :func:`kmeans`.

    Attributes:
        centres: float32 ``(K, D)``.
        inertia: Weighted sum of squared distances to the nearest centre.
        rounds: Rounds of Lloyd that ran.
    """

    centres: np.ndarray
    inertia: float
    rounds: int


def nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre of each point, of equally near ones the first.

    Args:
        points: ``(N, D)``.
        centres: ``(K, D)``.

    Returns:
        Centre of each point, int64 ``(N,)``, and its squared distance, float32 ``(N,)``.
    """
    points, centres = points.astype(np.float32, copy=False), centres.astype(np.float32, copy=False)
    found, distances = np.empty(len(points), dtype=np.int64), np.empty(len(points), dtype=np.float32)
    half_norms = 0.5 * np.einsum("kd,kd->k", centres, centres)
    rows = max(1, _CHUNK_ENTRIES // len(centres))
    for start in range(0, len(points), rows):
        part = points[start : start + rows]
        # Half the squared distance less what does not depend on the centre.
        scores = half_norms - part @ centres.T
        chosen = scores.argmin(axis=1)
        found[start : start + rows] = chosen
        # Anew from the difference: the expanded form loses the small distances to rounding.
        difference = part - centres[chosen]
        distances[start : start + rows] = np.einsum("nd,nd->n", difference, difference)
    return found, distances


def kmeans(
    points: np.ndarray,
    weights: np.ndarray,
    num_clusters: int,
    *,
    seed: int = 0,
    max_rounds: int = 50,
    tolerance: float = 1e-4,
) -> Clusters:
    """Minimise the weighted squared distance of points to their nearest centre.

    Starts from k-means++ (Arthur and Vassilvitskii 2007) and alternates assignment and mean (Lloyd 1982). A cluster
    that loses its points moves to the point that costs most.

    Args:
        points: Distinct points ``(N, D)``; where N is at most K, they are the centres.
        weights: How often each occurs, ``(N,)``, positive.
        num_clusters: K, at least 1.
        seed: Of the start.
        max_rounds: Rounds at most.
        tolerance: Ends when a round improves the inertia by less than this share.

    Raises:
        ValueError: If there are no points or no clusters.
    """
    if num_clusters < 1 or not len(points):
        raise ValueError(f"k-means needs points and clusters, got {len(points)} points and {num_clusters} clusters")
    points = points.astype(np.float32, copy=False)
    if len(points) <= num_clusters:
        return Clusters(points.copy(), 0.0, 0)
    centres, inertia, rounds = start_centres(points, weights, num_clusters, seed), np.inf, 0
    for rounds in range(1, max_rounds + 1):  # noqa: B007 (reported)
        assigned, distances = nearest(points, centres)
        costs = weights * distances.astype(np.float64)
        previous, inertia = inertia, float(costs.sum())
        if inertia == 0 or previous - inertia <= tolerance * inertia:
            break
        centres = _means(points, weights, assigned, costs, num_clusters)
    return Clusters(centres, float((weights * nearest(points, centres)[1].astype(np.float64)).sum()), rounds)


def start_centres(points: np.ndarray, weights: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """k-means++: each next centre is a point drawn with a chance that grows with its cost under the centres so far.

    Of more than 64 points per cluster every n-th is looked at.
    """
    stride = -(-len(points) // (_START_POINTS_PER_CLUSTER * num_clusters))
    points, weights = np.ascontiguousarray(points[::stride], dtype=np.float32), weights[::stride]
    norms = np.einsum("nd,nd->n", points, points)
    draws = hash_positions(seed, np.arange(num_clusters)).astype(np.float64) / 2.0**64
    centres = np.empty((num_clusters, points.shape[1]), dtype=np.float32)
    costs, distances = weights.astype(np.float64), np.full(len(points), np.inf, dtype=np.float32)
    for index, draw in enumerate(draws):
        sums = np.cumsum(costs)
        chosen = min(int(np.searchsorted(sums, draw * sums[-1], side="right")), len(points) - 1)
        centres[index] = points[chosen]
        found = norms + norms[chosen] - 2 * (points @ centres[index])
        np.minimum(distances, np.maximum(found, 0), out=distances)
        distances[chosen] = 0
        costs = weights * distances.astype(np.float64)
    return centres


def _means(
    points: np.ndarray, weights: np.ndarray, assigned: np.ndarray, costs: np.ndarray, num_clusters: int
) -> np.ndarray:
    mass = np.bincount(assigned, weights=weights, minlength=num_clusters)
    sums = np.stack(
        [np.bincount(assigned, weights=weights * column, minlength=num_clusters) for column in points.T], axis=1
    )
    empty = np.flatnonzero(mass == 0)
    centres = sums / np.maximum(mass, np.finfo(np.float64).tiny)[:, None]
    if len(empty):
        centres[empty] = points[np.argsort(-costs, kind="stable")[: len(empty)]]
    return centres.astype(np.float32)
