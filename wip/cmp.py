import csv,sys,numpy as np
old={r['clip']:r for r in csv.DictReader(open('/work/main/benchmarks/evaluation.csv')) if r['setting']=='windowed'}
new=[r for p in (0,1) for r in csv.DictReader(open(f'/work/main/outputs/wip/s11.w.{p}.csv'))]
print(len(new))
for k in ('single','several','camera','articulated',None):
    for m in ('correlation','error_px','fidelity'):
        a=np.array([[float(r[m]),float(old[r['clip']][m])] for r in new if k in(None,r['kind'])]); a=a[~np.isnan(a).any(1)]; d=a[:,0]-a[:,1]
        b=d[np.random.default_rng(0).integers(len(d),size=(2000,len(d)))].mean(1); lo,hi=np.quantile(b,(.025,.975))
        print(k,m,'clean %.3f noised %.3f diff %+.3f ±%.3f'%(*a.mean(0),d.mean(),(hi-lo)/2))
print([sum(int(r[c]) for r in new) for c in ('colour_ok','background_ok','shape_ok','leak')])
