"""PP-OCR's networks in torch: the graph of an ONNX file -> a module for batches, bf16, channels-last and ``torch.compile``.

In: a detector's or recogniser's ONNX file (PP-OCRv4, v5, v6). Out: a :class:`torch.fx.GraphModule`; its ``code`` reads as plain
torch. Sizes stay Python ints: batch, height and width are free, and nothing waits for the device. Preparing pictures and reading
maps is left to others. Needs no Ray and no ONNX Runtime.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx, nn
from torch.nn import functional as F

from raysys.errors import UserError

_ONNX = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""


def import_onnx(path: str) -> nn.Module:
    """The network in eval mode: [N, 3, H, W] -> the graph's first output, both with the weights' dtype and device.

    :raises UserError: for an operator or attribute that is not implemented, naming it and the file.
    """
    model = onnx.load(path)
    graph = model.graph
    num_uses = Counter([name for node in graph.node for name in node.input] + [graph.output[0].name])
    drawing = _Drawing(opset=max(entry.version for entry in model.opset_import if entry.domain in _ONNX))
    values: dict[str, _Value] = {"": None}  # an empty name is an optional input left out
    values |= {entry.name: _constant(entry) for entry in graph.initializer}
    values |= {entry.name: drawing.input() for entry in graph.input if entry.name not in values}
    for node in graph.node:
        drawing.may_fold = all(num_uses[name] == 1 for name in node.input if isinstance(values[name], _Layer))
        try:
            values[node.output[0]] = drawing.draw(node, [values[name] for name in node.input])
        except _UnsupportedError as error:
            raise UserError(
                f"{path}: ONNX operator {node.op_type} ({node.name or node.output[0]}): {error}; take ocr.engine=onnx"
            ) from error
    return drawing.finish(values[graph.output[0].name])


class _UnsupportedError(ValueError):
    pass


def _require(supported: bool, otherwise: str) -> None:
    if not supported:
        raise _UnsupportedError(f"{otherwise} is not supported")


@dataclass
class _Sizes:
    """Shape arithmetic: Python ints at run time, no tensors."""

    value: Any
    """A tuple (of one where ONNX has a scalar) of ints and their proxies, or the proxy of a tensor's whole shape."""


@dataclass
class _Layer:
    """A convolution or product with weights, not drawn yet: biases, scales and batch norms that follow go into its weights."""

    call: Callable[..., Any]
    x: Any
    weight: np.ndarray
    bias: np.ndarray | None
    channel_axis: int
    """Axis of the weight that counts output channels."""
    axes_after: int
    """Axes of the output behind its channels."""
    drawn: fx.Proxy | None = None


_Value = fx.Proxy | _Layer | _Sizes | np.ndarray | None
"""What an ONNX name stands for during the import; an array is a constant of floats, in float64 so that folding is exact."""


@dataclass
class _Window:
    """Attributes that ONNX's convolutions and pools share."""

    kernel_shape: Sequence[int] = ()
    strides: Sequence[int] = (1, 1)
    pads: Sequence[int] = (0, 0, 0, 0)
    """Top, left, bottom, right."""
    dilations: Sequence[int] = (1, 1)
    auto_pad: str = "NOTSET"
    group: int = 1
    ceil_mode: int = 0
    count_include_pad: int = 0

    def pad(self, x: Any, fill: float) -> tuple[Any, tuple[int, int]]:
        """The picture padded where torch's operator cannot do it, and the padding left to that operator."""
        top, left, bottom, right = self.pads
        if self.auto_pad != "NOTSET":
            _require(self.auto_pad == "SAME_UPPER" and list(self.strides) == [1, 1], f"auto_pad={self.auto_pad}")
            down, across = self.kernel_shape[0] - 1, self.kernel_shape[1] - 1
            top, left, bottom, right = down // 2, across // 2, down - down // 2, across - across // 2
        if (top, left) == (bottom, right):
            return x, (top, left)
        return F.pad(x, (left, right, top, bottom), value=fill), (0, 0)


def _constant(tensor: onnx.TensorProto) -> _Value:
    array = numpy_helper.to_array(tensor)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else _Sizes(tuple(array.ravel().tolist()))


def _floats(value: _Value) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise _UnsupportedError("an input that is no constant of floats is not supported here")
    return value


