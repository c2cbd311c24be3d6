"""One toy model of transformers and its copy, one small and one real tokenizer, for all tests of this room."""

from pathlib import Path
from typing import Any

import pytest

from maestro_jax.policy.model import Policy
from maestro_jax.policy.tokens import Tokens, load_tokens, train_tokens
from tests.policy import qwen, reference


@pytest.fixture(scope="session")
def hf_model() -> Any:
    return reference.reference_model()


@pytest.fixture(scope="session")
def policy(hf_model: Any) -> Policy:
    return reference.load(reference.as_params(reference.weights_of(hf_model)))


@pytest.fixture(scope="session")
def tokens_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="session")
def tokens(tokens_directory: Path) -> Tokens:
    texts = ["How many red circles are there?", "<search> Chart-Lens@@Chart_Solver: read the chart </search>"] * 20
    return train_tokens(texts, 360, tokens_directory)


@pytest.fixture(scope="session")
def qwen_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen")
    qwen.write_checkpoint_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def qwen_tokens(qwen_directory: Path) -> Tokens:
    return load_tokens(qwen_directory)
