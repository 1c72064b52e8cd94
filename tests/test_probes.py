"""Probes on embeddings whose truth is known: they find what is there, no more, and do not peek."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from motionloom.errors import UserError
from motionloom.evals.probes import (
    Labelled,
    class_embeddings,
    class_names,
    knn,
    linear_probe,
    retrieval,
    zero_shot,
    zero_shot_part,
)
from motionloom.rng import numpy_rng


def gaussians(count: int, key: int, apart: float = 2.0, width: int = 12) -> Labelled:
    """Two classes that differ in one number of many: at -apart/2 and apart/2, deviation 1."""
    rng = numpy_rng("probe tests", key)
    which = rng.integers(0, 2, count)
    x = rng.standard_normal((count, width))
    x[:, 3] += (which - 0.5) * apart
    return Labelled(x, [("cat", "dog")[n] for n in which])


# Linear probe


def test_the_probe_reaches_what_no_classifier_can_exceed() -> None:
    found = linear_probe(gaussians(800, 0), gaussians(2000, 1))
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # of known Gaussians: Phi(apart / 2)
    assert found.accuracy == pytest.approx(best, abs=0.03)
    assert found.chance == pytest.approx(0.5, abs=0.03)
    assert found.details["trained_on"] == 800
    assert found.details["classes"] == 2


def test_it_is_linear() -> None:
    rng = numpy_rng("probe tests, xor")
    x = rng.standard_normal((600, 2))
    both = Labelled(x, ((x[:, 0] > 0) ^ (x[:, 1] > 0)).tolist())
    assert linear_probe(both, both).accuracy < 0.7
    one = Labelled(x, (x[:, 0] > 0).tolist())
    assert linear_probe(one, one).accuracy > 0.98


def test_scale_offset_and_numbers_that_never_change_do_not_matter() -> None:
    train, test = gaussians(300, 2, apart=4.0), gaussians(300, 3, apart=4.0)

    def other(part: Labelled) -> Labelled:
        same = np.full((len(part.x_ND), 2), 7.0)
        return Labelled(np.concatenate([1e-3 * part.x_ND + 5.0, same], axis=1), part.labels)

    plain, moved = linear_probe(train, test), linear_probe(other(train), other(test))
    assert moved.accuracy == pytest.approx(plain.accuracy, abs=0.02)
    assert plain.accuracy > 0.95


def test_nothing_is_chosen_on_the_test_clips_and_all_is_repeatable() -> None:
    train, test = gaussians(200, 4), gaussians(100, 5)
    found = linear_probe(train, test)
    assert linear_probe(train, test) == found
    # Other test clips, wrongly labelled: the same settings, and the same answers for the clips that stay.
    wrong = Labelled(test.x_ND[:40], ["cat"] * 40)
    peeked = linear_probe(train, wrong)
    assert peeked.details == found.details
    assert peeked.said == found.said[:40]
    assert found.details["chosen_on"] == pytest.approx(40, abs=1)


def test_a_class_of_one_clip_is_learned_from_and_never_held_back() -> None:
    part = gaussians(60, 6, apart=6.0)
    far = np.full((1, 12), 9.0)
    train = Labelled(np.concatenate([part.x_ND, far]), [*part.labels, "bird"])
    found = linear_probe(train, Labelled(far, ["bird"]))
    assert found.accuracy == 1
    assert found.details["classes"] == 3


def test_what_cannot_be_learned_from_is_refused() -> None:
    part = gaussians(10, 7)
    for probe in (linear_probe, lambda a, b: knn(a, b, k=3)):
        with pytest.raises(UserError, match="one class"):
            probe(Labelled(part.x_ND, ["cat"] * 10), part)
        with pytest.raises(UserError, match="10 clips are 10 classes of 1 clip each"):
            probe(Labelled(part.x_ND, list(range(10))), part)
        with pytest.raises(UserError, match="no training clip has it"):
            probe(part, Labelled(part.x_ND[:1], ["fish"]))
        bad = part.x_ND.copy()
        bad[2, 3] = np.nan
        with pytest.raises(UserError, match="1 embeddings are NaN"):
            probe(Labelled(bad, part.labels), part)
    with pytest.raises(UserError, match="no clip"):
        class_names([])


# Nearest neighbours


def test_near_neighbours_outvote_more_of_them_further_away() -> None:
    angles = np.array([0.0, 0.5, 0.55, 3.0])
    train = Labelled(np.stack([np.cos(angles), np.sin(angles)], 1), ["a", "b", "b", "a"])
    test = Labelled(np.array([[3.0, 0.0]]), ["a"])  # its length does not count
    assert knn(train, test, k=3).accuracy == 1
    # exp(1 / t) < exp(cos .5 / t) + exp(cos .55 / t) once the temperature is high.
    assert knn(train, test, k=3, temperature=1.0).accuracy == 0
    assert knn(train, test, k=3).details["k"] == 3
    with pytest.raises(UserError, match="--k 5: there are only 4 training clips"):
        knn(train, test, k=5)


def test_neighbours_tell_classes_apart() -> None:
    # Cosines need clusters in different directions.
    found = knn(gaussians(200, 8, apart=40.0), gaussians(100, 9, apart=40.0))
    assert found.accuracy == 1


@pytest.mark.parametrize("shares", [(20, 20), (30, 10), (11, 9)])
def test_embeddings_that_have_collapsed_tell_no_label(shares: tuple[int, int]) -> None:
    """Not even which class is the commonest, which needs no embedding."""
    said = ["cat"] * shares[0] + ["dog"] * shares[1]
    rng = numpy_rng("collapsed", *shares)
    rng.shuffle(said)
    for point in (np.full((len(said), 12), 0.3), np.zeros((len(said), 3)), rng.standard_normal(5)[None]):
        train = Labelled(np.broadcast_to(point, (len(said), point.shape[1])), said)
        assert linear_probe(train, train).accuracy == 0
        for k in (1, 5, len(said)):
            assert knn(train, train, k=k).accuracy == 0


def test_tied_votes_are_wrong_and_so_are_those_that_hang_on_the_order() -> None:
    east, north = [1.0, 0.0], [0.0, 1.0]
    test = Labelled(np.array([east]), ["a"])

    def right(x: list[list[float]], labels: str, k: int) -> bool:
        return knn(Labelled(np.array(x), list(labels)), test, k=k).right[0]

    assert not right([east, east, north, north], "abab", 2)
    # Three are equally near, two of them vote: whether "a" wins depends on which.
    assert not right([east, east, east, north], "aabb", 2)
    assert not right([east, east, east, north], "baab", 2)
    assert right([east, east, east, north], "aaab", 2)
    assert right([east, east, east, north], "aabb", 3)


def test_votes_without_ties_are_those_of_the_nearest_written_out() -> None:
    train, test = gaussians(150, 10), gaussians(60, 11)
    found = knn(train, test, k=7)
    x, y = (part.x_ND / np.linalg.norm(part.x_ND, axis=1, keepdims=True) for part in (train, test))
    for said, right, label, cosines in zip(found.said, found.right, test.labels, y @ x.T, strict=True):
        votes = {"cat": 0.0, "dog": 0.0}
        for n in np.argsort(-cosines)[:7]:
            votes[str(train.labels[n])] += math.exp(cosines[n] / 0.07)
        answer = max(votes, key=votes.__getitem__)
        assert (("cat", "dog")[said], right) == (answer, answer == label)


# Words


def unit(*vector: float) -> np.ndarray:
    x = np.array(vector)
    return x / np.linalg.norm(x)


def test_wordings_count_equally_whatever_their_length() -> None:
    table = {"a cat": (3.0, 0.0), "cat": (0.0, 1.0), "a dog": (0.0, 2.0), "dog": (0.0, -1.0)}

    def embed(texts):
        return np.array([table[text] for text in texts])

    found = class_embeddings([["a cat", "cat"]], embed, batch=1)
    assert found[0] == pytest.approx(unit(1.0, 1.0), abs=1e-6)
    assert np.linalg.norm(found, axis=1) == pytest.approx([1.0])
    with pytest.raises(UserError, match="empty wording"):
        class_embeddings([["a cat", " "]], embed)


def test_zero_shot_takes_the_nearest_and_a_tie_is_wrong() -> None:
    classes = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    clips = np.array([[5.0, 1.0], [0.1, 0.2], [2.0, 2.0], [-1.0, 0.1]])
    found = zero_shot(clips, classes, [0, 1, 0, 1])
    assert found.right == (True, True, False, False)
    assert found.said[3] == 2
    assert found.chance == pytest.approx(1 / 3)
    collapsed = np.ones((4, 2))
    assert zero_shot(collapsed, np.ones((3, 2)), [0, 1, 2, 0]).accuracy == 0
    # Of a part the nearest class with it counts, and a tie is wrong as well.
    shape = ["disc", "disc", "star"]
    assert zero_shot_part(clips, classes, [0, 1, 0, 1], shape) == (True, True, True, False)
    assert zero_shot_part(clips, classes, [0, 1, 0, 1], ["x", "y", "x"]) == (True, True, False, False)
    assert zero_shot_part(collapsed, np.ones((3, 2)), [0, 1, 2, 0], shape) == (False,) * 4
    with pytest.raises(UserError, match="one class alone"):
        zero_shot(clips, classes[:1], [0, 0, 0, 0])


def test_retrieval_counts_every_clip_of_a_caption() -> None:
    texts = np.eye(3)
    clips = np.array([[1.0, 0.1, 0.0], [0.9, 0.0, 1.0], [0.0, 1.0, 0.2], [0.0, 0.3, 1.0]])
    to_text, to_clip = retrieval(clips, texts, [0, 0, 1, 2])
    # The second clip is nearer to the third caption than to its own.
    assert [one[1] for one in to_text.right] == [True, False, True, True]
    assert to_text.recall(5) == 1
    assert [one[1] for one in to_clip.right] == [True, True, True]
    collapsed, back = retrieval(np.ones((4, 3)), np.ones((3, 3)), [0, 0, 1, 2])
    assert collapsed.recall(1) == back.recall(1) == 0
    with pytest.raises(UserError, match="one caption"):
        retrieval(clips, texts[:1], [0, 0, 0, 0])


def test_the_chance_of_retrieval_is_that_of_all_orders() -> None:
    owner = [0, 0, 0, 1, 2, 2]
    to_text, to_clip = retrieval(np.ones((6, 3)), np.ones((3, 3)), owner)
    orders = list(permutations(owner))
    for k in (1, 5):
        found = np.mean([[caption in order[:k] for caption in range(3)] for order in orders])
        assert to_clip.chance[k] == pytest.approx(found)
    assert to_text.chance == pytest.approx({1: 1 / 3, 5: 1.0, 10: 1.0})
