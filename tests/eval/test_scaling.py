"""Scaling cases: what is on each number of devices, what is refused."""

import jax
import numpy as np
import pytest

from eval import scaling
from eval.common import UsageError, freeze, load_config
from eval.scaling_cases import counts, parse_case
from eval.scaling_links import fit_link
from eval.speed_parts.models import Size
from eval.speed_parts.profile import exposed, gaps


def test_cases_are_parsed_and_divided():
    case = parse_case("seq@64 rows=2 remat=full")
    assert (case.axis, case.length, case.rows, case.strong, case.remat) == ("seq", 64, 2, 0, "full")
    assert [case.shape(n, 4) for n in (1, 2, 4)] == [(2, 16), (2, 32), (2, 64)]
    assert [case._replace(strong=1).shape(n, 4) for n in (1, 4)] == [(2, 64), (2, 64)]
    rows = parse_case("fsdp@64 rows=8")
    assert [rows.shape(n, 4) for n in (1, 4)] == [(8, 64), (32, 64)]
    assert [rows._replace(strong=1).shape(n, 4) for n in (1, 4)] == [(8, 64), (8, 64)]
    assert [counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert [counts(n, 0) for n in (1, 4)] == [[1], [1, 4]]
    with pytest.raises(UsageError, match="rows 8 must be a multiple of 3 devices"):
        rows._replace(strong=1).shape(3, 3)
    chosen = parse_case("fsdp@64 transport=copies reshard_after_forward=0 joined=64").exchange
    assert (chosen.transport, chosen.reshard_after_forward, chosen.reduce_dtype) == (
        "copies",
        False,
        "float32",
    )
    for text, message in (
        ("time@64", "with a mesh axis"),
        ("seq@64 length=2", "unknown key 'length'"),
        ("seq@64 overlap=3", "overlap 3; it must be 0 or 1"),
        ("fsdp@64 transport=post", "transport is 'post'; it must be collectives or copies"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_case(text)


def test_collectives_are_exposed_where_nothing_else_runs():
    spans = [
        ("gemm", 0, 10),
        ("ncclDevKernel_AllGather", 5, 20),
        ("ncclDevKernel_AllReduce", 15, 10),
        ("norm", 22, 1),
    ]
    events = [{"name": name, "ts": begin, "dur": duration} for name, begin, duration in spans]
    assert exposed(events) == (11, 20, 14)
    assert exposed(events[:1]) == (10, 0, 0)
    assert exposed([{"name": "MemcpyP2P", "ts": 0, "dur": 3}]) == (0, 3, 3)


def test_gaps_are_named_by_what_is_around_them():
    spans = [("gemm.1", 0, 10), ("norm", 4, 2), ("copy", 10, 1), ("norm.7", 13, 1)]
    events = [{"name": name, "ts": begin, "dur": duration} for name, begin, duration in spans]
    assert gaps(events) == [("copy > norm", 2)]


def test_a_link_is_fitted():
    sent = np.array([2.0**k for k in (10, 20, 26, 29)])
    fixed, rate = fit_link(sent, 4e-5 + sent / 250e9)
    np.testing.assert_allclose((fixed, rate), (4e-5, 250e9), rtol=1e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize("text", ["data@16 rows=2", "seq@16 rows=2", "seq@16 rows=2 strong=1"])
def test_several_devices_do_what_one_does(text: str):
    """Weak cases repeat the rows of one device, along ``seq`` as segments, so that the losses are equal."""
    plans = [scaling.make_plan(parse_case(text), Size(1, 64, 32), n, 2) for n in (1, 2)]
    batches = [jax.device_get(plan.batch(0, 32)) for plan in plans]
    assert [b["tokens"].shape[1:] for b in batches] == [(p.rows, p.length) for p in plans]
    one, two = (b["tokens"][0] for b in batches)
    axis = 1 if text.startswith("seq") else 0
    want = one if "strong" in text else np.concatenate([one, one], axis=axis)
    np.testing.assert_array_equal(two, want)
    assert set(batches[1]["segment_ids"].ravel()) == ({1, 2} if text == "seq@16 rows=2" else {1})
    start = plans[1].start(0)
    assert start.params["head"]["weight"].sharding == plans[1].steps.shardings.params["head"]["weight"]


def test_every_setting_is_valid():
    for variant in ("full", "quick"):
        freeze(scaling.Settings, load_config("scaling", variant))
    with pytest.raises(ValueError, match="options names 'fast'"):
        freeze(scaling.Settings, {**load_config("scaling", "quick").to_dict(), "options": ("fast",)})
