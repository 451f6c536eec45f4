"""What the coverage table says of a model's graph: its stages, its plan, which recipes fit."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

import nlsurgery
from benchmarks.coverage_models import Entry, build
from nlsurgery.resolve import resolve
from nlsurgery.stages import Anatomy

BLOCK = {"type": "non_local", "reduction": 2, "sub_sample": False, "norm": "bn"}


def chosen_recipe(anatomy: Anatomy) -> tuple[str, dict[str, Any]]:
    """The five-block recipe where res3 and res4 are long enough, else its form by depth.

    Returns:
        ``"five"`` or ``"depth"``, and the recipe.
    """
    named = {alias: stage for stage in anatomy.stages for alias in stage.aliases}
    deep = all(place in named for place in ("res3", "res4"))
    if deep and len(named["res3"].blocks) > 3 and len(named["res4"].blocks) > 5:
        return "five", _recipe(("res3", [1, 3]), ("res4", [1, 3, 5]))
    counts = [len(stage.blocks) for stage in anatomy.stages]
    names = [stage.name for stage in anatomy.stages]
    if len(counts) > 2:
        return "depth", _recipe((names[-3], {"depth": 0.5}), (names[-2], {"depth": 1.0}))
    longest = max(range(len(counts)), key=counts.__getitem__)
    fractions = (0.2, 0.35, 0.5, 0.65, 0.8)
    numbers = sorted({max(0, int(counts[longest] * fraction) - 1) for fraction in fractions})
    return "depth", _recipe((names[longest], numbers))


def _recipe(*places: tuple[str, Any]) -> dict[str, Any]:
    inserts = [{"stage": stage, "after": after, "block": BLOCK} for stage, after in places]
    return {"version": 1, "inserts": inserts}


def check_graph(entry: Entry) -> dict[str, Any]:
    """inspect, plan with its rehearsal, which packaged recipes fit, and what the library says itself."""
    row: dict[str, Any] = {}
    clock = time.process_time()
    model = build(entry)
    row["build_s"] = round(time.process_time() - clock, 3)
    row["params"] = sum(p.numel() for p in model.parameters())
    clock = time.process_time()
    anatomy = nlsurgery.inspect(model)
    row["inspect_s"] = round(time.process_time() - clock, 3)
    row["input_size"] = list(anatomy.input_size)
    row["layout"] = "/".join(dict.fromkeys(stage.layout for stage in anatomy.stages))
    row["stages"] = [
        [s.name, s.fqn, s.num_chs, s.reduction, s.layout, len(s.blocks)] for s in anatomy.stages
    ]
    row["form"], recipe = chosen_recipe(anatomy)
    clock = time.process_time()
    plan = nlsurgery.plan(model, recipe)
    row["plan_s"] = round(time.process_time() - clock, 3)
    row["plan"] = "yes"
    row["blocks"] = len(plan.insertions)
    row["recipes"] = _fitting(anatomy)
    row["hints"] = _compare_with_hints(model, anatomy)
    return row


def _fitting(anatomy: Anatomy) -> list[str]:
    fits = []
    for name in nlsurgery.list_recipes():
        recipe = nlsurgery.load_recipe(name)
        if recipe.output_stride is not None:
            continue
        try:
            resolve(anatomy, recipe)
        except nlsurgery.RecipeError:
            continue
        fits.append(name)
    return fits


def _compare_with_hints(model: nn.Module, anatomy: Anatomy) -> str:
    """Compare stages with timm's feature_info by (channels, reduction); stems and heads aside."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple) or not anatomy.stages:
        return "none"
    found = {(stage.num_chs, stage.reduction) for stage in anatomy.stages}
    lowest = min(reduction for _, reduction in found)
    missing = [
        f"{e.get('module')} ({e.get('num_chs')} chs, /{e.get('reduction')})"
        for e in entries
        if isinstance(e, dict)
        and e.get("reduction", 0) >= lowest
        and (e.get("num_chs"), e.get("reduction")) not in found
    ]
    return "yes" if not missing else "differs: " + ", ".join(dict.fromkeys(missing))
