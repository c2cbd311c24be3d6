"""Evaluates a policy on held-out tasks: benchmark by benchmark, greedy and sampled, beside routing without learning.

    python -m maestro_jax.evaluate --checkpoint runs/quickstart --output runs/evaluation

A run is evaluated with its own settings; --config.KEY=VALUE changes one, and --config says which tasks and experts to
take instead. The same command goes on where an earlier one stopped. --output receives evaluation.json, evaluation.md,
accuracy.png, routing.png, and the graded episodes, one a line, in episodes.jsonl. `maestro_jax.api.evaluate` is the
same as a function.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from maestro_jax import command
from maestro_jax.checkpoint.run import find_run
from maestro_jax.config import complete
from maestro_jax.jobs.evaluate import evaluate
from maestro_jax.parallel import cluster

CONFIG = command.config_flag(complete)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Work directory of a run, its checkpoints/, or one checkpoint; else config.policy.init_from."
)
OUTPUT = flags.DEFINE_string("output", "", "Directory of the results; an interrupted evaluation there goes on.")
BENCHMARKS = flags.DEFINE_list("benchmarks", [], "Sources of tasks, separated by commas; all if empty.")
TASKS = flags.DEFINE_integer("tasks", 0, "Most tasks of each benchmark, the first ones; 0 takes all.", lower_bound=0)
SAMPLES = flags.DEFINE_integer("samples", 0, "Sampled episodes of each task, besides the greedy one.", lower_bound=0)
BASELINES = flags.DEFINE_bool("baselines", False, "Also call every pair on every task.")
REPLAY = flags.DEFINE_string("replay", "", "The journal.jsonl of an evaluation: its calls are answered from there.")


def main(argv: Sequence[str]) -> None:
    del argv
    raw = CONFIG.value
    report = evaluate(
        OUTPUT.value,
        checkpoint=CHECKPOINT.value,
        config={group: raw[group] for group in raw if group in command.given_groups()},
        overrides=config_flags.get_override_values(flags.FLAGS["config"]),
        benchmarks=BENCHMARKS.value,
        tasks=TASKS.value,
        samples=SAMPLES.value,
        baselines=BASELINES.value,
        replay=REPLAY.value,
        progress="terminal",
    )
    if cluster.is_main():
        print(report.markdown())
        made = "evaluation.json, .md, accuracy.png, routing.png, episodes.jsonl"
        print(f"written to {report.output} in {report.seconds:.0f} s: {made}")


def config_of_run() -> str:
    return str(find_run(Path(CHECKPOINT.value)).workdir / "config.json") if CHECKPOINT.value else ""


if __name__ == "__main__":
    command.run(main, required=("config", "output"), own_config=config_of_run)
