"""Guidance: the formula against closed forms, which forwards it asks for, and what a recipe says of it.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from motionloom.config import load_recipe
from motionloom.errors import UserError
from motionloom.flow import Guidance, Pass, Perturbation, Scales, Term, classifier_free, rescale
from motionloom.generate.guided import recipe_guidance

BLOCKS = (1, 3)
ALL = Guidance(
    3.0,
    skip=Term(1.5),
    skip_blocks=BLOCKS,
    cross=Term(2.5),
    conditions={"reference": Term(2.0), "first_frame": Term(0.5)},
)
NAMES = ("cond", "negative", "skip", "isolate", "without reference", "without first_frame")


def randn(*shape: int, key: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key), dtype=dtype)


def predictions(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: randn(2, 4, 3, key=k, dtype=dtype) for k, name in enumerate(NAMES)}


# --- the formula --------------------------------------------------------------------------------------------


def test_the_terms_add_up_as_written() -> None:
    p = predictions()
    c = p["cond"]
    expected = c + 2.0 * (c - p["negative"]) + 1.5 * (c - p["skip"]) + 1.5 * (c - p["isolate"])
    expected += 1.0 * (c - p["without reference"]) - 0.5 * (c - p["without first_frame"])
    torch.testing.assert_close(ALL.combine(p, 0.5), expected)


def test_text_alone_is_classifier_free_guidance_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p = predictions(dtype)
        for scale in (0.0, 0.1, 4.7):
            guided = classifier_free(p["cond"], p["negative"], scale)
            assert torch.equal(Guidance(scale).combine(p, 0.5), guided)
            again = Guidance(scale, 0.7).combine(p, 0.5)
            assert torch.equal(again, rescale(guided, p["cond"], 0.7))
            assert again.dtype == dtype
    p = predictions()
    torch.testing.assert_close(Guidance(0.0).combine(p, 0.5), p["negative"])


def test_what_is_off_returns_the_prediction_itself() -> None:
    c = randn(2, 4, 3, key=0)
    off = Guidance(1.0, 0.7, skip_blocks=BLOCKS, cross=Term(1.0), conditions={"mask": Term(1.0)})
    assert off.passes(0.5) == (Pass("cond"),)
    assert off.combine({"cond": c}, 0.5) is c
    late = Guidance(4.0, interval=(0.2, 0.8))
    assert [late.combine({"cond": c}, s) is c for s in (1.0, 0.81, 0.19, 0.0)] == [True] * 4
    with pytest.raises(KeyError, match="negative"):
        late.combine({"cond": c}, 0.2)


def gaussian_velocity(mean: float, std: float, sigma: float) -> Callable[[Tensor], Tensor]:
    """E[noise - clean | x] where clean is normal and x = (1 - sigma) clean + sigma noise."""
    spread = (1 - sigma) ** 2 * std**2 + sigma**2

    def velocity(x: Tensor) -> Tensor:
        off = x - (1 - sigma) * mean
        return sigma / spread * off - (mean + (1 - sigma) * std**2 / spread * off)

    return velocity


@pytest.mark.parametrize("sigma", [0.15, 0.6, 0.95])
def test_guided_velocities_follow_the_product_of_densities(sigma: float) -> None:
    """Scores add, so guiding by w away from a density divides by its w-th power; the reference's score is
    autograd's, of torch's own log densities."""
    kinds = dict(
        zip(NAMES, [(1.0, 0.3), (0.0, 1.0), (0.8, 0.5), (0.5, 0.6), (0.2, 0.7), (0.6, 0.9)], strict=True)
    )
    powers = dict(zip(NAMES, [1 + 2.0 + 1.5 + 1.5 + 1.0 - 0.5, -2.0, -1.5, -1.5, -1.0, 0.5], strict=True))
    x = torch.linspace(-3, 3, 13, dtype=torch.float64).reshape(1, 13, 1).requires_grad_()
    mean_K, std_K = torch.tensor(list(kinds.values()), dtype=torch.float64).T
    noisy = Normal((1 - sigma) * mean_K, ((1 - sigma) ** 2 * std_K**2 + sigma**2).sqrt())
    power_K = torch.tensor(list(powers.values()), dtype=torch.float64)
    (score,) = torch.autograd.grad((power_K * noisy.log_prob(x)).sum(), x)
    velocities = {name: gaussian_velocity(*kind, sigma)(x.detach()) for name, kind in kinds.items()}
    guided = ALL.combine(velocities, sigma)
    # noise = -sigma score, and x = (1 - sigma) clean + sigma noise.
    torch.testing.assert_close(guided, (-sigma * score - x.detach()) / (1 - sigma))


def test_a_condition_that_is_left_out_is_guided_like_a_text() -> None:
    """A linear network that adds up what it is shown: s on one condition shows it s times."""
    x, text, picture = (randn(2, 4, 3, key=k) for k in range(3))

    def network(text: Tensor, picture: Tensor | float) -> Tensor:
        return 0.3 * x + text + picture

    for scale in (0.0, 1.0, 2.5):
        shown = {"cond": network(text, picture), "without reference": network(text, 0.0)}
        found = Guidance(conditions={"reference": Term(scale)}).combine(shown, 0.5)
        torch.testing.assert_close(found, network(text, scale * picture))
        torch.testing.assert_close(found, classifier_free(*shown.values(), scale))


def test_the_rescaled_sum_has_the_deviation_of_the_prediction_over_what_is_made() -> None:
    p = predictions()
    made_BN = torch.tensor([[True, True, False, True], [False, True, True, False]])
    for one in p.values():
        one[~made_BN] = float("nan")
    full = Guidance(3.0, 1.0, skip=Term(1.5), skip_blocks=BLOCKS, conditions={"reference": Term(2.0)})
    guided = full.combine(p, 0.5, made_BN)
    for b in range(2):
        deviation = guided[b, made_BN[b]].std(correction=0)
        torch.testing.assert_close(deviation, p["cond"][b, made_BN[b]].std(correction=0))
    bare = Guidance(3.0, skip=Term(1.5), skip_blocks=BLOCKS, conditions={"reference": Term(2.0)})
    free = bare.combine(p, 0.5, made_BN)[made_BN]
    direction = guided[made_BN] / free
    assert direction.std() > 0.01  # a factor for each sample
    for b, count in enumerate(made_BN.sum(1).tolist()):
        part = direction[:3] if b == 0 else direction[3 : 3 + count]
        torch.testing.assert_close(part, part[:1, :1].expand_as(part))


def test_terms_are_summed_in_float32() -> None:
    exact = predictions()
    narrow = {name: one.bfloat16() for name, one in exact.items()}
    wide = {name: one.double() for name, one in narrow.items()}
    found = ALL.combine(narrow, 0.5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, ALL.combine({n: one.float() for n, one in wide.items()}, 0.5).bfloat16())


# --- which forwards -----------------------------------------------------------------------------------------


def test_passes_say_what_each_forward_is_shown() -> None:
    assert ALL.passes(0.5) == (
        Pass("cond"),
        Pass("negative", negative=True),
        Pass("skip", perturb=Perturbation(skip_self=BLOCKS)),
        Pass("isolate", perturb=Perturbation(isolate=True)),
        Pass("without reference", without="reference"),
        Pass("without first_frame", without="first_frame"),
    )
    assert Guidance().passes(0.3) == (Pass("cond"),)


def test_each_term_has_its_own_interval() -> None:
    guidance = Guidance(
        3.0,
        interval=(0.1, 0.4),
        skip=Term(1.0, (0.3, 0.8)),
        skip_blocks=BLOCKS,
        conditions={"reference": Term(2.0, (0.9, 1.0))},
    )

    def names(sigma: float | None) -> list[str]:
        return [one.name for one in guidance.passes(sigma)]

    assert [names(s) for s in (0.05, 0.1, 0.35, 0.5, 0.85, 1.0)] == [
        ["cond"],
        ["cond", "negative"],
        ["cond", "negative", "skip"],
        ["cond", "skip"],
        ["cond"],
        ["cond", "without reference"],
    ]
    assert names(None) == ["cond", "negative", "skip", "without reference"]
    p = predictions()
    torch.testing.assert_close(guidance.combine(p, 0.5), 2 * p["cond"] - p["skip"])


def test_sound_has_scales_of_its_own_and_shares_the_forwards() -> None:
    p = predictions()
    guidance = Guidance(3.0, audio=Scales(Term(7.0), cross=Term(2.0)))
    assert [one.name for one in guidance.passes(0.5)] == ["cond", "negative", "isolate"]
    torch.testing.assert_close(guidance.combine(p, 0.5), classifier_free(p["cond"], p["negative"], 3.0))
    heard = classifier_free(p["cond"], p["negative"], 7.0) + p["cond"] - p["isolate"]
    torch.testing.assert_close(guidance.combine(p, 0.5, modality="audio"), heard)
    same = Guidance(3.0)
    assert torch.equal(same.combine(p, 0.5, modality="audio"), same.combine(p, 0.5))


def test_a_request_pays_for_what_it_holds_alone() -> None:
    both = Guidance(
        3.0, cross=Term(2.0), conditions={"reference": Term(2.0), "mask": Term(3.0)}, audio=Scales(Term(7.0))
    )

    def names(*request: tuple[str, ...]) -> list[str]:
        return [one.name for one in both.restricted(*request).passes(0.5)]

    assert names(("video",), ("video",), ()) == ["cond", "negative"]
    assert names(("video", "audio"), ("video",), ("mask",)) == ["cond", "negative", "isolate", "without mask"]
    assert names(("video", "audio"), ("audio",), ("mask",)) == ["cond", "negative"]
    kept = both.restricted(("video", "audio"), ("video", "audio"), ("reference",))
    p = predictions()
    assert torch.equal(kept.combine(p, 0.5, modality="audio"), both.combine(p, 0.5, modality="audio"))
    quiet = Guidance(3.0, 0.5).restricted(("video",), ("video",), ())
    assert torch.equal(quiet.combine(p, 0.5), Guidance(3.0, 0.5).combine(p, 0.5))
    assert quiet.scale == 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guidance(-1.0), "scale"),
        (lambda: Guidance(float("nan")), "scale"),
        (lambda: Term(float("inf")), "scale"),
        (lambda: Guidance(rescale=1.5), "rescale"),
        (lambda: Guidance(interval=(0.8, 0.2)), "interval"),
        (lambda: Scales(rescale=-0.1), "rescale"),
        (lambda: Guidance(skip=Term(1.0)), "skip_blocks"),
        (lambda: Guidance(audio=Scales(skip=Term(1.0))), "skip_blocks"),
        (lambda: Guidance(skip=Term(1.0), skip_blocks=(-1,)), "count from 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# --- recipes ------------------------------------------------------------------------------------------------


def test_a_recipe_says_it_all() -> None:
    recipe = load_recipe(
        "quickstart",
        [
            "train.sample_cfg_scale=4",
            "train.sample_cfg_rescale=0.7",
            "train.sample_cfg_interval=[0.1, 0.9]",
            "guidance.skip_scale=1",
            "guidance.skip_blocks=[1, 3]",
            "guidance.cross_scale=3",
            "guidance.cross_interval=[0.5, 1]",
            "guidance.conditions=[{condition: reference, scale: 2, interval: [0, 0.5]}]",
        ],
    )
    text = Term(4.0, (0.1, 0.9))
    skip, cross, held = Term(1.0), Term(3.0, (0.5, 1.0)), {"reference": Term(2.0, (0.0, 0.5))}
    said = Guidance(4.0, 0.7, (0.1, 0.9), skip, BLOCKS, cross, held)
    assert recipe_guidance(recipe) == said
    assert recipe_guidance(recipe, 2.0).scale == 2.0
    heard = load_recipe(
        "quickstart", ["guidance.audio_scale=7", "guidance.audio_rescale=0.2", "guidance.cross_scale=3"]
    )
    assert recipe_guidance(heard).audio == Scales(Term(7.0), Term(0.0), Term(3.0), {}, 0.2)
    assert text.acts(0.1)


def test_what_recipes_held_before_still_loads() -> None:
    recipe = load_recipe("quickstart", ["train.sample_cfg_scale=4"])
    assert recipe_guidance(recipe) == Guidance(4.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guidance.skip_scale=1"], "list guidance.skip_blocks"),
        (["guidance.audio_skip_scale=1"], "list guidance.skip_blocks"),
        (["guidance.cross_interval=[0.5, 0.5]"], r"guidance\.cross_interval: .* low < high"),
        (["guidance.conditions=[{condition: reference, scale: 2, interval: [1, 0]}]"], "low < high"),
        (["guidance.conditions=[{condition: mask, scale: 2}, {condition: mask, scale: 3}]"], "twice"),
        (["guidance.conditions=[{condition: refrence, scale: 2}]"], "guidance.conditions"),
        (["guidance.conditions=[{condition: mask, scale: -2}]"], "guidance.conditions"),
        (["guidance.skip_scale=-1"], "guidance.skip_scale"),
        (["guidance.skip=1"], "guidance has skip_scale"),
    ],
)
def test_wrong_keys_are_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("quickstart", words)
    assert "\n" not in str(caught.value)
