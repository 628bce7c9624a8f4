"""Which part of a backbone is trained, and what the rest does meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from capdistill.errors import ConfigError

Trainable = Literal["none", "all"] | int


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
        stages: Names of parameters, a list a stage, the stem first.
        name: How messages call the backbone.

    Raises:
        ConfigError: `trainable` is none of these, or more stages than there are.
    """
    chosen = set(_last_stages(trainable, stages, name))
    for key, parameter in backbone.named_parameters():
        parameter.requires_grad_(key in chosen)


def eval_where_frozen(module: nn.Module) -> None:
    """Eval mode for every part without a trained parameter: statistics, drop-out, drop-path.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1).requires_grad_(False), nn.BatchNorm1d(1))
        >>> eval_where_frozen(model.train())
        >>> [part.training for part in model]
        [False, True]
    """
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and all(trained):
        return
    if not any(trained):
        module.eval()
        return
    module.training = False
    for child in module.children():
        eval_where_frozen(child)


def remove_unused(backbone: nn.Module, unused: Iterable[str]) -> None:
    """Take out children that make no tokens (classifiers, poolings), so that counts are true.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(1, 1), "pool": nn.Linear(1, 1)})
        >>> remove_unused(model, ["pool.weight", "pool.bias"])
        >>> [key for key, _ in model.named_parameters()]
        ['body.weight', 'body.bias']

    Args:
        backbone: The module.
        unused: Names of parameters that do not act on the tokens.
    """
    unused = frozenset(unused)
    for child, module in list(backbone.named_children()):
        keys = [f"{child}.{key}" for key, _ in module.named_parameters()]
        if keys and unused.issuperset(keys):
            backbone.set_submodule(child, nn.Identity())


def child_stages(backbone: nn.Module, containers: Iterable[str] = ()) -> list[list[str]]:
    """A stage a child, and a stage a grandchild in the containers; names of parameters.

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
