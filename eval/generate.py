"""Text from a trained run: reads a prompt of any length in constant memory and continues it.

    python -m eval.generate --run=runs/quickstart --prompt="def "
    python -m eval.generate --run=RUN --prompt-file=book.txt --max-new-tokens=0 --save-state=book.state
    python -m eval.generate --run=RUN --load-state=book.state --prompt="Who did it? "
    python -m eval.generate --run=RUN --interactive

The text goes to standard output as it is generated, everything else to standard error. ``--json`` prints one
object instead. Exit code 0: done; 1: the model's numbers are not finite; 2: the request cannot be carried
out, with one line that says why; 130: interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_CACHE_MULTIPLE = 64


class RequestError(Exception):
    """The request cannot be carried out. The message is complete in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (--help lists the options)")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = _Parser(
        prog="eval.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--run", required=True, help="run directory, or RUN/checkpoints/STEP")
    add("--step", type=int, help="checkpoint to load; the newest by default")
    add("--tokenizer", default="", help="file, directory or 'bytes'; the run's own by default")
    source = options.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue; standard input if no prompt is given")
    source.add_argument("--prompt-file", help="UTF-8 file with the text to continue; - is standard input")
    source.add_argument("--interactive", action="store_true", help="read lines and continue each")
    add("--max-new-tokens", type=int, default=256, help="0 only reads")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    add("--top-k", type=int, default=0, help="0 for all")
    add("--top-p", type=float, default=1.0)
    add("--min-p", type=float, default=0.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--state-dtype", default="float32", choices=("float32", "bfloat16", "int8", "int4"))
    add("--cache-length", type=int, default=0, help="tokens that attention layers can hold")
    add("--load-state", help="file to go on from")
    add("--save-state", help="file for the state after everything")
    add("--json", action="store_true", help="print one object instead of the text")
    add("--block-size", type=int, default=16, help="tokens between outputs")
    add("--piece-size", type=int, default=1024, help="tokens read at one time")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    try:
        return _run(parser().parse_args(arguments))
    except RequestError as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has left; a last flush would only complain
        return 0
    except KeyboardInterrupt:
        return 130


def _fail(text: str, code: int) -> int:
    print(f"eval.generate: {' '.join(text.split())}", file=sys.stderr)
    return code


def _run(options: argparse.Namespace) -> int:
    _check_counts(options)
    text = None if options.interactive else _prompt(options)
    # After the options: a wrong one is answered without waiting for imports.
    from holo_jax.generate import CacheFullError
    from holo_jax.state_io import StateError

    try:
        conversation = _open(options)
        if options.interactive:
            _interact(options, conversation)
        else:
            _answer(options, conversation, text)
        if options.save_state:
            _save(options, conversation)
    except (CacheFullError, StateError) as error:
        hint = "; --cache-length sets it" if isinstance(error, CacheFullError) else ""
        raise RequestError(f"{error}{hint}") from error
    return 0


def _check_counts(options: argparse.Namespace) -> None:
    least = {"max_new_tokens": 0, "cache_length": 0, "block_size": 1, "piece_size": 1, "seed": 0}
    for name, low in least.items():
        if getattr(options, name) < low:
            flag = name.replace("_", "-")
            raise RequestError(f"--{flag} is {getattr(options, name)}; it must be at least {low}")
    if options.interactive and options.json:
        raise RequestError("--json prints one object; it does not go with --interactive")
    if options.seed >= 2**32:
        raise RequestError(f"--seed is {options.seed}; it must be below 2^32")
    if options.max_new_tokens == 0 and not options.save_state:
        raise RequestError("--max-new-tokens=0 only reads; give --save-state=FILE to keep what was read")


def _prompt(options: argparse.Namespace) -> str | None:
    """The prompt's text; None to go on from a loaded state without one."""
    if options.prompt is not None:
        return options.prompt
    if options.prompt_file not in (None, "-"):
        try:
            return Path(options.prompt_file).read_bytes().decode()
        except OSError as error:
            raise RequestError(f"--prompt-file: {options.prompt_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RequestError(f"--prompt-file: {options.prompt_file} is not UTF-8: {error}") from error
    if options.prompt_file is None and (sys.stdin is None or sys.stdin.isatty()):
        if options.load_state:
            return None
        raise RequestError(
            "there is no prompt; give --prompt, --prompt-file, --interactive or standard input"
        )
    try:
        return sys.stdin.buffer.read().decode() or (None if options.load_state else "")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8: {error}") from error


def _open(options: argparse.Namespace):
    from eval.conversation import Conversation
    from holo_jax.generate import Sampling
    from holo_jax.pretrained import PretrainedError, load_pretrained
    from holo_jax.state_io import load_state

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    try:
        sampling = Sampling(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise RequestError(f"--{str(error).replace('_', '-', 1)}") from error
    try:
        loaded = load_pretrained(options.run, step=options.step, tokenizer=options.tokenizer)
    except (ImportError, PretrainedError) as error:
        raise RequestError(str(error)) from error
    if loaded.tokenizer is None:
        raise RequestError(f"{options.run} was trained on data without a tokenizer; give --tokenizer")
    ids, known = loaded.tokenizer.vocab_size, loaded.config.vocab_size
    if ids > known:
        raise RequestError(f"the tokenizer has {ids} ids; the model of {options.run} only {known}")
    if sampling.top_k > ids:
        raise RequestError(f"--top-k is {sampling.top_k}; the tokenizer has {ids} ids")
    sizes = dict(block_size=options.block_size, piece_size=options.piece_size)
    conversation = Conversation(loaded, sampling=sampling, seed=options.seed, **sizes)
    if options.load_state:
        try:
            conversation.resume(load_state(options.load_state, loaded.config, weights=loaded.weights))
        except ValueError as error:
            raise RequestError(f"--load-state: {error}") from error
    return conversation


def _begin(options: argparse.Namespace, conversation, length: int) -> None:
    if options.load_state:
        return
    needed = length + options.max_new_tokens
    room = options.cache_length or -(-needed // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    try:
        conversation.begin(cache_length=room, state_dtype=options.state_dtype)
    except ValueError as error:  # int4 needs an even head_dim
        raise RequestError(str(error)) from error


def _answer(options: argparse.Namespace, conversation, text: str | None) -> None:
    ids = [] if text is None else conversation.encode(text)
    _begin(options, conversation, len(ids))
    if ids:
        conversation.read(ids)
    elif conversation.saved.logits is None:
        raise RequestError("the prompt is empty, and there is nothing before it that could be continued")
    spoken = None
    if options.max_new_tokens:
        spoken = conversation.speak(options.max_new_tokens, _ignore if options.json else _write)
    _report(options, conversation, spoken)


def _interact(options: argparse.Namespace, conversation) -> None:
    """Each line (with its line break) is read and continued, until the end of input."""
    _begin(options, conversation, options.cache_length or 4096)
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            print(file=sys.stderr)
            return
        conversation.read(conversation.encode(line))
        try:
            spoken = conversation.speak(options.max_new_tokens, _write)
        except KeyboardInterrupt:
            print("\n[interrupted; what was just said is forgotten]", file=sys.stderr)
            continue
        _report(options, conversation, spoken)


def _report(options: argparse.Namespace, conversation, spoken) -> None:
    said, read = _rate(spoken and spoken.tokens, spoken and spoken.seconds), conversation.read_tokens
    reading = _rate(read, conversation.read_seconds)
    if options.json:
        values = {
            "text": spoken.text if spoken else "",
            "tokens_per_second": said,
            "prefill_tokens_per_second": reading,
            "state_bytes": conversation.state_bytes,
            "prompt_tokens": read,
            "new_tokens": spoken.tokens if spoken else 0,
            "stopped": spoken.stopped if spoken else False,
            "position": conversation.position,
            "run": str(options.run),
            "step": conversation.loaded.step,
            "seed": options.seed,
        }
        print(json.dumps(values))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    parts = [f"{read:,} tokens read" + (f" at {reading:,.0f}/s" if reading else "")]
    if spoken:
        parts.append(f"{spoken.tokens:,} generated" + (f" at {said:,.1f}/s" if said else ""))
    parts.append(f"state {conversation.state_bytes:,} bytes after {conversation.position:,} tokens")
    print(f"[{'; '.join(parts)}]", file=sys.stderr)


def _rate(count: int | None, seconds: float | None) -> float | None:
    return count / seconds if count and seconds else None


def _save(options: argparse.Namespace, conversation) -> None:
    from holo_jax.state_io import save_state

    state, logits = conversation.saved
    try:
        save_state(
            options.save_state,
            state,
            conversation.loaded.config,
            logits=logits,
            weights=conversation.loaded.weights,
        )
    except OSError as error:
        raise RequestError(f"--save-state: {options.save_state}: {error.strerror}") from error


def _ignore(text: str) -> None:
    del text


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
