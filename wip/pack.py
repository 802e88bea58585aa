"""pack.py STATE.pt FOLDER: the shipped checkpoint with another transformer and text encoder, float16."""
import sys,os; sys.path.insert(0,'/work/main')
import torch,shutil
from pathlib import Path
from wan_mini.load import load_wan, save_wan
wan=load_wan('/work/main/wan_mini/tiny/checkpoint',device='cpu',dtype=torch.float32); st=torch.load(sys.argv[1],weights_only=True)['ema']
wan.dit.load_state_dict({k[4:]:v for k,v in st.items() if k.startswith('dit.')}); wan.text_encoder.load_state_dict({k[5:]:v for k,v in st.items() if k.startswith('text.')})
out=Path(sys.argv[2]); out.mkdir(parents=True,exist_ok=True)
save_wan(out,wan.dit.half(),wan.vae.half(),wan.text_encoder.half(),Path('/work/main/wan_mini/tiny/checkpoint/google/umt5-xxl/tokenizer.json'))
