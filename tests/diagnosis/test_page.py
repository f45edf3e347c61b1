"""The report: it shows what the records hold and nothing else, as one page, of any state of a job and of several jobs."""

import io
import json
import re
import shlex
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdistill import report
from jaxdistill.diagnosis import curves, headline, page, plots, records, run_charts, svg
from jaxdistill.diagnosis.finding import Finding
from jaxdistill.diagnosis.page import Shown
from jaxdistill.diagnosis.records import Series
from tests import workdirs

PROBES = {"entropy": 1.0, "spread": 0.5, "teacher_kl": 0.2, "correct": 0.4, "logit_std": 1.5, "w_sa": 0.1, "router/load_0": 0.75,
          "router/load_1": 0.25, "router/entropy": 0.6, "own_probe": 7.0}  # fmt: skip
DEEP = {"step": 8, "deep": {"terms": {"kd": {"grad_norm": 3.0, "share": 0.75}, "lm": {"grad_norm": 1.0, "share": 0.25}},
                            "cosines": {"kd|lm": -0.2}}}  # fmt: skip
ALWAYS = {"loss ledger", "raw terms", "loss", "weights", "learning rate", "gradient norm", "update / parameter", "parameter norm"}
PROBED = {"entropy and spread of predictions", "shares", "sizes of logits and inputs", "learned loss weights w", "router load", "router",
          "gradient of each term", "angle between gradients"}  # fmt: skip


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """Four runs, two of two seeds; every kind of record."""
    workdir = tmp_path_factory.mktemp("page") / "job"
    lines = {("kd", 0): [*workdirs.lines(probes=PROBES), DEEP]}  # the others have only what every run has
    rows = [workdirs.run(workdir, name, seed, {"nll": nll + 0.1 * seed}, lines=lines.get((name, seed), workdirs.lines()))
            for name, nll in (("ce_only", 1.4), ("kd", 1.2)) for seed in (0, 1)]
    for seed in (0, 1):
        folder = workdir / f"runs/kd-{seed}/figures"
        folder.mkdir()
        (folder / "rollout.png").write_bytes(picture())
    return workdirs.job(workdir, rows, seeds=(0, 1))


@pytest.fixture(scope="module")
def text(job) -> str:
    return html(job)


def html(*workdirs: Path, findings=(), unlike=()) -> str:
    return page.page([Shown(workdir.name, records.read(workdir), findings) for workdir in workdirs], unlike)


def charts(text: str) -> set[str]:
    return set(re.findall(r"<figcaption><b>([^<]+)</b>", text))


def test_every_section_has_its_records(text):
    assert charts(text) == {"nll on the validation split", "distributions"} | ALWAYS | PROBED
    assert "<td>kd (mean of 2)</td><td>1.250 ± 0.635</td>" in text  # 12.706 * 0.0707 / sqrt(2)
    assert "kd is better than ce_only by 0.200 nll (95 % interval -0.200 to -0.200 over 2 seeds)" in text
    assert text.count('src="data:image/png;base64,') == 2
    assert "<td>own_probe</td><td>7</td>" in text
    assert "<span>python -m jaxdistill.main</span> <span>--config=a.py</span>" in text
    assert text.count("<summary>manifest of ") == 4
    assert "Nothing is found to be wrong." in text
    assert "kd: kd from " not in text
    assert re.search(r'aria-label="loss ledger, stacked, over the updates: kd from \d+% to 100%; lm from \d+% to 0%"', text)


def test_what_has_no_records_is_left_out(tmp_path):
    workdirs.job(tmp_path, [workdirs.run(tmp_path, "kd", 0, {"nll": 1.0}, lines=[workdirs.update(i, 4) for i in (1, 2)])])
    text = html(tmp_path)
    assert charts(text) == ALWAYS
    assert "<img" not in text
    assert "<summary>Probes" not in text


def test_what_the_student_writes_is_shown_where_it_wrote(tmp_path):
    seen = {"log_prob": -2.5, "length": 9.0, "repetition": 0.25, "teacher_kl": 0.1}
    lines = [workdirs.update(i, 4) | ({"sampled": True, "samples": seen} if i % 2 else {"sampled": False}) for i in (1, 2, 3, 4)]
    workdirs.job(tmp_path, [workdirs.run(tmp_path, "kd", 0, {"nll": 1.0}, lines=lines)])
    assert charts(html(tmp_path)) == ALWAYS | {"what the student writes", "repetition"}
    run = records.read(tmp_path).runs["kd-0"]
    assert run.sample("log_prob").steps.tolist() == [1, 3]
    told = {chart.title: chart.alt for chart in run_charts.charts(run)}
    assert "the student's nats from 2.5 to 2.5" in told["what the student writes"]


