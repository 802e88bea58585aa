"""fin.py OUT.csv parts...: merge in the order of clips, print the table and paired differences."""
import sys,csv; sys.path.insert(0,'/work/main')
import numpy as np
from wan_mini.tiny import evaluate
from wan_mini.tiny.evaluate import *
rows=[]
for p in sys.argv[2:]: rows+=list(csv.DictReader(open(p)))
order=[str(s) for s,_ in clip_seeds(0,50)]; sets=list(dict.fromkeys(['none','dense','windowed','interval1','flow_only','clean']))
rows.sort(key=lambda r:(order.index(r['clip']),sets.index(r['setting'])))
if sys.argv[1]!='-':
    with open(sys.argv[1],'w',newline='') as f:
        w=csv.DictWriter(f,COLUMNS); w.writeheader(); w.writerows(rows)
num=[{k:(v if k in('clip','kind','setting') else float(v)) for k,v in r.items()} for r in rows]
print(table(num,COLUMNS[3:]))
def diff(a,b,key='correlation',kind=None):
    A={r['clip']:r[key] for r in num if r['setting']==a and kind in(None,r['kind'])};B={r['clip']:r[key] for r in num if r['setting']==b}
    d=np.array([A[c]-B[c] for c in A if c in B]); d=d[~np.isnan(d)]
    if not len(d): return
    m=d[np.random.default_rng(0).integers(len(d),size=(2000,len(d)))].mean(1); lo,hi=np.quantile(m,(.025,.975))
    print(f'{a}-{b} {key} {kind or "all"}: {d.mean():+.3f} ±{(hi-lo)/2:.3f} n={len(d)}')
for k in ('correlation','fidelity','error_px'):
    for a,b in (('windowed','dense'),('windowed','interval1'),('windowed','flow_only'),('windowed','none'),('clean','windowed')): diff(a,b,k)
