"""The block types of GGUF files: their layouts in bytes, reading them, and rounding weights to them.

block_type = find_type("Q4_K")
blocks = block_type.encode(weight, importance)      # uint8 [out, bytes of a row]
again = block_type.decode(blocks)                   # float32 [out, in]
"""

from compress.kernels.codes.gguf.types import TYPES, BlockType, find_type

__all__ = ["TYPES", "BlockType", "find_type"]
