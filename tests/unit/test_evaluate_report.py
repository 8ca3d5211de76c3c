"""The whole comparison on tiny runs: schema, failures, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.artifact import UserError, open_artifact
from evaluate import compare, footprint, run
from evaluate.__main__ import main
from evaluate.args import parse_evaluate
from evaluate.contenders import Contender, find_contenders
from evaluate.report.figures import FORMATS, Figures, resolved
from evaluate.report.module_map import module_map
from evaluate.report.page import html_page
from evaluate.report.schema import SCHEMA_FILE, problems
from tests.evaluate_runs import (
    TEXT,
    all_ranks,
    brief_ceilings,
    brief_footprint,
    export_run,
    write_run,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
BRIEF = (
    "--quick --shots 0,2 --windows 6 --window 64 --queries 12 --prompt-lengths 8,32 "
    "--batch-sizes 1,2 --rounds 3 --threads 1"
).split()


def shorten(setattr_: Callable[..., None]) -> None:
    setattr_(compare, "measure_footprint", brief_footprint)
    setattr_(compare, "measure_ceilings", brief_ceilings)


@pytest.fixture(scope="module")
def base(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """half (with an fp32 engine), quarter, half-svd and lora below one folder."""
    base, teacher = tmp_path_factory.mktemp("report"), tiny_dir("llama")
    (base / "text.txt").write_text(TEXT)
    data = str(base / "text.txt")
    write_run(base / "half", teacher, ranks=all_ranks(teacher, 16), data=data)
    removed = {"model.layers.1.self_attn.q_proj": 0, "model.layers.2.mlp.down_proj": 0}
    quarter = {**all_ranks(teacher, 8), **removed}
    write_run(base / "quarter", teacher, ranks=quarter, data=data)
    ranks = all_ranks(teacher, 16)
    write_run(base / "half-svd", teacher, method="svd", ranks=ranks, data=data, noise=0.01)
    write_run(base / "lora", teacher, method="lora", noise=0.01, data=data)
    export_run(base / "half")
    return base


@pytest.fixture(scope="module")
def report_dir(base: Path) -> Iterator[Path]:
    """The report of all four runs."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch.setattr)
        names = [str(base / name) for name in ("half", "quarter", "half-svd", "lora")]
        assert main(["--run", *names, *BRIEF]) == 0
    yield base / "report"


@pytest.fixture(scope="module")
def report(report_dir: Path) -> dict[str, Any]:
    return dict(json.loads((report_dir / "report.json").read_text()))


def test_the_report_is_a_sealed_artefact_with_three_pages(report_dir: Path) -> None:
    manifest = open_artifact(report_dir, "report")
    assert set(manifest["files"]) == {"report.json", "report.md", "report.html"}
    assert manifest["parent"] and manifest["measured"]["contenders"] == 7


def test_every_contender_went_through_every_stage(report: dict[str, Any]) -> None:
    ids = [c["id"] for c in report["contenders"]]
    assert ids == [
        "dense/pytorch-fp32", "dense/engine-ort-fp32-cpu", "lora/pytorch-fp32",
        "half/pytorch-fp32", "half/engine-ort-fp32-cpu", "quarter/pytorch-fp32",
        "half-svd/pytorch-fp32",
    ]  # fmt: skip
    for contender in report["contenders"]:
        stages = ("perplexity", "probes", "footprint", "latency")
        assert all(contender[stage] for stage in stages), contender["id"]
        assert len(contender["latency"]) == 6
    assert {r["stack"] for r in report["modules"]["rows"]} == {"dense", "half", "quarter",
                                                              "half-svd"}  # fmt: skip
    assert not report["failures"] and report["reference"] == "dense/pytorch-fp32"
    assert {p["baseline"] for p in report["comparisons"]} == {
        "lora/pytorch-fp32", "half-svd/pytorch-fp32",
    }  # fmt: skip


