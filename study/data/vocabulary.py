"""Trimming a vocabulary to the pieces that occur, and a model's embeddings with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import numpy
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from study.files import StudyError


def pieces_to_keep(tokenizer: PreTrainedTokenizerBase, occurring: Iterable[int]) -> numpy.ndarray:
    """Ids, ascending, of the pieces that occur and of a safety set.

    The set:

    * special and other added tokens, and whatever stands before the padding token, which so keeps its id (RoBERTa
      counts positions from it);
    * every piece of a single character or byte, in WordPiece also as continuation: words never seen still tokenise
      without unknown tokens wherever their characters are pieces;
    * in Unigram, a piece of the lowest score, on which the score of an unknown character depends.

    A text whose pieces are all kept is tokenised as before. In Unigram its segmentation is the best of those that are
    left, since none became better and none was added; in WordPiece its pieces are still the longest that match (only
    a word that was unknown, though spelt by known characters, may be read now).

    Raises:
        StudyError: a tokenizer that is neither Unigram nor WordPiece.
    """
    model = _serialised(tokenizer)["model"]
    kept = {*occurring, *_special_ids(tokenizer), *range(tokenizer.pad_token_id or 0)}
    prefix = model.get("continuing_subword_prefix", "")
    for piece, index in _pieces(model):
        if len(piece.removeprefix(prefix)) <= 1 or re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kept.add(index)
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        kept.add(scores.index(min(scores)))
    return numpy.array(sorted(kept))


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: numpy.ndarray) -> PreTrainedTokenizerFast:
    """A tokenizer of the pieces ``kept`` (ids, ascending), numbered from 0 in that order; all else stays as it is.

    Raises:
        StudyError: a special token is not kept, or a tokenizer that is neither Unigram nor WordPiece.
    """
    new = _new_ids(kept)
    for index in _special_ids(tokenizer):
        if index not in new:
            names = tokenizer.convert_ids_to_tokens(_special_ids(tokenizer))
            raise StudyError(
                f"vocabulary trimmed to {len(kept)} pieces without {tokenizer.convert_ids_to_tokens(index)} (id"
                f" {index}); allowed: any with {', '.join(names)}"
            )
    content = _serialised(tokenizer)
    model = content["model"]
    pieces = [(piece, index) for piece, index in _pieces(model) if index in new]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][index] for _, index in pieces]
        model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {piece: new[index] for piece, index in pieces}
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(content["post_processor"] or {}, new)
    return with_content(tokenizer, json.dumps(content))


def with_content(tokenizer: PreTrainedTokenizerBase, content: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a ``tokenizer.json``, whose special tokens and options are those of another one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content),
        **tokenizer.special_tokens_map,
        model_input_names=tokenizer.model_input_names,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
    )


def trim_embeddings(model: PreTrainedModel, kept: numpy.ndarray) -> None:
    """Keep the rows ``kept`` (ids, ascending) of the word embeddings and of an output layer, tied or not, in place."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    heads = [module for module in model.modules() if output in module.children()]  # they may hold the bias, too
    assert isinstance(embeddings, torch.nn.Embedding)
    modules = [module for module in (embeddings, output, *heads) if module]
    for parameter in {parameter for module in modules for parameter in module.parameters(recurse=False)}:
        parameter.data = parameter.data[kept]  # the parameter stays the same, so what is tied stays tied
    embeddings.num_embeddings = len(kept)
    if output is not None:
        output.out_features = len(kept)
    new = _new_ids(kept)
    model.config.vocab_size = len(kept)
    for name, value in model.config.to_dict().items():
        if name.endswith("_token_id") and value in new:
            setattr(model.config, name, new[value])


def check_trimmable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that :func:`trim_tokenizer` cannot trim.

    Raises:
        StudyError: neither Unigram nor WordPiece.
    """
    _serialised(tokenizer)


def _new_ids(kept: numpy.ndarray) -> dict[int, int]:
    return {old: index for index, old in enumerate(kept.tolist())}


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})


def _serialised(tokenizer: PreTrainedTokenizerBase) -> dict:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    algorithm = content["model"]["type"]
    if algorithm not in ("Unigram", "WordPiece"):
        raise StudyError(f"vocabulary of a {algorithm} tokenizer cannot be trimmed; allowed: Unigram, WordPiece")
    return content


def _pieces(model: dict) -> list[tuple[str, int]]:
    """Pieces and their ids, by id."""
    if model["type"] == "Unigram":
        return [(piece, index) for index, (piece, _) in enumerate(model["vocab"])]
    return sorted(model["vocab"].items(), key=lambda item: item[1])


def _renumber(processor: dict, new: dict[int, int]) -> None:
    """Give the special tokens of a post-processor, or of a sequence of them, their new ids."""
    for token in processor.get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [new[index] for index in token["ids"]]
    for name in {"cls", "sep"} & processor.keys():  # BertProcessing, RobertaProcessing
        processor[name][1] = new[processor[name][1]]
    for part in processor.get("processors", ()):
        _renumber(part, new)
