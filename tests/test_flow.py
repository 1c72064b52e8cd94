"""Diffusion maths against closed forms.

The world of most tests is a Gaussian, clean ~ N(mean, std^2) elementwise. On any path x ~ N(a mean, V) with
V = a^2 std^2 + s^2, so that with z = (x - a mean) / V
  E[clean | x] = mean + a std^2 z,  E[noise | x] = s z,  E[v | x] = a' E[clean | x] + s' E[noise | x],
and the probability flow keeps (x - a mean) / sqrt(V): noise x_1 ends at exactly mean + std x_1.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from motionloom.errors import UserError
from motionloom.flow import (
    COSINE,
    LINEAR,
    PATHS,
    SOLVERS,
    WEIGHTINGS,
    DiscretePrediction,
    DiscreteSchedule,
    Guidance,
    TimeSampling,
    alpha_bar_to_sigma,
    broadcast_sigma,
    classifier_free,
    consistency,
    convert,
    ddim,
    delta_to_scale,
    dpmpp_2m,
    euler,
    flip_time,
    from_pair,
    heun,
    rescale,
    shift_sigma,
    sigma_schedule,
    sigma_to_alpha_bar,
    state_norm,
    to_pair,
    warped_steps,
)
from motionloom.rng import torch_generator

MEAN = torch.tensor([1.5, -0.7, 0.0], dtype=torch.float64)
STD = torch.tensor([0.3, 0.8, 2.0], dtype=torch.float64)
KINDS = ("velocity", "clean", "noise", "v")
both_paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def randn(*shape, key=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch_generator("test_flow", key), dtype=dtype)


def unit_noise(n=4000):
    """(n, 3) draws of mean exactly 0 and deviation exactly 1: what is left is the solver's error."""
    noise = randn(n, 3)
    return (noise - noise.mean(0)) / noise.std(0)