def test_pytorch_and_engine_agree_and_the_dense_original_is_its_own_reference(
    report: dict[str, Any],
) -> None:
    by_id = {c["id"]: c for c in report["contenders"]}
    for run_name in ("half", "dense"):
        plain = by_id[f"{run_name}/pytorch-fp32"]
        engine = by_id[f"{run_name}/engine-ort-fp32-cpu"]
        assert engine["perplexity"]["perplexity"] == pytest.approx(
            plain["perplexity"]["perplexity"], rel=1e-4
        )
    dense = by_id["dense/pytorch-fp32"]
    assert dense["perplexity"]["ratio_to_dense"] == 1
    assert dense["perplexity"]["kl_nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert dense["probes"]["retention"]["retention"] in (1, None)
    assert set(dense["probes"]["by_shots"]) == {"0", "2"} and dense["probes"]["control"]
    assert set(by_id["half/engine-ort-fp32-cpu"]["probes"]["by_shots"]) == {"2"}


def test_the_schema_is_kept_and_notices_what_is_wrong(report: dict[str, Any]) -> None:
    assert problems(report) == []
    for change, part in (
        ({"notes": None}, "report.notes is NoneType"),
        ({"schema": 2}, "report.schema is 2"),
        ({"extra": 1}, "report.extra is not in the schema"),
    ):
        assert any(part in found for found in problems({**report, **change})), part
    broken = json.loads(json.dumps(report))
    del broken["contenders"][1]["latency"][0]["median_ms"]
    broken["contenders"][0]["probes"]["by_shots"]["2"]["mean_hits_at_1"] = float("nan")
    assert len(problems(broken)) == 2


def test_every_field_of_the_schema_is_described() -> None:
    def undescribed(node: Any, path: str) -> Iterator[str]:
        for name, field in node.get("properties", {}).items():
            if "description" not in field and "$ref" not in field:
                yield f"{path}.{name}"
            yield from undescribed(field, f"{path}.{name}")

    schema = json.loads(SCHEMA_FILE.read_text())
    tree = [("report", schema), *schema["$defs"].items()]
    assert [found for name, node in tree for found in undescribed(node, name)] == []


def test_finished_scores_are_found_again_and_broken_contenders_are_reported(
    base: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second run opens nothing for quality; one contender crashes, one engine is damaged."""
    shorten(monkeypatch.setattr)
    copied = Path(shutil.copytree(base, tmp_path / "runs"))
    engine = copied / "half" / "engine-ort" / "fp32-cpu" / "model.onnx"
    engine.write_bytes(engine.read_bytes()[:-1])
    opened: list[str] = []
    real_open = compare.open_contender

    def failing_open(contender: Any, threads: int) -> Any:
        opened.append(contender.id)
        if contender.run == "quarter":
            raise MemoryError("no room")
        return real_open(contender, threads)

    monkeypatch.setattr(compare, "open_contender", failing_open)
    names = [str(copied / name) for name in ("half", "quarter", "lora")]
    out = tmp_path / "out"
    text = ["--text", str(copied / "text.txt")]
    assert main(["--run", *names, *BRIEF, *text, "--out", str(out)]) == 1
    first = json.loads((out / "report.json").read_text())
    failures = {f["id"]: f for f in first["failures"]}
    assert set(failures) == {"half/engine-ort/fp32-cpu", "quarter/pytorch-fp32"}
    assert failures["quarter/pytorch-fp32"]["message"] == "MemoryError: no room"
    assert "model.onnx" in failures["half/engine-ort/fp32-cpu"]["message"]
    page = (out / "report.html").read_text()
    assert "Failed:" in page and "no room" in page
    measured = [c["id"] for c in first["contenders"] if c["perplexity"]]
    assert "lora/pytorch-fp32" in measured and "half/pytorch-fp32" in measured
    opened.clear()
    assert main(["--run", *names, *BRIEF, *text, "--out", str(out)]) == 1
    assert opened.count("lora/pytorch-fp32") == 1, "for timing only"


def test_a_contender_whose_process_dies_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineup = find_contenders([str(base / "lora")])
    monkeypatch.setattr(footprint, "PROMPT_TOKENS", 16)
    figures = footprint.measure_footprint(lineup.contenders[0], 1)
    assert 0 < figures["load_s"] < figures["first_answer_s"]
    assert figures["peak_memory_bytes"] > figures["model_memory_bytes"] > 0
    (broken,) = [
        Contender(**{**vars(c), "engine": "ort", "directory": base / "nowhere"})
        for c in lineup.contenders
    ]
    with pytest.raises(footprint.ContenderCrashed, match="nowhere"):
        footprint.measure_footprint(broken, 1)


def test_figures_of_different_power_modes_are_not_reported(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch.setattr)
    modes = iter(["15W", "MAXN"])
    monkeypatch.setattr(compare, "power_state", lambda: {"nvpmodel": next(modes)})
    flags = ["--run", str(base / "lora"), *BRIEF]
    comparison = compare.compare(parse_evaluate(flags))
    assert not comparison.latency and comparison.quality
    assert any("15W" in note and "MAXN" in note for note in comparison.notes)


@pytest.mark.parametrize(
    "case", ["empty text", "no request", "odd request", "split apart", "bad probes"]
)
def test_bad_input_is_refused_in_one_line(
    base: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, expected = ["--run", str(base / "half")], ""
    if case == "empty text":
        (tmp_path / "empty.txt").write_text(" \n")
        flags += ["--text", str(tmp_path / "empty.txt")]
        expected = "holds no text"
    elif case == "no request":
        shutil.copytree(base / "half" / "student", tmp_path / "bare" / "student")
        flags, expected = ["--run", str(tmp_path / "bare")], "give --text FILE"
    elif case == "odd request":
        other = Path(shutil.copytree(base / "lora", tmp_path / "lora"))
        (other / "request.json").write_text('{"tokens": 1}')
        flags, expected = ["--run", str(other)], "is not a run's request"
    elif case == "split apart":
        other = Path(shutil.copytree(base / "lora", tmp_path / "lora"))
        request = json.loads((other / "request.json").read_text())
        (other / "request.json").write_text(json.dumps({**request, "seed": 7}))
        flags += [str(other)]
        expected = "--seed 7"
    else:
        (tmp_path / "task.json").write_text('[\n{"input": "a"}\n]')
        flags += ["--probes", str(tmp_path)]
        expected = "task.json line 2"
    assert main([*flags, *BRIEF]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and expected in error


def test_nothing_measured_is_an_error_not_an_empty_report(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shorten(monkeypatch.setattr)

    def never(contender: Any, threads: int) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(compare, "open_contender", never)
    copied = Path(shutil.copytree(base / "lora", tmp_path / "lora"))
    flags = ["--run", str(copied), "--text", str(base / "text.txt"), *BRIEF]
    with pytest.raises(UserError, match="no such kernel"):
        run.evaluate(parse_evaluate(flags), flags)
    assert not (copied / "report").exists()


def test_the_module_map_has_a_colour_and_a_figure_for_every_action() -> None:
    actions = {  # (action, neurons or rank, share of the dense MACs) -> (colour, text)
        ("keep", 64, 1.0): ("#0072B2", "keep"),
        ("narrow", 96, 0.75): ("rgb(104,188,235)", "96"),
        ("narrow", 32, 0.25): ("rgb(155,210,242)", "32"),
        ("approximate", 8, 0.25): ("rgb(242,200,104)", "8"),
        ("remove", 0, 0.0): ("#ffffff", "·"),
    }
    decisions = [
        {
            "module": f"model.layers.{layer}.mlp.up_proj", "action": action, "rank": rank,
            "macs": int(share * 128 * 64), "out_features": 128, "in_features": 64,
        }
        for layer, (action, rank, share) in enumerate(actions)
    ]  # fmt: skip
    picture = module_map(Figures({"plans": {"half": {"decisions": decisions}}}), "half")
    colours = re.findall(r'<rect [^>]*fill="([^"]+)"', picture)
    cells = re.findall(r'class="cell"[^>]*>(?:<tspan[^>]*>)?([^<]+)<', picture)
    assert list(zip(colours, cells, strict=True)) == list(actions.values())


class Page(HTMLParser):
    """Figures with their pointers, marks with their places, and digits that belong to neither."""

    VOID = ("meta", "link", "br", "circle", "line", "rect", "polygon", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[tuple[str, str, str]] = []
        self.marks: list[dict[str, str]] = []
        self.scatters: list[dict[str, str]] = []
        self.loose: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        if "data-x-low" in values:
            self.scatters.append(values)
        if "data-x-path" in values or "data-mark-path" in values:
            self.marks.append({**values, "plot": str(len(self.scatters) - 1)})
        if tag not in self.VOID:
            self._open.append((tag, values))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = [values for _, values in self._open]
        bound = next((v for v in reversed(inside) if "data-path" in v), None)
        if bound is not None:
            self.figures.append((bound["data-path"], bound["data-format"], data))
        elif re.search(r"\d", data) and not self._excused():
            self.loose.append(data.strip())

    def _excused(self) -> bool:
        fixed = any("fixed" in v.get("class", "").split() for _, v in self._open)
        return fixed or any(t in ("style", "title", "h2") for t, _ in self._open)


def shown_as(text: str, style: str) -> tuple[float, float]:
    """The number that a text shows, in the figure's own unit, and how far rounding may be off."""
    scale, places, unit = FORMATS[style] if style != "budget" else (1.0, 12, "")
    assert text.endswith(unit), (text, unit)
    number = text.removesuffix(unit).replace(",", "")
    return float(number) / scale, 0.5000001 * 10.0**-places / scale


def wrong_figures(page: Page, report: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Figures of the page that are not the report's."""
    wrong = []
    for path, style, text in page.figures:
        value = resolved(report, path)
        if isinstance(value, str):
            same = value == text
        else:
            number, slack = shown_as(text, style)
            same = abs(number - value) <= slack + 1e-6 * abs(value)
        if not same:
            wrong.append((path, text, value))
    return wrong


def misplaced_marks(page: Page, report: dict[str, Any]) -> list[dict[str, str]]:
    """Marks that do not stand where their figure says, by the axes' own ends."""
    import math

    wrong = []
    for mark in page.marks:
        if "data-mark-path" in mark:
            expected = 150 + resolved(report, mark["data-mark-path"]) * (620 - 150)
            same = abs(float(mark["data-mark-x"]) - expected) < 0.01
        else:
            axes = page.scatters[int(mark["plot"])]
            x_low, x_high, y_low, y_high = (
                float(axes[f"data-{axis}-{end}"]) for axis in "xy" for end in ("low", "high")
            )
            y_scale = math.log if axes["data-y-log"] == "true" else float
            x, y = (resolved(report, mark[f"data-{axis}-path"]) for axis in "xy")
            right = (math.log(x / x_low)) / math.log(x_high / x_low)
            up = (y_scale(y) - y_scale(y_low)) / (y_scale(y_high) - y_scale(y_low))
            same = abs(float(mark["data-x"]) - (56 + right * 370)) < 0.01
            same = same and abs(float(mark["data-y"]) - (286 - up * 272)) < 0.01
        if not same:
            wrong.append(mark)
    return wrong


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    return page


def browse(page: Path, folder: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary")
def test_no_number_in_the_rendered_page_differs_from_the_json(
    report_dir: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    page = parsed(browse(report_dir / "report.html", tmp_path, "--dump-dom"))
    assert len(page.figures) > 400 and len(page.scatters) == 6 and len(page.marks) > 90
    assert wrong_figures(page, report) == []
    assert misplaced_marks(page, report) == []
    assert page.loose == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary")
@pytest.mark.parametrize(("width", "medium"), [(390, "screen"), (1200, "screen"), (718, "print")])
def test_the_page_is_drawn_on_a_phone_on_a_desk_and_on_paper(
    report_dir: Path, tmp_path: Path, width: int, medium: str
) -> None:
    """Nothing but tables, which scroll on their own, is wider than the window; on paper (A4 with
    its margins is 718 pixels wide) nothing scrolls, so tables must fit too."""
    picture = tmp_path / "page.png"
    html = (report_dir / "report.html").read_text()
    if medium == "print":
        html = html.replace("@media print", "@media screen")
    script = (
        "<script>addEventListener('load',()=>{document.documentElement.dataset.wide="
        "document.documentElement.scrollWidth+'/'+innerWidth})</script></body>"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(html.replace("</body>", script))
    dom = browse(probe, tmp_path, f"--window-size={width},900", "--dump-dom")
    wide = re.search(r'data-wide="(\d+)/(\d+)"', dom)
    assert wide and int(wide[1]) <= int(wide[2]), wide
    browse(probe, tmp_path, f"--window-size={width},2400", f"--screenshot={picture}")
    image = Image.open(picture).convert("RGB")
    assert image.width >= width and len(image.getcolors(1 << 24) or []) > 50


def test_the_page_needs_no_network_and_no_script(report_dir: Path) -> None:
    html = (report_dir / "report.html").read_text()
    assert not re.search(r"<script|<link|<img|@import|url\(|\bsrc=|https?://(?!www\.w3\.org)", html)
    assert "viewport" in html and "@media print" in html


@pytest.mark.parametrize("fault", ["figure", "mark", "loose digits", "other report"])
def test_the_check_notices_a_page_that_lies(
    report_dir: Path, report: dict[str, Any], fault: str
) -> None:
    html = (report_dir / "report.html").read_text()
    if fault == "figure":
        html = re.sub(r'(data-format="f1">)[\d.]+', r"\g<1>12345.6", html, count=1)
    elif fault == "mark":
        html = re.sub(r' data-x="[\d.]+"', ' data-x="99.00"', html, count=1)
    elif fault == "loose digits":
        html = html.replace("</h1>", "</h1><p>17 times faster</p>")
    else:
        report = json.loads(json.dumps(report))
        report["contenders"][2]["perplexity"]["perplexity"] += 1
    page = parsed(html)
    assert wrong_figures(page, report) or misplaced_marks(page, report) or page.loose


def test_the_page_of_a_report_without_engines_times_or_probes_is_written(
    report: dict[str, Any],
) -> None:
    bare = json.loads(json.dumps(report))
    bare["modules"], bare["ceilings"] = None, {}
    bare["comparisons"], bare["verdict"] = [], []
    for contender in bare["contenders"]:
        contender["latency"] = contender["probes"] = contender["footprint"] = None
    page = parsed(html_page(bare))
    assert wrong_figures(page, bare) == [] and page.loose == []
