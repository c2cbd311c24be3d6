"""One small tokenizer, and one small policy that speaks, for all tests of this room."""

import pytest

from maestro_jax.policy.tokens import Tokens
from tests.rollout import episodes, toy


@pytest.fixture(scope="session")
def toy_tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return toy.make_tokens(tmp_path_factory.mktemp("toy_tokenizer"))


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> episodes.Talker:
    directory = tmp_path_factory.mktemp("talker")
    episodes.write_talker(directory)
    return episodes.read_talker(directory)
