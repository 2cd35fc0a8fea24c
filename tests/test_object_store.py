"""Object stores: what local folders give, a real S3 server gives too, and GCS takes the same path."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from conftest import Members, S3Server, free_port, noise_jpeg, sample, start_server, text_jpeg, write_tar
from fsspec.registry import _registry as _filesystems
from oddities import odd_corpus
from test_formats import essence, good_part, write_folder, write_parquet

from raysys import patience, storage
from raysys.config import CorpusConfig, OcrConfig
from raysys.corpus.shards import iter_samples, open_corpus, plan_parts, read_image
from raysys.errors import UserError
from raysys.masking import mask
from raysys.output import open_output
from raysys.regions.annotations import AnnotationFiles, read_heads, read_parquet, refuse_changed_shard
from raysys.regions.annotator import Annotator
from raysys.regions.units import Unit, annotate_unit, plan_units
from raysys.storage import (
    find_files,
    identity,
    list_names,
    open_fs,
    read_bytes,
    reading,
    remove_folder,
    write_bytes,
    write_json,
    write_new,
    writing,
)

PICTURES = [noise_jpeg(i) for i in range(6)]
MB = 1 << 20
PART_BYTES = {".tar": 5_000, ".parquet": 1, ".csv": 100_000, ".jsonl": 100_000}


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


@pytest.fixture
def requests_of(s3: S3Server) -> Callable[[Callable[[], Any]], list[str]]:
    """What a call asks of the server."""

    def count(call: Callable[[], Any]) -> list[str]:
        before = len(s3.requests())
        call()
        return s3.requests()[before:]

    return count


def s3_call(method: str, **words: Any) -> Any:
    return open_fs("s3://any/x")[0].call_s3(method, **words)


def upload(local: Path, url: str) -> str:
    fs, inner = open_fs(url)
    fs.put(str(local), inner, recursive=local.is_dir())
    return url


# ---- listings --------------------------------------------------------------------------------------------------------


def test_folder_glob_and_braces_find_the_same_files_with_one_listing_each(
    bucket: str, requests_of: Callable[[Callable[[], Any]], list[str]]
) -> None:
    for i in range(12):
        write_bytes(f"{bucket}/c/t-{i:02}.tar", b"x" * i)
    write_bytes(f"{bucket}/c/notes.txt", b"x")
    expected = find_files(f"{bucket}/c", (".tar",))
    assert expected[0] == f"{bucket}/c"
    assert [(f.path, f.size) for f in expected[1]] == [(f"t-{i:02}.tar", i) for i in range(12)]
    for pattern in ("t-*.tar", "t-{00..11}.tar", f"{{{','.join(f't-{i:02}' for i in range(12))}}}.tar"):
        asked = requests_of(lambda pattern=pattern: find_files(f"{bucket}/c/{pattern}", (".tar",)))
        assert find_files(f"{bucket}/c/{pattern}", (".tar",)) == expected
        assert len(asked) == 1 and "list-type=2" in asked[0], asked
    assert len(requests_of(lambda: find_files(f"{bucket}/c", (".tar",)))) <= 3


def test_folders_within_and_odd_names_and_folder_marks(bucket: str) -> None:
    names = ["a/0.tar", "b/0.tar", "b/c/d e é.tar", "b//1.tar", "h#x.tar", "p%20x.tar"]
    for name in [*names, "b/", "mark/"]:
        s3_call("put_object", Bucket=bucket[5:], Key=f"c/{name}", Body=b"1" if name.endswith("tar") else b"")
    root, files = find_files(f"{bucket}/c/", (".tar",))
    assert sorted(names) == [file.path for file in files]
    assert [identity(storage.join(root, file.path)) for file in files] == [file.identity for file in files]
    assert [f.path for f in find_files(f"{bucket}/c/{{a,b}}/0.tar", (".tar",))[1]] == ["a/0.tar", "b/0.tar"]
    assert list_names(f"{bucket}/c/mark") == []
    open_output(f"{bucket}/c/mark", "train", {})


def test_what_is_missing_is_said_with_its_name(bucket: str) -> None:
    write_bytes(f"{bucket}/c/0.tar", b"x")
    for path, message in (
        (f"{bucket}/nothing", "nothing: no such file or folder"),
        (f"{bucket}/c/{{0..2}}.tar", r"c/1\.tar: no such file or folder"),
        (f"{bucket}/c/*.zip", r"no .tar files there"),
        ("s3://no-such-bucket/c", "no-such-bucket/c: no such file or folder"),
        ("s3://", "names no bucket"),
        (f"s3://{{{bucket[5:]}/c,other}}/0.tar", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            find_files(path, (".tar",))


def test_braces_over_buckets_are_refused(s3: S3Server) -> None:
    one, two = s3.new_bucket(), s3.new_bucket()
    for name in (one, two):
        write_bytes(f"{name}/0.tar", b"x")
    with pytest.raises(UserError, match="several buckets; make each a source"):
        find_files(f"s3://{{{one[5:]},{two[5:]}}}/0.tar", (".tar",))


def test_a_listing_and_a_head_give_the_same_identity_and_a_change_another(bucket: str, tmp_path: Path) -> None:
    fs, inner = open_fs(bucket)
    (tmp_path / "parts").write_bytes(os.urandom(11 * MB))
    fs.pipe_file(f"{inner}/one.tar", b"12345")
    fs.put_file(str(tmp_path / "parts"), f"{inner}/parts.tar", chunksize=5 * MB)
    found = {file.path: file for file in find_files(bucket, (".tar",))[1]}
    assert found["parts.tar"].identity.endswith("-3") and found["one.tar"].identity.startswith("5:")
    assert all(identity(f"{bucket}/{name}") == file.identity for name, file in found.items())
    assert all(abs(file.modified - (tmp_path / "parts").stat().st_mtime) < 60 for file in found.values())

    (tmp_path / "parts").write_bytes(os.urandom(11 * MB))
    fs.pipe_file(f"{inner}/one.tar", b"54321")
    fs.put_file(str(tmp_path / "parts"), f"{inner}/parts.tar", chunksize=5 * MB)
    now = {file.path: file for file in find_files(bucket, (".tar",))[1]}
    for name, file in found.items():
        assert now[name].size == file.size and now[name].identity != file.identity
        with pytest.raises(UserError, match="changed since it was annotated"):
            refuse_changed_shard(f"{bucket}/{name}", file.identity)


def test_what_another_process_writes_is_seen_at_once(bucket: str) -> None:
    write_bytes(f"{bucket}/c/0.tar", b"x")
    before = find_files(f"{bucket}/c", (".tar",))[1], list_names(f"{bucket}/c"), identity(f"{bucket}/c/0.tar")
    code = "import sys; from raysys.storage import write_bytes; [write_bytes(f'{sys.argv[1]}/c/{i}.tar', b'y') for i in (0, 1)]"
    subprocess.run([sys.executable, "-c", code, bucket], check=True)
    assert [f.path for f in find_files(f"{bucket}/c", (".tar",))[1]] == list_names(f"{bucket}/c") == ["0.tar", "1.tar"]
    assert before[1] == ["0.tar"] and before[2] != identity(f"{bucket}/c/0.tar")


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_of_racing_writers_exactly_one_is_first(bucket: str) -> None:
    start = threading.Barrier(8)
    first: list[int] = []

    def race(name: str, writer: int) -> None:
        start.wait()
        if write_new(f"{bucket}/{name}", b"%d" % writer):
            first.append(writer)

    alone = 0
    for name in "abcde":
        first.clear()
        threads = [threading.Thread(target=race, args=(name, writer)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read_bytes(f"{bucket}/{name}") in [b"%d" % writer for writer in first]
        alone += len(first) == 1
    # moto looks and writes in two steps, so that on a busy machine a second one may slip in between; a store does it in one
    assert alone >= 3


def test_a_conflict_with_a_request_under_way_is_asked_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS answers 409 then; moto never does."""
    fs = open_fs(bucket)[0].below
    pipe_file, conflicts = fs.pipe_file, [OSError(5, "ConditionalRequestConflict")]
    monkeypatch.setattr(fs, "pipe_file", lambda *a, **k: _raise(conflicts.pop()) if conflicts else pipe_file(*a, **k))
    assert write_new(f"{bucket}/a", b"1") and not conflicts
    conflicts.append(OSError(22, "PreconditionFailed"))  # MinIO says no more than that; s3fs wants AWS's Condition beside it
    assert not write_new(f"{bucket}/b", b"1") and not conflicts


