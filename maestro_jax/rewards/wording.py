"""Honest answers in words: numbers, counts with their nouns, sentences that say one thing.

In: one folded statement (`reading.fold_text`) of untrusted text. Out: what it says, or None. A sentence is read by a
small grammar and never searched: whatever stands beside the value has to be harmless, so that "not 3", "3 or 4",
"3 too many" and "about 3" say nothing.
"""

import re
import string

MAX_CHARS = 160  # of a sentence; what is longer is an essay

_ONES = dict(zip("one two three four five six seven eight nine".split(), range(1, 10), strict=True))
_TEENS = dict(
    zip(
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(),
        range(10, 20),
        strict=True,
    )
)
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_VALUES = {"a": 1, **_ONES, **_TEENS, **_TENS}
NUMBER_WORDS = frozenset({"zero", "hundred", "thousand", "million", *_ONES, *_TEENS, *_TENS})

_ONE = "|".join(_ONES)
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?: (?:{_ONE}))?|{'|'.join(_TEENS)}|{_ONE})"
_BELOW_1000 = rf"(?:(?:{_ONE}|a) hundred(?: (?:and )?{_BELOW_100})?|{_BELOW_100})"
_NUMBER = re.compile(
    rf"(?:(?P<million>{_BELOW_1000}|a) million(?: |$))?(?:(?P<thousand>{_BELOW_1000}|a) thousand(?: |$))?"
    rf"(?:(?:(?<=.)and )?(?P<rest>{_BELOW_1000}))?"
)

# What opens a sentence about a count, and about anything.
_THERE = r"there (?:is|are|was|were)|there's|(?:i|we) (?:can )?(?:see|count|counted)"
_COUNTING = re.compile(
    rf"(?:(?:{_THERE}|(?:the|this) (?:image|picture|photo|scene) (?:shows|has|contains)) )?"
    r"(?:exactly |only |just |a total of )?"
)
_COPULA = re.compile(r"(it|this|that|they|these|those|the [a-z' -]{1,60}?)(?:'s| is| are| was| were) (?:exactly )?(.+)")
_ARTICLE = re.compile(r"(?:[Tt]he|[Aa]n|a) (?=.)")  # a capital A may be an option's letter
_WORD = re.compile(r"[a-z][a-z'-]+")
# Around an option's text in a sentence.
_VERBS = frozenset("is are was were it's that's shows show has contains looks appears seems says faces moves".split())
_BEFORE = _VERBS | frozenset("the a an on in at to of by from with as be called named facing moving towards".split())
_BEHIND = frozenset("side one end option of in on at to from with because since as here there".split())

# A sentence with one of these says something else than the values in it, or more, or less.
DOUBT = frozenset(
    "not no none never neither nor without isn't aren't wasn't weren't don't doesn't didn't can't cannot won't ain't "
    "wrong incorrect false untrue unlikely impossible opposite contrary other others another else instead rather "
    "except excluding unless unlike but although though however or either both between and plus minus times half "
    "about around approximately approx roughly nearly almost circa maybe perhaps possibly probably likely might may "
    "could would should if whether hardly barely far off least most more less fewer than too many much over under "
    "above below up short extra double twice dozen dozens pair pairs couple couples percent percentage billion "
    "trillion degree degrees tenths hundredths first second third all every each any some several few".split()
)
_NO_COUNT = frozenset("idea clue answer information doubt way need reason one problem matter question telling".split())
_PLURALS = ("people", "children", "men", "women", "sheep", "fish")
_MOST_BEHIND = 6  # words behind a count
_COPULAS = ("is", "are", "was", "were", "be", "been")  # "3 is wrong"


def parse_words(text: str) -> int | None:
    """The whole number below 10^9 that words say: "twenty-one", "a hundred and five"; None for anything else."""
    plain = text.replace("-", " ")
    if plain == "zero":
        return 0
    match = _NUMBER.fullmatch(plain) if 0 < len(plain) <= MAX_CHARS else None
    if match is None:
        return None
    parts = [match[name] for name in ("million", "thousand", "rest")]
    return sum(_below_1000(part) * 1000**power for part, power in zip(parts, (2, 1, 0), strict=True) if part)


