"""Per token of every training picture: which body shape (0 none .. 6), offset to its centre in sizes, its size."""
import sys; sys.path.insert(0,'/work/main')
import numpy as np
from multiprocessing import Pool
from wan_mini.tiny.world import set_stage, topmost, SHAPES, FRAMES
S=list(SHAPES.values())
mid=16*(np.arange(12)+1j*np.arange(8)[:,None]).flatten()+7.5*(1+1j)
def clip(seed): return np.concatenate([one(seed,max(4*f-2,0)) for f in range(9)])
def one(seed,t=None):
    st=set_stage(seed); t=seed%FRAMES if t is None else t
    out=np.zeros((96,4),np.float32); best=np.full(96,1.35)
    for sp in st.sprites:
        if not any(sp.shape is s for s in S): continue
        c,size=sp.pose.shift[t],abs(sp.pose.turn[t]); d=(c-mid)/size
        # in reach of the shape, nearest in sizes
        near=np.abs(d)<best
        idx=[i for i,s in enumerate(S) if s is sp.shape][0]+1
        out[near]=np.stack([np.full(96,idx),d.real,d.imag,np.full(96,size/24)],1)[near]; best[near]=np.abs(d)[near]
    return out
if __name__=='__main__':
    with Pool(2) as p: o=np.stack(p.map(one,range(4096),chunksize=64))
    np.save('/work/main/outputs/wip/rt-pictures.npy',o); print(o.shape,np.bincount(o[...,0].astype(int).ravel()))
    with Pool(2) as p: c=np.stack(p.map(clip,range(1024),chunksize=16))
    np.save('/work/main/outputs/wip/rt-clips.npy',c); print(c.shape)
