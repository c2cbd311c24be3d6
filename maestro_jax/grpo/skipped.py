"""Updates that were skipped since their loss or their gradient norm is not finite: what they name, when a run stops."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maestro_jax.checkpoint.fingerprint import read_through
from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.errors import NonFiniteError
from maestro_jax.grpo.update import Metrics, Total
from maestro_jax.parallel import cluster

NAMED = 8  # tensors and tasks that a record of a skipped update has at most
# Parts of the policy as the backward pass comes to them: what is not finite first is nearest to the cause.
_BACKWARD = ("language_model/norm", "language_model/layers", "language_model/deepstack_layers", "visual")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An update that changed nothing.

    Attributes:
      tensors: of the policy with a gradient that is not finite, as the backward pass comes to them.
      of: how many tensors are trained.
      tasks: whose own part of the loss, or its slope, is not finite; none where only the backward pass went wrong.
    """

    loss: float
    grad_norm: float
    tensors: Sequence[str]
    of: int
    tasks: Sequence[str]

    @classmethod
    def named(cls, update: Metrics, total: Total, tasks: Sequence[Sequence[str]]) -> "Skipped":
        """Of an update that was not made; all processes call it.

        Args:
          total: what the update was to be made of.
          tasks: of the groups of each microbatch, in the order of their rows: of this process's, or where every
            process has all groups, of all.
        """
        found = read_through(named_leaves(total.gradients))
        spoiled = [name.removesuffix("/value") for name, (_, count) in found.items() if count]
        own = set[str]()
        for rows, names in zip(total.spoiled, tasks, strict=True):
            shards = {shard.index[0].start or 0: shard.data for shard in rows.addressable_shards}
            spoiled_here = np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
            names = names[min(shards) :] if len(names) > len(spoiled_here) else names
            own.update(name for name, bad in zip(names, spoiled_here, strict=False) if bad)  # what is behind pads
        everybodys = sorted({task for each in cluster.gather(sorted(own)) for task in each})
        loss, norm = float(update["loss"]), float(update["grad_norm"])
        return cls(loss, norm, sorted(spoiled, key=_backward), len(found), everybodys)

    def to_json(self) -> dict[str, Any]:
        """For trained.jsonl: how many there are, and names of some."""
        both = {"tensors": self.tensors, "tasks": self.tasks}
        return {
            "loss_is_finite": math.isfinite(self.loss),
            "grad_norm_is_finite": math.isfinite(self.grad_norm),
            **{what: {"count": len(names), "first": list(names[:NAMED])} for what, names in both.items()},
        }

    def __str__(self) -> str:
        tasks = f"the loss of {_some(self.tasks)}" if self.tasks else "no task's own loss"
        return (
            f"loss {self.loss:g}, gradient norm {self.grad_norm:g}; not finite: {len(self.tensors)} of {self.of} "
            f"gradients (first {_some(self.tensors)}), {tasks}"
        )


class Skips:
    """Stops a run once several updates in a row were skipped.

    Args:
      limit: so many in a row.
      key: of the optimiser's settings.
      note: receives a line for every skipped update.
      in_a_row: how many were, up to now.
    """

    def __init__(self, limit: int, key: str, note: Callable[[str], None], in_a_row: int = 0):
        self.limit, self.in_a_row = limit, in_a_row
        self._key, self._note = key, note

    def after(self, where: str, skipped: Skipped | None) -> None:
        """Counts an update.

        Args:
          where: which one.
          skipped: None where it was made.

        Raises:
          NonFiniteError: it is the last of too many in a row.
        """
        if skipped is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self._note(f"the update of {where} is skipped: {skipped}")
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"{self.in_a_row} updates in a row were skipped, up to {where}: {skipped}. Parameters and checkpoints "
                f"are finite: start from the newest one in a new --workdir with a lower {self._key}.learning_rate or "
                'config.policy.compute_dtype="float32", leave out tasks that are always named, or raise '
                f"{self._key}.max_skipped and start the same command again"
            )


def _backward(name: str) -> tuple[int, str]:
    return next((n for n, part in enumerate(_BACKWARD) if name.startswith(part)), len(_BACKWARD)), name


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
