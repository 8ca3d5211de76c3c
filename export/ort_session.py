"""Sessions of ONNX Runtime on the provider that was asked for, or a clear refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.artifact import MANIFEST, UserError, read_json
from export.external_data import external_data_files

REMEDY = "write it again with: python -m export --run RUN --engine ort --overwrite"
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
INSTALL = {
    "cpu": "pip install '.[cpu]' in this project's folder",
    "cuda": "pip install '.[gpu]' in this project's folder and an environment without onnxruntime, "
    "with CUDA 12 and cuDNN 9",
    "tensorrt": "pip install '.[gpu]' in this project's folder and an environment without "
    "onnxruntime, with CUDA 12, cuDNN 9 and TensorRT 10",
}
OPTIMISATIONS = ("none", "basic", "extended", "layout", "all")


@dataclass(frozen=True)
class SessionSettings:
    """How ONNX Runtime runs a graph; what session.json of an engine directory records.

    `threads`: intra-op threads (None: one a physical core). `spinning`: idle threads wait busily,
    which is quicker for one request at a time and wastes the cores that others need.
    """

    provider: str = "cpu"
    provider_options: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    spinning: bool = True
    graph_optimization_level: str = "all"


def open_session(
    model_path: Path,
    settings: SessionSettings,
    *,
    save_optimised: Path | None = None,
    graph: bytes | None = None,
) -> Any:
    """An onnxruntime.InferenceSession on the provider that was asked for, or UserError.

    Args:
        save_optimised: also write the graph as ONNX Runtime optimised it for this provider, its
            weights beside it in a file of the same name plus ".data".
        graph: a serialised model to run in place of the one in the file, with the file's weights.
    """
    ort = require_provider(settings.provider)
    external_data_files(model_path)
    options = session_options(settings)
    if save_optimised is not None:
        options.optimized_model_filepath = str(save_optimised)
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, f"{save_optimised.name}.data")
    if graph is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(model_path.parent))
    providers: list[Any] = [(PROVIDERS[settings.provider], dict(settings.provider_options))]
    if settings.provider == "tensorrt":
        providers.append(PROVIDERS["cuda"])
    try:
        session = ort.InferenceSession(
            graph or str(model_path), options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise UserError(_load_failure(model_path, settings.provider, error)) from error
    session.disable_fallback()
    _require_running(session, settings.provider)
    return session


def session_options(settings: SessionSettings) -> Any:
    """onnxruntime.SessionOptions for `settings`; only errors are logged."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # one pattern would be kept for every new shape
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    spinning = "1" if settings.spinning else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "layout": getattr(levels, "ORT_ENABLE_LAYOUT", levels.ORT_ENABLE_ALL),
        "all": levels.ORT_ENABLE_ALL,
    }[settings.graph_optimization_level]
    return options


def load_onnxruntime() -> Any:
    """The module. Raises: UserError with the command that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"onnxruntime cannot be imported ({error}); needs it to run ONNX; "
            f"install it with: {INSTALL['cpu']}"
        ) from error
    return onnxruntime


def require_known(provider: str) -> None:
    if provider not in PROVIDERS:
        raise UserError(
            f"provider {provider!r}; allowed are {', '.join(PROVIDERS)}; choose one of them"
        )


def require_provider(provider: str) -> Any:
    """The module onnxruntime, which lists `provider`; whether that starts, only a session shows.

    Raises: UserError naming the providers that there are.
    """
    require_known(provider)
    ort = load_onnxruntime()
    available = ort.get_available_providers()
    if PROVIDERS[provider] not in available:
        names = [name for name, full in PROVIDERS.items() if full in available]
        raise UserError(
            f"provider {provider} was asked for, this onnxruntime {ort.__version__} has "
            f"{', '.join(names)}; choose one of these or {INSTALL[provider]}"
        )
    return ort


def _require_running(session: Any, provider: str) -> None:
    running = session.get_providers()
    if running[:1] != [PROVIDERS[provider]]:
        raise UserError(
            f"provider {provider} was asked for, but only {', '.join(running)} started: its "
            f"libraries are missing or no device answers; needs {INSTALL[provider]}"
        )


def _load_failure(model_path: Path, provider: str, error: Exception) -> str:
    """One line on why ONNX Runtime refused a model."""
    reason = " ".join(str(error).split())[:300]
    if provider != "cpu" and PROVIDERS[provider] in reason:
        return f"the {provider} provider does not start ({reason}); needs {INSTALL[provider]}"
    made_with, installed = _release_of(model_path.parent), load_onnxruntime().__version__
    if made_with not in (None, installed):
        return (
            f"{model_path} was made for onnxruntime {made_with} and cannot be loaded by "
            f"{installed}, which is installed ({reason}); needs {made_with}; install that, or "
            f"{REMEDY}"
        )
    if "NOT_IMPLEMENTED" in reason or "NotImplemented" in type(error).__name__:
        return (
            f"{model_path} needs operators or types that the {provider} provider lacks ({reason}); "
            "bfloat16 needs a GPU provider; export another --precision or choose a --provider"
        )
    return f"{model_path} cannot be loaded ({reason}); needs an intact ONNX model; {REMEDY}"


def _release_of(directory: Path) -> str | None:
    """The onnxruntime that an engine was made with, as its manifest says; None: it does not."""
    try:
        release = read_json(directory / MANIFEST)["measured"]["onnxruntime"]
    except (UserError, LookupError, TypeError):
        return None
    return str(release)
