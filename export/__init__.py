"""Lower a student to a static ONNX graph, prove it equal, and build engines from it."""