def _ints(value: _Value) -> tuple[int, ...]:
    if not (isinstance(value, _Sizes) and isinstance(value.value, tuple) and all(isinstance(size, int) for size in value.value)):
        raise _UnsupportedError("an input that is no constant of integers is not supported here")
    return value.value


def _layer_norm_taken_apart(x: Any, weight: Any, bias: Any, epsilon: Any) -> Any:
    centred = x - x.mean((-1,), keepdim=True)
    return centred / torch.sqrt((centred**2.0).mean((-1,), keepdim=True) + epsilon) * weight + bias


_FUSED: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (lambda x: x * 1.0, lambda x: x),
    (lambda x: x + 0.0, lambda x: x),
    (lambda x: x * torch.clamp(x + 3.0, 0.0, 6.0) / 6.0, lambda x: F.hardswish(x)),
    (lambda x: F.hardsigmoid(x) * x, lambda x: F.hardswish(x)),
    (lambda x: x * torch.sigmoid(x), lambda x: F.silu(x)),
    (lambda x: x * (torch.erf(x / float(np.float32(2**0.5))) + 1.0) * 0.5, lambda x: F.gelu(x)),
    (_layer_norm_taken_apart, lambda x, weight, bias, epsilon: F.layer_norm(x, weight.shape, weight, bias, epsilon)),
]
"""What exporters take apart -> torch's one kernel: faster, and in bf16 it rounds once, at its end."""

_ON_TENSORS: dict[str, Callable[..., Any]] = {
    "Clip": lambda x, low, high: torch.clamp(x, low, high),
    "Div": lambda a, b: a / b,
    "Erf": lambda x: torch.erf(x),
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda x, *, alpha, beta: (
        F.hardsigmoid(x) if (round(alpha, 6), beta) == (0.166667, 0.5) else torch.clamp(x * alpha + beta, 0.0, 1.0)
    ),
    "HardSwish": lambda x: F.hardswish(x),
    "Pow": lambda a, b: a**b,
    "ReduceMean": lambda x, *, axes, keepdims=1: x.mean(tuple(axes), keepdim=bool(keepdims)),
    "Relu": lambda x: F.relu(x),
    "Shape": lambda x: _Sizes(x.shape),
    "Sigmoid": lambda x: torch.sigmoid(x),
    "Sqrt": lambda x: torch.sqrt(x),
    "Sub": lambda a, b: a - b,
    "Transpose": lambda x, *, perm: x.permute(tuple(perm)),
}
"""Operators whose inputs (positional) are all tensors or numbers; attributes are keywords."""


