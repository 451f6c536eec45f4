"""What depends on what: the cut points of a trace's data flow, and its dead ends.

A node is a *cut* when every path from the input to the output passes through it: the outputs of the
residual blocks of a network are cuts, what is computed beside a skip connection is not. That is how
blocks are told from their insides without a list of architectures.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from nlsurgery.probe import Trace

#: Paths are counted with random edge weights modulo this prime, so that chance agreement is < 1e-12.
_PRIME = (1 << 61) - 1

#: Operations that mix tokens with one another: what follows depends on every token.
_MIXING = (
    "bmm",
    "baddbmm",
    "matmul",
    "convolution",
    "_softmax",
    "softmax",
    "fft",
    "roll",
    "einsum",
)


def _without_gate(trace: Trace, node: int) -> tuple[int, ...]:
    """The inputs of a node, less a per-channel gate (squeeze-and-excitation) that scales another.

    A gate makes no second path for features: a layer with one is still a plain chain.
    """
    info = trace.nodes[node]
    if len(info.preds) != 2 or not info.op.startswith("mul") or len(info.shape) not in (4, 5):
        return info.preds
    kept = tuple(p for p in info.preds if not _is_gate(trace.nodes[p].shape, info.shape))
    return kept or info.preds


def _is_gate(shape: tuple[int, ...], scaled: tuple[int, ...]) -> bool:
    if len(shape) != len(scaled) or shape == scaled:
        return False
    first, last = math.prod(shape[2:]) == 1, math.prod(shape[1:-1]) == 1
    return (first and math.prod(scaled[2:]) > 1) or (last and math.prod(scaled[1:-1]) > 1)


class Flow:
    """Dominators and liveness in one trace.

    Args:
        trace: The recorded forward.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._preds = [node.preds for node in trace.nodes]
        self._main = [_without_gate(trace, node) for node in range(len(trace.nodes))]
        self._succs: list[list[int]] = [[] for _ in self._preds]
        for node, preds in enumerate(self._preds):
            for pred in preds:
                self._succs[pred].append(node)
        weights = random.Random(0)
        self._weight = [
            {pred: weights.randrange(1, _PRIME) for pred in preds} for preds in self._main
        ]
        self._forward = self._count_forward()
        self.outputs = tuple(dict.fromkeys(out.node for out in trace.outputs))
        self._live = self._reach_back(self._preds, self.outputs)
        self.sink, self._cuts = self._choose_sink()
        self._to_sink = self._reach_back(self._main, (self.sink,)) if self.outputs else self._live

    def is_cut(self, node: int) -> bool:
        """Whether every path from the input to the main output passes through ``node``."""
        return node in self._cuts

    def is_between(self, node: int) -> bool:
        """Whether ``node`` lies on some path from the input to the main output."""
        return bool(self._forward[node]) and self._to_sink[node]

    def is_live(self, node: int) -> bool:
        """Whether some output of the model depends on ``node``."""
        return self._live[node]

    def is_joint_cut(self, nodes: Iterable[int]) -> bool:
        """Whether every path from the input to the main output passes through one of ``nodes``."""
        blocked = set(nodes)
        if not any(self.is_between(node) for node in blocked):
            return False
        reached = [False] * len(self._preds)
        for node in self.trace.inputs:
            reached[node] = node not in blocked
        for node, preds in enumerate(self._main):
            if preds and node not in blocked:
                reached[node] = any(reached[pred] for pred in preds)
        return not reached[self.sink]

    def only_prefix_read(self, node: int, num_prefix_tokens: int) -> bool:
        """Whether all that is read of a token tensor after ``node`` is its prefix tokens.

        The last block of a class-token classifier is such a place: what is inserted there on the
        patch tokens reaches no output.

        Args:
            node: A node of shape (B, P + N, C).
            num_prefix_tokens: P, 1 or more.
        """
        length = self.trace.nodes[node].shape[1]
        seen, queue = {node}, [node]
        while queue:
            current = queue.pop()
            if current in self.outputs:
                return False
            for following in self._succs[current]:
                info = self.trace.nodes[following]
                if not self._live[following] or following in seen:
                    continue
                if info.picked and self._drops_patches(info.picked, current, num_prefix_tokens):
                    continue
                if info.op in _MIXING or "attention" in info.op or "attn" in info.op:
                    return False
                if length not in info.shape and info.shape[0] % length:
                    return False
                seen.add(following)
                queue.append(following)
        return True

    def _drops_patches(self, picked: tuple[int, int, int], source: int, num_prefix: int) -> bool:
        dim, _, end = picked
        shape = self.trace.nodes[source].shape
        return dim == 1 and len(shape) == 3 and end <= num_prefix < shape[1]

    def _count_forward(self) -> list[int]:
        counts = [0] * len(self._preds)
        for node in self.trace.inputs:
            counts[node] = 1
        for node, preds in enumerate(self._main):
            if preds:
                weight = self._weight[node]
                counts[node] = sum(weight[pred] * counts[pred] for pred in preds) % _PRIME
        return counts

    def _reach_back(self, all_preds: Sequence[tuple[int, ...]], sinks: Iterable[int]) -> list[bool]:
        reached = [False] * len(all_preds)
        for sink in sinks:
            reached[sink] = True
        for node in range(len(self._preds) - 1, -1, -1):
            if reached[node]:
                for pred in all_preds[node]:
                    reached[pred] = True
        return reached

    def _cuts_to(self, sink: int) -> frozenset[int]:
        total = self._forward[sink]
        if not total:
            return frozenset()
        backward = [0] * len(self._preds)
        backward[sink] = 1
        cuts = []
        for node in range(sink, -1, -1):
            count = backward[node]
            if not count:
                continue
            if self._forward[node] * count % _PRIME == total:
                cuts.append(node)
            weight = self._weight[node]
            for pred in self._main[node]:
                backward[pred] = (backward[pred] + weight[pred] * count) % _PRIME
        return frozenset(cuts)

    def _choose_sink(self) -> tuple[int, frozenset[int]]:
        """Take the output with the longest chain of cuts: of a pyramid's levels, the deepest."""
        best: tuple[int, frozenset[int]] = (self.outputs[-1] if self.outputs else 0, frozenset())
        for sink in self.outputs[:32]:
            cuts = self._cuts_to(sink)
            if len(cuts) > len(best[1]):
                best = (sink, cuts)
        return best
