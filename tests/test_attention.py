"""The page of attention maps: what a browser draws of constructed maps, offline."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from constructed_results import make_study
from test_chooser import BROWSER

from study.analysis.attention import KINDS, PAGE, write_attention
from study.records import write_record
from study.records_beside import AttentionMaps, ReadSentence

TOKENS = ["[CLS]", "a<b", "[SEP]"]
STUDENTS = ("hs-last_L3-H192_1", "mha-minilmv2_L3-H192_1_large")
NAV = {"": {"index.html": "Answers", PAGE: "Attention"}}


def values(seed: int, layers: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).random((layers, 3, 3))
    return drawn / drawn.sum(axis=-1, keepdims=True)


@pytest.fixture
def study(tmp_path):
    """Two sentences; the second has other numbers. A teacher of 4 layers, students of 2."""
    made = make_study(tmp_path, ["none", "mlm"])
    read = [
        {
            "tokens": TOKENS,
            "models": {
                name: {kind: ReadSentence.coded(values(place + 10 * k, layers)) for k, kind in enumerate(KINDS)}
                for place, (name, layers) in enumerate([("teacher", 4), (STUDENTS[0], 2), (STUDENTS[1], 2)], number)
            },
        }
        for number in (0, 3)
    ]
    record = AttentionMaps.model_validate(
        {"schema": 2, "profile": "laptop", "setting": "english", "relation_heads": 12, "sentences": read}
    )
    write_record(made.layout.result("attention"), record)
    return made.plan


def test_bytes_keep_values_to_four_thousandths():
    sentence = ReadSentence(tokens=TOKENS, models={"m": {"query": ReadSentence.coded(values(1, 5))}})
    assert np.abs(sentence.matrices("m", "query") - values(1, 5)).max() < 0.004


@pytest.mark.parametrize(
    ("choice", "sentence", "kind", "teacher", "student"),
    [("", 0, 0, 3, 2), ("#sentence=1&kind=attention&teacher=1&student=1", 1, 3, 1, 1)],
)
def test_cells_hold_teacher_student_and_difference(study, tmp_path, choice, sentence, kind, teacher, student):
    if BROWSER is None:
        pytest.skip("no chromium here: the page's script cannot be run")
    html = tmp_path / "reports" / "html"
    write_attention(study, html, NAV)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    address = (html / PAGE).as_uri() + choice
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=60, check=True)
    panels = re.findall(r'<svg [^>]*data-panel="(\w+)" data-model="([^"]+)">(.*?)</svg>', done.stdout, re.S)
    assert [panel[:2] for panel in panels] == [
        (name, model) for model in STUDENTS for name in ("teacher", "student", "difference")
    ]
    above = values(3 * sentence + 10 * kind, 4)[teacher - 1]
    for place, model in enumerate(STUDENTS, start=1):
        own = values(3 * sentence + place + 10 * kind, 2)[student - 1]
        expected = {"teacher": above, "student": own, "difference": own - above}
        for name, _, cells in (panel for panel in panels if panel[1] == model):
            shown = np.array(re.findall(r'data-value="([^"]+)"', cells), dtype=float).reshape(3, 3)
            assert np.abs(shown - expected[name]).max() < 0.008, (model, name)
        assert "a&lt;b" in panels[0][2]


def test_the_page_loads_nothing_and_has_a_picture_without_scripts(study, tmp_path):
    html = tmp_path / "reports" / "html"
    write_attention(study, html, NAV)
    first = {path.name: path.read_bytes() for path in html.iterdir()}
    write_attention(study, html, NAV)
    assert {path.name: path.read_bytes() for path in html.iterdir()} == first
    text = first[PAGE].decode()
    assert not re.search(r"https?://|\burl\(|@import|fetch\(|XMLHttpRequest|<link|<script[^>]*src", text)
    (picture,) = re.findall(r'<noscript>.*?<img src="([^"]*)"', text, re.S)
    assert picture in first and "the last layer of MHA: MiniLMv2, L3-H192, budget large" in text


def test_without_maps_there_is_no_page(tmp_path):
    write_attention(make_study(tmp_path, ["none", "mlm"]).plan, tmp_path / "html", NAV)
    assert not (tmp_path / "html").exists()
