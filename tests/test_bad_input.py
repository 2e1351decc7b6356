"""Every command line but two: bad input is one clear line and exit code 2, and nothing is written.

``tests/train/test_main.py`` and ``test_plan.py`` do the same for ``train.main`` and ``train.plan``, whose
flags belong to a process.
"""

import importlib
import sys
from pathlib import Path

import pytest

from eval import common
from train import prepare
from train.corpus import benchmark
from train.corpus.manifest import MANIFEST_FILE

# For each evaluation, a value of the wrong type and one out of range.
EVALUATIONS = {
    "capacity": ("queries=many", "queries=0"),
    "harness": ("tasks=3", "limit=-1"),
    "inference": ("layers=x", "samples=0"),
    "needle": ("rows=x", "forward_rows=0"),
    "orthogonality": ("draws=many", "components=(0,)"),
    "perplexity": ("rows=x", "documents=-1"),
    "recall": ("width=x", "test_rows=0"),
    "ruler": ("lengths=4", "samples=0"),
    "scaling": ("width=1.5", "samples=0"),
    "speed": ("width=1.5", "samples=0"),
}
OF_A_CHECKPOINT = ("harness", "perplexity", "ruler")
# Without their own --out: {argument: what the line must name}.
SHARED = [
    ([], "--out"),
    (["--out="], "--out"),
    (["--out=file"], "file"),
    (["--out=file/inside"], "file"),
    (["--out=new", "stray"], "stray"),
    (["--out=new", "--colour=red"], "colour"),
    (["--out=new", "--config=absent.py"], "absent.py"),
    (["--out=new", "--config=directory"], "directory"),
    (["--out=new", "--config=broken.py"], "broken.py"),
    (["--out=new", "--config=empty.py"], "get_config"),
    (["--out=new", "--config=bytes.py"], "bytes.py"),
    (["--out=new", "--config.absent=1"], "absent"),
]
PREPARE = ["--source=source", "--tokenizer=bytes", "--out=new", "--workers=1"]
OTHERS = {
    "eval.quick": [
        (["neddle"], "no evaluation is called 'neddle'"),
        (["--jobs=0"], "--jobs is 0; it must be at least 1"),
        (["--out=file/inside"], "file/inside"),
    ],
    "train.prepare": [
        ([], "--source is missing"),
        ([*PREPARE, "--source=absent"], "absent"),
        ([*PREPARE, "--source=directory"], "directory has no"),
        ([*PREPARE, "--source=file"], "file"),
        ([*PREPARE, "--tokenizer=absent"], "absent"),
        ([*PREPARE, "--tokenizer=file"], "file"),
        ([*PREPARE, "--tokenizer=broken"], "broken"),
        ([*PREPARE, "--out=file"], "file is not a directory"),
        ([*PREPARE, "--out=file/inside"], "file/inside"),
        ([*PREPARE, "--context-length=many"], "many"),
        ([*PREPARE, "--context-length=1"], "context_length is 1"),
        (["--verify=absent"], "absent"),
        (["--verify=file"], "file"),
        (["--verify=prepared"], MANIFEST_FILE),
    ],
    "train.corpus.benchmark": [
        ([], "kind"),
        (["prepare"], "--source"),
        (["prepare", "--source=absent", "--tokenizer=bytes"], "absent"),
        (["prepare", "--source=source", "--tokenizer=absent"], "absent"),
        (["prepare", "--source=source", "--tokenizer=bytes", "--workers=0"], "--workers is 0"),
        (["prepare", "--source=source", "--tokenizer=bytes", "--mb=nan"], "--mb is nan"),
        (["load", "--data=absent"], "absent"),
        (["load", "--data=prepared"], MANIFEST_FILE),
        (["load", "--data=absent", "--batch=x"], "x"),
    ],
    "eval.generate": [
        ([], "--run"),
        (["--run=absent", "--prompt=a"], "absent"),
        (["--run=file", "--prompt=a"], "file"),
        (["--run=run", "--prompt=a"], "config.json"),
        (["--run=run", "--prompt-file=absent"], "absent"),
        (["--run=run", "--prompt-file=directory"], "directory"),
        (["--run=run", "--prompt-file=bytes.py"], "not UTF-8"),
        (["--run=run", "--prompt=a", "--top-p=2"], "--top-p is 2"),
        (["--run=run", "--prompt=a", "--seed=-1"], "--seed is -1"),
        (["--run=run", "--prompt=a", "--top-k=x"], "--top-k"),
    ],
    "train.planning.scaling": [(["--out=new"], "--out=new")],
    "eval.report": [
        ([], "RUN"),
        (["absent"], "absent"),
        (["file"], "file"),
        (["directory"], "directory has neither"),
        (["run"], "config.json"),
        (["damaged"], "results.json"),
        (["binary"], "results.json"),
        (["damaged", "--out=directory"], "--out=directory"),
        (["damaged", "--out=file/page.html"], "--out=file"),
        (["damaged", "--colour=red"], "--colour=red"),
    ],
    "eval.merge": [
        ([], "RUN"),
        (["damaged"], "--out"),
        (["absent", "--out=new"], "absent"),
        (["directory", "--out=new"], "directory"),
        (["damaged", "--out=new"], "results.json"),
        (["binary", "--out=new"], "results.json"),
        (["damaged", "--out=file"], "--out=file"),
        (["damaged", "--out=new", "--colour=red"], "--colour=red"),
    ],
}
MAINS = {"train.prepare": prepare.main, "train.corpus.benchmark": benchmark.main}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything wrong that an argument can name."""
    root = tmp_path_factory.mktemp("bad")
    for name, content in {
        "file": b"text",
        "broken.py": b"def get_config(:\n",
        "empty.py": b"value = 1\n",
        "bytes.py": b"\xff\xfe\n",
        "source/train.jsonl": b'{"text": "some text"}\n',
        "broken/tokenizer.json": b"{",
        "prepared/manifest.json": b"{",
        "run/config.json": b"{",
        "damaged/results.json": b"{}",
        "binary/results.json": b"\xff\xfe",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    (root / "directory").mkdir()
    return root


@pytest.fixture(autouse=True)
def no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself would write that of a configuration beside it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def check(main, program: str, arguments: list[str], said: str, place: Path, capsys) -> None:
    before = sorted(place.rglob("*"))
    code = main(arguments)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.err.startswith(f"{program}: ") and printed.err.count("\n") == 1, printed.err
    assert said in printed.err and "Traceback" not in printed.err
    assert sorted(place.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_refuse(name: str, place: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(common, "Reporter", lambda *args, **options: pytest.fail("it was not refused"))
    module = importlib.import_module(f"eval.{name}")
    wrong_type, out_of_range = EVALUATIONS[name]
    own = [
        ([f"--config.{wrong_type}"], wrong_type.partition("=")[0]),
        ([f"--config.{out_of_range}"], out_of_range.partition("=")[0]),
    ]
    if name in OF_A_CHECKPOINT:  # which is asked for first
        own = [([*arguments, "--config.checkpoint=random"], said) for arguments, said in own]
    for arguments, said in [*SHARED, *((["--out=new", *a], said) for a, said in own)]:
        check(module.main, f"eval.{name}", arguments, said, place, capsys)


@pytest.mark.parametrize("program", OTHERS)
def test_other_commands_refuse(program: str, place: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    main = MAINS.get(program) or importlib.import_module(program).main
    # The data pipeline says "error", as its progress lines are the only others.
    name = "error" if program in MAINS else program
    for arguments, said in OTHERS[program]:
        check(main, name, arguments, said, place, capsys)


def test_every_command_is_here() -> None:
    root = Path(__file__).parents[1]
    found = set()
    for path in [*(root / "eval").glob("*.py"), *(root / "train").rglob("*.py")]:
        if 'if __name__ == "__main__"' in path.read_text():
            found.add(path.relative_to(root).with_suffix("").as_posix().replace("/", "."))
    assert found == {"train.main", "train.plan", *OTHERS, *(f"eval.{name}" for name in EVALUATIONS)}
