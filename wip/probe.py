"""probe.py CKPT_FOLDER|motion.pt[:model] [split] [n]: matching loss of moving tokens, flow correlation per kind and sigma, block 3."""
import sys; sys.path.insert(0,'/work/main')
import numpy as np, torch
from wan_mini.load import load_wan
from wan_mini.tiny.matching import *
from wan_mini.tiny.world import *
from wan_mini.tiny.data import to_videos
from wan_mini.generate import encode_prompts
from window import dense_amf, frame_pairs
torch.set_num_threads(int(sys.argv[4]) if len(sys.argv)>4 else 1)
src=sys.argv[1]; split=sys.argv[2] if len(sys.argv)>2 else 'held-out'; n=int(sys.argv[3]) if len(sys.argv)>3 else 3
cpu=torch.device('cpu')
wan=load_wan('/work/main/wan_mini/tiny/checkpoint' if '.pt' in src else src,device=cpu,dtype=torch.float32)
if '.pt' in src:
    f,_,part=src.partition(':'); st=torch.load(f,weights_only=True)[part or 'ema']
    wan.dit.load_state_dict({k[4:]:v for k,v in st.items() if k.startswith('dit.')}); wan.text_encoder.load_state_dict({k[5:]:v for k,v in st.items() if k.startswith('text.')})
(null,)=encode_prompts(wan,[''],cpu)
pairs=frame_pairs(9,4); I,J=np.array(pairs).T
home=torch.cartesian_prod(torch.arange(8.),torch.arange(12.))
with torch.no_grad():
  for kind in KINDS:
    row=[]
    data=[]
    for s in range(n):
        seed=5_000_000+s
        z=wan.vae.encode(to_videos(make_clip(seed,kind,split).frames[None],cpu)); data.append((z,torch.from_numpy(true_places(seed,kind,split))))
    for sigma in (0.,.5,.8,.9):
        L=[];a=[];b=[]
        for z,P in data:
            e=torch.randn(z.shape,generator=torch.Generator().manual_seed(1))
            q,k=wan.dit((1-sigma)*z+sigma*e,torch.tensor([1000*sigma]),null,qk_block=3)
            moving=P.clone(); rest=(P-home[None,:,None]).abs().amax(-1)<=.25; moving[rest]=np.nan
            L.append(matching_loss(q,k,moving[None],GRID,3.).item()*2)
            fl=dense_amf(q,k,GRID,pairs,tau=3.); tr=P[I,:,J]-home
            m=torch.isfinite(tr[...,0])&(tr.abs().amax(-1)>.5); a.append(fl[m].flatten()); b.append(tr[m].flatten())
        c=np.corrcoef(torch.cat(a),torch.cat(b))[0,1]
        row.append(f's={sigma}: loss {np.mean(L):5.2f} corr {c:5.2f}')
    print(f'{kind:12}',' | '.join(row),flush=True)
