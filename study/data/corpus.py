"""The text that teachers adapt to and students are distilled on: languages in turn, packed to full sequences."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.data import storage
from study.data.cleaning import Document, Overlap, clean
from study.data.pretrained import load_pretrained, save_model
from study.data.tasks import heldout_texts, task_texts
from study.data.vocabulary import pieces_to_keep, trim_embeddings, trim_tokenizer
from study.declarations import OwnText, check_content
from study.descriptions import CorpusData
from study.files import Layout, StudyError, content_hash, find_root
from study.sections import Corpus

#: File in a corpus's folder with the hash of its tokens.
HASH = "sha256"

#: Per text or language, what there is of it.
Counts = dict[str, dict[str, int]]


def build_corpus(description: CorpusData, layout: Layout, output: Path, encoder: Path) -> dict[str, Any]:
    """Clean, de-duplicate, tokenise once and pack the texts of a setting; write them to the folder ``output``.

    The teacher's encoder and tokenizer go to the folder ``encoder``, for all later stages: as they are, or trimmed to
    the vocabulary of the corpus written and of all task texts, whose ids the corpus then has.

    Documents are shuffled, each is followed by [SEP], and the first fill the validation split. No document gives it
    more than a sixteenth, so that one long address does not fill it (this study's choice); the rest of such a document
    is used nowhere. Several languages take turns, see :func:`_by_language`. The bytes written are the same at every
    run. The file ``sha256`` among them has the hash of the tokens of both splits (:func:`corpus_hash`).

    Args:
        layout: where :func:`study.data.tasks.build_tasks` wrote the tasks of the setting.

    Returns:
        Counts: per text those of :func:`study.data.cleaning.clean` and the tokens it gives to either split (before the
        remainder is dropped), then sequences and tokens of both splits, special tokens included; the size of the
        vocabulary. With several languages, also per language: documents and bytes (UTF-8) for training, the tokens it
        gives to the training split, their share of all, and how many times its documents are read (passes).

    Raises:
        StudyError: tasks missing, a source or teacher that cannot be read, a corpus without a training sequence, a
            folder that cannot be written.
    """
    settings = description.corpus
    model, tokenizer = load_pretrained(description.teacher)
    heldout = heldout_texts(layout.tasks, description.tasks)
    declared = {text.label: text for text in description.texts if isinstance(text, OwnText)}
    root = find_root(layout.folder) if declared else layout.folder
    for name, text in declared.items():
        check_content(f"text {name}", name, text, description.hashes, root)
    documents, counts = clean(description.texts, Overlap(heldout, settings.overlap_words), root)
    random.Random(settings.seed).shuffle(documents)
    streams, training, used = _streams(documents, counts, tokenizer, settings)
    vocabulary = {"full": len(tokenizer)}
    if description.vocabulary == "trimmed":
        texts = task_texts(layout.tasks, description.tasks)
        streams, tokenizer, sizes = _trim(streams, texts, model, tokenizer)
        vocabulary |= sizes
        print("corpus: vocabulary: " + ", ".join(f"{key} {value:,}" for key, value in vocabulary.items()), flush=True)
    packed = {split: pack(stream, tokenizer, settings.sequence_length) for split, stream in streams.items()}
    if not len(packed["train"]):
        raise StudyError(
            "corpus has 0 training sequences; allowed: at least one (raise corpus.max_tokens or add texts to"
            f" settings.{description.setting}.texts)"
        )
    languages = _language_table(training, used, counts)
    features = Features({"input_ids": List(Value(packed["train"].dtype.name), length=settings.sequence_length)})
    splits = {split: Dataset.from_dict({"input_ids": packed[split]}, features=features) for split in packed}
    storage.save(DatasetDict(splits), output, beside={HASH: _tokens_hash(packed) + "\n"})
    save_model(model, tokenizer, encoder)
    return {
        "setting": description.setting,
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
    return storage.load(folder, "corpus")


def corpus_hash(folder: Path) -> str:
    """SHA-256 that tells a corpus from others: the one written beside its tokens, else that of all its files.

    Raises:
        StudyError: nothing written there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StudyError(f"{folder}: no data there; run the stage `corpus` first (make repro)")
    written = folder / HASH
    return written.read_text().strip() if written.is_file() else content_hash(folder)


def samples(corpus: DatasetDict, tokenizer: PreTrainedTokenizerBase, n: int) -> list[str]:
    """The first ``n`` training sequences as text: to be looked at, never to be kept in a repository."""
    return [str(tokenizer.decode(sequence)) for sequence in corpus["train"][:n]["input_ids"]]


def pack(
    stream: Sequence[int] | numpy.ndarray, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> numpy.ndarray:
    """Cut a stream of tokens into full sequences [CLS] ... [SEP], without padding; the remainder is dropped.

    Returns:
        (sequences, sequence_length), the smallest of uint16 and int32 that holds the vocabulary.
    """
    body = sequence_length - 2
    dtype = numpy.uint16 if len(tokenizer) <= 2**16 else numpy.int32
    tokens = numpy.asarray(stream[: len(stream) // body * body], dtype=dtype).reshape(-1, body)
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return numpy.pad(tokens, ((0, 0), (1, 1)), constant_values=((0, 0), ends))


def _streams(
    documents: list[Document], counts: Counts, tokenizer: PreTrainedTokenizerBase, settings: Corpus
) -> tuple[dict[str, numpy.ndarray], list[Document], list[Document]]:
    """Tokens of the splits validation and train; documents for training, and the same, as often as they are read.

    Args:
        counts: get the tokens that each text gives to either split.
    """
    body = settings.sequence_length - 2
    wanted: dict[str, int | None] = {"validation": settings.validation_sequences * body, "train": None}
    if settings.max_tokens is not None:
        wanted["train"] = settings.max_tokens // settings.sequence_length * body
    for count in counts.values():
        count.update(tokens=0, validation_tokens=0)
    streams: dict[str, numpy.ndarray] = {}
    used: list[Document] = []
    for split, column in (("validation", "validation_tokens"), ("train", "tokens")):
        size = wanted[split]
        longest = settings.validation_sequences * body // 16 if split == "validation" else None
        stream, used = array("i"), []
        for document, tokens in _by_language(documents, tokenizer, settings.language_exponent):
            if size is not None and len(stream) >= size:
                break
            stream.extend(tokens[:longest])
            counts[document.text][column] += len(tokens[:longest])
            used.append(document)
        streams[split] = numpy.array(stream[:size])
        if split == "validation":
            validation = set(used)
            documents = [document for document in documents if document not in validation]
    return streams, documents, used


def _trim(
    streams: dict[str, numpy.ndarray],
    texts: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, numpy.ndarray], PreTrainedTokenizerBase, dict[str, int]]:
    """Streams and tokenizer of the pieces that streams and ``texts`` have, and their number; the model in place."""
    occurring = {token for tokens in _tokenise(texts, tokenizer) for token in tokens}
    for stream in streams.values():
        occurring.update(numpy.unique(stream).tolist())
    kept = pieces_to_keep(tokenizer, occurring)
    streams = {split: numpy.searchsorted(kept, stream) for split, stream in streams.items()}
    trim_embeddings(model, kept)
    return streams, trim_tokenizer(tokenizer, kept), {"occurring": len(occurring), "kept": len(kept)}


def _tokens_hash(packed: dict[str, numpy.ndarray]) -> str:
    """SHA-256 over names, shapes and tokens of the splits, by name; the same on every machine."""
    digest = hashlib.sha256()
    for split in sorted(packed):
        sequences = packed[split].astype("<i4")
        digest.update(f"{split} {sequences.shape}\n".encode() + sequences.tobytes())
    return digest.hexdigest()


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
    largest = max(sizes, key=lambda language: sizes[language], default=None)
    streams: dict[str, Iterator[tuple[Document, list[int]]]] = {}
    for language, group in by_language.items():
        tokenised = zip(group, _tokenise((document.content for document in group), tokenizer), strict=True)
        streams[language] = tokenised if language == largest else cycle(tokenised)
    given = dict.fromkeys(streams, 0)
    while streams:
        language = min(streams, key=lambda name: given[name] / sizes[name] ** exponent)
        following = next(streams[language], None)
        if following is None:
            return
        given[language] += len(following[1])
        yield following


def _sizes(documents: Iterable[Document]) -> Counts:
    counts: Counts = defaultdict(lambda: {"documents": 0, "bytes": 0})
    for document in documents:
        counts[document.language]["documents"] += 1
        counts[document.language]["bytes"] += len(document.content.encode())
    return dict(counts)


def _language_table(documents: list[Document], used: list[Document], counts: Counts) -> dict[str, dict[str, float]]:
    """Per language: documents and bytes there are, tokens read, their share of all, and how often documents are read.

    Args:
        documents: those for training. used: the same, as often as they were read. counts: per text, of its tokens.
    """
    sizes, times = _sizes(documents), Counter(document.language for document in used)
    tokens: Counter[str] = Counter()
    for text, count in counts.items():
        tokens[Document(text, "").language] += count["tokens"]
    return {
        language: {
            **sizes[language],
            "tokens": tokens[language],
            "share": round(tokens[language] / tokens.total(), 4),
            "passes": round(times[language] / sizes[language]["documents"], 2),
        }
        for language in tokens
        if language in sizes
    }
