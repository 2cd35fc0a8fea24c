from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import pytest

from raysys.errors import UserError
from raysys.masking import mask
from raysys.output import open_output
from raysys.storage import expand_braces, find_files, identity, list_files, read_bytes, shard_name, write_bytes, write_new


def test_braces_keep_leading_zeros() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]


def test_a_brace_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"\{first..last\}"):
        expand_braces("a{x}.tar")


def test_folder_glob_and_braces_find_the_same_files(tmp_path: Path) -> None:
    for name in ("t-0.tar", "t-1.tar"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    expected = (str(tmp_path), ["t-0.tar", "t-1.tar"])
    assert list_files(str(tmp_path), ".tar") == expected
    assert list_files(f"{tmp_path}/t-*.tar", ".tar") == expected
    assert list_files(f"{tmp_path}/t-{{0..1}}.tar", ".tar") == expected


def test_glob_follows_links_to_files(tmp_path: Path) -> None:
    """As Hugging Face's cache lies on disk."""
    (tmp_path / "blob").write_bytes(b"abc")
    (tmp_path / "a.tar").symlink_to(tmp_path / "blob")
    (tmp_path / "b.tar").symlink_to(tmp_path, target_is_directory=True)
    _, found = find_files(f"{tmp_path}/*.tar", (".tar",))
    assert [(file.path, file.size) for file in found] == [("a.tar", 3)]


def test_same_name_in_two_folders_is_two_shards(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").touch()
    _, found = list_files(str(tmp_path), ".tar")
    assert [shard_name(f) for f in found] == ["a%2F0.tar", "b%2F0.tar"]


@pytest.mark.parametrize("path", ["_a/_0.tar", ".a/.0.tar", "a/_0.tar", "ü.tar", "%5F.tar"])
def test_a_shards_name_comes_back_and_is_never_that_of_a_hidden_file(path: str) -> None:
    name = shard_name(path)
    assert unquote(name) == path and "/" not in name and name[0] not in "._"


def test_missing_and_empty_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        list_files(f"{tmp_path}/nothing", ".tar")
    with pytest.raises(UserError, match=r"no .tar files there"):
        list_files(str(tmp_path), ".tar")


def test_output_is_taken_up_with_the_same_settings_only(tmp_path: Path) -> None:
    path = str(tmp_path / "out")
    assert not open_output(path, "train", {"lr": 1, "pool": 3}, not_in_fingerprint=("pool",)).finished
    again = open_output(path, "train", {"lr": 1, "pool": 4}, not_in_fingerprint=("pool",))
    again.finish({"steps": 1})
    assert open_output(path, "train", {"lr": 1, "pool": 5}, not_in_fingerprint=("pool",)).finished
    with pytest.raises(UserError, match=r"other settings \(lr: 1 -> 2\)"):
        open_output(path, "train", {"lr": 2, "pool": 3}, not_in_fingerprint=("pool",))
    with pytest.raises(UserError, match="another program or verb"):
        open_output(path, "sweep", {"lr": 1})


def test_a_strangers_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        open_output(str(tmp_path), "train", {})


def test_relative_output_in_a_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as Ray sets it for a job's process
    monkeypatch.chdir(tmp_path)
    for output in ("out", "../out", "./a/b"):
        with pytest.raises(UserError, match="Ray deletes"):
            open_output(output, "train", {})
    assert not list(tmp_path.iterdir())
    open_output(str(tmp_path / "out"), "train", {})


def test_write_is_whole_and_leaves_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "shards" / "a.parquet"
    write_bytes(str(target), b"12345", tmp_folder=str(tmp_path / "_tmp"))
    assert target.read_bytes() == b"12345"
    assert [p.name for p in target.parent.iterdir()] == ["a.parquet"]
    assert list((tmp_path / "_tmp").iterdir()) == []
    assert identity(str(target)).startswith("5:")


def test_credentials_are_masked() -> None:
    assert mask("s3://key:secret@bucket/x") == "s3://***@bucket/x"


@pytest.mark.parametrize("with_links", [True, False])
def test_of_two_who_write_a_new_file_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_links: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not with_links:  # a mounted object store
        monkeypatch.setattr("os.link", refuse)
    path = str(tmp_path / "settings.json")
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda i: write_new(path, b"%d" % i), range(8)))
    assert sum(wrote) == 1 and read_bytes(path) == b"%d" % wrote.index(True)
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]
