"""One small tokenizer for all tests of this room."""

import pytest

from maestro_jax.policy.tokens import Tokens
from tests.rollout import toy


@pytest.fixture(scope="session")
def toy_tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return toy.make_tokens(tmp_path_factory.mktemp("toy_tokenizer"))