def test_one_page_of_its_own(text):
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)|xlink", text)
    assert len(text.encode()) < 2e6
    assert text.count("<main") == text.count("</main>") == 1
    selectors = re.findall(r"([^{}]+)\{", re.search(r"<style>(.*?)</style>", text, re.S)[1])
    assert len(selectors) > 20
    assert all("jaxdistill" in one or "prefers-color-scheme" in one for one in selectors)  # in a notebook nothing else changes
    assert text.count("<style") == 1
    for tag in ("svg", "figure", "div", "table", "details", "ul", "g", "p"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_a_floor_without_the_metric_has_empty_cells():
    """No "nan": it was not measured, and nothing is wrong with it."""
    common = {"seed": 0, "steps": 0, "seconds": 0.0, "parameters": 0}
    rows = [{"name": "one_nn", "accuracy": 0.4, "best": {"step": 0, "accuracy": 0.4}, **common},
            {"name": "kaf", "nll": 0.5, "accuracy": 0.8, "best": {"step": 3, "nll": float("nan"), "accuracy": 0.8}, **common}]
    header, body = headline.cells({"metric": "nll", "rows": rows}, brief=True)
    at = header.index("at the best step")
    assert (body[0][1], body[0][at]) == ("", "")
    assert body[1][at] == "nan (3)"  # diverged, and says so


def test_the_headline_run_is_open_and_first(text):
    assert re.findall(r"<details( open)?><summary>((?:kd|ce_only)-\d)</summary>", text) == [
        (" open", "kd-0"), ("", "ce_only-0"), ("", "ce_only-1"), ("", "kd-1")]


def test_what_has_no_room_is_named(job, text, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", len(text.encode()) * 2 // 3)
    text = html(job)
    assert len(text.encode()) < page.LARGEST + 1000
    assert "<details open><summary>kd-0</summary>" in text
    assert re.search(r"Left out in whole or in part, for the size of the page: [^<]*kd-1", text)
    assert "How it was run" in text


def test_a_job_that_runs(tmp_path):
    """No results.json, a line that is being written, a run that has logged nothing."""
    workdirs.run(tmp_path, "ce_only", lines=workdirs.lines()[:5])
    with (tmp_path / "runs/ce_only-0/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    workdirs.run(tmp_path, "kd")
    text = html(workdirs.job(tmp_path, []))
    assert "0 finished runs; ce_only-0 at update 4 of 8, kd-0 at update 0 of 8." in text
    assert "No run is finished yet." in text
    assert charts(text) == ALWAYS | {"nll on the validation split", "distributions"}


def test_a_job_that_has_not_begun(tmp_path):
    text = html(workdirs.job(tmp_path, []))
    assert "0 finished runs." in text
    assert "No run has begun." in text
    assert "There is nothing to judge yet." in text
    assert not charts(text)


def test_words_of_others_are_text(tmp_path):
    bad = "<script>alert('&')</script>"
    update = workdirs.update(1, 4)
    update["terms"] = {f"$x_{bad}": update["terms"]["lm"], "kd": update["terms"]["kd"]}
    update["groups"] = {bad: update["groups"]["student"]}
    workdirs.job(tmp_path, [workdirs.run(tmp_path, "k<d", 0, {"n<ll": 1.0, "nll": 1.0}, lines=[update])], headline="k<d")
    finding = Finding("a<b", "error", f"evidence {bad}", bad, bad, bad, "k<d-0")
    text = html(tmp_path, findings=[finding], unlike=[(bad, [bad])])
    assert "<script" not in text
    assert "$x_&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in text
    assert "<b>a&lt;b</b>" in text
    assert "<h1>" in text
    assert "k<d" not in text


def test_findings(tmp_path):
    job = workdirs.job(tmp_path, [])
    cure = "slower: --config.train.lr=0.1, or (--config.kd.weight='((0.0, 0.5),)')"
    found = [Finding("lr_zero", "error", f"rate 0 ({run})", "the cause", "the cure", "experiments/doctor", run) for run in ("kd-0", "kd-1")]
    found += [Finding("overfitting", "warning", "e", "c", cure), Finding("term_dominates", "note", "e", "c", "c", run="kd-0")]
    text = html(job, findings=found)
    assert "Nothing is found to be wrong." not in text
    assert text.count("<b>lr_zero</b>") == 1
    assert "<p>kd-0: rate 0 (kd-0)</p><p>kd-1: rate 0 (kd-1)</p><p><b>Cause:</b> the cause</p><p><b>Cure:</b> the cure</p>" in text
    assert "<p><b>See:</b> <code>experiments/doctor</code></p>" in text
    assert "<summary>1 note</summary>" in text
    flags = [unescape(flag) for flag in re.findall("<code><span>(--.*?)</span></code>", text)]
    assert flags == ["--config.train.lr=0.1", "--config.kd.weight='((0.0, 0.5),)'"]
    places = [text.index(f"<b>{name}</b>") for name in ("lr_zero", "overfitting", "term_dominates")]
    assert places == sorted(places) < [text.index("<h2>Results")]


def test_several_jobs_side_by_side(tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    rows = [workdirs.run(one, name, 0, {"nll": 1.0}, lines=workdirs.lines()) for name in ("ce_only", "kd")]
    workdirs.job(one, rows)
    rows = [workdirs.run(other, "kd", seed, {"nll": 2.0 + seed / 10}, lines=workdirs.lines()[:6]) for seed in (0, 1)]
    workdirs.job(other, rows, train={"lr": 1.0})
    assert report.main(["report", str(one), str(other)]) == 0
    assert not (one / "report.html").exists()
    text = (one / "comparison.html").read_text()
    assert "<th>one: nll</th><th>other: nll</th>" in text
    assert "<td>ce_only</td><td>1.000</td><td></td>" in text
    assert "<td>kd</td><td>1.000</td><td>2.050 ± 0.635</td>" in text
    assert '<td class="value">train.<wbr>lr</td><td class="value"></td><td class="value">1.<wbr>0</td>' in text
    for title in ALWAYS:
        assert len(re.findall(f"<b>{title}</b>", text)) == 2 + 2  # both first runs, then the others
    assert re.findall(r"<b>loss ledger</b> <span[^>]*>([^<]*)</span>", text)[:2] == ["one, kd-0", "other, kd-0"]
    assert re.search(r'aria-label="nll on the validation split over the updates: one from 1\.02 to 1; other from 1\.02 to 1\.02"', text)
    assert re.findall(r"<summary>(o[^<]*)</summary>", text) == ["one: ce_only-0", "other: kd-1"]
    assert (one / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("test split, lower nll is better") == 2


def test_jobs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a/kd", tmp_path / "b/kd"]
    assert list(report.titles(paths)) == ["a/kd", "b/kd"]
    assert list(report.titles(paths[:1])) == ["kd"]


def test_the_page_may_go_elsewhere(tmp_path):
    job = tmp_path / "job"
    workdirs.run(job, "kd")
    assert report.main(["report", str(workdirs.job(job, [])), f"--out={tmp_path / 'x.html'}"]) == 0
    assert "<main" in (tmp_path / "x.html").read_text()
    assert not (job / "report.html").exists()


def test_the_command_is_one_to_paste(tmp_path):
    workdirs.run(tmp_path, "kd")
    path = tmp_path / "runs/kd-0/manifest.json"
    words = ["--config=a b.py", "--config.runs=('kd',)", "--config.data.path=$HOME/'x'"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": ["main.py", *words]}))
    [line] = re.findall(r"<code>(<span>python.*)</code>", html(workdirs.job(tmp_path, [])))
    line = unescape(re.sub("</?span>", "", line))
    assert shlex.split(line) == ["python", "-m", "jaxdistill.main", *words]
    assert "\"--config.runs=('kd',)\"" in line


def test_the_envelope_keeps_every_extreme():
    values = np.random.default_rng(0).normal(size=10_000)
    values[[77, 5000]] = 50.0, -60.0
    thin = curves.envelope(Series(np.arange(10_000), values))
    assert len(thin.steps) <= 2 * curves.BUCKETS
    assert (thin.values.max(), thin.values.min()) == (50.0, -60.0)
    np.testing.assert_array_equal(values[thin.steps], thin.values)
    assert (np.diff(thin.steps) > 0).all()
    values[4321] = np.nan
    assert 4321 in curves.envelope(Series(np.arange(10_000), values)).steps


def test_lines_of_any_values_are_drawn():
    steps = np.arange(1, 6)
    bad = curves.lines("x", {"a": Series(steps, np.array([1.0, np.nan, np.inf, 2.0, 3.0]))})
    assert "2 updates not finite" in bad.alt
    assert ">not finite</li>" in svg.legend(bad.figure)
    none = curves.lines("x", {"a": Series(steps, np.full(5, np.nan))})
    assert "no finite value" in none.alt
    same = curves.lines("x", {"a": Series(steps, steps / 1.0), "b": Series(steps, steps / 1.0), "c": Series(steps, steps / 2.0)})
    assert ">a, b</li>" in svg.legend(same.figure)
    assert [line.get_color() for line in same.figure.axes[0].lines] == [plots.COLOURS[0], plots.COLOURS[2]]  # c stays the third
    sizes = curves.lines("x", {"a": Series(steps, np.array([0.0, 1e-6, 1e-3, 1.0, 10.0]))}, sizes=True)
    assert sizes.figure.axes[0].get_yscale() == "log"
    assert curves.lines("x", {"a": Series(steps, np.array([0.0, 1e-6, 1e-3, 1.0, 10.0]))}).figure.axes[0].get_yscale() == "linear"
    still = curves.lines("x", {"a": Series(steps, np.full(5, -2.0))})
    assert still.figure.axes[0].get_ylim() == (-4.0, 0.0)
    for chart in (bad, none, same, sizes, still):
        assert svg.inline(chart.figure, chart.alt).endswith("</svg>")


def test_charts_beside_each_other_have_one_axis():
    pair = [curves.lines("x", {"a": Series(np.arange(n), np.linspace(0, top, n))}) for n, top in ((10, 1.0), (5, 4.0))]
    ends = [axis.get_ylim()[1] for axis in (chart.figure.axes[0] for chart in pair)]
    curves.align(pair)
    assert {chart.figure.axes[0].get_ylim()[1] for chart in pair} == {max(ends)}
    assert len({chart.figure.axes[0].get_xlim() for chart in pair}) == 1
    log = curves.lines("x", {"a": Series(np.arange(1, 5), np.array([0.01, 0.1, 1.0, 10.0]))})
    before = log.figure.axes[0].get_ylim()
    curves.align([*pair, log])
    assert log.figure.axes[0].get_ylim() == before


def test_shares_add_up():
    steps = np.arange(1, 1001)
    chart = curves.shares("x", steps, {"a": np.linspace(0, 1, 1000), "b": np.linspace(-1, 0, 1000), "c": np.full(1000, np.nan)})
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in chart.figure.axes[0].collections]
    assert tops[-1] == pytest.approx(1.0)
    assert chart.alt.endswith("a from 0% to 100%; b from 100% to 0%; c from 0% to 0%")
    assert "a from 100% to 100%" in curves.shares("x", steps[:1], {"a": np.ones(1)}).alt


def test_the_plane_is_bounded_by_the_number_of_classes():
    series = Series(np.arange(3), np.array([2.0, 1.0, 0.1])), Series(np.arange(3), np.array([0.0, 0.5, 1.9]))
    axis = curves.plane(*series, np.log(8)).figure.axes[0]
    assert axis.get_xlim()[1] == pytest.approx(1.06 * np.log(8))
    assert curves.plane(*series, None).figure.axes[0].get_xlim()[1] > 2.0


def test_the_colours_follow_the_page(text):
    assert set(plots.COLOURS) | {plots.GREY} <= svg.DARK.keys()
    inside = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert not re.search("|".join(svg.DARK), inside)
    assert set(re.findall(r"var\(--(c[0-9a-f]{6})\)", inside)) <= {f"c{colour[1:]}" for colour in svg.DARK}


def test_numbers_on_axes_are_whole(job):
    """Coordinates are rounded, labels are not."""
    chart = curves.lines("x", {"a": Series(np.arange(2), np.array([0.0011, 0.0012]))})
    assert ">0.00112</text>" in svg.inline(chart.figure, "")


def test_charts_of_a_run_without_updates(tmp_path):
    workdirs.run(tmp_path, "untouched", 0, {"nll": 1.0}, config={"train": {"steps": 0}})
    assert not list(run_charts.charts(records.read_run(tmp_path / "runs/untouched-0")))


def test_with_out_all_is_written_there(job, tmp_path):
    """Also the curves: the workdir may be of someone else."""
    before = sorted(job.rglob("*"))
    other = workdirs.job(tmp_path / "other", [workdirs.run(tmp_path / "other", "kd", 0, {"nll": 1.0}, lines=workdirs.lines())])
    (tmp_path / "out").mkdir()
    assert report.main(["report", str(job), f"--out={tmp_path / 'out/one.html'}"]) == 0
    assert report.main(["report", str(job), str(other), f"--out={tmp_path / 'out/both.html'}"]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"both.html", "both_curves_1.png", "both_curves_2.png", "one.html", "one_curves.png"}
    assert sorted(job.rglob("*")) == before
    assert not (other / "curves.png").exists()
