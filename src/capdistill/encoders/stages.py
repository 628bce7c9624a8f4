"""The stages of a backbone: which are trained, which stay in evaluation mode, where to cut it.

Cutting a backbone before its first trained stage lets the output of the frozen ones be cached.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capdistill.errors import ConfigError
from capdistill.runtime import evaluating

Trainable = Literal["none", "all"] | int
Run = Callable[[nn.Module, Tensor], Tensor]  # a backbone and pixels (I, 3, S, S) to its output


def set_trainable(
    backbone: nn.Module, trainable: Trainable, stages: list[list[str]], name: str
) -> None:
    """Let exactly the chosen stages require a gradient.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> set_trainable(model, 1, [["0.weight", "0.bias"], ["1.weight", "1.bias"]], "two")
        >>> [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        ['1.weight', '1.bias']

    Args:
        backbone: The module.
        trainable: "none", the number of last stages, or "all".
        stages: Names of parameters, one list per stage, the stem first.
        name: Name of the backbone in messages.

    Raises:
        ConfigError: `trainable` is none of these, or exceeds the number of stages.
    """
    chosen = set(_last_stages(trainable, stages, name))
    for key, parameter in backbone.named_parameters():
        parameter.requires_grad_(key in chosen)


def _last_stages(trainable: Trainable, stages: list[list[str]], name: str) -> list[str]:
    if trainable == "none":
        return []
    if trainable == "all":
        return [key for stage in stages for key in stage]
    if isinstance(trainable, bool) or not isinstance(trainable, int):
        raise ConfigError(
            f"trainable is {trainable!r}; it must be 'none', 'all' or a number of last stages."
        )
    if not 0 <= trainable <= len(stages):
        raise ConfigError(
            f"trainable={trainable}, but '{name}' has {len(stages)} stages, its stem included. "
            f"Give 0 to {len(stages)}, or 'all'."
        )
    return [key for stage in stages[len(stages) - trainable :] for key in stage]


def child_stages(backbone: nn.Module, containers: Iterable[str] = ()) -> list[list[str]]:
    """One stage per child, and one per grandchild in the containers; names of parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
        >>> child_stages(model)
        [['0.weight', '0.bias'], ['2.weight', '2.bias']]

    Args:
        backbone: The module.
        containers: Names of children that hold stages themselves.
    """
    stages: dict[str, list[str]] = {}
    for key, _ in backbone.named_parameters():
        parts = key.split(".")
        stage = ".".join(parts[: 2 if parts[0] in containers else 1])
        stages.setdefault(stage, []).append(key)
    return list(stages.values())


def remove_unused(backbone: nn.Module, unused: Iterable[str]) -> None:
    """Remove children that do not contribute to the tokens (classifiers, poolings).

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(1, 1), "pool": nn.Linear(1, 1)})
        >>> remove_unused(model, ["pool.weight", "pool.bias"])
        >>> [key for key, _ in model.named_parameters()]
        ['body.weight', 'body.bias']

    Args:
        backbone: The module.
        unused: Names of parameters without effect on the tokens.
    """
    unused = frozenset(unused)
    for child, module in list(backbone.named_children()):
        keys = [f"{child}.{key}" for key, _ in module.named_parameters()]
        if keys and unused.issuperset(keys):
            backbone.set_submodule(child, nn.Identity())


def eval_where_frozen(module: nn.Module) -> None:
    """Put every part without a trained parameter in evaluation mode.

    In a module with frozen and trained children, a child without parameters (dropout) belongs to
    the frozen ones if it comes before the first trained child.

    Example:
        >>> model = nn.Sequential(
        ...     nn.BatchNorm1d(1).requires_grad_(False), nn.Dropout(), nn.Linear(1, 1), nn.Dropout()
        ... )
        >>> eval_where_frozen(model.train())
        >>> [part.training for part in model]
        [False, False, True, True]
    """
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and all(trained):
        return
    if not any(trained):
        module.eval()
        return
    module.training = False
    reached = False  # the first trained child
    for child in module.children():
        flags = [parameter.requires_grad for parameter in child.parameters()]
        if flags or not reached:
            eval_where_frozen(child)
        reached = reached or any(flags)


@dataclass(frozen=True)
class Cut:
    """A backbone in two: what runs before its first trained module, and the rest.

    `rest` runs the backbone's own code. Modules before the cut are replaced by placeholders of
    their output's shape, filled with NaN; at the cut the cached tensor takes over.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1).requires_grad_(False), nn.Conv2d(4, 2, 1))
        >>> cut = find_cut(model, lambda backbone, pixels: backbone(pixels), (3, 8, 8))
        >>> pixels = torch.rand(2, 3, 8, 8)
        >>> cached = cut.frozen(lambda backbone, pixels: backbone(pixels), model, pixels)
        >>> again = cut.rest(lambda backbone, pixels: backbone(pixels), model, cached)
        >>> cut.module, torch.equal(again, model(pixels))
        ('1', True)

    Args:
        module: Name of the first module after the cut.
        pixels: (3, S, S), shape of an image.
        skipped: Name of each module that `rest` skips -> its output: shapes (without I) for
            tensors, within tuples and lists where it returns these.
        after: Names of the modules that run after the cut began, `module` included.
        channels_last: Whether a map at the cut lies in memory with its channels last.
    """

    module: str
    pixels: tuple[int, ...]
    skipped: Mapping[str, Any] = field(default_factory=dict)
    after: frozenset[str] = frozenset()
    channels_last: bool = False

    def frozen(self, run: Run, backbone: nn.Module, pixels: Tensor) -> Tensor:
        """(I, 3, S, S) pixels to the input of `module`, (I, ...)."""
        try:
            run(_replace(backbone, {self.module: _Stop()}), pixels)
        except _Reached as reached:
            output = reached.output
            return output.permute(0, 2, 3, 1) if self.channels_last else output
        raise RuntimeError(f"The backbone never called '{self.module}'.")

    def rest(self, run: Run, backbone: nn.Module, cached: Tensor) -> Tensor:
        """The input of `module` to the backbone's output."""
        value = cached.permute(0, 3, 1, 2) if self.channels_last else cached
        parts: dict[str, nn.Module] = {
            name: _Skipped(backbone.get_submodule(name), output, value)
            for name, output in self.skipped.items()
        }
        parts[self.module] = _Resumed(backbone.get_submodule(self.module), value)
        return run(_replace(backbone, parts), _placeholder(_Shape(self.pixels), value))

    def is_frozen(self, key: str) -> bool:
        """Whether a parameter or buffer of that name is used before the cut."""
        return not any(key == name or key.startswith(f"{name}.") for name in self.after)


