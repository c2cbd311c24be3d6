"""Judges are asked: judgements in, outcomes out, by the run's dispatcher as any call.

So a request has deadline, retries, caps, cache and journal, and a replay gives the same outcomes without anybody being
asked. Outcomes stand in the order of what is asked, whoever answers first. A reply without a verdict is asked for
again; who still gives none, or fails, leaves the answer without an outcome: it is never scored for that.
"""

import concurrent.futures
import dataclasses
import logging
import math
from collections.abc import Sequence

from maestro_jax.parallel import preemption
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.registry.skills.running import failure
from maestro_jax.rewards.judges import Judgement
from maestro_jax.rollout.outages import Marks, Outages
from maestro_jax.types import Call, Observation, Status

ATTEMPTS = 3  # at a verdict that can be read
_IN_FLIGHT = 64  # a deadline counts from the submission, so what waits for its turn here must not be submitted

logger = logging.getLogger(__name__)


class Judging:
    """Asks the judges of a run. All processes call it side by side, each with the judgements of its own episodes.

    Args:
      outages: has what failed asked again, waits for judges that are out, and stops the run where too many verdicts are
        missing; None leaves them missing.
      step: episodes of this process in a step. Shares of missing verdicts are of at least so many, however few are
        judged at a time: one that always fails must not block the run.
    """

    def __init__(self, dispatcher: Dispatcher, outages: Outages | None = None, step: int = 0):
        self._dispatcher, self._outages, self._step = dispatcher, outages, step

    def __call__(self, asked: Sequence[tuple[str, Judgement]], episodes: int) -> list[float]:
        """The outcome of each, NaN where there is none.

        Args:
          episodes: of which these are to be judged.

        Raises:
          UserError: a call ended with it, or it is the set-up of a judge that is wrong.
          Preempted: the run was told to stop, or a judge did not come back in time.
        """
        outcomes = [math.nan] * len(asked)
        attempts = [1] * len(asked)
        failed: dict[int, Status] = {}

        def ask(numbers: Sequence[int]) -> None:
            left, waiting = list(reversed(numbers)), dict[concurrent.futures.Future[Observation], int]()
            while (left or waiting) and not preemption.requested():
                while left and len(waiting) < _IN_FLIGHT:
                    number = left.pop()
                    waiting[self._submit(*asked[number], attempts[number])] = number
                done, _ = concurrent.futures.wait(waiting, 1.0, concurrent.futures.FIRST_COMPLETED)
                for number, seen in [(waiting.pop(one), one.result()) for one in done]:
                    failed.pop(number, None)
                    if seen.status is not Status.OK:
                        failed[number] = seen.status
                    elif (outcome := asked[number][1].read(seen.text)) is not None:
                        outcomes[number] = outcome
                    elif attempts[number] < ATTEMPTS:
                        attempts[number] += 1
                        left.append(number)
                    else:  # to ask again does not help
                        failed[number] = Status.CONFIG_ERROR
                        name = asked[number][1].judge.expert
                        logger.warning('judge "%s" gives no verdict; its reply ends with %r', name, seen.text[-80:])
            preemption.check()
            self._dispatcher.check()

        def marks() -> Marks:
            judges = [(number, judgement.judge.expert) for number, (_, judgement) in enumerate(asked)]
            own = Marks.of((n in failed, [(name, failed[n])] if n in failed else []) for n, name in judges)
            return dataclasses.replace(own, total=max(episodes, self._step)).everywhere()

        def again() -> None:
            numbers = [number for number, status in sorted(failed.items()) if status is not Status.CONFIG_ERROR]
            self._dispatcher.void([_asker(asked[number][0], attempts[number]) for number in numbers])
            ask(numbers)

        ask(range(len(asked)))
        if self._outages is not None:
            self._outages.insist(marks, again, "verdicts")
        return outcomes

    def check(self, unjudged: Sequence[str]) -> None:
        """Refuses a step too many of whose verdicts are missing.

        What is missing by now does not come by waiting: judges refuse to be asked, or write no verdict.

        Raises:
          ConfigError: so it is.
        """
        if self._outages is not None:
            marks = Marks.of((bool(name), [(name, Status.CONFIG_ERROR)] if name else []) for name in unjudged)
            self._outages.check(marks.everywhere(), "verdicts")

    def _submit(self, asker: str, judgement: Judgement, attempt: int) -> concurrent.futures.Future[Observation]:
        judge = judgement.judge
        # The prompt stands where a call's question does, which no journal holds: there are gold answers in it.
        call = Call(judge.expert, "", "verdict")
        prompt, asker = judgement.asked(attempt), _asker(asker, attempt)
        try:
            return self._dispatcher.ask(call, prompt, judgement.images, judge.deadline, asker)
        except Exception:  # no thread to be had, say: the call failed, and the others go on
            logger.exception('judge "%s" could not be asked', judge.expert)
            lost = concurrent.futures.Future[Observation]()
            lost.set_result(failure(Status.UNAVAILABLE))
            return lost


def _asker(asker: str, attempt: int) -> str:
    return f"{asker}/verdict {attempt}"
