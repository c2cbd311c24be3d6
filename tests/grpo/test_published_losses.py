"""Every published loss against numpy that follows its paper's formula, from rewards and ragged members to gradients.

The formulas are sums over lists of members in float64; finite differences of them are the gradients. Where a paper
stops a gradient, the formula takes the policy twice: `new` is varied, `at` is the same numbers held fixed.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro_jax.grpo.advantages import group_advantages
from maestro_jax.grpo.losses import LossConfig, LossInputs, policy_loss

B, G, R = 4, 5, 7
LENGTH = 32  # Dr.GRPO's constant
SEEDS = range(4)


@dataclasses.dataclass(frozen=True)
class Member:
    """A valid member's log-probabilities `[tokens in the loss]` under the policies, and its advantage."""

    new: np.ndarray
    at: np.ndarray
    old: np.ndarray
    proximal: np.ndarray
    reference: np.ndarray
    advantage: float


# ---- the papers' formulas ----------------------------------------------------------------------------------


def clipped(ratio: np.ndarray, advantage: float, low: float, high: float) -> np.ndarray:
    """PPO's min(r A, clip(r, 1 - low, 1 + high) A)."""
    return np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def grpo(members: list[Member]) -> float:
    """Shao et al. 2024, equation 3, without its divergence: 1/G sum_i 1/|o_i| sum_t min(...)."""
    return -np.mean([np.mean(clipped(np.exp(m.new - m.old), m.advantage, 0.2, 0.2)) for m in members])


def dapo(members: list[Member]) -> float:
    """Yu et al. 2025, equation 8: 1 / sum_i |o_i| sum_i sum_t min(...), clipped higher above than below."""
    terms = [clipped(np.exp(m.new - m.old), m.advantage, 0.2, 0.28).sum() for m in members]
    return -sum(terms) / sum(len(m.new) for m in members)


def dr_grpo(members: list[Member]) -> float:
    """Liu et al. 2025, section 3.2: the sum over tokens, divided by a constant instead of |o_i|; A without its std."""
    return -np.mean([clipped(np.exp(m.new - m.old), m.advantage, 0.2, 0.2).sum() / LENGTH for m in members])


def gspo(members: list[Member]) -> float:
    """Zheng et al. 2025, equations 5 and 7: 1/G sum_i min(s_i A, clip(s_i) A), s_i = (pi(y)/pi_old(y))^(1/|y|)."""
    ratios = [(np.exp(m.new.sum()) / np.exp(m.old.sum())) ** (1 / len(m.new)) for m in members]
    return -np.mean([clipped(s, m.advantage, 0.03, 0.04) for s, m in zip(ratios, members, strict=True)])


def cispo(members: list[Member]) -> float:
    """MiniMax-M1, equations 4 and 5: 1 / sum_i |o_i| sum_i sum_t sg(clip(r)) A log pi, without a lower bound."""
    terms = [(np.minimum(np.exp(m.at - m.old), 1 + 0.28) * m.advantage * m.new).sum() for m in members]
    return -sum(terms) / sum(len(m.new) for m in members)


def truncated(members: list[Member]) -> float:
    """Yao et al. 2025, PPO with truncated importance sampling: sum_t sg(min(prox / sampler, C)) min(r A, clip(r) A)."""
    terms = [
        (np.minimum(np.exp(m.proximal - m.old), 1.5) * clipped(np.exp(m.new - m.proximal), m.advantage, 0.2, 0.2)).sum()
        for m in members
    ]
    return -sum(terms) / sum(len(m.new) for m in members)


def truncated_at_one_update(members: list[Member]) -> float:
    """The same where the proximal policy is the one being trained."""
    return truncated([dataclasses.replace(m, proximal=m.at) for m in members])


def config(low: float, high: float, aggregation: str, **other: float | str) -> LossConfig:
    return LossConfig(low, high, aggregation, LENGTH, **other)  # type: ignore[arg-type]