def find_cut(backbone: nn.Module, run: Run, pixels: tuple[int, ...]) -> Cut | None:
    """Where to cut a backbone whose last stages are trained; None if that is impossible.

    The backbone is run on two images of noise, in evaluation mode. A cut is accepted only if both
    parts together reproduce the output of the whole.
    """
    weight = next(backbone.parameters(), torch.zeros(()))
    noise = torch.randn(2, *pixels, generator=torch.Generator().manual_seed(0)).to(weight)
    with evaluating(backbone), torch.no_grad():
        calls, expected = _trace(backbone, run, noise)
        for name in _candidates(backbone, calls):
            cut = _cut_at(name, backbone, calls, pixels)
            if cut is not None and _holds(cut, run, backbone, noise, expected):
                return cut
    return None


@dataclass
class _Call:
    """A call of a module: the modules around it, its first input, the shapes of its output."""

    name: str
    callers: tuple[str, ...]
    input: Any
    output: Any = None
    ended_before: int = 0  # number of calls begun when this one ended


def _trace(backbone: nn.Module, run: Run, noise: Tensor) -> tuple[list[_Call], Tensor]:
    """Every call of a submodule, in order, and the backbone's output."""
    calls: list[_Call] = []
    running: list[_Call] = []

    def enter(name: str, arguments: tuple[Any, ...]) -> None:
        first = _layout_of(arguments[0]) if arguments else None
        running.append(_Call(name, tuple(call.name for call in running), first))
        calls.append(running[-1])

    def leave(output: Any) -> None:
        call = running.pop()
        call.output, call.ended_before = _shapes(output), len(calls)

    handles = []
    for name, module in backbone.named_modules():
        if name:
            handles += [
                module.register_forward_pre_hook(lambda _, args, name=name: enter(name, args)),
                module.register_forward_hook(lambda _, __, output: leave(output)),
            ]
    try:
        return calls, run(backbone, noise)
    finally:
        for handle in handles:
            handle.remove()


def _candidates(backbone: nn.Module, calls: list[_Call]) -> Iterator[str]:
    """The first trained module, then the modules that contain it, innermost first."""
    if any(parameter.requires_grad for parameter in backbone.parameters(recurse=False)):
        return
    for call in calls:
        module = backbone.get_submodule(call.name)
        flags = [parameter.requires_grad for parameter in module.parameters()]
        own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        if flags and (all(flags) or any(own)):
            yield from (call.name, *reversed(call.callers))
            return


