"""A byte-level stop automaton: finds a tag however the vocabulary cuts it, on the device.

Aho-Corasick over bytes, folded over each token's bytes into one table `[states, V]`: one gather a
token tells whether the text so far has completed `</search>` or `</answer>`.
"""

from collections.abc import Sequence

import numpy as np

from maestro_jax.types import StopReason

CLOSING_TAGS = (("</search>", StopReason.CALL), ("</answer>", StopReason.ANSWER))
START = 0


def build_automaton(
    token_bytes: Sequence[bytes], tags: Sequence[tuple[str, StopReason]] = CLOSING_TAGS
) -> tuple[np.ndarray, np.ndarray]:
    """Builds the transition table.

    Args:
      token_bytes: the bytes of every token id; empty for special tokens.
      tags: what to find, with the reason to stop that it stands for.

    Returns:
      next state int32 `[states, V]`, and the `StopReason` of each state int32 `[states]`. States
      that have found a tag absorb, so a tag in the middle of a token counts.
    """
    byte_table, reasons = _byte_automaton([(tag.encode(), reason) for tag, reason in tags])
    states = len(byte_table)
    table = np.tile(np.arange(states, dtype=np.int32)[:, None], (1, len(token_bytes)))
    longest = max((len(piece) for piece in token_bytes), default=0)
    for position in range(longest):
        reached = [i for i, piece in enumerate(token_bytes) if len(piece) > position]
        at = np.array([token_bytes[i][position] for i in reached])
        table[:, reached] = byte_table[table[:, reached], at[None, :]]
    return table, reasons


def _byte_automaton(patterns: Sequence[tuple[bytes, StopReason]]) -> tuple[np.ndarray, np.ndarray]:
    """Complete transitions `[states, 256]` over bytes and the reason of each state."""
    starts = {pattern[:n] for pattern, _ in patterns for n in range(len(pattern) + 1)}
    prefixes = sorted(starts, key=lambda prefix: (len(prefix), prefix))
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    reason_of = dict(patterns)
    table = np.zeros((len(prefixes), 256), np.int32)
    for prefix, state in number.items():
        for byte in range(256):
            if prefix in reason_of:
                table[state, byte] = state
                continue
            text = prefix + bytes([byte])
            # The longest suffix of what was read that is a prefix of some tag.
            table[state, byte] = next(number[text[cut:]] for cut in range(len(text) + 1) if text[cut:] in number)
    reasons = np.array([int(reason_of.get(prefix, StopReason.NONE)) for prefix in prefixes], np.int32)
    return table, reasons
