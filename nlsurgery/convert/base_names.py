"""The backbones' own parameters: other projects' ResNet names to torchvision's, and back.

Every function maps one key, and gives ``None`` for what a torchvision-like ResNet does not have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Rules = Sequence[tuple[re.Pattern[str], str]]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), new) for pattern, new in pairs)


def _first(rules: Rules, key: str) -> str | None:
    for pattern, new in rules:
        if pattern.fullmatch(key):
            return pattern.sub(new, key)
    return None


def _shifted(key: str | None, by: int) -> str | None:
    """Renumber ``layer<n>`` (or ``s<n>``, ``res<n>``) by ``by``."""
    if key is None:
        return None
    return re.sub(
        r"^(layer|s|res)(\d+)(?=[._])", lambda match: f"{match[1]}{int(match[2]) + by}", key
    )


_MMDET_HEAD = _rules((r"(?:head|cls_head)\.fc(?:_cls)?\.(weight|bias)", r"fc.\1"))


def mmdet_to_ours(key: str) -> str | None:
    """mmdet, mmpretrain, mmseg: torchvision's names behind ``backbone.``."""
    if key.startswith("backbone."):
        return key.removeprefix("backbone.")
    if re.match(r"(conv1|bn1|layer\d+|fc)\.", key):
        return key
    return _first(_MMDET_HEAD, key)


def mmdet_from_ours(key: str) -> str | None:
    """The other way; the classifier is mmpretrain's."""
    return f"head.{key}" if key.startswith("fc.") else f"backbone.{key}"


_MMACTION = _rules(
    (r"(.*\.)?downsample\.conv\.(.*)", r"\1downsample.0.\2"),
    (r"(.*\.)?downsample\.bn\.(.*)", r"\1downsample.1.\2"),
    (r"(.*\.)?conv(\d)\.conv\.(?:net\.)?(.*)", r"\1conv\2.\3"),
    (r"(.*\.)?conv(\d)\.bn\.(.*)", r"\1bn\2.\3"),
)


def mmaction_to_ours(key: str) -> str | None:
    """mmaction2: ``convK.conv``, ``convK.bn``; TSM's ``.block.`` and ``.net.`` go."""
    inner = mmdet_to_ours(key)
    if inner is None:
        return None
    inner = re.sub(r"^(layer\d+\.\d+)\.block\.", r"\1.", inner)
    return _first(_MMACTION, inner) or inner


_MMACTION_BACK = _rules(
    (r"fc\.(.*)", r"cls_head.fc_cls.\1"),
    (r"(.*\.)?downsample\.0\.(.*)", r"backbone.\1downsample.conv.\2"),
    (r"(.*\.)?downsample\.1\.(.*)", r"backbone.\1downsample.bn.\2"),
    (r"(.*\.)?conv(\d)\.(.*)", r"backbone.\1conv\2.conv.\3"),
    (r"(.*\.)?bn(\d)\.(.*)", r"backbone.\1conv\2.bn.\3"),
)


def mmaction_from_ours(key: str) -> str | None:
    """The other way, ResNet3d's names."""
    return _first(_MMACTION_BACK, key)


_SLOWFAST = _rules(
    (r"s1\.pathway0_stem\.conv\.(.*)", r"conv1.\1"),
    (r"s1\.pathway0_stem\.bn\.(.*)", r"bn1.\1"),
    (r"s(\d)\.pathway0_res(\d+)\.branch1\.(.*)", r"layer\1.\2.downsample.0.\3"),
    (r"s(\d)\.pathway0_res(\d+)\.branch1_bn\.(.*)", r"layer\1.\2.downsample.1.\3"),
    (r"s(\d)\.pathway0_res(\d+)\.branch2\.a\.(.*)", r"layer\1.\2.conv1.\3"),
    (r"s(\d)\.pathway0_res(\d+)\.branch2\.b\.(.*)", r"layer\1.\2.conv2.\3"),
    (r"s(\d)\.pathway0_res(\d+)\.branch2\.c\.(.*)", r"layer\1.\2.conv3.\3"),
    (r"s(\d)\.pathway0_res(\d+)\.branch2\.a_bn\.(.*)", r"layer\1.\2.bn1.\3"),
    (r"s(\d)\.pathway0_res(\d+)\.branch2\.b_bn\.(.*)", r"layer\1.\2.bn2.\3"),
    (r"s(\d)\.pathway0_res(\d+)\.branch2\.c_bn\.(.*)", r"layer\1.\2.bn3.\3"),
    (r"head\.projection\.(.*)", r"fc.\1"),
)
_LETTERS = {"1": "a", "2": "b", "3": "c"}


