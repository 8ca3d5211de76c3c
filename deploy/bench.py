"""``python -m deploy bench``: prompt processing, generation and both, each beside its ceiling."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.args import Wrong, whole, whole_numbers
from deploy.bench_report import predictions_report, write_report
from deploy.bench_timing import Workload, interleaved_samples, run_test
from deploy.ceilings import MeasuredCeilings, measure_ceilings, work_of
from deploy.engines import engine_name, engines_matching, find_engine
from deploy.power import read_power, warnings_of
from deploy.runner import Runner, open_runner
from distill.commit import UserError

PEERS = {"llama.cpp": "deploy.peer_llama"}  # not in bundles, which carry light packages only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--run",
        action="append",
        default=[],
        metavar="RUN",
        help="run folder, its name, or an engine directory; several: one flag each "
        "(default: the newest run with an engine)",
    )
    add(
        "--engine",
        action="append",
        default=[],
        metavar="NAME",
        help="engine of each run, e.g. int8; several: one flag each; all: every one "
        "(default: the fastest kind)",
    )
    add("--provider", choices=("cpu", "cuda", "tensorrt"), help="ONNX Runtime's provider")
    add("-p", "--prompt", type=whole_numbers(0), default=(512,), help="prompt tokens (512)")
    add("-n", "--generate", type=whole_numbers(0), default=(128,), help="decoded tokens (128)")
    add(
        "-pg",
        "--both",
        action="append",
        type=_pair,
        default=[],
        metavar="P,N",
        help="prompt and decoded tokens of one test, several: one flag each",
    )
    add("-b", "--batch", type=whole_numbers(1), default=(1,), help="rows at a time (1)")
    add("-t", "--threads", type=whole_numbers(1), help="threads (default: the usable cores)")
    add("-r", "--repetitions", type=whole(1, 10000), default=5, help="timed rounds (5)")
    add("-o", "--output", choices=("md", "csv", "json"), default="md", help="format (md)")
    add("--peer", choices=PEERS, help="also measure llama.cpp, by llama-cpp-python")
    add("--gguf", metavar="FILE", help="model of --peer (default: the built-in SmolLM2-135M)")
    add(
        "--devices",
        action="store_true",
        help="measure nothing: decode ceilings of known devices, predicted from this student",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status 0; raises UserError for everything that the user can put right."""
    if args.gguf is not None and args.peer is None:
        raise UserError(f"--gguf {args.gguf} is the peer's model; add --peer llama.cpp")
    directories = _directories(args.run, args.engine)
    if args.devices:
        predictions_report(directories[0], args.output)
        return 0
    tests = _tests(args)
    before = read_power()
    ceilings, rows = [], []
    for threads in args.threads or (usable_cores(),):
        measured = measure_ceilings(threads)
        ceilings.append(measured.to_json())
        rows += _measured(args, directories, threads, tests, measured)
    after = read_power()
    report = {
        "argv": ["python", "-m", "deploy", *sys.argv[1:]],
        "machine": describe_machine(),
        "power": {"before": before, "after": after},
        "warnings": warnings_of(before, after),
        "ceilings": ceilings,
        "rows": rows,
    }
    write_report(report, args.output)
    return 0


