"""Masks of vivid pixels at latent resolution for every training datum, as the caches of latents order them."""
import sys; sys.path.insert(0,'/work/main')
import numpy as np
from multiprocessing import Pool
from wan_mini.tiny.data import make_picture, make_closeup
from wan_mini.tiny.world import make_clip
from wan_mini.tiny.measure import label
MAKE={'pictures':(make_picture,4096),'closeups':(make_closeup,8192),'clips':(make_clip,1024)}
def one(a):
    name,seed=a
    f=MAKE[name][0](seed).frames; m=label(f)>=0
    t,h,w=m.shape
    m=m.reshape(t,h//8,8,w//8,8).mean((2,4))
    if t>1: m=np.concatenate([m[:1],m[1:].reshape(-1,4,h//8,w//8).max(1)])
    return (m>.06)
if __name__=='__main__':
    with Pool(2) as p:
        for name in ('pictures','closeups','clips'):
            out=np.stack(p.map(one,[(name,s) for s in range(MAKE[name][1])],chunksize=64))
            np.save(f'/work/main/outputs/wip/mask-{name}.npy',out); print(name,out.shape,out.mean(),flush=True)
