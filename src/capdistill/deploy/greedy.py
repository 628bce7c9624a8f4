"""The whole of greedy decoding as one ONNX graph, made of the other two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capdistill.errors import ConfigError
from capdistill.generation.config import GenerationSpec

_IMPOSSIBLE = -1e9  # as in greedy decoding by torch: above a banned word, below any other
_OUTER, _BODY = "encoder/", "step/"  # prefixes of the names in the two graphs
_OWN = "greedy/"  # of those in the body that are made here: the step may use any name


def write_greedy(encoder: Path, step: Path, path: Path, spec: GenerationSpec, pad_id: int) -> None:
    """Write a graph from `images` (I, 3, S, S) to `ids` (I, T): T words, at most `max_length`.

    A caption ends with the end token, and is padded behind it where others are longer. The graph
    stops after the longest caption. It holds the weights of both graphs again. A second output,
    `finite` (I,), is false for an image whose logits became NaN or infinite: it has no caption, and
    its ids are padding from there.

    Args:
        encoder, step: The two graphs, in float32 or int8.
        path: The file to write.
        spec: Limit, special tokens and banned ids. Every constraint must hold in every step.
        pad_id: Fills the rows of captions that are over.
    """
    import onnx

    first = onnx.compose.add_prefix(onnx.load(encoder), _OUTER)
    body = onnx.compose.add_prefix(onnx.load(step), _BODY)
    graph = _outer_graph(first.graph, _body_graph(body.graph, spec, pad_id), spec)
    opsets = {each.domain: each for each in (*first.opset_import, *body.opset_import)}
    model = onnx.helper.make_model(
        graph, opset_imports=[*opsets.values()], ir_version=first.ir_version
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)


def require_plain(spec: GenerationSpec) -> None:
    """Refuse options that the graph does not apply.

    Raises:
        ConfigError: one of them is set; the message names it.
    """
    config = spec.config
    given = {
        "sample": config.sample,
        "min_length": config.min_length,
        "no_repeat_ngram": config.no_repeat_ngram,
        "not_last": spec.not_last,
        "prefix": spec.prefix,
        "banned_words (of several tokens)": spec.phrases or spec.subwords,
    }
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"export: greedy=True writes a graph that knows max_length, allow_unknown and "
                f"banned words of one token, but generation has {name}. Leave it out, or export "
                "without greedy=True: encoder.onnx and step.onnx serve every option."
            )


def _outer_graph(first: Any, body: Any, spec: GenerationSpec) -> Any:
    from onnx import TensorProto, helper

    nodes, constants = [*first.node], [*first.initializer]
    outputs = {each.name.removeprefix(_OUTER): each for each in first.output}
    constants.append(_constant("one", np.array([1])))
    for name in outputs:
        kind, source = ("Unsqueeze", ["one"]) if name.startswith("state_") else ("Identity", [])
        target = f"{_BODY}{name}" if _BODY + name not in _names(body.input) else f"first/{name}"
        nodes.append(helper.make_node(kind, [f"{_OUTER}{name}", *source], [target]))
    images = first.input[0]
    count = ["count", "one"]
    constants += [
        _constant("limit", np.array(spec.max_length)),
        _constant("going", np.array(True)),
        _constant("start", np.array([[spec.start_id]])),
        _constant("open", np.array([[False]])),
        _constant("all_finite", np.array([[True]])),
    ]
    nodes += [
        helper.make_node("Shape", [images.name], ["count"], start=0, end=1),
        helper.make_node("Concat", count, ["rows"], axis=0),
        helper.make_node("Expand", ["start", "rows"], ["first/tokens"]),
        helper.make_node("Expand", ["open", "rows"], ["first/done"]),
        helper.make_node("Expand", ["all_finite", "rows"], ["first/finite"]),
    ]
    carried = [each.name.split("/", 1)[1] for each in body.input[2:]]
    last = [f"last/{name}" for name in carried]
    loop = ["limit", "going", *(f"first/{name}" for name in carried)]
    nodes += [
        helper.make_node("Loop", loop, [*last, "by_word"], body=body),  # (T, I)
        helper.make_node("Transpose", ["by_word"], ["ids"], perm=[1, 0]),
        helper.make_node("Squeeze", ["last/finite", "one"], ["finite"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["images", "words"])
    finite = helper.make_tensor_value_info("finite", TensorProto.BOOL, ["images"])
    graph = helper.make_graph(nodes, "greedy", [images], [ids, finite], constants)
    _rename(graph, images.name, "images")
    return graph


def _body_graph(step: Any, spec: GenerationSpec, pad_id: int) -> Any:
    """One word: its inputs are the number of words, a flag, and what the loop carries."""
    from onnx import TensorProto, helper

    inputs = {each.name.removeprefix(_BODY): each for each in step.input}
    changed = [each.name.removeprefix(f"{_BODY}next_") for each in step.output[1:]]
    vocabulary = step.output[0].type.tensor_type.shape.dim[-1].dim_value
    banned = np.isin(np.arange(vocabulary), spec.banned)
    values = {
        "banned": banned,
        "never": np.array(-np.inf, np.float32),
        "floor": np.array(_IMPOSSIBLE, np.float32),
        "end": np.array(spec.end_id),
        "pad": np.array(pad_id),
        "beam": np.array([1]),
        "last_axis": np.array([-1]),
    }
    constants = [_constant(_OWN + name, value) for name, value in values.items()]

    nodes = [
        *step.node,
        *_finite_nodes(),
        _node("LogSoftmax", ["logits"], "log_probs", axis=-1),  # (I, 1, V)
        _node("Clip", ["log_probs", "floor"], "floored"),
        _node("Where", ["banned", "never", "floored"], "allowed"),
        _node("ArgMax", ["allowed"], "word", axis=-1, keepdims=0),  # (I, 1), the first of equals
        _node("Where", ["silent", "pad", "word"], "shown"),
        _node("Squeeze", ["shown", "beam"], "id"),  # (I,)
        _node("Equal", ["word", "end"], "ends"),
        _node("Or", ["silent", "ends"], "next_done"),
        _node("Not", ["next_done"], "open"),
        _node("Cast", ["open"], "count", to=TensorProto.INT32),
        _node("ReduceMax", ["count"], "most", keepdims=0),
        _node("Cast", ["most"], "next_going", to=TensorProto.BOOL),
    ]
    flag = helper.make_tensor_value_info
    going = [flag(f"{_OWN}{name}", TensorProto.BOOL, []) for name in ("going", "next_going")]
    kept = [flag(f"{_OWN}{name}", TensorProto.BOOL, None) for name in ("done", "finite")]
    new = [flag(f"{_OWN}next_{name}", TensorProto.BOOL, None) for name in ("done", "finite")]
    shown, id_ = (flag(f"{_OWN}{name}", TensorProto.INT64, None) for name in ("shown", "id"))
    carried = [inputs["tokens"], *kept, *(inputs[name] for name in changed)]
    given = [inputs["position"], going[0], *carried]
    made = [going[1], shown, *new, *step.output[1:], id_]
    for each in (*carried, *step.output[1:]):
        each.type.tensor_type.ClearField("shape")  # caches grow
    return helper.make_graph(nodes, "word", given, made, [*step.initializer, *constants])


def _finite_nodes() -> list[Any]:
    """`finite` becomes false where the logits of a caption that goes on are NaN or infinite."""
    from onnx import TensorProto

    return [
        _node("IsNaN", ["logits"], "nan"),
        _node("Cast", ["nan"], "nan_count", to=TensorProto.INT32),
        _node("ReduceMax", ["nan_count", "last_axis"], "any_nan", keepdims=0),  # (I, 1)
        _node("Cast", ["any_nan"], "has_nan", to=TensorProto.BOOL),
        _node("ReduceMax", ["logits", "last_axis"], "top", keepdims=0),
        _node("IsInf", ["top"], "infinite"),  # one logit is +inf, or all are -inf
        _node("Or", ["has_nan", "infinite"], "wrong"),
        _node("Not", ["done"], "reads"),
        _node("And", ["reads", "wrong"], "breaks"),
        _node("Not", ["breaks"], "holds"),
        _node("And", ["finite", "holds"], "next_finite"),
        _node("Or", ["done", "breaks"], "silent"),
    ]


def _node(kind: str, given: Sequence[str], made: str, **attributes: Any) -> Any:
    """A node of the body that reads the step's logits, or what is made here."""
    from onnx import helper

    names = [(_BODY if name == "logits" else _OWN) + name for name in given]
    return helper.make_node(kind, names, [_OWN + made], **attributes)


def _constant(name: str, value: np.ndarray[Any, Any]) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(value, name)


def _names(values: Sequence[Any]) -> set[str]:
    return {each.name for each in values}


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
    graph.input[0].name = new
