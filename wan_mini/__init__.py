"""Wan 2.1 text-to-video from scratch: the backbone that FastVMT steers. Nothing here knows FastVMT.

Tensors are batch-first. One legend for every shape comment in this project:

    B batch    T video frames                F latent frames              N = F*H*W tokens    S = H*W tokens of a frame
    M heads    D width of a head             C width of the model         L text tokens       P pairs of frames
    H,W token grid, or sides of a video      h,w sides of latents, twice the token grid

Sizes are lower-case variables (f, h, w), so that `F` stays `torch.nn.functional`. How pixels, latents and tokens relate
is in config.py.
"""
