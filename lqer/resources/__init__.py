"""What a run from nothing will take: bytes on the device, in RAM and on disk, and floating-point operations, by stage.

With s and r the bytes of a parameter as stored and in the run's dtype, p and o the parameters of a block and of what
surrounds the blocks, W windows of T tokens in batches of B, D the hidden size, V the vocabulary, sites of I features:

    walk         o·r + p·r (two stored blocks beside it in RAM where a GPU's next block is read ahead), hidden states
                 W·T·D·r, activations of a batch, B·T·(D + widest I)·r and a few times more. A model that cannot be
                 read block by block is in memory whole.
    rotate       (`quarot`) 4 bytes a parameter, in RAM; a tied head, which becomes a matrix of its own, is not counted.
                 FLOPs: 4·log2(D) a weight of a block, by the fast transform.
    calibrate    a walk; where E[x xᵀ] is gathered 8·I² a site in the making, and 4·I² more for what is written.
                 FLOPs: 2 a weight and token, 4·T·D a token and block for attention, 2·I² a token and site.
    quantize     p·s, the statistics of a block, the packed block, and copies of the largest linear and its solver's.
                 In the quantized stream the calibration's walk, twice, is part of it.
    steps        of whole blocks, part of quantize: a second set of hidden states, a block in float32 and what is learnt
                 of it, 40 bytes a weight; the activations of a micro-batch are kept for its gradient. FLOPs: 6 a weight
                 and token that something is learnt on, 2 for every ratio of AWQ's search.
    finetune     two whole models in the run's dtype, 20 bytes a value that is trained, the activations of a batch in
                 all blocks and its logits. FLOPs: 2 a weight and token forward, as many back (weights are frozen), 2
                 for the original where the loss compares with it.
    evaluate     the whole model in the run's dtype, or under evaluation.blockwise a walk; logits B·T·V·r.
                 FLOPs: as a walk's and 2·V·D a token, for each model.
    disk         the rotated model's blocks in float32, statistics, packed blocks by their formats' bits (again after
                 fine-tuning), spilled hidden states and accumulators.

What is stored and held by definition is exact up to small change; working memory is estimated and marked as such.
Linears of one module share a site if they read as many features, but for the last, which reads what the others made.

A rotated model is quantized from float32. Not counted: Hadamard transforms as a model runs, the search of lattice
codes, tasks under evaluation.downstream, reading files.
"""

from lqer.resources.stages import estimate
from lqer.resources.workload import Piece, Stage, Workload, input_sites, total

__all__ = ["Piece", "Stage", "Workload", "estimate", "input_sites", "total"]
