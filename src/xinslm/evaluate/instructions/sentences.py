"""Splits English text into sentences with the rules of Punkt (Kiss and Strunk 2006, sections 4-5).

Punkt's decisions depend on word lists that are learned from text. Here the lists are written by
hand: abbreviations, and common words that are lower-case inside a sentence. The rules are those of
NLTK 3.10, including their habits: "1." at the start of a list item is a sentence of its own, a
heading without a full stop belongs to the sentence after it, and "**" after a full stop begins the
next one.

It may differ from NLTK's trained model after an abbreviation that is in one list and not in the
other ("approx.", "Gov."), and where an abbreviation, "..." or an initial is followed by a
capitalized word that is not in `COMMON` (a name, or a rare word). Sentences that end in a plain
word, "?" or "!" are equal.
"""

import re
from collections.abc import Iterator
from itertools import pairwise, zip_longest

_ABBREVIATIONS = """
    mr mrs ms messrs dr prof st sr jr rev hon gen col lt capt maj sgt sen rep gov pres supt
    inc co corp ltd bros dept univ assn ave blvd rd mt ft vs etc cf al approx est vol ed eds fig
    jan feb mar apr jun jul aug sept sep oct nov dec mon tue tues wed thu thur thurs fri
    a.m p.m a.d b.c b.c.e c.e e.g i.e u.s u.k u.n u.s.a e.u d.c n.y l.a ph.d m.d b.a m.a b.s m.s
    j.r r.i.p p.o n.b
"""
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
"""Words that are written with a full stop, without the last one, lower-case."""

_TITLES = "mr mrs ms messrs dr prof rev hon gen col lt capt maj sgt sen rep gov"
TITLES = frozenset(_TITLES.split())
"""Abbreviations that a name follows: they never end a sentence (Punkt's collocations)."""

_COMMON = """
    a about after again all also although always an and another any are as at be because before
    both but by can could did do does during each either even every everyone everything finally
    first for from had has have he her here hers his how however i if in instead is it its just last
    later let like many maybe me more most my neither never next no nobody not nothing now of often
    on once one only or other our ours out over perhaps please second several she should since so
    some someone something sometimes soon still such take than thank thanks that the their them then
    there therefore these they thing things third this those though through thus to today together
    tomorrow too two under until up was we well were what when where whether which while who whose
    why will with within without would yes yesterday yet you your
"""
COMMON = frozenset(_COMMON.split())
"""Words that begin a sentence if they are capitalized after an abbreviation."""

_AFTER_WORD = r"""[)";}\]*:@'({\[‘’“”«»?!]"""  # characters that no word contains
_SERIES = r"-{2,}|\.{2,}|(?:\.\s){2,}\."
_TOKEN = re.compile(
    rf"""{_SERIES}
    |(?![("`{{\[:;&\#*@)}}\],-])\S+?
     (?=\s|$|{_AFTER_WORD}|{_SERIES}|,(?:$|\s|{_AFTER_WORD}|{_SERIES}))
    |\S""",
    re.VERBOSE,
)
_CANDIDATE = re.compile(rf"[.?!](?={_AFTER_WORD}|$)")
_CLOSING = re.compile(r"""["')\]}‘’“”«»]+?(?:\s+|(?=--)|$)""", re.MULTILINE)
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*")
_INITIAL = re.compile(r"[^\W\d]\.")


def split_sentences(text: str) -> list[str]:
    """Split text into sentences; closing quotes and brackets stay with the sentence they close."""
    spans: list[tuple[int, int]] = []
    for begin, end in _cut(text):
        closing = _CLOSING.match(text[begin:end]) if spans else None
        if closing:
            spans[-1] = spans[-1][0], begin + len(closing[0].rstrip())
            begin += closing.end()
        if begin < end:
            spans.append((begin, end))
    return [text[begin:end] for begin, end in spans]


def _cut(text: str) -> Iterator[tuple[int, int]]:
    """Yield the spans between the full stops, "?" and "!" that end a sentence."""
    begin = 0
    words = list(re.finditer(r"\S+", text))
    for word, following in zip_longest(words, words[1:]):
        for end in _candidates(word[0], following is None):
            inside = word[0][end : end + 1]
            context = _TOKEN.findall(word[0][:end] + inside)
            if not inside:
                context += _TOKEN.findall(following[0])
            if _has_break(context):
                yield begin, word.start() + end
                begin = word.start() + end if inside else following.start()
    yield begin, len(text.rstrip())


def _candidates(word: str, is_last: bool) -> list[int]:
    """Return where in a word a sentence may end: after its last mark, and after a first character
    that is a mark (NLTK takes both for a word such as "!!!"). The end of the text is none.
    """
    ends = [match.end() for match in _CANDIDATE.finditer(word)]
    if is_last and ends and ends[-1] == len(word):
        ends.pop()
    return sorted({*ends[-1:], *(end for end in ends[:1] if end == 1)})


def _has_break(tokens: list[str]) -> bool:
    """Return whether a sentence ends after a token that is not the last."""
    return any(_ends(token, after) for token, after in pairwise(tokens))


def _ends(token: str, after: str) -> bool:
    if token in ("?", "!"):
        return True
    if not token.endswith("."):
        return False
    is_ellipsis = token.startswith("..") and not token.strip(".")
    is_initial = _INITIAL.fullmatch(token)
    is_abbreviation = _is_abbreviation(token)
    ends = not token.endswith("..") and not is_abbreviation
    begins = _begins(after)
    if token[:-1].lower() in TITLES and begins:
        return False
    if (is_abbreviation or is_ellipsis) and not is_initial and begins:
        return True
    if (is_initial or _NUMBER.fullmatch(token)) and begins is False:
        return False
    if is_initial and begins is None and after[0].isupper():
        return False
    return ends


def _begins(token: str) -> bool | None:
    """Return whether a token begins a sentence by its case; None if the case does not tell."""
    if token in set(";:,.!?") or token[0].islower():
        return False
    word = token.lower()
    if len(word) > 1 and word.endswith(".") and not word.endswith("..") and word[:-1] in COMMON:
        word = word[:-1]
    return True if token[0].isupper() and word in COMMON else None


def _is_abbreviation(token: str) -> bool:
    if token == "." or token.endswith(".."):
        return False
    word = token[:-1].lower()
    return word in ABBREVIATIONS or word.rpartition("-")[2] in ABBREVIATIONS
