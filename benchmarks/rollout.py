"""Rollouts: what the policy computes against transformers, and what waiting for experts costs against others' loops.

    python -m benchmarks.rollout [--json FILE] [--pairs 7] [--only D1,D2] [--timeline FILE] [--peers DIR] [--smoke]

`rollout_decode.py` says what D1, D2, W1 and N1 are, `rollout_schedule.py` and `rollout_steady.py` what S1 and steady
are.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from absl import flags

from benchmarks import pairs, rollout_decode, rollout_schedule, rollout_steady
from benchmarks.pairs import Figure, Result
from maestro_jax import command
from maestro_jax.errors import ConfigError
from maestro_jax.observe.progress import Progress

ONLY = flags.DEFINE_list("only", [], "Measures to take (D1, D2, W1, N1, S1, steady); all of them by default.")
TIMELINE = flags.DEFINE_string("timeline", "", "PNG file for what the lanes of `steady` did.")

Measure = Callable[[Progress], Mapping[str, Result | Figure]]


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")  # that is where the peers run
    pairs.use_all_cores()
    results: dict[str, Result | Figure] = {}
    with Progress(sys.stderr) as progress:
        for measure in chosen(measures(pairs.SMOKE.value), ONLY.value):
            results |= measure(progress)
            pairs.keep(results)
    pairs.report(results)


def measures(smoke: bool) -> dict[str, Measure]:
    """What takes each measure, at toy size or in full."""
    decode, schedule, steady = rollout_decode, rollout_schedule, rollout_steady
    long_prompt, turns, tasks = (
        (decode.TOY_PROMPT, decode.TOY_TURNS, decode.TOY_TASKS)
        if smoke
        else (decode.LONG_PROMPT, decode.FOUR_TURNS, decode.MIXED_TASKS)
    )
    count, picture = pairs.PAIRS.value, Path(TIMELINE.value) if TIMELINE.value else None
    return {
        "D1": lambda progress: decode.run_d1(long_prompt, progress),
        "D2": lambda progress: decode.run_d2(turns, progress),
        "W1": lambda progress: decode.run_w1(turns, progress),
        "N1": lambda progress: decode.run_n1(tasks, progress),
        "S1": lambda progress: schedule.run_s1(progress, count, smoke),
        "steady": lambda progress: steady.run_steady(progress, count, smoke, picture),
    }


def chosen(known: Mapping[str, Measure], names: Sequence[str]) -> list[Measure]:
    """The measures by these names; all if there is none.

    Raises:
      ConfigError: a name is unknown.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--only has {unknown[0]!r}; use some of {', '.join(known)}")
    return [known[name] for name in names or known]


if __name__ == "__main__":
    command.run(main, required=())
