"""``python -m deploy generate`` and ``bench`` as a user runs them, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import deploy.engines
from deploy.__main__ import main
from deploy.text import load_text
from tests.deploy_engines import Engines, greedy_by_torch, set_config

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The river rises in the hills"
# A stand-in for an environment without these packages: importing one is an error.
BARE = (
    "import sys\n"
    "absent = ('torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript', 'safetensors', 'rich',\n"
    "          'datasets', 'peft', 'accelerate', 'gguf', 'huggingface_hub', 'filelock',\n"
    "          'matplotlib')\n"
    "for name in absent: sys.modules[name] = None\n"
)
IMPORT_LIMIT_S = 0.5
FIRST_TOKEN_LIMIT_S = 2.0


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Engines:
    made = Engines(tmp_path_factory.mktemp("runs") / "tiny", tiny_tokenizer)
    made.engine("fp32")
    made.engine("int8")
    return made


def bare(code: str, *argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process that lacks the heavy packages."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BARE + code, *argv]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )


GENERATE = "from deploy.__main__ import main; sys.exit(main(['generate', *sys.argv[1:]]))"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(list(argv))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def expected_text(engines: Engines, prompt: str, count: int) -> str:
    """What PyTorch's greedy tokens read as behind the prompt."""
    text = load_text(engines.engine())
    ids = text.encode(prompt)
    tokens = greedy_by_torch(engines.model, ids, count)
    tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
    return text.decode([*ids, *tokens]).removeprefix(text.decode(ids))


def test_generates_pytorchs_text_without_torch(engines: Engines) -> None:
    flags = ("--run", str(engines.run), "--engine", "fp32", "--max-tokens", "16", "--threads", "1")
    done = bare(GENERATE, *flags, PROMPT)
    assert (done.returncode, done.stdout) == (0, expected_text(engines, PROMPT, 16) + "\n")
    assert done.stderr.startswith("engine-ort/fp32-cpu, 1 threads: prompt ")
    assert done.stderr.count("tokens/s") == 2 and "first token after" in done.stderr


def test_another_prompt_gives_another_text(engines: Engines) -> None:
    """The twin: the comparison above does not pass for any text."""
    assert expected_text(engines, PROMPT, 16) != expected_text(engines, "A boat", 16)


def test_the_runtime_imports_quickly_and_without_torch() -> None:
    """Processor time, the best of three: other processes share these cores. The wall-clock
    figure is in docs/deploy.md."""
    code = (
        "import time; began = time.process_time()\n"
        "import deploy.runner_ort, deploy.text, deploy.sampling, deploy.generate\n"
        "import onnxruntime, tokenizers\n"
        "print(time.process_time() - began)"
    )
    seconds = []
    for _ in range(3):
        done = bare(code)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) <= IMPORT_LIMIT_S


def test_a_cold_start_is_quick(engines: Engines) -> None:
    flags = ("--run", str(engines.run), "--max-tokens", "1", "--threads", "1", PROMPT)
    code = (
        GENERATE.replace("sys.exit", "status = ")
        + "; import os; print('cpu', sum(os.times()[:2])); sys.exit(status)"
    )
    seconds = []
    for _ in range(3):
        done = bare(code, *flags)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout.rpartition("cpu ")[2]))
    assert min(seconds) <= FIRST_TOKEN_LIMIT_S


def test_the_newest_run_and_its_fastest_engine(
    engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy.engines, "RUNS", engines.run.parent)
    status, out, err = run(capsys, "generate", "--max-tokens", "3", PROMPT)
    assert status == 0 and out.strip()
    assert err.startswith("engine-ort/int8-cpu")


