"""The kernels compile for a GPU on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "assign_kernel", "byte_sums_dequantize_kernel", "clipped_gradient_kernel", "clipped_weight_kernel",
    "cluster_sums_kernel", "codebook_dequantize_kernel", "codebook_product_kernel", "combine_kernel",
    "decode_attention_kernel", "dequantize_kernel", "descent_kernel", "draw_kernel", "experts_kernel", "gemm_kernel",
    "gemv_kernel", "group_dequantize_kernel", "hadamard_kernel", "lattice_dequantize_kernel", "lattice_halves_kernel",
    "lattice_product_kernel", "lattice_sweep_kernel", "lattice_tuning_kernel", "level_sweep_kernel",
    "low_rank_kernel", "move_kernel",
    "mxint_kernel", "nearest_e8p_kernel", "prepare_activations_kernel", "prepare_vector_kernel", "products_kernel",
    "project_kernel", "resident_product_kernel", "rotate_input_kernel", "rotate_output_kernel", "round_kernel",
    "route_kernel", "soft_gradient_kernel", "soft_weight_kernel", "stream_kernel", "sweep_kernel", "tall_kernel",
    "trellis_dequantize_kernel", "trellis_product_kernel", "vector_sweep_kernel", "viterbi_backward_kernel",
    "viterbi_forward_kernel",
}  # fmt: skip


def test_every_kernel_compiles_for_hopper(tmp_path):
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[1] / "common"), str(script.parents[2])])
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == KERNELS
