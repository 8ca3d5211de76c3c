"""What can be refused before any work begins: absent runtimes, targets that nothing builds for."""

from __future__ import annotations

from collections.abc import Mapping

from distill.artifact import UserError
from export.args import ExportArgs
from export.ort_session import require_provider
from export.trt_api import BuildError, load_tensorrt
from export.trt_place import ACTIVATIONS, Place, choose_place


def require_buildable(args: ExportArgs) -> Mapping[str, Place]:
    """Where each precision of the TensorRT engine is built.

    Raises: UserError when a runtime, a provider or a target that is asked for cannot be had.
    """
    places = {}
    require_provider(args.provider if "ort" in args.engine else "cpu")  # the gate's, if no other
    try:
        for engine, precision in args.wanted():
            if engine == "trt":
                place = choose_place(args.target or None, precision, ACTIVATIONS[precision])
                if place.here:
                    load_tensorrt(place.flavour)
                places[precision] = place
    except BuildError as error:
        raise UserError(str(error)) from None
    return places
