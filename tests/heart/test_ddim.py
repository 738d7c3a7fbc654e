"""DDIM both ways against diffusers' schedulers and a NumPy float64 oracle, and the identities the method rests on."""

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from hypothesis import given, settings, strategies as st

from isadca.common.problem import Problem
from isadca.ddim import Schedule, ScheduleConfig, Step, adain, add_noise, inverse_step, predict_x0, step

COUNTS = [1, 2, 7, 30, 33, 50, 333, 999]  # among them counts that do not divide 1000, where strides are cut short
CONFIGS = [ScheduleConfig(), ScheduleConfig(alpha_to_one=True), ScheduleConfig(beta_schedule="linear"),
           ScheduleConfig(steps_offset=0), ScheduleConfig(train_steps=200, beta_start=0.001, beta_end=0.02)]


def alpha_bars(config: ScheduleConfig) -> np.ndarray:
    """The levels as the definition has them, one product at a time in float64."""
    beta = np.linspace(config.beta_start, config.beta_end, config.train_steps)
    if config.beta_schedule == "scaled_linear":
        beta = np.linspace(np.sqrt(config.beta_start), np.sqrt(config.beta_end), config.train_steps) ** 2
    levels = [1 - beta[0]]
    for b in beta[1:]:
        levels.append(levels[-1] * (1 - b))
    return np.array(levels)


def scheduler(cls, config: ScheduleConfig, n: int, exact: bool):
    """diffusers' scheduler as Stable Diffusion 1.5 sets it; `exact` gives it its levels in float64."""
    theirs = cls(num_train_timesteps=config.train_steps, beta_start=config.beta_start, beta_end=config.beta_end,
                 beta_schedule=config.beta_schedule, steps_offset=config.steps_offset, clip_sample=False,
                 set_alpha_to_one=config.alpha_to_one, timestep_spacing="leading")
    if exact:
        theirs.alphas_cumprod = torch.from_numpy(alpha_bars(config))
        clean = torch.tensor(1.0, dtype=torch.float64) if config.alpha_to_one else theirs.alphas_cumprod[0]
        theirs.final_alpha_cumprod = theirs.initial_alpha_cumprod = clean
    theirs.set_timesteps(n)
    return theirs


def run(schedule: Schedule, n: int, z, noise, inverse: bool):
    """All latents of a trajectory; `noise` (n, ...) holds one eps per step, in the order of the steps taken."""
    chain, grid = [z], schedule.steps(n)
    for (t, t_prev), eps in zip(grid[::-1] if inverse else grid, noise):
        here, there = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        chain.append(inverse_step(chain[-1], eps, there, here) if inverse else step(chain[-1], eps, here, there))
    return torch.stack(chain)


# --- levels and grid

@pytest.mark.parametrize("config", CONFIGS)
def test_levels_equal_the_definition_and_diffusers(config):
    ours = np.array([Schedule(config).alpha_bar(t) for t in range(config.train_steps)])
    np.testing.assert_allclose(ours, alpha_bars(config), rtol=1e-12)
    theirs = scheduler(DDIMScheduler, config, 1, exact=False)
    np.testing.assert_allclose(ours, theirs.alphas_cumprod.numpy(), rtol=5e-6)  # theirs are float32 products
    assert Schedule(config).alpha_bar(-1) == pytest.approx(float(theirs.final_alpha_cumprod), rel=1e-6)


def test_constants_of_stable_diffusion():
    level = Schedule().alpha_bar
    assert level(0) == pytest.approx(0.99915, abs=1e-12) and level(1) == pytest.approx(0.998296, abs=5e-7)
    assert level(981) == pytest.approx(0.0057755, abs=5e-8) and level(999) == pytest.approx(0.0046601, abs=5e-8)
    assert level(-1) == level(-19) == level(0), "the last step ends at the level of t = 0, not at 1"
    assert Schedule(ScheduleConfig(alpha_to_one=True)).alpha_bar(-19) == 1.0


def test_the_papers_grid():
    steps = Schedule().steps(50)
    assert [s.t for s in steps] == list(range(981, 0, -20)) and len(steps) == 50
    assert steps[0] == Step(981, 961) and steps[-1] == Step(1, -19)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("config", CONFIGS[:1] + CONFIGS[3:4])
def test_the_grid_equals_diffusers(config, n):
    grid = Schedule(config).steps(n)
    assert [s.t for s in grid] == scheduler(DDIMScheduler, config, n, exact=False).timesteps.tolist()
    assert [s.t for s in grid[::-1]] == scheduler(DDIMInverseScheduler, config, n, exact=False).timesteps.tolist()


def test_every_grid_is_a_chain_within_the_schedule():
    """Each step starts where the one before ended, all levels exist, the last step ends at the clean level."""
    schedule = Schedule()
    for n in range(1, 1000):
        grid = schedule.steps(n)
        assert len(grid) == n and grid[0].t <= 999 and grid[-1].t == 1 and grid[-1].t_prev <= 0
        assert all(a.t_prev == b.t for a, b in zip(grid, grid[1:]))


@pytest.mark.parametrize("n", [0, -1, 1000, 1001])
def test_counts_that_do_not_fit_are_a_problem(n):
    with pytest.raises(Problem, match=rf"^steps is {n}, expected 1 to 999; [^\n]*$"):
        Schedule().steps(n)


