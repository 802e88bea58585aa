"""quick.py NAME knobs...: 8 training clips of seed 1, only the knobs."""
import sys; sys.path.insert(0,'/work/main')
from wan_mini.tiny import evaluate
import fastvmt, torch
from dataclasses import replace
from wan_mini.load import load_wan
from wan_mini.runtime import parse_knobs
torch.set_num_threads(1)
wan=load_wan('/work/main/wan_mini/tiny/checkpoint',device='cpu',dtype=torch.float32)
S={k:parse_knobs(fastvmt.TINY_MOTION,k.split(),'--vary') for k in sys.argv[2:]}
def video(clip,prompt,setting,seed):
    r=fastvmt.transfer(wan,clip.frames,prompt,replace(fastvmt.TINY_MOTION,**S[setting]),seed=seed); return r.frames,r.report['gradients']
import pathlib
evaluate.write_rows(evaluate.measure(video,list(S),1,8,'train'),pathlib.Path(f'/work/main/outputs/wip/q{sys.argv[1]}.csv'))
