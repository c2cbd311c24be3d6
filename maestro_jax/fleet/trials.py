"""One real request to every endpoint of every expert behind servers, before a run: does it answer as a run needs it?

The request has the expert's own settings, and a small picture where a skill or a service would show it one. It goes
past caps, caches, journal, retries and breakers: what is asked here changes nothing for a run.
"""

import asyncio
import dataclasses
import functools
import io
import time

from PIL import Image, ImageDraw, ImageFont

from maestro_jax.registry.description.config import ExpertConfig, RegistryConfig
from maestro_jax.registry.description.interface import Message, Request
from maestro_jax.registry.description.names import normalise_name
from maestro_jax.registry.description.stages import AskStage, RunStage
from maestro_jax.registry.experts.chat import Quirk, estimate_tokens
from maestro_jax.registry.experts.http import HttpExpert, Outcome, Trial
from maestro_jax.registry.experts.retries import RetryBudget
from maestro_jax.registry.skills.templates import said
from maestro_jax.types import Status

QUESTION = "Reply with one word: ready."
PICTURE_SIZE = (96, 64)  # pixels: vision encoders refuse what is thinner than a patch


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line about one endpoint: how fast it answered, or what is wrong, with the cure.

    Attributes:
      expert: its name.
      is_absence: whether the problem is that nobody answers, which may pass by itself.
    """

    line: str
    is_problem: bool
    expert: str = ""
    is_absence: bool = False


async def try_experts(config: RegistryConfig, seconds: float) -> list[Finding]:
    """Asks all experts behind servers at the same time.

    Args:
      seconds: that each request may take, if the expert's `attempt_timeout` allows so many.

    Raises:
      ConfigError: the key of an expert is not set.
    """
    served = [expert for expert in config.experts if expert.endpoints]
    found = await asyncio.gather(*(_try(expert, is_shown_pictures(expert, config), seconds) for expert in served))
    return [finding for findings in found for finding in findings]


def is_shown_pictures(expert: ExpertConfig, config: RegistryConfig) -> bool:
    """Whether a skill or a service sends images to the expert."""
    name = normalise_name(expert.name)
    if any(normalise_name(service.expert) == name for service in config.services):
        return True
    skills = [skill for skill in config.skills if expert.shown and config.allows(skill, expert.name)]
    stages = [stage for skill in skills for stage in skill.stages if isinstance(stage, AskStage | RunStage)]
    return any(skill.choose for skill in skills) or any(stage.images for stage in stages)


async def _try(expert: ExpertConfig, with_picture: bool, seconds: float) -> list[Finding]:
    asked = HttpExpert(expert, RetryBudget(time.monotonic))
    try:
        trials = await asked.try_each(_request(with_picture, seconds))
        words_only = dict[str, Outcome]()
        # Servers refuse pictures with 400 as well as with 500.
        refused = (one for one in trials if one.outcome.status is not Status.OK and one.outcome.why.startswith("HTTP"))
        if with_picture and any(refused):
            words_only = {trial.url: trial.outcome for trial in await asked.try_each(_request(False, seconds))}
    finally:
        await asked.close()
    findings = []
    for trial in trials:
        problem = _problem(expert, trial, words_only.get(trial.url), seconds)
        line = f"{trial.url}: {problem}" if problem else f"ready; {_praise(trial, with_picture)}"
        is_absence = trial.outcome.status in (Status.TIMEOUT, Status.UNAVAILABLE)
        line = _printable(f'expert "{expert.name}": {line}')
        findings.append(Finding(line, problem is not None, expert.name, is_absence))
    return findings


def _request(with_picture: bool, seconds: float) -> Request:
    return Request((Message("user", QUESTION, (_picture(),) if with_picture else ()),), deadline=seconds)


@functools.cache
def _picture() -> bytes:
    """It says "ready": a model that only reads says nothing of an empty one."""
    file, picture = io.BytesIO(), Image.new("RGB", PICTURE_SIZE, "white")
    ImageDraw.Draw(picture).text((12, 16), "ready", "black", ImageFont.load_default(24))
    picture.save(file, "PNG")
    return file.getvalue()


def _praise(trial: Trial, with_picture: bool) -> str:
    reply = trial.outcome.completion
    assert reply is not None  # the outcome is OK
    seen = ", with a picture" if with_picture else ""
    tokens = f"{reply.prompt_tokens} + {reply.completion_tokens} tokens"
    if Quirk.NO_USAGE in reply.quirks:
        tokens = f"about {estimate_tokens(_request(with_picture, 0.0).messages)} + {reply.completion_tokens} tokens"
    quirks = "".join(f"; {quirk}" for quirk in reply.quirks)
    return f"{trial.url} answered in {trial.seconds:.2f} s ({tokens}{seen}){quirks}"


# ---- problems and their cures ------------------------------------------------------------------------------


def _problem(expert: ExpertConfig, trial: Trial, words_only: Outcome | None, seconds: float) -> str | None:
    outcome = trial.outcome
    quoted = f' (it says: "{outcome.said}")' if outcome.said else ""
    if outcome.completion is not None:
        if said(outcome.completion.text):
            return None
        if Quirk.TOOL_CALLS in outcome.completion.quirks:
            cure = "start its server without a parser of tool calls (vLLM: without --enable-auto-tool-choice)"
            return f'{Quirk.TOOL_CALLS}; {cure}, or set options={{"tool_choice": "none"}}'
        spent = outcome.completion.completion_tokens
        cure = f"raise max_tokens ({expert.max_tokens}), or turn its thinking off by options"
        return f"its reply is empty, of {spent} tokens; {cure}"
    if words_only is not None and words_only.status is Status.OK:
        cure = "serve a model that sees, or name in `experts` of the skills that show pictures those that do"
        return f"it answers words and refuses a picture ({outcome.why.partition(';')[0]}); {cure}{quoted}"
    if outcome.status is Status.TIMEOUT:
        cure = "see whether its server is busy or still loads, lower max_tokens, or raise attempt_timeout or --seconds"
        return f"no reply within {min(seconds, expert.attempt_timeout):g} s; {cure}"
    if outcome.status is Status.UNAVAILABLE:
        return f"{outcome.why}; {_cure_of_absence(expert, outcome.why)}"
    return f"{outcome.why}{_hint(expert, trial)}{quoted}"


def _cure_of_absence(expert: ExpertConfig, why: str) -> str:
    if why.startswith("no connection") and "Proxy" in why:
        return "correct the proxy in HTTP_PROXY or HTTPS_PROXY, or name the host in NO_PROXY"
    if why.startswith("no connection"):
        up = "python -m maestro_jax.experts up does" if expert.serve else "or name the one that runs"
        return f"start its server ({up}), or correct endpoints"
    if why.startswith("HTTP 429"):
        return "it has too much to do or a quota is used up; lower concurrency or wait"
    if why.startswith("HTTP"):
        return "look into its server's log"
    if "usage" in why:
        return "let its server (or what stands before it) report them, or leave usage out"
    if "message.content" in why:
        return "let its server (or what stands before it) send a text"
    return "correct endpoints: what answers there is no OpenAI-compatible server"


def _hint(expert: ExpertConfig, trial: Trial) -> str:
    """What the refusal means for this expert's settings."""
    why = trial.outcome.why
    if why.startswith("HTTP 401"):
        return f", which is {expert.key} here" if expert.key else "; this expert has no `key`"
    if trial.listed and why.startswith(("HTTP 400", "HTTP 404", "HTTP 422")):
        return f'; model is "{expert.model}", and the server lists {trial.listed}'
    return f'; model is "{expert.model}"' if why.startswith("HTTP 404") else ""


def _printable(line: str) -> str:
    """Servers are quoted, and must not steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in line)
