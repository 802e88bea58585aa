"""hack.py NAME knobs...: as quick.py, with variants by environment. REF0: the reference's flow is the clean one's."""
import sys, os; sys.path.insert(0,'/work/main')
from wan_mini.tiny import evaluate
import fastvmt, torch, pathlib
from dataclasses import replace
from wan_mini.load import load_wan
from wan_mini.runtime import parse_knobs
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS','1')))
wan=load_wan(os.environ.get('CKPT','/work/main/wan_mini/tiny/checkpoint'),device='cpu',dtype=torch.float32)
S={k:parse_knobs(fastvmt.TINY_MOTION,k.split(),'--vary') for k in sys.argv[2:]}
V=os.environ.get('VAR','').split(',')
G=fastvmt.Guide
old_init,old_loss_at=G.__init__,G.loss_at
def init(self,dit,z_ref,text,null,config,recompute=None):
    old_init(self,dit,z_ref,text,null,config,recompute)
    self.z_ref=z_ref
G.__init__=init
if 'REF0' in V:
    def loss_at(self,timestep,noised,show=lambda **k:None):
        if not hasattr(self,'clean_ref'):
            q,k=self.qk(self.z_ref,torch.zeros(1),self.null)
            self.clean_ref=self.flow(q,k,self.centres)[0]
        norms={}; self.report["key_gradient_norms"].append(norms)
        def loss(x):
            q,k=self.qk(x,timestep,self.text)
            amf,tr=self.losses(q,k,self.clean_ref,self.centres)
            return fastvmt.total_loss(amf,tr,self.config.weights)
        return loss
    G.loss_at=loss_at
def video(clip,prompt,setting,seed):
    r=fastvmt.transfer(wan,clip.frames,prompt,replace(fastvmt.TINY_MOTION,**S[setting]),seed=seed); return r.frames,r.report['gradients']
out=pathlib.Path(f'/work/main/outputs/wip/q{sys.argv[1]}.csv')
rows=evaluate.write_rows(evaluate.measure(video,list(S),1,int(os.environ.get('N','8')),'train'),out)
print(evaluate.table(rows))
