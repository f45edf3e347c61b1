"""The report: one HTML page that holds all it shows. No server, no network, no script."""

import base64
import functools
import html
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from jaxdistill.diagnosis import headline, plots, svg
from jaxdistill.diagnosis.curves import Chart, align, lines, small
from jaxdistill.diagnosis.finding import SEVERITIES, Finding
from jaxdistill.diagnosis.page_style import CSS
from jaxdistill.diagnosis.records import Job, Run
from jaxdistill.diagnosis.run_charts import charts

FEW = 12  # rows of a table that need not be unfolded
MANIFESTS = 300_000  # characters of them all
TIGHT = 20_000  # bytes that no run's charts fit in: they need not be drawn to be left out
LARGEST = 1_900_000  # bytes of a page: what comes after is named and left out


class Shown(NamedTuple):
    """A job on the page. title: as no other is called. findings: the likeliest root cause first."""

    title: str
    job: Job
    findings: Sequence[Finding]

    @property
    def metric(self) -> str:
        return self.job.results.get("metric") or str(self.job.config.get("monitor", "")).partition("/")[2]

    @property
    def first(self) -> Run | None:
        """The run that the job is about, of its first seed; where it has not begun, the last that has."""
        trained = [run for run in self.job.runs.values() if len(run.steps)]
        named = [run for run in trained if run.name == self.job.config.get("headline")]
        return named[0] if named else trained[-1] if trained else None


def page(jobs: Sequence[Shown], unlike: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
    """The whole page. unlike: of several jobs the config keys in which they differ, with the value of each."""
    title = " · ".join(one.title for one in jobs)
    top = [f"<h1>{_text(title)}</h1>", *(_standing(one, len(jobs) > 1) for one in jobs), "<h2>Findings</h2>",
           *(_findings(one, len(jobs) > 1) for one in jobs), "<h2>Results</h2>", *_results(jobs, unlike)]
    last = ["<h2>How it was run</h2>", *(_origin(one, len(jobs) > 1) for one in jobs)]
    room = LARGEST - len(CSS) - sum(len(part.encode()) for part in (*top, *last))
    body = "\n".join([*top, *_within(room, _runs(jobs)), *last])
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
            f'<title>jaxdistill: {_text(title)}</title></head><body><main class="jaxdistill"><style>{CSS}</style>\n{body}\n'
            "</main></body></html>\n")


def _within(room: int, parts: Iterator[tuple[str, Callable[[], list[str]]]]) -> Iterator[str]:
    """Of each part, (name, a function that gives its HTML, also in shorter forms), the longest that there is room for; then the names of
    those cut or left out."""
    cut = []
    for name, draw in parts:
        forms = draw() if room > TIGHT else []
        fitting = [form for form in forms if len(form.encode()) <= room]
        if not forms or fitting != forms:
            cut.append(name)
        if fitting:
            room -= len(fitting[0].encode())
            yield fitting[0]
    if cut:
        yield f'<p class="quiet">Left out in whole or in part, for the size of the page: {_text(", ".join(cut))}.</p>'


def _standing(one: Shown, several: bool) -> str:
    """How far the job is; nothing where it is finished."""
    planned = [f"{name}-{seed}" for seed in one.job.config.get("seeds", ()) for name in one.job.config.get("runs", ())]
    begun = [f"{run.id} at update {run.steps[-1] if len(run.steps) else 0} of {run.get('train.steps', 0)}"
             for run in one.job.runs.values() if run.row is None]
    finished = [run for run in one.job.runs.values() if run.row]
    if not begun and finished and planned and any(run.id == planned[-1] for run in finished):
        return ""
    said = f"{len(finished)} finished run{'s' * (len(finished) != 1)}" + (f"; {', '.join(begun)}" if begun else "")
    return f"<p>{_text(one.title + ': ') if several else ''}{_text(said)}.</p>"


def _findings(one: Shown, several: bool) -> str:
    """A card a fault, with the evidence of each run that shows it; notes folded."""
    together: dict[tuple[str, str], list[Finding]] = {}
    for finding in one.findings:
        together.setdefault((finding.severity, finding.name), []).append(finding)
    cards = dict.fromkeys(SEVERITIES, "")
    for (severity, name), found in together.items():
        first = found[0]
        told = [f"{finding.run}: {finding.evidence}" if finding.run else finding.evidence for finding in found[:FEW]]
        told += [f"... and in {', '.join(finding.run for finding in found[FEW:])}"] if len(found) > FEW else []
        words = "".join(f"<p>{_text(line)}</p>" for line in told)
        words += f"<p><b>Cause:</b> {_text(first.cause)}</p><p><b>Cure:</b> {_flags(first.cure)}</p>"
        words += f"<p><b>See:</b> <code>{_text(first.study)}</code></p>" if first.study else ""
        cards[severity] += (f'<div class="finding" style="--of:var(--{severity})"><p><b class="severity">{severity}</b> '
                            f"<b>{_text(name)}</b></p>{words}</div>")
    notes = sum(severity == "note" for severity, _ in together)
    title = f"<h3>{_text(one.title)}</h3>" if several else ""
    judged = "Nothing is found to be wrong." if one.first else "There is nothing to judge yet."
    none = "" if cards["error"] or cards["warning"] else f"<p>{judged}</p>"
    less = f"<details><summary>{notes} note{'s' * (notes != 1)}</summary>{cards['note']}</details>" if notes else ""
    return f"{title}{none}{cards['error']}{cards['warning']}{less}"


