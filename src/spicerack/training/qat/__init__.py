"""Quantization-aware training for any loop: layers that round while they learn, put into a model and taken out of it.

prepare        prepare_qat and freeze: the way in and out
start          which layers, how each is rounded, where scales begin
twins          the table: what trains in the place of which layer
fake_layers    float layers that round as they compute
tuned_layers   packed layers whose scales train
gather         out of DDP, and together again behind FSDP2
batchnorm bitnet   normalisation folded into layers; BitNet's configs
"""
