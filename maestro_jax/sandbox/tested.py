"""Whether a program passes its tests, both untrusted: run in a sandbox, judged by more than an exit code.

The program is imported, then the tests run in its namespace (`harness.py`). They are passed if a token that is drawn
for this one run comes back, with at least one assert that held: the token waits in standard input until the tests are
over, so neither leaving early with exit code 0 nor anything that runs at exit can bring it.

What remains possible: program and tests share an interpreter. A program that sets out to deceive can read standard
input by its descriptor and write what the harness would, change the list of asserts that held, or return objects that
equal everything. It misleads about itself then, and gets out of the sandbox no more than before.
"""

import dataclasses
import enum
import pathlib
import re
import secrets

from maestro_jax.sandbox.interface import Limits, RanStatus, Sandbox

_HARNESS = pathlib.Path(__file__).with_name("harness.py").read_text(encoding="utf-8")


class Verdict(enum.Enum):
    """What tests say of a program."""

    PASSED = "passed"
    FAILED = "failed"
    UNTESTED = "untested"  # the tests are no Python, or no assert in them was reached
    UNAVAILABLE = "unavailable"  # the sandbox failed


@dataclasses.dataclass(frozen=True)
class Judged:
    """A verdict, why it is FAILED (foreign text; the end says most), and the seconds that the sandbox took."""

    verdict: Verdict
    why: str
    seconds: float


async def run_tests(sandbox: Sandbox, program: str, tests: str, limits: Limits) -> Judged:
    """Runs `tests` (assert statements) in the namespace of `program`. Raises nothing for what either does."""
    token = secrets.token_hex(16)
    files = {"program.py": program.encode("utf-8", "replace"), "tests.py": tests.encode("utf-8", "replace")}
    ran = await sandbox.run(_HARNESS, files, limits, stdin=token.encode())
    if ran.status is RanStatus.UNAVAILABLE:
        return Judged(Verdict.UNAVAILABLE, "", ran.seconds)
    if ran.status is not RanStatus.OK:
        ending = "" if ran.status is RanStatus.ERROR and ran.stderr else f"it ended with: {ran.status.value}"
        return Judged(Verdict.FAILED, f"{ran.stderr.strip()}\n{ending}".strip(), ran.seconds)
    over = re.search(rf"{token} ([0-9]{{1,9}})\n", ran.stdout)
    if over is None:
        return Judged(Verdict.FAILED, "it ended before its tests were over", ran.seconds)
    return Judged(Verdict.PASSED if int(over[1]) else Verdict.UNTESTED, "", ran.seconds)
