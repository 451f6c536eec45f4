"""Layouts: the way to channels-first and back, against permutations written by hand."""

from __future__ import annotations

import pytest
import torch

from nlsurgery.blocks import Layout, from_channels_first, to_channels_first
from nlsurgery.blocks.geometry import to_map, to_tokens
from nlsurgery.blocks.layout import token_grid
from nlsurgery.errors import BlockError

# kind, prefix, grid, host shape, how that becomes (B, C, *spatial) by hand
CASES = [
    pytest.param(Layout("NCHW"), (2, 3, 4, 5), lambda x: x, id="NCHW"),
    pytest.param(Layout("NCL"), (2, 3, 4), lambda x: x, id="NCL"),
    pytest.param(Layout("NCTHW"), (2, 3, 2, 4, 5), lambda x: x, id="NCTHW"),
    pytest.param(Layout("NHWC"), (2, 4, 5, 3), lambda x: x.permute(0, 3, 1, 2), id="NHWC"),
    pytest.param(Layout("NTHWC"), (2, 2, 4, 5, 3), lambda x: x.permute(0, 4, 1, 2, 3), id="NTHWC"),
    pytest.param(Layout("NLC"), (2, 7, 3), lambda x: x.permute(0, 2, 1), id="NLC-sequence"),
    pytest.param(
        Layout("NLC", 2, (4, 5)),
        (2, 22, 3),
        lambda x: x[:, 2:].permute(0, 2, 1).reshape(2, 3, 4, 5),
        id="NLC-2d-prefix",
    ),
    pytest.param(
        Layout("NLC", 0, (2, 4, 5)),
        (2, 40, 3),
        lambda x: x.permute(0, 2, 1).reshape(2, 3, 2, 4, 5),
        id="NLC-3d",
    ),
]


@pytest.mark.parametrize(("layout", "shape", "by_hand"), CASES)
def test_there_and_back(layout, shape, by_hand):
    x = torch.randn(shape)
    y, prefix = to_channels_first(x, layout)
    assert torch.equal(y, by_hand(x))
    assert y.dim() == layout.dims + 2
    assert y.data_ptr() == x[:, layout.num_prefix_tokens :].data_ptr(), "a view, not a copy"
    back = from_channels_first(y + 1, prefix, layout, x)
    assert back.stride() == x.stride()
    expected = x + 1
    if layout.num_prefix_tokens:
        expected[:, : layout.num_prefix_tokens] = x[:, : layout.num_prefix_tokens]
    assert torch.equal(back, expected)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (0, 2, 1)], ids=str)
def test_the_order_of_strides_is_kept(order):
    """Hosts may return permuted views: what comes back has the same order of strides."""
    base = torch.randn(*(int(s) for s in (torch.tensor((2, 22, 3))[list(order)])))
    inverse = [order.index(i) for i in range(3)]
    x = base.permute(inverse)
    assert x.shape == (2, 22, 3)
    layout = Layout("NLC", 2, (4, 5))
    y, prefix = to_channels_first(x, layout)
    back = from_channels_first(y.contiguous(), prefix, layout, x)
    assert back.stride() == x.stride()
    assert torch.equal(back, x)


@pytest.mark.parametrize("kind", ["NHWC", "NLC"])
def test_gradients_pass(kind):
    layout = Layout("NLC", 1, (2, 3)) if kind == "NLC" else Layout("NHWC")
    x = torch.randn((2, 7, 3) if kind == "NLC" else (2, 2, 3, 4), requires_grad=True)
    y, prefix = to_channels_first(x, layout)
    back = from_channels_first(y * 2, prefix, layout, x)
    back.sum().backward()
    expected = torch.full_like(x, 2.0)
    if kind == "NLC":
        expected[:, :1] = 1.0
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(
    ("num_tokens", "grid", "expected"),
    [
        (196, (14, 14), (14, 14)),
        (256, (14, 14), (16, 16)),
        (98, (14, 7), (14, 7)),
        (8, (14, 7), (4, 2)),
        (8 * 49, (8, 7, 7), (8, 7, 7)),
        (8 * 100, (8, 7, 7), (8, 10, 10)),
        (27, (2, 2, 2), (3, 3, 3)),
        (5, (3,), (5,)),
    ],
    ids=str,
)
def test_token_grids_of_other_sizes(num_tokens, grid, expected):
    assert token_grid(num_tokens, grid) == expected


@pytest.mark.parametrize(("num_tokens", "grid"), [(150, (14, 14)), (0, (14, 14)), (7, (2, 3, 3))])
def test_tokens_that_form_no_grid(num_tokens, grid):
    with pytest.raises(BlockError, match=rf"{num_tokens} tokens .*input_size"):
        token_grid(num_tokens, grid)


@pytest.mark.parametrize(
    "arguments",
    [("NWHC",), ("NCHW", 1), ("NLC", -1), ("NLC", 0, (0, 3))],
    ids=str,
)
def test_layouts_that_make_no_sense(arguments):
    with pytest.raises(BlockError):
        Layout(*arguments)


def test_another_number_of_axes_is_an_error():
    with pytest.raises(BlockError, match=r"NHWC, but its output is \(2, 3, 4\)"):
        to_channels_first(torch.zeros(2, 3, 4), Layout("NHWC"))


def test_layout_functions_trace():
    class Host(torch.nn.Module):
        def forward(self, x):
            y, prefix = to_channels_first(x, LAYOUT)
            return from_channels_first(y + 1, prefix, LAYOUT, x)

    x = torch.randn(2, 7, 4)
    expected = torch.cat((x[:, :1], x[:, 1:] + 1), dim=1)
    compiled = torch.compile(Host(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(Host(), (x,))
    assert torch.equal(exported.module()(x), expected)


LAYOUT = Layout("NLC", 1, (2, 3))


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_last_stays_so_through_tokens(batch):
    """In torch's eyes too, which takes other convolutions where the stride of a batch of one is lost."""
    last = torch.channels_last
    x = torch.randn(batch, 6, 4, 5).to(memory_format=last).requires_grad_()
    tokens = to_tokens(x)
    y = to_map(tokens, x.shape[2:])
    seen: list[torch.Tensor] = []
    x.register_hook(seen.append)
    to_map(tokens * 2, x.shape[2:]).sum().backward()
    for made in (y, seen[0]):
        assert made.is_contiguous(memory_format=last)
        assert torch.nn.functional.conv2d(made, torch.ones(3, 6, 1, 1)).is_contiguous(
            memory_format=last
        )
    assert torch.equal(y, x)
    host = x.detach().flatten(2).transpose(1, 2)
    mapped, _ = to_channels_first(host, Layout("NLC", 0, (4, 5)))
    assert mapped.is_contiguous(memory_format=last)
