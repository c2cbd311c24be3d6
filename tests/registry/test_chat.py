"""Chat completions on the wire: what is sent, and that nothing but a completion is read as one."""

import base64
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maestro_jax.registry.chat import (
    BadImageError,
    BadReplyError,
    Completion,
    data_url,
    read_completion,
    read_models,
    request_body,
)
from maestro_jax.registry.interface import Message, Sampling
from tests.registry.servers import completion


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, kind)
    return file.getvalue()


def test_a_request_has_model_messages_sampling_and_options() -> None:
    messages = (Message("system", "be brief"), Message("user", "how many?"))
    fields = json.loads(request_body("m", messages, Sampling(0.5, 7, 0.9), {"seed": 3}))
    assert fields == {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how many?"}],
        "temperature": 0.5,
        "max_tokens": 7,
        "top_p": 0.9,
        "stream": False,
        "seed": 3,
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_images_go_before_the_text_as_data_urls(kind: str) -> None:
    image = picture(kind)
    (message,) = json.loads(request_body("m", (Message("user", "q", (image,)),), Sampling(), {}))["messages"]
    url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    assert message["content"] == [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "q"}]


@pytest.mark.parametrize("image", [b"", b"GIF89a", b"<svg/>", b"RIFF1234WAVE", b"file:///etc/passwd"])
def test_other_images_are_refused(image: bytes) -> None:
    with pytest.raises(BadImageError, match="no PNG, JPEG or WebP"):
        data_url(image)


@given(st.text(st.characters()))
def test_any_text_can_be_sent(text: str) -> None:
    fields = json.loads(request_body("m", (Message("user", text),), Sampling(), {}))
    assert fields["messages"][0]["content"] == text


def test_a_completion_is_text_and_usage() -> None:
    assert read_completion(completion("forty\n\u2014 two \U0001f600")) == Completion(
        "forty\n\u2014 two \U0001f600", 10, 2
    )


@pytest.mark.parametrize("tokens", [True, 1.0, "1", None, -1, 10**12, [1]])
def test_tokens_are_numbers_that_can_be(tokens: object) -> None:
    body = json.loads(completion("42"))
    body["usage"]["prompt_tokens"] = tokens
    with pytest.raises(BadReplyError, match="numbers of tokens"):
        read_completion(json.dumps(body).encode())


@pytest.mark.parametrize("text", [42, ["42"], {"text": "42"}])
def test_the_text_is_a_text(text: object) -> None:
    with pytest.raises(BadReplyError, match="no valid text"):
        read_completion(completion(text))


def test_no_content_is_an_empty_text() -> None:
    """Servers say null of a refusal, and where thoughts have used up the tokens: that is no fault of theirs."""
    assert read_completion(completion(None)).text == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage", "prompt_tokens", "x"]), inner)
    ),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_a_completion_or_a_bad_reply(body: bytes) -> None:
    for read in (read_completion, read_models):
        try:
            read(body)
        except BadReplyError:
            continue


def test_models_are_names() -> None:
    assert read_models(b'{"data": [{"id": "a"}, {"id": "b"}]}') == ["a", "b"]
    with pytest.raises(BadReplyError):
        read_models(b'{"data": [{"id": 1}]}')
