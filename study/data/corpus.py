"""The text that teachers adapt to and students are distilled on: languages in turn, packed to full sequences."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from study.data import storage
from study.data.cleaning import Counts, Documents, batched, clean
from study.data.passages import Overlap
from study.data.pool import Pool
from study.data.pretrained import load_pretrained, save_model
from study.data.tasks import heldout_texts, task_texts
from study.data.tokens import Stream, Tokeniser, encode, read_again
from study.data.vocabulary import pieces_to_keep, trim_embeddings, trim_tokenizer
from study.declarations import OwnText, check_content, language_of
from study.descriptions import CorpusData
from study.files import Layout, StudyError, content_hash, find_root, make_folder
from study.sections import Corpus

#: File in a corpus's folder with the hash of its tokens.
HASH = "sha256"

#: Sequences that are packed and written at once.
ROWS = 1000

#: Characters of documents that are tokenised at once.
TOKENISED = 100_000


def build_corpus(
    description: CorpusData, layout: Layout, output: Path, encoder: Path, processes: int | None = None
) -> dict[str, Any]:
    """Clean, de-duplicate, tokenise once and pack the texts of a setting; write them to the folder ``output``.

    The teacher's encoder and tokenizer go to the folder ``encoder``, for all later stages: as they are, or trimmed to
    the vocabulary of the corpus written and of all task texts, whose ids the corpus then has.

    Documents are shuffled, each is followed by [SEP], and the first fill the validation split. No document gives it
    more than a sixteenth, so that one long address does not fill it (this study's choice); the rest of such a document
    is used nowhere. Several languages take turns, see :func:`_by_language`. The bytes written are the same at every
    run. The file ``sha256`` among them has the hash of the tokens of both splits (:func:`corpus_hash`).

    Texts are cleaned and tokenised on all cores, and what is not read at once is on the disk of ``output``: cleaned
    text, then tokens (4 bytes each), in files that are gone with the process. In memory are, beside a fixed part, 8
    bytes for each paragraph and about 40 for each document.

    Args:
        layout: where :func:`study.data.tasks.build_tasks` wrote the tasks of the setting.
        processes: None: one for each core. What is written is the same.

    Returns:
        Counts: per text those of :func:`study.data.cleaning.clean` and the tokens it gives to either split (before the
        remainder is dropped), then sequences and tokens of both splits, special tokens included; the size of the
        vocabulary. With several languages, also per language: documents and bytes (UTF-8) for training, the tokens it
        gives to the training split, their share of all, and how many times its documents are read (passes).

    Raises:
        StudyError: tasks missing, a source or teacher that cannot be read, a corpus without a training sequence, a
            folder that cannot be written.
    """
    settings, length = description.corpus, description.corpus.sequence_length
    model, tokenizer = load_pretrained(description.teacher)
    heldout = heldout_texts(layout.tasks, description.tasks)
    declared = {text.label: text for text in description.texts if isinstance(text, OwnText)}
    root = find_root(layout.folder) if declared else layout.folder
    for name, text in declared.items():
        check_content(f"text {name}", name, text, description.hashes, root)
    make_folder(output.parent)
    overlap = Overlap(heldout, settings.overlap_words)
    documents, counts = clean(description.texts, overlap, root, output.parent, processes)
    with Pool(encode, Tokeniser.of(tokenizer), processes) as pool:
        streams, languages = _streams(documents, counts, pool, settings, output.parent)
        vocabulary, kept = {"full": len(tokenizer)}, None
        if description.vocabulary == "trimmed":
            occurring: set[int] = set()
            read = _tokenised(task_texts(layout.tasks, description.tasks), pool)
            for tokens in chain(read, *(stream.parts(ROWS * length) for stream in streams.values())):
                occurring.update(numpy.unique(tokens).tolist())
            kept = pieces_to_keep(tokenizer, occurring)
            trim_embeddings(model, kept)
            tokenizer = trim_tokenizer(tokenizer, kept)
            vocabulary |= {"occurring": len(occurring), "kept": len(kept)}
            told = ", ".join(f"{key} {value:,}" for key, value in vocabulary.items())
            print(f"corpus: vocabulary: {told}", flush=True)
    rows = {split: len(stream) // (length - 2) for split, stream in streams.items()}
    if not rows["train"]:
        raise StudyError(
            "corpus has 0 training sequences; allowed: at least one (raise corpus.max_tokens or add texts to"
            f" settings.{description.setting}.texts)"
        )
    _write(streams, rows, kept, tokenizer, length, output)
    save_model(model, tokenizer, encoder)
    return {
        "setting": description.setting,
        "sequence_length": length,
        "heldout_texts": len(heldout),
        "texts": counts,
        **({"languages": languages} if len(languages) > 1 else {}),
        **{split: {"sequences": own, "tokens": own * length} for split, own in rows.items()},
        "vocabulary": vocabulary,
    }


def load_corpus(folder: Path) -> DatasetDict:
    """Splits train and validation as :func:`build_corpus` wrote them; column input_ids, (sequences, sequence_length).

    They are mapped from the file: processes share what they read of it.

    Raises:
        StudyError: nothing written there.
    """
    return storage.load(folder, "corpus", in_memory=False)


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


def _write(
    streams: dict[str, Stream],
    rows: dict[str, int],
    kept: numpy.ndarray | None,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    output: Path,
) -> None:
    """Pack streams to sequences and write them, and the hash of names, shapes and tokens of the splits, by name.

    Args:
        rows: sequences of each split. kept: the pieces of a trimmed vocabulary, which the tokenizer has.
    """
    digest = hashlib.sha256()  # the same on every machine

    def packed(split: str) -> Iterator[numpy.ndarray]:
        digest.update(f"{split} {(rows[split], length)}\n".encode())
        for tokens in streams[split].parts(ROWS * (length - 2), rows[split] * (length - 2)):
            part = pack(tokens if kept is None else numpy.searchsorted(kept, tokens), tokenizer, length)
            digest.update(part.astype("<i4").tobytes())
            yield part

    splits = {split: packed(split) for split in sorted(streams)}
    storage.save_sequences(splits, output, lambda: {HASH: digest.hexdigest() + "\n"})


def _streams(
    documents: Documents, counts: Counts, pool: Pool, settings: Corpus, folder: Path
) -> tuple[dict[str, Stream], dict[str, dict[str, float]]]:
    """Tokens of the splits train and validation, and for training :func:`_language_table`.

    Args:
        counts: get the tokens that each text gives to either split. folder: on whose disk tokens are.
    """
    body = settings.sequence_length - 2
    wanted = None if settings.max_tokens is None else settings.max_tokens // settings.sequence_length * body
    streams = {"validation": Stream(folder, settings.validation_sequences * body), "train": Stream(folder, wanted)}
    for count in counts.values():
        count.update(tokens=0, validation_tokens=0)
    order = array("Q", range(len(documents)))
    random.Random(settings.seed).shuffle(order)
    places = numpy.array(order, dtype=numpy.int64)
    times: Counter[str] = Counter()
    for split, column in (("validation", "validation_tokens"), ("train", "tokens")):
        longest = settings.validation_sequences * body // 16 if split == "validation" else None
        times, used = Counter(), []
        for place, tokens in _by_language(documents, places, pool, settings.language_exponent, folder):
            if streams[split].full:
                break
            streams[split].extend(tokens[:longest])
            counts[documents.name(place)][column] += len(tokens[:longest])
            times[language_of(documents.name(place))] += 1
            if split == "validation":
                used.append(place)
        if split == "validation":
            contents = documents.hashes()
            places = places[~numpy.isin(contents[places], contents[used])]
    return streams, _language_table(documents, places, times, counts)


def _by_language(
    documents: Documents, places: numpy.ndarray, pool: Pool, exponent: float, folder: Path
) -> Iterator[tuple[int, numpy.ndarray]]:
    """Places of documents with their tokens, languages in turn, until that with the most text has been read once.

    Language l gets a share p_l of the tokens, p_l proportional to n_l ** exponent, n_l the size of its texts in bytes:
    the next document is always of the language that is furthest behind. Documents of a language follow in their order
    and start anew after the last. With one language these are its documents, once.

    Source: XLM (1901.07291), section 3.1, which draws the language of each batch at random; turns instead of draws are
    this study's choice, so that every stretch of the corpus has all languages in their shares.
    """
    groups = documents.by_language(places)
    sizes = {language: int(documents.sizes()[group].sum()) for language, group in groups.items()}
    largest = max(sizes, key=lambda language: sizes[language], default=None)
    streams: dict[str, Iterator[tuple[int, numpy.ndarray]]] = {}
    for language, group in groups.items():
        contents = (documents[place].content for place in group)
        tokenised = zip(group.tolist(), _tokenised(contents, pool), strict=True)
        streams[language] = tokenised if language == largest else read_again(tokenised, folder)
    given = dict.fromkeys(streams, 0)
    while streams:
        language = min(streams, key=lambda name: given[name] / sizes[name] ** exponent)
        following = next(streams[language], None)
        if following is None:
            return
        given[language] += len(following[1])
        yield following


def _tokenised(contents: Iterable[str], pool: Pool) -> Iterator[numpy.ndarray]:
    """:func:`study.data.tokens.encode` of one text after another, batch by batch as they are asked for."""
    for batch in pool.map(batched(contents, TOKENISED)):
        yield from batch


def _language_table(
    documents: Documents, places: numpy.ndarray, times: Counter[str], counts: Counts
) -> dict[str, dict[str, float]]:
    """Per language: documents and bytes there are, tokens read, their share of all, and how often documents are read.

    Args:
        places: those for training. times: by language, how many were read. counts: per text, of its tokens.
    """
    groups, tokens = documents.by_language(places), Counter[str]()
    for text, count in counts.items():
        tokens[language_of(text)] += count["tokens"]
    return {
        language: {
            "documents": len(groups[language]),
            "bytes": int(documents.sizes()[groups[language]].sum()),
            "tokens": tokens[language],
            "share": round(tokens[language] / max(tokens.total(), 1), 4),
            "passes": round(times[language] / len(groups[language]), 2),
        }
        for language in tokens
        if language in groups
    }
