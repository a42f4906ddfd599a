"""Plug-ins of engines that serve the native form of a checkpoint.

shards    what a rank of tensor parallelism holds of a linear; several linears as one
modules   the module of such a shard
stored    the tensors of one linear, gathered as an engine hands them over
vllm      the plug-in of vLLM, and the only file that imports it
"""
