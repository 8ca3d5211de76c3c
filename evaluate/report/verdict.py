"""What the numbers say in words, and above all when a student is not worth it.

Every sentence is made from figures of the report.
A comparison with a baseline counts only where its paired 95 % interval leaves "equal" out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SPEED_SLACK = 1.02


def verdicts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry a budgeted run (`kind` "worth it", "not worth it", "a trade" or "unknown"), then
    one a paired comparison with a baseline ("better", "worse", "mixed", "no difference shown")."""
    done = [c for c in report["contenders"] if c["perplexity"] is not None]
    runs = dict.fromkeys(c["run"] for c in done if c["group"] == "budgeted")
    entries = [_run_verdict(run, done, report) for run in runs]
    return [*entries, *_baseline_verdicts(report)]


def _run_verdict(
    run: str, done: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> dict[str, Any]:
    """A run is not worth it when each of its contenders that was timed has a dense one that is at
    least as fast and as good. Only engines that the run has too are held against it."""
    mine = [c for c in done if c["run"] == run]
    engines = {c["engine"] for c in mine}
    dense = [
        c
        for c in done
        if c["group"] == "dense" and c["engine"] in engines and speed_of(c) is not None
    ]
    timed = [c for c in mine if speed_of(c) is not None]
    sentences = [_cost(mine[0]), _modules(run, report)]
    undominated = [c for c in timed if not _rivals(c, dense)]
    if not timed or not dense:
        kind, said = "unknown", "Its speed was not measured beside the dense original's."
    elif not undominated:
        lead = fastest(timed)
        kind, said = "not worth it", _dominated(lead, fastest(_rivals(lead, dense)))
    else:
        said, kind = _against_dense(fastest(undominated), dense)
    if kind == "a trade" and _lost_most(mine[0]):
        said += " It has lost more than half of the few-shot accuracy, so the speed buys little."
    sentences.append(said)
    text = " ".join(s for s in sentences if s)
    return {"about": run, "kind": kind, "text": text, "conclusion": said}


def _rivals(
    student: Mapping[str, Any], dense: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    return [d for d in dense if _dominates(d, student)]


def _cost(contender: Mapping[str, Any]) -> str:
    perplexity, probes = contender["perplexity"], contender["probes"]
    text = (
        f"{contender['run']} spends {contender['macs_fraction']:.1%} of the dense target MACs; "
        f"its perplexity is {perplexity['perplexity']:.1f}"
    )
    if perplexity.get("ratio_to_dense") is not None:
        text += f", {perplexity['ratio_to_dense']:.2f} times the dense original's"
    kept = probes and probes.get("retention")
    if kept and kept["retention"] is not None:
        shots = probes["headline_shots"]
        text += f"; of the {shots}-shot accuracy it keeps {kept['retention']:.0%}"
        if kept["worst_task"]:
            worst = kept["tasks"][kept["worst_task"]]["retention"]
            text += f" ({worst:.0%} in its worst task, {kept['worst_task']})"
    return text + "."


def _modules(run: str, report: Mapping[str, Any]) -> str:
    rows = (report.get("modules") or {}).get("rows", [])
    mine = [r for r in rows if r["stack"] == run]
    if not mine:
        return ""
    low, high = (pick(r["speedup"] for r in mine) for pick in (min, max))
    return f"Its compressed modules alone run {low:.2f} to {high:.2f} times as fast as dense ones."


def _dominates(dense: Mapping[str, Any], student: Mapping[str, Any]) -> bool:
    """Dense is at least as good in perplexity and probes, and at least as fast in decoding and to
    the first token."""
    for speed in (speed_of, prefill_speed_of):
        its, mine = speed(dense), speed(student)
        if its is None or mine is None or its * SPEED_SLACK < mine:
            return False
    good = dense["perplexity"]["perplexity"] <= student["perplexity"]["perplexity"]
    return good and accuracy_of(dense) >= accuracy_of(student)


def _dominated(lead: Mapping[str, Any], rival: Mapping[str, Any]) -> str:
    return (
        f"It is NOT worth it on this machine: {rival['label']} decodes at "
        f"{speed_of(rival):.0f} tokens/s against {speed_of(lead):.0f} of {lead['label']}, reads "
        f"prompts at {prefill_speed_of(rival):.0f} against {prefill_speed_of(lead):.0f} tokens/s, "
        f"and is better: perplexity {rival['perplexity']['perplexity']:.1f} against "
        f"{lead['perplexity']['perplexity']:.1f}."
    )


def _against_dense(lead: Mapping[str, Any], dense: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Compare with the fastest dense contender, whatever its precision."""
    rival = fastest(dense)
    gain = (speed_of(lead) or 0.0) / (speed_of(rival) or 1.0)
    reads = (prefill_speed_of(lead) or 0.0) / (prefill_speed_of(rival) or 1.0)
    text = (
        f"At its fastest ({lead['label']}) it decodes at {speed_of(lead):.0f} tokens/s, "
        f"{gain:.2f} times the fastest dense contender ({rival['label']}, "
        f"{speed_of(rival):.0f} tokens/s), and reads prompts {reads:.2f} times as fast"
    )
    if lead["model_bytes"] and rival["model_bytes"]:
        text += f", in {lead['model_bytes'] / rival['model_bytes']:.2f} times its bytes"
    if _as_good(lead) and gain > SPEED_SLACK:
        return f"{text}; its quality cannot be told from the dense original's.", "worth it"
    return f"{text}: a trade of quality for speed, for you to judge.", "a trade"


def _as_good(student: Mapping[str, Any]) -> bool:
    """Neither perplexity nor few-shot accuracy is shown to be worse than the dense original's."""
    ratio = student["perplexity"].get("ratio_to_dense_interval95")
    kept = (student["probes"] or {}).get("retention") or {}
    difference = kept.get("difference_interval95")
    return bool(ratio and ratio[0] <= 1.0 and difference and difference[1] >= 0.0)


def _lost_most(student: Mapping[str, Any]) -> bool:
    kept = ((student["probes"] or {}).get("retention") or {}).get("retention")
    return kept is not None and kept < 0.5


def _baseline_verdicts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Budgeted against SVD at the same budget, and against standard LoRA, in PyTorch."""
    by_id = {c["id"]: c for c in report["contenders"]}
    return [
        _versus(pair, by_id[pair["student"]], by_id[pair["baseline"]])
        for pair in report["comparisons"]
    ]


def _versus(
    pair: Mapping[str, Any], student: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    ratio, difference = pair["perplexity_ratio"], pair["hits_at_1_difference"]
    signs = {
        _sign(pair["perplexity_ratio_interval95"], 1.0),
        -_sign(pair["hits_at_1_difference_interval95"], 0.0),
    }
    kind = "mixed" if {1, -1} <= signs else "worse" if 1 in signs else "better"
    kind = "no difference shown" if signs == {0} else kind
    text = (
        f"{student['run']} against {other['run']} (same text and queries): perplexity "
        f"{student['perplexity']['perplexity']:.1f} against "
        f"{other['perplexity']['perplexity']:.1f} ({ratio:.2f} times), few-shot accuracy "
        f"{accuracy_of(student):.3f} against {accuracy_of(other):.3f} ({difference:+.3f})."
    )
    about = f"{student['run']} / {other['run']}"
    return {"about": about, "kind": kind, "text": text, "conclusion": text}


def _sign(interval: Sequence[float] | None, neutral: float) -> int:
    """1 above, -1 below, 0 when the interval holds the neutral value or there is none."""
    if interval is None or interval[0] <= neutral <= interval[1]:
        return 0
    return 1 if interval[0] > neutral else -1


def speed_of(contender: Mapping[str, Any]) -> float | None:
    """Decode tokens/s at batch 1 behind the shortest prompt."""
    rows = [r for r in contender.get("latency") or [] if r["kind"] == "decode" and r["batch"] == 1]
    if not rows:
        return None
    return float(min(rows, key=lambda r: r["prompt_tokens"])["tokens_per_s"])


def prefill_speed_of(contender: Mapping[str, Any]) -> float | None:
    """Prefill tokens/s at batch 1 and the longest prompt."""
    rows = [r for r in contender.get("latency") or [] if r["kind"] == "prefill" and r["batch"] == 1]
    if not rows:
        return None
    return float(max(rows, key=lambda r: r["prompt_tokens"])["tokens_per_s"])


def accuracy_of(contender: Mapping[str, Any]) -> float:
    """Mean HITS@1 at the headline's shots; 0 where it was not measured."""
    probes = contender["probes"]
    if not probes:
        return 0.0
    return float(probes["by_shots"][str(probes["headline_shots"])]["mean_hits_at_1"])


def fastest(contenders: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one that decodes fastest."""
    return max(contenders, key=lambda c: speed_of(c) or 0.0)
