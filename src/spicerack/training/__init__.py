"""Learning in few bits by one command: text, teacher, steps, checkpoints, and the folder that comes out.

job start settings     what is asked for, and what cannot be
text                   rows of tokens, packed once
trainer schedule callbacks distillation sharding   the loop: transformers' Trainer and what it lacks
files                  where a run lives until its model is whole
shipping               the folder, written, read back and measured
run                    all of it, in order
qat/                   layers that round while they learn, for any loop
"""
