"""Batches depend on seed, step and global batch only; every record comes once an epoch."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from train.corpus.dataset import Dataset, Document, Mixture, Record, segments_to_record
from train.corpus.python_source import split_of
from train.corpus.tokenizers import ByteTokenizer, describe_tokenizer
from train.data import DataError, make_loader, python_source

LENGTH = 8


class Numbers:
    """A data set whose record i is filled with ``first + i``."""

    vocab_size = 258
    context_length = LENGTH
    tokenizer_sha256 = describe_tokenizer(ByteTokenizer())["sha256"]

    def __init__(self, records: int, first: int = 0) -> None:
        self.records, self.first = records, first
        self.fingerprint = f"numbers {records} {first}"

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, index: int) -> Record:
        tokens = np.full(LENGTH, self.first + index, np.int32)
        return segments_to_record(tokens, np.zeros(1, np.int64), LENGTH)

    def documents(self, split: str | None = None, *, min_tokens: int = 1) -> Iterator[Document]:
        return iter(())


def digest(batch: Record) -> str:
    joined = b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))
    return hashlib.sha256(joined).hexdigest()


def first_tokens(data: Dataset | Mixture, steps: int, size: int, **options: object) -> list[int]:
    loader = make_loader(data, seed=3, global_batch_size=size, num_threads=0, **options)
    return [int(token) for batch in itertools.islice(loader, steps) for token in batch["tokens"][:, 0]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    root = tmp_path_factory.mktemp("python")
    for number in range(40):
        (root / f"file{number}.py").write_text(f"# {number}\n" * (number + 1))
    real = python_source(LENGTH, root=root)
    return Mixture((real, Numbers(5)), (2.5, 1))


def test_hosts_threads_and_restarts_change_nothing(data: Mixture) -> None:
    size, steps = 8, 12
    loader = make_loader(data, seed=7, global_batch_size=size, num_threads=0)
    wanted = [digest(batch) for batch in itertools.islice(loader, steps)]
    assert len(set(wanted)) == steps
    starts = [0, *np.random.default_rng(0).integers(1, steps - 2, 2).tolist()]
    for hosts, threads, start in itertools.product((1, 2, 4), (0, 1, 2), starts):
        loaders = [
            make_loader(
                data,
                seed=7,
                global_batch_size=size,
                start_step=start,
                rows=range(host * size // hosts, (host + 1) * size // hosts),
                num_threads=threads,
            )
            for host in range(hosts)
        ]
        for step in range(start, start + 2):
            assert {loader.step for loader in loaders} == {step}
            parts = [next(loader) for loader in loaders]
            assert all(part["tokens"].shape == (size // hosts, LENGTH) for part in parts)
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            assert digest(whole) == wanted[step], (hosts, threads, start, step)
        for loader in loaders:
            loader.close()


def test_seed_and_batch_size_do_matter(data: Mixture) -> None:
    def first(seed: int, size: int) -> str:
        return digest(next(make_loader(data, seed=seed, global_batch_size=size, num_threads=0)))

    assert len({first(7, 8), first(8, 8), first(7, 4)}) == 3


@pytest.mark.parametrize("size", [5, 4])
def test_every_record_once_an_epoch(size: int) -> None:
    records = 20
    tokens = first_tokens(Numbers(records), 3 * records // size, size)
    epochs = [tokens[k : k + records] for k in range(0, len(tokens), records)]
    assert all(sorted(epoch) == list(range(records)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(records))


def test_an_epoch_may_end_inside_a_batch() -> None:
    tokens = first_tokens(Numbers(7), 7, 3)
    assert [sorted(tokens[k : k + 7]) for k in (0, 7, 14)] == [list(range(7))] * 3


def test_order_is_kept_without_shuffling() -> None:
    assert first_tokens(Numbers(6), 4, 3, shuffle=False) == [*range(6), *range(6)]


def test_mixtures_follow_their_weights_and_epochs() -> None:
    mixture = Mixture((Numbers(10), Numbers(30, first=100)), (3, 1))
    tokens = first_tokens(mixture, 40, 4)
    small, large = [t for t in tokens if t < 100], [t for t in tokens if t >= 100]
    assert (len(small), len(large)) == (120, 40)
    assert all(sorted(small[k : k + 10]) == list(range(10)) for k in range(0, 120, 10))
    assert sorted(large[:30]) == list(range(100, 130))
    for begin in range(0, 160, 16):
        assert sum(t >= 100 for t in tokens[begin : begin + 16]) == 4


def test_starting_late_costs_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    numbers = Numbers(1000)
    read = Numbers.__getitem__
    monkeypatch.setattr(Numbers, "__getitem__", lambda self, index: reads.append(index) or read(self, index))
    loader = make_loader(numbers, seed=0, global_batch_size=4, start_step=10**12, num_threads=0)
    next(loader)
    assert len(reads) == 4


def test_batches_are_ready_ahead_but_few() -> None:
    """The prefetch buffer holds some batches, not hundreds."""
    import threading

    reads = 0
    lock = threading.Lock()

    class Counted(Numbers):
        def __getitem__(self, index: int) -> Record:
            nonlocal reads
            with lock:
                reads += 1
            return super().__getitem__(index)

    loader = make_loader(Counted(1000), seed=0, global_batch_size=1, num_threads=2)
    next(loader)
    deadline = 200
    while reads < 3 and deadline:
        threading.Event().wait(0.01)
        deadline -= 1
    threading.Event().wait(0.1)
    assert 3 <= reads <= 16
    loader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"global_batch_size": 0}, "global_batch_size is 0; it must be positive"),
        ({"rows": [0, 2]}, r"rows are \(0, 2\); they must be some in \[0, global_batch_size=2\)"),
        ({"rows": []}, r"rows are \(\); they must be some in"),
        ({"start_step": -1}, "start_step is -1"),
        ({"num_threads": -1}, "num_threads is -1"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(Numbers(4), **{"seed": 0, "global_batch_size": 2, **options})


def test_no_records() -> None:
    with pytest.raises(DataError, match="has no record"):
        make_loader(Numbers(0), seed=0, global_batch_size=2)


@pytest.mark.parametrize(
    ("datasets", "weights", "message"),
    [
        ((), (), "at least one"),
        ((Numbers(1),), (1, 2), "1 datasets but 2 weights"),
        ((Numbers(1),), (0,), "weight 0 must be a positive"),
        ((Numbers(1),), (float("nan"),), "weight nan must be a positive"),
        (
            (Numbers(1), type("Wide", (Numbers,), {"vocab_size": 5})(1)),
            (1, 1),
            r"differ in vocab_size: \[5, 258\]",
        ),
    ],
)
def test_wrong_mixtures(datasets: tuple, weights: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Mixture(datasets, weights)


def test_mixture_fingerprints_tell_apart() -> None:
    parts = (Numbers(1), Numbers(2))
    prints = {Mixture(parts, w).fingerprint for w in ((1, 1), (1, 2))} | {
        Mixture(parts[::-1], (1, 1)).fingerprint
    }
    assert len(prints) == 3


def test_python_source_holds_every_byte(tmp_path: Path) -> None:
    contents = {f"a/file{n}.py": f"x = {n}\n".encode() * (n % 9) for n in range(80)}
    contents["raw.py"] = bytes(range(256))
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("third party")
    for split in ("train", "heldout"):
        wanted = [(n, c) for n, c in sorted(contents.items()) if c and split_of(n) == split]
        dataset = python_source(LENGTH, split, root=tmp_path)
        assert [(d.name, d.raw) for d in dataset.documents()] == wanted
        records = [dataset[index] for index in range(len(dataset))]
        stream = np.concatenate([r["tokens"][r["segment_ids"] > 0] for r in records])
        assert stream.tolist() == [t for _, c in wanted for t in (256, *c, 257)]
        for record in records:
            starts = record["positions"] == 0
            borders = np.diff(record["segment_ids"], prepend=0) == 1
            assert (starts[record["segment_ids"] > 0] == borders[record["segment_ids"] > 0]).all()
            assert (record["tokens"][borders][1:] == 256).all()
        assert (
            sum(len(d.raw or b"") for d in dataset.documents("train" if split == "heldout" else "heldout"))
            > 0
        )
    before = python_source(LENGTH, root=tmp_path).fingerprint
    assert python_source(LENGTH, "heldout", root=tmp_path).fingerprint != before


def test_python_source_splits_by_path() -> None:
    splits = [split_of(f"package/module{number}.py") for number in range(4000)]
    assert 0.04 < splits.count("heldout") / len(splits) < 0.06


def test_python_source_of_this_python() -> None:
    dataset = python_source(1024, "heldout")
    assert isinstance(dataset, Dataset)
    assert dataset.vocab_size == 258
    assert len(dataset) > 200


def test_wrong_python_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split is 'test'"):
        python_source(8, "test", root=tmp_path)
    with pytest.raises(ValueError, match="context_length is 1"):
        python_source(1, root=tmp_path)
    with pytest.raises(DataError, match=r"no .py file of split 'train'"):
        python_source(8, root=tmp_path)
