"""The policy's system prompt: how to act, whom to ask. Rendered from the registry, or given as a file.

The same bytes for the same registry, so that prompts of a step share their first tokens. Our own wording is short
because a tiny policy reads it too. A published policy should meet the prompt that it was trained with: that is a file,
taken as it is, but for two places that may stand in it, {experts} and {skills}. Its names are checked.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import ExpertConfig, RegistryConfig, SkillConfig
from maestro_jax.registry.description.names import normalise_name

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


KEY = "config.policy.system_prompt"
_TEXT = "text:"  # of a setting that is the prompt itself
_MOST_BYTES = 1 << 20  # the longest published prompt known has 7,892
_PLACE = re.compile(r"\{(experts|skills)\}")
# A call as a prompt shows it. Bounded, so that no text makes the search slow.
_SHOWN_CALL = re.compile(r"<search>([^<>@:\n]{1,120})@@([^<>@:\n]{1,120}):")
# "Model-Name@@Skill-Name" is the form of a call and calls nobody.
_STAND_INS = frozenset(("expert", "model", "llm", "agent", "skill", "tool", "name", "your", "the"))


def render_system_prompt(config: RegistryConfig, max_calls: int, given: str = "") -> str:
    """The system message.

    Args:
      given: what `config.policy.system_prompt` says. Empty: rules, then one line for each expert and each shown skill.

    Raises:
      ConfigError: of a prompt that is given, it cannot be read, or its names are not those of the registry.
    """
    experts = [f"{_line(expert)}{_costs(expert, config.show)}" for expert in config.shown_experts]
    skills = [_line(skill) for skill in config.shown_skills]
    if not given:
        budget = "You have one call." if max_calls == 1 else f"You have {max_calls} calls, one a turn."
        return "\n".join([_RULES.format(budget=budget), "Experts:", *experts, "", "Skills:", *skills])
    text = inline_prompt(given).removeprefix(_TEXT)
    for problem in _problems(text, config):
        raise ConfigError(f"{KEY}: {problem}")
    lines = {"experts": "\n".join(experts), "skills": "\n".join(skills)}
    return _PLACE.sub(lambda place: lines[place[1]], text)


def inline_prompt(given: str) -> str:
    """The setting with the prompt itself in place of the path of its file; the settings of a run hold this form.

    So a run does not depend on where the file lies, or on what becomes of it.

    Raises:
      ConfigError: no file that holds a text is there.
    """
    if not given or given.startswith(_TEXT):
        return given
    cure = f"name a text file (a relative path starts from {Path.cwd()}), or write {_TEXT!r} and the prompt itself"
    try:
        with Path(given).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{KEY}: {given} cannot be read ({error}); {cure}") from None
    if len(content) > _MOST_BYTES or not text.strip():
        problem = f"has more than {_MOST_BYTES} bytes" if text.strip() else "is empty"
        raise ConfigError(f"{KEY}: {given} {problem}; {cure}")
    return f"{_TEXT}{text}"


def prompt_text(given: str) -> str:
    """The prompt of a setting that `inline_prompt` made, as it was given: with its places."""
    return given.removeprefix(_TEXT)


def _problems(text: str, config: RegistryConfig) -> Iterator[str]:
    """What a policy that reads this prompt could not know of the registry, or would know wrongly."""
    places = {place[1] for place in _PLACE.finditer(text)}
    normalised = normalise_name(text)
    for what, entries in (("expert", config.shown_experts), ("skill", config.shown_skills)):
        for entry in () if f"{what}s" in places else entries:
            name = re.escape(normalise_name(entry.name))
            if not re.search(rf"(?<![^\W_]){name}(?![^\W_])", normalised):
                yield (
                    f"the prompt does not name the {what} {entry.name}, which the registry shows; name it there, write "
                    f"{{{what}s}} where the list of them belongs, or set its shown=False"
                )
    for call in _SHOWN_CALL.finditer(text):
        words = re.split(r"[\W_]+", f"{call[1]} {call[2]}".casefold().strip())
        found = config.resolve(call[1], call[2])
        if isinstance(found, str) and not _STAND_INS.issuperset(words):
            yield f"the prompt shows the call {call[1].strip()}@@{call[2].strip()}, which nobody answers: {found}"


def _line(entry: ExpertConfig | SkillConfig) -> str:
    return f"- {entry.name}: {' '.join(entry.description.split())}".rstrip(" :")


def _costs(expert: ExpertConfig, show: Sequence[str]) -> str:
    """What the registry shows of an expert's price (US dollars per million tokens) and speed (seconds a request)."""
    price = f"${expert.price_prompt:g} in, ${expert.price_completion:g} out per million tokens"
    texts = {"price": price, "speed": f"{expert.typical_seconds:g} s"}
    return f" ({'; '.join(texts[what] for what in show)})" if show else ""
