"""The command line of preparing: same bytes however it is run, kept work after a kill, clear refusals."""

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.train.corpora import entries, lines, slimpajama, write_jsonl, write_parquet, write_zst
from train import prepare
from train.corpus import runner
from train.corpus.manifest import read_manifest
from train.corpus.plan import PARTIAL_DIRECTORY
from train.corpus.prepared import PreparedDataset
from train.corpus.tokenizers import load_tokenizer


def run(source: Path, out: Path, *more: str) -> int:
    options = [
        f"--source={source}",
        f"--out={out}",
        "--tokenizer=bytes",
        "--context-length=64",
        "--workers=1",
    ]
    return prepare.main([*options, *more])


def tree(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slimpajama(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    assert run(corpus, out) == 0
    return out


def test_manifest_tells_everything(corpus: Path, reference: Path) -> None:
    manifest = read_manifest(reference)
    documents = [entry for number in range(3) for entry in entries(12, number)]
    train = manifest["splits"]["train"]
    assert train["documents"] == len(documents) == 36
    assert train["text_bytes"] == train["tokens"] == sum(len(d["text"].encode()) for d in documents)
    assert train["packed_tokens"] == train["tokens"] + 2 * 36
    names = Counter(d["meta"]["redpajama_set_name"] for d in documents)
    assert {name: counts["documents"] for name, counts in train["subsets"].items()} == names
    for shard in train["shards"]:
        source = corpus / shard["source"]["name"]
        assert shard["source"]["bytes"] == source.stat().st_size
        assert shard["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        assert shard["sha256"] == tree(reference)[shard["file"]]
    assert manifest["token_dtype"] == "uint16"
    assert manifest["options"]["context_length"] == 64
    assert manifest["tokenizer"]["vocab_size"] == 258
    text = (reference / "manifest.json").read_text()
    assert str(corpus) not in text
    assert str(reference) not in text
    assert set(tree(reference)) == {
        "manifest.json",
        "tokenizer/marks.json",
        "validation-00000-of-00001.arrayrecord",
        *(f"train-0000{number}-of-00003.arrayrecord" for number in range(3)),
    }


@pytest.mark.parametrize("form", ["jsonl", "struct.parquet", "string.parquet"])
def test_records_do_not_depend_on_the_format(reference: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / "corpus" / "data" / f"train-00000-of-00001.{form}"
    if form == "jsonl":
        write_jsonl(path, entries(12, 0))
    else:
        write_parquet(path, entries(12, 0), json_meta=form.startswith("string"))
    assert run(tmp_path / "corpus", tmp_path / "out") == 0
    made = tree(tmp_path / "out")["train-00000-of-00001.arrayrecord"]
    assert made == tree(reference)["train-00000-of-00003.arrayrecord"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 6])
def test_workers_do_not_change_bytes(corpus: Path, reference: Path, tmp_path: Path, workers: int) -> None:
    assert run(corpus, tmp_path / "out", f"--workers={workers}") == 0
    assert tree(tmp_path / "out") == tree(reference)


def test_tasks_and_merge_give_the_same_bytes(
    corpus: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for index in (2, 0):
        assert run(corpus, out, f"--task={index}/3") == 0
    assert run(corpus, out, "--merge") == 2
    assert "1 of 4 shards are not made yet, first train-00001-of-00003" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    assert run(corpus, out, "--task=1/3") == 0
    shard = out / "train-00000-of-00003.arrayrecord"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert run(corpus, out, "--merge") == 2
    assert shard.name in capsys.readouterr().err
    shard.write_bytes(good)
    assert run(corpus, out, "--merge") == 0
    assert tree(out) == tree(reference)


def test_finished_shards_are_kept_and_checked(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(corpus, out, "--task=0/2") == 0
    (out / ".train-00001-of-00003.arrayrecord.host-1.tmp").write_text("left by a kill")
    damaged = out / "train-00002-of-00003.arrayrecord"
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    made = []
    make = runner.make_shard
    monkeypatch.setattr(
        runner, "make_shard", lambda *args, **options: made.append(args[1].file) or make(*args, **options)
    )
    assert run(corpus, out) == 0
    kept = "train-00000-of-00003.arrayrecord"
    assert sorted(made) == sorted({*tree(reference), kept} - {kept, "manifest.json", "tokenizer/marks.json"})
    assert tree(out) == tree(reference)


@pytest.mark.slow
def test_resumes_after_kill_9(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    for number in range(4):
        write_zst(source / "train" / f"{number}.jsonl.zst", entries(700 if number else 40, number, 400))
    command = [sys.executable, "-m", "train.prepare", f"--source={source}", "--tokenizer=bytes"]
    command += ["--context-length=64", "--workers=2", f"--out={tmp_path / 'out'}"]
    victim = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    partial = tmp_path / "out" / PARTIAL_DIRECTORY
    deadline = time.monotonic() + 120
    while not list(partial.glob("train-*.json")):
        assert victim.poll() is None, victim.stderr
        assert time.monotonic() < deadline, "no shard was finished"
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not (tmp_path / "out" / "manifest.json").exists()
    _wait_for_orphans(victim.pid)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "shards are finished and intact" in again.stdout
    assert prepare.main([*command[3:-2], "--workers=1", f"--out={tmp_path / 'whole'}"]) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files may not grow past 100 kB: writing fails as on a full disk, without the rights to make one."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_jsonl(source / "train.jsonl", [{"text": f"document {n} " * 100} for n in range(500)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = run(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert code == 2 and said.splitlines()[-1].startswith(f"error: {out} cannot be written"), said
    assert "Traceback" not in said and not [path for path in out.iterdir() if ".tmp" in path.name]
    assert run(source, out) == 0
    assert prepare.main([f"--verify={out}"]) == 0


def _wait_for_orphans(session: int) -> None:
    """The workers of a killed run end by themselves."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, 0)
            time.sleep(0.05)
            continue
        return
    pytest.fail("workers outlive a killed run")


def test_verify_names_the_first_bad_file(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(corpus, out) == 0
    assert prepare.main([f"--verify={out}"]) == 0
    assert "36" in capsys.readouterr().out
    for name in (
        "train-00002-of-00003.arrayrecord",
        "train-00001-of-00003.arrayrecord",
        "tokenizer/marks.json",
    ):
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 4
        (out / name).write_bytes(data)
        assert prepare.main([f"--verify={out}"]) == 2
        assert f"{out / name} is damaged" in capsys.readouterr().err
    (out / "train-00000-of-00003.arrayrecord").unlink()
    assert prepare.main([f"--verify={out}"]) == 2
    assert "train-00000-of-00003.arrayrecord is missing" in capsys.readouterr().err
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest.replace('"documents": 36', '"documents": 37'))
    assert prepare.main([f"--verify={out}"]) == 2
    assert "does not match its checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context-length=1"], "context_length is 1; it must be in [2, 2^31)"),
        (["--context-length=x"], "invalid int value"),
        (["--source=nowhere"], "source 'nowhere' is not there"),
        (["--source=hf:owner/name"], "no pinned revision"),
        (["--tokenizer=nowhere"], "tokenizer 'nowhere' is not there"),
        (["--tokenizer=train:many"], "train:SIZE"),
        (["--tokenizer=train:100"], "must have at least 258"),
        (["--splits=test"], "asks for 'test'"),
        (["--text-field=content"], "no text in field 'content'"),
        (["--model-vocab-size=200"], "the tokenizer has 258 entries; the model's vocabulary has 200"),
        (["--task=3/3"], "'3/3' is not I/N with 0 <= I < N"),
        (["--task=0/3", "--merge"], "exclude each other"),
        (["--workers=0"], "--workers is 0"),
        (["--max-bad=2"], "max_bad is 2.0; it must be a share in [0, 1]"),
        (["--max-damaged-files=-1"], "max_damaged_files is -1"),
        (["--max-document-mb=nan"], "--max-document-mb is nan"),
        (["--colour=red"], "unrecognized arguments: --colour=red"),
    ],
)
def test_wrong_arguments(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert run(corpus, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([]) == 2
    assert capsys.readouterr().err == "error: --source is missing\n"


def test_other_options_are_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(corpus, out, "--task=0/4") == 0
    assert run(corpus, out, "--context-length=32") == 2
    assert "options.context_length: 64 -> 32" in capsys.readouterr().err
    assert run(corpus, out) == 0
    before = tree(out)
    assert run(corpus, out) == 0
    assert "is prepared already" in capsys.readouterr().out
    assert run(corpus, out, "--subsets=RedPajamaBook") == 2
    assert "options.subsets: [] -> ['RedPajamaBook']" in capsys.readouterr().err
    assert tree(out) == before
    (tmp_path / "killed" / PARTIAL_DIRECTORY).mkdir(parents=True)
    (tmp_path / "killed" / "tokenizer").mkdir()
    assert run(corpus, tmp_path / "killed") == 0
    assert tree(tmp_path / "killed") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert run(corpus, tmp_path / "full") == 2
    assert "is not empty" in capsys.readouterr().err


def test_bad_input_is_counted_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "corpus", tmp_path / "out"
    good = lines(entries(20))
    (source / "train").mkdir(parents=True)
    (source / "train" / "a.jsonl").write_bytes(good + b'{"text": "\xff"}\n{"text": ""}\n')
    (source / "train" / "b.jsonl").write_bytes(b"{\n{\n" + good)
    assert run(source, out) == 2
    error = capsys.readouterr().err
    assert "4 of 44 documents are defective (limit --max-bad=0.001)" in error
    assert "train/b.jsonl: 2 bad_json, first at 1" in error
    assert "train/a.jsonl: 1 bad_utf8, first at 21" in error
    assert not (out / "manifest.json").exists()
    assert run(source, out, "--max-bad=0.1") == 0
    assert "train: 2 bad_json" in capsys.readouterr().out
    manifest = read_manifest(out)
    assert manifest["splits"]["train"]["defects"] == {"bad_json": 2, "bad_utf8": 1, "empty_text": 1}
    assert manifest["splits"]["train"]["documents"] == 40


def test_damaged_files_have_their_own_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "corpus", tmp_path / "out"
    path = write_zst(source / "train" / "a.jsonl.zst", entries(2000))
    write_zst(source / "train" / "b.jsonl.zst", entries(5))
    path.write_bytes(path.read_bytes()[:-9])
    assert run(source, out, "--max-bad=1") == 2
    assert "1 files are damaged (limit --max-damaged-files=0)" in capsys.readouterr().err
    assert run(source, out, "--max-damaged-files=1") == 0
    assert read_manifest(out)["splits"]["train"]["defects"] == {"truncated_zstd": 1}


def test_nothing_to_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "corpus" / "train.jsonl", entries(3))
    assert run(tmp_path / "corpus", tmp_path / "out", "--subsets=Absent") == 2
    assert capsys.readouterr().err == "error: the source has no document to keep (3 are of other subsets)\n"


def test_only_some_subsets(tmp_path: Path) -> None:
    documents = entries(30)
    write_jsonl(tmp_path / "corpus" / "train.jsonl", documents)
    assert run(tmp_path / "corpus", tmp_path / "out", "--subsets=RedPajamaBook") == 0
    wanted = [d["text"] for d in documents if d["meta"]["redpajama_set_name"] == "RedPajamaBook"]
    split = read_manifest(tmp_path / "out")["splits"]["train"]
    assert (split["documents"], split["left_out"]) == (len(wanted), 30 - len(wanted))
    dataset = PreparedDataset(tmp_path / "out")
    assert [dataset.tokenizer.decode(d.tokens.tolist()) for d in dataset.documents()] == wanted


def test_trained_tokenizer_lies_beside_the_data(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        assert run(corpus, tmp_path / name, "--tokenizer=train:300") == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert run(corpus, tmp_path / "begun", "--tokenizer=train:300", "--task=0/2") == 0
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert run(corpus, tmp_path / "begun", "--tokenizer=train:300") == 0
    assert tree(tmp_path / "begun") == tree(tmp_path / "one")
    manifest = read_manifest(tmp_path / "one")
    digest = tree(tmp_path / "one")["tokenizer/tokenizer.json"]
    assert manifest["tokenizer"]["files"]["tokenizer.json"] == digest
    assert manifest["tokenizer"]["training"] == {"vocab_size": 300, "sample_bytes": 200_000_000}
    tokenizer = load_tokenizer(tmp_path / "one")
    first = next(PreparedDataset(tmp_path / "one").documents())
    assert first.tokens[0] == tokenizer.bos_id
    assert first.tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(first.tokens.tolist()) == entries(12, 0)[0]["text"]


def test_a_hub_dataset_is_named_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "hf:owner/name@" + "0" * 40
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", entries(4))
    monkeypatch.setattr(
        prepare.hub.huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub")
    )
    assert run(Path("unused"), tmp_path / "out", f"--source={name}") == 0
    assert read_manifest(tmp_path / "out")["source"] == name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak memory stays when a .jsonl.zst file and a parquet file of one row group grow by 15 MB."""
    peaks = {}
    # VmHWM, not ru_maxrss: that one is inherited from the process that started this one.
    code = (
        "import sys; from train.prepare import main; code = main(sys.argv[1:]); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(code)"
    )
    for count in (1000, 2500):
        source = tmp_path / f"corpus{count}"
        unlike = [{"text": random.Random(n).randbytes(5000).hex(), "meta": {"a": "b"}} for n in range(count)]
        write_zst(source / "train" / "a.jsonl.zst", unlike)
        path = write_parquet(source / "train" / "b.parquet", unlike, rows=count)
        assert pq.ParquetFile(path).num_row_groups == 1
        command = [sys.executable, "-c", code, f"--source={source}", "--tokenizer=bytes", "--workers=1"]
        done = subprocess.run(
            [*command, f"--out={tmp_path / f'out{count}'}"], capture_output=True, text=True, check=True
        )
        peaks[count] = int(done.stdout.split()[-1]) * 1024
    assert peaks[2500] < peaks[1000] + (16 << 20), peaks


def test_progress_is_told_in_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.corpus import progress

    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.ByteProgress("prepare", 100_000_000) as shown:
        shown.update(25_000_000, 50_000_000, ", 7 documents")
    assert capsys.readouterr().err == "prepare: 25%, 25.00 MB/s, 7 documents, 0:00:06 left\n"


def test_json_of_the_manifest_is_stable(reference: Path) -> None:
    data = (reference / "manifest.json").read_bytes()
    assert json.loads(data) == read_manifest(reference)
    assert data.endswith(b"}\n")
