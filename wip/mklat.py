import sys,os; sys.path.insert(0,'/work/main')
import time,torch
from pathlib import Path
from wan_mini.tiny.train import *
if __name__=='__main__':
    torch.set_num_threads(2)
    work=Path('/work/main/outputs/tiny-shade'); work.mkdir(exist_ok=True)
    job=Job(RECIPES['motion'],work,Path('/work/main/wan_mini/tiny/checkpoint'),torch.device('cpu'),0,2,float('inf'),'')
    t=time.time(); latents_of(job,load_vae(job.folder/VAE_FILE,device=job.device,dtype=torch.float32)); print(time.time()-t)