def test_without_offset_all_training_steps_can_be_visited():
    assert [s.t for s in Schedule(ScheduleConfig(steps_offset=0)).steps(1000)] == list(range(999, -1, -1))


# --- trajectories

@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("inverse", [False, True], ids=["sampling", "inversion"])
@pytest.mark.parametrize("config", CONFIGS[:3], ids=["sd15", "alpha_to_one", "linear"])
@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
def test_trajectories_equal_diffusers(config, inverse, n, exact):
    """Every latent of a run with random noise predictions. With levels in float64 to 1e-12 of the largest latent;
    with diffusers' own float32 levels to 2e-5, which is the rounding of their cumulative product."""
    z, noise = torch.randn(2, 4, 3, 3).double(), torch.randn(n, 2, 4, 3, 3).double()
    if not exact:
        z, noise = z.float(), noise.float()
    theirs = scheduler(DDIMInverseScheduler if inverse else DDIMScheduler, config, n, exact)
    chain = [z]
    for t, eps in zip(theirs.timesteps, noise):
        chain.append(theirs.step(eps, t, chain[-1]).prev_sample)
    expected, got = torch.stack(chain), run(Schedule(config), n, z, noise, inverse)
    assert got.dtype == z.dtype
    assert (got - expected).abs().max() <= (1e-12 if exact else 2e-5) * expected.abs().max()


@pytest.mark.parametrize("n", COUNTS)
def test_inversion_then_sampling_is_exact_for_a_fixed_noise(n):
    """The round trip's error comes from the network alone: with one eps per stride, whatever z is, it has none."""
    z, noise = torch.randn(1, 4, 3, 3).double(), torch.randn(n, 1, 4, 3, 3).double()
    up = run(Schedule(), n, z, noise, inverse=True)
    down = run(Schedule(), n, up[-1], noise.flip(0), inverse=False)
    torch.testing.assert_close(down.flip(0), up, rtol=1e-9, atol=1e-9)


# --- identities

levels = st.floats(0.004, 0.9999)
seeds = st.integers(0, 2**32 - 1)
mixes = st.floats(-2, 3)  # λ outside [0, 1] extrapolates


def draw(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(deadline=None, derandomize=True)
@given(levels, levels, seeds)
def test_inverse_step_undoes_step(a, b, seed):
    z, eps = draw(seed, 2)
    close(inverse_step(step(z, eps, a, b), eps, b, a), z)
    close(step(inverse_step(z, eps, b, a), eps, a, b), z)
    close(step(z, eps, a, a), z)


@settings(deadline=None, derandomize=True)
@given(levels, seeds)
def test_predict_x0_undoes_add_noise(a, seed):
    x0, eps = draw(seed, 2)
    close(predict_x0(add_noise(x0, eps, a), eps, a), x0)
    close(add_noise(predict_x0(x0, eps, a), eps, a), x0)


@settings(deadline=None, derandomize=True)
@given(levels, levels, mixes, seeds)
def test_mixing_noise_is_mixing_latents(a, b, lam, seed):
    """The paper's Eq. 9: two branches from one z_t may be mixed before the step or after it. Also for x0."""
    z, isa, dca = draw(seed, 3)
    mixed = lam * isa + (1 - lam) * dca
    close(step(z, mixed, a, b), lam * step(z, isa, a, b) + (1 - lam) * step(z, dca, a, b))
    close(predict_x0(z, mixed, a), lam * predict_x0(z, isa, a) + (1 - lam) * predict_x0(z, dca, a))


@settings(deadline=None, derandomize=True)
@given(levels, levels, seeds)
def test_step_is_the_textbook_map(a, b, seed):
    """A z + B ε with A = √(b/a), B = √(1-b) - √(b (1-a) / a), and the inputs untouched."""
    z, eps = draw(seed, 2)
    before = z.clone(), eps.clone()
    close(step(z, eps, a, b), np.sqrt(b / a) * z + (np.sqrt(1 - b) - np.sqrt(b * (1 - a) / a)) * eps)
    assert torch.equal(z, before[0]) and torch.equal(eps, before[1])


def test_a_step_to_level_one_is_predict_x0():
    z, eps = draw(0, 2)
    assert torch.equal(step(z, eps, 0.3, 1.0), predict_x0(z, eps, 0.3))


def test_adain_adds_a_hundred_thousandth_to_the_variance():
    """So that a flat channel becomes the reference's mean, and none is divided by zero."""
    ref = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    flat = adain(torch.full((2, 4, 8, 8), 3.0, dtype=torch.float64), ref)
    torch.testing.assert_close(flat, ref.mean((2, 3), keepdim=True).expand(2, 4, 8, 8))
    checkered = torch.ones(1, 4, 8, 8, dtype=torch.float64).cumsum(3) % 2 * 2e-4  # its variance is 1e-8 · 64 / 63
    shrunk = (adain(checkered, ref) - ref.mean((2, 3), keepdim=True)) / ref.std((2, 3), keepdim=True)
    torch.testing.assert_close(shrunk, (checkered - 1e-4) / (1e-5 + 1e-8 * 64 / 63) ** 0.5, rtol=1e-4, atol=0)
