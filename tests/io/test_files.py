"""Files that are whole or not there."""

import json
import math
import os
from pathlib import Path

import pytest

from hodec.errors import CheckpointError
from hodec.io.atomic import read_json, replacing, sha256, write_json, write_text


def test_folders_are_made_and_text_comes_back(tmp_path: Path):
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "größe → 3\n")
    assert path.read_text(encoding="utf-8") == "größe → 3\n"
    assert list(path.parent.iterdir()) == [path]


def test_row_32_a_failed_write_keeps_the_previous_file_and_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "plan.json"
    write_text(path, "old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_sees_the_file_before_it_is_whole(tmp_path: Path):
    path = tmp_path / "x.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"12")
        assert not path.exists()
        assert temporary.parent == path.parent  # or moving it over would not be atomic
    assert path.read_bytes() == b"12"


def test_files_are_as_readable_as_the_users_others(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "1")
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)


def test_json_round_trip(tmp_path: Path):
    value = {"a": [1, 2.5, None, True], "b": {"c": "ü"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "plan") == value


def test_json_has_no_nan(tmp_path: Path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": math.nan})
    assert read_json(tmp_path / "x.json", "metrics") == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", json.dumps({"a": 1}).encode()[:-1], b"\xff\xfe\x00", b"NaN and text"], ids=repr
)
def test_row_28_unreadable_json_is_named_with_its_kind(tmp_path: Path, content: bytes):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"plan .*x\.json is not readable JSON .*truncated"):
        read_json(path, "plan")


def test_missing_files_and_folders_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"plan .*none\.json does not exist"):
        read_json(tmp_path / "none.json", "plan")
    with pytest.raises(CheckpointError, match="plan"):
        read_json(tmp_path, "plan")


def test_sha256_of_a_known_file(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
