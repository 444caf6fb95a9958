"""The ops as functions: what the layers compute with, for models that are written by hand."""

from .kernels.segment_plan import BASE, Segments
from .ops.call import Adapter, GroupLayer
from .ops.dora.dora import dora_linear
from .ops.embedding.embedding import lora_embedding
from .ops.experts.experts import lora_grouped_linear
from .ops.experts.routing import Routing
from .ops.head.head import TokenScores, lora_linear_cross_entropy, lora_linear_log_probs
from .ops.layer import lora_group, multi_lora_linear
from .ops.lora.linear import lora_linear
from .ops.mixed.mixed import lora_mixed_batch
from .ops.mlp.mlp import lora_activated_linear, lora_mlp

__all__ = [
    "BASE",
    "Adapter",
    "GroupLayer",
    "Routing",
    "Segments",
    "TokenScores",
    "dora_linear",
    "lora_activated_linear",
    "lora_embedding",
    "lora_group",
    "lora_grouped_linear",
    "lora_linear",
    "lora_linear_cross_entropy",
    "lora_linear_log_probs",
    "lora_mixed_batch",
    "lora_mlp",
    "multi_lora_linear",
]
