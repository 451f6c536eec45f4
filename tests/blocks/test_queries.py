import pytest
import torch

from nlsurgery.blocks.affinity import MODES
from nlsurgery.blocks.non_local import NonLocal
from nlsurgery.blocks.self_attention import SelfAttention

NON_LOCAL = [(mode, sub_sample) for mode in MODES for sub_sample in (False, True)]


@pytest.mark.parametrize(
    "block",
    [NonLocal(8, mode=mode, sub_sample=sub_sample) for mode, sub_sample in NON_LOCAL]
    + [SelfAttention(8)],
    ids=[f"{mode}-{'pooled' if pooled else 'whole'}" for mode, pooled in NON_LOCAL] + ["sagan"],
)
def test_rows_asked_for_are_rows_of_the_whole_map(block: NonLocal | SelfAttention) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, 8, 5, 6, generator=generator)
    queries = torch.tensor([29, 0, 7, 7])
    rows = block.attention(x, queries=queries)
    torch.testing.assert_close(rows, block.attention(x)[:, queries], rtol=1e-5, atol=1e-6)
