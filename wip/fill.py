"""Fill README's tables from evaluation.csv: prints the table."""
import csv,sys; sys.path.insert(0,'/work/main')
import numpy as np
from wan_mini.tiny.world import KINDS
rows=[{k:(v if k in('clip','kind','setting') else float(v)) for k,v in r.items()} for r in csv.DictReader(open('/work/main/benchmarks/evaluation.csv'))]
def vals(s,k,c): 
    return np.array([r[c] for r in rows if r['setting']==s and k in(None,r['kind'])])
def cell(s,k,c,d=2):
    rng=np.random.default_rng(0); v=vals(s,k,c); v=v[~np.isnan(v)]
    m=v[rng.integers(len(v),size=(2000,len(v)))].mean(1); lo,hi=np.quantile(m,(.025,.975))
    return f"{v.mean():.{d}f} ± {(hi-lo)/2:.{d}f}"
S=['none','dense','windowed','interval1']
n=len(vals('interval1',None,'correlation'))
print("| | no guidance | dense flow | **windows, a gradient every 3rd update** | windows, every update"+("" if n==50 else f" ({n} clips)")+" | wanted |"); print("|---|---|---|---|---|---|")
print("| gradients | "+" | ".join(f"{vals(s,None,'gradients').mean():.0f}" for s in S)+" | |")
def line(name,cells,want): 
    cells=[f"**{c}**" if i==2 else c for i,c in enumerate(cells)]; print(f"| {name} | "+" | ".join(cells)+f" | {want} |".replace("|  |","| |"))
for k,name,w in zip(KINDS,("correlation, single object","several objects","moving camera","articulated object"),("0.90","0.80","0.80","0.80")):
    line(name,[cell(s,k,'correlation') for s in S],w)
line("all",[cell(s,None,'correlation') for s in S],"")
line("distance from the true path, px",[cell(s,None,'error_px',1) for s in S],"")
line("right colour / ground / shape, %",[" / ".join(f"{100*vals(s,None,c).mean():.0f}" for c in('colour_ok','background_ok','shape_ok')) for s in S],"97 / 97 / 90")
line("the reference's colour seen, %",[f"{100*vals(s,None,'leak').mean():.0f}" for s in S],"at most 2")
print(KINDS)
