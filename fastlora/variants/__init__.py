"""What the variants of LoRA need besides `fastlora.patch`. Importing it does nothing."""

from .adalora import RankAllocator
from .dora import kept_norms
from .penalty import orthogonality_penalty
from .shrink import shrink_to_ranks

__all__ = ["RankAllocator", "kept_norms", "orthogonality_penalty", "shrink_to_ranks"]