def _raise(error: Exception) -> None:
    raise error


def test_an_object_appears_when_it_is_complete_and_not_at_all_where_the_block_raises(bucket: str) -> None:
    with pytest.raises(KeyboardInterrupt), writing(f"{bucket}/a", tmp_folder=f"{bucket}/_tmp") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list_names(bucket) == []
    with writing(f"{bucket}/a", tmp_folder=f"{bucket}/_tmp") as file:
        file.write(b"first ")
        assert list_names(bucket) == []
        file.write(b"second")
    assert list_names(bucket) == ["a"] and read_bytes(f"{bucket}/a") == b"first second"


def test_a_large_file_goes_up_in_parts(bucket: str, requests_of: Callable[[Callable[[], Any]], list[str]]) -> None:
    def write() -> None:
        with writing(f"{bucket}/large") as file:
            for i in range(101):
                file.write(bytes([i]) * MB)

    asked = requests_of(write)
    assert sum("partNumber" in request for request in asked) == 3 and identity(f"{bucket}/large").endswith("-3")
    data = read_bytes(f"{bucket}/large")
    assert len(data) == 101 * MB and data[-1] == 100 and data[50 * MB] == 50
    assert s3_call("list_multipart_uploads", Bucket=bucket[5:]).get("Uploads", []) == []


