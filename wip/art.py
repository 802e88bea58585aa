"""art.py SEED KIND [rendered|knobs]: per-track correlation of one training clip."""
import sys; sys.path.insert(0,'/work/main')
import numpy as np, torch
from wan_mini.tiny import measure as M
from wan_mini.tiny.world import *
from wan_mini.tiny.evaluate import clip_seeds
from wan_mini.load import load_wan
import fastvmt
from dataclasses import replace
torch.set_num_threads(1)
wan=load_wan('/work/main/wan_mini/tiny/checkpoint',device='cpu',dtype=torch.float32)
import wan_mini.tiny.world as W
from wan_mini.tiny.data import to_videos
from wan_mini.video import from_model
for number,kind in clip_seeds(1,8):
    if kind not in sys.argv[1].split(','): continue
    clip=make_clip(number,kind,'train'); scene=other_scene(clip,number)
    # rendered with the other appearance: patch the scene in place
    rng=np.random.default_rng
    old=W._draw_scene
    def ds(*a,**k):
        s=old(*a,**k); return scene
    W._draw_scene=ds; ideal=make_clip(number,kind,'train').frames; W._draw_scene=old
    def show(name,frames):
        labels=M.label(frames); objects,right=M.read_scene(frames,labels,scene)
        true,owners=M.true_tracks(clip)
        found=M.hold(M.found_tracks(frames,labels,objects[:len(clip.objects)],true[owners==-1,0]))
        c=M.correlation(found,true)
        print(number,kind,name,'score %.2f'%M.score(frames,clip,scene)['correlation'],'owners',owners.tolist() if len(owners)<8 else len(owners),'corr',np.round(c,2)[:8],objects,clip.objects,clip.motions,flush=True)
    show('ideal',ideal)
    with torch.no_grad(): z=wan.vae.encode(to_videos(ideal[None],'cpu')); show('ideal through vae',from_model(wan.vae.decode(z)))
    if len(sys.argv)>2:
        r=fastvmt.transfer(wan,clip.frames,scene.caption,replace(fastvmt.TINY_MOTION,reference='clean'),seed=number); show('transfer',r.frames)
        np.save(f'/tmp/r{number}.npy',np.stack([clip.frames,r.frames]))
