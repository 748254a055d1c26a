import numpy as np
import pytest

from btm.corpus.images.kmeans import kmeans, nearest, start_centres


def points_of(seed, count=500, dimensions=5):
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)


def brute_force(points, centres):
    """The obvious way, in float64."""
    found = []
    for point in points.astype(np.float64):
        distances = [((point - centre) ** 2).sum() for centre in centres.astype(np.float64)]
        found.append((int(np.argmin(distances)), min(distances)))
    return np.array([index for index, _ in found]), np.array([distance for _, distance in found])


def lloyd(points, centres, rounds):
    """The obvious way on repeated points, in float64."""
    centres = centres.astype(np.float64)
    for _ in range(rounds):
        assigned, _ = brute_force(points, centres)
        centres = np.stack([points[assigned == index].mean(0) for index in range(len(centres))])
    return centres


@pytest.mark.parametrize("num_centres", [1, 3, 40])
def test_nearest_is_the_brute_force_one(num_centres):
    points, centres = points_of(0), points_of(1, num_centres)
    found, distances = nearest(points, centres)
    expected, expected_distances = brute_force(points, centres)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5, atol=1e-6)


def test_of_equally_near_centres_the_first():
    centres = np.array([[1.0], [-1.0], [1.0]], dtype=np.float32)
    assert nearest(np.array([[0.0], [1.0]], dtype=np.float32), centres)[0].tolist() == [0, 0]


@pytest.mark.parametrize("rounds", [1, 3])
def test_weighted_rounds_equal_lloyd_on_repeated_points(rounds):
    points = points_of(2, 120)
    weights = np.random.default_rng(3).integers(1, 5, size=len(points))
    start = start_centres(points, weights.astype(np.float64), 7, seed=5)
    found = kmeans(points, weights.astype(np.float64), 7, seed=5, max_rounds=rounds, tolerance=0)
    expected = lloyd(np.repeat(points, weights, axis=0).astype(np.float64), start, rounds)
    np.testing.assert_allclose(found.centres, expected, atol=1e-5)
    inertia = (weights * brute_force(points, found.centres)[1]).sum()
    assert found.inertia == pytest.approx(inertia, rel=1e-5)


def test_separated_clusters_are_found():
    truth = 100 * points_of(4, 12, 6)
    points = np.concatenate([centre + 0.01 * points_of(index, 30, 6) for index, centre in enumerate(truth)])
    found = kmeans(points, np.ones(len(points)), 12, seed=0)
    assert brute_force(truth, found.centres)[1].max() < 0.01


def test_inertia_falls_with_rounds_and_with_clusters():
    points, weights = points_of(6), np.ones(500)
    by_rounds = [kmeans(points, weights, 10, max_rounds=rounds, tolerance=0).inertia for rounds in (1, 2, 4, 8, 30)]
    assert by_rounds == sorted(by_rounds, reverse=True)
    by_clusters = [kmeans(points, weights, clusters).inertia for clusters in (1, 2, 5, 20, 100)]
    assert by_clusters == sorted(by_clusters, reverse=True)


def test_same_seed_same_centres():
    points, weights = points_of(7), np.ones(500)
    first = kmeans(points, weights, 20, seed=1)
    np.testing.assert_array_equal(first.centres, kmeans(points, weights, 20, seed=1).centres)
    assert not np.array_equal(first.centres, kmeans(points, weights, 20, seed=2).centres)


def test_start_takes_distinct_points_and_far_ones():
    points = np.concatenate([np.zeros((180, 2)), np.full((1, 2), 1000.0), np.full((1, 2), -1000.0)]).astype(np.float32)
    centres = start_centres(points, np.ones(len(points)), 3, seed=0)
    assert {tuple(row) for row in centres.tolist()} == {(0, 0), (1000, 1000), (-1000, -1000)}


def test_an_empty_cluster_moves_to_the_costliest_point(monkeypatch):
    points = np.array([[0.0], [1.0], [50.0]], dtype=np.float32)
    start = np.array([[0.0], [1000.0]], dtype=np.float32)
    monkeypatch.setattr("btm.corpus.images.kmeans.start_centres", lambda *_: start)
    assert sorted(kmeans(points, np.ones(3), 2).centres[:, 0].tolist()) == [0.5, 50.0]


def test_few_points_are_the_centres():
    points = points_of(8, 4)
    found = kmeans(points, np.ones(4), 9)
    np.testing.assert_array_equal(found.centres, points)
    assert found.inertia == 0


@pytest.mark.parametrize(("count", "clusters"), [(0, 3), (5, 0)])
def test_nothing_to_do_is_an_error(count, clusters):
    with pytest.raises(ValueError, match=rf"got {count} points and {clusters} clusters"):
        kmeans(points_of(9, count), np.ones(count), clusters)