def test_a_folder_is_removed_and_its_neighbours_stay(bucket: str) -> None:
    for name in ("a/0", "a/b/1", "ab/2"):
        write_bytes(f"{bucket}/{name}", b"x")
    remove_folder(f"{bucket}/a")
    remove_folder(f"{bucket}/a")
    assert list_names(bucket) == ["ab"] and list_names(f"{bucket}/a") == []


def test_an_output_is_fresh_taken_up_refused_and_finished(bucket: str) -> None:
    path = f"{bucket}/out"
    assert not open_output(path, "train", {"lr": 1}).finished
    open_output(path, "train", {"lr": 1}).finish({"steps": 1})
    assert open_output(path, "train", {"lr": 1}).finished
    for output, verb, settings, message in (
        (path, "train", {"lr": 2}, r"other settings \(lr: 1 -> 2\)"),
        (path, "sweep", {"lr": 1}, "another program or verb"),
        (bucket, "train", {"lr": 1}, "not empty"),
        (f"{path}/settings.json", "train", {"lr": 1}, "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            open_output(output, verb, settings)


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path, bucket: str) -> dict[str, str]:
    """Local shard -> the same on S3."""
    members: Members = [m for i, p in enumerate(PICTURES) for m in sample(f"d{i % 2}/{i}", p, f"caption, {i}", ["über", "two"])]
    tar = write_tar(tmp_path / "c" / "a.tar", members + sample("none", None, "no picture"))
    samples = list(iter_samples(str(tar)))
    odd_corpus(tmp_path / "c" / "odd.tar")
    (tmp_path / "c" / "cut.tar").write_bytes(tar.read_bytes()[:9000])
    local = [tar, tmp_path / "c" / "odd.tar", tmp_path / "c" / "cut.tar"]
    local.append(write_parquet(tmp_path / "c" / "a.parquet", samples, row_group_size=2))
    local += [write_folder(tmp_path / "c" / kind, samples, kind) for kind in ("csv", "jsonl")]
    upload(tmp_path / "c", f"{bucket}/c")
    return {str(path): f"{bucket}/c/{path.relative_to(tmp_path / 'c')}" for path in local}


def test_every_format_gives_on_s3_what_it_gives_from_a_folder(shards: dict[str, str]) -> None:
    for local, remote in shards.items():
        expected, damage = good_part(Path(local))
        assert good_part(remote)[1] == damage  # type: ignore[arg-type]
        found = good_part(remote)[0]  # type: ignore[arg-type]
        assert essence(found) == essence(expected), remote
        assert [(s.offset, s.size, s.metadata) for s in found] == [(s.offset, s.size, s.metadata) for s in expected]
        plan = plan_parts(remote, PART_BYTES[os.path.splitext(remote)[1]])
        assert (plan.parts, plan.damaged) == (plan_parts(local, PART_BYTES[os.path.splitext(remote)[1]]).parts, damage)
        assert plan.identity == identity(remote) and (len(plan.parts) > 1 or damage)
        assert essence([s for part in plan.parts for s in iter_samples(remote, part)]) == essence(expected)
        for one in expected:
            if one.image:
                assert read_image(remote, index=one.index, offset=one.offset, size=one.size) == one.image


def test_a_picture_of_a_tar_is_one_request_of_its_bytes(
    shards: dict[str, str], requests_of: Callable[[Callable[[], Any]], list[str]]
) -> None:
    remote = next(url for url in shards.values() if url.endswith("a.tar"))
    one = next(iter_samples(remote))
    asked = requests_of(lambda: read_image(remote, index=one.index, offset=one.offset, size=one.size))
    assert [request.split()[0] for request in asked] == ["GET"]


def test_reading_asks_for_a_few_large_ranges_or_for_just_the_bytes(
    bucket: str, requests_of: Callable[[Callable[[], Any]], list[str]]
) -> None:
    data = os.urandom(20 * MB)
    write_bytes(f"{bucket}/a", data)

    def read_all(piece: int, **how: int) -> None:
        with reading(f"{bucket}/a", **how) as file:
            assert b"".join(iter(lambda: file.read(piece), b"")) == data

    assert len(requests_of(lambda: read_all(10_000))) == 1 + 3
    assert len(requests_of(lambda: read_all(5 * MB, ahead_bytes=0))) == 1 + 4


def test_an_object_that_changes_while_it_is_read_says_so(bucket: str) -> None:
    write_bytes(f"{bucket}/a", os.urandom(3 * MB))
    with pytest.raises(FileNotFoundError, match="changed while it was read"), reading(f"{bucket}/a", ahead_bytes=MB) as file:
        file.read(10)
        write_bytes(f"{bucket}/a", os.urandom(3 * MB))
        file.read()


# ---- annotations -----------------------------------------------------------------------------------------------------


def annotate(corpus: str, folder: str, part_bytes: int) -> pa.Table:
    files, annotator = AnnotationFiles(folder, "mark"), Annotator(OcrConfig(decode_timeout_s=5))
    shards = open_corpus(CorpusConfig(corpus)).shards
    plans = {s.name: files.save_plan(s, plan_parts(s.path, part_bytes)) for s in shards if s.size >= part_bytes}
    assert all(files.plan(shard) == plans.get(shard.name) for shard in shards)
    for unit in plan_units(shards, plans, files, part_bytes):
        result = annotate_unit(Unit.from_json(unit.to_json()), annotator, files, lambda counts, num_bytes: None)
        assert not result.failed
    names = list_names(f"{folder}/shards")
    assert [head.identity for head in read_heads([f"{folder}/shards/{name}" for name in names])] == [s.identity for s in shards]
    assert list_names(f"{folder}/_parts") == list_names(f"{folder}/_tmp") == []
    return pa.concat_tables([read_parquet(f"{folder}/shards/{name}").replace_schema_metadata() for name in sorted(names)])


def test_annotations_on_s3_have_the_rows_of_local_ones(tmp_path: Path, bucket: str, fake_engine: None) -> None:
    odd_corpus(tmp_path / "c" / "d" / "odd.tar")
    write_tar(tmp_path / "c" / "small.tar", sample("a", text_jpeg("SALE")) + sample("b", PICTURES[0]))
    upload(tmp_path / "c", f"{bucket}/c")
    local = annotate(str(tmp_path / "c"), str(tmp_path / "A"), 30_000)
    remote = annotate(f"{bucket}/c", f"{bucket}/A", 30_000)
    assert remote.equals(local) and remote.num_rows > 30
    assert list_names(f"{bucket}/A/shards") == ["d%2Fodd.tar.parquet", "small.tar.parquet"]


def test_a_shard_that_changes_while_it_is_read_fails_alone(tmp_path: Path, bucket: str, fake_engine: None) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [m for i in range(4) for m in sample(str(i), PICTURES[i])])
        upload(tmp_path / f"{name}.tar", f"{bucket}/c/{name}.tar")
    unit = Unit(open_corpus(CorpusConfig(f"{bucket}/c")).shards)
    files = AnnotationFiles(f"{bucket}/A", "mark")
    again = lambda counts, num_bytes: write_bytes(f"{bucket}/c/a.tar", b"\0" * 20480)  # noqa: E731
    result = annotate_unit(unit, Annotator(OcrConfig(decode_timeout_s=5)), files, again)
    assert list(result.done) == ["b.tar"] and "changed while it was read" in result.failed["a.tar"]
    assert list_names(f"{bucket}/A/shards") == ["b.tar.parquet"]


