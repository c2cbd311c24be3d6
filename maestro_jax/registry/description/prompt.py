"""The policy's system prompt, rendered from the registry: how to act, whom to ask.

The same bytes for the same registry, so that prompts of a step share their first tokens. The wording is
short because a tiny policy reads it too.
"""

from collections.abc import Sequence

from maestro_jax.registry.description.config import ExpertConfig, RegistryConfig, SkillConfig

# With a single call there is no other pair to try. That sentence stays all the same: policies were trained and measured
# with these bytes.
_RULES = """\
Answer the question about the image. Every turn does exactly one of two things.
Call an expert with a skill:
<search> Expert@@Skill: query </search>
Its reply comes back as <information> text </information>.
Or finish with a short answer and nothing after it:
<answer> text </answer>
You may think briefly before you act. Copy names exactly, choose the expert and the skill that suit the question, \
and say in the query what to look for. {budget} A reply can be wrong; if it does not help, try another pair.
"""


def render_system_prompt(config: RegistryConfig, max_calls: int) -> str:
    """The system message: rules, then one line for each expert and each shown skill."""
    budget = "You have one call." if max_calls == 1 else f"You have {max_calls} calls, one a turn."
    rules = _RULES.format(budget=budget)
    experts = [f"{_line(expert)}{_costs(expert, config.show)}" for expert in config.shown_experts]
    skills = [_line(skill) for skill in config.shown_skills]
    return "\n".join([rules, "Experts:", *experts, "", "Skills:", *skills])


def _line(entry: ExpertConfig | SkillConfig) -> str:
    return f"- {entry.name}: {' '.join(entry.description.split())}".rstrip(" :")


def _costs(expert: ExpertConfig, show: Sequence[str]) -> str:
    """What the registry shows of an expert's price (US dollars per million tokens) and speed (seconds a request)."""
    price = f"${expert.price_prompt:g} in, ${expert.price_completion:g} out per million tokens"
    texts = {"price": price, "speed": f"{expert.typical_seconds:g} s"}
    return f" ({'; '.join(texts[what] for what in show)})" if show else ""