class _Drawing:
    """The fx graph in the making. A method named as an ONNX operator draws it; see _ON_TENSORS for the simple ones."""

    def __init__(self, opset: int) -> None:
        self.may_fold = False
        """Whether nothing but the operator being drawn uses the _Layers among its inputs."""
        self._opset = opset
        self._graph = fx.Graph()
        self._tracer = fx.proxy.GraphAppendingTracer(self._graph)
        self._weights = nn.ParameterList()

    def input(self) -> fx.Proxy:
        return fx.Proxy(self._graph.placeholder("x"), self._tracer)

    def draw(self, node: onnx.NodeProto, inputs: list[_Value]) -> _Value:
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
        _require(len(node.output) == 1, "a second output")
        function: Callable[..., _Value] | None = None
        if node.domain in _ONNX and node.op_type in _ON_TENSORS:
            function, inputs = _ON_TENSORS[node.op_type], [self._operand(value) for value in inputs]
        elif node.domain in _ONNX and node.op_type[:1].isupper():
            function = getattr(self, node.op_type, None)
        if function is None:
            raise _UnsupportedError(f"{__name__} does not implement it")
        signature = inspect.signature(function)
        try:
            if "window" in signature.parameters:
                attributes = {"window": _Window(**attributes)}
            signature.bind(*inputs, **attributes)
        except TypeError as error:
            raise _UnsupportedError(f"not supported: {error}") from error
        return function(*inputs, **attributes)

    def finish(self, output: _Value) -> fx.GraphModule:
        self._graph.output(self._tensor(output).node)
        self._graph.eliminate_dead_code()
        module = fx.GraphModule(nn.ModuleDict({"weights": self._weights}), self._graph)
        for taken_apart, fused in _FUSED:
            fx.replace_pattern(module, taken_apart, fused)
        return module.eval()

    def _weight(self, array: np.ndarray) -> fx.Proxy:
        self._weights.append(nn.Parameter(torch.tensor(array, dtype=torch.float32), requires_grad=False))
        return fx.Proxy(self._graph.get_attr(f"weights.{len(self._weights) - 1}"), self._tracer)

    def _tensor(self, value: _Value) -> Any:
        if isinstance(value, np.ndarray):
            return self._weight(value)
        if isinstance(value, _Layer):
            if value.drawn is None:
                bias = None if value.bias is None else self._weight(value.bias)
                value.drawn = value.call(value.x, self._weight(value.weight), bias)
            return value.drawn
        _require(isinstance(value, fx.Proxy), "an input that is no tensor of floats")
        return value

    def _operand(self, value: _Value) -> Any:
        """Constants of one element become numbers: nothing to load, no rounding to bf16."""
        return value.item() if isinstance(value, np.ndarray) and value.size == 1 else self._tensor(value)

    def _then(self, layer: _Value, scale: _Value, shift: _Value) -> _Layer | None:
        """The layer and `y * scale + shift` in one; None unless both are constants per output channel."""
        if not (self.may_fold and isinstance(layer, _Layer) and isinstance(scale, np.ndarray) and isinstance(shift, np.ndarray)):
            return None
        channels = layer.weight.shape[layer.channel_axis]
        per_channel = (channels,) + (1,) * layer.axes_after
        if not all(each.size == 1 or each.shape in (per_channel, (1, *per_channel)) for each in (scale, shift)):
            return None
        scale, shift = (np.broadcast_to(each.ravel(), channels) for each in (scale, shift))
        along_channels = [-1 if axis == layer.channel_axis else 1 for axis in range(layer.weight.ndim)]
        bias = (0.0 if layer.bias is None else layer.bias) * scale + shift
        return replace(layer, weight=layer.weight * scale.reshape(along_channels), bias=bias)

    def Add(self, a: _Value, b: _Value) -> Any:
        one = np.ones(1)
        return self._then(a, one, b) or self._then(b, one, a) or self._operand(a) + self._operand(b)

    def Mul(self, a: _Value, b: _Value) -> Any:
        zero = np.zeros(1)
        return self._then(a, b, zero) or self._then(b, a, zero) or self._operand(a) * self._operand(b)

    def BatchNormalization(self, x: _Value, *numbers: _Value, epsilon: float, momentum: float = 0.9, training_mode: int = 0) -> Any:
        _require(training_mode == 0, "training_mode=1")
        weight, bias, mean, variance = (_floats(value) for value in numbers)
        scale = weight / np.sqrt(variance + epsilon)
        folded = self._then(x, scale[:, None, None], (bias - mean * scale)[:, None, None])
        parameters = (self._weight(value) for value in (mean, variance, weight, bias) if folded is None)
        return folded or F.batch_norm(self._tensor(x), *parameters, eps=epsilon)  # type: ignore[misc, arg-type]

    def Conv(self, x: _Value, weight: _Value, bias: _Value = None, *, window: _Window) -> Any:
        kernel = _floats(weight)
        _require(kernel.ndim == 4 and list(window.dilations) == [1, 1], f"a kernel {kernel.shape} with {window}")
        padded, padding = replace(window, kernel_shape=kernel.shape[2:]).pad(self._tensor(x), fill=0.0)
        call = functools.partial(F.conv2d, stride=tuple(window.strides), padding=padding, groups=window.group)
        return _Layer(call, padded, kernel, None if bias is None else _floats(bias), channel_axis=0, axes_after=2)

    def ConvTranspose(self, x: _Value, weight: _Value, bias: _Value = None, *, window: _Window) -> Any:
        kernel = _floats(weight)
        plain = window.auto_pad == "NOTSET" and not any(window.pads) and list(window.dilations) == [1, 1] and window.group == 1
        _require(kernel.ndim == 4 and plain, f"a kernel {kernel.shape} with {window}")
        call = functools.partial(F.conv_transpose2d, stride=tuple(window.strides))
        return _Layer(call, self._tensor(x), kernel, None if bias is None else _floats(bias), channel_axis=1, axes_after=2)

    def MatMul(self, a: _Value, b: _Value) -> Any:
        if isinstance(b, np.ndarray) and b.ndim == 2:
            return _Layer(F.linear, self._tensor(a), b.T, None, channel_axis=0, axes_after=0)
        return torch.matmul(self._tensor(a), self._tensor(b))

    def AveragePool(self, x: _Value, *, window: _Window) -> Any:
        _require(window.auto_pad == "NOTSET" and not any(window.pads) and window.ceil_mode == 0, f"{window}")
        return F.avg_pool2d(self._tensor(x), list(window.kernel_shape), list(window.strides))

    def MaxPool(self, x: _Value, *, window: _Window) -> Any:
        _require(list(window.dilations) == [1, 1] and window.ceil_mode == 0, f"{window}")
        padded, padding = window.pad(self._tensor(x), fill=float("-inf"))
        return F.max_pool2d(padded, list(window.kernel_shape), list(window.strides), padding)

    def Resize(self, x: _Value, region: _Value, scales: _Value, **how: str) -> Any:
        factors = _floats(scales).tolist()
        whole = len(factors) == 4 and factors[:2] == [1, 1] and all(factor == int(factor) for factor in factors)
        floor = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        _require(whole and how == floor, f"{how} by {factors}")
        pixels = self._tensor(x)
        return F.interpolate(pixels, size=tuple(pixels.shape[axis] * int(factors[axis]) for axis in (2, 3)), mode="nearest-exact")

    def Softmax(self, x: _Value, *, axis: int) -> Any:
        scores = self._tensor(x)
        if self._opset < 13:  # over all axes from this one on
            return torch.softmax(scores.flatten(axis), -1).reshape(scores.shape)
        return torch.softmax(scores, axis)

    def Constant(self, *, value: onnx.TensorProto) -> Any:
        return _constant(value)

    def Identity(self, x: _Value) -> Any:
        return x

    def Cast(self, x: _Value, *, to: int) -> Any:
        _require(isinstance(x, _Sizes) and to in (onnx.TensorProto.INT32, onnx.TensorProto.INT64), "a cast of other than sizes")
        return x

    def Concat(self, *parts: _Value, axis: int) -> Any:
        sizes = [part.value for part in parts if isinstance(part, _Sizes) and isinstance(part.value, tuple)]
        if len(sizes) == len(parts):
            return _Sizes(sum(sizes, ()))
        return torch.cat([self._tensor(part) for part in parts], axis)

    def Reshape(self, x: _Value, sizes: _Value, *, allowzero: int = 0) -> Any:
        if not isinstance(sizes, _Sizes) or allowzero:
            raise _UnsupportedError("sizes that are a tensor, or allowzero=1, are not supported")
        if isinstance(x, _Sizes) and sizes.value == ():
            return x
        pixels = self._tensor(x)
        if isinstance(sizes.value, fx.Proxy):
            return pixels.reshape(sizes.value)
        # 0 keeps an axis as it is
        return pixels.reshape(
            [pixels.shape[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(sizes.value)]
        )

    def Slice(self, x: _Value, starts: _Value, ends: _Value, axes: _Value, steps: _Value = None) -> Any:
        bounds = _ints(starts) + _ints(ends) + ((1,) if steps is None else _ints(steps)) + _ints(axes)
        _require(len(bounds) == 4 and min(bounds) >= 0, f"starts, ends, steps, axes = {bounds}")
        if isinstance(x, _Sizes):
            _require(bounds[1] <= 8, f"end={bounds[1]} of a shape")
            return _Sizes(tuple(x.value[axis] for axis in range(*bounds[:3])))
        return self._tensor(x)[(*[slice(None)] * bounds[3], slice(*bounds[:3]))]

    def Squeeze(self, x: _Value, along: _Value = None, *, axes: Sequence[int] = ()) -> Any:
        return x if isinstance(x, _Sizes) else self._tensor(x).squeeze(tuple(axes or _ints(along)))

    def Unsqueeze(self, x: _Value, along: _Value = None, *, axes: Sequence[int] = ()) -> Any:
        which = tuple(axes or _ints(along))
        _require(len(which) == 1, f"axes={which}")
        return x if isinstance(x, _Sizes) else self._tensor(x).unsqueeze(which[0])