# ---- errors ----------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[str], Any]] = {
    "find": lambda url: find_files(url, (".tar",)),
    "glob": lambda url: find_files(f"{url}/*.tar", (".tar",)),
    "braces": lambda url: find_files(f"{url}/{{0,1}}.tar", (".tar",)),
    "names": list_names,
    "identity": identity,
    "read": read_bytes,
    "write": lambda url: write_bytes(url, b"x"),
    "create": lambda url: write_new(url, b"x"),
    "upload": lambda url: _upload(url),
    "open": lambda url: _open(url),
    "output": lambda url: open_output(url, "train", {}),
}


def _upload(url: str) -> None:
    with writing(url) as file:
        file.write(b"x")


def _open(url: str) -> None:
    with reading(url) as file:
        file.read()


@pytest.mark.parametrize("name", CALLS)
def test_access_denied_names_the_path(bucket: str, s3: S3Server, name: str) -> None:
    write_bytes(f"{bucket}/c/0.tar", b"x")
    _check_credentials(s3, b"0")
    try:
        with pytest.raises(PermissionError) as caught:
            CALLS[name](f"{bucket}/c")
    finally:
        _check_credentials(s3, b"inf")
    assert caught.value.filename.startswith(f"{bucket}/c") and caught.value.strerror


def _check_credentials(s3: S3Server, after: bytes) -> None:
    """moto checks every call after so many; ours has no user at all."""
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{s3.endpoint}/moto-api/reset-auth", after, headers, method="POST")).close()


