"""shape2.py CKPT n frames 'H,W' "cfg,steps,shift" ...: colour/ground/shape right of unguided single-object prompts (batched by hand)."""
import sys,os; sys.path.insert(0,'/work/main'); sys.stderr=open(os.devnull,'w')
import numpy as np, torch
from wan_mini.load import load_wan
from wan_mini.generate import generate, decode
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny import measure as M
from wan_mini.tiny.world import *
AMP=float(os.environ.get('AMP','0')); UNTIL=float(os.environ.get('UNTIL','.8'))
class Shaky(FlowEuler):
    def step(self,i,x,v):
        y=super().step(i,x,v)
        g=torch.Generator().manual_seed(i+1000*int(1e6*abs(float(x.flatten()[0])))%2**31)
        return y+AMP*torch.randn(y.shape,generator=g) if i<UNTIL*(len(self.sigmas)-1) and i else y
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS','1')))
src,n,frames=sys.argv[1],int(sys.argv[2]),int(sys.argv[3]); size=tuple(map(int,sys.argv[4].split(',')))
wan=load_wan('/work/main/wan_mini/tiny/checkpoint' if src.endswith(('-','.pt','.pt:model')) else src,device='cpu',dtype=torch.float32)
if '.pt' in src:
    f,_,part=src.partition(':'); st=torch.load(f,weights_only=True)[part or 'ema']
    wan.dit.load_state_dict({k[4:]:v for k,v in st.items() if k.startswith('dit.')}); wan.text_encoder.load_state_dict({k[5:]:v for k,v in st.items() if k.startswith('text.')})
for spec in sys.argv[5:]:
    cfg,steps,shift=map(float,spec.split(','))
    ok=np.zeros(3); like=[]
    for s in range(n):
        scene=make_clip(7_000_000+s,'single','train',frames=[])
        z=generate(wan,scene.caption,size=size,frames=frames,scheduler=Shaky(int(steps),shift),cfg=cfg,seed=s,negative='',device=torch.device('cpu'))
        f=decode(wan.vae,z,torch.device('cpu')); lab=M.label(f); o,r=M.read_scene(f,lab,scene)
        like.append(max(M._read_shape(lab==list(COLOURS).index(c))[0] for _,c in scene.objects))
        ok+=[r['colour_ok'],r['background_ok'],r['shape_ok']]
    print(os.path.basename(src),frames,size,spec,'c/g/s',np.round(ok/n,2),'likeness %.3f'%np.mean(like),flush=True)
