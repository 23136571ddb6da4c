"""From files, chats and data sets to tokens: whatever reads text for calibration, training or evaluation.

    tokenizer     the model's own, without running its code
    gguf          tokenizers and chat templates in the metadata of GGUF files, both ways
    pieces        a text file of any size, in pieces or as sentences
    chats         messages to text, by the template that came with a tokenizer
    documents     files, JSON lines, folders, chats and datasets, as passages
    windows       passages to windows of tokens, or to sentences: what an evaluation reads
    packing       passages to sequences
    calibration   some of these, chosen by seed
    generated     text that the model writes itself

Everything streams: no source is ever in memory as a whole. What is chosen depends on the seed and the source alone.
"""
