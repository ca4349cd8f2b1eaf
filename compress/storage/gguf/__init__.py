"""GGUF, the file format of llama.cpp: files, metadata and names of tensors, tokenizers, importance matrices."""
