"""The command line of generation: what it prints, what it saves, how it refuses."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from eval import generate
from holo_jax import load_pretrained
from holo_jax.generate import STATE_DTYPES, Sampling
from holo_jax.generate import generate as generate_tokens
from tests.holo_jax.runs import write_run

PROMPT = "def f(x):"
FEW = ["--max-new-tokens=8", "--block-size=4", "--piece-size=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "micro"
    write_run(path)
    return path


def call(run: Path, *arguments: str) -> int:
    return generate.main([f"--run={run}", *FEW, *arguments])


def refused(capsys: pytest.CaptureFixture, run: Path, *arguments: str) -> str:
    """The one line of a refusal."""
    assert call(run, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("eval.generate: ") and printed.err.count("\n") == 1
    return printed.err


def test_text_is_what_the_library_generates(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(run, f"--prompt={PROMPT}", "--seed=3") == 0
    streamed = capsys.readouterr()
    assert call(run, f"--prompt={PROMPT}", "--seed=3", "--json") == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert printed.err == ""
    assert streamed.out == values["text"] + "\n"
    loaded = load_pretrained(run)
    tokenizer = loaded.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    expected = generate_tokens(
        loaded.model,
        [ids],
        max_new_tokens=8,
        sampling=Sampling(temperature=0.8),
        seeds=3,
        stop_tokens=[tokenizer.eos_id],
        piece_size=4,
    )
    assert values["text"] == tokenizer.decode(expected.tokens[0])
    assert (values["prompt_tokens"], values["new_tokens"], values["position"]) == (len(ids), 8, len(ids) + 8)
    assert values["tokens_per_second"] > 0 and values["prefill_tokens_per_second"] > 0
    assert values["state_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(expected.state))
    assert f"state {values['state_bytes']:,} bytes after 18 tokens" in streamed.err


def test_a_document_is_read_once_and_questioned(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    document, state = tmp_path / "document.txt", tmp_path / "state"
    document.write_text(PROMPT + " ☃")
    assert call(run, f"--prompt-file={document}", "--max-new-tokens=0", f"--save-state={state}") == 0
    capsys.readouterr()
    for question in ("a", "b"):
        assert call(run, f"--load-state={state}", f"--prompt={question}", "--json") == 0
        asked = json.loads(capsys.readouterr().out)
        assert call(run, f"--prompt={PROMPT} ☃{question}", "--json") == 0
        whole = json.loads(capsys.readouterr().out)
        assert asked["text"] == whole["text"] and asked["position"] == whole["position"]
        assert asked["prompt_tokens"] == 1


def test_saved_conversations_go_on_where_they_stopped(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert call(run, "--json", f"--save-state={tmp_path / 's'}", "--state-dtype=int8") == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert call(run, "--json", f"--load-state={tmp_path / 's'}") == 0
    rest = json.loads(capsys.readouterr().out)
    assert rest["prefill_tokens_per_second"] is None
    assert call(run, f"--prompt={PROMPT}", "--json", "--max-new-tokens=16", "--state-dtype=int8") == 0
    whole = json.loads(capsys.readouterr().out)
    assert first["text"] + rest["text"] == whole["text"] or "\ufffd" in first["text"] + rest["text"]
    assert whole["position"] == rest["position"]


def test_interactive_lines_are_one_conversation(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo two\n"))
    assert call(run, "--interactive", "--repetition-penalty=1.2") == 0
    printed = capsys.readouterr()
    assert printed.err.count("> ") == 3 and printed.err.count("state ") == 2
    assert "5 tokens read" in printed.err and "8 tokens read" in printed.err
    assert f"after {5 + 8 + 8 + 8} tokens" in printed.err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--prompt=a", "--temperature=-1"], "--temperature is -1.0; it must be zero or positive"),
        (["--prompt=a", "--top-p=2"], "--top-p is 2.0"),
        (["--prompt=a", "--top-k=400"], "--top-k is 400; the tokenizer has 258 ids"),
        (["--prompt=a", "--max-new-tokens=-1"], "--max-new-tokens is -1; it must be at least 0"),
        (["--prompt=a", "--max-new-tokens=0"], "only reads; give --save-state"),
        (["--prompt=a", "--max-new-tokens=x"], "invalid int value: 'x'"),
        (["--prompt=a", "--seed=4294967296"], "--seed is 4294967296"),
        (["--prompt=a", "--nonsense=1"], "unrecognized arguments: --nonsense=1"),
        (["--prompt=a", "--interactive"], "not allowed with argument"),
        (["--interactive", "--json"], "does not go with --interactive"),
        (["--prompt=a", "--state-dtype=int2"], "invalid choice: 'int2'"),
        (["--prompt=a", "--step=7"], "has no checkpoint of step 7; there are: 3"),
        (["--prompt=a", "--tokenizer=/absent"], "the tokenizer of .* cannot be loaded"),
        (["--prompt=a", "--load-state=/absent"], "/absent cannot be read: No such file"),
        (["--prompt=a", "--save-state=/absent/state"], "--save-state: /absent/state: No such file"),
        (["--prompt-file=/absent"], "--prompt-file: /absent: No such file"),
    ],
)
def test_bad_requests_get_one_line(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert call(run, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("eval.generate: ")
    assert "Traceback" not in printed.err
    assert re.search(message, printed.err)


def test_bad_files_and_runs_get_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "does not exist" in refused(capsys, tmp_path / "absent", "--prompt=a")
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused(capsys, run, f"--prompt-file={tmp_path / 'text'}")
    assert "is no state file" in refused(capsys, run, "--prompt=a", f"--load-state={tmp_path / 'text'}")
    write_run(tmp_path / "random", data={"source": "random", "paths": []})
    assert "without a tokenizer; give --tokenizer" in refused(capsys, tmp_path / "random", "--prompt=a")


def test_a_full_cache_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path / "run", preset="attention")
    said = refused(capsys, tmp_path / "run", "--prompt=abcdefgh", "--cache-length=12")
    assert "the attention cache is full: it has 12 slots" in said and "--cache-length sets it" in said


def test_dtypes_are_those_of_the_library() -> None:
    choices = next(a.choices for a in generate.parser()._actions if a.dest == "state_dtype")
    assert tuple(choices) == STATE_DTYPES


@pytest.mark.slow
def test_the_process_streams_utf8_and_survives_a_reader_that_leaves(run: Path) -> None:
    command = [sys.executable, "-m", "eval.generate", f"--run={run}", "--prompt=☃", *FEW]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout.decode().endswith("\n") and b"Traceback" not in done.stderr
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=300) == 0 and b"Traceback" not in process.stderr.read()
    help_text = subprocess.run([*command[:3], "--help"], capture_output=True, timeout=60)
    assert help_text.returncode == 0 and b"--save-state" in help_text.stdout