def _below_1000(words: str) -> int:
    value = 0
    for word in words.split():
        value = value * 100 if word == "hundred" else value + _VALUES.get(word, 0)
    return value


def count_in(text: str) -> int | None:
    """The count that a phrase or a sentence states: "3 dogs", "there are three dogs", "none", "no dogs".

    Of the noun and what follows it, `_MOST_BEHIND` words may stand there, none of them a number or in `DOUBT`.
    """
    if not 0 < len(text) <= MAX_CHARS:
        return None
    opening = _COUNTING.match(text)
    opened, text = bool(opening and opening[0]), text[opening.end() :] if opening else text
    if text in ("none", "zero", "no") or (text.startswith("none of ") and harmless(text.split()[1:])):
        return 0
    words = text.split(" ")
    if words[0] in ("no", "zero") and len(words) > 1:
        noun = words[1:]
        is_noun = opened or words[0] == "zero" or noun[0].endswith("s") or noun[0] in _PLURALS
        return 0 if is_noun and harmless(noun) and not _NO_COUNT & {word.rstrip("s") for word in noun} else None
    for length in range(min(len(words), 12), 0, -1):
        number = " ".join(words[:length])
        value = int(number) if re.fullmatch(r"[0-9]{1,9}", number) else parse_words(number)
        if value is not None:
            return value if harmless(words[length:]) else None
    return None


def harmless(words: list[str]) -> bool:
    """Whether words behind a count leave it as it is."""
    return len(words) <= _MOST_BEHIND and all(
        _WORD.fullmatch(word)
        and word not in DOUBT
        and word not in NUMBER_WORDS
        and word not in _COPULAS
        and not set(word.split("-")) & (DOUBT | NUMBER_WORDS)
        for word in words
    )


def predicate(text: str) -> str | None:
    """What a sentence such as "it is red" or "the value is 100" says of its subject, without an article."""
    match = _COPULA.fullmatch(text) if 0 < len(text) <= MAX_CHARS else None
    if match is None or (DOUBT | NUMBER_WORDS) & set(match[1].split()):
        return None
    return without_article(match[2])


def without_article(text: str) -> str:
    """`text` without "the", "a" or "an" before a further word."""
    article = _ARTICLE.match(text)
    return text[article.end() :] if article else text


def only_one_of(text: str, phrases: dict[str, str]) -> str | None:
    """The key of the only phrase that a sentence names ("it is on the left side"), where nothing takes that back.

    The phrase stands between words that leave it as it is: "it is dark green" does not say "green". One inside another
    that is named, too, does not count ("dog" in "hot dog").

    Args:
      phrases: key → folded text.
    """
    if not 0 < len(text) <= MAX_CHARS or re.search(r"[.;:!?] ", text):
        return None
    words = _bare(text)
    found = [(at, at + size, key) for key, phrase in phrases.items() for at, size in _places(words, _bare(phrase))]
    outer = [one for one in found if not any(_is_inside(one, other) for other in found)]
    if len({key for *_, key in outer}) != 1:
        return None
    named = {at for begin, end, _ in outer for at in range(begin, end)}
    beside = [word for at, word in enumerate(words) if at not in named]
    if not _VERBS & set(beside) or any(
        word in DOUBT or word in NUMBER_WORDS or not re.fullmatch("[a-z'-]+", word) for word in beside
    ):
        return None
    begin, end, key = outer[0]
    fits = words[begin - 1 : begin] and words[begin - 1] in _BEFORE and (end == len(words) or words[end] in _BEHIND)
    return key if fits and len(outer) == 1 else None


def _bare(text: str) -> list[str]:
    return [word.strip(string.punctuation) for word in text.split()]


def _places(words: list[str], phrase: list[str]) -> list[tuple[int, int]]:
    """Where the phrase stands; a single letter is no phrase, it may be an article or another option's name."""
    if not phrase or max(map(len, phrase)) < 2:
        return []
    size = len(phrase)
    return [(at, size) for at in range(len(words) - size + 1) if words[at : at + size] == phrase]


def _is_inside(one: tuple[int, int, str], other: tuple[int, int, str]) -> bool:
    return one[:2] != other[:2] and other[0] <= one[0] and one[1] <= other[1]
