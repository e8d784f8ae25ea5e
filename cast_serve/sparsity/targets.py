"""A model -> which of its linears become sparse, and why each other linear stays dense."""

import re
from collections.abc import Iterable

from torch import nn

from cast_serve.sparsity.pattern import Pattern, PatternError

MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM, into one linear

# Attention and MLP projections are targets; embeddings, heads and routers stay dense.
DENSE_MODULES = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|router|gate)$")


def find_targets(
    model: nn.Module, pattern: Pattern, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Which linears of a model become sparse.

    Every linear inside the transformer's blocks is a target; embeddings, heads, classifiers and
    routers are not. A linear whose in_features has no whole groups (2:4) or words of 64 columns
    (any other pattern) stays dense.

    Args:
        model: any torch model; ``nn.Linear`` and GPT-2's ``Conv1D`` count as linears.
        include: regular expressions searched in the module's name; if given, only these are
            targets.
        exclude: regular expressions; what they match stays dense.

    Returns:
        targets by module name, and the reason by module name for each linear left dense.

    Raises:
        PatternError: if an included linear cannot have the pattern, or nothing is a target.
    """
    include, exclude = list(include), list(exclude)
    targets: dict[str, nn.Module] = {}
    dense: dict[str, str] = {}
    for name, module in model.named_modules():
        is_conv1d = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or is_conv1d):
            continue
        in_features = module.weight.shape[0 if is_conv1d else 1]
        named = any(re.search(expression, name) for expression in include)
        if any(re.search(expression, name) for expression in exclude):
            dense[name] = "excluded"
        elif (include and not named) or (not include and DENSE_MODULES.search(name)):
            dense[name] = "not a target"
        elif in_features % pattern.columns:
            reason = f"in_features {in_features} is not a multiple of {pattern.columns}"
            if named:
                raise PatternError(f"{name} is named as a target, but its {reason}")
            dense[name] = reason
        else:
            targets[name] = module
    if not targets:
        raise PatternError(
            f"no linear of the model can be {pattern}: {dense or 'it has no linears'}"
        )
    return targets, dense


def not_by_vllm(targets: Iterable[str], dense: Iterable[str]) -> str | None:
    """Why vLLM cannot load the model: linears that it merges with a target stay dense.

    Args:
        targets: module names.
        dense: those of the other linears.

    Returns:
        a warning that names one; None if there is none.
    """
    found = []
    sparse = set(targets)
    for name in dense:
        parent, dot, last = name.rpartition(".")
        for merged in MERGED:
            if last in merged and any(f"{parent}{dot}{other}" in sparse for other in merged):
                found.append(name)
    if not found:
        return None
    return (
        "vLLM will not load the result: it merges q, k and v, and gate and up, and here "
        f"{len(found)} of them stay dense beside sparse ones, such as {min(found)}; include or "
        "exclude them together"
    )


def check_expressions(expressions: Iterable[str]) -> None:
    """Refuses what `find_targets` cannot search names for.

    Raises:
        PatternError: naming the expression.
    """
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise PatternError(f"{expression!r} is not a regular expression: {error}") from None
