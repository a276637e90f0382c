"""Low-bit number formats and how tensors are quantised to them."""

from llmopt.compiler.quant.elements import ELEMENTS, Element
from llmopt.compiler.quant.packing import pack, unpack
from llmopt.compiler.quant.quantize import QuantizedTensor, dequantize, fake_quantize, quantize
from llmopt.compiler.quant.schemes import PRESETS, SCHEMES, Scheme, scheme_of

__all__ = [
    "ELEMENTS",
    "PRESETS",
    "SCHEMES",
    "Element",
    "QuantizedTensor",
    "Scheme",
    "dequantize",
    "fake_quantize",
    "pack",
    "quantize",
    "scheme_of",
    "unpack",
]
