"""The policy's system prompt, rendered from the registry: how to act, whom to ask.

The same bytes for the same registry, so that prompts of a step share their first tokens. The wording is
short because a tiny policy reads it too.
"""

from collections.abc import Iterable

from maestro_jax.registry.config import ExpertConfig, RegistryConfig, SkillConfig

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
    return f"{rules}\nExperts:\n{_lines(config.experts)}\n\nSkills:\n{_lines(config.shown_skills)}"


def _lines(entries: Iterable[ExpertConfig | SkillConfig]) -> str:
    return "\n".join(f"- {entry.name}: {' '.join(entry.description.split())}".rstrip(" :") for entry in entries)