def test_chat_uses_the_template(engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    text = load_text(engines.engine())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = text.encode(text.apply_chat_template(messages), add_special_tokens=False)
    tokens = greedy_by_torch(engines.model, ids, 8)
    tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
    expected = text.decode([*ids, *tokens]).removeprefix(text.decode(ids))
    flags = ("--run", str(engines.engine()), "--max-tokens", "8", "--chat", "--quiet")
    status, out, err = run(capsys, "generate", *flags, "--system", "Be brief.", "Hello")
    assert (status, out, err) == (0, expected + "\n", "")


def test_sampling_repeats_with_its_seed(
    engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "generate",
        "--run",
        str(engines.engine()),
        "--max-tokens",
        "12",
        "--temperature",
        "1.5",
    )
    first = run(capsys, *flags, "--seed", "1", PROMPT)[1]
    assert run(capsys, *flags, "--seed", "1", PROMPT)[1] == first
    assert run(capsys, *flags, "--seed", "2", PROMPT)[1] != first


def test_stop_strings_and_the_end_token(
    engines: Engines, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ("--max-tokens", "16", "--quiet", PROMPT)
    whole = run(capsys, "generate", "--run", str(engines.engine()), *flags)[1].rstrip("\n")
    stop = whole[5:8]
    stopped = run(capsys, "generate", "--run", str(engines.engine()), "--stop", stop, *flags)[1]
    assert stopped == whole[: whole.find(stop)] + "\n"
    copy = Path(shutil.copytree(engines.engine(), tmp_path / "copy"))
    (copy / "manifest.json").unlink()
    text = load_text(copy)
    ids = text.encode(PROMPT)
    third = greedy_by_torch(engines.model, ids, 3)[2]
    set_config(copy, "generation_config.json", eos_token_id=third)
    ended = run(capsys, "generate", "--run", str(copy), *flags)[1]
    assert len(ended) < len(whole)
    going_on = run(capsys, "generate", "--run", str(copy), "--ignore-eos", *flags)[1]
    assert going_on.startswith(whole)


def test_a_batch_file_gives_json_lines_in_order(
    engines: Engines, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = ["A boat", PROMPT, "Q: hot\nA:", "The price of bread"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    flags = ("--run", str(engines.engine()), "--max-tokens", "9", "--batch-size", "2")
    status, out, err = run(capsys, "generate", *flags, "--batch", str(path))
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and "prompt " in err
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    for prompt, row in zip(prompts, rows, strict=True):
        assert row["prompt"] == prompt
        assert row["text"] == expected_text(engines, prompt, 9)
        assert row["finish_reason"] == ("length" if row["completion_tokens"] == 9 else "stop")


def test_standard_input_and_a_reader_that_leaves(engines: Engines) -> None:
    flags = (
        "--run",
        str(engines.engine()),
        "--max-tokens",
        "400",
        "--threads",
        "1",
        "--ignore-eos",
    )
    command = [sys.executable, "-m", "deploy", "generate", *flags, "-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(PROMPT.encode())
        process.stdin.close()
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 0
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max-tokens", "0", "--top-p", "3", "x"], "--top-p 3: allowed is"),
        (["--nonsense", "x"], "--nonsense: no such flag"),
        (["--run", "nowhere", "x"], "--run nowhere: no such folder"),
        (["--engine", "fp7", "x"], "has no such engine; it has engine-ort/"),
        (["--provider", "cuda", "x"], "asked for is cuda"),
        (["--batch", "none.jsonl"], "cannot be read"),
        (["--batch", "none.jsonl", "x"], "exclude one another"),
        (["--system", "s", "x"], "add --chat"),
        (["--greedy", "--temperature", "1", "x"], "exclude one another"),
        ([""], "the prompt is empty"),
        (["word " * 600], "the model allows 512 together"),
    ],
)
def test_mistakes_cost_one_line_and_status_2(
    engines: Engines, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_flag = [] if "--run" in argv else ["--run", str(engines.run)]
    status, out, err = run(capsys, "generate", *run_flag, *argv)
    assert (status, out) == (2, "")
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("argv", [["dance"], ["generate-x", "y"]])
def test_unknown_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *argv)
    assert status == 2 and "allowed are generate, serve, bench" in err


def test_help_needs_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[:2] == run(capsys, "--help")[:2]
    assert "bench" in run(capsys)[1]
    for command in ("generate", "bench"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert "--run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json"])
def test_an_altered_engine_is_refused(
    engines: Engines, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(engines.engine("int8"), tmp_path / "copy"))
    content = bytearray((copy / name).read_bytes())
    content[-20] ^= 1
    (copy / name).write_bytes(bytes(content))
    status, out, err = run(capsys, "generate", "--run", str(copy), PROMPT)
    assert (status, out) == (2, "")
    assert name in err and err.count("\n") == 1