def _flags(cure: str) -> str:
    """The text, with the command-line flags in it as such."""
    parts = re.split(r"""(--[\w.]+=(?:'[^']*'|"[^"]*"|[^\s,;)]+))""", cure)
    return "".join(f"<code><span>{_text(part)}</span></code>" if i % 2 else _text(part) for i, part in enumerate(parts))


def _results(jobs: Sequence[Shown], unlike: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    if len(jobs) > 1:
        yield _side_by_side(jobs)
        if unlike:
            table = _table(["key", *(one.title for one in jobs)], [[key, *values] for key, values in unlike], "value")
            opened = " open" if len(unlike) <= FEW else ""
            yield f"<details{opened}><summary>{len(unlike)} config keys differ</summary>{table}</details>"
    for one in jobs:
        title = f"<h3>{_text(one.title)}</h3>" if len(jobs) > 1 else ""
        if not one.job.rows:
            yield f"{title}<p>No run is finished yet.</p>"
            continue
        said = "".join(f"<li>{_text(line)}</li>" for line in headline.differences(one.job.results))
        seeds = " ±: half of the 95 % interval of the mean over seeds." if len({row["seed"] for row in one.job.rows}) > 1 else ""
        yield (f"{title}{_table(*headline.cells(one.job.results))}<p>Metrics are of the test split; "
               f"{_text(headline.better(one.job.results))}.{seeds} At the best step: the same metric of the checkpoint (update) that was "
               f"best on validation.</p><ul>{said}</ul>")
    found = {one.title: one.first.evaluation(f"validation/{one.metric}") for one in jobs if one.first}
    drawn = [chart for one in jobs if (chart := _validation(one, len(jobs) > 1))]
    if len({one.metric for one in jobs}) == 1 and len(found) > 1 and all(map(len, found.values())):
        drawn.insert(0, lines(f"{headline.label(jobs[0].metric)} on the validation split", found, "the first run of each"))
    if drawn:
        yield f'<div class="charts">{"".join(map(_figure, drawn))}</div>'


def _side_by_side(jobs: Sequence[Shown]) -> str:
    """A row a run that any of the jobs has, a column a job: the headline metric."""
    names = dict.fromkeys(row["name"] for one in jobs for row in one.job.rows)
    bodies = [headline.cells(one.job.results)[1] if one.job.rows else [] for one in jobs]
    columns = [{row[0].split(" (mean of ")[0]: row[1] for row in body} for body in bodies]
    heads = [f"{one.title}: {headline.label(one.metric)}" for one in jobs]
    return _table(["run", *heads], [[name, *(column.get(name, "") for column in columns)] for name in names]) if names else ""


def validation(one: Shown, axis) -> str:
    """Draws the monitored metric of all runs over the updates, of those that did not train as a level; says where the runs end ('' where
    nothing was evaluated)."""
    monitor = f"validation/{one.metric}"
    found = {run.id: run.evaluation(monitor) for run in one.job.runs.values() if len(run.evaluation(monitor))}
    levels = {f"{row['name']}-{row['seed']}": float(row["validation"][monitor]) for row in one.job.rows
              if row["steps"] == 0 and monitor in row["validation"]}
    if found:
        plots.validation(axis, found, levels)
    return "; ".join(f"{run} ends at {series.values[-1]:.4g}" for run, series in found.items())


def _validation(one: Shown, several: bool) -> Chart | None:
    figure, axis = small(2.6)
    ends, name = validation(one, axis), headline.label(one.metric)
    title = f"{name} on the validation split"
    return Chart(title, one.title if several else "", f"{title}: {ends}", figure) if ends else None


def _runs(jobs: Sequence[Shown]) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """(name, its HTML) of the charts: of several jobs the first runs beside each other; then all others, each to be unfolded."""
    firsts = [one for one in jobs if one.first]
    if firsts:
        yield "title", lambda: ["<h2>Runs</h2>"]
    if len(firsts) > 1:
        yield "side by side", lambda: [_beside(firsts, pictures) for pictures in (True, False)]
    for one in jobs:
        runs = [run for run in one.job.runs.values() if len(run.steps) and (len(jobs) == 1 or run is not one.first)]
        seeds = {run.id: [other.id for other in runs if other.name == run.name].index(run.id) for run in runs}
        for run in sorted(runs, key=lambda run: (run is not one.first, seeds[run.id])):  # other seeds last: there may be no room for them
            label = f"{one.title}: {run.id}" if len(jobs) > 1 else run.id
            yield label, functools.partial(_run, one.job, run, label, run is one.first)


def _beside(firsts: Sequence[Shown], pictures: bool) -> str:
    """Each chart of the jobs' first runs, for all jobs."""
    drawn = [{chart.title: chart._replace(note=f"{one.title}, {one.first.id}") for chart in charts(one.first)} for one in firsts]
    rows = [[each[title] for each in drawn if title in each] for title in dict.fromkeys(title for each in drawn for title in each)]
    for row in rows:
        align(row)
    return ("".join(f'<div class="charts">{"".join(map(_figure, row))}</div>' for row in rows)
            + (_pictures([(f"{one.title}, ", one.job, one.first) for one in firsts]) if pictures else ""))


def _run(job: Job, run: Run, label: str, opened: bool) -> list[str]:
    """Everything about a run; and without its pictures."""
    head = f"<details{' open' * opened}><summary>{_text(label)}</summary>"
    body = f'<div class="charts">{"".join(map(_figure, charts(run)))}</div>'
    return [f"{head}{body}{pictures}{_probes(run)}</details>" for pictures in dict.fromkeys((_pictures([("", job, run)]), ""))]


def _pictures(runs: Sequence[tuple[str, Job, Run]]) -> str:
    """What the recipe drew of the runs. runs: (what their names begin with here, job, run)."""
    found = ""
    for prefix, job, run in runs:
        for path in sorted((job.workdir / "runs" / run.id / "figures").glob("*.png")):
            label = _text(f"{prefix}{run.id}: {path.stem}")
            source = base64.b64encode(_smaller(path.read_bytes())).decode()
            found += (f'<figure class="picture"><figcaption>{label}</figcaption><div class="wide">'
                      f'<img alt="{label}" src="data:image/png;base64,{source}"></div></figure>')
    return f'<div class="pictures">{found}</div>' if found else ""


def _smaller(png: bytes) -> bytes:
    """The picture with a palette of 256 colours, where that is smaller."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return min(png, buffer.getvalue(), key=len)


def _figure(chart: Chart) -> str:
    note = f' <span class="quiet">{_text(chart.note)}</span>' if chart.note else ""
    return (f"<figure><figcaption><b>{_text(chart.title)}</b>{note}</figcaption>{svg.inline(chart.figure, chart.alt)}"
            f"{svg.legend(chart.figure)}</figure>")


def _probes(run: Run) -> str:
    """Every probe in numbers: what has no chart of its own is here."""
    found = {name: run.probe(name).values for name in run.probes if len(run.probe(name))}
    if not found:
        return ""
    body = [[name, *(f"{value:.4g}" for value in (values[0], values[-1], values.min(), values.max()))] for name, values in found.items()]
    return f"<details><summary>Probes</summary>{_table(['probe', 'first', 'last', 'least', 'most'], body)}</details>"


def _origin(one: Shown, several: bool) -> str:
    """The command, and each run's manifest but for its list of parameters."""
    manifests = {run.id: run.manifest for run in one.job.runs.values() if run.manifest}
    title = f"<h3>{_text(one.title)}</h3>" if several else ""
    if not manifests:
        return f"{title}<p>No run has begun.</p>"
    last = list(manifests.values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last.get("packages", {}).items() if version)
    share = MANIFESTS // len(manifests)
    folded = "".join(f"<details><summary>manifest of {_text(name)}</summary><pre>{_text(_json(manifest, share))}</pre></details>"
                     for name, manifest in manifests.items())
    words = ["python -m jaxdistill.main", *map(_quoted, last.get("command", [""])[1:])]
    made = f"{versions}; {json.dumps(last.get('device', {}))}; revision {last.get('git')}"
    return (f"{title}<p><code>{' '.join(f'<span>{_text(word)}</span>' for word in words)}</code></p><p><small>{_text(made)}</small></p>"
            f"{folded}")


def _quoted(word: str) -> str:
    """A word of a command line for a shell; in the quotes that are easier to read."""
    return f'"{word}"' if "'" in word and not set('"$`\\!') & set(word) else shlex.quote(word)


def _json(manifest: dict, most: int) -> str:
    text = json.dumps({name: value for name, value in manifest.items() if name != "parameters"}, indent=1, ensure_ascii=False)
    return text if len(text) <= most else text[:most] + "\n..."


def _table(header: Sequence[str], body: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    cell = f'<td class="{kind}">' if kind else "<td>"
    breaking = lambda value: _text(value).replace(".", ".<wbr>") if kind else _text(value)  # noqa: E731
    rows = "".join("<tr>" + "".join(f"{cell}{breaking(value)}</td>" for value in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _text(value: str) -> str:
    return html.escape(value)