def slowfast_to_ours(key: str) -> str | None:
    """SlowFast's first pathway; the fast pathway and the fusions have no place."""
    return _shifted(_first(_SLOWFAST, key), -1)


def slowfast_from_ours(key: str) -> str | None:
    """The other way, as ``pathway0``."""
    if (match := re.fullmatch(r"(conv|bn)1\.(.*)", key)) is not None:
        return f"s1.pathway0_stem.{match[1]}.{match[2]}"
    if (match := re.fullmatch(r"fc\.(.*)", key)) is not None:
        return f"head.projection.{match[1]}"
    found = re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.*)", key)
    if found is None:
        return None
    stage, block, part, number, name = found.groups()
    if part == "downsample.":
        inner = "branch1" if number == "0" else "branch1_bn"
    else:
        inner = f"branch2.{_LETTERS[number]}" + ("_bn" if part == "bn" else "")
    return f"s{int(stage) + 1}.pathway0_res{block}.{inner}.{name}"


#: caffe2's blob endings, of convolutions and of BatchNorms.
_BLOB_BN = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_BLOB_CONV = {"w": "weight", "b": "bias"}


def caffe2_to_ours(key: str) -> str | None:
    """video-nonlocal-net's blobs; momenta, learning rates and counters have no place."""
    if (match := re.fullmatch(r"pred_([wb])", key)) is not None:
        return f"fc.{_BLOB_CONV[match[1]]}"
    if (match := re.fullmatch(r"conv1_([wb])", key)) is not None:
        return f"conv1.{_BLOB_CONV[match[1]]}"
    if (match := re.fullmatch(r"res_conv1_bn_(s|b|rm|riv)", key)) is not None:
        return f"bn1.{_BLOB_BN[match[1]]}"
    found = re.fullmatch(r"res(\d)_(\d+)_branch(1|2[abc])(_bn)?_(w|s|b|rm|riv)", key)
    if found is None:
        return None
    stage, block, branch, bn, ending = found.groups()
    names = _BLOB_BN if bn else _BLOB_CONV
    if ending not in names:
        return None
    if branch == "1":
        inner = "downsample.1" if bn else "downsample.0"
    else:
        inner = ("bn" if bn else "conv") + str("abc".index(branch[1]) + 1)
    return f"layer{int(stage) - 1}.{block}.{inner}.{names[ending]}"


def caffe2_from_ours(key: str) -> str | None:
    """The other way; ``num_batches_tracked`` has no place."""
    name = key.rsplit(".", 1)[-1]
    bn = {v: k for k, v in _BLOB_BN.items()}.get(name)
    conv = {v: k for k, v in _BLOB_CONV.items()}.get(name)
    head = key.removesuffix(f".{name}")
    if head in ("fc", "conv1") and conv:
        return f"{'pred' if head == 'fc' else head}_{conv}"
    if head == "bn1" and bn:
        return f"res_conv1_bn_{bn}"
    found = re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)", head)
    if found is None:
        return None
    stage, block, part, number = found.groups()
    is_bn = part == "bn" or (part == "downsample." and number == "1")
    ending = bn if is_bn else conv
    if ending is None:
        return None
    branch = "1" if part == "downsample." else f"2{_LETTERS[number]}"
    middle = "_bn" if is_bn else ""
    return f"res{int(stage) + 1}_{block}_branch{branch}{middle}_{ending}"
