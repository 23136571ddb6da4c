"""GGUF, the file of llama.cpp, Ollama and LM Studio: metadata, a table of tensors, and their bytes.

    ggml       its types, and a tensor of one
    metadata   typed keys and values
    reader     a file (or a split one) in: the header checked whole, then tensors as they lie
    writer     a file out: streaming, atomic, split where asked
    blocks     quantized tensors to rows of bytes and back, exactly; which type holds which scheme

Names of tensors and keys are llama.cpp's own here: what they are called in a model's folder is not for this room. Files
come from strangers and are attacked in practice: every length, count and offset is checked against the file before
anything is reserved or read for it.
"""