def _cut_at(
    name: str, backbone: nn.Module, calls: list[_Call], pixels: tuple[int, ...]
) -> Cut | None:
    """A cut before the only call of a module; None if a trained part would be skipped."""
    index = next(i for i, call in enumerate(calls) if call.name == name)
    around = calls[index].callers
    level = [call for call in calls if set(call.callers) <= set(around) and call.name not in around]
    before = [call for call in level if 0 < call.ended_before <= index]
    after = [call.name for call in level if call not in before]
    if any(p.requires_grad for call in before for p in _parameters(backbone, call.name)):
        return None
    if after.count(name) > 1 or not isinstance(calls[index].input, str):
        return None
    once = [call for call in before if [each.name for each in level].count(call.name) == 1]
    skipped = {call.name: call.output for call in once if call.output is not None}
    return Cut(name, pixels, skipped, frozenset(after), calls[index].input == "channels last")


def _parameters(backbone: nn.Module, name: str) -> Iterator[nn.Parameter]:
    return backbone.get_submodule(name).parameters()


def _holds(cut: Cut, run: Run, backbone: nn.Module, noise: Tensor, expected: Tensor) -> bool:
    """Whether both parts reproduce the whole and no trained parameter is used before the cut."""
    try:
        with torch.enable_grad():
            cached = cut.frozen(run, backbone, noise)
        again = cut.rest(run, backbone, cached)
    except Exception:  # the placeholders do not work with this backbone's code
        return False
    if cached.requires_grad or again.shape != expected.shape:
        return False
    scale = float(expected.abs().max())
    return torch.allclose(again, expected, rtol=1e-4, atol=1e-5 * scale)  # never with a NaN


@dataclass(frozen=True)
class _Shape:
    """Shape of a tensor without its first axis."""

    rest: tuple[int, ...]


def _shapes(output: Any) -> Any:
    """Shapes of image-dependent outputs; None if a placeholder cannot replace the output."""
    if isinstance(output, Tensor):
        if output.ndim == 0 or len(output) != 2 or torch.equal(output[0], output[1]):
            return None
        return _Shape(tuple(output.shape[1:]))
    if type(output) in (tuple, list):
        parts = [part if isinstance(part, int) else _shapes(part) for part in output]
        return None if None in parts else type(output)(parts)
    if isinstance(output, torch.Size):
        return output
    return None


def _layout_of(argument: Any) -> str | None:
    """Memory format of an input; None if it is not a tensor with one row per image."""
    if not isinstance(argument, Tensor) or argument.ndim == 0 or len(argument) != 2:
        return None
    if argument.ndim != 4 or argument.is_contiguous():
        return "as it is"
    last = argument.is_contiguous(memory_format=torch.channels_last)
    return "channels last" if last else "as it is"


def _placeholder(output: Any, like: Tensor) -> Any:
    """NaN of the recorded shapes, one row per image, without allocating memory."""
    if isinstance(output, _Shape):
        return like.new_full((), math.nan).expand(len(like), *output.rest)
    if type(output) in (tuple, list):
        return type(output)([_placeholder(part, like) for part in output])
    return output


def _replace(backbone: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a backbone with other children; the rest is shared and the given one unchanged."""
    copies = {"": _shallow(backbone)}
    for name, part in parts.items():
        *path, last = name.split(".")
        parent = ""
        for key in path:
            inner = f"{parent}.{key}" if parent else key
            if inner not in copies:
                copies[inner] = _shallow(backbone.get_submodule(inner))
                copies[parent]._modules[key] = copies[inner]
            parent = inner
        copies[parent]._modules[last] = part
    return copies[""]


def _shallow(module: nn.Module) -> nn.Module:
    """A shallow copy: the same parameters, buffers, hooks and settings, a separate child list."""
    again = copy.copy(module)
    again._modules = dict(module._modules)
    return again


class _Reached(Exception):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class _Stop(nn.Module):
    def forward(self, value: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _Reached(value)


class _Stand(nn.Module):
    """A placeholder for a module that exposes the module's other attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


class _Skipped(_Stand):
    def __init__(self, module: nn.Module, output: Any, like: Tensor) -> None:
        super().__init__(module)
        self.__dict__["output"] = _placeholder(output, like)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.__dict__["output"]


class _Resumed(_Stand):
    def __init__(self, module: nn.Module, value: Tensor) -> None:
        super().__init__(module)
        self.__dict__["value"] = value

    def forward(self, _: Any, *others: Any, **options: Any) -> Any:
        return self.__dict__["module"](self.__dict__["value"], *others, **options)
