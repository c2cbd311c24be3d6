"""Places at which a run can be told to die: how they are named, counted, and what they do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from maestro_jax import failpoints
from maestro_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def disarmed() -> None:
    yield
    failpoints.arm("")


def test_the_place_is_counted() -> None:
    failpoints.arm("after_update:3:RAISE")
    for place in ("after_update", "after_rollout", "after_update", "after_rollout", "after_rollout"):
        failpoints.reach(place)
    with pytest.raises(failpoints.FailPointError, match="after_update"):
        failpoints.reach("after_update")
    failpoints.reach("after_update")  # it is behind us


def test_several_places_are_counted_each_for_itself() -> None:
    failpoints.arm("before_update:2:NAN,before_update:3:NAN,after_update:1:RAISE")
    assert [failpoints.reach("before_update") for _ in range(4)] == [False, True, True, False]
    with pytest.raises(failpoints.FailPointError):
        failpoints.reach("after_update")


def test_nothing_happens_unless_asked_for() -> None:
    failpoints.arm("")
    for place in failpoints.NAMES:
        failpoints.reach(place)


@pytest.mark.parametrize(("action", "code"), [("KILL", -9), ("TERM", -15), ("INT", -2), ("RAISE", 1)])
def test_actions_end_a_process(action: str, code: int) -> None:
    heard = "import signal as s; s.signal(s.SIGINT, s.SIG_DFL)"  # ignored where the tests run in the background
    script = f"from maestro_jax import failpoints as f; f.arm('after_pull:1:{action}'); f.reach('after_pull')"
    command = [sys.executable, "-c", f"{heard}; {script}"]
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == code


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("after_rollout", "is not NAME:COUNT:ACTION"),
        ("after_rollout:0:KILL", "is not NAME:COUNT:ACTION"),
        ("after_rollout:x:KILL", "is not NAME:COUNT:ACTION"),
        ("after_rollout:1:KILL:2", "is not NAME:COUNT:ACTION"),
        ("after_rollout:1:NAN", "nothing is spoiled at after_rollout; use before_update:1:NAN"),
        ("after_rollot:1:KILL", "there is no place 'after_rollot'; use one of "),
        ("after_rollout:1:STOP", "there is no action 'STOP'; use one of KILL, TERM, INT, RAISE"),
    ],
)
def test_mistakes_are_told(setting: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"MAESTRO_FAILPOINT={setting}") + ".*" + re.escape(says)):
        failpoints.arm(setting)


def test_every_place_is_in_the_code_and_in_the_documentation() -> None:
    """The list of names is the whole truth: none is reached that is not there, and none is there for nothing."""
    sources = [path.read_text() for path in (ROOT / "maestro_jax").rglob("*.py")]
    reached = {name for source in sources for name in re.findall(r'failpoints\.reach\("(\w+)"\)', source)}
    assert reached == set(failpoints.NAMES)
    told = (ROOT / "docs/reliability.md").read_text()
    assert [name for name in failpoints.NAMES if f"`{name}`" not in told] == []
