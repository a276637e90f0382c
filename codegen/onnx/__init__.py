"""ONNX: lowerings of the IR and of aten, and the graph made of them."""
