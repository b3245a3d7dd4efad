"""What docs/extending.md says of a study of one's own, done literally: its command, and the stages that read files."""

from __future__ import annotations

import json
import re
import shutil
import sys

import own_data
import pipeline
import pytest
from pipeline import ROOT, command

from study.data import tasks

BLOCK = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)


@pytest.mark.pipeline
def test_a_study_of_ones_own_as_the_page_says(tmp_path):
    pipeline.clone(tmp_path)
    own_data.write(tmp_path / "data")
    assert BLOCK
    (environment, new, check, repro) = re.sub(r"\\\n\s*", "", BLOCK[1]).strip().split("\n")
    assert environment == "make environment && . .venv/bin/activate"
    assert (check, repro) == ("make check PROFILE=my-study", "make repro PROFILE=my-study")
    outcome = command(tmp_path, "sh", "-c", new, seconds=120)
    assert outcome.returncode == 0 and "next: make repro PROFILE=my-study" in outcome.stdout, outcome.stderr
    folder = tmp_path / "profiles" / "my-study"
    with (folder / "params.yaml").open("a") as stream:
        stream.write("corpus: {validation_sequences: 2}\n")

    def run(*stages: str) -> list[str]:
        outcome = command(tmp_path, sys.executable, "-m", "study", "plan", "my-study", seconds=120)
        assert outcome.returncode == 0, outcome.stderr
        outcome = command(folder, "dvc", "repro", *stages, seconds=600)
        assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
        return [stage for stage in pipeline.stages_run(outcome) if "@" in stage]

    assert run("corpus@my-study") == ["tasks@my-study", "corpus@my-study"]
    counts = json.loads((folder / "reports" / "results" / "my-study" / "corpus.json").read_text())
    assert list(counts["texts"]) == ["texts", "articles-de", "articles-fr"] and counts["train"]["sequences"] > 0
    assert set(counts["languages"]) == {"en", "de", "fr"}
    built = folder / "runs" / "my-study" / "tasks"
    assert set(tasks.load_task(built, "moods")) == {"train", "development", "test", "test-fr"}
    assert tasks.find_task(built, "moods").languages == ("de", "fr")

    # A changed file of text is noticed, and read anew by what uses it alone. Nothing of one's own is seen by git.
    with (tmp_path / "data" / "texts" / "0.txt").open("a") as stream:
        stream.write("\n" + " ".join(text for text, _ in own_data.sentences("en", 4, 900)))
    assert run("corpus@my-study") == ["corpus@my-study"]
    tracked = command(tmp_path, "git", "status", "--porcelain").stdout.splitlines()
    assert [line for line in tracked if line != "?? profiles/my-study/"] == []

    # Deleting the folder undoes it.
    shutil.rmtree(folder)
    assert command(tmp_path, "git", "status", "--porcelain").stdout == ""
