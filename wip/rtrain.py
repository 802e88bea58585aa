"""With a head after block 2 that tells shape, offset and size per token of pictures (rtargets.py).
wtrain.py OUT STEPS W 'turns' [lr]: go on from the shipped checkpoint's training state; sprites weigh W at sigma <= .8. turns e.g. pcqp: p pictures, c clips, q closeups."""
import sys,os,time; sys.path.insert(0,'/work/main')
import numpy as np, torch, torch.nn.functional as F
from copy import deepcopy
from pathlib import Path
import wan_mini.dit as D
from wan_mini.tiny import train as T
from wan_mini.tiny.loop import update_ema
from wan_mini.tiny.muon import Muon, split_parameters
from wan_mini.tiny.matching import matching_loss, true_places
from wan_mini.tiny.grammar import casual, token_table
from wan_mini.load import load_wan, save_wan
torch.set_num_threads(2); torch._dynamo.config.cache_size_limit=64
def manual(q,k,v):
    q,k,v=(x.transpose(1,2) for x in (q,k,v)); return (((q*q.shape[-1]**-.5)@k.mT).softmax(-1)@v).transpose(1,2).flatten(2)
D.attention=manual
out,steps,W,turns=sys.argv[1],int(sys.argv[2]),float(sys.argv[3]),sys.argv[4]; lr=float(sys.argv[5]) if len(sys.argv)>5 else .012
start=sys.argv[6] if len(sys.argv)>6 else '/work/main/outputs/wip/keep/motion-3600.pt'
wan=load_wan('/work/main/wan_mini/tiny/checkpoint',device='cpu',dtype=torch.float32)
st=torch.load(start,weights_only=True,map_location='cpu')
model=torch.nn.ModuleDict({'dit':wan.dit,'text':wan.text_encoder}); model.load_state_dict(st['ema'])
for p in model.parameters(): p.requires_grad_()
ema=deepcopy(model).requires_grad_(False)
head=torch.nn.Sequential(torch.nn.LayerNorm(192),torch.nn.Linear(192,10)); RT={x:torch.from_numpy(np.load(f'/work/main/outputs/wip/rt-{x}.npy')) for x in ('pictures','clips')}; RW=float(os.environ.get('RW','.2'))
feat=[]
wan.dit.blocks[2].register_forward_hook(lambda m,i,o: feat.append(o))
hopt=torch.optim.Adam(head.parameters(),2e-3)
if 'head' in st: head.load_state_dict(st['head'])
m,r=split_parameters(model); muon=Muon(m,lr); adam=torch.optim.Adam(r,lr/10,betas=(.9,.99))
cache=Path('/work/main/outputs/tiny')
names={'p':'pictures','c':'clips','q':'closeups'}
L={};ids={};M={}
for s in set(turns):
    n=names[s]; files=sorted((cache/f'{n}-cb32ed84').glob('*.npy'))
    L[n]=np.concatenate([np.load(f) for f in files]); caps=sum((f.with_suffix('.txt').read_text().splitlines() for f in files),[])
    ids[n]=token_table(wan.tokenizer,[*caps,*map(casual,caps),'']); M[n]=np.load(f'/work/main/outputs/wip/mask-{n}.npy'); print(n,L[n].shape,M[n].shape,len(caps),flush=True)
for b in model['dit'].blocks: b.compile(dynamic=False)
B={'pictures':64,'clips':8,'closeups':256}
dit,enc=model['dit'],model['text']
log=[];t0=time.time()
for step in range(steps):
    n=names[turns[step%len(turns)]]; rng=np.random.default_rng((77,step)); k=B[n]
    picks=rng.integers(len(L[n]),size=k); clean=torch.from_numpy(L[n][picks]).float()
    row=ids[n][rng.choice([0,len(L[n])],size=k)+picks]; row=T.drop_captions(rng,row,ids[n][-1]); noise=T.normal(rng,clean); sigma=T.sample_sigma(rng,k)
    mask=torch.from_numpy(M[n][picks]).float()[:,None]  # (B,1,F,h,w)
    w=1+(W-1)*mask*(sigma<=.8).float()[:,None,None,None,None]
    lev=sigma[:,None,None,None,None]; noisy=(1-lev)*clean+lev*noise
    with torch.autocast('cpu',torch.bfloat16):
        mk=(row!=0).long(); text=enc(row,mk)*mk[...,None]
        if n=='clips':
            v,q,kk=dit(noisy,1000*sigma,text,qk_block=3,velocity=True)
            extra=.1*matching_loss(q,kk,torch.from_numpy(np.stack([true_places(int(p)) for p in picks])),dit.grid(clean),3.)
        else: v,extra=dit(noisy,1000*sigma,text),0
        r=torch.zeros(())
        if n in RT:
            y=head(feat[-1]).float(); g=RT[n][picks]; here=g[...,0]>0; ce=F.cross_entropy(y[...,:7].flatten(0,1),g[...,0].long().flatten(),reduction='none').view(here.shape)
            r=ce[here].mean()+.5*ce[~here].mean()+2*((y[...,7:]-g[...,1:]).abs().mean(-1)[here]).mean(); extra=extra+RW*r
        feat.clear()
        e=(v.float()-(noise-clean)).square(); loss=(w*e).mean()/w.mean()+extra
    loss.backward(); f=min(1,(step+1)/50)*(1-step/steps)
    for o,x in ((muon,lr),(adam,lr/10)):
        o.param_groups[0]['lr']=f*x; o.step(); o.zero_grad()
    hopt.step(); hopt.zero_grad()
    update_ema(ema,model,step,.998)
    with torch.no_grad(): sp=(e*mask).sum()/(mask.sum()*16).clamp(1)
    log.append((n,e.mean().item(),sp.item(),r.item()))
    if step%100==99:
        s={x:np.round(np.mean([l[1:] for l in log[-100:] if l[0]==x],0),4).tolist() for x in names.values() if any(l[0]==x for l in log[-100:])}
        print(step+1,f'{(time.time()-t0)/(step+1):.2f} s/step',s,flush=True)
    if step%300==299 or step+1==steps: torch.save({'ema':ema.state_dict(),'model':model.state_dict(),'head':head.state_dict(),'steps':step+1,'seconds':time.time()-t0},out+'.part'); os.replace(out+'.part',out)
