"""Graders and terms of the user's own: what they may give, and what is said where they do not."""

import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.rewards.graders import GRADERS, Answer, Graders
from maestro_jax.rewards.reward import EpisodeSummary, RewardConfig, Scorer, Turn
from maestro_jax.types import Call, Observation, Status, Task

MINE = "tests.rewards.mine"
TASK = Task("t/1", "Which word?", (), ("seven",), "words")


def graders(**own: Any) -> Graders:
    return Graders({name: f"{MINE}:{value}" if isinstance(value, str) else value for name, value in own.items()})


def outcome(made: Graders, answer: str, task: Task = TASK) -> float:
    return made.outcomes([Answer(task, answer)])[0]


def message(act: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- who grades --------------------------------------------------------------------------------------------


def test_partial_credit() -> None:
    made = graders(words="share_of_letters")
    assert [outcome(made, answer) for answer in ("seven", "sever", "sets", "")] == [1.0, 0.8, 0.4, 0.0]


def test_a_source_may_take_a_built_in_grader_and_put_another_in_its_place() -> None:
    made = Graders({"words": "ChartQA", "counting": f"{MINE}:share_of_letters"})
    assert made.find("Words") is GRADERS["ChartQA"]
    assert outcome(made, "50", Task("", "", (), ("40",), "counting")) == 0.5
    assert Graders().find("counting") is GRADERS["counting"]  # elsewhere nothing has changed


def test_sources_without_a_grader_get_the_one_for_others() -> None:
    made = Graders({"*": f"{MINE}:share_of_letters"})
    assert outcome(made, "sever", dataclasses.replace(TASK, source="riddles")) == 0.8
    assert made.find("ChartQA") is GRADERS["ChartQA"]
    assert message(lambda: made.find("riddles", "strict")).startswith('no grader is called "strict"; known: ')


def test_a_task_may_name_its_grader_apart_from_its_source() -> None:
    made = graders(letters="share_of_letters")
    assert outcome(made, "sever", dataclasses.replace(TASK, grader="letters")) == 0.8
    assert outcome(made, "SEVEN", dataclasses.replace(TASK, source="x", grader="reading")) == 1.0


def test_data_cannot_name_code() -> None:
    task = dataclasses.replace(TASK, grader=f"{MINE}:share_of_letters")
    assert "no grader is called" in message(lambda: outcome(graders(words="share_of_letters"), "seven", task))


def test_numbers_of_numpy_and_equations_are_outcomes() -> None:
    assert [outcome(graders(words="as_numpy"), answer) for answer in ("yes", "no")] == [1.0, 0.5]
    task = Task("", "", (), (r"\sqrt{8}",), "words")
    assert [outcome(graders(words="as_algebra"), answer, task) for answer in (r"2\sqrt{2}", "3")] == [1.0, 0.0]


def test_only_graders_that_look_at_images_are_shown_them() -> None:
    made = Graders({"words": f"{MINE}:sees_images", "plain": "ChartQA"})
    assert made.looks_at_images(TASK) and not made.looks_at_images(dataclasses.replace(TASK, source="plain"))


# ---- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["nan", "2.0", "-0.1", "None", "'yes'", "inf", "[1]", "2", "1j", "huge", "endless"])
def test_what_is_no_outcome_is_an_error_that_names_grader_task_and_cure(given: str) -> None:
    told = message(lambda: outcome(graders(words="gives"), given))
    assert told.startswith(f'config.graders.words: {MINE}:gives on task "t/1" gave ')
    assert told.endswith("; correct it, so that it gives True, False or a number from 0 to 1")


def test_what_raises_is_an_error_of_one_line() -> None:
    wanted = f"config.graders.words: {MINE}:raises on task \"t/1\" raised an error (KeyError: 'what\\nnow'); correct it"
    assert message(lambda: outcome(graders(words="raises"), "x")) == wanted


ENTRIES = [
    ("nobody.knows:it", 'config.graders.words "nobody.knows:it" does not import'),
    (f"{MINE}:nothing", f'config.graders.words "{MINE}:nothing" does not import'),
    (f"{MINE}:__doc__", "is neither a class nor a function"),
    ("ChartAQ", 'is neither a built-in grader nor "package.module:name"; did you mean "ChartQA"?'),
    (7, 'must be the name of a built-in grader, "package.module:name", or a mapping'),
    ({"grader": "ChartQA"}, "is built in and needs no processes; name it alone"),
    ({"grader": f"{MINE}:gives", "second": 2}, 'unknown key "second"; did you mean "seconds"?'),
    ({"grader": f"{MINE}:gives", "processes": 0}, "processes must be an integer of at least 1, found 0"),
    ({"grader": f"{MINE}:gives", "seconds": "2"}, "seconds must be a number above 0, up to 3600, found '2'"),
    ({"grader": f"{MINE}:gives", "judge": "Referee"}, 'a mapping with "judge" or "grader"'),
    ({"judge": "Referee"}, 'config.graders.words.judge "Referee" is no expert of the registry'),
]


@pytest.mark.parametrize(("entry", "told"), ENTRIES, ids=range(len(ENTRIES)))
def test_a_wrong_entry_is_one_line_with_its_cure(entry: Any, told: str) -> None:
    assert told in message(lambda: Graders({"words": entry}))


def test_a_key_that_is_no_text_is_one_line() -> None:
    entries: Any = {5: "ChartQA"}
    assert message(lambda: Graders(entries)) == "config.graders has the key 5; keys are names of sources, so quote it"


def test_a_source_with_dots_is_named_without() -> None:
    """Keys of a config have none."""
    assert Graders({"MMMUval": "ChartQA"}).find("MMMU.val") is GRADERS["ChartQA"]


def test_two_names_that_count_as_one_are_refused() -> None:
    assert 'has "my-words" twice' in message(lambda: graders(my_words="gives", **{"my-words": "gives"}))


# ---- in processes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosted() -> Iterator[Graders]:
    made = Graders({"words": {"grader": f"{MINE}:endless", "processes": 2, "seconds": 0.5}})
    made.open([("words", "")])
    yield made
    made.close()


def test_an_answer_that_takes_too_long_or_crashes_is_not_right_and_told(
    hosted: Graders, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = hosted.outcomes([Answer(TASK, answer) for answer in ("loop", "seven", "crash", "six", "seven")])
    assert found == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert hosted.find("words").late == 2  # type: ignore[union-attr]
    told = [record.getMessage() for record in caplog.records if "gave no verdict" in record.getMessage()]
    assert len(told) == 2 and all('on task "t/1" within 0.5 s of computing' in line for line in told)


def test_equal_answers_are_graded_in_processes_once(hosted: Graders) -> None:
    late = hosted.find("words").late  # type: ignore[union-attr]
    assert hosted.outcomes([Answer(TASK, answer) for answer in ("loop", "seven", "loop", "loop")]) == [0, 1, 0, 0]
    assert hosted.find("words").late == late + 1  # type: ignore[union-attr]


def test_a_hosted_grader_is_told_the_whole_task() -> None:
    made = Graders({"words": {"grader": f"{MINE}:sees_images"}, "letters": {"grader": f"{MINE}:share_of_letters"}})
    try:
        assert outcome(made, "x", dataclasses.replace(TASK, images=(b"1", b"2"))) == 0.5
        assert outcome(made, "sever", dataclasses.replace(TASK, grader="letters", choices=("a", "b"))) == 0.8
    finally:
        made.close()


@dataclasses.dataclass(frozen=True)
class Graded(Task):
    """A task of a user's own source."""

    year: int = 0


def test_a_task_with_further_fields_is_graded_in_processes_too() -> None:
    """Every answer to it once counted as late and not right."""
    made = Graders({"words": {"grader": f"{MINE}:share_of_letters", "processes": 1}})
    try:
        assert outcome(made, "sever", Graded(**vars(TASK), year=1999)) == 0.8
    finally:
        made.close()


def test_a_hosted_grader_that_exits_is_an_error() -> None:
    made = Graders({"words": {"grader": f"{MINE}:leaves", "processes": 1}})
    try:
        assert f"config.graders.words: {MINE}:leaves gave no outcome (SystemExit" in message(lambda: outcome(made, "x"))
    finally:
        made.close()


def test_errors_of_a_hosted_grader_are_those_of_a_plain_one() -> None:
    made = Graders({"words": {"grader": f"{MINE}:gives"}})
    try:
        assert message(lambda: outcome(made, "2.0")) == message(lambda: outcome(graders(words="gives"), "2.0"))
    finally:
        made.close()


# ---- terms of the reward -----------------------------------------------------------------------------------

CALLS = tuple((Call(expert, "Look", "q"), Observation("7", Status.OK)) for expert in ("A", "B", "A"))
EPISODE = EpisodeSummary("seven", 3, True, 0.0, 0.0, CALLS, (Turn("look", 5), Turn("seven", 7)))


def scorer(**terms: tuple[str, float]) -> Scorer:
    named = {name: {"term": f"{MINE}:{term}", "weight": weight} for name, (term, weight) in terms.items()}
    return Scorer(RewardConfig(terms=named), graders(words="share_of_letters"))


def test_terms_are_weighted_signed_parts_of_the_total() -> None:
    (parts,) = scorer(brevity=("brevity", -0.01), again=("asked_twice", -0.5))([(TASK, EPISODE)])
    assert parts.terms == {"brevity": pytest.approx(-0.12), "again": -0.5}
    assert parts.total == pytest.approx(1.0 - 0.12 - 0.5)


def test_a_term_that_is_not_finite_or_raises_names_task_and_cure() -> None:
    told = message(lambda: scorer(bad=("never", 1.0))([(TASK, EPISODE)]))
    assert told == (
        f'config.reward.terms.bad: {MINE}:never on task "t/1" gave nan; correct it, so that it gives a finite number'
    )
    assert "raised an error (KeyError" in message(lambda: scorer(bad=("raises", 1.0))([(TASK, EPISODE)]))


TERMS = [
    ("x/y", {"term": f"{MINE}:never", "weight": 1}, 'use letters, digits, "_" and "-"'),
    ("x", f"{MINE}:never", 'must be {"term": "package.module:name", "weight": number}'),
    ("x", {"term": f"{MINE}:never"}, 'must be {"term": "package.module:name", "weight": number}'),
    ("x", {"term": f"{MINE}:never", "weight": math.inf}, "weight must be a finite number, found inf"),
    ("x", {"term": f"{MINE}:nothing", "weight": 1}, "does not import"),
]


@pytest.mark.parametrize(("name", "value", "told"), TERMS, ids=range(len(TERMS)))
def test_a_wrong_term_is_one_line_with_its_cure(name: str, value: Any, told: str) -> None:
    found = message(lambda: Scorer(RewardConfig(terms={name: value})))
    assert found.startswith(f"config.reward.terms.{name}") and told in found
