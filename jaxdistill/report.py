"""python -m jaxdistill.report WORKDIR: the table on the terminal, and report.html and curves.png in the workdir.

report.html is one self-contained page: no server, no network.
"""

import base64
import html
import io
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxdistill import UserError, command
from jaxdistill.diagnosis import plots

NAMES = {"bits_per_byte": "bits/byte", "teacher_kl": "KL to teacher", "top1_agreement": "top-1 agr.", "top5_agreement": "top-5 agr.",
         "sa_accuracy": "SA alone", "glca_accuracy": "GLCA alone", "rank1": "rank 1", "reranked_mAP": "re-ranked mAP"}
BRIEF = ("bits_per_byte", "teacher_kl", "top1_agreement", "projector_nll", "accuracy", "sa_accuracy", "glca_accuracy", "mAP", "rank1",
         "reranked_mAP")  # for the terminal; the page has all
FIXED = ("name", "seed", "best", "validation", "steps", "skipped", "seconds", "stop", "parameters")  # of a row; the rest are metrics


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        raise UserError("usage: python -m jaxdistill.report WORKDIR")
    workdir = Path(argv[1])
    results = read(workdir)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(_table(results))
    for line in differences(results):
        console.print(line, markup=False, soft_wrap=True)
    page, picture = write(workdir, results)
    console.print(f"\npicture {picture}\nreport  {page}", markup=False, soft_wrap=True)
    return 0


def read(workdir: Path) -> dict:
    results = _json(workdir / "results.json", "the workdir of a job with a finished run")
    if not isinstance(results, dict) or not results.get("rows"):
        raise UserError(f"{workdir / 'results.json'}: found no rows; accepted: the workdir of a job with a finished run")
    return results


def cells(results: dict, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """The headline table: a header and a row a run, seeds averaged. brief: what fits a terminal."""
    metric = results["metric"]
    metrics = [metric] + [name for row in results["rows"] for name in row if name not in FIXED and name != metric]
    metrics = [name for name in dict.fromkeys(metrics) if name == metric or not brief or name in BRIEF]
    header = ["run", *(NAMES.get(name, name) for name in metrics), "at the best step", "parameters", "updates", "seconds"]
    body = []
    for name in dict.fromkeys(row["name"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["name"] == name]
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        values = [_show(mean([float(row[m]) for row in rows])) if m in rows[0] else "" for m in metrics]
        label = name if len(rows) == 1 else f"{name} (mean of {len(rows)})"
        best = _show(mean([float(row["best"].get(metric, "nan")) for row in rows]))
        body.append([label, *values, f"{best} ({mean([row['best']['step'] for row in rows]):.0f})", f"{rows[0]['parameters']:,}",
                     f"{mean([row['steps'] for row in rows]):.0f}", f"{mean([row['seconds'] for row in rows]):.1f}"])
    return header, body


def differences(results: dict) -> list[str]:
    """The paired comparisons, a sentence each."""
    unit = NAMES.get(results["metric"], results["metric"])
    said = []
    for pair in results["paired"]:
        better = (pair["mean"] < 0) == results["minimize"]
        other = pair["b"] + (" at its best validation step" if pair["b_parameters"] == "best" else "")
        low_high = pair["interval"]
        sure = f"95 % interval {low_high[0]:+.3f} to {low_high[1]:+.3f} over {pair['n']} seeds" if low_high else "one seed: no interval"
        said.append(f"{pair['a']} is {'better' if better else 'worse'} than {other} by {abs(pair['mean']):.3f} {unit} ({sure})"
                    + (f", {pair['retention']:.0%} of the way to the teacher" if better and pair.get("retention", 0) > 0 else ""))
    return said


def write(workdir: Path, results: dict) -> tuple[Path, Path]:
    """report.html and curves.png."""
    place = {f"{row['name']}-{row['seed']}": index for index, row in enumerate(results["rows"])}  # then the one that is running
    folders = sorted((workdir / "runs").glob("*-*"), key=lambda folder: place.get(folder.name, len(place)))
    records = {folder.name: _lines(folder / "metrics.jsonl") for folder in folders}
    monitor = f"validation/{results['metric']}"
    label = NAMES.get(results["metric"], results["metric"])
    levels = {f"{row['name']}-{row['seed']}": row["validation"][monitor] for row in results["rows"]
              if row["steps"] == 0 and monitor in row["validation"]}
    curves = _png(plots.validation(records, monitor, label, levels))
    trained = {run: lines for run, lines in records.items() if any("terms" in line for line in lines)}
    drawn = [path.read_bytes() for folder in folders for path in sorted(folder.glob("figures/*.png"))]
    pictures = [curves, *drawn] + [_png(draw(run, lines)) for run, lines in trained.items() for draw in (plots.terms, plots.schedules)]
    picture, page = workdir / "curves.png", workdir / "report.html"
    picture.write_bytes(curves)
    page.write_text(_page(workdir, results, pictures))
    return page, picture


def _page(workdir: Path, results: dict, pictures: list[bytes]) -> str:
    header, body = cells(results)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    said = "".join(f"<li>{html.escape(line)}</li>" for line in differences(results))
    images = "".join(f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">' for png in pictures)
    manifests = [_json(path, "the file as it was written") for path in sorted((workdir / "runs").glob("*/manifest.json"))]
    command_line = "python -m jaxdistill.main " + shlex.join(manifests[-1]["command"][1:]) if manifests else ""
    versions = ", ".join(f"{name} {version}" for name, version in (manifests[-1]["packages"] if manifests else {}).items() if version)
    device = manifests[-1]["device"] if manifests else {}
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>jaxdistill: {html.escape(workdir.resolve().name)}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem;color:#1c2833}}
div.wide{{overflow-x:auto}} table{{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}}
th,td{{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #d8dee4}} th:first-child,td:first-child{{text-align:left}}
img{{max-width:100%;display:block;margin:1rem 0}} small{{color:#5b6770}}</style></head><body>
<h1>{html.escape(workdir.resolve().name)}</h1>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
<p>Metrics are of the test split; {html.escape(_better(results))}.
At the best step: the same metric of the checkpoint (update) that was best on validation.</p><ul>{said}</ul>{images}
<h2>How it was run</h2><p><code>{html.escape(command_line)}</code></p>
<p><small>{html.escape(versions)}; {html.escape(json.dumps(device))}</small></p></body></html>
"""


def _table(results: dict) -> Table:
    header, body = cells(results, brief=True)
    table = Table(title=f"test split, {_better(results)}", title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    for row in body:
        table.add_row(*row)
    return table


def _better(results: dict) -> str:
    return f"{'lower' if results['minimize'] else 'higher'} {NAMES.get(results['metric'], results['metric'])} is better"


def _show(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except ValueError as error:
        raise UserError(f"{path}: found a line that is not JSON ({error}); accepted: the file as it was written") from None


def _json(path: Path, accepted: str):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or f'not JSON ({error})'}; accepted: {accepted}") from None


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def cli() -> None:
    command(lambda: main(sys.argv))


if __name__ == "__main__":
    cli()
