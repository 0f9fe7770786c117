"""Training of the reliability network: a small perceptron fitted by Adam in plain numpy, written as ONNX.

Everything follows from the examples and the seed: the same input gives the same file, byte for byte, on one machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.payloads.realbogus import N_INPUTS, symmetries
from cumbre.stores.files import write_atomic

Floats = NDArray[np.float64]
HIDDEN = (64, 32)
IMPORTANCE = {"bright-star residual": 4.0, "galaxy residual": 4.0}
"""Classes that a night has many times more of than the examples: residuals of stars against stars that varied."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Labelled detections.

    Attributes
    ----------
    inputs
        float32 (n, N_INPUTS).
    is_real
        bool (n,).
    what
        Kind or class of each, text (n,).
    snr
        Of the detection.
    weight
        Relative to the other examples of the same class.
    """

    inputs: NDArray[np.float32]
    is_real: NDArray[np.bool_]
    what: NDArray[Any]
    snr: Floats
    weight: Floats

    def __len__(self) -> int:
        return len(self.is_real)


def joined(parts: list[Examples]) -> Examples:
    """All examples as one."""
    return Examples(*(np.concatenate([getattr(part, name) for part in parts]) for name in Examples.__slots__))


@dataclass(slots=True)
class Network:
    """Layers of weights (inputs, outputs) and biases; tanh between them, a logit at the end."""

    mean: Floats
    scale: Floats
    weights: list[Floats]
    biases: list[Floats]

    def logit(self, inputs: NDArray[Any]) -> Floats:
        """Logit of each row, one orientation."""
        x = (np.asarray(inputs, np.float64) - self.mean) / self.scale
        for k, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ w + b
            if k < len(self.weights) - 1:
                x = np.tanh(x)
        return np.asarray(x[:, 0])

    def scores(self, inputs: NDArray[np.float32]) -> Floats:
        """Reliability, mean logit over the eight orientations."""
        if len(inputs) == 0:
            return np.zeros(0)
        mean = np.mean([self.logit(inputs[:, index]) for index in symmetries()], axis=0)
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(mean, -50, 50))))


def balanced(examples: Examples) -> Floats:
    """Weights that give real and false, bright and faint, and each class within them, its say."""
    out = np.zeros(len(examples))
    bright = examples.snr > 8
    for real in (True, False):
        for light in (True, False):
            group = (examples.is_real == real) & (bright == light)
            for what in sorted(set(examples.what[group].tolist())):
                mine = group & (examples.what == what)
                # The root: a class of many examples counts more, but not in proportion.
                out[mine] = examples.weight[mine] / np.sqrt(max(float(examples.weight[mine].sum()), 1.0))
            if group.any():
                out[group] /= out[group].sum()
    for what, factor in IMPORTANCE.items():
        out[examples.what == what] *= factor
    return out / out.mean()


def fit(
    examples: Examples,
    *,
    seed: int = 1,
    epochs: int = 60,
    batch: int = 256,
    rate: float = 2e-3,
    decay: float = 2e-4,
    smoothing: float = 0.01,
) -> Network:
    """Fit the network.

    Parameters
    ----------
    seed
        Of the first weights, the order of batches and the orientations.
    rate, decay
        Adam's first step size (it falls as a cosine) and the decay of the weights.
    smoothing
        How far the targets are from 0 and 1.
    """
    rng = np.random.default_rng(seed)
    x = np.asarray(examples.inputs, np.float64)
    target = np.where(examples.is_real, 1 - smoothing, smoothing)
    importance = balanced(examples)
    turns = symmetries()
    # Cells that the orientations exchange share their scale.
    every = np.concatenate([x[:, index] for index in turns])
    mean, scale = every.mean(axis=0), every.std(axis=0) + 0.05
    sizes = (N_INPUTS, *HIDDEN, 1)
    weights = [rng.normal(0, np.sqrt(1.0 / a), (a, b)) for a, b in pairwise(sizes)]
    biases = [np.zeros(b) for b in sizes[1:]]
    weights[-1] *= 0.1
    parameters = [*weights, *biases]
    first, second = ([np.zeros_like(p) for p in parameters] for _ in range(2))
    averaged = [p.copy() for p in parameters]
    steps = epochs * max(len(x) // batch, 1)
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(x))
        which = rng.integers(0, len(turns), len(x))
        for start in range(0, len(x) - batch + 1, batch) if len(x) >= batch else [0]:
            rows = order[start : start + batch]
            a = [(np.take_along_axis(x[rows], turns[which[rows]], axis=1) - mean) / scale]
            for k in range(len(weights)):
                z = a[-1] @ weights[k] + biases[k]
                a.append(np.tanh(z) if k < len(weights) - 1 else z)
            p = 1.0 / (1.0 + np.exp(-np.clip(a[-1][:, 0], -50, 50)))
            delta = (importance[rows] * (p - target[rows]) / len(rows))[:, None]
            slopes_w: list[Floats] = []
            slopes_b: list[Floats] = []
            for k in reversed(range(len(weights))):
                slopes_w.insert(0, a[k].T @ delta)
                slopes_b.insert(0, delta.sum(axis=0))
                if k:
                    delta = (delta @ weights[k].T) * (1 - a[k] ** 2)
            step += 1
            size = rate * 0.5 * (1 + np.cos(np.pi * step / (steps + 1)))
            for k, slope in enumerate([*slopes_w, *slopes_b]):
                first[k] += 0.1 * (slope - first[k])
                second[k] += 0.001 * (slope**2 - second[k])
                move = first[k] / (1 - 0.9**step) / (np.sqrt(second[k] / (1 - 0.999**step)) + 1e-8)
                if k < len(weights):
                    parameters[k] *= 1 - size * decay * 10
                parameters[k] -= size * move
            if step > steps // 2:
                share = 1.0 / (step - steps // 2)
                for k, parameter in enumerate(parameters):
                    averaged[k] += share * (parameter - averaged[k])
    n = len(weights)
    return Network(mean, scale, averaged[:n], averaged[n:])


def export(network: Network, path: Path, about: dict[str, Any]) -> None:
    """Write the network as ONNX, and what it is beside it as JSON.

    The standardisation is folded into the first layer. Both files appear by rename.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = [w.copy() for w in network.weights]
    biases = [b.copy() for b in network.biases]
    biases[0] -= (network.mean / network.scale) @ weights[0]
    weights[0] /= network.scale[:, None]
    nodes, constants, name = [], [], "inputs"
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        constants += [
            numpy_helper.from_array(w.astype(np.float32), f"w{k}"),
            numpy_helper.from_array(b.astype(np.float32), f"b{k}"),
        ]
        last = k == len(weights) - 1
        out = "logit" if last else f"z{k}"
        nodes.append(helper.make_node("Gemm", [name, f"w{k}", f"b{k}"], [out], name=f"layer{k}"))
        if not last:
            nodes.append(helper.make_node("Tanh", [out], [f"a{k}"], name=f"tanh{k}"))
            name = f"a{k}"
    graph = helper.make_graph(
        nodes,
        "reliability",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["n", N_INPUTS])],
        [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["n", 1])],
        constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="cumbre", ir_version=9
    )
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in (
        (path, model.SerializeToString(deterministic=True)),
        (path.with_suffix(".json"), (json.dumps({"inputs": N_INPUTS, **about}, indent=1) + "\n").encode()),
    ):
        write_atomic(target, content)


def curves(examples: Examples, scores: Floats) -> dict[str, Any]:
    """Part of each class with at least a given score, at 21 thresholds; per class its number."""
    out: dict[str, Any] = {}
    thresholds = np.linspace(0, 1, 21)
    for real in (True, False):
        for what in sorted(set(examples.what[examples.is_real == real].tolist())):
            mine = scores[(examples.what == what) & (examples.is_real == real)]
            out[str(what)] = {
                "is_real": real,
                "n": len(mine),
                "at_least": [round(float((mine >= t).mean()), 4) for t in thresholds],
            }
    return {"thresholds": [round(float(t), 2) for t in thresholds], "classes": out}