def bits(x):
    """The raw bits, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def grid(sigmas):
    return torch.as_tensor(sigmas, dtype=torch.float64)


def posterior(x, a, s):
    z = (x - a * MEAN) / (a**2 * STD**2 + s**2)
    return MEAN + a * STD**2 * z, s * z


def exact_velocity(path):
    def velocity(x, sigma):
        a, s, da, ds = path.coefficients(grid(sigma))
        clean, noise = posterior(x, a, s)
        return da * clean + ds * noise

    return velocity


def exact_state(path, z, sigma):
    a, s, _, _ = path.coefficients(grid(sigma))
    return a * MEAN + (a**2 * STD**2 + s**2).sqrt() * z


def assert_reaches_target(x, tolerance):
    assert (x.mean(0) - MEAN).abs().max() < tolerance
    assert (x.std(0) - STD).abs().max() < tolerance


# paths


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mix_returns_the_very_bits_at_both_ends(path, dtype):
    clean, noise = randn(2, 3, 4, key=1).to(dtype), randn(2, 3, 4, key=2).to(dtype)
    clean[0, 0, 0], noise[0, 0, 0], noise[1, 2, 1] = -0.0, math.nan, -0.0
    sigma_BN = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.25, 1.0]])
    x = path.mix(clean, noise, sigma_BN)
    assert x.dtype == dtype
    assert torch.equal(bits(x[:, 0]), bits(clean[:, 0]))
    assert torch.equal(bits(x[:, 2]), bits(noise[:, 2]))
    assert not torch.equal(x[:, 1], clean[:, 1])
    assert torch.equal(bits(path.mix(clean, noise, 0.0)), bits(clean))


@both_paths
def test_a_context_token_leaves_bit_identical_whatever_the_network_said(path):
    x = randn(1, 2, 3, dtype=torch.float32)
    v = torch.full_like(x, math.nan)
    assert torch.equal(path.to_clean(x, v, torch.tensor([[0.0, 0.5]]))[:, 0], x[:, 0])
    assert torch.equal(path.to_noise(x, v, torch.tensor([[0.5, 1.0]]))[:, 1], x[:, 1])


@both_paths
def test_velocity_is_the_derivative_of_mix(path):
    clean, noise = randn(5, key=1), randn(5, key=2)
    for sigma in (0.1, 0.5, 0.93):
        slope = (path.mix(clean, noise, sigma + 1e-5) - path.mix(clean, noise, sigma - 1e-5)) / 2e-5
        torch.testing.assert_close(path.velocity(clean, noise, sigma), slope, rtol=0, atol=1e-8)


def test_linear_velocity_is_noise_minus_clean():
    clean, noise = randn(4, key=1), randn(4, key=2)
    assert torch.equal(LINEAR.velocity(clean, noise, 0.3), noise - clean)


def test_path_coefficients_follow_their_formulas_and_are_exact_at_the_ends():
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    a, s, _, _ = COSINE.coefficients(sigma)
    torch.testing.assert_close(a, torch.cos(math.pi / 2 * sigma))
    torch.testing.assert_close(s, torch.sin(math.pi / 2 * sigma))
    for path in PATHS.values():
        for dtype in (torch.float32, torch.float64):
            a, s, _, _ = path.coefficients(torch.tensor([0.0, 1.0], dtype=dtype))
            assert a.tolist() == [1.0, 0.0]
            assert s.tolist() == [0.0, 1.0]


@both_paths
def test_state_and_velocity_give_the_pair_back_at_every_grid_sigma(path):
    sigma_B = torch.linspace(0, 1, 1001, dtype=torch.float64)
    clean, noise = randn(1001, 4, key=1), randn(1001, 4, key=2)
    x, v = path.mix(clean, noise, sigma_B), path.velocity(clean, noise, sigma_B)
    torch.testing.assert_close(path.to_clean(x, v, sigma_B), clean, rtol=0, atol=1e-14)
    torch.testing.assert_close(path.to_noise(x, v, sigma_B), noise, rtol=0, atol=1e-14)


def test_sigma_lines_up_with_leading_dims_only():
    x = randn(2, 3, 4)
    assert broadcast_sigma(torch.rand(2, generator=torch_generator(0)), x).shape == (2, 1, 1)
    assert broadcast_sigma(torch.rand(2, 3, generator=torch_generator(0)), x).shape == (2, 3, 1)
    per_sample = LINEAR.mix(x, -x, torch.tensor([0.5, 0.25]))
    assert torch.equal(per_sample, LINEAR.mix(x, -x, torch.tensor([[0.5] * 3, [0.25] * 3])))
    assert torch.equal(per_sample[1], LINEAR.mix(x, -x, 0.25)[1])
    with pytest.raises(AssertionError, match="against x"):
        LINEAR.mix(x, -x, torch.rand(4, generator=torch_generator(0)))


def test_bfloat16_is_rounded_once_after_float32_arithmetic():
    clean, noise = randn(64, key=1).bfloat16(), randn(64, key=2).bfloat16()
    expected = (1 - 0.3) * clean.float() + 0.3 * noise.float()
    assert torch.equal(LINEAR.mix(clean, noise, 0.3), expected.bfloat16())
    assert LINEAR.to_clean(clean, noise, 0.3).dtype == torch.bfloat16
    # A float32 sigma that bfloat16 cannot hold must not be rounded to it.
    assert not torch.equal(LINEAR.mix(clean, noise, 0.3), LINEAR.mix(clean, noise, 0.30078125))


# times


def test_shift_values_and_its_inverse():
    assert shift_sigma(0.5, 3.0) == 0.75
    assert shift_sigma(0.0, 5.0) == 0.0
    assert shift_sigma(1.0, 5.0) == 1.0
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 8.0), 1 / 8.0), sigma)


def test_shifting_a_clock_on_which_1_is_data_is_the_inverse_shift_of_sigma():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    data_clock = shift_sigma(flip_time(sigma), 0.3)
    torch.testing.assert_close(flip_time(data_clock), shift_sigma(sigma, 1 / 0.3))


def test_warped_steps_are_the_published_lists():
    assert [round(1000 * s, 1) for s in warped_steps((1000, 750, 500, 250, 0), 5)] == [
        1000,
        937.5,
        833.3,
        625,
        0,
    ]
    assert [round(1000 * s, 1) for s in warped_steps((1000, 750, 500, 250), 8)] == [1000, 960, 888.9, 727.3]
    assert warped_steps((757, 522, 0), 1) == (0.757, 0.522, 0.0)


def test_sigma_schedule_falls_from_max_to_exactly_zero():
    for steps, shift, low, high in [
        (1, 1, 0, 1),
        (7, 5, 0, 1),
        (50, 0.3, 0, 0.9),
        (4, 3, 0.02, 0.98),
        (1, 2, 0.1, 1),
    ]:
        sigmas = sigma_schedule(steps, shift, min=low, max=high)
        assert sigmas.shape == (steps + 1,)
        assert sigmas.dtype == torch.float32
        assert (sigmas.diff() < 0).all()
        assert sigmas[0] == torch.tensor(float(high))
        assert sigmas[-1] == 0
        if low > 0 and steps > 1:
            torch.testing.assert_close(sigmas[-2].item(), low)
    torch.testing.assert_close(
        sigma_schedule(4, 5.0)[:4], torch.tensor(warped_steps((1000, 750, 500, 250), 5))
    )


def test_uniform_draws_fill_their_limits():
    sigma = TimeSampling(min=0.2, max=0.6).sample(20_000, torch_generator(0))
    assert sigma.dtype == torch.float32
    assert 0.2 <= sigma.min() < 0.2005
    assert 0.5995 < sigma.max() <= 0.6
    for q in (0.1, 0.5, 0.9):
        assert abs(sigma.quantile(q) - (0.2 + 0.4 * q)) < 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_draws_have_the_quantiles_of_their_law(shift):
    law = TimeSampling("logit_normal", mean=0.5, std=1.25, shift=shift)
    sigma = law.sample(20_000, torch_generator(0))
    for z, q in [(-1.2816, 0.1), (0.0, 0.5), (1.2816, 0.9)]:
        expected = shift_sigma(1 / (1 + math.exp(-(0.5 + 1.25 * z))), shift)
        assert abs(sigma.quantile(q) - expected) < 0.01
        assert law.cdf(expected) == pytest.approx(q, abs=1e-4)


def test_shift_of_a_logit_normal_is_a_shift_of_its_mean():
    shifted = TimeSampling("logit_normal", shift=math.exp(2.05)).sample(100, torch_generator(0))
    moved = TimeSampling("logit_normal", mean=2.05).sample(100, torch_generator(0))
    torch.testing.assert_close(shifted, moved)


def test_limits_truncate_without_atoms_or_clamp_with_them():
    law = TimeSampling(shift=5.0, min=0.02, max=0.98)
    truncated = law.sample(20_000, torch_generator(0))
    clamped = replace(law, limits="clamp").sample(20_000, torch_generator(0))
    for sigma in (truncated, clamped):
        assert sigma.min() >= torch.tensor(0.02)
        assert sigma.max() <= torch.tensor(0.98)
    assert (truncated == truncated.max()).float().mean() < 0.001
    # u > 0.907 is warped past 0.98.
    assert (clamped == clamped.max()).float().mean().item() == pytest.approx(1 - law.cdf(0.98), abs=0.01)
    median = shift_sigma((law.cdf(0.02) + law.cdf(0.98)) / 2, 5.0)
    torch.testing.assert_close(truncated.quantile(0.5).item(), median, rtol=0, atol=0.01)


def test_stratified_draws_hit_every_part_once_in_random_order():
    law = TimeSampling(stratified=True)
    sigma_BN = law.sample((64, 3), torch_generator(0))
    parts = (sigma_BN * 64).floor()
    assert torch.equal(parts.sort(0).values, torch.arange(64.0)[:, None].expand(64, 3))
    assert not torch.equal(parts[:, 0], parts[:, 1])
    assert not torch.equal(parts[:, 0], parts[:, 0].sort().values)
    spread = torch.stack([law.sample(16, torch_generator(i)).mean() for i in range(50)]).std()
    free = torch.stack([TimeSampling().sample(16, torch_generator(i)).mean() for i in range(50)]).std()
    assert spread < free / 5


def test_draws_depend_on_the_generator_alone():
    law = TimeSampling("logit_normal", stratified=True)
    assert torch.equal(law.sample(8, torch_generator("a")), law.sample((8,), torch_generator("a")))
    assert not torch.equal(law.sample(8, torch_generator("a")), law.sample(8, torch_generator("b")))


@pytest.mark.parametrize(
    "build, word",
    [
        (lambda: TimeSampling("lognormal"), "lognormal"),
        (lambda: TimeSampling(limits="cut"), "cut"),
        (lambda: TimeSampling(std=0.0), "std"),
        (lambda: TimeSampling(shift=-1.0), "shift"),
        (lambda: TimeSampling(min=0.5, max=0.5), "min"),
        (lambda: TimeSampling("logit_normal", mean=8.0, std=0.1, max=0.5), "mass"),
        (lambda: sigma_schedule(0), "steps"),
        (lambda: sigma_schedule(4, shift=0.0), "shift"),
        (lambda: sigma_schedule(4, min=0.5, max=0.2), "min"),
        (lambda: DiscreteSchedule("quadratic"), "quadratic"),
        (lambda: DiscreteSchedule("linear", beta_start=0.1, beta_end=0.01), "beta_start"),
        (lambda: DiscreteSchedule(steps=1), "steps"),
        (lambda: DiscreteSchedule().grid(0), "steps"),
        (lambda: DiscretePrediction(DiscreteSchedule(), "epsilon"), "epsilon"),
        (lambda: DiscretePrediction(DiscreteSchedule(zero_terminal_snr=True), "noise"), "zero_terminal_snr"),
        (lambda: Guidance(scale=-1.0), "scale"),
        (lambda: Guidance(rescale=1.5), "rescale"),
        (lambda: Guidance(interval=(0.8, 0.2)), "interval"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_clear_line(build, word):
    with pytest.raises(UserError, match=word) as caught:
        build()
    assert "\n" not in str(caught.value)


# conversions


@both_paths
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_conversions_invert_each_other_wherever_they_can(path, source, target):
    sigma_B = torch.linspace(0, 1, 1001, dtype=torch.float64)
    if "clean" in (source, target):
        sigma_B = sigma_B[1:]  # at 0 a clean prediction says nothing about the noise
    if "noise" in (source, target):
        sigma_B = sigma_B[:-1]  # at 1 a noise prediction says nothing about the data
    clean, noise = randn(len(sigma_B), 4, key=1), randn(len(sigma_B), 4, key=2)
    x = path.mix(clean, noise, sigma_B)
    said, expected = (from_pair(kind, clean, noise, sigma_B, path) for kind in (source, target))
    converted = convert(said, x, sigma_B, source, target, path)
    torch.testing.assert_close(converted, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(convert(converted, x, sigma_B, target, source, path), said, rtol=0, atol=1e-11)


def test_conversions_on_the_linear_path_are_the_textbook_formulas():
    clean, noise = randn(4, key=1), randn(4, key=2)
    x, n = 0.7 * clean + 0.3 * noise, math.hypot(0.7, 0.3)
    v_salimans = 0.7 / n * noise - 0.3 / n * clean
    torch.testing.assert_close(from_pair("v", clean, noise, 0.3), v_salimans)
    torch.testing.assert_close(convert(noise, x, 0.3, "noise", "velocity"), (noise - x) / 0.7)
    torch.testing.assert_close(convert(clean, x, 0.3, "clean", "velocity"), (x - clean) / 0.3)


@both_paths
def test_the_half_that_a_prediction_cannot_say_is_zero_with_a_finite_gradient(path):
    x = randn(2, 4).requires_grad_()
    clean, noise = to_pair("noise", x, x, torch.tensor([1.0, 0.5]), path)
    assert torch.equal(clean[0], torch.zeros(4, dtype=x.dtype))
    (clean.sum() + noise.sum()).backward()
    assert x.grad.isfinite().all()
    assert torch.equal(to_pair("clean", x, x, 0.0, path)[1], torch.zeros_like(x))


@both_paths
def test_alpha_bar_and_sigma_hold_the_same_signal_to_noise_ratio(path):
    alpha_bar = torch.cat([torch.logspace(-12, -0.001, 50, dtype=torch.float64), grid([0.0, 1.0])])
    sigma = alpha_bar_to_sigma(alpha_bar, path)
    assert sigma[-2:].tolist() == [1.0, 0.0]
    torch.testing.assert_close(sigma_to_alpha_bar(sigma, path), alpha_bar, rtol=1e-9, atol=1e-15)
    a, s, _, _ = path.coefficients(sigma)
    torch.testing.assert_close(a**2 * (1 - alpha_bar), s**2 * alpha_bar, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(state_norm(sigma, path), (a**2 + s**2).sqrt())


# discrete schedules

SCHEDULES = [
    DiscreteSchedule("cosine"),
    DiscreteSchedule("linear"),
    DiscreteSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012),
    DiscreteSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True),
]


def test_alpha_bar_tables_match_their_formulas():
    cosine, linear = DiscreteSchedule("cosine").alpha_bar(), DiscreteSchedule("linear").alpha_bar()
    assert cosine.dtype == torch.float64

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert cosine[0].item() == pytest.approx(f(1) / f(0), rel=1e-12)
    assert cosine[499].item() == pytest.approx(f(500) / f(0), rel=1e-10)
    assert cosine[999].item() == pytest.approx(2.4e-9, rel=0.02)  # the clip at 0.999 decides the last step
    assert linear[0].item() == pytest.approx(1 - 1e-4, rel=1e-12)
    assert linear[999].item() == pytest.approx(4.04e-5, rel=0.01)
    scaled = SCHEDULES[2].alpha_bar()
    assert (1 - scaled[1] / scaled[0]).sqrt().item() == pytest.approx(
        math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) / 999, rel=1e-9
    )
    assert scaled[999].item() == pytest.approx(0.0047, rel=0.02)


def test_zero_terminal_snr_empties_the_last_step_and_keeps_the_first():
    plain, zero = SCHEDULES[2].alpha_bar(), SCHEDULES[3].alpha_bar()
    assert zero[-1] == 0
    assert zero[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    assert (zero.diff() < 0).all()
    assert SCHEDULES[3].sigma(torch.tensor(999)) == 1
    assert SCHEDULES[2].sigma(torch.tensor(999)) < 1
    assert SCHEDULES[3].grid(10)[0] == 1


@both_paths
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["cosine", "linear", "scaled_linear", "zero_snr"])
def test_timesteps_and_sigmas_invert_each_other(schedule, path):
    t = torch.arange(1000, dtype=torch.float64)
    sigma = schedule.sigma(t, path)
    assert torch.equal(sigma, alpha_bar_to_sigma(schedule.alpha_bar(), path))
    assert torch.equal(schedule.timestep(sigma, path), t)
    between = t[:-1] + 0.25
    torch.testing.assert_close(schedule.timestep(schedule.sigma(between, path), path), between)
    in_float32 = schedule.timestep(schedule.sigma(t.long(), path), path)
    torch.testing.assert_close(in_float32.double(), t, rtol=0, atol=1e-2)
    ends = schedule.timestep(torch.tensor([[0.0], [1.0]]), path)
    assert ends.tolist() == [[0.0], [999.0]]


def test_grid_visits_integer_timesteps_only():
    schedule = DiscreteSchedule("linear")
    sigmas = schedule.grid(20)
    t = schedule.timestep(sigmas[:-1])
    assert sigmas.shape == (21,)
    assert sigmas[-1] == 0
    assert (t - t.round()).abs().max() < 1e-2
    assert t[0] == 999
    assert t[-1] == 0


def test_ddpm_draws_are_uniform_over_the_table():
    schedule = DiscreteSchedule("cosine", steps=10)
    sigma = schedule.sample((5000,), torch_generator(0))
    counts = torch.bincount(schedule.timestep(sigma).round().long(), minlength=10)
    assert counts.min() > 400
    assert len(sigma.unique()) == 10


@both_paths
def test_a_ddpm_network_is_fed_and_taught_what_ddpm_would(path):
    schedule = DiscreteSchedule("linear")
    t = torch.tensor([[0, 250], [700, 999]])
    clean, noise = randn(2, 2, 5, key=1), randn(2, 2, 5, key=2)
    root, rest = (schedule.alpha_bar()[t][..., None]).sqrt(), (1 - schedule.alpha_bar()[t][..., None]).sqrt()
    sigma_BN = schedule.sigma(t.double(), path)
    x = path.mix(clean, noise, sigma_BN)
    for kind, target in [("noise", noise), ("clean", clean), ("v", root * noise - rest * clean)]:
        network = DiscretePrediction(schedule, kind, path)
        x_vp, t_in = network.inputs(x, sigma_BN)
        torch.testing.assert_close(x_vp, root * clean + rest * noise)
        torch.testing.assert_close(t_in, t.double())
        torch.testing.assert_close(network.target(clean, noise, sigma_BN), target)
        torch.testing.assert_close(
            network.velocity(target, x, sigma_BN), path.velocity(clean, noise, sigma_BN), rtol=0, atol=1e-9
        )


@both_paths
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_through_the_conversions_is_ddim_in_its_own_coordinates(path, eta):
    schedule, steps = DiscreteSchedule("linear"), 12

    def network(x_vp, t):
        return torch.tanh(x_vp + t[:, None] / 1000)

    t = torch.linspace(999, 0, steps, dtype=torch.float64).round().long()
    alpha_bar = torch.cat([schedule.alpha_bar()[t], grid([1.0])]).tolist()
    x_vp, draws = randn(6, 4), torch_generator("ddim")
    start = schedule.start(x_vp, path)
    for i in range(steps):
        now, after = alpha_bar[i], alpha_bar[i + 1]
        eps = network(x_vp, t[i].expand(6).double())
        clean = (x_vp - math.sqrt(1 - now) * eps) / math.sqrt(now)
        tau = eta * math.sqrt((1 - after) / (1 - now)) * math.sqrt(1 - now / after)
        x_vp = math.sqrt(after) * clean + math.sqrt(1 - after - tau**2) * eps
        if tau > 0:
            x_vp = x_vp + tau * torch.randn(6, 4, generator=draws, dtype=torch.float64)
    ours = ddim(
        DiscretePrediction(schedule, "noise", path).velocity_fn(network),
        start,
        torch.cat([schedule.sigma(t.double(), path), grid([0.0])]),
        path=path,
        eta=eta,
        generator=torch_generator("ddim"),
    )
    torch.testing.assert_close(ours, x_vp, rtol=1e-9, atol=1e-9)


@both_paths
@pytest.mark.parametrize(
    "schedule, kind",
    [(SCHEDULES[0], "noise"), (SCHEDULES[1], "noise"), (SCHEDULES[2], "v"), (SCHEDULES[3], "v")],
    ids=["cosine-noise", "linear-noise", "scaled_linear-v", "zero_snr-v"],
)
def test_exact_ddpm_networks_sample_the_target_through_flow_solvers(path, schedule, kind):
    table = schedule.alpha_bar()

    def network(x_vp, t):
        assert t.shape == (len(x_vp),)
        alpha_bar = table[t.round().long()][:, None]
        root, rest = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        clean, noise = posterior(x_vp, root, rest)
        return noise if kind == "noise" else root * noise - rest * clean

    velocity = DiscretePrediction(schedule, kind, path).velocity_fn(network)
    start = schedule.start(unit_noise(), path)
    # DDPM starts from N(0, 1), not from its own last marginal: in scaled_linear that holds 7 % of the data.
    tolerance = 0.05 if schedule == SCHEDULES[2] else 0.025
    for solver, steps in [(dpmpp_2m, 80), (ddim, 200)]:
        assert_reaches_target(solver(velocity, start, schedule.grid(steps, path), path=path), tolerance)


# weights


@both_paths
def test_weights_turn_the_velocity_loss_into_the_loss_they_name(path):
    sigma_B = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    clean, noise, answer = (randn(99, 8, key=key) for key in (1, 2, 3))
    x, v = path.mix(clean, noise, sigma_B), path.velocity(clean, noise, sigma_B)
    loss = (answer - v).square().mean(1)
    clean_loss = (path.to_clean(x, answer, sigma_B) - clean).square().mean(1)
    noise_loss = (path.to_noise(x, answer, sigma_B) - noise).square().mean(1)
    a, s, _, _ = path.coefficients(sigma_B)
    snr = (a / s) ** 2
    for weight, expected in [
        (WEIGHTINGS["uniform"](sigma_B), loss),
        (WEIGHTINGS["sigma_squared"](sigma_B, path=path), clean_loss),
        (WEIGHTINGS["noise_equivalent"](sigma_B, path=path), noise_loss),
        (WEIGHTINGS["min_snr"](sigma_B, gamma=5.0, path=path), snr.clamp(max=5.0) * clean_loss),
        (WEIGHTINGS["min_snr"](sigma_B, gamma=5.0, path=path), snr.clamp(max=5.0) / snr * noise_loss),
    ]:
        torch.testing.assert_close(weight * loss, expected)


def test_sd3_densities_integrate_to_one_and_match_their_laws():
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for density in (partial(WEIGHTINGS["logit_normal"], mean=-0.5, std=1.25), WEIGHTINGS["cosmap"]):
        assert density(u).mean().item() == pytest.approx(1, abs=1e-3)
    normal = torch.distributions.Normal(torch.tensor(-0.5, dtype=torch.float64), 1.25)
    law = torch.distributions.TransformedDistribution(normal, torch.distributions.SigmoidTransform())
    inner = u[500:-500]
    torch.testing.assert_close(
        WEIGHTINGS["logit_normal"](inner, mean=-0.5, std=1.25), law.log_prob(inner).exp()
    )
    # cosmap is where a uniform angle of the cosine path lands on the linear path.
    angle = u * math.pi / 2
    sigma = LINEAR.sigma_of(torch.cos(angle), torch.sin(angle))
    mass_below = (u[None] <= sigma[::1000, None]).double() @ WEIGHTINGS["cosmap"](u) / 20_000
    torch.testing.assert_close(mass_below, u[::1000], rtol=0, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_bell_is_the_scheduler_table(shift):
    t = torch.tensor([1000 * warped_steps((1000 - i,), shift)[0] for i in range(1000)], dtype=torch.float64)
    y = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    table = (y - y.min()) * 1000 / (y - y.min()).sum()
    torch.testing.assert_close(WEIGHTINGS["bell"](t / 1000, shift=shift), table)
    assert table.argmax() == (t - 500).abs().argmin()


def test_every_weight_is_finite_and_not_negative_at_the_ends_in_any_dtype():
    for name, weighting in WEIGHTINGS.items():
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            weight = weighting(torch.tensor([[0.0, 1e-6], [0.5, 1.0]], dtype=dtype))
            assert weight.shape == (2, 2), name
            assert weight.dtype == torch.promote_types(dtype, torch.float32), name
            assert (weight.isfinite() & (weight >= 0)).all(), name


# guidance


def test_guidance_convention():
    cond, uncond = randn(2, 5, key=1), randn(2, 5, key=2)
    assert delta_to_scale(3.5) == 4.5
    guided = classifier_free(cond, uncond, delta_to_scale(3.5))
    torch.testing.assert_close(guided, cond + 3.5 * (cond - uncond))
    torch.testing.assert_close(classifier_free(cond, uncond, 0.0), uncond)


def test_rescale_keeps_each_samples_deviation():
    cond = randn(3, 4, 5, key=1) * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[:, None, None]
    guided = classifier_free(cond, randn(3, 4, 5, key=2), 6.0)
    torch.testing.assert_close(rescale(guided, cond, 1.0).flatten(1).std(1), cond.flatten(1).std(1))
    assert torch.equal(rescale(guided, cond, 0.0), guided)
    half = 0.5 * rescale(guided, cond, 1.0) + 0.5 * guided
    torch.testing.assert_close(rescale(guided, cond, 0.5), half)


def test_rescale_does_not_look_at_masked_tokens():
    cond, guided = randn(2, 4, 5, key=1), 3 * randn(2, 4, 5, key=2)
    mask_BN = torch.tensor([[True, True, False, False], [True, True, True, False]])
    expected = rescale(guided[:1, :2], cond[:1, :2], 1.0)
    cond[0, 2:], guided[0, 2:] = math.nan, 1e6
    torch.testing.assert_close(rescale(guided, cond, 1.0, mask_BN)[:1, :2], expected)


def test_guidance_composes_scale_and_rescale_in_float32():
    cond, uncond = randn(2, 5, key=1).bfloat16(), randn(2, 5, key=2).bfloat16()
    guided = Guidance(scale=5.0, rescale=0.7).combine({"cond": cond, "negative": uncond}, 0.5)
    exact = rescale(classifier_free(cond.double(), uncond.double(), 5.0), cond.double(), 0.7)
    assert guided.dtype == torch.bfloat16
    torch.testing.assert_close(guided.double(), exact, rtol=0.02, atol=0.01)


# solvers


@both_paths
@pytest.mark.parametrize("name, steps", [("euler", 200), ("heun", 20), ("dpmpp_2m", 60), ("ddim", 200)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solvers_reach_the_target(path, name, steps, shift):
    noise = unit_noise()
    x = SOLVERS[name].run(exact_velocity(path), noise, sigma_schedule(steps, shift), path=path)
    assert_reaches_target(x, 0.02)
    torch.testing.assert_close(x, MEAN + STD * noise, rtol=0, atol=0.06)


def measured_order(solver, path, high=1.0, low=0.0):
    """Slope of log error against log steps, and the error at the finest grid."""
    z, counts, errors = randn(50, 3), (16, 32, 64, 128, 256), []
    for steps in counts:
        sigmas = torch.linspace(high, low, steps + 1, dtype=torch.float64)
        x = solver(exact_velocity(path), exact_state(path, z, high), sigmas, path=path)
        errors.append((x - exact_state(path, z, low)).abs().mean().item())
    n, e = torch.tensor(counts).log(), torch.tensor(errors).log()
    return -((n - n.mean()) * (e - e.mean())).sum().item() / (n - n.mean()).square().sum().item(), errors[-1]


@both_paths
def test_convergence_orders(path):
    order, euler_error = measured_order(euler, path)
    assert order == pytest.approx(1, abs=0.1)
    order, _ = measured_order(ddim, path)
    assert order == pytest.approx(1, abs=0.1)
    order, heun_error = measured_order(heun, path)
    assert order == pytest.approx(2, abs=0.1)
    assert heun_error < euler_error / 50
    order, _ = measured_order(dpmpp_2m, path, high=0.9, low=0.1)
    assert order == pytest.approx(2, abs=0.2)
    # From 1 to 0 a logarithm comes on top: see its docstring.
    order, dpm_error = measured_order(dpmpp_2m, path)
    assert order > 1.4
    assert dpm_error < euler_error / 8


def test_deterministic_ddim_is_euler_on_the_linear_path():
    def network(x, sigma):
        return torch.tanh(3 * x) + sigma

    noise, sigmas = randn(4, 5), sigma_schedule(9, 3.0)
    torch.testing.assert_close(
        ddim(network, noise, sigmas), euler(network, noise, sigmas), rtol=0, atol=1e-12
    )


@both_paths
def test_ancestral_ddim_reaches_the_target_by_another_way(path):
    noise, sigmas = unit_noise(), sigma_schedule(150)
    run = partial(ddim, exact_velocity(path), noise, sigmas, path=path)
    ancestral = run(eta=1.0, generator=torch_generator(1))
    assert_reaches_target(ancestral, 0.08)
    assert (ancestral - run()).abs().mean() > 0.3
    assert torch.equal(ancestral, run(eta=1.0, generator=torch_generator(1)))
    with pytest.raises(AssertionError, match="generator"):
        run(eta=1.0)


@both_paths
def test_few_step_consistency_sampling_of_a_distilled_network(path):
    def distilled(x, sigma):
        a, s, _, _ = path.coefficients(grid(sigma))
        clean = MEAN + STD * (x - a * MEAN) / (a**2 * STD**2 + s**2).sqrt()
        return convert(clean, x, sigma, "clean", "velocity", path)

    sigmas = (*warped_steps((1000, 750, 500, 250), 5), 0.0)
    x = consistency(distilled, randn(4000, 3), sigmas, path=path, generator=torch_generator(1))
    assert_reaches_target(x, 0.06)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_ask_the_network_as_often_as_they_say(name):
    solver, asked, reported = SOLVERS[name], [], []

    def network(x, sigma):
        assert isinstance(sigma, float)
        assert x.dtype == torch.bfloat16
        asked.append(sigma)
        return -x

    run = partial(solver.run, generator=torch_generator(0)) if solver.stochastic else solver.run
    noise, sigmas = randn(2, 3).bfloat16(), sigma_schedule(5)
    x = run(
        network,
        noise,
        sigmas,
        callback=lambda step, sigma, x, clean: reported.append((step, sigma, x, clean)),
    )
    assert x.dtype == torch.bfloat16
    assert len(asked) == 5 * solver.evaluations
    assert [(step, sigma) for step, sigma, _, _ in reported] == list(enumerate(sigmas.tolist()[:-1]))
    assert torch.equal(reported[0][2], noise.float())
    torch.testing.assert_close(reported[0][3], 2 * noise.float())  # clean = x - sigma v


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ddim"])
def test_small_steps_are_not_lost_in_bfloat16(name):
    # v = 1 everywhere: with the state in bfloat16 a step of 1/512 beside 8 would be rounded away.
    x = torch.full((4,), 8.0, dtype=torch.bfloat16)
    assert torch.equal(SOLVERS[name].run(lambda x, s: torch.ones_like(x), x, sigma_schedule(512)), x - 1)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "ddim"])
def test_one_step_from_pure_noise_is_the_clean_estimate(name):
    noise = randn(3, 3)
    x = SOLVERS[name].run(exact_velocity(LINEAR), noise, (1.0, 0.0))
    torch.testing.assert_close(x, MEAN.expand(3, 3))


def test_gradients_flow_through_a_rollout():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for name in ("euler", "heun", "dpmpp_2m", "ddim"):
        x = SOLVERS[name].run(lambda x, s: weight * x, randn(2, 3), sigma_schedule(4))
        (gradient,) = torch.autograd.grad(x.sum(), weight)
        assert gradient.isfinite(), name
        assert gradient != 0, name


@pytest.mark.parametrize("sigmas", [(1.0,), (0.5, 0.5), (0.0, 1.0), (1.2, 0.0), (1.0, -0.1)])
def test_a_grid_that_does_not_fall_from_1_to_0_is_refused(sigmas):
    with pytest.raises(AssertionError, match="sigmas"):
        euler(lambda x, s: x, randn(2), sigmas)