def usable_cores() -> int:
    """Cores that this process may use."""
    import os

    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """Processor, system and usable cores."""
    import platform

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "usable_cores": usable_cores(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _measured(
    args: argparse.Namespace,
    directories: Sequence[Path],
    threads: int,
    tests: Sequence[Workload],
    ceilings: MeasuredCeilings,
) -> list[dict[str, Any]]:
    """Rows of every contender and test with one number of threads."""
    runners: dict[str, Runner] = {}
    try:
        for name, directory in zip(_names(directories), directories, strict=True):
            _say(f"opening {name} with {threads} threads")
            runners[name] = open_runner(directory, provider=args.provider, threads=threads)
        if args.peer:
            context = max(test.context for test in tests) + 1
            runners[args.peer] = _open_peer(args.peer, args.gguf, threads, context)
        rows = []
        for test in tests:
            rows += _test_rows(runners, test, args.repetitions, ceilings)
        return rows
    finally:
        for runner in runners.values():
            runner.close()


def _open_peer(peer: str, gguf: str | None, threads: int, context: int) -> Runner:
    try:
        module = importlib.import_module(PEERS[peer])
    except ModuleNotFoundError:
        raise UserError(
            f"--peer {peer} is not part of a bundle's runtime; needs the whole project; "
            "leave it out here"
        ) from None
    runner: Runner = module.open_llama(gguf, threads=threads, context=context)
    return runner


def _test_rows(
    runners: dict[str, Runner], test: Workload, repetitions: int, ceilings: MeasuredCeilings
) -> list[dict[str, Any]]:
    fitting = {
        name: runner
        for name, runner in runners.items()
        if runner.max_context >= test.context
        and (runner.max_batch is None or runner.max_batch >= test.batch)
    }
    for name in runners.keys() - fitting.keys():
        _say(f"{name}: {test.name} of {test.batch} rows is beyond its limits and left out")
    if not fitting:
        return []
    _say(f"{test.name}, {test.batch} rows at a time")
    calls = {n: (lambda r=runner: run_test(r, test)) for n, runner in fitting.items()}
    samples = interleaved_samples(calls, repetitions)
    return [_row(name, fitting[name], test, samples[name], ceilings) for name in fitting]


def _row(
    name: str,
    runner: Runner,
    test: Workload,
    samples_s: Sequence[float],
    ceilings: MeasuredCeilings,
) -> dict[str, Any]:
    """Tokens a second: median and 5th to 95th percentile; and the fraction of the ceiling."""
    described = runner.describe()
    speeds = test.tokens / np.asarray(samples_s)
    low, median, high = (float(q) for q in np.quantile(speeds, [0.05, 0.5, 0.95]))
    row = {
        "contender": name,
        **{key: described.get(key) for key in ("engine", "version", "precision", "provider")},
        "weight_bytes": described.get("weight_bytes"),
        "directory": described.get("directory"),
        "threads": ceilings.threads,
        "test": test.name,
        "prompt_tokens": test.prompt,
        "decoded_tokens": test.generated,
        "batch": test.batch,
        "tokens_per_s": median,
        "tokens_per_s_p5": low,
        "tokens_per_s_p95": high,
        "samples_s": list(samples_s),
    }
    directory = described.get("directory")
    work = work_of(Path(directory), str(described["precision"])) if directory else None
    if work is None or described["provider"] != "cpu":
        return {**row, "ceiling_tokens_per_s": None, "ceiling_fraction": None, "bound": None}
    precision, rows = str(described["precision"]), test.batch
    prompt = work.floor_s(ceilings, precision, tokens=rows * test.prompt, rows=rows)
    step = work.floor_s(ceilings, precision, tokens=rows, rows=rows)
    floor_s = (prompt[0] if test.prompt else 0.0) + test.generated * step[0]
    ceiling = test.tokens / floor_s
    bound = prompt[1] if not test.generated else step[1] if not test.prompt else "both"
    return {
        **row,
        "ceiling_tokens_per_s": ceiling,
        "ceiling_fraction": median / ceiling,
        "bound": bound,
    }


def _directories(runs: Sequence[str], engines: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for run in runs or (None,):
        for engine in engines or (None,):
            if engine == "all":
                found += engines_matching(run)
            else:
                found.append(find_engine(run, engine))
    return list(dict.fromkeys(found))


def _names(directories: Sequence[Path]) -> list[str]:
    """ "engine-ort/int8-cpu", with the run's name in front where two runs have one."""
    names = [engine_name(directory) for directory in directories]
    return [
        name if names.count(name) == 1 else f"{directory.absolute().parents[1].name}/{name}"
        for name, directory in zip(names, directories, strict=True)
    ]


def _tests(args: argparse.Namespace) -> list[Workload]:
    shapes = [(prompt, 0) for prompt in args.prompt if prompt]
    shapes += [(0, generated) for generated in args.generate if generated]
    shapes += args.both
    if not shapes:
        raise UserError("-p 0 and -n 0 leave nothing to measure; give one of them, or -pg P,N")
    return [
        Workload(prompt, generated, batch) for batch in args.batch for prompt, generated in shapes
    ]


def _pair(text: str) -> Any:
    parts = text.split(",")
    if len(parts) == 2 and all(part.isdecimal() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    return Wrong(text, "two whole numbers above 0, such as 512,128")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
