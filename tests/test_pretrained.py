"""Loading teachers: sizes that are not those declared, names that do not exist."""

from __future__ import annotations

import pytest
import tiny

from study import StudyError
from study.data.pretrained import load_pretrained


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


def test_a_teacher_of_other_sizes_than_declared(folder):
    teacher = tiny.parameters(folder).settings["english"].teacher.model_copy(update={"intermediate": 64})
    with pytest.raises(StudyError, match="intermediate = 64.*48"):
        load_pretrained(teacher)


def test_a_teacher_that_does_not_exist(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    teacher = tiny.parameters(folder).settings["english"].teacher.model_copy(update={"name": str(folder / "nowhere")})
    with pytest.raises(StudyError) as error:
        load_pretrained(teacher)
    message = str(error.value)
    assert "nowhere" in message and "\n" not in message
    assert "all-minilm-l6-v2, multilingual-e5-small" in message
