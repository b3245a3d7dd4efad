"""The translation finder: what is kept of constructed neighbours, and what a browser shows of it, offline."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pydantic
import pytest
import torch
from constructed_results import make_study
from test_chooser import BROWSER
from tiny import WORDS, masked_language_model, tokenizer

from study.analysis.explore import Explorer
from study.analysis.translations import PAGE, write_translations
from study.data.pretrained import save_model
from study.files import StudyError
from study.records import write_record
from study.records_beside import Translations

STUDENTS = ("hs-last_L3-H192_1", "od_L3-H192_1_large")
SENTENCES = {"en": ["one", "a<b", "three"], "fr": ["un", "deux", "trois"], "zh": ["一", "二", "三"]}
NAV = {"": {"index.html": "Answers", PAGE: "Translations"}}


def cosines(*wrong: tuple[int, int, int, int]) -> np.ndarray:
    """Translations at 0.8, all else at 0.5; of each (language, sentence, other, taken): that one at 0.9."""
    values = np.full((3, 3, 3, 3), 0.5)
    for i in range(3):
        values[:, i, :, i] = 0.8
    for language, sentence, other, taken in wrong:
        values[language, sentence, other, taken] = values[other, taken, language, sentence] = 0.9
    return values


def record(**models: np.ndarray) -> Translations:
    coded = {name: Translations.coded(values) for name, values in models.items()}
    return Translations.model_validate(
        {"schema": 2, "profile": "laptop", "setting": "english", "sentences": SENTENCES, "models": coded}
    )


def test_cosines_keep_four_digits_and_shares_count_translations():
    drawn = np.random.default_rng(1).uniform(-1, 1, (3, 3, 3, 3))
    read = record(teacher=drawn, student=cosines((0, 1, 2, 2), (0, 0, 2, 1)))
    assert np.abs(read.cosines("teacher") - drawn).max() < 2e-5
    # from English: sentences 2 and 1 take another Chinese one; from Chinese: 3 and 2 take another English one
    assert np.allclose(read.found("student"), [[1, 1, 1 / 3], [1, 1, 1], [1 / 3, 1, 1]])


def test_sentences_of_unequal_number_or_other_cosines_are_refused():
    whole = record(teacher=cosines()).model_dump(by_alias=True)
    with pytest.raises(pydantic.ValidationError, match="the same number in each"):
        Translations.model_validate(whole | {"sentences": SENTENCES | {"zh": ["一"]}})
    with pytest.raises(pydantic.ValidationError, match="not those of 6 texts"):
        Translations.model_validate(whole | {"sentences": {name: SENTENCES[name] for name in ("en", "fr")}})


def test_models_are_read_as_the_mean_of_their_last_states(tmp_path):
    """Against a slow loop over tiny models that were saved."""
    made = make_study(tmp_path, ["none", "mlm"])
    explorer = Explorer(made.plan, "english")
    words, models = tokenizer(tmp_path / "words"), {}
    for seed, (name, folder) in enumerate(
        [("teacher", made.layout.teacher), ("mlm_L3-H192_1", made.layout.student("mlm_L3-H192_1"))]
    ):
        models[name] = masked_language_model(seed=seed)
        save_model(models[name], words, folder)
    sentences = {"en": [" ".join(WORDS[:3]), WORDS[4]], "fr": [" ".join(WORDS[5:7]), " ".join(WORDS[8:12])]}
    read = explorer.translations(["mlm_L3-H192_1"], sentences)
    for name, model in models.items():
        vectors = []
        for text in (text for own in sentences.values() for text in own):
            states = (
                model.base_model(input_ids=words(text, return_tensors="pt")["input_ids"]).last_hidden_state[0].detach()
            )
            vectors.append(torch.stack([sum(column) / len(column) for column in states.T]))
        for i, first in enumerate(vectors):
            for j, second in enumerate(vectors):
                expected = float(first @ second / (first.norm() * second.norm()))
                assert read.cosines(name).reshape(4, 4)[i, j] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(StudyError):
        explorer.translations(["od_L3-H192_1"], sentences)


@pytest.fixture
def page(tmp_path):
    made, html = make_study(tmp_path, ["none", "mlm"]), tmp_path / "reports" / "html"
    write_translations(made.plan, html, NAV)
    assert not html.exists()  # no sentence was read
    wrong = [(0, 1, 2, 2)], [(0, 1, 1, 0), (0, 1, 2, 0)]
    models = dict(zip(STUDENTS, (cosines(*own) for own in wrong), strict=True))
    write_record(made.layout.result("translations"), record(teacher=cosines(), **models))
    write_translations(made.plan, html, NAV)
    return html / PAGE


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ("", {name: {"fr": 0, "zh": 0} for name in ("teacher", *STUDENTS)}),
        (
            "#language=en&sentence=1",
            {"teacher": {"fr": 1, "zh": 1}, STUDENTS[0]: {"fr": 1, "zh": 2}, STUDENTS[1]: {"fr": 0, "zh": 0}},
        ),
        (
            "#language=zh&sentence=2",
            {"teacher": {"en": 2, "fr": 2}, STUDENTS[0]: {"en": 1, "fr": 2}, STUDENTS[1]: {"en": 2, "fr": 2}},
        ),
    ],
)
def test_a_browser_shows_the_nearest_sentence_of_every_language(page, tmp_path, choice, found):
    if BROWSER is None:
        pytest.skip("no chromium here: the page's script cannot be run")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    address = page.as_uri() + choice
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=60, check=True)
    rows = re.findall(
        r'<tr data-model="(.*?)" data-to="(.*?)" data-found="(\d)" data-cosine="(.*?)">(.*?)</tr>', done.stdout
    )
    shown: dict[str, dict[str, int]] = {}
    sentence = int(choice[-1:] or 0)
    for model, language, taken, cosine, text in rows:
        shown.setdefault(model, {})[language] = int(taken)
        assert ("its translation" in text) == (int(taken) == sentence) and SENTENCES[language][int(taken)][:1] in text
        assert cosine == ("0.800" if int(taken) == sentence else "0.900")
    assert shown == found


def test_the_page_is_small_loads_nothing_and_says_all_without_scripts(page):
    text = page.read_text()
    assert len(text) < 250_000 and not re.search(r"""(src|href)=["'](https?:|//)""", text)
    assert "a<b" not in text and "OD: output distribution, L3-H192, budget large" in text
    rows = re.findall(r"<tr><td>en</td><td>zh</td>(.*?)</tr>", text)
    assert re.findall(r"\d+ %", rows[0]) == ["100 %", "67 %", "67 %"]
