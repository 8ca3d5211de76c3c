"""Bundles: the round trip into a bare environment, and everything that must be refused."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from deploy.__main__ import main
from deploy.bundle_engine import choose_engine
from deploy.bundle_runtime import IN_PLACE_ONNXRUNTIME, PACKAGES, ROOT, requirements, runtime_of
from deploy.devices import DEVICES
from deploy.text import load_text
from distill.artifact import write_json, write_manifest
from distill.commit import UserError
from export.graph_inplace import FIRST_RELEASE
from tests.deploy_engines import Engines, greedy_by_torch

PROMPT = "The river rises in the hills"
# What `pip install numpy tokenizers jinja2 onnxruntime psutil` brings of importable things.
LIGHT = (
    "numpy", "numpy.libs", "tokenizers", "jinja2", "markupsafe", "onnxruntime", "psutil",
    "flatbuffers", "google",
)  # fmt: skip


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Engines:
    made = Engines(tmp_path_factory.mktemp("runs") / "tiny", tiny_tokenizer)
    made.engine("int8")
    made.engine("fp32")
    return made


@pytest.fixture(scope="module")
def archive(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "tiny.tar.gz"
    assert main(bundle_of(engines, out)) == 0
    return out


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the light packages and nothing else."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, with_pip=False, symlinks=True)
    site = next(directory.glob("lib/python*/site-packages"))
    spec = importlib.util.find_spec("numpy")
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parents[1]
    for name in LIGHT:
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    return directory / "bin" / "python"


def bundle_of(engines: Engines, out: Path, *flags: str) -> list[str]:
    common = ["--run", str(engines.run), "--engine", "fp32", "--licence", "mit"]
    return ["bundle", *common, *flags, str(out)]


def run_sh(bundle: Path, python: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    command = [str(bundle / "run.sh"), *argv]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, cwd="/"
    )


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command writes."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("error: ")
    assert written.err.count("\n") == 1
    return written.err


def repacked(
    archive: Path, out: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]
) -> Path:
    """A copy of the archive whose members `change` has edited."""
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            file = tar.extractfile(member)
            members.append((member, file.read() if file else b""))
    change(members)
    with tarfile.open(out, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out


# The round trip


def test_a_bare_environment_verifies_and_generates(
    engines: Engines, archive: Path, bare_python: Path, tmp_path: Path
) -> None:
    assert main(["verify", str(archive), "--unpack", str(tmp_path / "there")]) == 0
    bundle = tmp_path / "there"
    for absent in ("torch", "transformers", "onnx", "safetensors", "starlette"):
        done = subprocess.run([bare_python, "-c", f"import {absent}"], capture_output=True)
        assert done.returncode == 1, absent
    done = run_sh(bundle, bare_python, "verify", str(bundle))
    assert done.returncode == 0 and "files as sent" in done.stdout, done.stderr
    flags = ("--max-tokens", "16", "--threads", "1", "--quiet")
    done = run_sh(bundle, bare_python, "generate", *flags, PROMPT)
    text = load_text(engines.engine("fp32"))
    ids = text.encode(PROMPT)
    tokens = greedy_by_torch(engines.model, ids, 16)
    tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
    expected = text.decode([*ids, *tokens]).removeprefix(text.decode(ids))
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")
    done = run_sh(bundle, bare_python, "serve")
    assert done.returncode == 2 and "pip install" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_the_same_engine_gives_the_same_bytes(
    engines: Engines, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "tiny.tar.gz"
    assert main(bundle_of(engines, again)) == 0
    assert again.read_bytes() == archive.read_bytes()
    identity = capsys.readouterr().out.split("identity ")[1].split()[0]
    assert main(["verify", str(archive), "--identity", identity]) == 0
    other = error_of(capsys, "verify", str(archive), "--identity", "0" * 64)
    assert "another bundle" in other
    assert "64 hex digits" in error_of(capsys, "verify", str(archive), "--identity", "abc")


def test_sums_that_need_no_python(archive: Path, tmp_path: Path) -> None:
    assert main(["verify", str(archive), "--unpack", str(tmp_path / "there")]) == 0
    command = ["sha256sum", "--quiet", "--check", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tmp_path / "there").returncode == 0
    (tmp_path / "there" / "engine" / "config.json").write_text("{}")
    done = subprocess.run(command, cwd=tmp_path / "there", capture_output=True)
    assert done.returncode != 0
    for script in ("install.sh", "run.sh"):
        assert subprocess.run(["sh", "-n", tmp_path / "there" / script]).returncode == 0


def test_the_runtime_is_light() -> None:
    runtime = runtime_of(["deploy.__main__", "deploy.generate", "deploy.server"])
    assert runtime.packages <= set(PACKAGES)
    names = {path.as_posix() for path in runtime.modules}
    assert {"deploy/runner_ort.py", "export/session.py", "distill/commit.py"} <= names
    assert not any(name.startswith("evaluate/") or "peer_llama" in name for name in names)
    lines = requirements(runtime.packages, "onnxruntime", on_gpu=False)
    assert any(line.startswith("onnxruntime==") for line in lines)
    assert not any("cuda" in line for line in lines)
    with pytest.raises(UserError, match="torch"):
        runtime_of(["distill.train"], ROOT)


# What is refused


@pytest.mark.parametrize(
    "name", ["engine/model.onnx.data", "runtime/deploy/runner.py", "run.sh", "manifest.json"]
)
def test_an_altered_file_is_refused(
    archive: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        for index, (member, content) in enumerate(members):
            if member.name == f"tiny/{name}":
                members[index] = (member, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])

    bad = repacked(archive, tmp_path / "bad.tar.gz", change)
    said = error_of(capsys, "verify", str(bad), "--unpack", str(tmp_path / "there"))
    assert "manifest" in said
    assert not (tmp_path / "there").exists()


def test_files_that_lead_out_or_are_added_are_refused(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def added(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
        def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            members.append((member, b"x" if kind == tarfile.REGTYPE else b""))

        return repacked(archive, tmp_path / "bad.tar.gz", change)

    for name, kind, said in (
        ("tiny/../../out", tarfile.REGTYPE, "no plain file inside"),
        ("/tmp/out", tarfile.REGTYPE, "no plain file inside"),
        ("tiny/engine/link", tarfile.SYMTYPE, "no plain file inside"),
        ("tiny/runtime/sitecustomize.py", tarfile.REGTYPE, "without an entry"),
        ("tiny/run.sh", tarfile.REGTYPE, "twice"),
    ):
        bad = added(name, kind, "/etc/passwd")
        assert said in error_of(capsys, "verify", str(bad), "--unpack", str(tmp_path / "there"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar.gz"]


def test_a_damaged_archive_is_refused(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = archive.read_bytes()
    bad = tmp_path / "bad.tar.gz"
    for damaged in (content[: len(content) // 2], b"", b"no archive", gzip.compress(b"no tar")):
        bad.write_bytes(damaged)
        assert str(bad) in error_of(capsys, "verify", str(bad))
    assert "no file" in error_of(capsys, "verify", str(tmp_path / "none.tar.gz"))


def test_a_directory_with_other_code_is_refused(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    assert main(["verify", str(archive), "--unpack", str(there)]) == 0
    extra = there / "runtime" / "sitecustomize.py"
    extra.write_text("print('hello')")
    assert "not part of the bundle" in error_of(capsys, "verify", str(there))
    extra.unlink()
    (there / "engine" / "tokenizer.json").unlink()
    assert "tokenizer.json" in error_of(capsys, "verify", str(there))


def test_flags_that_do_not_fit(
    engines: Engines, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ends in .tar.gz" in error_of(capsys, *bundle_of(engines, tmp_path / "b.zip"))
    assert "exists already" in error_of(capsys, *bundle_of(engines, archive))
    nano = bundle_of(engines, tmp_path / "b.tar.gz", "--device", "orin-nano")
    assert "sm87" in error_of(capsys, *nano)
    none = bundle_of(engines, tmp_path / "b.tar.gz", "--device", "toaster")
    assert "toaster" in error_of(capsys, *none)
    damaged = Path(shutil.copytree(engines.engine("int8"), tmp_path / "int8-cpu"))
    (damaged / "config.json").write_text("{}")
    said = error_of(capsys, "bundle", "--run", str(damaged), str(tmp_path / "b.tar.gz"))
    assert "config.json" in said and "its manifest" in said
    assert not (tmp_path / "b.tar.gz").exists()


# Devices


def test_a_build_kit_for_a_jetson(engines: Engines, tmp_path: Path) -> None:
    """Its engine is built by install.sh on the device; the prediction is marked as one."""
    kit = tmp_path / "run" / "engine-trt" / "fp16-sm87"
    shutil.copytree(engines.onnx("fp32", "standard"), kit)
    (kit / "manifest.json").unlink()
    (kit / "build.py").write_text("print('building')\n")
    write_json(kit / "kit.json", {"targets": ["sm87"], "flavour": "tensorrt"})
    write_manifest(
        kit, kind="engine-trt", parent=None, argv=[], seed=0, measured={"precision": "fp16"}
    )
    out, there = tmp_path / "nano.tar.gz", tmp_path / "there"
    assert main(["bundle", "--run", str(kit), "--device", "orin-nano", str(out)]) == 0
    assert main(["verify", str(out), "--unpack", str(there)]) == 0
    assert "engine/build.py" in (there / "install.sh").read_text()
    dockerfile = (there / "Dockerfile").read_text()
    assert "l4t-tensorrt" in dockerfile and "--runtime nvidia" in dockerfile
    page = (there / "README.md").read_text()
    assert "prediction" in page and "never run on it" in page
    needed = (there / "requirements.txt").read_text()
    assert "cuda-python" in needed and "onnxruntime" not in needed
    measured = json.loads((there / "manifest.json").read_text())["measured"]
    assert measured["device"] == "orin-nano"
    assert measured["predicted"]["basis"].startswith("prediction")


@pytest.mark.parametrize("engine", [None, "int8"])
def test_each_device_gets_the_engine_that_suits_it(tmp_path: Path, engine: str | None) -> None:
    """A kit is the last choice here and the only one there; no graph for TensorRT goes to a CPU."""
    names = ("engine-trt/int8", "engine-ort/int8-cpu", "engine-ort/int8-cuda", "onnx/plain-int8")
    kit, cpu, cuda, plain = (tmp_path / name for name in names)
    for directory in (kit, cpu, cuda, plain):
        directory.mkdir(parents=True)
        write_json(directory / "model.onnx", {})
        write_json(directory / "manifest.json", {})
    write_json(kit / "kit.json", {"targets": ["sm87", "sm90"]})
    run = str(tmp_path)
    assert choose_engine(run, engine, None).directory == cpu
    for device in ("orin-nano", "h100"):
        chosen = choose_engine(run, engine, DEVICES[device])
        assert chosen.directory == chosen.kit == kit
    assert choose_engine(run, engine, DEVICES["l4"]).directory == cuda
    shutil.rmtree(cpu)
    with pytest.raises(UserError, match=r"int8-cuda, .*plain-int8.* does not run on a CPU"):
        choose_engine(run, engine, None)


def test_an_engine_that_appends_in_place_asks_for_a_runtime_that_can(
    engines: Engines, tmp_path: Path
) -> None:
    assert IN_PLACE_ONNXRUNTIME == ".".join(map(str, FIRST_RELEASE))
    for engine, python, oldest in (
        (engines.in_place("int8"), "3.11", f"onnxruntime>={IN_PLACE_ONNXRUNTIME} "),
        (engines.engine("int8"), "3.10", "onnxruntime>=1.22 "),
    ):
        out, there = tmp_path / f"{engine.name}.tar.gz", tmp_path / engine.name
        argv = ["bundle", "--run", str(engine), "--licence", "mit", str(out)]
        assert main(argv) == 0
        assert main(["verify", str(out), "--unpack", str(there)]) == 0
        page, needed = ((there / name).read_text() for name in ("README.md", "requirements.txt"))
        assert f"needs Python {python} or newer" in page
        assert oldest in needed and oldest in page


def test_every_device_of_the_issue_is_known() -> None:
    for key in (
        "orin-nano", "orin-nx", "agx-orin", "thor", "dgx-spark", "rtx-3060", "rtx-4090",
        "rtx-5090", "l4", "a10", "h100",
    ):  # fmt: skip
        device = DEVICES[key]
        assert device.sm.startswith("sm") and device.memory_gib > 0
        assert device.bandwidth_gb_per_s > 0 and "TensorRT" in device.tensorrt


def test_python_is_the_one_that_runs_the_tests(bare_python: Path) -> None:
    """The twin of the round trip: that environment really is bare and really is Python."""
    code = "import sys, numpy; print(sys.version_info[:2]); print(sys.prefix)"
    done = subprocess.run([bare_python, "-c", code], capture_output=True, text=True, check=True)
    version, prefix = done.stdout.splitlines()
    assert version == str(sys.version_info[:2]) and Path(prefix) == bare_python.parents[1]
