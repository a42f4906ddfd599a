from __future__ import annotations

import torch
from torch import nn

from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_statistics import hessian_blocks


def test_products_of_a_site_are_summed_in_the_block_size_of_every_linear():
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(300, 72, generator=generator) @ torch.randn(72, 72, generator=generator)

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(72, 72), nn.Linear(72, 72)

        def forward(self, x_BTI):
            return self.left(x_BTI) + self.right(x_BTI)

    inputs_STI = x_TI.reshape(20, 15, 72)
    problem = BlockProblem(BlockFunction(Twins()), inputs_STI, inputs_STI, {}, batch_size=3)
    squares = hessian_blocks(problem, {}, {"left": 16, "right": 36})
    product_II = x_TI.T @ x_TI
    for linear, size in (("left", 16), ("right", 36)):
        for n, block_BB in enumerate(squares[linear]):
            expected = product_II[n * size : (n + 1) * size, n * size : (n + 1) * size]
            inside = len(expected)
            torch.testing.assert_close(block_BB[:inside, :inside], expected, rtol=1e-4, atol=1e-2)
            assert not block_BB[inside:].any()