PUBLISHED: dict[str, tuple[Callable[[list[Member]], float], LossConfig]] = {
    "GRPO": (grpo, config(0.2, 0.2, "sequence")),
    "DAPO": (dapo, config(0.2, 0.28, "token")),
    "Dr.GRPO": (dr_grpo, config(0.2, 0.2, "constant")),
    "GSPO": (gspo, config(0.03, 0.04, "sequence", surrogate="gspo")),
    "CISPO": (cispo, config(10.0, 0.28, "token", surrogate="cispo")),
    "TIS": (truncated, config(0.2, 0.2, "token", importance_cap=1.5)),
    "TIS, one update": (truncated_at_one_update, config(0.2, 0.2, "token", importance_cap=1.5)),
}


# ---- the same batch as lists and as padded arrays ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch; arrays `[B, G, R]`, `[B, G]`. Groups 0 and 1: all equal rewards; no valid member but one."""

    new: np.ndarray
    old: np.ndarray
    proximal: np.ndarray
    reference: np.ndarray
    mask: np.ndarray  # tokens the policy wrote: turns of uneven length around observations
    rewards: np.ndarray
    valid: np.ndarray

    def members(self, new: np.ndarray, name: str) -> list[Member]:
        """The valid members at varied log-probabilities; advantages as published: (R - mean) / std of the group."""
        found = []
        for b, g in zip(*np.nonzero(self.valid), strict=True):
            rewards, keep = self.rewards[b, self.valid[b]], self.mask[b, g]
            advantage = self.rewards[b, g] - rewards.mean()
            if name != "Dr.GRPO":
                advantage /= rewards.std() + 1e-6
            policies = (array[b, g][keep] for array in (new, self.new, self.old, self.proximal, self.reference))
            found.append(Member(*policies, advantage))
        return found

    def inputs(self, name: str) -> LossInputs:
        """What training makes of it; only "TIS" passes the proximal policy."""
        advantages, _ = group_advantages(self.rewards, self.valid, "none" if name == "Dr.GRPO" else "std")
        mask, entropy = self.mask & self.valid[..., None], np.zeros((B, G, R))
        arrays = (self.new, entropy, self.old, self.reference, advantages, mask)
        proximal = jnp.asarray(self.proximal, jnp.float32) if name == "TIS" else None
        return LossInputs(*(jnp.asarray(a, bool if a is mask else jnp.float32) for a in arrays), proximal)


