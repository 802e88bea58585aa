"""Wan 2.1 text-to-video from scratch: the backbone FastVMT steers, and nothing of FastVMT.

Tensors are batch-first. One legend for every shape comment in this project:

    B batch    F,H,W latent frames and token grid    N = F*H*W tokens    L text tokens
    M heads    D head dim                            C model dim         T video frames

Sizes are lower-case variables (f, h, w), so that `F` stays `torch.nn.functional`.
"""
