"""The HTML of a report: plain elements, one style sheet, plots as inline SVG images in two themes."""

import base64
import html
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from eval import plots
from eval.common import cell
from eval.registry import VIEWS, view_of

_LONG = 48  # rows of tables that are folded away under a plot

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2430; --muted: #667085; --line: #e4e7ec;
  --soft: #f6f7f9; --shade: #c3c9d4; --accent: #0072b2; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171d; --ink: #e7e9ee; --muted: #9aa3b2;
  --line: #323844; --soft: #1b1f27; --shade: #39404e; --accent: #6cb6e8; --bad: #f97066; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0; } a { color: var(--accent); }
code { font: .85em ui-monospace, "SF Mono", Menlo, monospace; overflow-wrap: anywhere; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.meta { color: var(--muted); font-size: .88rem; }
.note { border-left: 3px solid var(--accent); background: var(--soft); padding: .45rem .8rem;
  font-size: .92rem; }
.bad { border-left-color: var(--bad); }
.scroll { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: 8px;
  background: linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 1.1rem 100% no-repeat scroll; }
.scroll table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { background: var(--soft); font-weight: 600; } thead th:first-child { background: var(--soft); }
tr:last-child td { border-bottom: 0; }
figure { margin: 1rem 0; overflow-x: auto; } figure img { display: block; max-width: 100%; height: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 48rem) { body { padding: 1rem .9rem 3rem; font-size: 15px; }
  figure img { max-width: none; width: var(--phone); }
  figure.wide::before { content: "wider than the screen: scroll it sideways"; position: sticky; left: 0;
    color: var(--muted); font-size: .8rem; } }
"""


def counted(things: Sequence, name: str) -> str:
    """How many there are, in words."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways inside the page."""
    top = "".join(f"<th scope=col>{html.escape(str(c))}</th>" for c in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def markdown(text: str) -> str:
    """The tables and paragraphs that evaluations write, as HTML; no other Markdown is known."""
    parts = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if len(lines) > 1 and lines[0].startswith("|") and set(lines[1]) <= set("|:- "):
            split = [
                [c.strip().replace("\0", "|") for c in line.replace("\\|", "\0").strip("|").split("|")]
                for line in lines
            ]
            parts.append(table(split[0], split[2:]))
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(parts)


def picture(draw: Callable[[str], Figure], description: str) -> str:
    """A plot in both themes as inline SVG; the browser shows the one that fits the page."""
    sources = {}
    for theme in plots.themes():
        with plots.style(theme):
            figure = draw(theme)
            width = figure.get_size_inches()[0]
            data = base64.b64encode(plots.svg(figure).encode()).decode()
        sources[theme] = f"data:image/svg+xml;base64,{data}"
    # On a phone a wide plot keeps a readable size and scrolls.
    phone = max(340, int(width * 62))
    wide = " class=wide" if phone > 400 else ""
    words = html.escape(description, quote=True)
    return (
        f'<figure{wide}><picture><source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{words}" style="--phone: {phone}px"></picture></figure>'
    )


def loss_figure(runs: Sequence, theme: str) -> Figure:
    """Training and held-out loss of all runs over steps."""
    with plots.style(theme):
        figure, axes = plots.grid(1, 1, size=(9.0, 4.4))
        axis = axes[0, 0]
        for index, run in enumerate(runs):
            colour = plots.PALETTE[index % len(plots.PALETTE)]
            known = [(r["step"], r["loss"]) for r in run.rows if r.get("loss") is not None]
            every = max(1, len(known) // 600)
            axis.plot(*zip(*known[::every], strict=True), color=colour, lw=1.2, alpha=0.75, label=run.name)
            held_out = [(r["step"], r["heldout_loss"]) for r in run.rows if r.get("heldout_loss") is not None]
            if held_out:
                axis.plot(
                    *zip(*held_out, strict=True),
                    color=colour,
                    marker="o",
                    ms=4,
                    ls="--",
                    label=f"{run.name}, held out",
                )
        axis.set(xlabel="step", ylabel="loss in nats per token", title="Loss")
        axis.legend()
        return figure


def page(
    runs: Sequence, evaluations: Sequence, *, differences: Sequence, shared: dict, made: str, command: str
) -> str:
    """The whole document.

    Args:
      runs, evaluations: as ``eval.report.collect`` gives them.
      differences: rows of the table of differing settings.
      shared: rows of numbers that several results have, by evaluation.
      made: time of making.
      command: what made it.
    """
    sections: list[tuple[str, str, str]] = []
    if runs:
        sections.append(("runs", "Training runs", _runs(runs, differences)))
    for kind, rows in shared.items():
        members = [e for e in evaluations if e.results.evaluation == kind]
        sections.append((f"compare-{kind}", f"{kind.capitalize()} side by side", _shared(members, rows)))
    for number, evaluation in enumerate(evaluations):
        title = f"{evaluation.results.evaluation.capitalize()}: {evaluation.name}"
        sections.append((f"eval-{number}", title, _evaluation(evaluation)))
    links = "".join(f'<li><a href="#{key}">{html.escape(title)}</a></li>' for key, title, _ in sections)
    body = "".join(f'<section id="{k}"><h2>{html.escape(t)}</h2>{b}</section>' for k, t, b in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>holo-jax report</title><style>{_STYLE}</style></head><body>"
        f"<h1>holo-jax report</h1><p class=meta>{counted(runs, 'training run')}, "
        f"{counted(evaluations, 'evaluation')}. "
        f"Made {html.escape(made)} by <code>{html.escape(command)}</code></p>"
        f"<nav><ul>{links}</ul></nav>{body}</body></html>\n"
    )


def _runs(runs: Sequence, differences: Sequence) -> str:
    names = [run.name for run in runs]
    parts = []
    facts = list(dict.fromkeys(key for run in runs for key in run.summary))
    if facts:
        rows = [[fact, *(_short(run.summary.get(fact)) for run in runs)] for fact in facts]
        parts.append(table(["", *names], rows))
    if any(row.get("loss") is not None for run in runs for row in run.rows):
        drawn = [run for run in runs if any(row.get("loss") is not None for row in run.rows)]
        parts.append(
            picture(lambda theme: loss_figure(drawn, theme), "Loss over steps of " + ", ".join(names))
        )
    if len(runs) > 1:
        parts.append("<h3>Settings that differ</h3>")
        if differences:
            parts.append(table(["setting", *names], [[name, *values] for name, values in differences]))
        else:
            parts.append("<p>None: the runs have the same configuration.</p>")
    else:
        rows = [[key, _short(value)] for key, value in runs[0].config.items()]
        parts.append(
            f"<details><summary>Configuration</summary>{table(['setting', names[0]], rows)}</details>"
        )
    return "".join(parts)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def _number(value) -> str:
    """A value for a table of mixed metrics: whole numbers and bytes without decimals."""
    if value is not None and value.interval == "exact" and value.value >= 1000:
        return f"{value.value:,.0f}"
    return cell(value)


def _shared(members: Sequence, rows: Sequence) -> str:
    head = ["number", *(member.name for member in members)]
    cells = [[key, *map(_number, values)] for key, values in rows]
    shown, rest = cells[:40], cells[40:]
    more = f"<details><summary>{len(rest)} more</summary>{table(head, rest)}</details>" if rest else ""
    return _unlike(members) + table(head, shown) + more


def _unlike(members: Sequence) -> str:
    """In what the results differ besides their numbers: settings, device, versions."""
    first, *others = (member.results for member in members)
    names = [
        name
        for name in sorted({key for r in (first, *others) for key in r.settings})
        if any(r.settings.get(name) != first.settings.get(name) for r in others)
    ]
    names += [
        name for name in ("device", "versions") if any(vars(r)[name] != vars(first)[name] for r in others)
    ]
    if not names:
        return ""
    return f'<p class="note">These results differ in {html.escape(", ".join(names))}.</p>'


def _commands(joined: str) -> str:
    """The commands behind a result and the end of their paragraph; more than two are folded away."""
    lines = [f"<code>{html.escape(line)}</code>" for line in joined.split(" && ")]
    if len(lines) <= 2:
        return "".join(f"<br>{line}" for line in lines) + "</p>"
    folded = f"<summary>{len(lines)} commands</summary><p>{'<br>'.join(lines)}</p>"
    return f"</p><details class=meta>{folded}</details>"


def _evaluation(evaluation) -> str:
    results = evaluation.results
    device = results.device
    parts = [
        f"<p class=meta>{html.escape(str(device.get('kind')))}, {html.escape(results.started)}, "
        f"{results.seconds:,.0f} s, commit <code>{html.escape(results.commit)}</code>, "
        f"jax {html.escape(str(results.versions.get('jax')))}"
        f"{_commands(results.command)}"
    ]
    for note in results.notes:
        kind = "note bad" if note.startswith(("FAILED", "unfinished")) else "note"
        parts.append(f'<p class="{kind}">{html.escape(note)}</p>')
    if results.evaluation in VIEWS:
        view = view_of(results.evaluation)
        for stem in view.figures(results, "light"):
            draw = lambda theme, stem=stem: view.figures(results, theme)[stem]  # noqa: E731
            parts.append(picture(draw, f"{results.evaluation}: {stem}"))
        tables = markdown(view.table(results))
        rows = tables.count("<tr>")
        if rows > _LONG and any("<figure" in part for part in parts):
            tables = f"<details><summary>Tables, {rows} rows</summary>{tables}</details>"
        parts.append(tables)
    else:
        rows = [
            [v.metric, ", ".join(f"{k} {w}" for k, w in v.where.items()), cell(v)] for v in results.values
        ]
        parts.append(table(["metric", "where", "value"], rows))
    return "".join(parts)
