import csv,sys,glob
from collections import defaultdict
D=defaultdict(dict)
for p in sorted(sys.argv[1:]):
    for r in csv.DictReader(open(p)): D[r['setting']][r['clip']]=r
for s,R in D.items():
    k=defaultdict(list)
    for r in R.values():
        k[r['kind']].append(float(r['correlation']))
    tot=lambda c:sum(int(float(r[c])) for r in R.values())
    c=[float(r['correlation']) for r in R.values()]; f=[float(r['fidelity']) for r in R.values()]
    print(f"{s:42} n={len(R)} corr {sum(c)/len(c):.2f} fid {sum(f)/len(f):.2f} px {sum(float(r['error_px']) for r in R.values())/len(R):.1f} c/g/s/leak {tot('colour_ok')}/{tot('background_ok')}/{tot('shape_ok')}/{tot('leak')} "+' '.join(f"{kk[:3]} "+','.join(f'{x:.2f}' for x in v) for kk,v in k.items()))