@pytest.mark.parametrize("name", ["write", "create", "upload", "output"])
def test_no_such_bucket_names_the_path(s3: S3Server, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="bucket does not exist") as caught:
        CALLS[name]("s3://no-such-bucket/c")
    assert caught.value.filename.startswith("s3://no-such-bucket/c")


@pytest.fixture
def other_storage(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment may be changed within; what it was counts again after."""
    s3fs = fsspec.get_filesystem_class("s3")
    s3fs.clear_instance_cache()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(patience, "RETRY_S", 0)
    yield monkeypatch
    s3fs.clear_instance_cache()


@pytest.mark.parametrize("name", CALLS)
def test_a_server_that_does_not_answer_is_a_connection_error(other_storage: pytest.MonkeyPatch, name: str) -> None:
    other_storage.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionError, match="Could not connect") as caught:
        CALLS[name]("s3://bucket/c")
    assert caught.value.filename.startswith("s3://bucket/c")


def test_no_credentials_are_a_permission_error(other_storage: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        other_storage.delenv(name, raising=False)
    other_storage.setenv("AWS_EC2_METADATA_DISABLED", "true")
    other_storage.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(PermissionError, match="Unable to locate credentials"):
        find_files("s3://bucket/c", (".tar",))


@pytest.mark.parametrize(
    "url", ["s3://key:geheim@bucket/c", "s3://key:ge/heim@bucket/c", "s3://geheim@bucket/c", "gs://a:geheim@b/c"]
)
def test_credentials_in_the_url_are_refused_and_never_shown(s3: S3Server, url: str) -> None:
    for name, call in CALLS.items():
        with pytest.raises(UserError, match="takes no credentials in the URL") as caught:
            call(url)
        assert "heim" not in str(caught.value), name
    with pytest.raises(UserError) as caught:
        find_files("s3://no such bucket/c", (".tar",))
    assert "s3://no such bucket/c" in str(caught.value)


def test_masks() -> None:
    for url, shown in (
        ("sftp://key:secret@host/a@b.tar", "sftp://***@host/a@b.tar"),
        ("s3://key:se/cr/et@bucket/x", "s3://***@bucket/x"),
        ("sftp://key:p@ss@host/x", "sftp://***@host/x"),
        ("http://host:80/a@b.tar", "http://host:80/a@b.tar"),
        ("s3://bucket/a@b.tar", "s3://bucket/a@b.tar"),
        ("see s3://k:s@b/x and s3://k:s@b/y: bad", "see s3://***@b/x and s3://***@b/y: bad"),
    ):
        assert mask(url) == shown


# ---- other packages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "package", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gs")])
def test_a_missing_package_is_one_line_with_its_extra(url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_filesystems, url.split(":")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        find_files(url, (".tar",))
    assert str(caught.value) == f"{url}: {extra}:// needs a package that is not installed: pip install 'raysys[{extra}]'"


def test_gs_urls_go_to_gcsfs_without_a_cache_of_listings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    fs, inner = open_fs("gs://bucket/a/b.tar")
    assert "gs" in fs.protocol and inner == "bucket/a/b.tar" and not fs.dircache.use_listings_cache


class _CreatesOnce(http.server.BaseHTTPRequestHandler):
    """An upload of GCS that must not be there yet: 200, then 412."""

    names: set[str]

    def do_POST(self) -> None:
        name = self.rfile.read(int(self.headers["Content-Length"])).split(b'"name"')[1].split(b'"')[1].decode()
        assert "ifGenerationMatch=0" in self.path
        self.send_response(412 if name in self.names else 200)
        self.names.add(name)
        self.end_headers()
        self.wfile.write(b'{"size": "1", "error": {"code": 412, "message": "conditionNotMet"}}')

    def do_GET(self) -> None:
        """Who was refused looks whether what is there is its own."""
        self.send_response(200)
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"1")


def test_write_new_on_gcs_is_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = type("Handler", (_CreatesOnce,), {"names": set()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        assert [write_new("gs://bucket/a", b"1"), write_new("gs://bucket/a", b"2"), write_new("gs://bucket/b", b"2")] == [
            True,
            False,
            True,
        ]
        server.shutdown()
    fsspec.get_filesystem_class("gs").clear_instance_cache()


def test_write_json_is_read_back(bucket: str) -> None:
    write_json(f"{bucket}/x.json", {"ü": 1})
    assert storage.read_json(f"{bucket}/x.json") == {"ü": 1}


# ---- the same on GCS -------------------------------------------------------------------------------------------------


@pytest.fixture
def gcs_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    words = ["gcp_storage_emulator", "start", "--port", str(port), "-H", "127.0.0.1", "-M", "--default-bucket", "bucket"]
    process = start_server(words, port, tmp_path / "gcs.log")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    yield "gs://bucket"
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    process.terminate()
    process.wait()


def test_annotations_on_gcs_have_the_rows_of_local_ones(tmp_path: Path, gcs_bucket: str, fake_engine: None) -> None:
    odd_corpus(tmp_path / "c" / "d" / "odd.tar")
    write_tar(tmp_path / "c" / "small.tar", sample("a", text_jpeg("SALE")) + sample("b", PICTURES[0]))
    for name in ("d/odd.tar", "small.tar"):
        write_bytes(f"{gcs_bucket}/c/{name}", (tmp_path / "c" / name).read_bytes())
    local = annotate(str(tmp_path / "c"), str(tmp_path / "A"), 30_000)
    assert annotate(f"{gcs_bucket}/c", f"{gcs_bucket}/A", 30_000).equals(local)
    open_output(f"{gcs_bucket}/out", "train", {"lr": 1}).finish({})
    assert open_output(f"{gcs_bucket}/out", "train", {"lr": 1}).finished
