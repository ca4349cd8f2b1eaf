"""GGUF, the file format of llama.cpp: files, names of tensors, tokenizers, importance matrices."""