def draw(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    old = rng.uniform(-3, 0, (B, G, R))
    proximal = old + rng.normal(0, 0.4, old.shape)
    new = proximal + rng.normal(0, 0.2, old.shape)
    mask = (np.arange(R) < rng.integers(1, R + 1, (B, G, 1))) & (rng.random(old.shape) < 0.7)
    mask[..., 0] = True  # the policy writes at least one token
    rewards = rng.choice([-1.0, 0.0, 1.0, 0.97], (B, G))
    rewards[0] = 1.0
    valid = rng.random((B, G)) < 0.8
    valid[0], valid[1] = True, np.arange(G) == 2
    rewards[2, :2], valid[2, :2] = (0.0, 1.0), True  # one group has contrast at any seed
    return Case(new, old, proximal, new + rng.normal(0, 0.5, old.shape), mask, rewards, valid)


def differences(loss: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Central finite differences of a scalar function."""
    found, step = np.zeros_like(at), 1e-6
    for i in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[i] = step
        found[i] = (loss(at + shift) - loss(at - shift)) / (2 * step)
    return found


def value_and_grad(inputs: LossInputs, config: LossConfig) -> tuple[jax.Array, jax.Array]:
    def loss(logprobs: jax.Array) -> jax.Array:
        return policy_loss(dataclasses.replace(inputs, logprobs=logprobs), config)[0]

    return jax.value_and_grad(loss)(inputs.logprobs)


@pytest.fixture(params=SEEDS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield draw(request.param)


# ---- comparisons -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_loss_and_its_gradient_are_the_papers(case: Case, name: str) -> None:
    formula, config = PUBLISHED[name]
    value, gradient = value_and_grad(case.inputs(name), config)
    np.testing.assert_allclose(value, formula(case.members(case.new, name)), rtol=1e-5, atol=1e-6)
    wanted = differences(lambda new: formula(case.members(new, name)), case.new)
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "of"),
    [("k1", lambda x: -x), ("k2", lambda x: x**2 / 2), ("k3", lambda x: np.exp(x) - 1 - x)],
    ids=["k1", "k2", "k3"],
)
def test_the_divergence_is_schulmans(case: Case, estimator: str, of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Schulman 2020 with log r = log(reference / policy); added to GRPO per token, as in Shao et al. 2024."""

    def formula(new: np.ndarray) -> float:
        members = case.members(new, "GRPO")
        return grpo(members) + 0.3 * float(np.mean([of(m.reference - m.new).mean() for m in members]))

    with_kl = dataclasses.replace(PUBLISHED["GRPO"][1], kl_weight=0.3, kl_estimator=estimator)
    value, gradient = value_and_grad(case.inputs("GRPO"), with_kl)
    np.testing.assert_allclose(value, formula(case.new), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, differences(formula, case.new), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_weight_the_reference_is_not_read(case: Case, name: str) -> None:
    inputs = case.inputs(name)
    unread = dataclasses.replace(inputs, reference_logprobs=jnp.full((B, G, R), jnp.nan))
    for found, wanted in zip(*(value_and_grad(x, PUBLISHED[name][1]) for x in (unread, inputs)), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_failed_member_leaves_baseline_and_loss(case: Case, name: str) -> None:
    """Whatever stands in its reward and its tokens, even what is not a number."""
    spoil = ~case.valid
    inputs, spoiled = (
        c.inputs(name)
        for c in (
            case,
            dataclasses.replace(
                case,
                rewards=np.where(spoil, np.nan, case.rewards),
                new=np.where(spoil[..., None], 300.0, case.new),
                old=np.where(spoil[..., None], -np.inf, case.old),
                proximal=np.where(spoil[..., None], -np.inf, case.proximal),
            ),
        )
    )
    assert spoil.any()
    value, gradient = value_and_grad(inputs, PUBLISHED[name][1])
    found, found_gradient = value_and_grad(spoiled, PUBLISHED[name][1])
    assert found == value
    np.testing.assert_array_equal(found_gradient, gradient)
    assert not gradient[spoil].any()


@pytest.mark.parametrize("name", PUBLISHED)
def test_groups_without_contrast_have_exactly_no_gradient(case: Case, name: str) -> None:
    """Group 0 has equal rewards, group 1 a single valid member."""
    _, gradient = value_and_grad(case.inputs(name), PUBLISHED[name][1])
    _, contrast = group_advantages(case.rewards, case.valid, "std")
    assert not contrast[:2].any() and not gradient[~contrast].any()
    assert gradient[contrast].any()


def test_importance_weights_leave_the_divergence_and_the_entropy_alone(case: Case) -> None:
    """At advantages of zero only these two are left."""
    inputs = dataclasses.replace(case.inputs("TIS"), advantages=jnp.zeros((B, G)), entropy=jnp.asarray(case.old))
    terms = dataclasses.replace(PUBLISHED["DAPO"][1], kl_weight=0.3, entropy_weight=0.2)
    weighted = dataclasses.replace(terms, importance_cap=1.5)
    for found, wanted in zip(value_and_grad(inputs, weighted), value_and_grad(inputs, terms), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "cispo"])
def test_at_one_update_truncated_weights_make_cispos_gradient(case: Case, surrogate: str) -> None:
    weighted = config(0.2, 0.2, "token", surrogate=surrogate, importance_cap=1.28)
    _, found = value_and_grad(case.inputs("GRPO"), weighted)
    _, wanted = value_and_grad(case.inputs("CISPO"), PUBLISHED["CISPO"][1])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-8)
