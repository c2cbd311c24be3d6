"""Chat completions on the wire: what is sent, and that nothing but a completion is read as one."""

import base64
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maestro_jax.registry.description.interface import Message, Sampling
from maestro_jax.registry.experts.chat import (
    BadImageError,
    BadReplyError,
    Completion,
    Quirk,
    estimate_tokens,
    read_completion,
    read_models,
    request_body,
)
from tests.registry.servers import completion


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, kind)
    return file.getvalue()


def test_a_request_has_model_messages_sampling_and_options() -> None:
    messages = (Message("system", "be brief"), Message("user", "how many?"))
    fields = json.loads(request_body("m", messages, Sampling(0.5, 7, 0.9), {"seed": 3}, {}))
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
    (message,) = json.loads(request_body("m", (Message("user", "q", (image,)),), Sampling(), {}, {}))["messages"]
    url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    assert message["content"] == [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "q"}]


@pytest.mark.parametrize("text", ["q", "\ud800"])
def test_images_of_several_messages_keep_their_places(text: str) -> None:
    images = [picture("png"), picture("jpeg"), picture("webp")]
    messages = Message("user", text, tuple(images[:2])), Message("assistant", text), Message("user", "r", (images[2],))
    sent = json.loads(request_body("m", messages, Sampling(), {"seed": 3}, {}))
    first, second, third = (message["content"] for message in sent["messages"])
    assert [first[2]["text"], second, third[1]["text"], sent["seed"]] == [text, text, "r", 3]
    urls = [part["image_url"]["url"] for part in (*first[:2], third[0])]
    assert [base64.b64decode(url.partition(",")[2]) for url in urls] == images
    assert [url.partition(";")[0] for url in urls] == ["data:image/png", "data:image/jpeg", "data:image/webp"]


@pytest.mark.parametrize("image", [b"", b"GIF89a", b"<svg/>", b"RIFF1234WAVE", b"file:///etc/passwd"])
def test_other_images_are_refused(image: bytes) -> None:
    with pytest.raises(BadImageError, match="no PNG, JPEG or WebP"):
        request_body("m", (Message("user", "q", (image,)),), Sampling(), {}, {})


@given(st.text(st.characters()))
def test_any_text_can_be_sent(text: str) -> None:
    fields = json.loads(request_body("m", (Message("user", text),), Sampling(), {}, {}))
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


@pytest.mark.parametrize("text", [42, ["42"], {"text": "42"}, [{"type": "text", "text": 42}], [{"type": "text"}]])
def test_the_text_is_a_text(text: object) -> None:
    with pytest.raises(BadReplyError, match=r"message\.content"):
        read_completion(completion(text))


def test_what_is_wrong_is_said_in_few_words_wherever_it_stands() -> None:
    """A server that sends another fault each time must not fill the log: each text is logged once."""
    said = set()
    for place in range(20):
        with pytest.raises(BadReplyError) as raised:
            read_completion(completion([{"type": "text", "text": "a"}] * place + [42]))
        said.add(str(raised.value))
    assert len(said) == 1


def test_no_content_is_an_empty_text() -> None:
    """Servers say null of a refusal, and where thoughts have used up the tokens: that is no fault of theirs."""
    assert read_completion(completion(None)).text == ""


def message(**fields: object) -> bytes:
    """A completion whose message has these fields."""
    body = json.loads(completion(None))
    body["choices"][0]["message"] = {"role": "assistant", **fields}
    return json.dumps(body).encode()


def test_the_texts_of_parts_are_joined() -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    parts = [thought, {"type": "text", "text": "forty"}, {"type": "text", "text": "-two"}]
    found = read_completion(completion(parts))
    assert (found.text, found.quirks) == ("forty-two", (Quirk.PARTS,))
    assert read_completion(completion([])).text == ""


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_tool_calls_without_content_are_an_empty_text_that_says_so(content: dict[str, object]) -> None:
    call = {"type": "function", "function": {"name": "answer", "arguments": "{}"}}
    found = read_completion(message(tool_calls=[call], **content))
    assert (found.text, found.quirks) == ("", (Quirk.TOOL_CALLS,))
    assert read_completion(message(tool_calls=[call], content="42")).quirks == ()
    with pytest.raises(BadReplyError, match="content"):
        read_completion(message(tool_calls=[]))  # neither


@pytest.mark.parametrize("usage", [None, {}])
def test_tokens_without_usage_are_estimated(usage: object) -> None:
    body = json.loads(completion("\u2014" * 3))
    body["usage"] = usage
    estimated = Completion("\u2014" * 3, 0, 3, (Quirk.NO_USAGE,))  # 9 bytes
    assert read_completion(json.dumps(body).encode()) == estimated
    del body["usage"]
    assert read_completion(json.dumps(body).encode()) == estimated


def test_tokens_of_a_request_are_estimated_by_its_bytes_and_images() -> None:
    assert estimate_tokens((Message("system", "be brief"), Message("user", "how many?", (b"", b"")))) == 2 + 3 + 2000


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
