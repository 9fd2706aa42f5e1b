"""A student as ONNX: its graph with 32-bit weights, and the same with 8-bit ones.

8-bit weights are made without training or text: a weight w becomes round(w / s). In a product every `BLOCK` weights of
a column have a scale s of their own, and so has, as it comes, what is multiplied with them; in an embedding every row
has one, so that a rare piece with a large vector does not coarsen all others. Fine scales for weights, and those of
inner states found anew for each piece, are ZeroQuant's (Yao et al. 2022, https://arxiv.org/abs/2206.01861).

Measured on a student for STS-B (Pearson 0.8262 in torch): 0.8257 so, and 0.8174 with onnxruntime's `quantize_dynamic`,
which gives the inner states of a whole batch one scale; that takes half to two thirds of the time.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clients.exported import TOKEN_BUDGET, Exported, Spec
from common.errors import InputError

OPSET = 20
LEVELS = 127  # of a signed byte, on each side of 0
BLOCK = 64
WITH_BYTES = 4  # onnxruntime's name for products of bytes, instead of weights turned into floats first


class _Logits(nn.Module):
    """The model with its inputs in order and nothing but logits as output."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return found


def check_exporter() -> None:
    """Raise `InputError` unless everything is installed that an export needs."""
    for name in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
        try:
            __import__(name)
        except ImportError:
            raise InputError(f"{name} is not installed: pip install 'fedistill[export]'") from None


def write_onnx(student: Any, spec: Spec, path: Path) -> None:
    """Write a student with 32-bit weights, for any number of texts of any length that it can take.

    Raises:
        InputError: a model of this family cannot be exported.
    """
    student = student.eval()
    student.set_attn_implementation("eager")  # the fused one exports as the same products and a dozen checks more
    student.config.use_cache = False
    names = spec.inputs
    # not 1 long or wide: torch would take that for a constant
    inputs = tuple(torch.full((2, 5), int(name == "attention_mask"), dtype=torch.int64) for name in names)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet():
            program = torch.onnx.export(
                _Logits(student, names), inputs, dynamo=True, input_names=names, output_names=["logits"],
                dynamic_shapes=((free,) * len(names),), opset_version=OPSET, verbose=False,
            )  # fmt: skip
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        family = student.config.model_type
        raise InputError(f"models of the family {family!r} cannot be exported ({type(error).__name__})") from None
    assert program is not None
    graph = program.model_proto
    _strip(graph)
    path.write_bytes(graph.SerializeToString())


def quantise(source: Path, target: Path) -> None:
    """Write the 8-bit form of an ONNX file: products by onnxruntime, embeddings row by row."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    whole = ONNXModel(onnx.load(source))
    whole.replace_gemm_with_matmul()
    with _quiet():
        quantiser = MatMulNBitsQuantizer(
            whole.model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=WITH_BYTES
        )
        quantiser.process()
    model = quantiser.model.model
    _quantise_rows(model.graph)
    _strip(model)
    target.write_bytes(model.SerializeToString())


def _quantise_rows(graph: Any) -> None:
    """Turn every look-up in a table of floats into one of bytes, times that of the rows' scales."""
    from onnx import TensorProto, helper, numpy_helper

    tables = {each.name: each for each in graph.initializer if each.data_type == TensorProto.FLOAT}
    readers = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    for name in dict.fromkeys(node.input[0] for node in readers):
        table = numpy_helper.to_array(tables[name])
        if table.ndim != 2 or any(name in node.input for node in graph.node if node not in readers):
            continue
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True) / LEVELS, np.finfo(np.float32).tiny)
        bytes_ = np.rint(table / scales).astype(np.int8)
        graph.initializer.remove(tables[name])
        graph.initializer.extend(
            numpy_helper.from_array(array, f"{name}.{part}")
            for part, array in (("bytes", bytes_), ("scales", scales.astype(np.float32)))
        )
        for node in [node for node in readers if node.input[0] == name]:
            pieces, vectors = node.input[1], node.output[0]
            place = list(graph.node).index(node)
            graph.node.remove(node)
            made = [
                helper.make_node("Gather", [f"{name}.bytes", pieces], [f"{vectors}.bytes"]),
                helper.make_node("Gather", [f"{name}.scales", pieces], [f"{vectors}.scales"]),
                helper.make_node("Cast", [f"{vectors}.bytes"], [f"{vectors}.floats"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{vectors}.floats", f"{vectors}.scales"], [vectors]),
            ]
            for step, new in enumerate(made):
                graph.node.insert(place + step, new)


def _strip(model: Any) -> None:
    """Remove what a device does not need: where in whose source files each operation stands, and guessed shapes.

    onnxruntime's quantisation trips over shapes that are given for weights.
    """
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's warnings, which are about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def largest_difference(exported: Exported, columns: Sequence[Sequence[str]], logits: NDArray[np.float32]) -> float:
    """Between an export's logits and those expected, over texts alone and in batches; may be NaN."""
    found = [np.abs(exported.logits(columns, budget) - logits).max() for budget in (0, TOKEN_BUDGET, 4 * TOKEN_BUDGET)]
    return float(np.max(found))
