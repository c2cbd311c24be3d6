"""Rollouts: what the policy computes against transformers, and what waiting for experts costs against others' loops.

    python -m benchmarks.rollout [--json FILE] [--pairs 7] [--only D1,D2] [--smoke]

`rollout_decode.py` says what D1, D2, W1 and N1 are.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import flags

from benchmarks import pairs, rollout_decode
from benchmarks.pairs import Figure, Result
from maestro_jax import command
from maestro_jax.errors import ConfigError
from maestro_jax.observe.progress import Progress

ONLY = flags.DEFINE_list("only", [], "Measures to take (D1, D2, W1, N1); all of them by default.")

Measure = Callable[[Progress], Mapping[str, Result | Figure]]


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")  # that is where the peers run
    pairs.use_all_cores()
    results: dict[str, Result | Figure] = {}
    with Progress(sys.stderr) as progress:
        for measure in chosen(measures(pairs.SMOKE.value), ONLY.value):
            results |= measure(progress)
    pairs.report(results)


def measures(smoke: bool) -> dict[str, Measure]:
    """What takes each measure, at toy size or in full."""
    decode = rollout_decode
    long_prompt, turns, tasks = (
        (decode.TOY_PROMPT, decode.TOY_TURNS, decode.TOY_TASKS)
        if smoke
        else (decode.LONG_PROMPT, decode.FOUR_TURNS, decode.MIXED_TASKS)
    )
    return {
        "D1": lambda progress: decode.run_d1(long_prompt, progress),
        "D2": lambda progress: decode.run_d2(turns, progress),
        "W1": lambda progress: decode.run_w1(turns, progress),
        "N1": lambda progress: decode.run_n1(tasks, progress),
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
