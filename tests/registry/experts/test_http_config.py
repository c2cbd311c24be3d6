"""Experts behind servers and caps as config: what is wrong is named, with the cure."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import ExpertConfig, LimitsConfig
from maestro_jax.registry.description.reading import parse_registry

Raw = Callable[..., dict[str, Any]]
URL = "http://127.0.0.1:8000/v1"


def served(**fields: Any) -> dict[str, Any]:
    return {"name": "Served", "description": "d", "endpoints": (URL,), "model": "m"} | fields


def test_four_settings_are_enough(raw: Raw) -> None:
    (expert,) = parse_registry(raw(experts=(served(),))).experts
    assert expert == ExpertConfig("Served", "d", endpoints=(URL,), model="m")
    assert (expert.temperature, expert.attempt_timeout, expert.cacheable) == (0.0, 60.0, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"implementation": "fake_specialists:Echo"}, "either implementation .* or endpoints"),
        ({"endpoints": ()}, "either implementation .* or endpoints"),
        ({"model": ""}, 'lacks "model"'),
        ({"endpoints": ("127.0.0.1:8000",)}, "is no base URL; write it as"),
        ({"endpoints": ("file:///etc/passwd",)}, "is no base URL"),
        ({"endpoints": ("http://",)}, "is no base URL"),
        ({"endpoints": ("http://x:port/v1",)}, "is no base URL"),
        ({"endpoints": ("http://[::1/v1",)}, "is no base URL"),
        ({"endpoints": (f"{URL}?key=1",)}, "is no base URL"),
        ({"endpoints": (f"{URL} ",)}, "is no base URL"),
        ({"endpoints": (URL, URL)}, "there twice"),
        ({"endpoints": URL}, "must be a tuple of texts"),
        ({"timeout": 5.0}, '"timeout" is for experts with implementation'),
        ({"latency_mean": 5.0}, '"latency_mean" is for experts with implementation'),
        ({"concurrency": 0}, "concurrency must be above 0"),
        ({"attempt_timeout": 0.0}, "attempt_timeout must be above 0"),
        ({"max_tokens": 0}, "max_tokens must be above 0"),
        ({"options": {"messages": []}}, 'options must not set "messages"'),
        ({"rename": {"model": "engine"}}, 'rename has "model"; valid: temperature, max_tokens, top_p, stream'),
        ({"rename": {"max_token": "tokens"}}, 'rename has "max_token"; did you mean "max_tokens"'),
        ({"rename": {"max_tokens": "top_p"}}, 'rename calls max_tokens "top_p", and another field has that name'),
        ({"rename": {"max_tokens": "n", "top_p": "n"}}, 'rename calls top_p "n", and another field has that name'),
        ({"rename": {"max_tokens": "n"}, "options": {"n": 1}}, 'rename calls max_tokens "n", and another field'),
        ({"rename": {"max_tokens": None}}, "rename must be a mapping"),
        ({"options": {"seed": object()}}, "as JSON"),
        ({"options": {"seed": float("nan")}}, "as JSON"),
    ],
)
def test_a_wrong_setting_is_named(raw: Raw, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f'expert "Served".*{message}|{message}'):
        parse_registry(raw(experts=(served(**fields),)))


@pytest.mark.parametrize("fields", [{"key": "sk-4711"}, {"endpoints": ("http://me:sk-4711@127.0.0.1/v1",)}])
def test_a_secret_in_the_config_is_refused_and_not_repeated(raw: Raw, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match='expert "Served".*environment variable') as caught:
        parse_registry(raw(experts=(served(**fields),)))
    assert "4711" not in str(caught.value)


def test_an_expert_of_this_process_has_no_model(raw: Raw) -> None:
    (first, *_) = raw()["experts"]
    with pytest.raises(ConfigError, match='"model" is for experts with endpoints; remove it'):
        parse_registry(raw(experts=({**first, "model": "m"},)))


def test_caps_are_read(raw: Raw) -> None:
    assert parse_registry(raw()).limits == LimitsConfig()
    assert parse_registry(raw(limits={"calls": 5, "price": 1})).limits == LimitsConfig(calls=5, price=1.0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"call": 5}, "unknown key registry.limits.call; did you mean registry.limits.calls?"),
        ({"calls": -1}, "registry.limits.calls must be at least 0"),
        ({"price": -1.0}, "registry.limits.price must be a number of at least 0"),
        (5, "registry.limits must be a mapping"),
    ],
)
def test_wrong_caps_are_named(raw: Raw, limits: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_registry(raw(limits=limits))
