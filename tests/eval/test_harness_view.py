"""What the harness found, drawn: needs no harness."""

import dataclasses

from eval import harness_view
from eval.registry import view_of
from eval.results import Value
from tests.eval.test_quick import GOOD


def test_a_panel_a_metric_and_a_row_a_task() -> None:
    def value(metric: str, task: str, chosen: str, number: float, spread: float = 0.0) -> Value:
        where = {"model": "run", "task": task, "filter": chosen}
        kind = "normal" if spread else "exact"
        return Value(metric, where, number, number - spread, number + spread, 4, kind)

    values = (
        value("acc", "one", "none", 0.5, 0.25),
        value("acc", "two", "strict", 1.0),
        value("bits", "three", "none", 2.0),
    )
    drawn = dataclasses.replace(GOOD, evaluation="harness", values=values)
    assert view_of("harness") is harness_view
    (figure,) = harness_view.figures(drawn, "dark").values()
    first, second = figure.axes
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["acc", "bits"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["one, n = 4", "two (strict), n = 4"]
    assert first.get_ylim() == (1.5, -0.5) and first.containers[0].lines[0].get_xdata() == [0.5]
    assert harness_view.table(drawn).count("\n") == 1 + len(values)
