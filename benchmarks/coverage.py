"""quick sweep (first draft)"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nlsurgery
from benchmarks.coverage_models import all_models, build, select

DEPTHS = [0.3, 0.4, 0.5, 0.6, 0.75]


def depth_recipe(anatomy):
    n = [len(s.blocks) for s in anatomy.stages]
    block = {"type": "non_local", "reduction": 2, "sub_sample": False, "norm": "bn"}
    names = {a: s for s in anatomy.stages for a in s.aliases}
    if (
        "res3" in names
        and "res4" in names
        and len(names["res3"].blocks) >= 4
        and len(names["res4"].blocks) >= 6
    ):
        return "five", {
            "version": 1,
            "inserts": [
                {"stage": "res3", "after": [1, 3], "block": block},
                {"stage": "res4", "after": [1, 3, 5], "block": block},
            ],
        }
    ins = []
    if len(n) >= 3:
        ins = [
            {"stage": -3, "after": {"depth": [0.5]}, "block": block},
            {"stage": -2, "after": {"depth": [0.5, 1.0] if n[-2] > 1 else [1.0]}, "block": block},
        ]
    else:
        k = max(range(len(n)), key=lambda i: n[i])
        fr = sorted({max(1, int(n[k] * d)) for d in DEPTHS})
        ins = [{"stage": anatomy.stages[k].name, "after": [f - 1 for f in fr], "block": block}]
    return "depth", {"version": 1, "inserts": ins}


class TO(Exception):
    pass


def alarm(*a):
    raise TO()


def info(model):
    fi = getattr(model, "feature_info", None)
    e = getattr(fi, "info", fi)
    return (
        [(d.get("module"), d.get("num_chs"), d.get("reduction")) for d in e]
        if isinstance(e, (list, tuple))
        else None
    )


def one(entry, limit):
    row = {"spec": entry.spec, "family": entry.family}
    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(limit)
    try:
        t = time.time()
        m = build(entry)
        row["build_s"] = round(time.time() - t, 3)
        row["class"] = type(m).__module__ + "." + type(m).__name__
        row["params"] = sum(p.numel() for p in m.parameters())
        row["info"] = info(m)
        t = time.time()
        a = nlsurgery.inspect(m)
        row["inspect_s"] = round(time.time() - t, 3)
        row["input"] = a.input_size
        row["second"] = a.tree.probe.second is not None
        row["prefix"] = a.tree.probe.prefix
        row["stages"] = [
            (
                s.name,
                s.fqn,
                s.num_chs,
                s.reduction,
                s.layout,
                s.feature_size,
                len(s.blocks),
                [x for x in s.aliases if x.startswith("res")],
            )
            for s in a.stages
        ]
        kind, r = depth_recipe(a)
        row["kind"] = kind
        t = time.time()
        p = nlsurgery.plan(m, r)
        row["plan_s"] = round(time.time() - t, 3)
        row["hosts"] = [i.fqn for i in p.insertions]
        row["ok"] = True
    except TO:
        row["error"] = "timeout"
    except Exception as e:
        row["error"] = f"{type(e).__name__}: {e}"[:600]
    finally:
        signal.alarm(0)
    return row


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--sample", default="family")
    ap.add_argument("--pattern", default="*")
    ap.add_argument("--out", default="/tmp/cover.jsonl")
    ap.add_argument("--part", default="0/1")
    a = ap.parse_args()
    torch.set_num_threads(1)
    done = set()
    if os.path.exists(a.out):
        done = {json.loads(l)["spec"] for l in open(a.out)}
    i, n = map(int, a.part.split("/"))
    import hashlib

    todo = sorted(
        select(all_models(), a.sample, pattern=a.pattern),
        key=lambda e: hashlib.md5(e.spec.encode()).digest(),
    )[i::n]
    with open(a.out, "a") as f:
        for e in todo:
            if e.spec in done:
                continue
            f.write(json.dumps(one(e, 120)) + "\n")
            f.flush()
            gc.collect()
